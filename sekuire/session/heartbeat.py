"""Beat for an installation, and keep its lease alive."""

from __future__ import annotations

import datetime as dt
import functools
import logging
import math
import threading
from typing import Any, Callable, List, Mapping, Optional, Protocol, Set, Tuple

from .._internal.clock import LEAST_GAP, SYSTEM_CLOCK, Clock, time
from .._internal.logs import get_logger
from .._internal.threads import Deadline, PeriodicThread
from ..credentials import Authenticator, Snapshot
from ..credentials.login import RENEWAL_TIMEOUT
from ..errors import RevokedError, SekuireError, TransportError
from ..transport.http import HttpClient, Reply
from ..wire import protocol
from ..wire.models import Grant, HeartbeatReply, WorkerReport
from ..wire.verdict import NotThePlatform, Revoked, Settled, verdict

log = get_logger("sekuire.heartbeat")

#: Most seconds that one beat may take, whatever the interval, and the fewest that it gets with a very short one.
BEAT_LIMIT, BEAT_LEAST = 5.0, 1.0
#: Least grace after a lease's end, in seconds.
MIN_GRACE = 10.0


class Participant(Protocol):
    """Take part in heartbeats, as a Beacon or a Worker does. All calls but ``on_lease`` come on its thread."""

    def heartbeat_status(self) -> str:
        """Return ``healthy``, ``degraded``, ``paused``, ``stopping`` or ``stopped``."""

    def heartbeat_report(self) -> Optional[WorkerReport]:
        """Return what a worker reports, None for others."""

    def heartbeat_interval(self) -> float:
        """Return the seconds between beats. The fewest of all participants count."""

    def on_lease(self) -> None:
        """Note that the lease has a new end. Any thread may call this, and it must not block."""

    def on_heartbeat(self, reply: HeartbeatReply, sent_at: float) -> None:
        """Handle an answer of the platform. ``sent_at`` is ``time.monotonic()`` of its request."""

    def on_heartbeat_problem(self, error: SekuireError) -> bool:
        """Handle a beat that failed. Return True if that was said to a person, or will be raised to the caller."""


class Lease:
    """Track until when the platform lets this installation work. Only the platform extends or ends the lease.

    All times are of ``clock.elapsed()``, which counts a suspend. ::

        lease = Lease()
        lease.renew(60.0, None, SYSTEM_CLOCK.elapsed(), grace=10.0)
        assert lease.is_held()

    """

    # Threads: those that beat, log in or take part write under `_lock`. Any thread may read: `limit` is one float,
    # replaced whole.

    __slots__ = ("_beat_at", "_clock", "_end", "_lock", "expires_at", "limit")

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._end = math.inf
        self._beat_at: Optional[float] = None
        #: When work must stop: the lease's end and its grace. Infinite until the platform has sent a lease.
        self.limit = math.inf
        self.expires_at: Optional[dt.datetime] = None

    def is_held(self) -> bool:
        """Return True while work may begin."""
        return self._clock.elapsed() < self.limit

    def time_left(self) -> float:
        """Return the seconds until :attr:`limit`: negative after it, infinite without a lease."""
        return self.limit - self._clock.elapsed()

    def seconds_left(self) -> Optional[float]:
        """Return the seconds until the lease ends, grace aside: negative after that, None without a lease."""
        end = self._end
        return None if end == math.inf else end - self._clock.elapsed()

    def note_beat(self) -> None:
        """Note that the platform has accepted a heartbeat now, whatever it says of the lease."""
        self._beat_at = self._clock.elapsed()

    def beat_age(self) -> Optional[float]:
        """Return the seconds since the platform has accepted a heartbeat, None before the first."""
        beat_at = self._beat_at
        return None if beat_at is None else self._clock.elapsed() - beat_at

    def renew(self, lifetime: Optional[float], expires_at: Optional[dt.datetime], sent_at: float, grace: float) -> bool:
        """Apply what an answer says of the lease. Return True if that changes it.

        :param lifetime: seconds from ``sent_at``; 0 ends the lease, and None (the answer names no end) changes nothing.
        """
        with self._lock:
            if lifetime is None or (lifetime <= 0 and self._end <= sent_at):
                # A lease that has ended is not ended again: its grace would begin again with each such answer.
                return False
            self.expires_at = expires_at
            self._end = sent_at + lifetime
            self.limit = self._end + grace
            return True

    def allow(self, grace: float) -> None:
        """Set the grace of the present lease."""
        with self._lock:
            self.limit = self._end + grace


