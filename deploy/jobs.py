"""The handlers of this example's agent. Put yours here."""

from __future__ import annotations

import time
from typing import Any, Dict

from sekuire import TaskContext, TaskRegistry

tasks = TaskRegistry()


@tasks.task("greet")
def greet(ctx: TaskContext, input: Dict[str, Any]) -> Dict[str, str]:
    """Greet somebody by name."""
    time.sleep(0.05)
    return {"greeting": f"Hello, {input['name']}!"}
