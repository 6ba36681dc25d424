"""Record audit events and send them to the platform in batches.

``log`` notes what users and the library report, ``buffer`` holds it, ``sender`` sends it on a thread of its own, and
``handler`` makes events of the records of Python's logging.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._internal import lazy

if TYPE_CHECKING:
    from .buffer import AuditStats as AuditStats
    from .handler import AuditHandler as AuditHandler
    from .log import AuditLog as AuditLog

__all__ = ["AuditHandler", "AuditLog", "AuditStats"]

#: Public name → the module that defines it.
_HOMES = {
    "AuditHandler": "handler",
    "AuditLog": "log",
    "AuditStats": "buffer",
}

__getattr__, __dir__ = lazy.names_of(__name__, _HOMES)
