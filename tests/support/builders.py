"""Build the values that tests need, with defaults for whatever a test does not care about."""

from __future__ import annotations

from typing import Any

from sekuire import TaskContext, TaskRegistry
from sekuire.config import WorkerConfig
from sekuire.wire.models import Completion, Task

AGENT = "agent-1"
#: An address that nothing listens on.
NOWHERE = "http://127.0.0.1:9"


def config_of(**options: Any) -> WorkerConfig:
    """Return the configuration of a worker that could log in."""
    return WorkerConfig(**{"agent_id": AGENT, "install_token": "skt-1", "api_base_url": NOWHERE, **options})


def task_of(task_id: str = "t1", capability: str = "echo", **fields: Any) -> Task:
    """Return a task as the platform delivers it."""
    return Task(task_id=task_id, capability=capability, **fields)


def tasks_of(**handlers: Any) -> TaskRegistry:
    """Return a registry of these handlers, by their capabilities."""
    tasks = TaskRegistry()
    for name, handler in handlers.items():
        tasks.task(name, handler)
    return tasks


def context_of(task_id: str = "t1", capability: str = "echo", **fields: Any) -> TaskContext:
    """Return the context of a task that no worker runs."""
    return TaskContext(task_of(task_id, capability, **fields))


def completion_of(task_id: str = "t1", attempt: int = 1, **fields: Any) -> Completion:
    """Return the result of a task, without an output unless one is given."""
    return Completion(task_id=task_id, attempt=attempt, **fields)
