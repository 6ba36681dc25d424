"""Declare handlers, build their input, call them, and turn their end into a result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._internal import lazy

if TYPE_CHECKING:
    from .context import TaskContext as TaskContext
    from .invoke import CallNext as CallNext
    from .invoke import Handler as Handler
    from .invoke import Middleware as Middleware
    from .registry import TaskRegistry as TaskRegistry

__all__ = ["CallNext", "Handler", "Middleware", "TaskContext", "TaskRegistry"]

#: Public name → the module that defines it.
_HOMES = {
    "CallNext": "invoke",
    "Handler": "invoke",
    "Middleware": "invoke",
    "TaskContext": "context",
    "TaskRegistry": "registry",
}

__getattr__, __dir__ = lazy.names_of(__name__, _HOMES)
