"""The store: generations, one renewal for all, seeds, and other processes."""

from __future__ import annotations

import datetime as dt
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import time
from typing import Any, Callable, List, Optional

import attrs
import pytest

from sekuire._internal.threads import Deadline
from sekuire.credentials import RuntimeCredentialsStore, Snapshot
from sekuire.credentials import store as store_module
from sekuire.credentials.store import Renewed, fingerprint
from sekuire.errors import (
    APIError,
    AuthenticationError,
    ConfigurationError,
    PlanLimitError,
    RevokedError,
    SekuireError,
    TransportError,
)
from sekuire.transport.retry import Interrupted
from sekuire.wire.models import Grant, RuntimeCredentials

from ..support.servers import assert_clean, run_python
from ..support.waiting import GUARD, SLACK, until

HOUR = 3600.0


def credentials(number: int = 1, **fields: Any) -> RuntimeCredentials:
    return RuntimeCredentials(
        **{
            "installation_id": "inst-1",
            "runtime_token": f"skr_{number}",
            "refresh_token": f"skf_{number}",
            "workspace_id": "ws-1",
            **fields,
        }
    )


def renewed(number: int, lifetime: Optional[float] = HOUR, **fields: Any) -> Renewed:
    return Renewed(
        grant=Grant(credentials=credentials(number, **fields), lifetime=lifetime),
        sent_at=time.monotonic(),
        sent_wall=time.time(),
    )


def token(store: RuntimeCredentialsStore) -> Optional[str]:
    found = store.current.runtime_token
    return None if found is None else found.reveal()


def never(snapshot: Snapshot) -> Renewed:
    raise AssertionError("this must not be called")


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "credentials.json"


# -- what a user does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "file"])
def test_update_and_clear(kept: bool, path: pathlib.Path) -> None:
    """Each change raises the generation and is seen at once; nothing is there before the first and after a clear."""
    store = RuntimeCredentialsStore(path=path if kept else None)
    assert store.current == RuntimeCredentials()
    generations = [store.generation]
    for number in (1, 2):
        store.update(credentials(number))
        assert store.current == credentials(number)
        generations.append(store.generation)
    store.clear()
    generations.append(store.generation)
    assert store.current == RuntimeCredentials()
    assert generations == sorted(set(generations))
    if kept:
        assert RuntimeCredentialsStore(path=path).current == RuntimeCredentials()


def test_a_store_lasts(path: pathlib.Path) -> None:
    """What was stored is there in the next process, with the end and the lifetime of its token."""
    end = dt.datetime.now(dt.timezone.utc) + dt.timedelta(hours=1)
    RuntimeCredentialsStore(path=path).update(credentials(expires_at=end))
    again = RuntimeCredentialsStore(path=path)
    assert again.current == credentials(expires_at=end)
    left = again.snapshot.time_left()
    assert left is not None
    assert HOUR - SLACK < left <= HOUR
    assert again.snapshot.lifetime == pytest.approx(HOUR, abs=SLACK)


def test_a_store_shows_no_token(path: pathlib.Path) -> None:
    """Neither the store nor a snapshot shows a token; neither can be pickled."""
    store = RuntimeCredentialsStore(credentials(), path=path)
    for value in (store, store.snapshot, renewed(1)):
        assert "skr_1" not in repr(value) + str(value)
        assert "skf_1" not in repr(value) + str(value)
        with pytest.raises(TypeError):
            pickle.dumps(value)
    assert str(path) in repr(store)


@pytest.mark.parametrize("value", [None, {}, "token", 5])
def test_only_credentials_are_stored(value: Any) -> None:
    """Anything but RuntimeCredentials is refused, and an empty store is no error."""
    with pytest.raises(ConfigurationError, match="must be RuntimeCredentials"):
        RuntimeCredentialsStore().update(value)
    if value is not None:
        with pytest.raises(ConfigurationError, match="must be RuntimeCredentials"):
            RuntimeCredentialsStore(value)


def test_a_file_that_is_not_ours_is_refused_at_construction(path: pathlib.Path) -> None:
    """A file of another kind is refused when the store is made."""
    path.write_text("hello")
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="is not a credentials file"):
        RuntimeCredentialsStore(path=path)


