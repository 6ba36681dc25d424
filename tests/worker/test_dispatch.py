"""The dispatcher's states, as a machine: whatever the order, each task ends once and nothing leaks."""

from __future__ import annotations

import functools
import itertools
import sys
import threading
from typing import Any, Callable, Dict, List, Optional, Set

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sekuire._internal.monitor import Monitor
from sekuire._internal.threads import Deadline, Timer
from sekuire.config import WorkerConfig
from sekuire.handlers.context import TaskContext
from sekuire.handlers.registry import HandlerEntry, TaskRegistry
from sekuire.wire.models import Completion, Task
from sekuire.wire.protocol import MalformedTask
from sekuire.worker import release
from sekuire.worker.answers import WorkerAudit
from sekuire.worker.dispatch import WAITING_COST, Dispatcher
from sekuire.worker.records import Record, State, move
from sekuire.worker.release import Release

from ..support.builders import config_of, task_of
from ..support.gateway import FakeGateway
from ..support.waiting import GUARD, until

WORKERS, QUEUE = 2, 3


class Taken(str):
    """A task's id, as what the sink sends."""

    code = None


class Sink:
    """Takes results as the reporter does, and delivers them at once."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.results: Dict[str, Completion] = {}
        self.attempts: Dict[str, int] = {}
        self.delivered: List[str] = []
        self.released: List[str] = []
        self.orders: Dict[str, Any] = {}
        self.on_room: Callable[[], None] = lambda: None
        self.can_release: Optional[bool] = True
        self.refused: List[str] = []
        #: Called at the beginning of accept(), to put something in between.
        self.before: Callable[[Completion], None] = lambda completion: None

    def accept(self, completion: Completion) -> Optional[Taken]:
        self.before(completion)
        with self.lock:
            if completion.task_id in self.results:
                self.refused.append(completion.task_id)
                return None
            self.results[completion.task_id] = completion
            self.attempts[completion.task_id] = completion.attempt
            return Taken(completion.task_id)

    def post(self, report: Any) -> None:
        with self.lock:
            self.delivered.append(report)

    enqueue = post

    def keep(self, report: Any) -> None: ...

    def redelivered(self, task_id: str, attempt: int) -> bool:
        with self.lock:
            if task_id not in self.results:
                return False
            self.attempts[task_id] = max(self.attempts[task_id], attempt)
            return True

    def release(self, order: Any, delay: float = 0.0) -> None:
        with self.lock:
            self.released.append(order.task_id)
            self.orders[order.task_id] = order

    def has_room_for_release(self) -> bool:
        return True

    def has_room(self) -> bool:
        return True

    def progress(self, context: TaskContext, fraction: float, message: Optional[str]) -> None: ...


class Lease:
    """It is held while it is said to be; ``on_look`` is called at each look."""

    def __init__(self) -> None:
        self.held = True
        self.on_look: Callable[[], Any] = lambda: None

    def is_held(self) -> bool:
        self.on_look()
        return self.held


class Audit:
    """It fails at each result."""

    def task(self, worker_id: str, task: Task, completion: Completion, report: Any) -> None:
        raise ZeroDivisionError

    def passed(self, task: Task) -> None: ...


class ManualTimer(Timer):
    """Calls when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Dict[int, Callable[[], None]] = {}
        #: Called at the beginning of call_at(), which a task's clock needs.
        self.before: Callable[[], Any] = lambda: None
        self._ids = itertools.count()

    def call_at(self, when: float, function: Callable[[], None]) -> int:
        self.before()
        number = next(self._ids)
        self.calls[number] = function
        return number

    def cancel(self, number: int) -> None:
        self.calls.pop(number, None)

    def fire(self, task_id: str) -> None:
        for number, function in list(self.calls.items()):
            if getattr(function, "args", None) and function.args[0].task.task_id == task_id:  # type: ignore[attr-defined]
                self.calls.pop(number, None)
                function()


