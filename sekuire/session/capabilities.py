"""Publish what the workers of an installation can do to the platform, if it wants to know."""

# Threads: any thread may call the public methods. `sekuire-capabilities` sends, runs while there is something to send,
# and ends with the installation. `_lock` guards the state, and is never held over I/O.

from __future__ import annotations

import threading
from typing import Any, Dict, List, Optional, Sequence

from .._internal.logs import get_logger
from .._internal.threads import Deadline, owned_by, spawn
from ..credentials import Authenticator, Snapshot
from ..errors import SekuireError
from ..transport.http import HttpClient
from ..transport.retry import full_jitter
from ..wire import protocol
from ..wire.verdict import Retry, Settled, Unauthorized, Unsupported, Verdict, verdict

log = get_logger("sekuire.worker")

#: Seconds for one try, and for the one of a worker that stops.
_TIMEOUT, _LAST_TIMEOUT = 10.0, 1.0
#: First and longest delay between tries, in seconds.
_RETRY_MIN, _RETRY_MAX = 0.5, 60.0


class Publisher:
    """Send the union of the capabilities of all started workers, whenever it changes.

    :param stop: set when the installation ends.
    :param owner: the object whose ``stop()`` the sending thread must not wait for.
    """

    def __init__(self, http: HttpClient, auth: Authenticator, stop: threading.Event, owner: object = None) -> None:
        self._http = http
        self._auth = auth
        self._stop = stop
        self._owner = owner
        self._lock = threading.Lock()
        self._of_workers: Dict[str, Sequence[Dict[str, Any]]] = {}
        #: The body that the platform has, None until it has one.
        self._accepted: Optional[bytes] = None
        self._is_sending = False

    def has(self, worker_id: str) -> bool:
        """Return True if those of a worker were added."""
        return worker_id in self._of_workers

    def add(self, worker_id: str, capabilities: Sequence[Dict[str, Any]]) -> None:
        """Add those of a worker that has started, and send the union soon. A second call changes nothing."""
        with self._lock:
            if worker_id in self._of_workers:
                return
            self._of_workers[worker_id] = capabilities
        self._begin()

    def remove(self, worker_id: str, *, is_last: bool) -> None:
        """Remove those of a worker that stops, and send what is left.

        :param is_last: the installation ends too: there is one try, here and now.
        """
        with self._lock:
            if self._of_workers.pop(worker_id, None) is None or self._accepted is None:
                return
        if not is_last:
            self._begin()
        elif self._is_wanted():
            with self._lock:
                body = self._body()
            self._try(body, Deadline(_LAST_TIMEOUT))

    def _begin(self) -> None:
        with self._lock:
            if self._is_sending or not self._is_wanted():
                return
            self._is_sending = True
        if spawn(self._send, "sekuire-capabilities") is None:
            self._is_sending = False

    def _is_wanted(self) -> bool:
        return self._auth.support.is_offered("capabilities")

    def _send(self) -> None:
        """Send until the platform has what there is now."""
        tries = 0
        with owned_by(self._owner):
            while True:
                with self._lock:
                    # In one step: what is added in between must be seen here, or begin another thread.
                    body = self._body()
                    if self._stop.is_set() or body == self._accepted or not self._is_wanted():
                        self._is_sending = False
                        return
                found = self._try(body, Deadline(_TIMEOUT))
                if isinstance(found, (Retry, Unauthorized, Unsupported)):
                    delay = max(full_jitter(tries, _RETRY_MIN, _RETRY_MAX), getattr(found, "delay", 0.0))
                    tries += 1
                    self._stop.wait(delay)
                elif not isinstance(found, Settled):
                    # It was refused. The same would be refused again.
                    with self._lock:
                        self._is_sending = False
                    return

    def _body(self) -> bytes:
        """Return the union. Needs the lock."""
        union: Dict[str, Dict[str, Any]] = {}
        for capabilities in self._of_workers.values():
            for one in capabilities:
                # The worker that says more of one counts.
                if len(one) > len(union.get(one["name"], ())):
                    union[one["name"]] = one
        found: List[Dict[str, Any]] = sorted(union.values(), key=lambda one: str(one["name"]))
        return protocol.capabilities_body(found)

    def _try(self, body: bytes, deadline: Deadline) -> Verdict:
        found: Verdict
        try:
            reply, _ = self._auth.request("POST", self._path, body=body, deadline=deadline)
            found = verdict("capabilities", reply)
        except SekuireError as error:
            found = verdict("capabilities", error)
        self._auth.support.note("capabilities", found)
        if isinstance(found, Settled):
            with self._lock:
                self._accepted = body
        else:
            log.debug("the capabilities were not published (%s)", found.error)
        return found

    def _path(self, snapshot: Snapshot) -> str:
        return self._http.endpoints.path("capabilities", installation_id=snapshot.credentials.installation_id or "")
