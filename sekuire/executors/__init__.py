"""Run handlers in other processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._internal import lazy

if TYPE_CHECKING:
    from .backends import RemoteExecutor as RemoteExecutor
    from .process import ProcessDied as ProcessDied
    from .process import ProcessExecutor as ProcessExecutor
    from .remote import RemoteTaskContext as RemoteTaskContext

__all__ = ["ProcessDied", "ProcessExecutor", "RemoteExecutor", "RemoteTaskContext"]

#: Public name → the module that defines it.
_HOMES = {
    "ProcessDied": "process",
    "ProcessExecutor": "process",
    "RemoteExecutor": "backends",
    "RemoteTaskContext": "remote",
}

__getattr__, __dir__ = lazy.names_of(__name__, _HOMES)
