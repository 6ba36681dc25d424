"""Run AI agents' tasks under Sekuire's governance, with a worker that runs handlers in threads. ::

    from sekuire import create_worker

    worker = create_worker(agent_id="support-agent", install_token="skt_install_...")

    @worker.on_task("shorten")
    def shorten(ctx, input):
        return {"text": input["text"][:100]}

    worker.start(block=True)

Importing this package loads none of its modules. Each public name is loaded when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib

from .version import __version__

#: Type checkers read it as True. typing itself takes longer to import than this module.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, List

    from . import errors
    from .beacon import Beacon
    from .client import SekuireClient, TaskHandle, TaskProgress
    from .config import WorkerConfig
    from .credentials import RuntimeCredentialsStore
    from .errors import SekuireError, TaskCancelled, TaskError, TaskFailed, TaskTimeout
    from .executors.process import ProcessExecutor
    from .executors.remote import RemoteExecutor, RemoteTaskContext
    from .handlers.context import TaskContext
    from .handlers.invoke import CallNext, Handler, Middleware
    from .handlers.registry import TaskRegistry
    from .policy.client import PolicyClient
    from .policy.document import Policy
    from .policy.enforcer import PolicyEnforcer
    from .policy.gateway import PolicyGateway
    from .sdk import SekuireSDK
    from .wire.models import BeaconStatus, Command, RuntimeCredentials, WorkerHealth, WorkerStats
    from .worker.worker import Worker, create_worker

__all__ = [
    "Beacon",
    "BeaconStatus",
    "CallNext",
    "Command",
    "Handler",
    "Middleware",
    "Policy",
    "PolicyClient",
    "PolicyEnforcer",
    "PolicyGateway",
    "ProcessExecutor",
    "RemoteExecutor",
    "RemoteTaskContext",
    "RuntimeCredentials",
    "RuntimeCredentialsStore",
    "SekuireClient",
    "SekuireError",
    "SekuireSDK",
    "TaskCancelled",
    "TaskContext",
    "TaskError",
    "TaskFailed",
    "TaskHandle",
    "TaskProgress",
    "TaskRegistry",
    "TaskTimeout",
    "Worker",
    "WorkerConfig",
    "WorkerHealth",
    "WorkerStats",
    "__version__",
    "create_worker",
    "errors",
]

#: The module of each public name. The empty text: the name is itself a module.
_HOMES = {
    "Beacon": "beacon",
    "BeaconStatus": "wire.models",
    "CallNext": "handlers.invoke",
    "Command": "wire.models",
    "Handler": "handlers.invoke",
    "Middleware": "handlers.invoke",
    "Policy": "policy.document",
    "PolicyClient": "policy.client",
    "PolicyEnforcer": "policy.enforcer",
    "PolicyGateway": "policy.gateway",
    "ProcessExecutor": "executors.process",
    "RemoteExecutor": "executors.remote",
    "RemoteTaskContext": "executors.remote",
    "RuntimeCredentials": "wire.models",
    "RuntimeCredentialsStore": "credentials",
    "SekuireClient": "client",
    "SekuireError": "errors",
    "SekuireSDK": "sdk",
    "TaskCancelled": "errors",
    "TaskContext": "handlers.context",
    "TaskError": "errors",
    "TaskFailed": "errors",
    "TaskHandle": "client",
    "TaskProgress": "client",
    "TaskRegistry": "handlers.registry",
    "TaskTimeout": "errors",
    "Worker": "worker.worker",
    "WorkerConfig": "config",
    "WorkerHealth": "wire.models",
    "WorkerStats": "wire.models",
    "create_worker": "worker.worker",
    "errors": "",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{home or name}")
    value = getattr(module, name) if home else module
    # The next look-up finds it without a call of this function.
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})