class Handlers:
    """Handlers that wait to be let go, or for their cancellation, and tell which of them are inside."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.gates: Dict[str, threading.Event] = {}
        self.inside: Set[str] = set()
        self.runs: List[str] = []
        self.open = False

    def gate(self, task_id: str) -> threading.Event:
        with self.lock:
            return self.gates.setdefault(task_id, threading.Event())

    def __call__(self, ctx: TaskContext, input: Any) -> str:
        gate = self.gate(ctx.task_id)
        with self.lock:
            self.runs.append(ctx.task_id)
            self.inside.add(ctx.task_id)
        if not self.open:
            assert gate.wait(3 * GUARD)
        with self.lock:
            self.inside.discard(ctx.task_id)
        if input == "fail":
            raise ValueError("failed")
        return "done"


def dispatcher_of(
    handlers: Handlers,
    sink: Sink,
    timer: Timer,
    lease: Optional[Lease] = None,
    audit: Optional[Audit] = None,
    **options: Any,
) -> Dispatcher:
    registry = TaskRegistry()
    registry.add("wide", handlers)
    registry.add("narrow", handlers, None, 1)
    limits = {"max_workers": WORKERS, "max_waiting_bytes": QUEUE * WAITING_COST, "task_timeout": 1e6}
    config = config_of(**{**limits, **options})
    return Dispatcher(
        config,
        registry,
        sink,
        timer=timer,
        lease=lease or Lease(),
        audit=None if audit is None else WorkerAudit(audit, "w"),
    )


class TaskStates(RuleBasedStateMachine):
    """deliver, repeat, raise the attempt, pause, resume, finish, time out, close: in any order."""

    tasks = Bundle("tasks")

    @initialize()
    def begin(self) -> None:
        self.sink, self.handlers, self.timer = Sink(), Handlers(), ManualTimer()
        self.dispatcher = dispatcher_of(self.handlers, self.sink, self.timer)
        self.entries: Set[HandlerEntry] = set()
        self.attempts: Dict[str, int] = {}
        self.numbers = itertools.count()
        self.expired: Set[str] = set()
        self.closed = False

    def settle(self) -> None:
        """Wait until every begun record's thread is inside its handler, and every ended one out of it."""
        until(
            lambda: (
                len(self.handlers.inside)
                == self.dispatcher.running + len(self.dispatcher.records.overdue)
                == self.dispatcher.records.threads
            )
        )

    @rule(target=tasks, capability=st.sampled_from(["wide", "narrow", "none"]), input=st.sampled_from(["", "fail"]))
    def deliver(self, capability: str, input: str) -> str:
        task_id = f"t{next(self.numbers)}"
        self.attempts[task_id] = 1
        self.dispatcher.submit(task_of(task_id, capability, input=input))
        self.settle()
        return task_id

    @rule(task_id=tasks, more=st.integers(0, 2))
    def repeat(self, task_id: str, more: int) -> None:
        if task_id in self.sink.released:
            return
        self.attempts[task_id] += more
        before = self.dispatcher.counts.duplicates
        self.dispatcher.submit(task_of(task_id, "wide", attempt=self.attempts[task_id]))
        assert self.dispatcher.counts.duplicates == before + 1

    @rule(source=st.sampled_from(["command", "desired_state", "local"]))
    def pause(self, source: str) -> None:
        self.dispatcher.pause(source)
        self.settle()
        assert self.dispatcher.waiting == 0

    @rule(source=st.sampled_from(["command", "desired_state", "local"]))
    def resume(self, source: str) -> None:
        self.dispatcher.resume(source)

    @rule(data=st.data())
    @precondition(lambda self: self.handlers.inside)
    def finish(self, data: st.DataObject) -> None:
        task_id = data.draw(st.sampled_from(sorted(self.handlers.inside)))
        self.handlers.gate(task_id).set()
        until(lambda: task_id not in self.handlers.inside and task_id in self.sink.results)
        self.settle()

    @rule(data=st.data())
    @precondition(lambda self: self.handlers.inside - self.expired)
    def time_out(self, data: st.DataObject) -> None:
        task_id = data.draw(st.sampled_from(sorted(self.handlers.inside - self.expired)))
        self.expired.add(task_id)
        self.timer.fire(task_id)
        failure = self.sink.results[task_id].failure
        assert failure is not None
        assert failure.code in ("timeout", "worker_shutdown")
        self.settle()

    @rule(data=st.data())
    @precondition(lambda self: self.handlers.inside - self.expired)
    def time_out_as_it_ends(self, data: st.DataObject) -> None:
        task_id = data.draw(st.sampled_from(sorted(self.handlers.inside - self.expired)))
        self.expired.add(task_id)
        self.handlers.gate(task_id).set()
        self.timer.fire(task_id)
        until(lambda: task_id not in self.handlers.inside and task_id in self.sink.results)
        self.settle()

    @rule(terminated=st.booleans())
    def close(self, terminated: bool) -> None:
        self.closed = True
        self.dispatcher.close(terminated)
        self.settle()
        assert self.dispatcher.waiting == 0

    @rule()
    @precondition(lambda self: self.closed)
    def abandon(self) -> None:
        self.dispatcher.abandon("shutdown")
        self.expired |= self.handlers.inside
        assert self.dispatcher.running == 0

    @invariant()
    def each_task_is_somewhere(self) -> None:
        dispatcher, counts = self.dispatcher, self.dispatcher.counts
        ended = counts.completed + counts.failed + counts.rejected + counts.released
        assert counts.received == ended + counts.duplicates + dispatcher.running + dispatcher.waiting
        for task_id in self.attempts:
            places = [task_id in dispatcher.records.known, task_id in self.sink.results, task_id in self.sink.released]
            assert places.count(True) == 1, (task_id, places)

    @invariant()
    def nothing_is_accepted_twice(self) -> None:
        assert self.sink.refused == []
        assert len(self.sink.delivered) == len(set(self.sink.delivered)) == len(self.sink.results)
        assert len(self.handlers.runs) == len(set(self.handlers.runs))

    @invariant()
    def the_newest_attempt_is_reported(self) -> None:
        for task_id, attempt in self.sink.attempts.items():
            assert attempt == self.attempts[task_id]

    @invariant()
    def limits_hold(self) -> None:
        dispatcher = self.dispatcher
        known = dispatcher.records.known.values()
        self.entries.update(record.entry for record in known)
        waiting = [record for record in known if record.state is State.WAITING]
        assert dispatcher.waiting == len(waiting)
        assert dispatcher.waiting_bytes == sum(record.cost for record in waiting)
        assert 0 <= dispatcher.records.permits <= WORKERS
        assert 0 <= dispatcher.waiting <= QUEUE
        holders = len([r for r in known if r.holds_permit])
        holders += len([r for r in dispatcher.records.overdue if r.holds_permit])
        assert dispatcher.records.permits + holders == WORKERS
        assert len(self.handlers.inside) <= 2 * WORKERS
        # No one waits while there is room for it.
        assert not (dispatcher.records.queue and dispatcher.records.permits)

    def teardown(self) -> None:
        if not hasattr(self, "dispatcher"):
            return
        self.handlers.open = True
        for gate in list(self.handlers.gates.values()):
            gate.set()
        dispatcher = self.dispatcher
        assert dispatcher.drain(Deadline(GUARD))
        until(lambda: dispatcher.records.threads == 0)
        dispatcher.close(False)
        dispatcher.end_pool(Deadline(GUARD))
        assert dispatcher.records.permits == WORKERS
        assert dispatcher.overdue_names() == []
        assert dispatcher.records.known == {}
        assert all(entry.running == 0 for entry in self.entries)
        self.each_task_is_somewhere()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
