"""Record audit events and send them to the platform in batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._internal import lazy

if TYPE_CHECKING:
    from .log import AuditHandler as AuditHandler
    from .log import AuditLog as AuditLog
    from .log import AuditStats as AuditStats

__all__ = ["AuditHandler", "AuditLog", "AuditStats"]

#: Public name → the module that defines it.
_HOMES = {
    "AuditHandler": "log",
    "AuditLog": "log",
    "AuditStats": "log",
}

__getattr__, __dir__ = lazy.names_of(__name__, _HOMES)
