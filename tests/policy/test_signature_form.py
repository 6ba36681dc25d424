"""policy_signature="hash" over real HTTP: what a signature over the hash alone proves, and what is remembered then."""

from __future__ import annotations

import json
import logging
import shlex
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest

from sekuire import PolicyClient, PolicyGateway, SekuireSDK
from sekuire.cli import main
from sekuire.errors import ConfigurationError, PolicyIntegrityError
from sekuire.policy import cache as cache_module
from sekuire.policy.cache import MOST_REPLACED, PolicyCache
from sekuire.policy.document import decode_policy, parse_key

from ..support.scripted import Request, Scripted, grant
from ..support.waiting import GUARD
from .signing import WORKSPACE, Served, Signer, denying

Make = Callable[..., PolicyClient]
OWNER, OTHER = Signer(1), Signer(2)
WARNING = "older policies can be replayed"


def loose(version: int, name: str, **changed: Any) -> Dict[str, Any]:
    """A policy that denies the capability ``name``, with a signature over its hash alone."""
    return OWNER.policy(version, denying(name), covers="hash", **changed)


def hash_of(name: str) -> str:
    found: str = loose(1, name)["hash"]
    return found


@pytest.fixture
def served(scripted: Scripted) -> Served:
    return Served(scripted, loose(1, "one"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policy.json"


@pytest.fixture
def make(scripted: Scripted) -> Iterator[Make]:
    made: List[PolicyClient] = []

    def make(**options: Any) -> PolicyClient:
        options = {"policy_signature": "hash", "trusted_policy_keys": [OWNER.public], **options}
        made.append(PolicyClient(scripted.url, api_key="k", **options))
        return made[-1]

    yield make
    for client in made:
        client.close()


def fetch(client: PolicyClient, served: Served, policy: Dict[str, Any]) -> str:
    """Serve ``policy``, have it fetched, and return the hash of what came."""
    served.policy = policy
    client.invalidate_cache(WORKSPACE)
    found = client.fetch_active_policy(WORKSPACE)
    assert found is not None
    return found.hash


def is_refused(client: PolicyClient, served: Served, name: str) -> str:
    """Serve a policy that was replaced. Return the text of its refusal."""
    known = client.last_good_policy(WORKSPACE)
    with pytest.raises(PolicyIntegrityError, match="was replaced") as caught:
        fetch(client, served, loose(99, name))
    assert caught.value.found == hash_of(name)
    assert client.last_good_policy(WORKSPACE) == known
    return str(caught.value)


# -- what is accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("covers", "pinned", "origin"),
    [("hash", True, "content"), ("bound", True, "pinned"), ("hash", False, "integrity"), ("bound", False, "integrity")],
)
def test_both_forms_are_accepted(served: Served, make: Make, covers: str, pinned: bool, origin: str) -> None:
    """With "hash" a signature of either form is accepted, pinned or not, without a warning."""
    served.policy = OWNER.policy(7, denying("x"), covers=covers)
    policy = make(trusted_policy_keys=[OWNER.public] if pinned else []).fetch_active_policy(WORKSPACE)
    assert policy is not None
    assert (policy.origin, policy.warnings) == (origin, ())


def test_a_pinned_key_of_the_other_form_names_the_option(served: Served, make: Make) -> None:
    """By default a signature over the hash alone is refused where a key is pinned; the error says what accepts it."""
    with pytest.raises(PolicyIntegrityError, match=r"policy_signature='hash' \(SEKUIRE_POLICY_SIGNATURE=hash\)"):
        make(policy_signature="bound").fetch_active_policy(WORKSPACE)
    unpinned = make(policy_signature="bound", trusted_policy_keys=[]).fetch_active_policy(WORKSPACE)
    assert unpinned is not None
    assert unpinned.origin == "integrity"
    assert "hash alone" in unpinned.warnings[0]


@pytest.mark.parametrize(
    "bad",
    [
        {**loose(1, "one"), "content": {}},
        OTHER.policy(1, denying("one"), covers="hash"),
        loose(1, "one", signature=None),
        loose(1, "one", signature="ab" * 64),
        loose(1, "one", workspace_id="ws-other"),
        {**loose(1, "one"), "signature": loose(1, "two")["signature"]},
    ],
    ids=["content", "key", "unsigned", "signature", "workspace", "another's signature"],
)
def test_what_a_pinned_key_does_not_prove_is_refused(served: Served, make: Make, bad: Any) -> None:
    """The content has to be the owner's, signed, and said to be of this workspace."""
    served.policy = bad
    with pytest.raises(PolicyIntegrityError):
        make().fetch_active_policy(WORKSPACE)


# -- what is remembered -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pinned", [True, False])
def test_a_policy_that_was_replaced_does_not_return(served: Served, make: Make, pinned: bool) -> None:
    """Versions are not proved and may go back; a policy that was replaced is refused, whatever version it names."""
    client = make(trusted_policy_keys=[OWNER.public] if pinned else [])
    assert fetch(client, served, loose(5, "one")) == hash_of("one")
    assert fetch(client, served, loose(4, "two")) == hash_of("two")
    assert "restart" in is_refused(client, served, "one")
    assert fetch(client, served, loose(1, "two")) == hash_of("two")
    assert fetch(client, served, loose(0, "three")) == hash_of("three")
    for name in ("one", "two"):
        is_refused(client, served, name)


def test_over_a_restart(served: Served, make: Make, path: Path) -> None:
    """The file keeps the policy in force and the hashes that were replaced, and no version."""
    client = make(path=path)
    for name in ("one", "two", "three"):
        fetch(client, served, loose(9, name))
    entry = json.loads(path.read_text())["policies"][WORKSPACE]
    assert entry["replaced"] == [hash_of("one"), hash_of("two")]
    assert entry["version"] == -1
    client = make(path=path)
    stored = client.last_good_policy(WORKSPACE)
    assert stored is not None
    assert stored.hash == hash_of("three")
    for name in ("one", "two"):
        is_refused(client, served, name)
    assert fetch(client, served, loose(2, "four")) == hash_of("four")
    is_refused(make(path=path), served, "three")


def test_another_process_replaced_it(served: Served, make: Make, path: Path) -> None:
    """Processes that share the file share what they remember."""
    first, second = make(path=path), make(path=path)
    fetch(first, served, loose(1, "one"))
    fetch(second, served, loose(1, "two"))
    fetch(first, served, loose(1, "three"))
    is_refused(second, served, "one")
    # What is in force here stays so, though another process has seen a newer one.
    assert fetch(second, served, loose(1, "two")) == hash_of("two")
    fetch(second, served, loose(1, "three"))
    for client in (first, second):
        is_refused(client, served, "one")
        is_refused(client, served, "two")


def test_a_policy_that_another_process_alone_has_seen(served: Served, make: Make, path: Path) -> None:
    """What the file held is replaced too, also where this process has never fetched it."""
    first, second = make(path=path), make(path=path)
    for client in (first, second):
        fetch(client, served, loose(1, "one"))
    fetch(first, served, loose(1, "two"))
    fetch(second, served, loose(1, "three"))
    for client in (second, make(path=path)):
        is_refused(client, served, "two")


def test_the_last_hundred_are_remembered(served: Served, make: Make, path: Path) -> None:
    """A hundred hashes are kept, the newest ones."""
    client = make(path=path)
    names = [f"c{number}" for number in range(MOST_REPLACED + 2)]
    for name in names:
        fetch(client, served, loose(1, name))
    client = make(path=path)
    is_refused(client, served, names[1])
    is_refused(client, served, names[-2])
    assert fetch(client, served, loose(1, names[0])) == hash_of(names[0])


def test_a_disk_that_fails(
    served: Served, make: Make, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What could not be written is remembered, and written with the next policy."""
    client = make(path=path)
    fetch(client, served, loose(1, "one"))
    with monkeypatch.context() as full:

        def fail(*arguments: Any) -> Any:
            raise OSError(28, "No space left on device")

        full.setattr(cache_module.files, "replace", fail)
        for name in ("two", "three"):
            fetch(client, served, loose(1, name))
        assert any("No space left" in record.message for record in caplog.records)
        is_refused(client, served, "two")
    fetch(client, served, loose(1, "four"))
    for name in ("one", "two", "three"):
        is_refused(make(path=path), served, name)


def test_a_late_answer_of_another_process(served: Served, make: Make, path: Path) -> None:
    """An answer to an earlier question does not replace in the file what a later one brought."""
    slow, quick = make(path=path), make(path=path)
    fetch(slow, served, loose(1, "one"))
    asked, answer = threading.Event(), threading.Event()
    usual = served.scripted.on["policy"]

    def wait(request: Request) -> Any:
        found = usual(request)
        asked.set()
        assert answer.wait(GUARD)
        return found

    served.scripted.on["policy"] = wait
    thread = threading.Thread(target=lambda: fetch(slow, served, loose(2, "two")))
    thread.start()
    assert asked.wait(GUARD)
    served.scripted.on["policy"] = usual
    fetch(quick, served, loose(3, "three"))
    answer.set()
    thread.join(GUARD)
    entry = json.loads(path.read_text())["policies"][WORKSPACE]
    assert entry["hash"] == hash_of("three")
    assert entry["replaced"] == [hash_of("one")]
    assert fetch(slow, served, loose(3, "three")) == hash_of("three")
    for client in (slow, quick):
        is_refused(client, served, "two")


def test_a_policy_replaced_in_the_file_alone(served: Served, make: Make, path: Path) -> None:
    """A policy in the file that is also among the replaced ones is not used."""
    client = make(path=path)
    fetch(client, served, loose(1, "one"))
    payload = json.loads(path.read_text())
    payload["policies"][WORKSPACE]["replaced"] = [hash_of("one")]
    path.write_text(json.dumps(payload))
    assert make(path=path).last_good_policy(WORKSPACE) is None


@pytest.mark.parametrize("replaced", [5, {}, [5, None], "x"])
def test_an_entry_of_something_else(served: Served, make: Make, path: Path, replaced: Any) -> None:
    """What has another type in the file counts as not there."""
    fetch(make(path=path), served, loose(1, "one"))
    payload = json.loads(path.read_text())
    payload["policies"][WORKSPACE].update(replaced=replaced, asked_at="now", hash=5)
    path.write_text(json.dumps(payload))
    assert fetch(make(path=path), served, loose(1, "two")) == hash_of("two")


def test_a_clock_that_was_set_back(served: Served, make: Make, path: Path) -> None:
    """A time in the file that has not come yet keeps nothing from being written."""
    client = make(path=path)
    fetch(client, served, loose(1, "one"))
    payload = json.loads(path.read_text())
    payload["policies"][WORKSPACE]["asked_at"] = time.time() + 10**6
    path.write_text(json.dumps(payload))
    fetch(client, served, loose(1, "two"))
    assert json.loads(path.read_text())["policies"][WORKSPACE]["hash"] == hash_of("two")


def test_none_after_a_signed_policy(served: Served, make: Make, path: Path) -> None:
    """With a pin, "there is no policy" is refused once there was one, over restarts too. Without, all is forgotten."""
    client = make(path=path)
    for name in ("one", "two"):
        fetch(client, served, loose(1, name))
    served.policy = None
    with pytest.raises(PolicyIntegrityError, match="a policy of another workspace was there before"):
        make(path=path).fetch_active_policy("ws-2")
    for one in (client, make(path=path)):
        one.invalidate_cache(WORKSPACE)
        with pytest.raises(PolicyIntegrityError, match="no key can prove; a policy was there before"):
            one.fetch_active_policy(WORKSPACE)
        with pytest.raises(PolicyIntegrityError, match="a policy of another workspace was there before"):
            one.fetch_active_policy("ws-2")
    unpinned = make(path=path, trusted_policy_keys=[])
    assert unpinned.fetch_active_policy(WORKSPACE) is None
    assert fetch(unpinned, served, loose(1, "one")) == hash_of("one")


def test_a_version_remembered_before_stays_remembered(served: Served, make: Make, path: Path) -> None:
    """A time with "hash" neither raises nor loses the highest version that was proved."""
    strict = make(path=path, policy_signature="bound")
    fetch(strict, served, OWNER.policy(5, denying("one")))
    fetch(make(path=path), served, loose(900, "two"))
    assert json.loads(path.read_text())["policies"][WORKSPACE]["version"] == 5
    strict = make(path=path, policy_signature="bound")
    with pytest.raises(PolicyIntegrityError, match="older than 5"):
        fetch(strict, served, OWNER.policy(4, denying("three")))
    assert fetch(strict, served, OWNER.policy(6, denying("three"))) == hash_of("three")


# -- sekuire policy accept --------------------------------------------------------------------------------------------


def run(*args: str) -> int:
    return main(["policy", "accept", *args])


def test_accept(served: Served, make: Make, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command in the error lets the policy return, in a process that runs, and once."""
    client = make(path=path)
    for name in ("one", "two"):
        fetch(client, served, loose(1, name))
    command = is_refused(client, served, "one").partition("run: ")[2].partition(" (expected")[0]
    words = shlex.split(command)
    assert words[:3] == ["sekuire", "policy", "accept"]
    assert run(*words[3:]) == 0
    out, err = capsys.readouterr()
    assert out == f"accepted: the policy {hash_of('one')} may be in force again in {WORKSPACE}\n"
    assert err == ""
    assert fetch(client, served, loose(1, "one")) == hash_of("one")
    is_refused(client, served, "two")
    assert fetch(client, served, loose(1, "three")) == hash_of("three")
    is_refused(make(path=path), served, "one")


def test_accept_in_one_workspace(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --workspace it is accepted wherever it was replaced, and else there alone."""
    cache = PolicyCache(path)
    digest = "ab" * 32
    for name in ("ws-1", "ws-2", "ws-3"):
        cache.save_replacing(name, b"{}", "cd" * 32, (digest,), time.time())
    assert run(digest.upper(), "--policy-path", str(path), "--workspace", "ws-2") == 0
    assert "in ws-2" in capsys.readouterr().out
    assert run(digest, "--policy-path", str(path)) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"accepted: the policy {digest} may be in force again in {name}" for name in ("ws-1", "ws-3")
    ]
    assert [cache.load(name).replaced for name in ("ws-1", "ws-2", "ws-3")] == [(), (), ()]


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["ab" * 32, "--policy-path", "FILE"], 1, "does not have abab"),
        (["cd" * 32, "--policy-path", "FILE", "--workspace", "ws-2"], 1, "among the replaced policies in ws-2"),
        (["abc", "--policy-path", "FILE"], 2, "HASH: must be 64 hex digits, got 'abc'"),
        (["x" * 64, "--policy-path", "FILE"], 2, "HASH: must be 64 hex digits"),
        (["\x1b[31m" + "a" * 59, "--policy-path", "FILE"], 2, "HASH: must be 64 hex digits"),
        (["cd" * 32, "--policy-path", "missing.json"], 2, "--policy-path: there is no file 'missing.json'"),
        (["cd" * 32, "--policy-path", "."], 2, "--policy-path: "),
        (["cd" * 32], 2, "--policy-path"),
        ([], 2, "HASH"),
    ],
)
def test_accept_and_wrong_input(
    path: Path, capsys: pytest.CaptureFixture[str], args: List[str], code: int, text: str
) -> None:
    """Each wrong word is named, and nothing changes."""
    PolicyCache(path).save_replacing("ws-1", b"{}", "ef" * 32, ("cd" * 32,), time.time())
    before = path.read_bytes()
    try:
        found = run(*(str(path) if word == "FILE" else word for word in args))
    except SystemExit as exit:
        found = int(exit.code or 0)
    out, err = capsys.readouterr()
    assert (found, out) == (code, "")
    assert text in err
    assert "\x1b[31m" not in err
    assert path.read_bytes() == before


def test_accept_on_a_full_disk(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be written is an error."""
    PolicyCache(path).save_replacing("ws-1", b"{}", "ef" * 32, ("cd" * 32,), time.time())

    def fail(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.files, "replace", fail)
    assert run("cd" * 32, "--policy-path", str(path)) == 2
    assert "--policy-path: " in capsys.readouterr().err


# -- the gateway and the SDK ------------------------------------------------------------------------------------------


def test_a_gateway_follows(served: Served, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """The newest answer decides, whatever its version; the start warns once."""
    client = make()
    with PolicyGateway(client, WORKSPACE) as gateway:
        assert [record.levelname for record in caplog.records if WARNING in record.message] == ["WARNING"]
        for version, name in ((9, "one"), (3, "two"), (3, "three")):
            served.policy = loose(version, name)
            gateway.refresh()
            assert gateway.policy is not None
            assert gateway.policy.hash == hash_of(name)
        served.policy = loose(10, "one")
        with pytest.raises(PolicyIntegrityError):
            gateway.refresh()
        assert gateway.policy.hash == hash_of("three")
        # The answer to a fetch that a later one has overtaken.
        late = json.dumps(loose(99, "two")).encode()
        old = decode_policy(late, workspace_id=WORKSPACE, trusted_keys=[parse_key(OWNER.public)], accepts_hash=True)
        gateway.in_force.adopt(WORKSPACE, old, 10**6)
        assert gateway.policy.hash == hash_of("three")


def test_no_warning_by_default(served: Served, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A gateway that checks versions does not warn."""
    PolicyGateway(make(policy_signature="bound"), WORKSPACE).close()
    assert not [record for record in caplog.records if WARNING in record.message]


def test_the_sdk_from_the_environment(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: Path
) -> None:
    """SEKUIRE_POLICY_SIGNATURE=hash lets a pinned SDK enforce a policy whose hash alone is signed, over a restart."""
    served = Served(scripted, loose(1, "drop"))
    scripted.on["bootstrap"] = lambda request: (201, grant(workspace_id=WORKSPACE))
    for name, value in {
        "API_URL": scripted.url,
        "AGENT_ID": "agent-1",
        "INSTALL_TOKEN": "skt_install",
        "POLICY_PUBLIC_KEYS": OWNER.public,
        "POLICY_SIGNATURE": "hash",
    }.items():
        monkeypatch.setenv(f"SEKUIRE_{name}", value)
    for number, dropped in enumerate(("drop", "other")):
        served.policy = loose(1, dropped)
        with SekuireSDK.from_env(policy_path=path) as sdk:
            worker = sdk.create_task_worker(policy_required=True)
            worker.on_task("*", lambda ctx, input: ctx.capability)
            worker.start()
            scripted.task(f"t{number}", "drop")
            completion = scripted.completion(f"t{number}")
            assert (completion["status"] == "failed") == (dropped == "drop"), completion
    assert any(WARNING in record.message for record in caplog.records if record.levelno == logging.WARNING)
    served.policy = loose(7, "drop")
    with SekuireSDK.from_env(policy_path=path) as sdk:
        with pytest.raises(PolicyIntegrityError, match="was replaced"):
            sdk.policy_gateway.refresh()
        assert sdk.policy_gateway.policy.hash == hash_of("other")


def test_a_gateway_of_ones_own(scripted: Scripted, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is for the gateway that the SDK makes; the option beside another gateway is an error."""
    monkeypatch.setenv("SEKUIRE_POLICY_SIGNATURE", "hash")
    gateway = PolicyGateway(make(policy_signature="bound"), WORKSPACE)
    options: Dict[str, Any] = {"api_base_url": scripted.url, "install_token": "t", "policy_gateway": gateway}
    SekuireSDK.from_env(agent_id="agent-1", **options).shutdown()
    with pytest.raises(ConfigurationError, match="policy_signature: belongs to the PolicyClient"):
        SekuireSDK("agent-1", policy_signature="hash", **options)
    monkeypatch.setenv("SEKUIRE_POLICY_SIGNATURE", "loose")
    with pytest.raises(ConfigurationError, match=r"policy_signature \(from environment variable SEKUIRE_POL"):
        SekuireSDK.from_env(agent_id="agent-1", api_base_url=scripted.url, install_token="t")


def test_a_file_gateway(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """from_file accepts it too. The file is the user's own: what returns in it is in force again."""
    file = tmp_path / "mine.json"
    options: Dict[str, Any] = {"trusted_policy_keys": [OWNER.public]}
    file.write_text(json.dumps(loose(3, "one")))
    with pytest.raises(PolicyIntegrityError, match="policy_signature='hash'"):
        PolicyGateway.from_file(file, **options)
    with pytest.raises(ConfigurationError, match="policy_signature: must be 'bound' or 'hash', got 'loose'"):
        PolicyGateway.from_file(file, policy_signature="loose", **options)  # type: ignore[arg-type]
    with PolicyGateway.from_file(file, policy_signature="hash", **options) as gateway:
        for version, name in ((2, "two"), (3, "one")):
            file.write_text(json.dumps(loose(version, name)))
            gateway.refresh()
            assert gateway.policy is not None
            assert gateway.policy.hash == hash_of(name)
            assert gateway.policy.origin == "content"
    assert not [record for record in caplog.records if WARNING in record.message]