# -- how long a token lives -------------------------------------------------------------------------------------------


def test_what_is_left_counts_by_the_earlier_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suspend, which stops one clock, and a clock that is set, both shorten what is left; neither lengthens it."""
    now = {"monotonic": 100.0, "time": 1_900_000_000.0}
    for clocks in (store_module.time, time):
        monkeypatch.setattr(clocks, "monotonic", lambda: now["monotonic"])
        monkeypatch.setattr(clocks, "time", lambda: now["time"])
    store = RuntimeCredentialsStore()
    store.renew(0, lambda snapshot: renewed(1), Deadline(GUARD))
    for monotonic, wall, left in ((0, 0, HOUR), (0, 600, HOUR - 600), (600, 0, HOUR - 600), (600, -600, HOUR - 600),
                                  (0, 2 * HOUR, 0.0), (2 * HOUR, 0, 0.0)):  # fmt: skip
        now.update(monotonic=100.0 + monotonic, time=1_900_000_000.0 + wall)
        assert store.snapshot.time_left() == pytest.approx(left)


@pytest.mark.parametrize(
    ("end", "left"),
    [
        (None, None),
        (dt.timedelta(seconds=-10), 0.0),
        (dt.timedelta(days=401), None),
        (dt.timedelta(days=365 * 100), None),
    ],
)
def test_ends_that_are_unknown_or_past(end: Optional[dt.timedelta], left: Optional[float], path: pathlib.Path) -> None:
    """Without an end, or with one too far away to be meant, what is left is unknown; a past one leaves nothing."""
    store = RuntimeCredentialsStore(path=path)
    store.update(credentials(expires_at=end and dt.datetime.now(dt.timezone.utc) + end))
    assert store.snapshot.time_left() == left
    assert RuntimeCredentialsStore(path=path).snapshot.time_left() == left


# -- seeds ------------------------------------------------------------------------------------------------------------

SKT = fingerprint("skt_1")
OTHER_SKT = fingerprint("skt_2")
NOTHING = RuntimeCredentials()


def rotate(store: RuntimeCredentialsStore, number: int) -> None:
    store.renew(store.generation, lambda snapshot: renewed(number), Deadline(GUARD))


def test_the_same_seed_at_a_restart(path: pathlib.Path) -> None:
    """Settings that the file grew from do not bring their consumed tokens back."""
    store = RuntimeCredentialsStore(path=path)
    store.seed(credentials(1), None)
    assert token(store) == "skr_1"
    rotate(store, 2)
    for _ in range(2):
        again = RuntimeCredentialsStore(path=path)
        again.seed(credentials(1), None)
        assert token(again) == "skr_2"


def test_a_new_seed_wins(path: pathlib.Path) -> None:
    """New settings win over the file, and so do the old ones when they come back later."""
    store = RuntimeCredentialsStore(path=path)
    store.seed(credentials(1), None)
    rotate(store, 2)
    for number in (5, 1):
        store = RuntimeCredentialsStore(path=path)
        store.seed(credentials(number), None)
        assert token(store) == f"skr_{number}"
        rotate(store, number + 1)


def test_an_install_token_as_seed(path: pathlib.Path) -> None:
    """The same install token leaves the file alone; a new one alone makes a new beginning."""
    store = RuntimeCredentialsStore(path=path)
    store.seed(NOTHING, SKT)
    rotate(store, 2)
    again = RuntimeCredentialsStore(path=path)
    again.seed(NOTHING, SKT)
    assert token(again) == "skr_2"
    fresh = RuntimeCredentialsStore(path=path)
    fresh.seed(NOTHING, OTHER_SKT)
    assert fresh.current == NOTHING
    assert RuntimeCredentialsStore(path=path).current == NOTHING


def test_nothing_given_is_no_seed(path: pathlib.Path) -> None:
    """Settings without credentials leave the store alone."""
    store = RuntimeCredentialsStore(credentials(1), path=path)
    generation = store.generation
    store.seed(NOTHING, None)
    store.seed(RuntimeCredentials(workspace_id="ws-9"), None)
    assert (token(store), store.generation) == ("skr_1", generation)


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("workspace_id", [None, "ws-9"])
def test_an_install_token_beside_a_store_that_was_given(
    kept: bool, workspace_id: Optional[str], path: pathlib.Path
) -> None:
    """A store given with credentials keeps them beside an install token, its fallback, now and at every restart."""
    where = path if kept else None
    beside = RuntimeCredentials(workspace_id=workspace_id)
    store = RuntimeCredentialsStore(credentials(1), path=where)
    store.seed(beside, SKT)
    assert token(store) == "skr_1"
    if not kept:
        return
    # A restart at once, one after a rotation, and one more.
    for expected in ("skr_1", "skr_2", "skr_3"):
        again = RuntimeCredentialsStore(credentials(1), path=path)
        again.seed(beside, SKT)
        assert token(again) == expected
        rotate(again, int(expected[-1]) + 1)


def test_a_file_that_a_user_filled_keeps_its_content(path: pathlib.Path) -> None:
    """Credentials that were put into the file by update(), not by settings, are not replaced by an install token."""
    RuntimeCredentialsStore(path=path).update(credentials(1))
    store = RuntimeCredentialsStore(path=path)
    store.seed(NOTHING, SKT)
    assert token(store) == "skr_1"
    again = RuntimeCredentialsStore(path=path)
    again.seed(NOTHING, SKT)
    assert token(again) == "skr_1"


def test_objects_with_settings_of_their_own(path: pathlib.Path) -> None:
    """Two objects that share a store, each with an install token of its own, do not undo each other at a restart."""
    store = RuntimeCredentialsStore(path=path)
    store.seed(NOTHING, SKT)
    store.seed(NOTHING, OTHER_SKT)
    rotate(store, 2)
    again = RuntimeCredentialsStore(path=path)
    again.seed(NOTHING, SKT)
    again.seed(NOTHING, OTHER_SKT)
    assert token(again) == "skr_2"


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "file"])
def test_an_installation_without_tokens(kept: bool, path: pathlib.Path) -> None:
    """An installation id alone completes what the store has, and replaces no token."""
    only_id = RuntimeCredentials(installation_id="inst-7")
    empty = RuntimeCredentialsStore(path=path if kept else None)
    empty.seed(only_id, None)
    assert empty.current == only_id
    store = RuntimeCredentialsStore(credentials(1), path=path.with_name("other") if kept else None)
    store.seed(only_id, None)
    assert store.current == credentials(1)
    partial = RuntimeCredentialsStore(RuntimeCredentials(runtime_token="skr_1"))
    partial.seed(only_id, SKT)
    assert partial.current == RuntimeCredentials(installation_id="inst-7", runtime_token="skr_1")


def test_a_known_seed_waits_for_nobody(path: pathlib.Path) -> None:
    """A restart with the same settings does not wait for a lock that another process holds during an outage."""
    store = RuntimeCredentialsStore(path=path)
    store.seed(NOTHING, SKT)
    rotate(store, 2)
    other = RuntimeCredentialsStore(path=path)
    with other._writing(Deadline(GUARD)):
        again = RuntimeCredentialsStore(path=path)
        again.seed(NOTHING, SKT)
        assert token(again) == "skr_2"


def test_a_seed_that_another_process_brings_first(path: pathlib.Path) -> None:
    """Of two processes that start together with the same settings the second takes what the first has made of them."""
    one, other = (RuntimeCredentialsStore(path=path) for _ in range(2))
    one.seed(credentials(1), None)
    rotate(one, 2)
    other.seed(credentials(1), None)
    assert token(other) == "skr_2"


def test_a_seed_is_not_in_the_file(path: pathlib.Path) -> None:
    """The file holds a hash of the settings, from which an install token cannot be read."""
    store = RuntimeCredentialsStore(path=path)
    store.seed(NOTHING, fingerprint("skt_do_not_keep_me"))
    rotate(store, 1)
    assert "skt_do_not_keep_me" not in path.read_text()
    assert SKT not in path.read_text()


# -- renewing ---------------------------------------------------------------------------------------------------------


class Gate:
    """An action that waits until it is let through; ``entered`` tells that it runs."""

    def __init__(self, result: Callable[[], Renewed]) -> None:
        self.count = 0
        self.entered = threading.Event()
        self.open = threading.Event()
        self._result = result

    def __call__(self, snapshot: Snapshot) -> Renewed:
        self.count += 1
        self.entered.set()
        assert self.open.wait(GUARD)
        return self._result()


def fail_with(error: BaseException) -> Callable[[], Renewed]:
    def fail() -> Renewed:
        raise error

    return fail


class Callers:
    """Threads that renew the same generation; what each got, or the error that it got."""

    def __init__(
        self,
        store: RuntimeCredentialsStore,
        action: Callable[[Snapshot], Renewed],
        count: int,
        patience: float = GUARD,
        who: object = None,
    ) -> None:
        self.results: List[Any] = []
        self._used = store.generation
        self._store = store
        self._action = action
        self._patience = patience
        self._who = who
        self._threads = [threading.Thread(target=self._call, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _call(self) -> None:
        try:
            self.results.append(self._store.renew(self._used, self._action, Deadline(self._patience), self._who))
        except BaseException as error:
            self.results.append(error)

    def finish(self) -> List[Any]:
        for thread in self._threads:
            thread.join(GUARD)
        assert len(self.results) == len(self._threads)
        return self.results


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "file"])
def test_one_renewal_for_all(kept: bool, path: pathlib.Path) -> None:
    """Of 64 threads that ask together one renews; all get what it got, which was written before anyone saw it."""
    store = RuntimeCredentialsStore(credentials(1), path=path if kept else None)
    gate = Gate(lambda: renewed(2))
    callers = Callers(store, gate, 64)
    assert gate.entered.wait(GUARD)
    assert token(store) == "skr_1"
    gate.open.set()
    results = callers.finish()
    assert gate.count == 1
    assert {snapshot.credentials.runtime_token.reveal() for snapshot in results} == {"skr_2"}
    assert {snapshot.generation for snapshot in results} == {store.generation}
    if kept:
        assert token(RuntimeCredentialsStore(path=path)) == "skr_2"


def test_a_stale_generation_only_retries() -> None:
    """Who was refused with credentials that have been replaced meanwhile gets the new ones, without a renewal."""
    store = RuntimeCredentialsStore(credentials(1))
    old = store.generation
    store.update(credentials(2))
    assert store.renew(old, never, Deadline(0)) is store.snapshot


def test_a_failure_is_shared() -> None:
    """When the renewal fails, each thread gets an error of its own with the same facts; the next one starts anew."""
    store = RuntimeCredentialsStore(credentials(1))
    original = APIError(503, "BUSY", "later", 2.0)
    gate = Gate(fail_with(original))
    callers = Callers(store, gate, 16)
    assert gate.entered.wait(GUARD)
    gate.open.set()
    results = callers.finish()
    assert gate.count >= 1
    assert all(isinstance(error, APIError) and error.args == original.args for error in results)
    waiters = [error for error in results if error is not original]
    assert len({id(error) for error in waiters}) == len(waiters) == 16 - gate.count
    for error in waiters:
        assert_clean(error, "skr_1", "skf_1")
    assert token(store) == "skr_1"
    assert store.renew(store.generation, lambda snapshot: renewed(3), Deadline(GUARD)).credentials == credentials(3)


def waiting_for(store: RuntimeCredentialsStore, count: int) -> bool:
    """Return True if ``count`` threads wait for the renewal in progress."""
    return store.renewals.waiting == count


@pytest.mark.parametrize(
    "error", [AuthenticationError("refused", 401), PlanLimitError(402, None, "no"), Interrupted("stopped")], ids=repr
)
def test_what_a_leader_cannot_do_says_nothing_of_others(error: SekuireError) -> None:
    """A refusal is not shared with those who have other ways: they try theirs, in one further renewal for all."""
    store = RuntimeCredentialsStore(credentials(1))
    gate = Gate(fail_with(error))
    leader = Callers(store, gate, 1, who="one")
    assert gate.entered.wait(GUARD)
    other = Gate(lambda: renewed(2))
    waiting = Callers(store, other, 64, who="other")
    until(lambda: waiting_for(store, 64))
    gate.open.set()
    assert leader.finish() == [error]
    # At most one renewal at a time: now it is theirs, and each of them is in it.
    assert other.entered.wait(GUARD)
    other.open.set()
    assert {snapshot.credentials.runtime_token.reveal() for snapshot in waiting.finish()} == {"skr_2"}
    assert (gate.count, other.count) == (1, 1)


@pytest.mark.parametrize("error", [TransportError("away"), APIError(503), RevokedError("leak")], ids=repr)
def test_what_is_the_platforms_is_shared_by_all(error: SekuireError) -> None:
    """An outage and the kill switch say the same to everyone, whatever ways they have."""
    store = RuntimeCredentialsStore(credentials(1))
    gate = Gate(fail_with(error))
    leader = Callers(store, gate, 1, who="one")
    assert gate.entered.wait(GUARD)
    waiting = Callers(store, never, 3, who="other")
    until(lambda: waiting_for(store, 3))
    gate.open.set()
    leader.finish()
    assert {type(found) for found in waiting.finish()} == {type(error)}


def test_others_refusals_end_with_the_waiters_deadline() -> None:
    """Who has no time left for a try of its own gets an error that may pass, not the refusal of others."""
    store = RuntimeCredentialsStore(credentials(1))
    gate = Gate(fail_with(AuthenticationError("refused", 401)))
    leader = Callers(store, gate, 1, who="one")
    assert gate.entered.wait(GUARD)
    deadline = Deadline(GUARD)
    found: List[BaseException] = []

    def wait() -> None:
        try:
            store.renew(store.generation, never, deadline, "other")
        except BaseException as error:
            found.append(error)

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    until(lambda: waiting_for(store, 1))
    deadline.shorten(0)
    gate.open.set()
    leader.finish()
    waiter.join(GUARD)
    assert [type(error) for error in found] == [TransportError]


def test_credentials_that_came_before_the_renewal_began_are_no_renewal() -> None:
    """Who waits for a renewal of older credentials than its own is not sent away with its own."""
    store = RuntimeCredentialsStore(credentials(1))
    old = store.generation
    began = threading.Event()

    class Slow(Deadline):
        def remaining(self) -> float:
            began.set()
            return super().remaining()

    results: List[Snapshot] = []
    with store._writing(Deadline(GUARD)):
        leader = threading.Thread(target=lambda: results.append(store.renew(old, never, Slow(GUARD))), daemon=True)
        leader.start()
        assert began.wait(GUARD)
        # The leader waits for the write lock; a heartbeat's token comes first.
        store._store(credentials(2), HOUR, time.monotonic(), time.time())
        waiting = Callers(store, lambda snapshot: renewed(3), 1)
        until(lambda: waiting_for(store, 1))
    leader.join(GUARD)
    assert [snapshot.credentials.runtime_token for snapshot in results] == [credentials(2).runtime_token]
    assert [snapshot.credentials for snapshot in waiting.finish()] == [credentials(3)]


def test_each_waiter_has_its_own_deadline() -> None:
    """A thread waits for another's renewal until its own deadline; the renewal goes on."""
    store = RuntimeCredentialsStore(credentials(1))
    gate = Gate(lambda: renewed(2))
    leader = Callers(store, gate, 1)
    assert gate.entered.wait(GUARD)
    with pytest.raises(TransportError, match="another thread's renewal") as caught:
        store.renew(store.generation, never, Deadline(0.01))
    assert_clean(caught.value, "skr_1")
    gate.open.set()
    leader.finish()
    assert token(store) == "skr_2"


