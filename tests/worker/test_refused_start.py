"""A start() that is refused leaves the worker as it was."""

from __future__ import annotations

from typing import Any, Callable, List

import pytest

from sekuire import Worker
from sekuire.errors import ConfigurationError
from sekuire.executors import ProcessExecutor

from ..support.scripted import Scripted

Make = Callable[..., Worker]

_pickled: List[str] = []


class Counted:
    """A handler that notes each time it is pickled."""

    def __call__(self, ctx: Any, input: Any) -> Any:
        return input

    def __reduce__(self) -> Any:
        _pickled.append("once")
        return Counted, ()


def test_handlers_may_be_added_after_it(scripted: Scripted, worker_of: Make) -> None:
    """Nothing has started, so on_task() and include() still register."""
    worker = worker_of(scripted, policy_required=True)
    worker.on_task("one", lambda ctx, input: 1)
    with pytest.raises(ConfigurationError, match="policy_required"):
        worker.start()
    worker.on_task("two", lambda ctx, input: 2)
    assert worker.capabilities == ("one", "two")


def test_with_a_handler_that_cannot_be_sent(scripted: Scripted, worker_of: Make) -> None:
    """A handler that no process can be given is refused, and others can still be registered."""
    with ProcessExecutor(1) as executor:
        worker = worker_of(scripted, executor=executor, max_workers=1)
        worker.on_task("one", lambda ctx, input: 1)
        with pytest.raises(ConfigurationError, match="cannot be sent"):
            worker.start()
        worker.on_task("two", Counted())
        assert worker.capabilities == ("one", "two")


def test_a_handler_is_pickled_once(scripted: Scripted, worker_of: Make) -> None:
    """The start pickles each handler once for the executor's processes."""
    _pickled.clear()
    with ProcessExecutor(1) as executor:
        worker = worker_of(scripted, executor=executor, max_workers=1)
        worker.on_task("echo", Counted())
        with worker:
            assert len(_pickled) == 1
