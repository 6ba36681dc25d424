"""Refuse at the start what cannot work: a missing handler, login method or policy, and what greenlets would hang."""

from __future__ import annotations

import concurrent.futures

from .._internal.greenlets import patched_by
from .._internal.logs import get_logger
from ..config import WorkerConfig
from ..errors import ConfigurationError
from ..handlers.invoke import is_async
from ..handlers.registry import TaskRegistry
from ..session.installation import Installation

log = get_logger("sekuire.worker")

_ELSEWHERE = "run this worker in a process of its own, without it (docs/gevent.md)"


def check_start(config: WorkerConfig, handlers: TaskRegistry, installation: Installation) -> None:
    """Refuse to start a worker that could do nothing, or that would hang.

    :raises ConfigurationError: something is missing or cannot work. The message names it.
    """
    if handlers.is_empty():
        raise ConfigurationError("no handler is registered; use @worker.on_task('name') before start()", "on_task")
    if config.credentials_store is None and installation.is_required:
        installation.auth.require_credentials()
    if config.policy_required and config.policy_gateway is None:
        raise ConfigurationError(
            "is True, and there is no policy_gateway that could load a policy; use SekuireSDK with the extra (pip "
            "install 'sekuire[policy]'), or give policy_gateway=PolicyGateway(...)",
            "policy_required",
        )
    _check_greenlets(config, handlers)


def warn_of_unhandled(config: WorkerConfig, handlers: TaskRegistry) -> None:
    """Warn of declared capabilities without a handler."""
    if handlers.has_catch_all:
        return
    unhandled = [name for name in config.capabilities if handlers.find(name) is None]
    if unhandled:
        log.warning("no handler for %s; their tasks will fail (unknown_capability)", ", ".join(unhandled))


def _check_greenlets(config: WorkerConfig, handlers: TaskRegistry) -> None:
    """Refuse an executor or a handler that would hang or fail under greenlets. Do nothing if nothing is patched."""
    library = patched_by()
    if library is None:
        return
    executor = config.executor
    if library == "gevent" and executor is not None:
        _check_executor(executor)
    if executor is None or type(executor) is concurrent.futures.ThreadPoolExecutor:
        # All greenlets share one thread of the system, and asyncio allows one running loop in each.
        names = [repr(entry.name) for entry in handlers if is_async(entry.function)]
        if names:
            raise ConfigurationError(
                f"the async handlers of {', '.join(names)} cannot run under {library}, where only one could run at a "
                f"time; make them plain functions, or {_ELSEWHERE}",
                "on_task",
            )


def _check_executor(executor: concurrent.futures.Executor) -> None:
    from ..executors.process import ProcessExecutor  # Only here: it loads what most workers never need.

    problem = ""
    if isinstance(executor, (ProcessExecutor, concurrent.futures.ProcessPoolExecutor)):
        problem = "waits for its processes in a way that stops every greenlet under gevent"
    elif type(executor).__module__.startswith("gevent."):
        problem = "runs handlers in threads of the system, where gevent's locks do not work"
    if problem:
        raise ConfigurationError(f"{type(executor).__name__} {problem}; leave it out, or {_ELSEWHERE}", "executor")