def test_an_interrupt_is_not_shared() -> None:
    """Ctrl-C in the renewing thread ends that thread's renewal; the others get an ordinary error that may pass."""
    store = RuntimeCredentialsStore(credentials(1))
    gate = Gate(fail_with(KeyboardInterrupt()))
    leader = Callers(store, gate, 1)
    assert gate.entered.wait(GUARD)
    waiting = Callers(store, never, 3)
    until(lambda: waiting_for(store, 3))
    gate.open.set()
    assert isinstance(leader.finish()[0], KeyboardInterrupt)
    assert {type(error) for error in waiting.finish()} == {TransportError}
    assert all(error.retryable for error in waiting.results)


def test_renewing_within_a_renewal_is_refused() -> None:
    """An action that asks for the credentials it is to provide is told so, instead of waiting for itself."""
    store = RuntimeCredentialsStore()

    def action(snapshot: Snapshot) -> Renewed:
        store.renew(snapshot.generation, never, Deadline(GUARD))
        raise AssertionError("not reached")

    with pytest.raises(SekuireError, match="must not use the credentials"):
        store.renew(store.generation, action, Deadline(GUARD))


def test_an_error_that_cannot_be_copied_is_shared_as_it_is() -> None:
    """An exception whose class cannot be copied reaches the waiters nevertheless."""

    class Odd(Exception):
        def __reduce_ex__(self, protocol: Any) -> Any:
            raise TypeError

    store = RuntimeCredentialsStore()
    gate = Gate(fail_with(Odd()))
    callers = Callers(store, gate, 4)
    assert gate.entered.wait(GUARD)
    gate.open.set()
    assert {type(error) for error in callers.finish()} == {Odd}


