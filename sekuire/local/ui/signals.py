"""Notify the open pages of changes: which topics have changed, at most twice a second, never what.

A page then asks for its regions again. Nothing here is called by the endpoints that workers use: a thread looks at
counters instead.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
from typing import Callable, Dict, FrozenSet, Iterator, Optional, Set, Tuple

from ..._internal.logs import get_logger
from ..faults import Faults
from ..record import Record
from ..store import Refusal, Store
from ..streams import Watch, break_off

__all__ = ["MOST_PAGES", "Signals"]

logger = get_logger("sekuire.local")

#: Pages that are served with signals at once. Each occupies a thread.
MOST_PAGES = 20
#: Seconds between two looks, and without a signal after which a page gets a ping.
_LOOK = 0.5
_PING = 5.0

#: Which topics a request to an endpoint of the contract may have changed.
_CHANGED_BY = {
    "tasks": ("tasks", "cancel", "retry", "complete", "release", "progress"),
    "workers": (
        "bootstrap", "recover", "refresh", "heartbeat", "revoke", "commands", "capabilities", "install_tokens",
        "task_stream",
    ),
    "policy": ("policy",),
    "audit": ("logs",),
    "approvals": ("approvals", "decision"),
}  # fmt: skip

_Marks = Tuple[int, int, int, int, Dict[str, int]]


class Signals:
    """Hold the streams of the open pages, and the thread that notifies them."""

    # Threads: HTTP threads open and close streams, and nudge; `sekuire-local-ui` looks. `_lock` guards the streams and
    # the topics to send. Nothing else is called under it.

    def __init__(self, store: Store, record: Record, faults: Faults, on_look: Callable[[], None]) -> None:
        self._store = store
        self._record = record
        self._faults = faults
        self._on_look = on_look
        self._lock = threading.Lock()
        self._streams: Set[_Page] = set()
        self._nudged: Set[str] = set()
        self._watch: Optional[Watch] = None
        self._stopping = threading.Event()
        self._thread: Optional[threading.Thread] = None

    def start(self, watch: Watch) -> None:
        with self._lock:
            self._watch = watch
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._stopping,), name="sekuire-local-ui", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and every page's stream in order."""
        self._stopping.set()
        with self._lock:
            self._watch = None
            streams = list(self._streams)
            self._streams.clear()
        for stream in streams:
            stream.outbox.put(None)
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def count(self) -> int:
        with self._lock:
            return len(self._streams)

    def nudge(self, *topics: str) -> None:
        """Note a change that a page has made, so that the pages are notified at the next look."""
        with self._lock:
            self._nudged.update(topics)

    def open(self, sock: Optional[socket.socket]) -> _Page:
        """Return a page's stream.

        :raises Refusal: 503, too many pages are open, or the platform is stopping.
        """
        with self._lock:
            watch = self._watch
            if watch is None:
                raise Refusal(503, "STOPPED", "the local platform is stopping")
            if len(self._streams) >= MOST_PAGES:
                raise Refusal(
                    503, "TOO_MANY_PAGES", f"{MOST_PAGES} pages of the dashboard are live already; close one of them"
                )
            page = _Page(self, sock, watch)
            self._streams.add(page)
        if sock is not None:
            watch.add(sock, page.lose)
        return page

    def leave(self, page: _Page) -> None:
        with self._lock:
            self._streams.discard(page)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self, stopping: threading.Event) -> None:
        marks = self._marks()
        while not stopping.wait(_LOOK):
            try:
                self._on_look()
                new = self._marks()
                self._send(self._changes(marks, new))
                marks = new
            except Exception:
                if not stopping.is_set():
                    logger.exception("the dashboard's thread failed")

    def _marks(self) -> _Marks:
        totals = self._record.totals()
        return (
            self._store.changes(),
            self._record.happened(),
            sum(self._faults.injected.values()),
            sum(totals.values()),
            {topic: sum(totals.get(name, 0) for name in names) for topic, names in _CHANGED_BY.items()},
        )

    @staticmethod
    def _changes(old: _Marks, new: _Marks) -> FrozenSet[str]:
        changed = set()
        if old[0] != new[0]:
            changed = {topic for topic in _CHANGED_BY if old[4][topic] != new[4][topic]}
            if "audit" in changed:
                changed.add("policy")
            # Without a request it was a method of the platform, or a timer.
            changed = changed or set(_CHANGED_BY)
        if old[1] != new[1]:
            changed |= {"tasks", "workers"}
        if old[2] != new[2]:
            changed.add("faults")
        if old[3] != new[3]:
            changed.add("requests")
        return frozenset(changed)

    def _send(self, changed: FrozenSet[str]) -> None:
        with self._lock:
            topics = sorted(changed | self._nudged)
            self._nudged.clear()
            streams = list(self._streams)
        if topics:
            frame = f"event: signal\ndata: {json.dumps(topics)}\n\n".encode()
            for stream in streams:
                stream.put(frame)


class _Page:
    """Yield the body of one page's stream. Its HTTP thread iterates over it and blocks on the queue."""

    #: Frames that wait while a page does not read. Newer ones are dropped: a page that reads again is up to date after
    #: any of them.
    _MOST_WAITING = 50

    def __init__(self, signals: Signals, sock: Optional[socket.socket], watch: Watch) -> None:
        self._signals = signals
        self._socket = sock
        self._watch = watch
        self._is_lost = False
        #: None ends the stream.
        self.outbox: queue.SimpleQueue[Optional[bytes]] = queue.SimpleQueue()
        self.outbox.put(b"retry: 1000\nevent: ping\ndata:\n\n")

    def put(self, frame: bytes) -> None:
        if self.outbox.qsize() < self._MOST_WAITING:
            self.outbox.put(frame)

    def lose(self) -> None:
        """Handle that the page was closed. Watch thread."""
        self._is_lost = True
        self._signals.leave(self)
        self.outbox.put(None)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            frame = self.outbox.get(timeout=_PING)
        except queue.Empty:
            return b"event: ping\ndata:\n\n"
        if frame is not None:
            return frame
        if self._is_lost:
            break_off()
        raise StopIteration

    def close(self) -> None:
        if self._socket is not None:
            self._watch.remove(self._socket)
        self._signals.leave(self)
