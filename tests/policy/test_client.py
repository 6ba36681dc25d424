"""PolicyClient over real HTTP: what it verifies, what it keeps, and what it asks for."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest

from sekuire import PolicyClient, RuntimeCredentials, RuntimeCredentialsStore
from sekuire.errors import (
    APIError,
    AuthenticationError,
    ConfigurationError,
    PlanLimitError,
    PolicyIntegrityError,
    RevokedError,
    SekuireError,
    TransportError,
)
from sekuire.policy import client as client_module
from sekuire.policy.document import Policy
from sekuire.transport import retry

from ..support.scripted import Blackhole, Request, Scripted
from ..support.waiting import GUARD
from .signing import WORKSPACE, Served, Signer, denying

Make = Callable[..., PolicyClient]
OWNER, OTHER = Signer(1), Signer(2)


@pytest.fixture
def served(scripted: Scripted) -> Served:
    return Served(scripted, OWNER.policy(1))


@pytest.fixture
def make(scripted: Scripted) -> Iterator[Make]:
    made: List[PolicyClient] = []

    def make(**options: Any) -> PolicyClient:
        ways = {"credentials_store", "token_provider", "api_key"}
        if not ways & set(options):
            options["api_key"] = "sk_live_secret"
        made.append(PolicyClient(scripted.url, **options))
        return made[-1]

    yield make
    for client in made:
        client.close()


def version_of(policy: Optional[Policy]) -> int:
    assert policy is not None
    return policy.version


# -- verification -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "origin"), [((), "integrity"), ((OWNER.public,), "pinned"), ((OTHER.public, OWNER.public), "pinned")]
)
def test_a_good_policy(served: Served, make: Make, keys: Any, origin: str) -> None:
    """A good policy is returned with what its signature proves."""
    served.policy = OWNER.policy(7, denying("x"))
    policy = make(trusted_policy_keys=keys).fetch_active_policy(WORKSPACE)
    assert policy is not None
    assert (policy.version, policy.origin, policy.workspace_id) == (7, origin, WORKSPACE)


BAD: Dict[str, Any] = {
    "hash": OWNER.policy(2, hash="ab" * 32),
    "content": {**OWNER.policy(2), "content": {"agent": {}}},
    "signature": OWNER.policy(2, signature="ab" * 64),
    "unsigned": OWNER.policy(2, signature=None),
    "key": OTHER.policy(2),
    "other key named": OTHER.policy(2, signing_public_key=OWNER.public),
    "version": {**OWNER.policy(2), "version": 3},
    "rollback": OWNER.policy(0),
    "twin": OWNER.policy(1, denying("y")),
    "workspace": OWNER.policy(2, workspace_id="ws-other"),
    "named workspace": {**OWNER.policy(2, workspace_id="ws-other"), "workspace_id": WORKSPACE},
    "no content": {**OWNER.policy(2), "content": None},
    "empty": {},
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_policy_is_refused(served: Served, make: Make, case: str) -> None:
    """What is not what it must be is a PolicyIntegrityError, and the last good policy stays known."""
    client = make(trusted_policy_keys=[OWNER.public])
    assert version_of(client.fetch_active_policy(WORKSPACE)) == 1
    served.policy = BAD[case]
    client.invalidate_cache(WORKSPACE)
    with pytest.raises(PolicyIntegrityError) as caught:
        client.fetch_active_policy(WORKSPACE)
    assert len(str(caught.value).split()) > 2
    assert version_of(client.last_good_policy(WORKSPACE)) == 1
    served.policy = OWNER.policy(2, denying("z"))
    assert version_of(client.fetch_active_policy(WORKSPACE)) == 2


@pytest.mark.parametrize("status", [200, 302, 403, 404, 410, 503])
def test_another_server_s_page_is_an_outage(served: Served, make: Make, status: int) -> None:
    """A page of HTML is not an answer of the platform, whatever its status: the last good policy stays, and it is asked
    again."""
    client = make()
    known = client.fetch_active_policy(WORKSPACE)
    usual = served.scripted.on["policy"]
    # Longer than the fetch may take: the first answer is the last one.
    later = {"Retry-After": "300"}
    served.scripted.on["policy"] = lambda request: (status, b"<html>sign in</html>", later)
    client.invalidate_cache(WORKSPACE)
    with pytest.raises(TransportError, match="another server answered"):
        client.fetch_active_policy(WORKSPACE)
    assert client.last_good_policy(WORKSPACE) is known
    pages = iter([(status, b"<html>sign in</html>")] * 2)
    served.scripted.on["policy"] = lambda request: next(pages, None) or usual(request)
    assert client.fetch_active_policy(WORKSPACE) == known


def test_expected_and_found(served: Served, make: Make) -> None:
    """The error says which key was expected and which was found."""
    served.policy = OTHER.policy(1)
    with pytest.raises(PolicyIntegrityError) as caught:
        make(trusted_policy_keys=[OWNER.public]).fetch_active_policy(WORKSPACE)
    assert caught.value.expected == OWNER.public
    assert caught.value.found == OTHER.public


# -- no policy --------------------------------------------------------------------------------------------------------


def test_no_policy(served: Served, make: Make) -> None:
    """404 from a platform means that there is none, which is cached like a policy."""
    served.policy = None
    client = make()
    assert client.fetch_active_policy(WORKSPACE) is None
    assert client.fetch_active_policy(WORKSPACE) is None
    assert served.count == 1


def test_a_removed_policy(served: Served, make: Make, tmp_path: Path) -> None:
    """Without a pinned key a 404 removes the policy, from the disk too; the next one may begin anew."""
    path = tmp_path / "policy.json"
    client = make(path=path)
    served.policy = OWNER.policy(5)
    client.fetch_active_policy(WORKSPACE)
    client.invalidate_cache(WORKSPACE)
    served.policy = None
    assert client.fetch_active_policy(WORKSPACE) is None
    assert client.last_good_policy(WORKSPACE) is None
    assert make(path=path).last_good_policy(WORKSPACE) is None
    served.policy = OWNER.policy(1)
    client.invalidate_cache(WORKSPACE)
    assert version_of(client.fetch_active_policy(WORKSPACE)) == 1


def test_with_a_pinned_key_nobody_can_say_that_there_is_none(served: Served, make: Make, tmp_path: Path) -> None:
    """A 404 is signed by nobody: where a signed policy was there, it stays, over restarts too."""
    path = tmp_path / "policy.json"
    client = make(trusted_policy_keys=[OWNER.public], path=path)
    client.fetch_active_policy(WORKSPACE)
    served.policy = None
    for one in (client, make(trusted_policy_keys=[OWNER.public], path=path)):
        one.invalidate_cache(WORKSPACE)
        with pytest.raises(PolicyIntegrityError, match="no key can prove"):
            one.fetch_active_policy(WORKSPACE)
        assert version_of(one.last_good_policy(WORKSPACE)) == 1


def test_with_a_pinned_key_there_may_be_none_at_first(served: Served, make: Make) -> None:
    """A workspace that never had a policy has none, whatever is pinned."""
    served.policy = None
    assert make(trusted_policy_keys=[OWNER.public]).fetch_active_policy(WORKSPACE) is None


@pytest.mark.parametrize("from_disk", [False, True])
def test_with_a_pinned_key_no_other_workspace_is_without(
    served: Served, make: Make, tmp_path: Path, from_disk: bool
) -> None:
    """Whoever can name another workspace cannot get round the key by one that never had a policy."""
    path = tmp_path / "policy.json"
    client = make(trusted_policy_keys=[OWNER.public], path=path)
    client.fetch_active_policy(WORKSPACE)
    served.policy = None
    if from_disk:
        client = make(trusted_policy_keys=[OWNER.public], path=path)
    with pytest.raises(PolicyIntegrityError, match="of another workspace was there before"):
        client.fetch_active_policy("ws-2")


@pytest.mark.parametrize("status", [None, "active", "ACTIVE", "Active"])
def test_a_status_that_is_active(served: Served, make: Make, status: Any) -> None:
    """``active`` in any case is adopted, and so is a policy without a status."""
    served.policy = OWNER.policy(2, status=status)
    assert version_of(make(trusted_policy_keys=[OWNER.public]).fetch_active_policy(WORKSPACE)) == 2


@pytest.mark.parametrize("status", ["draft", "superseded", "", "inactive", " active", 1, False, ["active"], {}])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_status_that_is_not_active(served: Served, make: Make, status: Any, pinned: bool) -> None:
    """Any other status refuses the policy, quoted; the last good one stays."""
    client = make(trusted_policy_keys=[OWNER.public] if pinned else [])
    client.fetch_active_policy(WORKSPACE)
    client.invalidate_cache(WORKSPACE)
    served.policy = OWNER.policy(2, status=status)
    with pytest.raises(PolicyIntegrityError, match=f"status: is {re.escape(ascii(status))}"):
        client.fetch_active_policy(WORKSPACE)
    assert version_of(client.last_good_policy(WORKSPACE)) == 1


def test_a_null_status(served: Served, make: Make) -> None:
    """It is there, and is not ``active``."""
    served.policy = {**OWNER.policy(2), "status": None}
    with pytest.raises(PolicyIntegrityError, match="status: is None"):
        make().fetch_active_policy(WORKSPACE)


@pytest.mark.parametrize("code", ["WORKSPACE_NOT_FOUND", "NOT_FOUND", "", "policy_not_found"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_404_about_something_else(served: Served, make: Make, code: str, is_nested: bool) -> None:
    """A 404 of the platform with another code is an outage: it does not say that there is no policy."""
    client = make()
    known = client.fetch_active_policy(WORKSPACE)
    error = {"code": code, "message": "no"}
    payload = {"error": error} if is_nested else {"error": "not_found", **error}
    served.scripted.on["policy"] = lambda request: (404, payload)
    client.invalidate_cache(WORKSPACE)
    with pytest.raises(APIError, match="404"):
        client.fetch_active_policy(WORKSPACE)
    assert client.last_good_policy(WORKSPACE) is known


@pytest.mark.parametrize(
    "payload",
    [
        {"error": "not_found", "message": "no policy"},
        {"error": "x", "message": "y", "code": "POLICY_NOT_FOUND"},
        {"error": {"code": "POLICY_NOT_FOUND", "message": "no policy"}},
        {"error": {"message": "no policy"}},
    ],
)
def test_a_404_that_says_no_policy(served: Served, make: Make, payload: Any) -> None:
    """Both forms of the contract's error are understood."""
    served.scripted.on["policy"] = lambda request: (404, payload)
    assert make().fetch_active_policy(WORKSPACE) is None


