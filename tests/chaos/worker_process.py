"""A worker as a process that can be killed: it notes every run of a handler, and at its end counts what is left."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import sys
import threading
import time
import zlib
from typing import Any, Dict, List, Optional

import attrs

from sekuire import RuntimeCredentialsStore, TaskContext, Worker, WorkerConfig, create_worker
from sekuire._internal import filelock
from sekuire.errors import TaskError
from sekuire.policy import PolicyClient, PolicyGateway

from .invariants import FORBIDDEN
from .process import question, reply

log = logging.getLogger("chaos.worker")

#: Exit code of a worker that stopped without being told to.
STOPPED_BY_ITSELF = 3


def has_outbox() -> bool:
    """Whether this version of the library offers the outbox."""
    return "outbox" in attrs.fields_dict(WorkerConfig)


class Handlers:
    """Handlers with a side effect that can be counted: one line in a file for every run."""

    def __init__(self, process: int, path: str) -> None:
        self._process = process
        self._numbers = itertools.count(1)
        # One write() of one line in append mode: lines of several threads and of killed processes never mix.
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def work(self, ctx: TaskContext, input: Dict[str, Any]) -> Dict[str, Any]:
        attempt = ctx.attempt
        run = f"{self._process}-{next(self._numbers)}"
        line = f"{ctx.task_id} {attempt} {os.getpid()} {run} {time.time():.6f}\n"
        os.write(self._file, line.encode())
        if input["ms"]:
            time.sleep(input["ms"] / 1000.0)
        if input["mode"] == "progress":
            ctx.report_progress(0.5, "half of it")
        if input["mode"] == "fail":
            raise TaskError("planned", "this one was to fail", details={"run": run})
        if input["mode"] == "flaky" and zlib.crc32(f"{ctx.task_id}:{attempt}".encode()) % 4 == 0:
            raise TaskError("flaky", "this one may be tried again", retryable=True, details={"run": run})
        return {"run": run, "text": "x" * input["bytes"]}

    async def work_async(self, ctx: TaskContext, input: Dict[str, Any]) -> Dict[str, Any]:
        return self.work(ctx, input)

    def close(self) -> None:
        os.close(self._file)


def main() -> None:
    settings = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(threadName)s %(name)s %(message)s")
    options = dict(settings["options"])
    if settings["outbox"] is not None:
        options["outbox"] = settings["outbox"]
    before = descriptors()
    handlers = Handlers(settings["process"], settings["runs"])
    store = RuntimeCredentialsStore(path=settings["credentials"])
    policy = Policy(settings, store)
    worker = create_worker(credentials_store=store, policy_gateway=policy.gateway, **options)
    worker.on_task("work", handlers.work)
    worker.on_task("work.async", handlers.work_async)
    worker.on_task(FORBIDDEN, handlers.work)
    worker.start()
    reply(started=True)
    told: List[bool] = []
    reporting = threading.Thread(target=_report_installation, args=(store, told), name="report", daemon=True)
    reporting.start()
    watch = threading.Thread(target=_watch, args=(worker, told), name="watch", daemon=True)
    watch.start()
    number = question()["number"]
    told.append(True)
    worker.stop()
    watch.join(5.0)
    reporting.join(5.0)
    policy.close()
    reply(number=number, **left_of(worker, handlers, before, settings))


class Policy:
    """The policy of the platform's workspace, where the run has one."""

    def __init__(self, settings: Dict[str, Any], store: RuntimeCredentialsStore) -> None:
        self.gateway: Optional[PolicyGateway] = None
        self._client: Optional[PolicyClient] = None
        workspace_id = settings["workspace_id"]
        if workspace_id is not None:
            options = {name: settings["options"][name] for name in ("api_base_url", "connect_timeout", "read_timeout")}
            self._client = PolicyClient(
                credentials_store=store, trusted_policy_keys=[settings["policy_key"]], **options
            )
            self.gateway = PolicyGateway(self._client, workspace_id)

    def close(self) -> None:
        if self.gateway is not None and self._client is not None:
            self.gateway.close()
            self._client.close()


def _report_installation(store: RuntimeCredentialsStore, told: List[bool]) -> None:
    """Say which installation this process is, as soon as it knows."""
    while store.current.installation_id is None and not told:
        time.sleep(0.02)
    reply(installation=store.current.installation_id)


def _watch(worker: Worker, told: List[bool]) -> None:
    worker.wait()
    if not told:
        log.error("the worker stopped by itself: %s", worker.stop_reason)
        sys.stderr.flush()
        os._exit(STOPPED_BY_ITSELF)


# -- what is left -----------------------------------------------------------------------------------------------------


def left_of(worker: Worker, handlers: Handlers, before: int, settings: Dict[str, Any]) -> Dict[str, Any]:
    """What a stopped worker has left in this process."""
    handlers.close()
    stats = worker.stats()
    undelivered = worker._reporter.undelivered()
    files = [] if settings["credentials"] is None else [settings["credentials"] + ".lock"]
    if settings["outbox"] is not None:
        files.append(settings["outbox"] + ".lock")
    return {
        "threads": living_threads(),
        "descriptors": descriptors() - before,
        "locks": [*held_locks(), *(path for path in files if os.path.exists(path) and not _is_free(path))],
        "running": stats.running,
        "waiting": stats.waiting,
        "dropped": stats.dropped,
        "duplicates": stats.duplicates,
        "received": stats.received,
        "reconnects": stats.reconnects,
        "undelivered": undelivered,
    }


def living_threads() -> List[str]:
    """The names of the others that still live."""
    others = [one for one in threading.enumerate() if one is not threading.main_thread()]
    for one in others:
        # One that has told its end may still be on its last line.
        one.join(1.0)
    return [one.name for one in others if one.is_alive()]


def descriptors() -> int:
    """How many file descriptors this process has open; 0 where that cannot be told."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def held_locks() -> List[str]:
    """The locks and conditions of the library's objects that somebody holds."""
    held = []
    for one in gc.get_objects():
        kind = type(one)
        if not str(kind.__module__).startswith("sekuire"):
            continue
        names = list(getattr(one, "__dict__", {}))
        names += [name for cls in kind.__mro__ for name in getattr(cls, "__slots__", ())]
        for name in names:
            lock: Any = getattr(one, name, None)
            if hasattr(lock, "acquire") and hasattr(lock, "release"):
                if lock.acquire(False):
                    lock.release()
                else:
                    held.append(f"{kind.__module__}.{kind.__name__}.{name}")
    return held


def _is_free(path: str) -> bool:
    descriptor = filelock.open_lock(path)
    try:
        return filelock.try_lock(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
