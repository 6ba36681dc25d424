"""Secrets are taken out of texts, in every encoding, and nothing else is."""

from __future__ import annotations

import base64
import gc
import html
import json
from typing import Callable
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekuire._internal.scrub import scrub, scrub_bytes, scrub_json
from sekuire.secret import HiddenUrls, Secret, hide, living

TOKEN = "skt_a+b/c=d&e\"f'g\\h%25i<j>k-and_the_rest_of_it"
#: Kept, because only what lives is looked for.
KEPT = Secret(TOKEN)


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


ENCODINGS = [
    str,
    repr,
    json.dumps,
    lambda text: json.dumps(json.dumps(text)),
    lambda text: repr(json.dumps({"token": text})),
    lambda text: repr(text.encode()),
    lambda text: json.dumps(text).replace("/", "\\/"),
    lambda text: "".join(one if one.isalnum() else f"\\u{ord(one):04x}" for one in text),
    lambda text: "".join(one if one.isalnum() else f"\\x{ord(one):02x}" for one in text),
    quote,
    lambda text: quote(text, safe=""),
    lambda text: quote(text).lower(),
    lambda text: "".join(f"%{ord(one):02X}" for one in text),
    html.escape,
    encoded,
    lambda text: encoded(f"u:{text}"),
    lambda text: encoded(f"us:{text}"),
    lambda text: base64.urlsafe_b64encode(text.encode()).decode().rstrip("="),
    lambda text: encoded(text + "???").replace("/", "\\/"),
    lambda text: quote(encoded(text), safe=""),
    lambda text: text.encode().hex(),
    lambda text: text.encode().hex().upper(),
    str.upper,
    lambda text: text[:-1],
    lambda text: text[: len(text) // 2 + 1],
]


@pytest.mark.parametrize("encode", ENCODINGS)
def test_each_encoding(encode: Callable[[str], str]) -> None:
    """However a token is written, its text goes, each time it is there, and what is around it stays."""
    text = f"é one {encode(TOKEN)} two {encode(TOKEN)} three \\n %20 &amp; \ud800"
    clean = scrub(text)
    words = clean.split()
    assert (words[0], words[1], words[-5]) == ("é", "one", "three")
    assert clean.endswith(" three \\n %20 &amp; \ud800")
    assert clean.count("***") == 2
    for piece in (TOKEN[4:14], "of_it", encoded(TOKEN)[4:20], encoded(f"u:{TOKEN}")[8:20], "rest"):
        assert piece.lower() not in clean.lower()


def test_without_a_secret_a_text_is_itself() -> None:
    """A text without secrets is returned as it is, and bytes are not copied."""
    text = "a task of 5 % \\ &amp; https://host/path?x=1 user@host: none"
    data = text.encode()
    assert scrub(text) == text
    assert scrub_bytes(data) is data


def test_secrets_of_all_objects_while_they_live() -> None:
    """Whoever made a secret, it is looked for; one that is gone is forgotten, as are thousands of them."""
    other = hide("a secret of another object")
    assert scrub("it is a secret of another object.") == "it is ***."
    del other
    gc.collect()
    assert scrub("it is a secret of another object.") == "it is a secret of another object."
    before = len(living())
    for number in range(2000):
        Secret(f"skt_passing_{number}")
    gc.collect()
    assert len(living()) <= before


def test_a_short_secret_is_looked_for_as_a_word() -> None:
    """Seven characters would be found by chance within others, and three anywhere."""
    kept = [Secret("qx-rt-1"), Secret("qx-rt-18"), Secret("qxz")]
    assert scrub("(qx-rt-1), qx-rt-12, aqx-rt-1, aqx-rt-18a, qxz") == "(***), qx-rt-12, aqx-rt-1, a***a, qxz"
    assert len(kept) == 3


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("redis://user:pass@host:6379/0", "redis://***@host:6379/0"),
        ("redis://:p@host", "redis://***@host"),
        ("(http://u:p%40x@proxy:3128), then", "(http://***@proxy:3128), then"),
        ("postgresql+psycopg://u:p:q@h/db and amqp://a:b@c//", "postgresql+psycopg://***@h/db and amqp://***@c//"),
        ("https://user@host/", "https://user@host/"),
        ("https://host/a:b@c", "https://host/a:b@c"),
        ("mailto:a:b@c", "mailto:a:b@c"),
    ],
)
def test_passwords_within_urls(text: str, clean: str) -> None:
    """The user and the password of any URL go, whoever's it is."""
    assert scrub(text) == clean


def test_the_parts_of_a_hidden_url() -> None:
    """A proxy's password is found alone, decoded, and as HTTP's Basic writes it; the object shows none of it."""
    urls = HiddenUrls({"https": "http://user:pass%2Fword1@proxy.test:3128"})
    basic = base64.b64encode(b"user:pass/word1").decode()
    assert scrub(f"pass%2Fword1 or pass/word1 in Basic {basic}.") == "*** or *** in Basic ***."
    assert dict(urls) == {"https": "http://user:pass%2Fword1@proxy.test:3128"}
    assert urls == dict(urls)
    assert "word1" not in repr(urls) + str(urls) + repr(vars(type(urls)))


TOKENS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=8, max_size=60)


@given(TOKENS, st.binary(max_size=9), st.binary(max_size=9))
def test_base64_of_anything_around_it(token: str, before: bytes, after: bytes) -> None:
    """Wherever a token stands in what is encoded, what stays of it decodes to at most one character at each end."""
    secret = Secret(token)
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        text = encode(before + token.encode() + after).decode()
        clean = scrub(text)
        left = len(text) - len(clean) + 3
        assert "***" in clean
        assert left >= (len(token) * 8) // 6 - 1
    assert secret.reveal() == token


@given(TOKENS, st.recursive(st.text(max_size=5), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_stays_json(token: str, value: object) -> None:
    """Whatever the token and the value are, what comes out is JSON, and it does not hold the token."""
    secret = Secret(token)
    texts = [token, f"\n{token}", f"\\{token}\\", repr(token), encoded(token), quote(token, safe="")]
    for ascii_only in (True, False):
        data = json.dumps({"value": [value, texts, {token: 1}]}, ensure_ascii=ascii_only).encode("utf-8", "replace")
        assert token not in str(json.loads(scrub_json(data)))
    assert secret.reveal() == token


def test_keys_that_differ_by_a_secret_stay_apart() -> None:
    """Platforms refuse an object that has a key twice, and with it the whole batch of audit events."""
    secrets = [Secret(f"rt_keys-{number}-abcdefgh") for number in range(3)]
    data = json.dumps({**{one.reveal(): n for n, one in enumerate(secrets)}, "*** (2)": 3, "\ud800": 4}).encode()
    pairs = json.loads(scrub_json(data), object_pairs_hook=list)
    assert len({key for key, _ in pairs}) == 5
    assert [value for _, value in pairs] == [0, 1, 2, 3, 4]
    assert not any(secret.reveal() in str(pairs) for secret in secrets)
