"""The one periodic beat of an installation, and the lease it keeps alive."""

from __future__ import annotations

import datetime as dt
import logging
import math
import threading
import time
from typing import Any, Callable, List, Mapping, Optional, Protocol, Tuple

from . import protocol
from ._internal.logs import get_logger
from .credentials import Authenticator, Snapshot
from .credentials.login import RENEWAL_TIMEOUT
from .errors import RevokedError, SekuireError, TransportError
from .lifecycle import Deadline, PeriodicThread
from .models import Grant, HeartbeatReply, WorkerReport
from .transport.http import HttpClient

log = get_logger("sekuire.heartbeat")

#: Most seconds one beat may take, whatever the interval, and the fewest that it gets with a very short one.
BEAT_LIMIT, BEAT_LEAST = 5.0, 1.0
#: Least grace after a lease's end, in seconds.
MIN_GRACE = 10.0


class Participant(Protocol):
    """Who a heartbeat speaks for and tells: a Beacon, a Worker. All calls but ``on_lease`` come on its thread."""

    def heartbeat_status(self) -> str:
        """``healthy``, ``degraded``, ``paused``, ``stopping`` or ``stopped``."""

    def heartbeat_report(self) -> Optional[WorkerReport]: ...

    def heartbeat_interval(self) -> float:
        """Wanted seconds between beats; the shortest of all participants counts."""

    def on_lease(self) -> None:
        """The lease has a new end; any thread, and it must not block."""

    def on_heartbeat(self, reply: HeartbeatReply, sent_at: float) -> None: ...

    def on_heartbeat_problem(self, error: SekuireError) -> None: ...


class Lease:
    """Until when the platform counts this installation as alive, on the monotonic clock.

    Written by the threads that beat, log in or take part, under ``_lock``; read by any: ``limit`` is one float,
    replaced whole.
    """

    __slots__ = ("_end", "_lock", "expires_at", "limit")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._end = math.inf
        #: ``time.monotonic()`` after which work must stop: the lease's end and its grace. Infinite while unknown.
        self.limit = math.inf
        self.expires_at: Optional[dt.datetime] = None

    def is_held(self) -> bool:
        return time.monotonic() < self.limit

    def renew(self, lifetime: Optional[float], expires_at: Optional[dt.datetime], sent_at: float, grace: float) -> None:
        """Begin a new lease; an unknown ``lifetime`` (seconds) means no limit."""
        with self._lock:
            self.expires_at = expires_at
            self._end = math.inf if lifetime is None else sent_at + lifetime
            self.limit = self._end + grace

    def allow(self, grace: float) -> None:
        """Set the grace of the present lease."""
        with self._lock:
            self.limit = self._end + grace


# What an installation with several participants says: the state that most needs to be known. One that stops while
# others go on does not make the installation stop.
_WORST = ("degraded", "healthy", "paused", "stopping", "stopped")