@pytest.mark.parametrize(
    "body",
    [
        b"<h1>Not Found</h1>",
        b"{}",
        b'{"message":"no Route matched with those values"}',
        b'{"detail":"Not Found"}',
        b'{"timestamp":"2026-11-25T01:00:00Z","status":404,"error":"Not Found","message":"","path":"/api/v1/x"}',
        b'{"error":{"code":404},"message":"no"}',
    ],
    ids=["html", "empty", "kong", "fastapi", "spring", "google"],
)
def test_another_server_s_404_is_no_answer(
    served: Served, make: Make, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 404 that no Sekuire platform sent does not mean that everything is allowed."""
    client = make()
    known = client.fetch_active_policy(WORKSPACE)
    served.scripted.on["policy"] = lambda request: (404, body)
    client.invalidate_cache(WORKSPACE)
    monkeypatch.setattr(client_module, "FETCH_TIMEOUT", 0.2)
    with pytest.raises((APIError, TransportError)):
        client.fetch_active_policy(WORKSPACE)
    assert client.last_good_policy(WORKSPACE) is known


def test_a_policy_that_cannot_be_enforced_here(
    served: Served, make: Make, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose paths nobody can resolve on this machine is refused, and does not take the good one's place on disk."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    client = make(path=tmp_path / "policy.json")
    known = client.fetch_active_policy(WORKSPACE)
    served.policy = OWNER.policy(2, {"permissions": {"filesystem": {"enabled": True, "allowed_paths": ["~/data/*"]}}})
    client.invalidate_cache(WORKSPACE)
    with pytest.raises(PolicyIntegrityError, match="home directory"):
        client.fetch_active_policy(WORKSPACE)
    assert client.last_good_policy(WORKSPACE) == known
    assert make(path=tmp_path / "policy.json").last_good_policy(WORKSPACE) == known


# -- cache and flights ------------------------------------------------------------------------------------------------


def test_the_cache_has_a_time_limit(served: Served, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is used again for cache_ttl seconds of the monotonic clock, then the platform is asked."""
    now = [1000.0]
    monkeypatch.setattr(client_module.time, "monotonic", lambda: now[0])
    client = make(cache_ttl=60.0)
    for _ in range(3):
        client.fetch_active_policy(WORKSPACE)
    now[0] += 59.9
    client.fetch_active_policy(WORKSPACE)
    assert served.count == 1
    now[0] += 0.2
    client.fetch_active_policy(WORKSPACE)
    assert served.count == 2


def test_no_cache(served: Served, make: Make) -> None:
    """cache_ttl=0 asks every time."""
    client = make(cache_ttl=0)
    for _ in range(3):
        client.fetch_active_policy(WORKSPACE)
    assert served.count == 3


def test_workspaces_are_apart(served: Served, make: Make) -> None:
    """Each workspace has its own policy, cache and id in the path."""
    served.scripted.on["policy"] = lambda request: (
        200,
        json.dumps(OWNER.policy(1, workspace_id=request.handler.path.split("/")[-2].replace("%2F", "/"))).encode(),
    )
    client = make()
    for name in ("a", "b/c"):
        policy = client.fetch_active_policy(name)
        assert policy is not None
        assert policy.workspace_id == name
    client.invalidate_cache("a")
    client.fetch_active_policy("b/c")
    assert served.count == 2


def test_an_invalidation_during_a_fetch(served: Served, make: Make) -> None:
    """Who asks after it gets what was asked for after it, and a result of before is not kept."""
    entered, release = threading.Event(), threading.Event()
    usual = served.scripted.on["policy"]
    client = make()

    def slow(request: Request) -> Any:
        answer = usual(request)
        entered.set()
        assert release.wait(GUARD)
        return answer

    served.scripted.on["policy"] = slow
    results: Dict[str, Any] = {}

    def ask(name: str) -> None:
        results[name] = client.fetch_active_policy(WORKSPACE)

    threads = [threading.Thread(target=ask, args=("before",))]
    threads[0].start()
    assert entered.wait(GUARD)
    served.policy = OWNER.policy(2)
    client.invalidate_cache(WORKSPACE)
    threads += [threading.Thread(target=ask, args=(f"after {number}",)) for number in range(8)]
    for thread in threads[1:]:
        thread.start()
    served.scripted.on["policy"] = usual
    release.set()
    for thread in threads:
        thread.join(GUARD)
    assert version_of(results.pop("before")) == 1
    assert [version_of(policy) for policy in results.values()] == [2] * 8
    assert served.count == 2
    assert version_of(client.fetch_active_policy(WORKSPACE)) == 2


@pytest.mark.parametrize("fails", [False, True])
def test_64_threads_fetch_at_once(served: Served, make: Make, fails: bool) -> None:
    """One request is in flight; everybody who asks meanwhile gets its result, or an error of its own."""
    entered, release = threading.Event(), threading.Event()
    usual = served.scripted.on["policy"]
    client = make()

    def slow(request: Request) -> Any:
        entered.set()
        assert release.wait(GUARD)
        return (400, {"error": "bad", "message": "no"}) if fails else usual(request)

    served.scripted.on["policy"] = slow
    results: List[Any] = []
    begun = threading.Barrier(65)

    def ask() -> None:
        begun.wait(GUARD)
        try:
            results.append(client.fetch_active_policy(WORKSPACE))
        except APIError as error:
            results.append(error)

    threads = [threading.Thread(target=ask) for _ in range(64)]
    for thread in threads:
        thread.start()
    begun.wait(GUARD)
    assert entered.wait(GUARD)
    release.set()
    for thread in threads:
        thread.join(GUARD)
    assert len(results) == 64
    if fails:
        # One that came late may have asked again: a failure is no answer to keep.
        assert all(isinstance(one, APIError) and one.status == 400 for one in results)
        assert len({id(one) for one in results}) == 64
    else:
        assert served.count == 1
        assert len({id(one) for one in results}) == 1


def test_a_failure_is_not_kept(served: Served, make: Make) -> None:
    """After a failure the next call asks again."""
    client = make()
    served.policy = 400
    with pytest.raises(APIError):
        client.fetch_active_policy(WORKSPACE)
    served.policy = OWNER.policy(1)
    assert version_of(client.fetch_active_policy(WORKSPACE)) == 1


# -- credentials ------------------------------------------------------------------------------------------------------


def test_an_api_key(served: Served, make: Make) -> None:
    """The API key goes into its header, and into no text."""
    client = make(api_key="sk_live_secret")
    client.fetch_active_policy(WORKSPACE)
    request = served.scripted.of("policy")[0]
    assert request.headers["X-API-Key"] == "sk_live_secret"
    assert "Authorization" not in request.headers
    assert "secret" not in f"{client!r}{vars(client)!r}"


def test_a_shared_store(served: Served, make: Make) -> None:
    """The runtime token of a shared store is used; after a 401 its newer one, once, then the API key."""
    store = RuntimeCredentialsStore(RuntimeCredentials(runtime_token="rt-1"))
    seen: List[Any] = []
    usual = served.scripted.on["policy"]

    def answer(request: Request) -> Any:
        seen.append(request.headers["Authorization"] or request.headers["X-API-Key"])
        if seen[-1] == "Bearer rt-1":
            store.update(RuntimeCredentials(runtime_token="rt-2"))
        return (401, {"error": "x", "message": "no"}) if seen[-1] in refused else usual(request)

    refused = {"Bearer rt-1"}
    served.scripted.on["policy"] = answer
    client = make(credentials_store=store, api_key="key")
    client.fetch_active_policy(WORKSPACE)
    assert seen == ["Bearer rt-1", "Bearer rt-2"]
    refused.add("Bearer rt-2")
    client.invalidate_cache(WORKSPACE)
    client.fetch_active_policy(WORKSPACE)
    assert seen[2:] == ["Bearer rt-2", "key"]


def test_a_token_provider(served: Served, make: Make) -> None:
    """A token_provider is asked; a second time after a 401."""
    tokens = iter(["rt-1", "rt-2", "rt-3"])
    seen: List[str] = []
    usual = served.scripted.on["policy"]

    def answer(request: Request) -> Any:
        seen.append(request.headers["Authorization"])
        return (401, {"error": "x", "message": "no"}) if seen[-1] == "Bearer rt-1" else usual(request)

    served.scripted.on["policy"] = answer
    make(token_provider=lambda: next(tokens)).fetch_active_policy(WORKSPACE)
    assert seen == ["Bearer rt-1", "Bearer rt-2"]


def test_refused_credentials(served: Served, make: Make) -> None:
    """A 401 is an AuthenticationError without the key, after one request."""
    served.scripted.on["policy"] = lambda request: (
        401,
        {"error": "x", "message": f"no {request.headers['X-API-Key']}"},
    )
    with pytest.raises(AuthenticationError) as caught:
        make(api_key="sk_live_secret").fetch_active_policy(WORKSPACE)
    assert served.count == 1
    assert "sk_live_secret" not in f"{caught.value!r}{caught.value}"


def test_a_401_of_another_server(served: Served, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that answers 401 says nothing of the credentials: the platform is asked again."""
    monkeypatch.setattr(retry, "RETRY_MAX", 0.05)
    usual = served.scripted.on["policy"]
    served.scripted.on["policy"] = lambda request: (
        (401, b"<html>log in</html>", {"Content-Type": "text/html"}) if served.count < 3 else usual(request)
    )
    assert make(api_key="sk_live_secret").fetch_active_policy(WORKSPACE) is not None
    assert served.count == 3


def test_an_empty_store(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that holds nothing as yet is waited for, within the fetch's time."""
    monkeypatch.setattr(client_module, "FETCH_TIMEOUT", 0.2)
    with pytest.raises(TransportError, match="no runtime token yet"):
        make(credentials_store=RuntimeCredentialsStore()).fetch_active_policy(WORKSPACE)


@pytest.mark.parametrize(
    ("status", "payload", "kind"),
    [
        (402, {"error": "plan", "message": "no", "required_plan": "pro"}, PlanLimitError),
        (403, {"error": "x", "message": "no", "code": "INSTALLATION_REVOKED"}, RevokedError),
        (403, {"error": "x", "message": "no"}, APIError),
    ],
)
def test_refusals(served: Served, make: Make, status: int, payload: Any, kind: Any) -> None:
    """What the platform says is what is raised, after one request."""
    served.scripted.on["policy"] = lambda request: (status, payload)
    with pytest.raises(kind):
        make().fetch_active_policy(WORKSPACE)
    assert served.count == 1


def test_a_fetch_is_tried_again(served: Served, make: Make) -> None:
    """503 and a broken connection are tried again."""
    usual = served.scripted.on["policy"]

    def answer(request: Request) -> Any:
        if served.count == 1:
            return 503, {"error": "x", "message": "later"}
        if served.count == 2:
            request.reset()
            return None
        return usual(request)

    served.scripted.on["policy"] = answer
    assert version_of(make().fetch_active_policy(WORKSPACE)) == 1
    assert served.count == 3


def test_a_cut_answer_is_asked_for_again(served: Served, make: Make) -> None:
    """An answer whose end is missing is no policy, and no verdict on one."""
    usual = served.scripted.on["policy"]

    def answer(request: Request) -> Any:
        if served.count > 1:
            return usual(request)
        request.head(200, "Content-Type: application/json")
        request.write(b'{"policy_id": "pol-1", "vers')
        return None

    served.scripted.on["policy"] = answer
    assert version_of(make().fetch_active_policy(WORKSPACE)) == 1


def test_close_ends_a_fetch(served: Served, make: Make) -> None:
    """close() ends the waits between tries."""
    served.policy = 503
    client = make()
    caught: List[BaseException] = []

    def fetch() -> None:
        try:
            client.fetch_active_policy(WORKSPACE)
        except SekuireError as error:
            caught.append(error)

    thread = threading.Thread(target=fetch)
    thread.start()
    served.scripted.wait_for("policy", 2)
    with client:
        pass
    thread.join(GUARD)
    assert isinstance(caught[0], (TransportError, APIError))


def test_a_platform_that_is_silent(blackhole: Blackhole, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch has a time limit, its retries included; so has waiting for another's."""
    monkeypatch.setattr(client_module, "FETCH_TIMEOUT", 0.3)
    with PolicyClient(blackhole.url, api_key="k", read_timeout=0.1) as client, pytest.raises(TransportError):
        client.fetch_active_policy(WORKSPACE)


# -- the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policy.json"


def stored(path: Path) -> Dict[str, Any]:
    entry: Dict[str, Any] = json.loads(path.read_text())["policies"][WORKSPACE]
    return entry


def tamper(path: Path, **changes: Any) -> None:
    payload = json.loads(path.read_text())
    payload["policies"][WORKSPACE].update(changes)
    path.write_text(json.dumps(payload))


def test_the_last_good_policy_lasts(served: Served, make: Make, path: Path) -> None:
    """The next run has the last good policy without asking; its file is its owner's alone."""
    served.policy = OWNER.policy(3, denying("x"))
    first = make(path=path).fetch_active_policy(WORKSPACE)
    again = make(path=path, trusted_policy_keys=[OWNER.public]).last_good_policy(WORKSPACE)
    assert again is not None
    assert first is not None
    assert (again.hash, again.version, again.origin) == (first.hash, 3, "pinned")
    assert served.count == 1
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one.name for one in path.parent.iterdir() if one.suffix == ".tmp"] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": json.dumps({**OWNER.policy(3, denying("x")), "content": {}})},
        {"policy": json.dumps(OTHER.policy(3))},
        {"policy": json.dumps(OWNER.policy(2))},
        {"policy": "{"},
        {"policy": "\udcff"},
        {"policy": 5},
    ],
    ids=["content", "key", "older", "json", "surrogate", "type"],
)
def test_a_policy_changed_on_disk_is_not_used(
    served: Served, make: Make, path: Path, changes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What is read from disk is verified again; the version is remembered even so."""
    served.policy = OWNER.policy(3, denying("x"))
    make(path=path).fetch_active_policy(WORKSPACE)
    tamper(path, **changes)
    client = make(path=path, trusted_policy_keys=[OWNER.public])
    assert client.last_good_policy(WORKSPACE) is None
    assert any("refused and not used" in record.message for record in caplog.records) or changes["policy"] == 5
    served.policy = OWNER.policy(2)
    with pytest.raises(PolicyIntegrityError, match="older than 3"):
        client.fetch_active_policy(WORKSPACE)


def test_a_rollback_over_a_restart(served: Served, make: Make, path: Path) -> None:
    """An older version is refused by the next run too."""
    served.policy = OWNER.policy(9)
    make(path=path).fetch_active_policy(WORKSPACE)
    served.policy = OWNER.policy(8)
    client = make(path=path)
    with pytest.raises(PolicyIntegrityError, match="rollback"):
        client.fetch_active_policy(WORKSPACE)
    assert version_of(client.last_good_policy(WORKSPACE)) == 9


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "policies": 5}', "\x00\xff", "[" * 100_000])
def test_a_file_of_something_else(
    served: Served, make: Make, path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is no cache is an error in the log; then it is replaced."""
    path.write_bytes(text.encode("latin-1"))
    os.chmod(path, 0o600)
    client = make(path=path)
    assert client.last_good_policy(WORKSPACE) is None
    assert any("is not used" in record.message for record in caplog.records)
    client.fetch_active_policy(WORKSPACE)
    assert stored(path)["version"] == 1


def test_an_entry_of_something_else(served: Served, make: Make, path: Path) -> None:
    """An entry that is none counts as absent."""
    path.write_text(json.dumps({"format": 1, "policies": {WORKSPACE: 5}}))
    os.chmod(path, 0o600)
    assert make(path=path).last_good_policy(WORKSPACE) is None


def test_a_newer_policy_of_another_process_stays_on_disk(served: Served, make: Make, path: Path) -> None:
    """Who is late does not replace a newer policy on disk."""
    client = make(path=path)
    client.fetch_active_policy(WORKSPACE)
    served.policy = OWNER.policy(5)
    make(path=path).fetch_active_policy(WORKSPACE)
    served.policy = OWNER.policy(4)
    client.invalidate_cache(WORKSPACE)
    assert version_of(client.fetch_active_policy(WORKSPACE)) == 4
    assert stored(path)["version"] == 5


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_a_file_that_others_may_write_is_refused(make: Make, path: Path) -> None:
    """Who may write the file could bring back an older policy."""
    path.write_text("{}")
    os.chmod(path, 0o622)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        make(path=path)


@pytest.mark.parametrize("where", ["missing/policy.json", "."])
def test_a_path_that_cannot_be(make: Make, tmp_path: Path, where: str) -> None:
    """A directory that is not there, or is the path itself, is told at once."""
    with pytest.raises(ConfigurationError, match="directory"):
        make(path=tmp_path / where)


@pytest.mark.parametrize("what", ["replace", "open_lock", "try_lock"])
def test_a_disk_that_fails(
    served: Served, make: Make, path: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk costs a warning, missing locks nothing; the policy is there either way."""
    from sekuire.policy import cache

    def fail(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.files if what == "replace" else cache.filelock, what, fail)
    client = make(path=path)
    for version in (1, 2):
        served.policy = OWNER.policy(version, denying(str(version)))
        client.invalidate_cache(WORKSPACE)
        assert version_of(client.fetch_active_policy(WORKSPACE)) == version
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (1 if what == "replace" else 0)
    assert path.exists() == (what != "replace")


def test_a_lock_that_is_held(served: Served, make: Make, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that holds the lock for long does not keep the policy from the disk."""
    from sekuire.policy import cache

    monkeypatch.setattr(cache, "_LOCK_TIMEOUT", 0.05)
    descriptor = cache.filelock.open_lock(f"{path}.lock")
    try:
        assert cache.filelock.try_lock(descriptor)
        make(path=path).fetch_active_policy(WORKSPACE)
    finally:
        os.close(descriptor)
    assert stored(path)["version"] == 1


_KILLED = """
import os, signal, sys
from sekuire import PolicyClient
url, path = sys.argv[1:]
client = PolicyClient(url, api_key="k", path=path)
client.fetch_active_policy("ws")
real = os.replace
os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
client.invalidate_cache("ws")
client.fetch_active_policy("ws")
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_kill_while_writing(served: Served, make: Make, path: Path) -> None:
    """A process killed while it writes leaves the policy of before."""
    usual = served.scripted.on["policy"]

    def answer(request: Request) -> Any:
        served.policy = OWNER.policy(served.count)
        return usual(request)

    served.scripted.on["policy"] = answer
    done = subprocess.run([sys.executable, "-c", _KILLED, served.scripted.url, str(path)], check=False, timeout=GUARD)
    assert done.returncode == -9
    assert served.count == 2
    assert version_of(make(path=path).last_good_policy(WORKSPACE)) == 1


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "no credentials"),
        ({"api_key": "k", "trusted_policy_keys": "ab" * 32}, "trusted_policy_keys.*list"),
        ({"api_key": "k", "trusted_policy_keys": ["abcd"]}, "trusted_policy_keys.*32 bytes"),
        ({"api_key": "k", "trusted_policy_keys": ["00" * 32]}, "trusted_policy_keys.*anyone could sign"),
        ({"api_key": "k", "cache_ttl": -1}, "cache_ttl"),
        ({"credentials_store": object()}, "credentials_store"),
        ({"token_provider": 5}, "token_provider"),
        ({"api_key": "k", "read_timeout": 0}, "read_timeout"),
    ],
)
def test_wrong_options(options: Any, match: str) -> None:
    """A wrong option is told at construction, by name."""
    with pytest.raises(ConfigurationError, match=match):
        PolicyClient("http://127.0.0.1:1", **options)


@pytest.mark.parametrize("workspace", ["", ".", 5, None])
def test_a_wrong_workspace(make: Make, workspace: Any) -> None:
    """What is no id is told before anything is asked."""
    with pytest.raises(ConfigurationError, match="workspace_id"):
        make().fetch_active_policy(workspace)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_child_may_use_it(served: Served, make: Make) -> None:
    """After a fork a child uses the client, whatever a thread of its parent was doing with it."""
    client = make()
    client._lock.acquire()
    may_end = threading.Event()
    # As if a thread of the parent were in the middle of a fetch.
    known = client._known.setdefault(WORKSPACE, client_module._Known())
    assert known.fetches.start(may_end.wait, "fetch") is not None
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if version_of(client.fetch_active_policy(WORKSPACE)) == 1 else 2
        finally:
            os._exit(code)
    may_end.set()
    client._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra the client says what to install."""
    monkeypatch.setattr(client_module, "missing_packages", lambda: ("blake3",))
    with pytest.raises(ConfigurationError, match=r"pip install 'sekuire\[policy\]'"):
        PolicyClient("http://127.0.0.1:1", api_key="k")
