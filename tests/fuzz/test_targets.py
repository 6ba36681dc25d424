"""The fuzz target in the suite: every seed, mutated seeds, and that what it must notice is noticed."""

from __future__ import annotations

import json
import logging
from typing import Any, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sekuire.wire import protocol
from sekuire.wire.models import Command

from . import corpus
from .targets import FILES, NAMES, TARGETS, pieces_of, run

SEEDS = list(corpus.seeds())


@pytest.fixture(scope="module", autouse=True)
def files_are_closed() -> Iterator[None]:
    yield
    FILES.close()


@pytest.mark.parametrize("name", NAMES)
def test_seeds(name: str) -> None:
    """Nothing escapes from any seed, and every target has some."""
    mine = [seed for seed in SEEDS if seed[0] == NAMES.index(name)]
    assert len(mine) >= 5
    for seed in mine:
        run(seed)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A seed with a few bytes replaced, taken out, or put in."""
    data = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 3))):
        low = draw(st.integers(1, max(1, len(data))))
        high = draw(st.integers(low, low + 4))
        data = data[:low] + draw(st.binary(max_size=4)) + data[high:]
    return data


@settings(max_examples=500, deadline=None)
@given(mutated() | st.binary(max_size=100))
def test_mutated_seeds(data: bytes) -> None:
    """Nothing escapes from seeds that were damaged, or from any bytes."""
    run(data)


@pytest.mark.parametrize(
    "wrong",
    [KeyError("x"), Command(type="stop"), Command(type="pause", reason="a\nb"), Command(type="pause", command_id="..")],
    ids=repr,
)
def test_a_wrong_decoder_is_noticed(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is none of ours, and a value that breaks a promise, fail the target."""

    def decode(text: str) -> Any:
        if isinstance(wrong, BaseException):
            raise wrong
        return wrong

    monkeypatch.setattr(protocol, "decode_command", decode)
    with pytest.raises((KeyError, AssertionError)):
        run(corpus.of("command", b"{}"))
    with pytest.raises((KeyError, AssertionError)):
        run(corpus.of("stream", b"\0\0event: command\ndata: {}\n\n"))


def test_a_forged_line_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log message of the library with a line break in it fails the target."""
    real = protocol.decode_connected

    def decode(text: str) -> Any:
        logging.getLogger("sekuire.stream").error("it says %s", json.loads(text))
        return real(text)

    monkeypatch.setattr(protocol, "decode_connected", decode)
    run(corpus.of("connected", b'"x"'))
    with pytest.raises(AssertionError, match="it says"):
        run(corpus.of("connected", b'"a\\nb"'))


@given(st.binary())
def test_pieces_are_the_payload(data: bytes) -> None:
    """However an input cuts its payload, nothing is lost."""
    payload, pieces = pieces_of(data)
    assert b"".join(pieces) == payload
    assert data.endswith(payload)


def test_every_target_has_a_first_byte() -> None:
    """Each target can be reached."""
    assert list(TARGETS) == list(NAMES)
