"""What holds for every policy and every question, tried on thousands of generated ones."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import posixpath
import re
from typing import Any, Dict, Iterator, List

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sekuire.errors import PolicyIntegrityError
from sekuire.policy import Policy, PolicyEnforcer
from sekuire.policy.document import canonical, content_hash, decode_policy, parse_key, thaw
from sekuire.policy.matching import Names, Paths, Unreadable, glob, read_host, read_path

#: Names and hosts made of little, so that entries and questions meet.
NAMES = st.text("ab_\u00e9\u0301\uff41AB", min_size=1, max_size=6)
PATTERNS = st.text("ab*_\u00e9A", min_size=1, max_size=6)
HOSTS = st.lists(st.sampled_from(["a", "b", "example", "com", "\u00fc", "xn--tda", "A"]), min_size=1, max_size=4).map(
    ".".join
)
DOMAINS = st.one_of(st.just("*"), HOSTS, HOSTS.map(lambda host: f"*.{host}"))
SEGMENTS = st.sampled_from(["work", "secret", "x", "..", ".", "", "link", "WORK", "out", "..."])
RELATIVE = st.lists(SEGMENTS, min_size=1, max_size=7).map("/".join).filter(bool)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


def permissions(**sections: Any) -> Dict[str, Any]:
    return {"permissions": sections}


# -- documents --------------------------------------------------------------------------------------------------------

_LEAVES = JSON | st.lists(st.one_of(NAMES, DOMAINS, st.text(max_size=5), st.integers()), max_size=3) | st.booleans()
_SECTION = st.dictionaries(
    st.sampled_from(
        ["enabled", "require_tls", "allowed_domains", "blocked_domains", "allowed_paths", "blocked_paths",
         "allowed_extensions", "allowed_tools", "blocked_tools", "allowed_services", "blocked_services",
         "allowed_models", "denied_models", "allowed_providers", "denied_tools", "allowed_capabilities",
         "denied_capabilities", "max_per_minute", "max_per_hour", "other"]
    ),
    _LEAVES,
    max_size=3,
)  # fmt: skip
_PART = st.dictionaries(
    st.sampled_from(["network", "filesystem", "tools", "api", "models", "capabilities", "requests", "tokens", "other"]),
    st.one_of(_SECTION, _LEAVES),
    max_size=4,
)
#: Documents that look like policies, with anything where something was expected.
CONTENTS = st.dictionaries(
    st.sampled_from(["permissions", "agent", "rate_limits", "other"]), st.one_of(_PART, _LEAVES), max_size=4
)


def ask_everything(enforcer: PolicyEnforcer, text: str) -> List[Any]:
    return [
        enforcer.check_network(text, text),
        enforcer.check_network("a.example.com", "https"),
        enforcer.check_filesystem(text, text),
        enforcer.check_filesystem("/a/b.csv", "read"),
        enforcer.check_tool(text),
        enforcer.check_api(text),
        enforcer.check_model(text, text),
        enforcer.check_model("a"),
        enforcer.check_capability(text),
        enforcer.check_rate_limit("requests"),
        enforcer.check_rate_limit("tokens", 5),
    ]


@given(content=CONTENTS | JSON, text=NAMES | st.text(max_size=12))
def test_any_content_gives_decisions_or_a_clear_error(content: Any, text: str) -> None:
    """No content crashes anything: it is refused by a path, or every question about it gets an answer."""
    problem = ""
    try:
        policy = Policy.from_content(content)
    except PolicyIntegrityError as error:
        problem = str(error)
    if problem:
        assert re.match(r"(content|permissions|agent|rate_limits)", problem)
        return
    for decision in ask_everything(PolicyEnforcer(policy), text):
        assert decision.allowed is (decision.rule is None)
        assert decision.reason


@given(payload=JSON | CONTENTS, content=CONTENTS, cut=st.integers(0, 400), extra=st.binary(max_size=6))
def test_any_body_gives_a_policy_or_a_clear_error(payload: Any, content: Any, cut: int, extra: bytes) -> None:
    """Nor does any answer of a platform, true, cut or overwritten."""
    whole: Dict[str, Any] = {"policy_id": "p", "workspace_id": "w", "version": 1, "content": content, "hash": "0" * 64}
    try:
        whole["hash"] = content_hash(content)
    except PolicyIntegrityError:
        pass
    texts = [json.dumps(payload).encode(), json.dumps(whole).encode()]
    texts.append(texts[1][:cut] + extra + texts[1][cut + len(extra) :])
    texts.append(extra)
    for body in texts:
        policy = None
        try:
            policy = decode_policy(body, workspace_id="w")
        except PolicyIntegrityError:
            pass
        if policy is not None:
            assert policy.origin == "unsigned"
            assert policy.hash == content_hash(thaw(policy.content))
        with pytest.raises(PolicyIntegrityError):
            decode_policy(body, workspace_id="w", trusted_keys=[parse_key("ab" * 32)])


@given(value=JSON)
def test_the_canonical_form_is_one(value: Any) -> None:
    """It reads back to the same value, and is the form of that one too."""
    try:
        form = canonical(value)
    except PolicyIntegrityError:
        return
    assert canonical(json.loads(form)) == form
    assert canonical(json.loads(json.dumps(value))) == form


# -- blocked beats allowed --------------------------------------------------------------------------------------------


@given(name=NAMES, blocked=st.lists(PATTERNS, max_size=3), allowed=st.none() | st.lists(PATTERNS, max_size=3))
def test_a_blocked_name_is_never_allowed(name: str, blocked: List[str], allowed: Any) -> None:
    """Whatever is allowed beside it; and what is allowed matches an entry code point by code point."""
    content = {
        **permissions(
            tools={"blocked_tools": blocked, "allowed_tools": allowed},
            api={"blocked_services": blocked, "allowed_services": allowed},
        ),
        "agent": {
            "models": {"denied_models": blocked, "allowed_models": allowed},
            "capabilities": {"denied_capabilities": blocked, "allowed_capabilities": allowed},
        },
    }
    enforcer = PolicyEnforcer(Policy.from_content(content))
    hit = any(glob(entry.split("*"), name) for entry in blocked)
    listed = allowed is None or any(glob(entry.split("*"), name) for entry in allowed)
    for decision in (enforcer.check_tool(name), enforcer.check_api(name), enforcer.check_capability(name)):
        if hit:
            assert decision.rule is not None
            assert decision.rule.endswith(".blocked")
        if decision:
            assert listed
    model = enforcer.check_model(name)
    assert not (hit and model)
    if model:
        assert listed or allowed == []


@given(host=HOSTS, blocked=st.lists(DOMAINS, max_size=3), allowed=st.none() | st.lists(DOMAINS, max_size=3))
def test_a_blocked_domain_is_never_allowed(host: str, blocked: List[str], allowed: Any) -> None:
    """By whichever spelling; and every spelling of one host gets the same answer."""

    def covers(entries: List[str]) -> bool:
        (form,) = read_host(host)
        for entry in entries:
            if entry == "*":
                return True
            (base,) = read_host(entry[2:] if entry.startswith("*.") else entry)
            if form == base or (entry.startswith("*.") and form.endswith(f".{base}")):
                return True
        return False

    section = {"blocked_domains": blocked, "allowed_domains": allowed}
    enforcer = PolicyEnforcer(Policy.from_content(permissions(network=section)))
    if covers(blocked):
        wanted = "network.blocked"
    else:
        wanted = None if allowed is None or covers(allowed) else "network.not_allowed"
    spellings = [
        host,
        host.upper(),
        f"{host}.",
        f"{host}:443",
        host.replace(".", "\u3002"),
        host.encode("idna").decode(),
    ]
    assert {enforcer.check_network(spelling, "https").rule for spelling in spellings} == {wanted}


@given(text=st.text(max_size=20) | st.text("ab.:/@[]%0x1*\u3002\uff0e\u00ad\u200d", max_size=16))
def test_any_host_is_read_or_refused(text: str) -> None:
    """What is read is lower-case ASCII without anything that ends a host in a URL."""
    try:
        forms = read_host(text)
    except Unreadable:
        return
    for form in forms:
        assert re.fullmatch(r"[a-z0-9_.-]+|[0-9a-f:]+", form), (text, form)
        assert ".." not in form
        assert form == read_host(form)[0]


# -- paths ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    root = pathlib.Path(os.path.realpath(tmp_path_factory.mktemp("tree")))
    for directory in ("work/x", "secret/x", "work/WORK"):
        (root / directory).mkdir(parents=True)
    if os.name == "posix":
        (root / "work" / "link").symlink_to("../secret")
        (root / "work" / "x" / "link").symlink_to("..")
        (root / "secret" / "link").symlink_to(root / "work" / "x")
        (root / "work" / "out").symlink_to("../../nowhere/x")
        (root / "link").symlink_to("work")
    before = os.getcwd()
    os.chdir(root)
    yield root
    os.chdir(before)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=RELATIVE, absolute=st.booleans())
def test_no_path_escapes(tree: pathlib.Path, path: str, absolute: bool) -> None:
    """What is allowed under ``work`` is there by the file system's own resolution; what is there is never elsewhere."""
    asked = f"{tree}/{path}" if absolute else path
    assume(asked[0] != "~")
    real = os.path.realpath(asked)
    enforcer = PolicyEnforcer(
        Policy.from_content(
            permissions(filesystem={"allowed_paths": [f"{tree}/work/*"], "blocked_paths": ["work/x/*"]})
        )
    )
    decision = enforcer.check_filesystem(asked, "read")
    inside = (real + "/").startswith(f"{tree}/work/")
    blocked = (real + "/").startswith(f"{tree}/work/x/")
    if decision:
        assert inside
        assert not blocked
    if blocked:
        assert decision.rule == "fs.blocked"
    if inside and not blocked and not (os.path.normpath(os.path.join(tree, asked)) + "/").startswith(f"{tree}/work/x/"):
        assert decision


