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

from sekuire import PolicyClient, PolicyGateway, RuntimeCredentials, WorkerConfig
from sekuire.errors import ConfigurationError
from sekuire.policy.limits import RateLimiter
from sekuire.secret import Secret, as_secret

TOKEN = "skt_do_not_show_me"
CLIENT = PolicyClient("http://127.0.0.1:1", api_key="sk_of_no_interest")
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
    """A secret equals a secret or a str of the same text, with the same hash."""
    assert (Secret(one) == Secret(other)) is (one == other)
    assert (Secret(one) == other) is (one == other)
    assert (other == Secret(one)) is (one == other)
    assert Secret(one) == Secret(one)
    assert Secret(one) == one
    assert {Secret(one): 1}[one] == 1
    assert hash(Secret(one)) == hash(one)


@pytest.mark.parametrize("other", ["\ud800", "schlüssel", "", b"token", None, 5])
def test_equality_with_anything_else(other: object) -> None:
    """Text that no secret can have, and other types, are unequal and raise nothing."""
    assert Secret(TOKEN) != other
    assert other != Secret(TOKEN)


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


def shown_of(build: Any) -> str:
    """Every frame, with its variables, of the error that ``build`` raises, except the test's own."""
    with pytest.raises(ConfigurationError) as caught:
        build()
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    return "".join(str(frame.locals) for frame in shown.stack if frame.filename != __file__) + str(caught.value)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Secret(f"{TOKEN}\n"),
        lambda: as_secret(f"{TOKEN}\n", "install_token"),
        lambda: RuntimeCredentials(runtime_token=TOKEN, refresh_token=f"{TOKEN} "),
        lambda: RuntimeCredentials(runtime_token=TOKEN, installation_id=".."),
        lambda: WorkerConfig(agent_id="a", install_token=TOKEN, max_workers=0),
        lambda: WorkerConfig(agent_id="a", proxies={"https": f"user:{TOKEN}@host"}),
        lambda: WorkerConfig(agent_id="a", api_base_url=f"https://user:{TOKEN}@host"),
        lambda: RateLimiter(f"nothing://user:{TOKEN}@host", namespace="ws"),
        lambda: PolicyGateway(CLIENT, "ws", storage_uri=f"nothing://user:{TOKEN}@host"),
    ],
)
def test_no_frame_of_an_error_holds_what_was_given(build: Any) -> None:
    """A token that was given to a constructor which fails is in no frame of its error."""
    assert TOKEN not in shown_of(build)


def test_an_object_that_is_not_whole() -> None:
    """What a constructor that has failed leaves behind does not hold the value that it refused."""
    half = RuntimeCredentials.__new__(RuntimeCredentials)
    with pytest.raises(ConfigurationError):
        half.__init__(runtime_token=TOKEN, refresh_token=f"{TOKEN}\n")  # type: ignore[misc]
    assert TOKEN not in repr(half) + repr(half.refresh_token)
