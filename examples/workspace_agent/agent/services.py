"""Stand in for the office's services, in memory. Replace each by a client of a real one: handlers stay as they are."""

import threading
from dataclasses import dataclass, field
from typing import Any, Dict, List

from sekuire import TaskError, TaskRegistry

tasks = TaskRegistry()


@dataclass
class Document:
    document_id: str
    title: str
    text: str = ""


@dataclass
class Sheet:
    sheet_id: str
    columns: List[str]
    rows: List[List[Any]] = field(default_factory=list)


class Table:
    """Keep things by id. Handlers run in several threads, so one lock guards each table."""

    def __init__(self, kind):
        self.kind = kind
        self.lock = threading.Lock()
        self._things: Dict[str, Any] = {}

    def get(self, name):
        with self.lock:
            if name not in self._things:
                raise TaskError(f"no_such_{self.kind}", f"there is no {self.kind} {name!r}")
            return self._things[name]

    def add(self, name, thing):
        """Add a thing. Return the one that is there already, so that adding it again changes nothing."""
        with self.lock:
            return self._things.setdefault(name, thing)

    def all(self):
        with self.lock:
            return list(self._things.values())


@tasks.resource
def documents():
    yield Table("document")


@tasks.resource
def sheets():
    yield Table("sheet")


@tasks.resource
def outbox():
    """The mail that has been sent."""
    yield Table("message")