def test_an_update_waits_for_a_renewal_and_wins() -> None:
    """What a user stores during a renewal is stored after it."""
    store = RuntimeCredentialsStore(credentials(1))
    gate = Gate(lambda: renewed(2))
    leader = Callers(store, gate, 1)
    assert gate.entered.wait(GUARD)
    user = threading.Thread(target=store.update, args=(credentials(3),))
    user.start()
    gate.open.set()
    leader.finish()
    user.join(GUARD)
    assert token(store) == "skr_3"


def test_an_update_that_waits_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update gives up, with an error that says why, when a renewal takes longer than it may wait."""
    monkeypatch.setattr(store_module, "_LOCK_TIMEOUT", 0.01)
    store = RuntimeCredentialsStore(credentials(1))
    gate = Gate(lambda: renewed(2))
    leader = Callers(store, gate, 1)
    assert gate.entered.wait(GUARD)
    with pytest.raises(TransportError, match="another thread is writing"):
        store.update(credentials(3))
    gate.open.set()
    leader.finish()


# -- tokens that come unasked -----------------------------------------------------------------------------------------


def test_a_heartbeats_token(path: pathlib.Path) -> None:
    """A token that a heartbeat brought replaces the runtime token only, and is kept."""
    store = RuntimeCredentialsStore(credentials(1), path=path)
    assert store.offer(store.generation, renewed(2, refresh_token=None, installation_id=None))
    expected = attrs.evolve(credentials(1), runtime_token="skr_2")
    assert store.current == expected
    assert RuntimeCredentialsStore(path=path).current == expected


def test_an_older_heartbeat_is_ignored() -> None:
    """A token that was sent for credentials replaced meanwhile is not taken."""
    store = RuntimeCredentialsStore(credentials(1))
    used = store.generation
    store.update(credentials(2))
    assert not store.offer(used, renewed(9))
    assert store.current == credentials(2)


def test_a_heartbeat_during_a_renewal_is_ignored() -> None:
    """A heartbeat's token that comes while a renewal runs waits for it, and does not replace what it brought."""
    store = RuntimeCredentialsStore(credentials(1))
    used = store.generation
    gate = Gate(lambda: renewed(2))
    leader = Callers(store, gate, 1)
    assert gate.entered.wait(GUARD)
    taken: List[bool] = []
    heartbeat = threading.Thread(target=lambda: taken.append(store.offer(used, renewed(9))))
    heartbeat.start()
    gate.open.set()
    leader.finish()
    heartbeat.join(GUARD)
    assert taken == [False]
    assert store.current == credentials(2)


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "file"])
def test_an_installation_is_adopted_once(kept: bool, path: pathlib.Path) -> None:
    """The id that the platform tells completes credentials without one, lastingly, and replaces none."""
    where = path if kept else None
    store = RuntimeCredentialsStore(RuntimeCredentials(runtime_token="skr_1"), path=where)
    store.adopt_installation("inst-7")
    store.adopt_installation("inst-8")
    expected = RuntimeCredentials(runtime_token="skr_1", installation_id="inst-7")
    assert store.current == expected
    if kept:
        assert RuntimeCredentialsStore(path=path).current == expected


