"""Stop one worker: the steps, their order and their time."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Callable, Iterable, List, Optional, Protocol

from .._internal import fork
from .._internal.greenlets import patched_by
from .._internal.logs import get_logger
from .._internal.signals import name_of
from .._internal.threads import Deadline, forget_exit, owned_by, try_start
from ..handlers.context import PROGRAM_ENDS, SHUTDOWN, TERMINATED
from ..session.installation import Installation
from .control import Control
from .dispatch import Dispatcher
from .life import STOPPED_BY_USER, Life, Phase
from .report import Reporter
from .resources import WorkerResources
from .stream import TaskStream

if TYPE_CHECKING:
    from .outbox import Outbox

log = get_logger("sekuire.worker")

#: Most tasks that a line names.
_MOST_NAMED = 10
#: Seconds the last heartbeat may take.
LAST_BEAT = 2.0
#: Seconds of a stop kept for the reports after the drain: this share of it, and at most so many.
_FLUSH_SHARE, _FLUSH_MOST = 0.2, 2.0
#: Seconds the reports get even when the time to stop is over: as long as the platform needs, and at most this.
_FLUSH_LEAST = 1.0
#: Seconds the resources get to close, even when the time to stop is over.
_CLOSE_LEAST = 1.0
#: Seconds a stop waits for the stream's thread; one in a DNS look-up or a connect is left to end by itself.
_STREAM_PATIENCE = 0.5


class OwnThread(Protocol):
    """Own a thread that ends with the worker."""

    def close(self) -> None:
        """Let the thread end. Return at once."""

    def join(self, deadline: Deadline) -> bool:
        """Wait for the thread. Return True if it ended before ``deadline``."""


class Shutdown:
    """Stop the parts of one worker, in order, by one deadline.

    The steps: end the stream, so that nothing new comes; give back the waiting tasks, so that another worker has them
    soon; let the running ones finish; close the resources that they shared; send the reports that they have made; beat
    a last time, because until then the lease must hold; close the rest. A step that fails is logged, and the next one
    runs.

    :param threads: what else has a thread: closed side by side, then waited for.
    :param resources: what the handlers share.
    :param outbox: what keeps the results on disk; closed after the last report.
    :param is_shared: others use the installation too, so it stays open.
    """

    # Threads: any thread may call begin(), hurry() and close_unstarted(). `sekuire-shutdown` runs the steps, because
    # Ctrl-C interrupts only the main thread. `_lock` is for starting it once. At the end of the program leave() runs a
    # shorter list on the thread that ends it, because no thread can be started then.

    def __init__(
        self,
        life: Life,
        stream: TaskStream,
        control: Control,
        dispatcher: Dispatcher,
        reporter: Reporter,
        installation: Installation,
        threads: Iterable[OwnThread],
        resources: WorkerResources,
        *,
        outbox: Optional[Outbox] = None,
        is_shared: bool = False,
    ) -> None:
        self.pid = os.getpid()
        self._life = life
        self._stream = stream
        self._control = control
        self._dispatcher = dispatcher
        self._reporter = reporter
        self._installation = installation
        self._heartbeat = installation.heartbeat
        self._threads = tuple(threads)
        self._resources = resources
        self._outbox = outbox
        self._is_shared = is_shared
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="sekuire-shutdown", daemon=True)
        #: Set when the stop needs no thread any more: the interpreter is ending.
        self._is_leaving = False
        self._has_begun = False
        fork.reset_in_child(self, Shutdown._stay_in_parent)

    # -- asked for by Life --

    def begin(self) -> None:
        """Begin the stop, once, on a thread of its own. Return at once."""
        must_run_here = False
        with self._lock:
            if self._thread.ident is None and not self._is_leaving:
                # No thread can be started any more while the interpreter is ending.
                must_run_here = self._is_leaving = not try_start(self._thread)
        if must_run_here:
            self._run()

    def hurry(self) -> None:
        """Have the stop in progress look at its deadline again, and end more if the worker is terminated now."""
        if self._life.is_terminated:
            self._close_intake()
        self._dispatcher.wake()

    def close_unstarted(self) -> None:
        """Close what a worker holds that was never started."""
        self._life.stop_event.set()
        for thread in self._threads:
            thread.close()
        self._close_outbox()
        if not self._is_shared:
            self._installation.close()

    def _stay_in_parent(self) -> None:
        # A forked child has no threads of its parent, but copies of all greenlets. They end without a word.
        if patched_by() is not None and self._life.phase in (Phase.RUNNING, Phase.STOPPING):
            self._life.stay_in_parent()
            for thread in self._threads:
                thread.close()

    # -- the end of the program --

    def leave(self) -> None:
        """Cancel what runs and beat a last time, because the interpreter ends. Start no thread."""
        with self._lock:
            was_running = self._life.leave(PROGRAM_ENDS)
            self._is_leaving = self._is_leaving or was_running
        if not was_running:
            return
        log.warning(
            "the program ends while a Worker runs; its tasks are cancelled. Use start(block=True), or wait(), to keep "
            "it running, and stop() to end it in order"
        )
        self._life.stop_event.set()
        self._stream.wake()
        self._perform((self._close_intake, self._cancel_at_exit, self._beat_at_exit))
        # Nothing follows: a stop() of the user's own, in an atexit function, must not wait for more.
        self._life.finish()

    def _cancel_at_exit(self) -> None:
        self._dispatcher.cancel_running(PROGRAM_ENDS)

    def _beat_at_exit(self) -> None:
        if self._heartbeat.detach(self._control):
            self._installation.stop.set()
            self._heartbeat.end()
            if self._heartbeat.is_expected:
                self._heartbeat.beat_now("stopped", LAST_BEAT)

    # -- the steps (sekuire-shutdown) --

    def _run(self) -> None:
        with self._lock:
            # An interrupt or a lack of memory can end start() while the thread starts all the same.
            if self._has_begun:
                return
            self._has_begun = True
        with owned_by(self._life.owner):
            self._perform(
                (
                    self._end_waits,
                    self._close_intake,
                    self._say_what_runs,
                    self._end_stream,
                    self._drain,
                    self._close_resources,
                    self._flush,
                    self._beat_last,
                    self._control.close,
                    self._close,
                )
            )
        reason = self._life.reason
        if not (self._life.is_refused or self._life.is_cut_short):
            # An error was logged when the stop began, and a user's own stop() needs no reason.
            is_known = self._life.error is not None or reason == STOPPED_BY_USER
            log.say(logging.INFO, "the worker has stopped%s", "" if is_known else f" ({_named(reason or '')})")
        self._control.announcer.note_state("stopped", reason, "info" if self._life.error is None else "error")
        self._life.finish()

    @staticmethod
    def _perform(steps: Iterable[Callable[[], None]]) -> None:
        """Run every step, also after one that failed."""
        for step in steps:
            try:
                step()
            except BaseException:  # sys.exit() in a policy gateway of the user's own, for example.
                log.exception("stopping: a step failed (%s); going on", getattr(step, "__name__", "step"))

    def _end_waits(self) -> None:
        self._life.stop_event.set()
        if not self._is_shared:
            self._installation.stop.set()
        self._stream.wake()
        # The platform must know soon that this is a drain: without it the worker would seem to have vanished.
        self._heartbeat.nudge()

    def _close_intake(self) -> None:
        is_terminated = self._life.is_terminated
        self._dispatcher.close(is_terminated)
        if is_terminated:
            self._dispatcher.cancel_running(TERMINATED)
        elif self._dispatcher.approvals is not None:
            # The handlers that wait for a person end at once: another worker asks again.
            self._dispatcher.approvals.questions.drain()

    def _say_what_runs(self) -> None:
        """Say that the worker stops, and for which tasks it waits."""
        reason = self._life.reason or ""
        is_signal = reason.startswith("signal ")
        names = self._dispatcher.running_names()
        if not is_signal and not names:
            # It has stopped at once.
            return
        what = "" if reason == STOPPED_BY_USER or self._life.error is not None else f" ({_named(reason)})"
        most = f"{self._life.deadline.remaining():.0f} s"
        count = f"{len(names)} task{'s' if len(names) > 1 else ''}"
        shown = ", ".join(names[:_MOST_NAMED]) + (" ..." if len(names) > _MOST_NAMED else "")
        waits = f"; waiting at most {most} for {count}: {shown}" if names else ""
        again = "Ctrl-C again" if "Ctrl-C" in what else "a later SIGINT or SIGTERM"
        hint = f"; {again} ends the process" if is_signal and names else ""
        log.say(logging.INFO, "stopping%s%s%s", what, waits, hint)

    def _end_stream(self) -> None:
        self._stream.join(Deadline(min(_STREAM_PATIENCE, self._life.deadline.remaining() + 0.1)))

    def _drain(self) -> None:
        deadline = self._life.deadline
        reserve = min(_FLUSH_MOST, deadline.remaining() * _FLUSH_SHARE)
        if not self._dispatcher.drain(deadline.earlier(reserve)):
            late = self._dispatcher.abandon(TERMINATED if self._life.is_terminated else SHUTDOWN)
            if self._life.is_cut_short:
                return
            log.warning("the time to stop is over and these handlers still run: %s", ", ".join(late) or "none")

    def _close_resources(self) -> None:
        self._resources.close(
            self._dispatcher.records, Deadline(max(_CLOSE_LEAST, self._life.deadline.remaining() / 2))
        )

    def _flush(self) -> None:
        # The failures of the handlers that the drain gave up have had no time yet.
        if self._reporter.flush(Deadline(max(_FLUSH_LEAST, self._life.deadline.remaining()))):
            return
        # What is only in memory goes to the disk before anything is said of it.
        lost = set(self._reporter.keep_all())
        ids = self._reporter.undelivered()
        if self._outbox is None:
            self._log_undelivered(ids, "")
            return
        path = self._outbox.path
        self._log_undelivered([one for one in ids if one not in lost], f"; they are in the outbox {path}")
        self._log_undelivered([one for one in ids if one in lost], f" and are lost: the outbox {path} lacks them")

    @staticmethod
    def _log_undelivered(ids: List[str], what_then: str) -> None:
        if ids:
            log.error(
                "the results of %d tasks were not delivered before the stop: %s%s%s",
                len(ids), ", ".join(ids[:20]), " ..." if len(ids) > 20 else "", what_then,
            )  # fmt: skip

    def _beat_last(self) -> None:
        is_last = self._heartbeat.detach(self._control)
        self._installation.publisher.remove(self._control.worker_id, is_last=is_last)
        if not is_last:
            # Others go on to beat; the platform learns from the next beat that this worker is gone.
            self._heartbeat.nudge()
            return
        self._heartbeat.stop(Deadline(self._time_for_beat()))
        if self._heartbeat.is_expected:
            self._heartbeat.beat_now("stopped", self._time_for_beat())

    def _time_for_beat(self) -> float:
        return max(0.25, min(LAST_BEAT, self._life.deadline.remaining()))

    def _close(self) -> None:
        patience = Deadline(max(0.25, min(1.0, self._life.deadline.remaining())))
        for thread in self._threads:
            thread.close()
        late = self._reporter.close(patience)
        self._close_outbox()
        self._dispatcher.end_pool(patience)
        for thread in self._threads:
            thread.join(patience)
        if not self._is_shared:
            self._installation.close()
        forget_exit(self)
        late += self._dispatcher.overdue_names()
        if late and not self._life.is_cut_short:
            log.warning("still running after the stop: %s", ", ".join(late))

    def _close_outbox(self) -> None:
        outbox, self._outbox = self._outbox, None
        if outbox is not None:
            outbox.close()


def _named(reason: str) -> str:
    """Return the reason of a stop with the name of the signal that it may be."""
    kind, _, number = reason.partition(" ")
    return name_of(int(number)) if kind == "signal" else reason
