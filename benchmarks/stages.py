"""Where the microseconds of a task go: each stage alone, in CPU time, in a loop that does nothing else.

A stage whose code does not exist, or is called otherwise by now, is left out, and named. Lines marked as references
measure no code of the library; they say what the interpreter or a dependency costs for the same step.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
import timeit
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

from . import payloads
from .process import Message, hear, say

#: Things done per call of a stage, where one alone cannot be measured.
_MANY = 200


class Stage(NamedTuple):
    """``run`` does ``times`` times what is measured; only stages ``in_task`` are part of a task's cost."""

    name: str
    run: Callable[[], Any]
    times: int = 1
    in_task: bool = True


Maker = Callable[[int], Stage]


def _chunks() -> Iterator[bytes]:
    for number in range(_MANY):
        yield payloads.task_event(number)


def _events_of(client: Callable[[Iterator[bytes]], Any]) -> Callable[[], None]:
    chunks = list(_chunks())

    def run() -> None:
        seen = 0
        for _ in client(chunk for chunk in chunks).events():
            seen += 1
        if seen != _MANY:
            raise RuntimeError(f"{seen} events came out of {_MANY}")

    return run


def _sse(port: int) -> Stage:
    stream = importlib.import_module("sekuire.transport.sse").EventStream
    return Stage("SSE: one event of 1 KB", _events_of(stream), _MANY)


def _sse_reference(port: int) -> Stage:
    client = importlib.import_module("sseclient").SSEClient
    return Stage("  reference: sseclient-py alone", _events_of(client), _MANY, in_task=False)


def _json_reference(port: int) -> Stage:
    text = payloads.task_text()
    return Stage("  reference: json.loads alone", lambda: json.loads(text), in_task=False)


def _decode_task(port: int) -> Stage:
    decode = importlib.import_module("sekuire.wire.protocol").decode_task
    text = payloads.task_text()
    return Stage("JSON and protocol.decode_task", lambda: decode(text))


def _big_event(port: int) -> Stage:
    stream = importlib.import_module("sekuire.transport.sse").EventStream
    decode = importlib.import_module("sekuire.wire.protocol").decode_task
    wire = b"event: task\ndata: " + payloads.big_text().encode() + b"\n\n"
    # As they come from the socket.
    chunks = [wire[start : start + 65536] for start in range(0, len(wire), 65536)]

    def run() -> None:
        for event in stream(iter(chunks)).events():
            decode(event.data)

    return Stage("an event of 16 MiB: SSE, JSON and protocol.decode_task", run, in_task=False)


def _big_reference(port: int) -> Stage:
    text = payloads.big_text()
    return Stage("  reference: json.loads alone", lambda: json.loads(text), in_task=False)


def _completion_body(port: int) -> Stage:
    protocol = importlib.import_module("sekuire.wire.protocol")
    head, tail = protocol.completion_head, protocol.completion_tail
    made = importlib.import_module("sekuire.wire.models").Completion
    task_id, output = payloads.task_id(1), payloads.result()
    worker_id = payloads.completion()["worker_id"]
    return Stage(
        "Completion and its body (protocol.completion_head, _tail)",
        lambda: head(made(task_id=task_id, attempt=1, output=output)) + tail(1, worker_id),
    )


def _completion_reference(port: int) -> Stage:
    body = payloads.completion()
    encode = json.JSONEncoder(separators=(",", ":")).encode
    return Stage("  reference: JSONEncoder.encode alone", lambda: encode(body), in_task=False)


def _completion_target(port: int) -> Stage:
    protocol = importlib.import_module("sekuire.wire.protocol")
    path = protocol.Endpoints().path
    key = protocol.completion_key
    task_id = payloads.task_id(1)
    return Stage("its path and Idempotency-Key", lambda: (path("complete", task_id=task_id), key(task_id, 1)))


def _post(port: int) -> Stage:
    http = importlib.import_module("sekuire.transport.http")
    config = importlib.import_module("sekuire.config").ConnectionConfig(api_base_url=f"http://127.0.0.1:{port}")
    protocol = importlib.import_module("sekuire.wire.protocol")
    token = importlib.import_module("sekuire.secret").Secret(payloads.RUNTIME_TOKEN)
    request = http.HttpClient(config).request
    body = payloads.compact(payloads.completion()).encode()
    key = f"{payloads.task_id(1)}:1"

    def run() -> None:
        request("POST", "/echo", body=body, credential=lambda: protocol.bearer(token), idempotency_key=key).check()

    return Stage("HttpClient.request: the POST, one thread", run)