# -- other processes --------------------------------------------------------------------------------------------------


def test_stores_of_one_file_keep_in_step(path: pathlib.Path) -> None:
    """What one store writes the others take, by themselves before they renew, or on reload()."""
    one, other = (RuntimeCredentialsStore(path=path) for _ in range(2))
    assert not other.reload()
    one.update(credentials(1))
    assert other.reload()
    assert not other.reload()
    assert other.current == credentials(1)
    used = other.generation
    rotate(one, 2)
    assert other.renew(used, never, Deadline(GUARD)).credentials.runtime_token == credentials(2).runtime_token
    assert not RuntimeCredentialsStore().reload()


def test_an_update_over_another_processs_writes_is_seen_by_it(path: pathlib.Path) -> None:
    """What a user stores is newer than what any other process wrote before, however often that was."""
    one, other = (RuntimeCredentialsStore(path=path) for _ in range(2))
    for number in range(1, 6):
        one.update(credentials(number))
    other.update(credentials(9))
    assert one.reload()
    assert one.current == other.current == credentials(9)


def test_a_heartbeat_does_not_undo_another_processs_rotation(path: pathlib.Path) -> None:
    """A heartbeat's token does not bring back the refresh token that another process has rotated meanwhile."""
    one, other = (RuntimeCredentialsStore(credentials(1), path=path) for _ in range(2))
    used = other.generation
    rotate(one, 2)
    assert not other.offer(used, renewed(9))
    assert other.current.refresh_token == one.current.refresh_token == credentials(2).refresh_token
    other_id = RuntimeCredentialsStore(path=path)
    rotate(one, 3)
    other_id.adopt_installation("inst-9")
    assert other_id.current == credentials(3)


