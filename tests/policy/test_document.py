"""A policy is decoded strictly, and nothing that fails a check gets through."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from typing import Any, Dict, List

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sekuire.errors import ConfigurationError, PolicyIntegrityError
from sekuire.policy import Policy, PolicyEnforcer
from sekuire.policy.document import (
    canonical,
    check_succession,
    content_hash,
    decode_policy,
    parse_key,
    read_rules,
    signed_message,
    thaw,
)

from ..support.waiting import GUARD

WORKSPACE = "ws_1"
CONTENT = {"permissions": {"tools": {"allowed_tools": ["read"], "blocked_tools": []}}}
PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = PRIVATE.public_key().public_bytes_raw()
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
OTHER_KEY = OTHER.public_key().public_bytes_raw()
LEFT_OUT = object()


def answer(content: Any = CONTENT, key: Ed25519PrivateKey = PRIVATE, **changes: Any) -> Dict[str, Any]:
    """A signed policy as the platform answers it; a value of ``LEFT_OUT`` takes a field away."""
    fields = {"policy_id": "pol_1", "workspace_id": WORKSPACE, "version": 3, **changes}
    digest = content_hash(content)
    signed = signed_message(digest, fields["policy_id"], fields["version"], fields["workspace_id"])
    whole = {
        "status": "active",
        "hash": digest,
        "content": content,
        "signature": key.sign(signed).hex(),
        "signing_key_id": "key_1",
        "signing_public_key": key.public_key().public_bytes_raw().hex(),
        "activated_at": "2026-01-02T03:04:05Z",
        **fields,
    }
    return {name: value for name, value in whole.items() if value is not LEFT_OUT}


def decode(payload: Any, **options: Any) -> Policy:
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return decode_policy(body, workspace_id=WORKSPACE, **options)


def refusal(payload: Any, **options: Any) -> PolicyIntegrityError:
    with pytest.raises(PolicyIntegrityError) as caught:
        decode(payload, **options)
    return caught.value


def tampered(**changes: Any) -> Dict[str, Any]:
    """A signed policy whose fields were changed after it was signed."""
    return {name: value for name, value in {**answer(), **changes}.items() if value is not LEFT_OUT}


# -- what is accepted -------------------------------------------------------------------------------------------------


def test_a_signed_policy() -> None:
    """Every field arrives; the body is kept as it came."""
    body = json.dumps(answer()).encode()
    policy = decode_policy(body, workspace_id=WORKSPACE, trusted_keys=[KEY])
    assert (policy.policy_id, policy.workspace_id, policy.version, policy.status) == ("pol_1", WORKSPACE, 3, "active")
    assert policy.hash == content_hash(CONTENT)
    assert thaw(policy.content) == CONTENT
    assert (policy.origin, policy.signing_key_id, policy.warnings) == ("pinned", "key_1", ())
    assert policy.activated_at is not None
    assert (policy.activated_at.isoformat(), policy.updated_at) == ("2026-01-02T03:04:05+00:00", None)
    assert policy.raw == body
    assert decode_policy(policy.raw, workspace_id=WORKSPACE, trusted_keys=[KEY]) == policy
    assert "raw" not in repr(policy)
    assert "allowed_tools" not in repr(policy)


def test_origin_says_what_the_signature_proved() -> None:
    """A key that came along proves integrity; no signature, or none that can be checked, proves nothing."""
    assert decode(answer()).origin == "integrity"
    unsigned = decode(tampered(signature=LEFT_OUT, signing_public_key=LEFT_OUT))
    assert (unsigned.origin, unsigned.warnings) == ("unsigned", ())
    unchecked = decode(tampered(signing_public_key=LEFT_OUT))
    assert unchecked.origin == "unsigned"
    assert unchecked.warnings == (
        "signature cannot be checked: no signing_public_key came with it, and no key is pinned",
    )


def test_pinned_keys() -> None:
    """Any pinned key will do, and the policy need not bring it."""
    assert decode(answer(), trusted_keys=[OTHER_KEY, KEY]).origin == "pinned"
    assert decode(tampered(signing_public_key=LEFT_OUT), trusted_keys=[OTHER_KEY, KEY]).origin == "pinned"


@pytest.mark.parametrize(
    "encode", [bytes.hex, lambda raw: raw.hex().upper(), lambda raw: base64.b64encode(raw).decode()]
)
def test_binary_texts(encode: Any) -> None:
    """Signature and key may be hex or base64."""
    whole = answer()
    changes = {name: encode(bytes.fromhex(whole[name])) for name in ("signature", "signing_public_key")}
    assert decode({**whole, **changes}, trusted_keys=[KEY]).origin == "pinned"


def test_a_version_may_be_a_numeric_string() -> None:
    """Its number is what counts, whether the number or the string was signed."""
    assert decode(tampered(version="3"), trusted_keys=[KEY]).version == 3
    assert decode(answer(version="3"), trusted_keys=[KEY]).version == 3


def test_content_is_read_only() -> None:
    """Nobody can change a verified policy, at any depth."""
    policy = decode(answer())
    tools = policy.content["permissions"]["tools"]
    assert tools["allowed_tools"] == ("read",)
    with pytest.raises(TypeError):
        tools["allowed_tools"] = ()
    with pytest.raises(AttributeError):
        policy.hash = ""  # type: ignore[misc]
    copy = thaw(policy.content)
    copy["permissions"]["tools"]["allowed_tools"].append("write")
    assert thaw(policy.content) == CONTENT


def test_a_policy_of_ones_own() -> None:
    """from_content() checks shapes as decoding does, is not tied to its argument, and is unsigned."""
    content: Dict[str, Any] = {"permissions": {"tools": {"blocked_tools": ["x"], "foo": 1}}}
    policy = Policy.from_content(content, workspace_id="w", policy_id="p", version=2)
    content["permissions"]["tools"]["blocked_tools"].clear()
    assert not PolicyEnforcer(policy).check_tool("x")
    assert (policy.workspace_id, policy.policy_id, policy.version, policy.origin) == ("w", "p", 2, "unsigned")
    assert policy.warnings == (
        "permissions.tools.foo is unknown and not enforced; known are allowed_tools, blocked_tools",
    )
    for wrong in (5, [], {"agent": 5}, {"a": {1, 2}}, {"a": float("nan")}, {"a": "\ud800"}, {1: 2}):
        with pytest.raises(PolicyIntegrityError):
            Policy.from_content(wrong)  # type: ignore[arg-type]


# -- integrity and origin ---------------------------------------------------------------------------------------------


def test_changes_after_signing() -> None:
    """Content, hash, id, version and workspace cannot be changed; the error says what was expected and found."""
    other = {"permissions": {}}
    error = refusal(tampered(content=other))
    assert error.expected == content_hash(CONTENT)
    assert error.found == content_hash(other)
    assert str(error) == f"hash: the policy says {error.expected}, its content has {error.found}"
    for changes in ({"content": other, "hash": content_hash(other)}, {"version": 4}, {"policy_id": "pol_2"}):
        error = refusal(tampered(**changes))
        assert str(error) == f"signature: is not by the key {KEY.hex()}"
    error = refusal(tampered(workspace_id="ws_2"))
    assert (error.expected, error.found) == (WORKSPACE, "'ws_2'")
    assert str(error) == "workspace_id: is 'ws_2', expected 'ws_1'"


def test_a_policy_of_another_workspace_in_this_ones_name() -> None:
    """A true signature for another workspace is no signature for this one."""
    stolen = answer(workspace_id="ws_2")
    stolen["workspace_id"] = WORKSPACE
    assert "is not by the key" in str(refusal(stolen, trusted_keys=[KEY]))


def test_pinned_means_pinned() -> None:
    """With a key pinned: no unsigned policy, no other key, no signature over the hash alone."""
    assert str(refusal(tampered(signature=LEFT_OUT), trusted_keys=[KEY])) == (
        "signature: the policy is not signed, and a key is pinned"
    )
    assert "not signed" in str(refusal(tampered(signature=None), trusted_keys=[KEY]))
    error = refusal(answer(key=OTHER), trusted_keys=[KEY])
    assert (error.expected, error.found) == (KEY.hex(), OTHER_KEY.hex())
    assert "which is not pinned" in str(error)
    # Claiming the pinned key, or none, does not help.
    assert "is not by the key" in str(
        refusal({**answer(key=OTHER), "signing_public_key": KEY.hex()}, trusted_keys=[KEY])
    )
    assert "is not by the key" in str(refusal({**answer(key=OTHER), "signing_public_key": None}, trusted_keys=[KEY]))
    over_hash = PRIVATE.sign(content_hash(CONTENT).encode()).hex()
    assert "covers the hash alone" in str(refusal(tampered(signature=over_hash), trusted_keys=[KEY]))
    assert decode(tampered(signature=over_hash)).origin == "integrity"


def test_signature_of_another_policy() -> None:
    """A signature that is well-formed and by the right key, but of something else, is refused."""
    assert "is not by the key" in str(refusal(tampered(signature=PRIVATE.sign(b"").hex()), trusted_keys=[KEY]))
    assert "is not by the key" in str(refusal(tampered(signature=PRIVATE.sign(b"").hex())))


@pytest.mark.parametrize("text", ["", "zz" * 64, "ab" * 63, "=" * 88, 5, {}, ["ab"], "é" * 128])
def test_malformed_signatures_and_keys(text: Any) -> None:
    """Neither is ignored when it cannot be read."""
    assert "signature: must be 64 bytes" in str(refusal(tampered(signature=text)))
    assert "signing_public_key: must be 32 bytes" in str(refusal(tampered(signing_public_key=text)))


def test_unknown_keys_are_refused_with_a_pinned_key() -> None:
    """They are warnings without one; the hint names what was probably meant."""
    content = {
        "permissions": {"network": {"enabled": True, "allowed_domain": ["x"]}, "shell": {}},
        "agent": {"name": "a"},
        "rate_limits": {"requests": {"max_per_day": 1}},
        "elsewhere": {"is": "free"},
    }
    assert decode(answer(content)).warnings == (
        "permissions.network.allowed_domain is unknown and may block something, so everything under network is denied "
        "(policy.unknown_key); did you mean 'allowed_domains'?",
        "permissions.shell is unknown and not enforced; known are network, filesystem, tools, api",
        "agent.name is unknown and not enforced; known are models, capabilities",
        "rate_limits.requests.max_per_day is unknown and not enforced; did you mean 'max_per_hour'?",
    )
    error = refusal(answer(content), trusted_keys=[KEY])
    assert str(error) == (
        "permissions.network.allowed_domain is unknown and may block something, so everything under network is denied "
        "(policy.unknown_key); did you mean 'allowed_domains'?"
        " (and 3 more); with a pinned key this is refused"
    )


def test_unknown_keys_in_great_numbers() -> None:
    """Only the first fifty are named."""
    content = {"permissions": {f"key_{number}": 1 for number in range(5000)}}
    assert len(decode(answer(content)).warnings) == 50


# -- strict JSON ------------------------------------------------------------------------------------------------------


def raw(content: str) -> bytes:
    return json.dumps({**answer(), "content": 0})[:-1].replace('"content": 0', f'"content": {content}').encode() + b"}"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"a": 1, "a": 1}', "the key 'a' is there twice"),
        ('{"a": {"b": 1, "\\u0062": 2}}', "the key 'b' is there twice"),
        ('{"a": NaN}', "holds NaN"),
        ('{"a": Infinity}', "holds Infinity"),
        ('{"a": -Infinity}', "holds -Infinity"),
        ('{"a": 1e999}', "not finite"),
        ('{"a": 1' + "0" * 309 + "}", "too large for a double"),
        ('{"a": ' + "1" * 10000 + "}", "too large for a double"),
        ('{"a": "\\ud800"}', "content.a: holds a lone surrogate"),
        ('{"a": ["x", "\\udc00\\ud800"]}', "content.a[1]: holds a lone surrogate"),
        ('{"\\ud800": 1}', "content: has a key with a lone surrogate"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "nested deeper than 64"),
        ('{"a": ' + "[" * 100000 + "]" * 100000 + "}", "nested"),
        ('{"a": 1,}', "is not JSON"),
        ("{'a': 1}", "is not JSON"),
        ('{"a": "\t"}', "is not JSON"),
        ('{"a": 01}', "is not JSON"),
    ],
)
def test_strictness(content: str, problem: str) -> None:
    """What two readers could take for different documents is refused, before its hash is looked at."""
    assert problem in str(refusal(raw(content)))


def test_a_field_twice() -> None:
    """Also outside the content: which of two hashes or workspaces counts must not be for a reader to choose."""
    body = json.dumps(answer())
    for field in ("hash", "workspace_id", "content"):
        twice = body[:-1] + f', "{field}": {json.dumps(answer()[field])}}}'
        assert f"the key '{field}' is there twice" in str(refusal(twice.encode()))


def test_a_place_is_put_into_words_for_an_error_alone() -> None:
    """A long key above many items costs no more than its length, and is cut in the error."""
    content = {"k" * 100_000: [0] * 200_000 + ["\ud800"]}
    with pytest.raises(PolicyIntegrityError) as caught:
        Policy.from_content(content)
    assert len(str(caught.value)) < 300
    assert "[200000]: holds a lone surrogate" in str(caught.value)


def test_a_part_that_was_probably_meant() -> None:
    """A misspelt part is a warning too, and no reason to refuse: what else is there is free."""
    content = {"permission": {}, "rate_limit": {}, "note": 1, "compliance": {}}
    policy = decode(answer(content), trusted_keys=[KEY])
    assert policy.warnings == (
        "permission is not enforced; did you mean 'permissions'?",
        "rate_limit is not enforced; did you mean 'rate_limits'?",
    )


@pytest.mark.parametrize("workspace", [None, "", 5, ".."])
def test_the_workspace_that_was_asked_for(workspace: Any) -> None:
    """It must be one: an answer that names none would match None."""
    with pytest.raises(ConfigurationError, match="workspace_id"):
        decode_policy(json.dumps(tampered(workspace_id=LEFT_OUT)).encode(), workspace_id=workspace)


def test_a_large_number_is_a_double() -> None:
    """However it is written, and in the canonical form too, which writes it as an integer up to 21 digits."""
    for text in ("9007199254740992", "9007199254740993", "9007199254740992.0", "9.007199254740992e15"):
        body = raw(f'{{"a": {text}, "compliance": {{}}}}').replace(
            content_hash(CONTENT).encode(), content_hash({"a": 2.0**53, "compliance": {}}).encode()
        )
        policy = decode(re.sub(rb'"signature": "[^"]*", ', b"", body))
        assert canonical(policy.content) == b'{"a":9007199254740992,"compliance":{}}'
    assert canonical({"a": 2**53}) == b'{"a":9007199254740992}'
    assert canonical(10**22) == b"1e+22"


def test_a_pair_of_surrogates_is_a_character() -> None:
    """Only lone ones are refused."""
    content = {"note": "\U0001f600", "compliance": {}}
    assert b"\\ud83d\\ude00" in json.dumps(answer(content)).encode()
    assert decode(answer(content)).content["note"] == "\U0001f600"


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"5", b'"x"', b"\xff{}", b"\xef\xbb\xbf{}", b"{} {}"])
def test_bodies_that_are_no_policy(body: bytes) -> None:
    """Each is refused with an error that says so."""
    assert "policy" in str(refusal(body))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"policy_id": LEFT_OUT}, "policy_id: must be an id"),
        ({"policy_id": ""}, "policy_id: must be an id"),
        ({"policy_id": 5}, "policy_id: must be an id"),
        ({"workspace_id": LEFT_OUT}, "workspace_id: is None, expected 'ws_1'"),
        ({"workspace_id": ["ws_1"]}, "workspace_id: is"),
        ({"version": LEFT_OUT}, "version: must be a whole number"),
        ({"version": -1}, "version: must be a whole number"),
        ({"version": 1.5}, "version: must be a whole number"),
        ({"version": True}, "version: must be a whole number"),
        ({"version": "3a"}, "version: must be a whole number"),
        ({"version": "-3"}, "version: must be a whole number"),
        ({"version": "\u0663"}, "version: must be a whole number"),
        ({"status": 1}, "status: is 1, and only an active policy is used"),
        ({"hash": LEFT_OUT}, "hash: must be 64 lower-case hex digits"),
        ({"hash": content_hash(CONTENT).upper()}, "hash: must be 64 lower-case hex digits"),
        ({"hash": content_hash(CONTENT)[:-1]}, "hash: must be 64 lower-case hex digits"),
        ({"content": LEFT_OUT}, "content: must be an object, not null"),
        ({"content": []}, "content: must be an object, not a list"),
    ],
)
def test_malformed_fields(changes: Dict[str, Any], problem: str) -> None:
    """The error names the field."""
    assert problem in str(refusal(tampered(**changes)))


# -- the content's shape ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"permissions": []}, "permissions: must be an object, not a list"),
        ({"agent": "x"}, "agent: must be an object, not a string"),
        ({"rate_limits": 0}, "rate_limits: must be an object, not a number"),
        ({"permissions": {"network": True}}, "permissions.network: must be an object, not a boolean"),
        ({"permissions": {"network": {"enabled": "false"}}}, "enabled: must be true or false, not a string"),
        ({"permissions": {"network": {"require_tls": 0}}}, "require_tls: must be true or false, not a number"),
        ({"permissions": {"network": {"allowed_domains": "x.org"}}}, "allowed_domains: must be a list of strings"),
        ({"permissions": {"network": {"blocked_domains": {"x": 1}}}}, "blocked_domains: must be a list of strings"),
        ({"permissions": {"network": {"blocked_domains": ["x.org", 5]}}}, "blocked_domains[1]: must be a string"),
        ({"permissions": {"network": {"blocked_domains": ["x.org", None]}}}, "blocked_domains[1]: must be a string"),
        ({"permissions": {"network": {"blocked_domains": ["https://x.org"]}}}, "[0]: 'https://x.org' is not a domain"),
        ({"permissions": {"network": {"blocked_domains": ["x.org:80"]}}}, "has a port"),
        ({"permissions": {"network": {"blocked_domains": ["a.*.org"]}}}, "has a star elsewhere"),
        ({"permissions": {"network": {"blocked_domains": ["*x.org"]}}}, "has a star elsewhere"),
        ({"permissions": {"network": {"blocked_domains": ["*."]}}}, "is not a domain"),
        ({"permissions": {"network": {"blocked_domains": [""]}}}, "is not a domain"),
        ({"permissions": {"network": {"blocked_domains": ["*.10.0.0.1"]}}}, "asks for subdomains of an address"),
        ({"permissions": {"network": {"blocked_domains": ["10.0.0.0/8"]}}}, "is not a domain"),
        ({"permissions": {"network": {"blocked_domains": ["[::1]"]}}}, "has a port or brackets"),
        ({"permissions": {"network": {"blocked_domains": ["127.0.0.1:80"]}}}, "has a port"),
        ({"permissions": {"filesystem": {"blocked_paths": ["/a/*/b"]}}}, "has a star elsewhere"),
        ({"permissions": {"filesystem": {"blocked_paths": ["/a/*.csv"]}}}, "has a star elsewhere"),
        ({"permissions": {"filesystem": {"blocked_paths": ["/a/**"]}}}, "has a star elsewhere"),
        ({"permissions": {"filesystem": {"blocked_paths": ["/a*"]}}}, "has a star elsewhere"),
        ({"permissions": {"filesystem": {"blocked_paths": ["\\*"]}}}, "has a star elsewhere"),
        ({"permissions": {"filesystem": {"blocked_paths": [""]}}}, "is empty"),
        ({"permissions": {"filesystem": {"blocked_paths": ["/a\0b"]}}}, "holds a NUL"),
        ({"permissions": {"filesystem": {"blocked_paths": ["~root/*"]}}}, "home of another user"),
        ({"permissions": {"filesystem": {"blocked_paths": ["file:///etc"]}}}, "is a URL"),
        ({"permissions": {"filesystem": {"blocked_paths": ["/" + "a" * 5000]}}}, "is longer than"),
        ({"permissions": {"filesystem": {"allowed_extensions": ["."]}}}, "is not an extension"),
        ({"permissions": {"filesystem": {"allowed_extensions": ["*.csv"]}}}, "is not an extension"),
        ({"permissions": {"tools": {"blocked_tools": [""]}}}, "'' is empty"),
        ({"permissions": {"tools": {"blocked_tools": ["shell\u200b"]}}}, "U+200B"),
        ({"permissions": {"tools": {"blocked_tools": ["shell "]}}}, "begins or ends with a space"),
        ({"rate_limits": {"requests": {"max_per_minute": -1}}}, "max_per_minute: must be a whole number"),
        ({"rate_limits": {"requests": {"max_per_minute": 1.5}}}, "max_per_minute: must be a whole number"),
        (
            {"rate_limits": {"tokens": {"max_per_hour": True}}},
            "max_per_hour: must be a whole number, 0 or more, not a b",
        ),
        (
            {"rate_limits": {"tokens": {"max_per_hour": "60"}}},
            "max_per_hour: must be a whole number, 0 or more, not a s",
        ),
    ],
)
def test_what_cannot_be_enforced(content: Dict[str, Any], problem: str) -> None:
    """A wrong type, or an entry that would match nothing, is refused by its path: neither may pass for a rule."""
    assert problem in str(refusal(answer(content)))
    with pytest.raises(PolicyIntegrityError):
        Policy.from_content(content)
    with pytest.raises(PolicyIntegrityError):
        read_rules(content)


def test_null_is_absent() -> None:
    """A null section or list is as good as none."""
    rules, warnings = read_rules(
        {
            "permissions": {"network": None, "tools": {"allowed_tools": None}},
            "agent": None,
            "rate_limits": {"requests": None},
        }
    )
    assert (rules, warnings) == (read_rules({})[0], ())
    assert rules.network is None


def test_a_limit_may_be_written_as_a_float() -> None:
    """60.0 has the canonical form 60, and must mean the same."""
    rules, _ = read_rules({"rate_limits": {"requests": {"max_per_minute": 60.0}}})
    assert rules.requests.max_per_minute == 60


# -- keys and succession ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        KEY.hex(),
        KEY.hex().upper(),
        base64.b64encode(KEY).decode(),
        base64.b64encode(KEY).decode().rstrip("="),
        base64.urlsafe_b64encode(KEY).decode(),
        f" {KEY.hex()}\n",
    ],
)
def test_keys(text: str) -> None:
    """Hex and both alphabets of base64, as people paste them."""
    assert parse_key(text) == KEY


@pytest.mark.parametrize("text", ["", "ab", "zz" * 32, KEY.hex()[:-2], KEY.hex() + "00", "é" * 64, "A" * 42 + "!="])
def test_texts_that_are_no_key(text: str) -> None:
    """The error says what a key looks like, and names the option."""
    with pytest.raises(ConfigurationError, match="64 hex digits or 44 characters of base64") as caught:
        parse_key(text)
    assert caught.value.option == "trusted_policy_keys"


def test_other_forms_of_keys() -> None:
    """PEM and bytes are told apart from a mistyped key."""
    with pytest.raises(ConfigurationError, match="not PEM"):
        parse_key("-----BEGIN PUBLIC KEY-----\n...")
    with pytest.raises(ConfigurationError, match="must be a str"):
        parse_key(KEY)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="parse_key"):
        decode(answer(), trusted_keys=[KEY.hex()])


def test_succession() -> None:
    """A version may stay or rise; it may not fall, nor mean something else than before."""
    known = decode(answer())
    later = decode(answer({"permissions": {}}, version=4))
    other = decode(answer({"permissions": {}}))
    check_succession(known, known)
    check_succession(known, later)
    with pytest.raises(PolicyIntegrityError, match="3 is older than 4") as caught:
        check_succession(later, known)
    assert (caught.value.expected, caught.value.found) == ("4 or later", "3")
    with pytest.raises(PolicyIntegrityError, match="version 3 has the hash") as caught:
        check_succession(known, other)
    assert (caught.value.expected, caught.value.found) == (known.hash, other.hash)
    with pytest.raises(PolicyIntegrityError, match="workspace_id"):
        check_succession(known, Policy.from_content({}, workspace_id="ws_2", version=9))


# -- without the extra ------------------------------------------------------------------------------------------------


def without_extra(code: str) -> str:
    """What a process prints in which no package of the extra can be imported."""
    blocker = """if True:
        import sys
        for name in ("blake3", "cryptography", "rfc8785", "limits", "redis"):
            sys.modules[name] = None
    """
    ran = subprocess.run(
        [sys.executable, "-c", blocker + code], capture_output=True, text=True, timeout=GUARD, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_an_enforcer_needs_no_extra() -> None:
    """A policy of one's own is enforced, rate limits in memory included, with nothing of the extra installed."""
    printed = without_extra("""
        from sekuire.policy import Policy, PolicyEnforcer
        policy = Policy.from_content({"permissions": {"tools": {"blocked_tools": ["x"]}},
                                      "rate_limits": {"requests": {"max_per_minute": 1}}})
        enforcer = PolicyEnforcer(policy)
        print(repr(policy.hash), bool(enforcer.check_tool("x")), bool(enforcer.check_tool("y")))
        print([bool(enforcer.check_rate_limit("requests")) for _ in range(2)])
    """)
    assert printed == "'' False True\n[True, False]\n"