def _outbox(port: int) -> Stage:
    outbox = importlib.import_module("sekuire.worker.outbox")
    directory = tempfile.mkdtemp(prefix="sekuire-bench-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    box = outbox.open_outbox(os.path.join(directory, "outbox.db"))
    made = outbox.Stored
    head = payloads.compact(payloads.completion()).encode()
    url, agent, task_id = f"http://127.0.0.1:{port}", payloads.AGENT_ID, payloads.task_id(1)

    def run() -> None:
        box.put(url, agent, payloads.INSTALLATION_ID, made(task_id, 1, False, head))
        box.remove(url, agent, task_id, 1)

    # Only where outbox= is set; its CPU time, without what the disk takes to sync.
    return Stage("with an outbox: put and remove a result", run, in_task=False)


def _audit_log() -> Any:
    """The audit log of an SDK that was never started: it keeps what it is told, and has no thread."""
    made = importlib.import_module("sekuire").SekuireSDK
    return made(
        payloads.AGENT_ID,
        workspace_id="ws",
        installation_id=payloads.INSTALLATION_ID,
        runtime_token=payloads.RUNTIME_TOKEN,
        refresh_token=payloads.RUNTIME_TOKEN,
    ).audit


def _audit_note(port: int) -> Stage:
    models = importlib.import_module("sekuire.wire.models")
    task = models.Task(task_id=payloads.task_id(1), capability=payloads.CAPABILITY, trace_id="trace-1")
    completion = models.Completion(task_id=task.task_id, attempt=1, output=payloads.result(), execution_time_ms=1)
    report = importlib.import_module("sekuire.worker.results").Report(task.task_id, 1, b"", True)
    audit = _audit_log()
    worker_id = payloads.completion()["worker_id"]

    def run() -> None:
        for _ in range(_MANY):
            audit.task(worker_id, task, completion, report)
        audit.buffer.clear()

    return Stage("audit, with an SDK: noting a task (handler's thread)", run, _MANY, in_task=False)


def _audit_log_call(port: int) -> Stage:
    audit = _audit_log()
    data = {"model": "large-1", "tokens": 1234, "milliseconds": 567}

    def run() -> None:
        for _ in range(_MANY):
            audit.log("model_call", data)
        audit.buffer.clear()

    return Stage("audit: one sdk.log(...) (caller's thread)", run, _MANY, in_task=False)


def _audit_batch(port: int) -> Stage:
    audit = _audit_log()
    for number in range(50):
        data = {"task_id": payloads.task_id(number), "capability": payloads.CAPABILITY, "status": "completed"}
        audit._note("tool_execution", "info", {**data, "execution_time_ms": 1, "attempt": 1, "worker_id": "w"}, 600)
    batch = audit.buffer.batch()
    encode = audit.sender.body_of
    return Stage("audit: encoding one event, in a batch (its thread)", lambda: encode(batch), 50, in_task=False)


class _Here(Executor):
    """Run each call at once, in the thread that submits it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: "Future[Any]" = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class _Accepting:
    """Stand for a lease that is held, and for what delivers results: it accepts them, and sends nothing."""

    can_release = False
    code = None
    on_room: Callable[[], None] = staticmethod(lambda: None)

    def is_held(self) -> bool:
        return True

    def has_room(self) -> bool:
        return True

    def accept(self, completion: Any) -> "_Accepting":
        return self

    def redelivered(self, task_id: str, attempt: int) -> bool:
        return False

    def progress(self, context: Any, fraction: float, message: Optional[str]) -> None:
        pass

    def post(self, report: Any) -> None:
        pass

    keep = enqueue = post


def _dispatch(port: int) -> Stage:
    made = importlib.import_module("sekuire.worker.dispatch").Dispatcher
    asking = importlib.import_module("sekuire.worker.approvals").Approvals
    task = importlib.import_module("sekuire.wire.models").Task
    timer = importlib.import_module("sekuire._internal.threads").Timer()
    settings = {"agent_id": payloads.AGENT_ID, "runtime_token": payloads.RUNTIME_TOKEN, "executor": _Here()}
    config = importlib.import_module("sekuire").WorkerConfig(**settings)
    registry = importlib.import_module("sekuire").TaskRegistry()
    registry.task(payloads.CAPABILITY, lambda ctx, input: None)
    registry.freeze(None)
    questions = importlib.import_module("sekuire.worker.questions").Questions(config, None, timer=timer)
    here = _Accepting()
    dispatcher = made(config, registry, here, timer=timer, lease=here, approvals=asking(config, questions))

    def run() -> None:
        for number in range(_MANY):
            dispatcher.submit(task(task_id=str(number), capability=payloads.CAPABILITY))

    return Stage("dispatch, handler, answer in one thread; no resource, nothing asked", run, _MANY, in_task=False)


def _cancel(port: int) -> Stage:
    """All that a task does so that it alone can be cancelled, and would not do otherwise; and some that it would."""
    models = importlib.import_module("sekuire.wire.models")
    control_of = importlib.import_module("sekuire.handlers.context").TaskControl
    task = models.Task(task_id=payloads.task_id(1), capability=payloads.CAPABILITY)
    loop: Any = object()
    lock = threading.Lock()
    known: Dict[str, Any] = {}

    def run() -> None:
        for _ in range(_MANY):
            # Of every task: what holds the cancel, and where it is found by its id.
            control = control_of(task)
            with lock:
                known[task.task_id] = control
            # Of a coroutine: what cancels it. Of a handler that looks: one look.
            control.attach_loop(loop, _nothing)
            control.reason()
            control.detach_loop()
            with lock:
                known.pop(task.task_id)

    return Stage("what lets one task be cancelled, at most", run, _MANY, in_task=False)


def _executor_reference(port: int) -> Stage:
    executor = ThreadPoolExecutor(1)

    def run() -> None:
        last = None
        for _ in range(_MANY):
            last = executor.submit(_nothing)
        if last is not None:
            last.result()

    return Stage("reference: ThreadPoolExecutor.submit, queue never empty", run, _MANY, in_task=False)


def _wake_reference(port: int) -> Stage:
    there: "SimpleQueue[None]" = SimpleQueue()
    back: "SimpleQueue[None]" = SimpleQueue()

    def mirror() -> None:
        while True:
            back.put(there.get())

    threading.Thread(target=mirror, daemon=True).start()

    def run() -> None:
        for _ in range(_MANY):
            there.put(None)
            back.get()

    # A round trip is two hand-overs.
    return Stage("reference: waking another thread (SimpleQueue)", run, 2 * _MANY, in_task=False)


def _nothing() -> None:
    pass


_MAKERS: Dict[str, Maker] = {
    "sse": _sse,
    "sse-reference": _sse_reference,
    "decode": _decode_task,
    "decode-reference": _json_reference,
    "big-event": _big_event,
    "big-reference": _big_reference,
    "encode": _completion_body,
    "encode-reference": _completion_reference,
    "target": _completion_target,
    "post": _post,
    "outbox": _outbox,
    "cancel": _cancel,
    "audit-note": _audit_note,
    "audit-log": _audit_log_call,
    "audit-batch": _audit_batch,
    "dispatch": _dispatch,
    "executor-reference": _executor_reference,
    "wake-reference": _wake_reference,
}


def measure(stage: Stage, seconds: float, repeats: int = 5) -> Message:
    """CPU µs of one of what ``stage`` does: the median of ``repeats`` loops, with the lowest and the highest."""
    timer = timeit.Timer(stage.run, timer=time.process_time)
    once = max(timer.timeit(3) / 3, 1e-7)
    number = max(1, int(seconds / repeats / once))
    each = [took * 1e6 / number / stage.times for took in timer.repeat(repeats, number)]
    return {
        "name": stage.name,
        "in_task": stage.in_task,
        "cpu_us": statistics.median(each),
        "lowest_us": min(each),
        "highest_us": max(each),
    }


def main(arguments: Optional[List[str]] = None) -> None:
    """Measure every stage that exists once, then end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, required=True, help="of the platform")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each stage")
    options = parser.parse_args(arguments)
    say({"ready": True})
    if hear() is None:
        return
    found: List[Message] = []
    left_out: List[str] = []
    for key, make in _MAKERS.items():
        try:
            stage = make(options.port)
            stage.run()
        except (ImportError, AttributeError, TypeError) as error:
            left_out.append(f"{key} ({error})")
            continue
        found.append({"key": key, **measure(stage, options.seconds)})
    say({"stages": found, "left_out": left_out})


if __name__ == "__main__":
    main()
