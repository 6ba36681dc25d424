"""Describe a worker to the platform: in the stream's query and in heartbeats."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

from ..config import WorkerConfig
from ..handlers.capabilities import describe
from ..handlers.registry import TaskRegistry
from ..wire import protocol
from ..wire.models import WorkerReport

#: Most capabilities that a line names.
_MOST_NAMED = 8


class Profile:
    """Describe one worker: its id, its capabilities and how many tasks it can hold."""

    # Threads: any thread may call anything. The Worker may replace `config` before it starts. From then on neither that
    # nor the registry changes.

    def __init__(self, config: WorkerConfig, worker_id: str, registry: TaskRegistry) -> None:
        self.config = config
        self.worker_id = worker_id
        self._registry = registry

    @property
    def capabilities(self) -> Tuple[str, ...]:
        """Return the declared capabilities and those that have a handler."""
        return tuple(dict.fromkeys((*self.config.capabilities, *self._registry.names)))

    def names(self) -> str:
        """Return the capabilities as a line of a log names them."""
        names = [*self.capabilities, *(["*"] if self._registry.has_catch_all else ())]
        more = len(names) - _MOST_NAMED
        return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")

    def describe(self) -> List[Dict[str, Any]]:
        """Return what is known of each capability, for people and the platform."""
        handlers = {entry.name: entry.function for entry in self._registry}
        return describe((name, handlers.get(name)) for name in self.capabilities)

    def stream_query(self, installation_id: Optional[str]) -> str:
        """Return the query with which the task stream is opened."""
        return protocol.stream_query(
            self.config.agent_id,
            installation_id,
            self.worker_id,
            self.config.max_workers + self.config.queue_size,
            () if self._registry.has_catch_all else self.capabilities,
        )

    def report(self, status: str, active_tasks: int) -> WorkerReport:
        """Return this worker's part of a heartbeat."""
        return WorkerReport(
            worker_id=self.worker_id,
            status=status,
            active_tasks=active_tasks,
            capabilities=self.capabilities,
        )
