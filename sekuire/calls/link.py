"""Call the platform, and send a call again while that may help."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Dict, Iterator, List, Mapping, Optional, Protocol

from .._internal.threads import Deadline
from ..errors import SekuireError, TransportError
from ..transport.http import MAX_ANSWER, Reply, make_idempotency_key
from ..transport.retry import RETRY_MAX, RETRY_MIN, full_jitter
from ..wire import protocol
from ..wire.verdict import NotThePlatform, Retry, Revoked, Settled, Unauthorized, verdict

__all__ = ["Again", "Caller", "Link", "list_of"]

#: Most objects that one page of a list has.
PAGE = 100


class Caller(Protocol):
    """Make one call with some credentials. Return the answer, whatever its status."""

    def __call__(
        self, method: str, path: str, body: Optional[bytes], key: Optional[str], max_bytes: int, longer: float
    ) -> Reply: ...


class StandIn(Protocol):
    """Answer calls in the platform's place. :class:`sekuire.calls.recorded.Recorded` does."""

    def answer(
        self, endpoint: str, method: str, path: str, body: Optional[bytes], key: Optional[str]
    ) -> Optional[Dict[str, Any]]:
        """Return the answer to a call, None to have the platform answer it.

        :raises SekuireError: the call is refused.
        """


# Threads: any thread may change these. `_stand_in_lock` guards that; readers look at `stand_in` once.
_stand_in_lock = threading.Lock()
_stand_ins: List[StandIn] = []
#: Answers the calls of every client of this process, for a test: the newest of those that stand in. None: the platform.
stand_in: Optional[StandIn] = None


@contextlib.contextmanager
def in_place_of_platform(new: StandIn) -> Iterator[None]:
    """Have ``new`` answer the calls of every client until the end of the block.

    Several blocks may end in any order: none leaves a stand-in behind whose block has ended.
    """
    global stand_in
    with _stand_in_lock:
        _stand_ins.append(new)
        stand_in = new
    try:
        yield
    finally:
        with _stand_in_lock:
            _stand_ins.remove(new)
            stand_in = _stand_ins[-1] if _stand_ins else None


class Link:
    """Call the platform, and repeat a call while its answer says that this may help.

    :param retry_for: seconds for which a call is repeated.
    :param url: the platform's address, for errors.
    """

    # Threads: any thread may call anything. Its state is the event that ends its waits, and one flag that becomes true.

    def __init__(self, call: Caller, retry_for: float, url: str) -> None:
        self._call = call
        self._url = url
        #: The platform has answered a call.
        self._is_known = False
        self._retry_for = retry_for
        self.closed = threading.Event()

    def ask(
        self,
        endpoint: str,
        method: str,
        path: str,
        body: Optional[bytes] = None,
        *,
        key: Optional[str] = None,
        max_bytes: int = MAX_ANSWER,
    ) -> Dict[str, Any]:
        """Return the object that the platform answers. Send the call again after what may pass, with the same key.

        :raises TransportError: no answer of the platform came within ``retry_for`` seconds.
        :raises APIError: the platform refused.
        """
        if method == "POST" and key is None:
            key = make_idempotency_key()
        deadline = Deadline(self._retry_for)
        tries = 0
        was_sent = False
        while True:
            try:
                return self.ask_once(endpoint, method, path, body, key=key, max_bytes=max_bytes)
            except Again as again:
                problem, delay = again.problem, again.delay
            # Of all tries: one that was sent may have arrived.
            was_sent = was_sent or getattr(problem, "was_sent", True)
            if isinstance(problem, TransportError):
                problem.was_sent = was_sent
            pause = max(full_jitter(tries, RETRY_MIN, RETRY_MAX), delay)
            if pause >= deadline.remaining() or self.closed.wait(pause):
                raise problem
            tries += 1

    def ask_once(
        self,
        endpoint: str,
        method: str,
        path: str,
        body: Optional[bytes] = None,
        *,
        key: Optional[str] = None,
        max_bytes: int = MAX_ANSWER,
        longer: float = 0.0,
    ) -> Dict[str, Any]:
        """Return the object that the platform answers to one call.

        :raises Again: the same call may succeed later.
        :raises SekuireError: it may not.
        """
        self.check_open()
        # Once: another thread may end the test that has set it.
        other = stand_in
        if other is not None:
            answer = other.answer(endpoint, method, path, body, key)
            if answer is not None:
                return answer
        reply: Optional[Reply] = None
        try:
            reply = self._call(method, path, body, key, max_bytes, longer)
        except SekuireError as error:
            if method == "GET" and isinstance(error, TransportError) and error.is_too_large:
                # The same question brings the same answer.
                raise _with_advice(error) from None
            found = verdict(endpoint, error)
        else:
            found = verdict(endpoint, reply)
        if isinstance(found, Settled):
            self._is_known = True
            payload: Dict[str, Any] = reply.json() if reply is not None and reply.body else {}
            return payload
        if isinstance(found, Revoked) and reply is not None:
            # Another's installation, which an administrator asked about.
            raise protocol.decode_error(reply.status, reply.body)
        if isinstance(found, NotThePlatform) and reply is not None and not self._is_known:
            # The platform has not seen this call.
            problem = TransportError(found.as_other_server(self._url))
            problem.was_sent = False
            raise Again(problem, found.delay)
        if isinstance(found, Retry) or (isinstance(found, Unauthorized) and found.is_foreign):
            raise Again(found.error, found.delay)
        raise found.error

    def pages(
        self,
        endpoint: str,
        path: str,
        name: str,
        filters: Mapping[str, Optional[str]],
        limit: Optional[int],
        max_bytes: int,
    ) -> Iterator[Dict[str, Any]]:
        """Yield the objects of a list that comes in pages, ``limit`` at most. Ask for each page when it is needed."""
        before: Optional[str] = None
        left = limit
        most = PAGE
        while True:
            size = most if left is None else min(left, most)
            query = protocol.query_of(**filters, limit=size, before=before)
            try:
                page = self.ask(endpoint, "GET", path + query, max_bytes=max_bytes)
            except TransportError as error:
                if not error.is_too_large or size == 1:
                    raise
                # The errors of tasks, and the details of approvals, may be large together.
                most = size // 2
                continue
            found = list_of(page, name)
            yield from found
            following = page.get("next_before")
            if left is not None:
                left -= len(found)
            if not protocol.is_id(following) or following == before or not found or (left is not None and left <= 0):
                return
            before = following

    def check_open(self) -> None:
        if self.closed.is_set():
            raise SekuireError("the client is closed")


def _with_advice(error: TransportError) -> TransportError:
    problem = TransportError(f"{error}; give the client a larger max_result_bytes", retryable=False)
    problem.is_too_large = True
    return problem


class Again(Exception):
    """Report an answer after which the same call may succeed, not before ``delay`` seconds."""

    def __init__(self, problem: SekuireError, delay: float) -> None:
        super().__init__(problem, delay)
        self.problem = problem
        self.delay = delay


def list_of(page: Mapping[str, Any], name: str) -> List[Dict[str, Any]]:
    """Return a list of objects that an answer holds.

    :raises SekuireError: it has none.
    """
    found = page.get(name)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise SekuireError(f"the platform's answer has no list of {name}; is the URL a Sekuire platform's?")
    return found
