"""Secrets: shown by nothing, refused when they could not stand in a header."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekuire.errors import ConfigurationError
from sekuire.secret import Secret, as_secret

TOKEN = "skt_do_not_show_me"
VISIBLE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1)


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        ascii,
        format,
        "{:>40}".format,
        "{0!r:s}".format,
        lambda secret: f"{secret}",
        lambda secret: "%s %r" % (secret, secret),  # noqa: UP031
        lambda secret: repr([secret, {"token": secret}, (secret,)]),
        lambda secret: json.dumps({"token": secret}, default=str),
        lambda secret: repr(dir(secret)),
    ],
)
def test_every_form_is_masked(show: Any) -> None:
    """However a secret is turned into text, its own text does not appear."""
    text = show(Secret(TOKEN))
    assert TOKEN not in text


def test_the_text_is_given_on_demand_only() -> None:
    """reveal() gives the text; a secret is no str, has no length, no items and no attributes to list."""
    secret = Secret(TOKEN)
    assert secret.reveal() == TOKEN
    assert not isinstance(secret, str)
    for use in (len, iter, vars, lambda value: value + "", lambda value: value[0], json.dumps):
        with pytest.raises(TypeError) as caught:
            use(secret)
        assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_is_not_pickled(protocol: int) -> None:
    """Pickling a secret fails and says what to do instead."""
    with pytest.raises(TypeError, match="RuntimeCredentialsStore") as caught:
        pickle.dumps({"token": Secret(TOKEN)}, protocol)
    assert TOKEN not in str(caught.value)


def test_it_cannot_be_changed_or_extended() -> None:
    """A secret has no settable attributes and no subclasses; copies are the same object."""
    secret = Secret(TOKEN)
    for name in ("text", "_Secret__text", "__text"):
        with pytest.raises(AttributeError):
            setattr(secret, name, "other")
    with pytest.raises(AttributeError):
        del secret._Secret__text  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        type("Loud", (Secret,), {})
    assert copy.copy(secret) is secret
    assert copy.deepcopy([secret])[0] is secret
    assert secret.reveal() == TOKEN


@given(VISIBLE, VISIBLE)
def test_equality_is_that_of_the_texts(one: str, other: str) -> None:
    """Two secrets are equal, with equal hashes, when their texts are; a secret never equals a str."""
    assert (Secret(one) == Secret(other)) is (one == other)
    assert Secret(one) == Secret(one)
    assert hash(Secret(one)) == hash(Secret(one))
    assert Secret(one) != one
    assert {Secret(one): 1}[Secret(one)] == 1
    assert hash(Secret(one)) != hash(one)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        (f"{TOKEN}\n", "begins or ends with whitespace"),
        (f" {TOKEN}", "begins or ends with whitespace"),
        (f"{TOKEN}\r\n", "begins or ends with whitespace"),
        (f"{TOKEN} x", "whitespace"),
        (f"{TOKEN}\x00", "visible ASCII"),
        (f"{TOKEN}\x7f", "visible ASCII"),
        (f"{TOKEN}\u00e9", "visible ASCII"),
        (f"{TOKEN}\u200b", "visible ASCII"),
        (f"{TOKEN}\ud800", "visible ASCII"),
        (TOKEN.encode(), "must be a str, got bytes"),
        (5, "must be a str, got int"),
        (None, "must be a str, got NoneType"),
    ],
)
def test_an_unusable_text_is_refused_unquoted(text: Any, problem: str) -> None:
    """A text that cannot stand in a header is refused with the reason and the option's name, and is not quoted."""
    with pytest.raises(ConfigurationError, match=problem) as plain:
        Secret(text)
    with pytest.raises(ConfigurationError, match=problem) as named:
        as_secret(text, "install_token")
    assert named.value.option == "install_token"
    for caught in (plain, named):
        assert TOKEN not in str(caught.value)
        assert TOKEN not in repr(caught.value)
        assert TOKEN not in "".join(traceback.format_exception(None, caught.value, caught.value.__traceback__))


@given(st.text())
def test_what_is_accepted_can_stand_in_a_header(text: str) -> None:
    """A text is accepted exactly when it is non-empty visible ASCII."""
    if text and all(0x21 <= ord(character) <= 0x7E for character in text):
        assert as_secret(text, "runtime_token").reveal() == text
    else:
        with pytest.raises(ConfigurationError):
            as_secret(text, "runtime_token")


def test_a_secret_stays_what_it_is() -> None:
    """as_secret() gives a Secret back unchanged."""
    secret = Secret(TOKEN)
    assert as_secret(secret, "runtime_token") is secret


def test_logging_shows_the_mask(caplog: pytest.LogCaptureFixture) -> None:
    """A secret given to a logger, or in a frame whose variables are shown, is masked."""
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").info("the token is %s", Secret(TOKEN))
    assert caplog.messages == ["the token is Secret('***')"]

    def fail(token: Secret) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError) as caught:
        fail(Secret(TOKEN))
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    frames = [frame for frame in shown.stack if frame.name == "fail"]
    assert frames[0].locals is not None
    assert frames[0].locals["token"] == "Secret('***')"