def test_task_states() -> None:
    """At most one accepted completion per task, never a lost one; permits never leak; waiting is bounded in bytes."""
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        TaskStates,
        settings=settings(
            max_examples=300,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_task_states_with_a_fast_switch() -> None:
    """The same, and hundreds of tasks that end, time out and repeat at once, with threads that switch all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            TaskStates,
            settings=settings(
                max_examples=40,
                stateful_step_count=30,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        storm()
    finally:
        sys.setswitchinterval(interval)


def storm() -> None:
    """One thread delivers, each task twice; a second pauses and resumes; handlers end around their timeouts."""
    sink, handlers, timer = Sink(), Handlers(), Timer()
    handlers.open = True
    dispatcher = dispatcher_of(
        handlers, sink, timer, max_workers=4, max_waiting_bytes=400 * WAITING_COST, task_timeout=0.001
    )
    over = threading.Event()

    def toggle() -> None:
        while not over.is_set():
            dispatcher.pause("command")
            dispatcher.resume("command")

    toggler = threading.Thread(target=toggle)
    toggler.start()
    for number in range(400):
        for attempt in (1, 2):
            capability = "narrow" if number % 3 == 0 else "wide"
            dispatcher.submit(task_of(f"t{number}", capability, attempt=attempt))
    over.set()
    toggler.join(GUARD)
    assert dispatcher.drain(Deadline(GUARD))
    until(lambda: dispatcher.records.threads == 0)
    counts = dispatcher.counts
    assert set(sink.results) == {f"t{number}" for number in range(400)}
    assert sink.refused == []
    assert sorted(sink.delivered) == sorted(sink.results)
    assert set(sink.attempts.values()) == {2}
    assert counts.completed + counts.failed + counts.rejected == counts.duplicates == 400
    assert dispatcher.records.permits == 4
    assert dispatcher.overdue_names() == []
    dispatcher.end_pool(Deadline(GUARD))
    timer.close()
    assert timer.join(Deadline(GUARD))


def test_a_failure_in_the_library_costs_one_task(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever goes wrong around a handler, its task is answered and the thread's place is free again."""
    sink, handlers, timer = Sink(), Handlers(), ManualTimer()
    handlers.open = True
    dispatcher = dispatcher_of(handlers, sink, timer)
    timer.before = lambda: 1 / 0
    dispatcher.submit(task_of("t1", "wide"))
    until(lambda: "t1" in sink.results)
    failure = sink.results["t1"].failure
    assert failure is not None
    assert (failure.code, failure.message) == ("handler_error", "the worker failed (ZeroDivisionError)")
    timer.before = lambda: None
    dispatcher.submit(task_of("t2", "wide"))
    until(lambda: "t2" in sink.results and dispatcher.records.threads == 0)
    assert sink.results["t2"].output == "done"
    assert dispatcher.records.permits == WORKERS
    dispatcher.end_pool(Deadline(GUARD))
    assert any("unforeseen" in record.message for record in caplog.records)


def test_a_handler_that_ends_while_its_timeout_is_answered() -> None:
    """A handler that ends between its timeout and the answer to it is not overdue, and its place is free."""
    sink, handlers, timer = Sink(), Handlers(), ManualTimer()
    dispatcher = dispatcher_of(handlers, sink, timer)
    dispatcher.submit(task_of("t1", "wide"))
    until(lambda: "t1" in handlers.inside)

    def end_first(completion: Completion) -> None:
        handlers.gate("t1").set()
        until(lambda: dispatcher.records.threads == 0)

    sink.before = end_first
    timer.fire("t1")
    assert dispatcher.overdue_names() == []
    assert (dispatcher.records.permits, dispatcher.running) == (WORKERS, 0)
    assert sink.delivered == ["t1"]
    dispatcher.end_pool(Deadline(GUARD))


@pytest.mark.parametrize("late", ["lease", "failure"])
def test_a_task_that_is_answered_on_the_way_to_its_handler(late: str) -> None:
    """A stop that answers a task before its handler is called leaves no overdue handler behind, and its place free."""
    sink, handlers, timer = Sink(), Handlers(), ManualTimer()
    lease = Lease()
    dispatcher = dispatcher_of(handlers, sink, timer, lease)

    def abandon() -> None:
        if threading.current_thread() is not threading.main_thread():
            dispatcher.abandon("shutdown")
            if late == "failure":
                raise ZeroDivisionError
            lease.held = False

    if late == "lease":
        lease.on_look = abandon
    else:
        timer.before = abandon
    dispatcher.submit(task_of("t1", "wide"))
    until(lambda: sink.delivered == ["t1"] and dispatcher.records.threads == 0)
    assert (dispatcher.overdue_names(), handlers.runs) == ([], [])
    assert (dispatcher.records.permits, dispatcher.running) == (WORKERS, 0)
    dispatcher.end_pool(Deadline(GUARD))


@pytest.mark.parametrize("comes", [False, True])
def test_a_task_that_comes_again_while_it_is_given_back(comes: bool) -> None:
    """The order to give it back is not carried out any more, and what becomes of it answers nothing."""
    sink, handlers, timer = Sink(), Handlers(), ManualTimer()
    handlers.open = True
    lease = Lease()
    dispatcher = dispatcher_of(handlers, sink, timer, lease)

    def hold() -> None:
        lease.held = threading.current_thread() is threading.main_thread()

    lease.on_look = hold
    dispatcher.submit(task_of("t1", "wide"))
    until(lambda: sink.released == ["t1"] and dispatcher.records.threads == 0)
    lease.on_look, lease.held = lambda: None, True
    order = sink.orders["t1"]
    assert order.begin()
    if comes:
        dispatcher.submit(task_of("t1", "wide"))
        until(lambda: sink.delivered == ["t1"] and dispatcher.records.threads == 0)
        assert not order.begin()
    order.end(is_released=False, is_supported=False)
    counts = dispatcher.counts
    assert sink.delivered == ["t1"]
    assert (sink.results["t1"].output == "done") is comes
    assert (counts.received, counts.released, counts.completed, counts.rejected) == (
        (2, 1, 1, 0) if comes else (1, 0, 0, 1)
    )
    assert not dispatcher.answers.given_back
    dispatcher.end_pool(Deadline(GUARD))


@pytest.mark.parametrize("part", ["accept", "audit"])
def test_a_result_that_cannot_be_taken(part: str) -> None:
    """Its task is answered all the same, and its place and its thread are free."""
    sink, handlers, timer = Sink(), Handlers(), ManualTimer()
    handlers.open = True
    dispatcher = dispatcher_of(handlers, sink, timer, audit=Audit() if part == "audit" else None)

    def fail(*_: Any) -> None:
        sink.before = lambda completion: None
        raise ZeroDivisionError

    if part == "accept":
        sink.before = fail
    dispatcher.submit(task_of("t1", "narrow"))
    dispatcher.submit(task_of("t2", "narrow"))
    until(lambda: sorted(sink.delivered) == ["t1", "t2"] and dispatcher.records.threads == 0)
    failure = sink.results["t1"].failure
    assert (None if failure is None else failure.code) == ("handler_error" if part == "accept" else None)
    assert dispatcher.counts.failed == (part == "accept")
    assert (dispatcher.records.permits, dispatcher.running) == (WORKERS, 0)
    dispatcher.end_pool(Deadline(GUARD))


def test_a_malformed_repetition() -> None:
    """A task that comes again with what cannot be read goes on, and its own result is the answer."""
    sink, handlers, timer = Sink(), Handlers(), ManualTimer()
    dispatcher = dispatcher_of(handlers, sink, timer)
    dispatcher.submit(task_of("t1", "wide"))
    until(lambda: "t1" in handlers.inside)
    dispatcher.answer_malformed(MalformedTask("timeout_ms must be a positive number", "t1"))
    handlers.gate("t1").set()
    until(lambda: sink.delivered == ["t1"] and dispatcher.records.threads == 0)
    dispatcher.answer_malformed(MalformedTask("timeout_ms must be a positive number", "t1"))
    assert sink.results["t1"].output == "done"
    assert (dispatcher.counts.received, dispatcher.counts.duplicates, dispatcher.counts.rejected) == (3, 2, 0)
    dispatcher.end_pool(Deadline(GUARD))


@pytest.mark.parametrize(
    ("what", "code"),
    [("pause", "worker_paused"), ("terminate", "worker_terminated"), ("stop", None), ("lease", None)],
)
def test_a_stop_while_the_policy_is_asked(what: str, code: Optional[str]) -> None:
    """The task has not begun: it is answered, or given back, and its handler is not called."""
    sink, handlers, timer, gateway, lease = Sink(), Handlers(), ManualTimer(), FakeGateway(is_slow=True), Lease()
    handlers.open = True
    dispatcher = dispatcher_of(handlers, sink, timer, lease, policy_gateway=gateway)
    dispatcher.submit(task_of("t1", "wide"))
    assert gateway.asked.wait(GUARD)
    if what == "pause":
        dispatcher.pause("local")
    elif what == "lease":
        lease.held = False
    else:
        dispatcher.close(what == "terminate")
    gateway.answer.set()
    until(lambda: dispatcher.records.threads == 0)
    assert handlers.runs == []
    assert (dispatcher.records.permits, dispatcher.running, dispatcher.overdue_names()) == (WORKERS, 0, [])
    if code is None:
        assert (sink.released, sink.delivered) == (["t1"], [])
    else:
        failure = sink.results["t1"].failure
        assert failure is not None
        assert failure.code == code
    dispatcher.end_pool(Deadline(GUARD))


def test_threads_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any thread a task is answered; else it waits for one that is there. The books stay right."""
    sink, handlers, timer = Sink(), Handlers(), ManualTimer()
    dispatcher = dispatcher_of(handlers, sink, timer)
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("sekuire-task"):
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    dispatcher.submit(task_of("t0", "wide"))
    until(lambda: sink.delivered == ["t0"])
    monkeypatch.setattr(threading.Thread, "start", real)
    dispatcher.submit(task_of("t1", "wide"))
    until(lambda: "t1" in handlers.inside)
    monkeypatch.setattr(threading.Thread, "start", start)
    dispatcher.submit(task_of("t2", "wide"))
    for task_id in ("t1", "t2"):
        handlers.gate(task_id).set()
    until(lambda: set(sink.delivered) == {"t0", "t1", "t2"} and dispatcher.records.threads == 0)
    codes = {task_id: one.failure.code if one.failure else None for task_id, one in sink.results.items()}
    assert codes == {"t0": "worker_shutdown", "t1": None, "t2": None}
    assert handlers.runs == ["t1", "t2"]
    assert (dispatcher.records.permits, dispatcher.running) == (WORKERS, 0)
    monkeypatch.setattr(threading.Thread, "start", real)
    dispatcher.end_pool(Deadline(GUARD))


@pytest.mark.parametrize("early", [False, True])
def test_a_higher_attempt_while_the_result_is_taken(early: bool) -> None:
    """A delivery that comes just before the sink has the result is met with the result, under its attempt."""
    sink, handlers, timer = Sink(), Handlers(), ManualTimer()
    dispatcher = dispatcher_of(handlers, sink, timer)
    dispatcher.submit(task_of("t1", "wide"))
    until(lambda: "t1" in handlers.inside)
    sink.before = lambda completion: dispatcher.submit(task_of("t1", "wide", attempt=7))
    if early:
        timer.fire("t1")
    handlers.gate("t1").set()
    until(lambda: sink.delivered == ["t1"] and dispatcher.records.threads == 0)
    assert sink.attempts == {"t1": 7}
    assert (dispatcher.counts.received, dispatcher.counts.duplicates, handlers.runs) == (2, 1, ["t1"])
    dispatcher.end_pool(Deadline(GUARD))


def test_a_repetition_while_the_pause_is_answered() -> None:
    """A waiting task that is delivered again while a pause answers it is known, not rejected twice."""
    sink, handlers, timer = Sink(), Handlers(), ManualTimer()
    dispatcher = dispatcher_of(handlers, sink, timer, max_workers=1)
    for number in (1, 2):
        dispatcher.submit(task_of(f"t{number}", "wide"))
    until(lambda: "t1" in handlers.inside)
    sink.before = lambda completion: dispatcher.submit(task_of("t2", "wide"))
    dispatcher.pause("local")
    assert (dispatcher.counts.rejected, dispatcher.counts.duplicates, sink.refused) == (1, 1, [])
    sink.before = lambda completion: None
    handlers.gate("t1").set()
    until(lambda: dispatcher.records.threads == 0)
    dispatcher.end_pool(Deadline(GUARD))


def test_a_task_that_waited_as_json_gets_its_input_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of tasks that wait in a long queue are kept as JSON; the handler sees no difference."""
    monkeypatch.setattr("sekuire.worker.dispatch._UNPACKED", 2)
    inputs: List[Any] = [{"n": number, "text": "é\ud800\u2028", "many": [1.5, None, True, {}]} for number in range(6)]
    seen: Dict[str, Any] = {}
    gate = threading.Event()

    def handle(ctx: TaskContext, input: Any) -> str:
        gate.wait(GUARD)
        seen[ctx.task_id] = input
        return "done"

    registry = TaskRegistry()
    registry.add("a", handle)
    sink = Sink()
    config = WorkerConfig(agent_id="a", runtime_token="t", max_workers=1, max_queued=10)
    dispatcher = Dispatcher(
        config, registry, sink, timer=ManualTimer(), lease=Lease()
    )  # fmt: skip
    for number, value in enumerate(inputs):
        dispatcher.submit(task_of(str(number), "a", input=value))
    packed = [record.packed is not None for record in dispatcher.records.known.values()]
    assert packed == [False, False, False, True, True, True]
    assert all(record.task.input is None for record in dispatcher.records.known.values() if record.packed is not None)
    gate.set()
    assert dispatcher.drain(Deadline(GUARD))
    dispatcher.end_pool(Deadline(GUARD))
    assert seen == {str(number): value for number, value in enumerate(inputs)}


@pytest.mark.parametrize(
    ("way", "then"),
    [
        ([State.REJECTED], [State.RUNNING, State.RELEASED, State.FINISHED]),
        ([State.WAITING], [State.RECEIVED, State.RUNNING, State.FINISHED]),
        ([State.STARTING, State.RUNNING], [State.REJECTED, State.RELEASED, State.STARTING]),
        ([State.STARTING, State.SENT], [State.RUNNING, State.STARTING]),
        ([State.STARTING, State.RUNNING, State.FINISHED], list(State)),
        ([State.RELEASED], [State.WAITING, State.STARTING, State.FINISHED]),
    ],
)
def test_only_legal_edges(way: List[State], then: List[State]) -> None:
    """A task ends once, and none that has begun is given back or rejected."""
    record = Record(task_of("t1", "wide"), HandlerEntry("wide", lambda ctx, input: None), Sink(), "t1")
    for state in way:
        move(record, state)
    for state in then:
        with pytest.raises(AssertionError):
            move(record, state)
    assert record.state is way[-1]


def test_a_release_that_was_called_off_stays_so() -> None:
    """Neither a try that begins later nor the platform's answer to one on its way changes it."""
    monitor = Monitor()
    planned, sent = Release(monitor, "t1", 1), Release(monitor, "t2", 1)
    assert sent.begin()
    for one in (planned, sent):
        with monitor.lock:
            one.call_off()
        one.postpone()
        assert not one.begin()
        one.end(is_released=True)
        assert one.state is release.CALLED_OFF


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("end", ["pause", "close", "terminate", "lose the lease", "abandon"])
def test_one_task_that_cannot_be_ended(end: str, early: bool) -> None:
    """A failure while one of many tasks is ended costs that one task: the others have their end, and all is free."""
    sink, handlers, timer = Sink(), Handlers(), ManualTimer()
    dispatcher = dispatcher_of(handlers, sink, timer)
    calls = {
        "pause": lambda: dispatcher.pause("local"),
        "close": lambda: dispatcher.close(False),
        "terminate": lambda: dispatcher.close(True),
        "lose the lease": dispatcher.lose_lease,
        "abandon": lambda: dispatcher.abandon("shutdown"),
    }
    running, waiting = ["t1", "t2"], ["t3", "t4", "t5"]
    for task_id in running + waiting:
        dispatcher.submit(task_of(task_id, "wide"))
    until(lambda: handlers.inside == set(running))
    failed = "t1" if end == "abandon" else "t3"

    def accept(completion: Completion) -> None:
        if completion.task_id == failed:
            raise MemoryError

    def release(order: Any, delay: float = 0.0) -> None:
        if order.task_id == failed:
            raise MemoryError
        sink.released.append(order.task_id)

    def refuse(end: Callable[..., None], record: Record, *args: Any) -> None:
        if record.task.task_id == failed:
            raise MemoryError
        end(record, *args)

    sink.before = accept
    sink.release = release  # type: ignore[method-assign]
    if early:
        # Before anything of its end is done.
        for name in ("reject", "give_back", "end_early"):
            setattr(dispatcher.answers, name, functools.partial(refuse, getattr(dispatcher.answers, name)))
    with pytest.raises(MemoryError):
        calls[end]()
    ended = set(sink.delivered) | set(sink.released)
    assert ended == ({"t2"} if end == "abandon" else {"t4", "t5"})
    assert failed not in dispatcher.records.known
    sink.before = lambda completion: None
    handlers.open = True
    for task_id in running:
        handlers.gate(task_id).set()
    assert dispatcher.drain(Deadline(GUARD))
    until(lambda: dispatcher.records.threads == 0)
    assert (dispatcher.records.permits, dispatcher.running) == (WORKERS, 0)
    dispatcher.end_pool(Deadline(GUARD))


def test_a_task_that_cannot_be_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory on the way to its release: the task keeps no place, and runs when it comes again."""
    sink, handlers, timer = Sink(), Handlers(), ManualTimer()
    gateway, lease = FakeGateway(), Lease()
    dispatcher = dispatcher_of(handlers, sink, timer, lease, policy_gateway=gateway)
    check = gateway.check_capability

    def end_the_lease(name: str) -> None:
        lease.held = False
        check(name)

    gateway.check_capability = end_the_lease  # type: ignore[method-assign]

    def refuse(*arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("sekuire.worker.answers.Release", refuse)
        dispatcher.submit(task_of("t1", "wide"))
        until(lambda: dispatcher.records.threads == 0)
    assert (dispatcher.running, dispatcher.records.known, dispatcher.records.permits) == (0, {}, WORKERS)
    gateway.check_capability = check  # type: ignore[method-assign]
    lease.held = True
    handlers.open = True
    dispatcher.submit(task_of("t1", "wide"))
    until(lambda: sink.delivered == ["t1"])
    dispatcher.end_pool(Deadline(GUARD))


def test_a_task_that_comes_again_while_its_refused_release_is_answered() -> None:
    """It is answered in place of a release that the platform does not offer, so it does not run as well."""
    sink, handlers, timer = Sink(), Handlers(), ManualTimer()
    dispatcher = dispatcher_of(handlers, sink, timer, max_workers=1)
    dispatcher.submit(task_of("t0", "wide"))
    until(lambda: "t0" in handlers.inside)
    dispatcher.submit(task_of("t1", "wide"))
    dispatcher.lose_lease()
    assert sink.released == ["t1"]
    handlers.gate("t0").set()
    until(lambda: dispatcher.records.threads == 0)
    handlers.open = True
    sink.before = lambda completion: dispatcher.submit(task_of("t1", "wide", attempt=2))
    assert sink.orders["t1"].begin()
    sink.orders["t1"].end(is_released=False, is_supported=False)
    assert dispatcher.drain(Deadline(GUARD))
    assert handlers.runs == ["t0"]
    failure = sink.results["t1"].failure
    assert failure is not None
    assert failure.code == "worker_shutdown"
    assert (sink.attempts["t1"], sink.refused, dispatcher.counts.duplicates) == (2, [], 1)
    assert dispatcher.records.known == {}
    dispatcher.end_pool(Deadline(GUARD))


def test_a_task_without_a_pool_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that cannot be made costs one task, not its permit and place."""
    sink, handlers, timer = Sink(), Handlers(), ManualTimer()
    dispatcher = dispatcher_of(handlers, sink, timer)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("sekuire.worker.running.ThreadPoolExecutor", refuse)
        dispatcher.submit(task_of("t1", "wide"))
    failure = sink.results["t1"].failure
    assert failure is not None
    assert failure.code == "worker_shutdown"
    assert (dispatcher.running, dispatcher.records.threads, dispatcher.records.permits) == (0, 0, WORKERS)
    dispatcher.end_pool(Deadline(GUARD))


def test_a_lease_that_is_lost_and_renewed_while_the_policy_is_asked() -> None:
    """The task goes back: the platform may have given it to others. It does not begin, cancelled from the first."""
    sink, handlers, timer = Sink(), Handlers(), ManualTimer()
    gateway, lease = FakeGateway(), Lease()
    asked, answer = threading.Event(), threading.Event()

    def check(name: str) -> None:
        asked.set()
        assert answer.wait(GUARD)

    gateway.check_capability = check  # type: ignore[method-assign]
    dispatcher = dispatcher_of(handlers, sink, timer, lease, policy_gateway=gateway)
    handlers.open = True
    dispatcher.submit(task_of("t1", "wide"))
    assert asked.wait(GUARD)
    lease.held = False
    dispatcher.lose_lease()
    lease.held = True
    answer.set()
    until(lambda: dispatcher.records.threads == 0)
    assert (sink.released, handlers.runs, sink.results) == (["t1"], [], {})
    assert (dispatcher.running, dispatcher.records.permits, dispatcher.records.known) == (0, WORKERS, {})
    dispatcher.submit(task_of("t1", "wide", attempt=2))
    until(lambda: sink.delivered == ["t1"])
    dispatcher.end_pool(Deadline(GUARD))