def test_a_file_that_broke_is_written_anew(path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that cannot be read any more is warned of, and the next renewal makes it whole."""
    store = RuntimeCredentialsStore(credentials(1), path=path)
    path.write_text("broken")
    rotate(store, 2)
    assert "is not a credentials file" in caplog.text
    assert token(RuntimeCredentialsStore(path=path)) == "skr_2"


def test_a_removed_file_is_made_anew(path: pathlib.Path) -> None:
    """A file that was removed is made anew by the next change."""
    store = RuntimeCredentialsStore(credentials(1), path=path)
    path.unlink()
    rotate(store, 2)
    assert token(RuntimeCredentialsStore(path=path)) == "skr_2"


_SHARER = """
import sys, time
from sekuire.credentials import RuntimeCredentialsStore
from sekuire.credentials.store import Renewed
from sekuire._internal.threads import Deadline
from sekuire.wire.models import Grant, RuntimeCredentials
store = RuntimeCredentialsStore(path=sys.argv[1])
for _ in range(int(sys.argv[2])):
    def action(snapshot):
        number = int(snapshot.credentials.refresh_token.reveal()[4:]) + 1
        credentials = RuntimeCredentials(runtime_token=f"skr_{number}", refresh_token=f"skf_{number}")
        return Renewed(grant=Grant(credentials=credentials), sent_at=time.monotonic(), sent_wall=time.time())
    # As a thread would that was refused with what it knows: adopts what is newer, else goes one further.
    store.renew(store.generation, action, Deadline(60))
"""


def test_processes_that_share_a_file_lose_no_rotation(path: pathlib.Path) -> None:
    """However several processes renew, each starts from the newest refresh token, and none is lost or used twice."""
    RuntimeCredentialsStore(credentials(0), path=path)
    rounds = 25
    processes = [
        subprocess.Popen([sys.executable, "-c", _SHARER, str(path), str(rounds)], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=GUARD)
        assert process.returncode == 0, errors
    found = RuntimeCredentialsStore(path=path).current
    assert found.runtime_token is not None
    assert found.refresh_token is not None
    assert found.runtime_token.reveal()[4:] == found.refresh_token.reveal()[4:]
    assert rounds <= int(found.runtime_token.reveal()[4:]) <= 3 * rounds


# -- fork -------------------------------------------------------------------------------------------------------------

_FORK = """
import os, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from sekuire.credentials import RuntimeCredentialsStore
from sekuire.credentials.store import Renewed
from sekuire._internal.threads import Deadline
from sekuire.wire.models import Grant, RuntimeCredentials
path = sys.argv[1] or None
store = RuntimeCredentialsStore(RuntimeCredentials(runtime_token="skr_1"), path=path)
stop = threading.Event()
def renewed(name):
    credentials = RuntimeCredentials(runtime_token=name)
    return Renewed(grant=Grant(credentials=credentials), sent_at=time.monotonic(), sent_wall=time.time())
def work():
    while not stop.is_set():
        store.renew(store.generation, lambda snapshot: renewed("skr_parent"), Deadline(60))
threads = [threading.Thread(target=work, daemon=True) for _ in range(64)]
for thread in threads: thread.start()
inside, go_on = threading.Event(), threading.Event()
for round_ in range(20):
    pid = os.fork()
    if pid == 0:
        mine = RuntimeCredentialsStore(RuntimeCredentials(runtime_token="skr_1")) if path else store
        mine.update(RuntimeCredentials(runtime_token="skr_child"))
        mine.renew(mine.generation, lambda snapshot: renewed("skr_grandchild"), Deadline(60))
        os._exit(0 if mine.current.runtime_token.reveal() == "skr_grandchild" else 1)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
for thread in threads: thread.join(60)
# And certainly in the middle of a renewal:
def slow(snapshot):
    inside.set(); go_on.wait(60)
    return renewed("skr_slow")
thread = threading.Thread(target=lambda: store.renew(store.generation, slow, Deadline(60)), daemon=True)
thread.start(); inside.wait(60)
pid = os.fork()
if pid == 0:
    if not path:
        store.update(RuntimeCredentials(runtime_token="skr_child"))
        store.renew(store.generation, lambda snapshot: renewed("skr_again"), Deadline(60))
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
go_on.set(); thread.join(60)
print(store.current.runtime_token.reveal())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.parametrize("kept", [False, True], ids=["memory", "file"])
def test_a_fork_in_the_middle_of_renewals(kept: bool, path: pathlib.Path) -> None:
    """A child forked while 64 threads renew finds no lock held and no renewal to wait for; the parent goes on."""
    result = run_python(_FORK, str(path) if kept else "", forks=True)
    assert result.stdout == "skr_slow\n"


def test_a_refusal_is_shared() -> None:
    """An authentication error of the leader keeps its class and facts for those that waited."""
    store = RuntimeCredentialsStore()
    gate = Gate(fail_with(AuthenticationError("refused", 401, "X")))
    callers = Callers(store, gate, 8)
    assert gate.entered.wait(GUARD)
    gate.open.set()
    assert {(type(error), error.status, error.code) for error in callers.finish()} == {(AuthenticationError, 401, "X")}


def test_the_workspace_is_learned_once(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """An answer adds the workspace where none is known and never changes it, over restarts too; the user may."""
    path = tmp_path / "credentials.json"

    def renew(store: RuntimeCredentialsStore, token: str, workspace_id: Optional[str]) -> Optional[str]:
        grant = Grant(
            credentials=RuntimeCredentials(installation_id="i", runtime_token=token, workspace_id=workspace_id)
        )
        renewed = Renewed(grant=grant, sent_at=time.monotonic(), sent_wall=time.time())
        store.renew(store.generation, lambda snapshot: renewed, Deadline(10))
        assert store.current.runtime_token is not None
        assert store.current.runtime_token.reveal() == token
        return store.current.workspace_id

    store = RuntimeCredentialsStore(path=path)
    assert renew(store, "a", None) is None
    assert renew(store, "b", "ws-1") == "ws-1"
    assert renew(store, "c", None) == "ws-1"
    assert renew(store, "d", "ws-2") == "ws-1"
    assert renew(store, "e", "ws-2") == "ws-1"
    assert renew(RuntimeCredentialsStore(path=path), "f", "ws-2") == "ws-1"
    assert [record.levelname for record in caplog.records if "ws-2" in record.getMessage()] == ["ERROR"] * 2
    store.update(RuntimeCredentials(installation_id="i", runtime_token="g", workspace_id="ws-2"))
    assert renew(store, "h", "ws-1") == "ws-2"
