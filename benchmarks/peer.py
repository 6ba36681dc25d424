"""Run one peer's worker with a handler that does nothing, in a process of its own.

It fills its queue, says so, then works it off as that project's own worker does, with one process and so many threads.
RQ has no threads, so its worker runs one task after the other. taskiq and procrastinate run their own loop and hand
handlers to threads. Rate and CPU are taken between two tasks, so that neither start-up nor the filling is in them.
Some projects let the user say whether results are stored: ``--results`` says it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import glob
import importlib
import importlib.metadata
import itertools
import logging
import os
import threading
import warnings
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from . import payloads
from .process import Message, hear, say, usage


class Kind(NamedTuple):
    """Describe one project that can be measured."""

    #: The distributions it needs, its own first.
    distributions: Tuple[str, ...]
    #: The server under it: ``redis`` or ``postgres``.
    server: str
    #: The ways in which it is measured: without and with stored results.
    results: Tuple[bool, ...] = (False, True)


KINDS: Dict[str, Kind] = {
    "dramatiq": Kind(("dramatiq", "redis"), "redis"),
    "celery": Kind(("celery", "redis"), "redis"),
    "huey": Kind(("huey", "redis"), "redis"),
    "rq": Kind(("rq",), "redis", (True,)),
    "taskiq": Kind(("taskiq", "taskiq-redis"), "redis"),
    # It keeps the state of each task in its table, and no results.
    "procrastinate": Kind(("procrastinate", "psycopg"), "postgres", (False,)),
}

#: Tasks before the measurement begins.
WARM_UP = 500
#: Seconds that a stored result is kept.
_KEEP = 600

#: Queues a task, and works the queue off until the process ends.
Peer = Tuple[Callable[[Dict[str, Any]], object], Callable[[], object]]


class Meter:
    """Count tasks, and take the figures between the end of the warm-up and the last task."""

    def __init__(self, tasks: int, server_pid: int) -> None:
        self._count = itertools.count(1)
        self._last = tasks + WARM_UP
        self._tasks = tasks
        self._server_pid = server_pid
        self._before: Message = {}
        self.is_done = threading.Event()
        self.figures: Message = {}

    def note(self) -> None:
        number = next(self._count)
        if number == WARM_UP:
            self._before = self._usage()
        elif number == self._last:
            self._finish(self._usage())

    def _finish(self, after: Message) -> None:
        before = self._before
        seconds = (after["wall_ns"] - before["wall_ns"]) / 1e9
        cpu_seconds = (after["cpu_ns"] - before["cpu_ns"]) / 1e9
        self.figures = {
            "tasks": self._tasks,
            "cpu_us": cpu_seconds * 1e6 / self._tasks,
            "per_second": self._tasks / seconds,
            "busy": cpu_seconds / seconds,
            "platform_busy": (after["server_seconds"] - before["server_seconds"]) / seconds,
            "switches": (after["switches"] - before["switches"]) / self._tasks,
            "rss_kib": after["rss_kib"],
        }
        self.is_done.set()

    def _usage(self) -> Message:
        return {**usage(), "server_seconds": _cpu_seconds(self._server_pid)}


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time of a server: of its process, and of those that it has started."""
    ticks = 0
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as stat:
            head, _, tail = stat.read().rpartition(")")
            fields = tail.split()
            is_server = head.startswith(f"{pid} ")
            if is_server or int(fields[1]) == pid:
                # What its ended children used is added to the server's own line.
                ticks += sum(int(field) for field in fields[11 : 15 if is_server else 13])
    return ticks / float(os.sysconf("SC_CLK_TCK"))


#: Set before the queue is worked off; a handler is found by its name, so that it cannot be a closure.
_meter: Optional[Meter] = None
_RESULT = payloads.result()


def noop(document: Dict[str, Any]) -> Dict[str, Any]:
    """The handler: the same as the library's worker runs."""
    if _meter is not None:
        _meter.note()
    return _RESULT


def _dramatiq(url: str, threads: int, results: bool) -> Peer:
    dramatiq = importlib.import_module("dramatiq")
    broker = importlib.import_module("dramatiq.brokers.redis").RedisBroker(url=url)
    if results:
        module = importlib.import_module("dramatiq.results")
        backend = importlib.import_module("dramatiq.results.backends").RedisBackend(url=url)
        broker.add_middleware(module.Results(backend=backend, store_results=True, result_ttl=_KEEP * 1000))
    dramatiq.set_broker(broker)
    actor = dramatiq.actor(noop, actor_name="noop")

    def work() -> None:
        dramatiq.Worker(broker, worker_threads=threads).start()

    return actor.send, work


