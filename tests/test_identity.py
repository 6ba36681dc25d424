"""The SekuireID of an agent: known answers of another implementation, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sekuire.errors import ConfigurationError
from sekuire.identity import sekuire_id

from .policy.test_vectors import reference
from .support.servers import run_python

AGENTS = [
    ("gpt-4o", "You are helpful.", None),
    ("claude-3", "  Prüfe genau.\n", [{"name": "suche", "b": 1, "a": [True, None, 1.5]}]),
    ("m", "", []),
    ("m" * 2000, "y" * 5000, [{"n": number} for number in range(300)]),
    ("m", "p", {"\U0001f600": "\u2028", "\ufb33": '"\\'}),
]


def by_hand(model: str, prompt: str, tools: Any) -> str:
    """The formula of docs/protocol.md, with BLAKE3 in plain Python (tests/vectors/make.py)."""
    blake3 = reference().blake3
    text = json.dumps(tools, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    parts = f"model:{model}", f"prompt:{blake3(prompt.strip().encode())}", f"tools:{blake3(text.encode())}"
    return str(blake3("|".join(parts).encode()))


@pytest.mark.parametrize(("model", "prompt", "tools"), AGENTS)
def test_another_implementation(model: str, prompt: str, tools: Any) -> None:
    """The package and a BLAKE3 in plain Python give the same id."""
    expected = by_hand(model, prompt, [] if tools is None else tools)
    assert sekuire_id(model=model, system_prompt=prompt, tools=tools) == expected


def test_a_known_answer() -> None:
    """The id of the example never changes."""
    known = "76ef25531c704d013b929bfe05b972b7092fb713b33a45a3e18ad9d8139bdc6b"
    assert sekuire_id(model="gpt-4o", system_prompt="You are helpful.") == known
    assert sekuire_id(model="gpt-4o", system_prompt="\n You are helpful.\t", tools=[]) == known
    assert sekuire_id(model="gpt-4o", system_prompt="You are helpful!") != known


def test_the_order_of_keys() -> None:
    """It does not count; the order of tools does."""
    one, two = {"name": "a", "x": {"p": 1, "q": 2}}, {"x": {"q": 2, "p": 1}, "name": "a"}
    ids = [sekuire_id(model="m", system_prompt="p", tools=tools) for tools in ([one], [two], [one, {}], [{}, one])]
    assert ids[0] == ids[1]
    assert ids[2] != ids[3]


def deep() -> Any:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("model", "prompt", "tools", "option"),
    [
        ("", "p", None, "model"),
        (" ", "p", None, "model"),
        (None, "p", None, "model"),
        ("\ud800", "p", None, "model"),
        ("m", b"p", None, "system_prompt"),
        ("m", "\ud800", None, "system_prompt"),
        ("m", "p", [float("nan")], "tools"),
        ("m", "p", [{1: 2}], "tools"),
        ("m", "p", [{None: 2}], "tools"),
        ("m", "p", {"a", "b"}, "tools"),
        ("m", "p", ["\ud800"], "tools"),
        ("m", "p", deep(), "tools"),
    ],
)
def test_what_is_refused(model: Any, prompt: Any, tools: Any, option: str) -> None:
    """A wrong value is named, and nothing is calculated."""
    with pytest.raises(ConfigurationError) as caught:
        sekuire_id(model=model, system_prompt=prompt, tools=tools)
    assert caught.value.option == option


def test_without_the_extra() -> None:
    """The error names what to install."""
    done = run_python(
        """
import sys
sys.modules["blake3"] = None
from sekuire.errors import ConfigurationError
from sekuire.identity import sekuire_id
try:
    sekuire_id(model="m", system_prompt="p")
except ConfigurationError as error:
    print(error)
"""
    )
    assert "pip install 'sekuire[policy]'" in done.stdout