@given(path=st.lists(SEGMENTS, max_size=9).map("/".join), entry=st.lists(SEGMENTS, max_size=4).map("/".join))
def test_paths_that_do_not_exist_are_normalised(path: str, entry: str) -> None:
    """Where there is nothing to follow, membership is that of the normalised text."""
    base = "/nowhere-at-all"
    directory = posixpath.normpath(f"{base}/{entry}")
    asked = posixpath.normpath(f"{base}/{path}")
    if directory.startswith(base) and asked.startswith(base):
        found = Paths({f"{base}/{entry}/*": True}).find(read_path(f"{base}/{path}"))
        assert (found is not None) is (asked == directory or asked.startswith(f"{directory}/"))


@given(path=st.text(max_size=30) | st.binary(max_size=30) | st.text("/.~\\\0:ab", max_size=20))
def test_any_path_is_read_or_refused(path: Any) -> None:
    """What is read is absolute and normal."""
    try:
        subject = read_path(path)
    except Unreadable:
        return
    for one in subject:
        assert os.path.isabs(one)
        assert os.path.normpath(one) == one


# -- stars ------------------------------------------------------------------------------------------------------------


def reference(pattern: str, text: str) -> bool:
    """Stars by the definition, in quadratic time: which beginnings of ``text`` a beginning of the pattern can take."""
    reached = {0}
    for symbol in pattern:
        if symbol == "*":
            reached = set(range(min(reached), len(text) + 1)) if reached else set()
        else:
            reached = {at + 1 for at in reached if at < len(text) and text[at] == symbol}
    return len(text) in reached