# An installation with several participants reports the first of these states that one of them has. A participant that
# stops while others go on does not stop the installation.
_WORST = ("degraded", "healthy", "paused", "stopping", "stopped")


class Heartbeat:
    """Beat for one installation, and inform all that take part in it.

    One beat is one try within :meth:`beat_limit`. The next try comes at the interval, which counts a suspend. After a
    beat that was lost with a kept connection it comes at once. ::

        heartbeat.attach(worker)
        heartbeat.start()
        heartbeat.nudge()
        heartbeat.stop(Deadline(5.0))

    :param clock: measures the lease and the interval.
    """

    # Threads: `sekuire-heartbeat` runs beat(). Any thread may attach, detach, start, nudge and stop. `_lock` guards the
    # list of participants, which are called without it.

    def __init__(
        self,
        http: HttpClient,
        auth: Authenticator,
        *,
        platform: Mapping[str, Any],
        policy_gateway: Any = None,
        owner: object = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.lease = Lease(clock)
        self.last_at: Optional[dt.datetime] = None
        #: When the newest beat ended, answered or not (monotonic), and the clock's offset when it began.
        self._tried = (-math.inf, 0.0)
        self._clock = clock
        self._http = http
        self._auth = auth
        self._platform = platform
        #: The capabilities that heartbeats name. Replaced whole, by any thread.
        self.capabilities: Tuple[str, ...] = ()
        self._gateway = policy_gateway
        self._owner = owner
        self._lock = threading.Lock()
        self._participants: List[Participant] = []
        self._thread: Optional[PeriodicThread] = None
        self._platform_interval: Optional[float] = None
        self._started_at = time.monotonic()
        self._warned_no_id = False
        self._is_refused = False
        self._has_begun = False
        #: The revocation that another call of this installation was answered. The next beat informs the participants.
        self._revocation: Optional[RevokedError] = None
        # Fields of answers that were warned of. Two threads that see the same one at once may both warn.
        self._warned: Set[str] = set()
        auth.login.on_grant = self._note_grant
        auth.on_revoked = self._note_revocation

    # -- who takes part (any thread) --

    def attach(self, participant: Participant) -> None:
        """Add a participant, and beat."""
        with self._lock:
            if participant not in self._participants:
                self._participants.append(participant)
        # A lease that came with the login was granted before anyone said how often to beat.
        self.lease.allow(self._grace())
        self.nudge()

    def detach(self, participant: Participant) -> bool:
        """Remove a participant. Return True if none is left."""
        with self._lock:
            if participant in self._participants:
                self._participants.remove(participant)
            return not self._participants

    def start(self) -> None:
        """Begin to beat, now and at every interval. Do nothing if it has begun. It may begin again after :meth:`stop`.

        :raises RuntimeError: no thread can be started.
        """
        with self._lock:
            if self._thread is None:
                self._thread = PeriodicThread("sekuire-heartbeat", self, owner=self._owner, clock=self._clock)
                try:
                    self._thread.start()
                except RuntimeError:
                    # No thread can be started now. The next caller tries again.
                    self._thread = None
                    raise

    def is_beating(self) -> bool:
        """Return True if the thread was started and not stopped."""
        return self._thread is not None

    def nudge(self) -> None:
        """Beat now."""
        thread = self._thread
        if thread is not None:
            thread.nudge()

    def end(self) -> None:
        """Have the thread end after the beat in progress, without waiting. The thread itself may call this."""
        thread = self._thread
        if thread is not None:
            thread.stop()

    def stop(self, deadline: Deadline) -> bool:
        """End the thread after the beat in progress. Return True if it ended before ``deadline``."""
        with self._lock:
            thread = self._thread
            if thread is not None:
                # First, so that an interrupt in between does not leave it running without an owner.
                thread.stop()
            self._thread = None
        return thread is None or thread.join(deadline)

    def interval(self) -> float:
        """Return the seconds between beats: the fewest that a participant or the platform wants."""
        wanted = [participant.heartbeat_interval() for participant in self._present()]
        if self._platform_interval is not None:
            wanted.append(self._platform_interval)
        return min(wanted, default=60.0)

    def note_interval(self, seconds: Optional[float]) -> None:
        """Apply the interval that the platform names, also to the wait in progress. Any thread."""
        if seconds is None:
            return
        self._platform_interval = seconds
        thread = self._thread
        if thread is not None:
            thread.reconsider()

    def has_tried_since(self, moment: float) -> bool:
        """Return True if a beat has ended since ``moment`` (monotonic), and it was not sent before a suspend."""
        ended_at, offset = self._tried
        return ended_at >= moment and self._clock.offset() - offset < LEAST_GAP

    @property
    def is_expected(self) -> bool:
        """Return True if the platform may count on further beats: it has accepted one, or has not answered the first.

        Then a last one has to report the end.
        """
        return self.last_at is not None or (self._has_begun and not self._is_refused)

    def beat_limit(self) -> float:
        """Return the seconds that one beat may take."""
        return max(min(self.interval() / 2, BEAT_LIMIT), BEAT_LEAST)

    def note_ignored(self, ignored: Mapping[str, str]) -> None:
        """Warn of each field of an answer that could not be used, once. Any thread."""
        for name in ignored.keys() - self._warned:
            self._warned.add(name)
            # An order that is not understood is not carried out. A person must look at it.
            level = logging.WARNING if name == "lease_expires_at" else logging.ERROR
            log.log(level, "the platform sent %s, which is ignored: %s; fix it there", name, ignored[name])

    # -- beating --

    def beat_now(self, status: str, limit: float) -> bool:
        """Beat on the calling thread. Return True if the platform accepted it within ``limit`` seconds."""
        return self._send(status, Deadline(limit)) is not None

    def beat(self) -> None:
        """Beat once, on the heartbeat's thread. Log in first where there is no token."""
        revocation, self._revocation = self._revocation, None
        if revocation is not None:
            self._apply(_revoked(revocation), time.monotonic(), 0.0, self._present())
            return
        # A login is not a beat, and may take longer.
        must_log_in = self._auth.store.current.runtime_token is None
        self._send(None, Deadline(RENEWAL_TIMEOUT if must_log_in else self.beat_limit()))

    def _send(self, status: Optional[str], deadline: Deadline) -> Optional[HeartbeatReply]:
        participants = self._present()
        problem: Optional[SekuireError] = None
        reply: Optional[HeartbeatReply] = None
        accept: Callable[[], None] = _nothing
        is_foreign = False
        # Taken before the request: a suspend on the way shortens the lease, and must not prolong it.
        offset = self._clock.offset()
        sent_at = time.monotonic()
        try:
            snapshot = self._auth.snapshot(deadline)
            if snapshot.credentials.installation_id is None:
                self._warn_no_id()
                return None
            self._has_begun = True
            answer, used = self._auth.request(
                "POST", self._path, body=self._body(status, participants), deadline=deadline
            )
            sent_at = answer.sent_at
            found = verdict("heartbeat", answer)
            if isinstance(found, Settled):
                reply = self._read(answer)
                accept = functools.partial(
                    self._auth.accept_heartbeat, reply, used.generation, answer.sent_at, answer.sent_wall
                )
            elif isinstance(found, Revoked):
                reply = _revoked(found.error)
            else:
                problem = found.error
                is_foreign = isinstance(found, NotThePlatform)
        except RevokedError as error:
            reply = _revoked(error)
            self._revocation = None
        except SekuireError as error:
            problem = error
        finally:
            self._tried = (time.monotonic(), offset)
        if reply is not None:
            self._is_refused = False
            self._apply(reply, sent_at, offset, participants)
            if not reply.revoked:
                # Last: it may wait for a renewal in progress, and neither the lease nor an order can.
                self._accept(accept)
        elif problem is not None:
            is_said = False
            for participant in participants:
                is_said = participant.on_heartbeat_problem(problem) or is_said
            # The stream or the Beacon says that the network is gone. An answer that is an error is logged here, once.
            is_answered = is_foreign or not isinstance(problem, TransportError)
            level = logging.WARNING if is_answered and not is_said and not self._is_refused else logging.DEBUG
            self._is_refused = self._is_refused or is_answered
            log.log(level, "a heartbeat was not accepted: %s", problem)
            if isinstance(problem, TransportError) and problem.was_stale:
                # A failover left the kept connections dead, and this beat was lost on one. The next uses a new one.
                self.nudge()
        return reply

    def _accept(self, accept: Callable[[], None]) -> None:
        """Store the token of an answer. Without it the present one goes on."""
        try:
            accept()
        except SekuireError as error:
            log.warning("the token of a heartbeat's answer is not stored: %s", error)

    def _read(self, answer: Reply) -> HeartbeatReply:
        """Decode an answer in the platform's form. An empty body says nothing."""
        payload = answer.json() if answer.body else None
        reply = protocol.decode_heartbeat(payload, answer.date, answer.now)
        self.note_ignored(reply.ignored)
        return reply

    def _path(self, snapshot: Snapshot) -> str:
        return self._http.endpoints.path("heartbeat", installation_id=snapshot.credentials.installation_id or "")

    def _body(self, status: Optional[str], participants: List[Participant]) -> bytes:
        reports = [participant.heartbeat_report() for participant in participants]
        if status is None:
            statuses = {participant.heartbeat_status() for participant in participants}
            status = next((one for one in _WORST if one in statuses), "healthy")
        return protocol.heartbeat_body(
            status,
            time.monotonic() - self._started_at,
            self._platform,
            self.capabilities,
            [report for report in reports if report is not None],
            self._policy_hash(),
        )

    def _apply(self, reply: HeartbeatReply, sent_at: float, offset: float, participants: List[Participant]) -> None:
        if not reply.revoked:
            self.last_at = protocol.utc_now()
            self.lease.note_beat()
            self.note_interval(reply.heartbeat_interval)
            self._renew_lease(reply.lease_lifetime, reply.lease_expires_at, sent_at + offset)
            self._inform_gateway(reply)
        for participant in participants:
            participant.on_heartbeat(reply, sent_at)

    def _inform_gateway(self, reply: HeartbeatReply) -> None:
        if self._gateway is None:
            return
        try:
            self._gateway.on_heartbeat_response(reply)
        except (Exception, SystemExit):  # What the platform orders in this answer must still be carried out.
            log.exception("the policy gateway failed in on_heartbeat_response")

    def _policy_hash(self) -> Optional[str]:
        """Return the hash of the policy in force, if the gateway has one."""
        if self._gateway is None:
            return None
        try:
            found = getattr(self._gateway.policy, "hash", None)
        except (Exception, SystemExit):  # noqa: BLE001  # A gateway of the user's own need not have a policy.
            return None
        return found if isinstance(found, str) else None

    def _note_grant(self, grant: Grant, sent_at: float) -> None:
        self.note_ignored(grant.ignored)
        self.note_interval(grant.heartbeat_interval)
        self._renew_lease(grant.lease_lifetime, grant.lease_expires_at, sent_at + self._clock.offset())

    def _note_revocation(self, error: RevokedError) -> None:
        """Have the next beat inform the participants of a revocation, whatever endpoint sent it. Any thread."""
        self._revocation = error
        self.nudge()

    def _renew_lease(self, lifetime: Optional[float], expires_at: Optional[dt.datetime], sent_at: float) -> None:
        """Apply what an answer says of the lease. ``sent_at`` is of the clock that counts a suspend."""
        if self.lease.renew(lifetime, expires_at, sent_at, self._grace()):
            for participant in self._present():
                participant.on_lease()

    def _grace(self) -> float:
        return max(self.interval(), MIN_GRACE)

    def _present(self) -> List[Participant]:
        with self._lock:
            return list(self._participants)

    def _warn_no_id(self) -> None:
        if not self._warned_no_id:
            self._warned_no_id = True
            log.warning(
                "no heartbeats: the runtime token came without an installation_id, and the platform has not sent one; "
                "give installation_id (SEKUIRE_INSTALLATION_ID)"
            )


def _nothing() -> None:
    pass


def _revoked(error: RevokedError) -> HeartbeatReply:
    return HeartbeatReply(revoked=True, reason=error.reason, shutdown_timeout=error.shutdown_timeout)