def test_what_needs_the_extra_names_it() -> None:
    """Verifying, hashing and sharing limits say what to install."""
    printed = without_extra("""
        from sekuire import errors
        from sekuire.policy import RateLimiter, document
        body = b'{"policy_id": "p", "workspace_id": "w", "version": 1, "content": {}, "hash": "' + b"0" * 64 + b'"}'
        for call in (lambda: document.decode_policy(body, workspace_id="w"), lambda: document.content_hash({}),
                     lambda: RateLimiter("redis://localhost", namespace="w")):
            try:
                call()
            except errors.ConfigurationError as error:
                print(error)
    """)
    lines = printed.splitlines()
    assert len(lines) == 3
    assert all("pip install 'sekuire[policy]'" in line for line in lines)
    assert "'blake3'" in lines[0]
    assert "'limits'" in lines[2]


def test_the_package_offers_what_it_says() -> None:
    """Every public name can be imported and is listed; another is an AttributeError."""
    import sekuire.policy as package

    names: List[str] = package.__all__
    assert set(names) <= set(dir(package))
    assert all(getattr(package, name).__name__ == name for name in names)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = package.Nothing


def test_canonical_form_of_what_is_no_json() -> None:
    """A type that JSON lacks, or a key that is no string, has none."""
    for value in ({"a": b""}, {1: 2}, {"a": 10**400}, [object()], float("inf"), "\udfff"):
        with pytest.raises(PolicyIntegrityError, match="has no canonical form"):
            canonical(value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"Version": "2012-10-17", "Statement": [{"Effect": "Deny"}]}, "'Version', 'Statement'"),
        ({"policy": {"rules": []}}, "'policy'"),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, "'a', 'b', 'c', ..."),
    ],
)
def test_other_formats(content: Dict[str, Any], found: str) -> None:
    """Content in which nothing is known cannot be enforced, so that it is refused, and the error quotes its keys."""
    for body in (answer(content), answer(content)):
        assert f"content: has {found} and not one of permissions, agent, rate_limits, compliance" in str(refusal(body))
    with pytest.raises(PolicyIntegrityError, match="another format"):
        Policy.from_content(content)


@pytest.mark.parametrize("content", [{}, {"compliance": {"frameworks": ["soc2"], "x": [1]}}, {"agent": None}])
def test_content_that_restricts_nothing(content: Dict[str, Any]) -> None:
    """An empty content, and one that is not for a client to enforce, are policies, pinned too, without a warning."""
    assert decode(answer(content), trusted_keys=[KEY]).warnings == ()