def test_every_short_pattern_on_every_short_name() -> None:
    """Stars are those of the definition, where most coincidences are: all patterns and names of few letters."""
    names = ["".join(letters) for length in range(6) for letters in itertools.product("ab", repeat=length)]
    for length in range(6):
        for letters in itertools.product("ab*", repeat=length):
            pattern = "".join(letters)
            pieces = pattern.split("*")
            wrong = [name for name in names if glob(pieces, name) is not reference(pattern, name)]
            assert wrong == [], pattern


@given(pattern=st.text("ab*", max_size=12), text=st.text("ab*", max_size=16))
def test_stars_are_those_of_the_definition(pattern: str, text: str) -> None:
    """On longer ones too, also where the name holds a star, and through a list."""
    assert glob(pattern.split("*"), text) is reference(pattern, text)
    if pattern:
        assert (Names({pattern: True}).find(text) is not None) is reference(pattern, text)


@given(
    piece=st.text("ab", min_size=40, max_size=120),
    text=st.text("ab", min_size=100, max_size=400),
    at=st.integers(0, 300),
)
def test_long_pieces(piece: str, text: str, at: int) -> None:
    """A long piece is found where it is."""
    whole = text[:at] + piece + text[at:]
    assert glob(["", piece, ""], whole)
    assert glob(["", piece, ""], text) is (piece in text)