def _celery(url: str, threads: int, results: bool) -> Peer:
    celery = importlib.import_module("celery")
    app = celery.Celery("peer", broker=url, backend=url if results else None)
    app.conf.update(task_ignore_result=not results, result_expires=_KEEP, worker_prefetch_multiplier=4)
    task = app.task(noop, name="noop")
    arguments = ["worker", "--pool=threads", f"--concurrency={threads}", "--loglevel=ERROR"]
    arguments += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    return task.delay, lambda: app.worker_main(arguments)


def _huey(url: str, threads: int, results: bool) -> Peer:
    huey = importlib.import_module("huey").RedisHuey("peer", url=url, results=results)
    task = huey.task(name="noop")(noop)

    def work() -> None:
        # It sets signal handlers, which only the main thread may; it has nothing else to do here.
        consumer = huey.create_consumer(
            workers=threads, worker_type="thread", periodic=False, check_worker_health=False
        )
        consumer.run()

    return task, work


def _rq(url: str, threads: int, results: bool) -> Peer:
    rq = importlib.import_module("rq")
    connection = importlib.import_module("redis").Redis.from_url(url)
    queue = rq.Queue("peer", connection=connection)

    def send(document: Dict[str, Any]) -> object:
        return queue.enqueue("benchmarks.peer.noop", document, result_ttl=_KEEP)

    return send, lambda: rq.SimpleWorker([queue], connection=connection).work(logging_level="ERROR")


def _taskiq(url: str, threads: int, results: bool) -> Peer:
    redis = importlib.import_module("taskiq_redis")
    broker = redis.ListQueueBroker(url)
    if results:
        broker = broker.with_result_backend(redis.RedisAsyncResultBackend(url, result_ex_time=_KEEP))
    task = broker.task(task_name="noop")(noop)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(broker.startup())
    receive = importlib.import_module("taskiq.api").run_receiver_task

    def work() -> None:
        broker.is_worker_process = True
        loop.run_until_complete(receive(broker, sync_workers=threads, max_async_tasks=threads))

    return lambda document: loop.run_until_complete(task.kiq(document)), work


def _procrastinate(url: str, threads: int, results: bool) -> Peer:
    procrastinate = importlib.import_module("procrastinate")
    # Its documentation names this connector for workers.
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url, max_size=threads + 2))
    task = app.task(name="noop")(noop)
    app.open()
    app.schema_manager.apply_schema()

    def work() -> None:
        app.close()
        app.run_worker(concurrency=threads, install_signal_handlers=False)

    return lambda document: task.defer(document=document), work


_MAKERS: Dict[str, Callable[[str, int, bool], Peer]] = {
    "dramatiq": _dramatiq,
    "celery": _celery,
    "huey": _huey,
    "rq": _rq,
    "taskiq": _taskiq,
    "procrastinate": _procrastinate,
}


def version(kind: str) -> Optional[str]:
    """Return the installed version of a project, or None if it or what it needs is not installed."""
    try:
        own, *_ = [importlib.metadata.version(name) for name in KINDS[kind].distributions]
    except importlib.metadata.PackageNotFoundError:
        return None
    return own


def main(arguments: Optional[List[str]] = None) -> None:
    """Fill the queue, work it off on request, report the figures, end."""
    global _meter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--server", metavar="URL", required=True)
    parser.add_argument("--server-pid", type=int, required=True)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=3000)
    parser.add_argument("--results", action="store_true")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    # The lines to the parent must not be mixed with what a worker prints, to the descriptor itself too.
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # Celery's about running as root, which is how a container runs it.
    warnings.filterwarnings("ignore", module="celery")
    send, work = _MAKERS[options.kind](options.server, options.threads, options.results)
    document = payloads.task_input()
    for _ in range(options.tasks + WARM_UP):
        send(document)
    meter = Meter(options.tasks, options.server_pid)
    # RQ finds the handler by the module's name, which is not the one that this runs under.
    importlib.import_module("benchmarks.peer")._meter = _meter = meter  # type: ignore[attr-defined]

    def tell() -> None:
        meter.is_done.wait()
        with contextlib.redirect_stdout(output):
            say(meter.figures)
        # No project's worker is asked to stop: what follows the last task is not measured.
        hear()
        os._exit(0)

    with contextlib.redirect_stdout(output):
        say({"ready": True})
    if hear() is None:
        return
    threading.Thread(target=tell, daemon=True).start()
    work()
    threading.Event().wait()


if __name__ == "__main__":
    main()
