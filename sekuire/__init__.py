"""Run AI agents' tasks under Sekuire's governance: a synchronous, thread-based worker."""

from . import errors
from .beacon import Beacon
from .calls import CallNext, Handler, Middleware
from .config import WorkerConfig
from .context import TaskContext
from .credentials import RuntimeCredentialsStore
from .errors import SekuireError, TaskCancelled, TaskError
from .models import BeaconStatus, Command, RuntimeCredentials, WorkerStats
from .registry import TaskRegistry
from .sdk import SekuireSDK
from .version import __version__
from .worker import Worker, create_worker

__all__ = [
    "Beacon",
    "BeaconStatus",
    "CallNext",
    "Command",
    "Handler",
    "Middleware",
    "RuntimeCredentials",
    "RuntimeCredentialsStore",
    "SekuireError",
    "SekuireSDK",
    "TaskCancelled",
    "TaskContext",
    "TaskError",
    "TaskRegistry",
    "Worker",
    "WorkerConfig",
    "WorkerStats",
    "__version__",
    "create_worker",
    "errors",
]
