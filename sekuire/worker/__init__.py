"""Receive tasks, run their handlers and report the results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._internal import lazy

if TYPE_CHECKING:
    from .worker import Worker as Worker
    from .worker import create_worker as create_worker

__all__ = ["Worker", "create_worker"]

#: Public name → the module that defines it.
_HOMES = {
    "Worker": "worker",
    "create_worker": "worker",
}

__getattr__, __dir__ = lazy.names_of(__name__, _HOMES)