class Heartbeat:
    """Beats for one installation, whoever takes part in it.

    ``sekuire-heartbeat`` runs :meth:`_beat`; any thread may attach, detach, start, nudge and stop. ``_lock`` guards
    the list of participants; they are called outside it. One beat is one try within min(interval / 2, 5 s); the next
    try comes at the interval.
    """

    def __init__(
        self,
        http: HttpClient,
        auth: Authenticator,
        *,
        platform: Mapping[str, Any],
        capabilities: Callable[[], Tuple[str, ...]],
        policy_gateway: Any = None,
        owner: object = None,
    ) -> None:
        self.lease = Lease()
        self.last_at: Optional[dt.datetime] = None
        self._http = http
        self._auth = auth
        self._platform = platform
        self._capabilities = capabilities
        self._gateway = policy_gateway
        self._owner = owner
        self._lock = threading.Lock()
        self._participants: List[Participant] = []
        self._thread: Optional[PeriodicThread] = None
        self._platform_interval: Optional[float] = None
        self._started_at = time.monotonic()
        self._warned_no_id = False
        self._is_refused = False
        auth.on_grant = self._note_grant

    # -- who takes part (any thread) --

    def attach(self, participant: Participant) -> None:
        with self._lock:
            if participant not in self._participants:
                self._participants.append(participant)
        # A lease that came with the login was granted before anyone said how often to beat.
        self.lease.allow(self._grace())
        self.nudge()

    def detach(self, participant: Participant) -> bool:
        """Take a participant out; whether none is left."""
        with self._lock:
            if participant in self._participants:
                self._participants.remove(participant)
            return not self._participants

    def start(self) -> None:
        """Begin to beat, now and at every interval. Again after :meth:`stop` is allowed; twice does nothing."""
        with self._lock:
            if self._thread is None:
                self._thread = PeriodicThread("sekuire-heartbeat", self._beat, self.interval, owner=self._owner)
                try:
                    self._thread.start()
                except RuntimeError:
                    # No thread can be started now; the next one to ask tries again.
                    self._thread = None
                    raise

    def nudge(self) -> None:
        """Beat now."""
        thread = self._thread
        if thread is not None:
            thread.nudge()

    def end(self) -> None:
        """Have the thread end after the beat in progress, without waiting; the heartbeat's own thread may call this."""
        thread = self._thread
        if thread is not None:
            thread.stop()

    def stop(self, deadline: Deadline) -> bool:
        """End the thread after the beat in progress; whether it ended before ``deadline``."""
        with self._lock:
            thread = self._thread
            if thread is not None:
                # Before it is forgotten: an interrupt in between must not leave it running unknown.
                thread.stop()
            self._thread = None
        return thread is None or thread.join(deadline)

    def interval(self) -> float:
        """Seconds between beats: the shortest that a participant or the platform wants."""
        wanted = [participant.heartbeat_interval() for participant in self._present()]
        if self._platform_interval is not None:
            wanted.append(self._platform_interval)
        return min(wanted, default=60.0)

    def note_interval(self, seconds: Optional[float]) -> None:
        """Take the interval that the platform names."""
        if seconds is not None:
            self._platform_interval = seconds

    # -- beating --

    def beat_now(self, status: str, limit: float) -> bool:
        """One beat on the calling thread, such as the last one; whether the platform took it within ``limit`` s."""
        return self._send(status, Deadline(limit)) is not None

    def _beat(self) -> None:
        if self._auth.store.current.runtime_token is None:
            # Logging in is no beat: it may take its own time.
            limit = RENEWAL_TIMEOUT
        else:
            limit = max(min(self.interval() / 2, BEAT_LIMIT), BEAT_LEAST)
        self._send(None, Deadline(limit))

    def _send(self, status: Optional[str], deadline: Deadline) -> Optional[HeartbeatReply]:
        participants = self._present()
        problem: Optional[SekuireError] = None
        reply: Optional[HeartbeatReply] = None
        sent_at = time.monotonic()
        try:
            snapshot = self._auth.snapshot(deadline)
            if snapshot.credentials.installation_id is None:
                self._warn_no_id()
                return None
            answer, used = self._auth.request(
                "POST", self._path, body=self._body(status, participants), deadline=deadline
            )
            answer.check()
            sent_at = answer.sent_at
            try:
                payload = answer.json()
            except protocol.Malformed:
                payload = None
            reply = protocol.decode_heartbeat(payload, answer.date, answer.now)
            if reply.refreshed_token is not None:
                self._auth.accept_heartbeat(reply, used.generation, answer.sent_at, answer.sent_wall)
        except RevokedError as error:
            reply = HeartbeatReply(revoked=True, reason=error.reason, shutdown_timeout=error.shutdown_timeout)
        except SekuireError as error:
            problem = error
        if reply is not None:
            self._is_refused = False
            self._take(reply, sent_at, participants)
        elif problem is not None:
            # A network that is gone is told by the stream or the Beacon; a refusal once, not at every beat.
            is_news = not isinstance(problem, TransportError) and not self._is_refused
            self._is_refused = not isinstance(problem, TransportError)
            log.log(logging.WARNING if is_news else logging.DEBUG, "a heartbeat was not taken: %s", problem)
            for participant in participants:
                participant.on_heartbeat_problem(problem)
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
            self._capabilities(),
            [report for report in reports if report is not None],
            self._policy_hash(),
        )

    def _take(self, reply: HeartbeatReply, sent_at: float, participants: List[Participant]) -> None:
        if not reply.revoked:
            self.last_at = protocol.utc_now()
            self.note_interval(reply.heartbeat_interval)
            self._renew_lease(reply.lease_lifetime, reply.lease_expires_at, sent_at)
            self._tell_gateway(reply)
        for participant in participants:
            participant.on_heartbeat(reply, sent_at)

    def _tell_gateway(self, reply: HeartbeatReply) -> None:
        if self._gateway is None:
            return
        try:
            self._gateway.on_heartbeat_response(reply)
        except Exception:
            log.exception("the policy gateway failed in on_heartbeat_response")

    def _policy_hash(self) -> Optional[str]:
        """The hash of the policy in force, as the gateway says."""
        if self._gateway is None:
            return None
        try:
            found = getattr(self._gateway.policy, "hash", None)
        except Exception:  # noqa: BLE001  # A gateway of the user's own need not have a policy.
            return None
        return found if isinstance(found, str) else None

    def _note_grant(self, grant: Grant, sent_at: float) -> None:
        self.note_interval(grant.heartbeat_interval)
        if grant.lease_lifetime is not None:
            self._renew_lease(grant.lease_lifetime, grant.lease_expires_at, sent_at)

    def _renew_lease(self, lifetime: Optional[float], expires_at: Optional[dt.datetime], sent_at: float) -> None:
        self.lease.renew(lifetime, expires_at, sent_at, self._grace())
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
                "no heartbeats: the runtime token came without an installation_id, and the platform has not told it; "
                "give installation_id (SEKUIRE_INSTALLATION_ID)"
            )
