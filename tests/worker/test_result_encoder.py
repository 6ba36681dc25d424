"""Results that are not JSON: the user's encoder, and what is said where there is none."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any, Callable, Iterator, List, Optional

import pytest

from sekuire import SekuireSDK, TaskError, TaskRegistry, create_worker
from sekuire.errors import TaskFailed
from sekuire.testing import Workbench, run_task, wait_idle
from sekuire.wire.jsonform import to_json

from ..support.builders import NOWHERE

Encoder = Callable[[Any], Any]

UNKNOWN = (
    "of type object; return dicts, lists, texts, numbers or instances of classes with fields (result_encoder does not"
    " know it)"
)


class Money:
    """A class without fields that anyone declared."""

    def __init__(self, cents: int) -> None:
        self.cents = cents


def encoder(value: Any) -> Any:
    if isinstance(value, Money):
        return {"cents": value.cents, "at": dt.date(2024, 2, 29)}
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, complex):
        return value
    if isinstance(value, dt.timedelta):
        return 1 / 0
    if isinstance(value, range):
        return [value[0], object()]
    raise TypeError(f"secret: {value!r}")


@pytest.fixture
def bench() -> Iterator[Workbench]:
    with Workbench() as bench:
        yield bench


def tasks_of(value: Any) -> TaskRegistry:
    tasks = TaskRegistry()

    @tasks.task("report")
    def report(ctx: Any, input: Any) -> Any:
        return {"rows": [value]}

    return tasks


def error_of(value: Any, encode: Optional[Encoder] = encoder) -> str:
    worker = create_worker(agent_id="a", api_base_url=NOWHERE, install_token="skt_x", result_encoder=encode)
    worker.include(tasks_of(value))
    error = run_task(worker, "report").error
    assert error is not None
    assert error.code == "result_not_serializable"
    return error.message.partition("report: ")[2]


def test_an_encoder(bench: Workbench) -> None:
    """What it returns is the result, at any depth, and may itself hold what is not JSON."""
    worker = bench.worker(tasks_of(Money(5)), result_encoder=encoder)
    task_id = bench.platform.submit("report", None)
    wait_idle(worker)
    task = bench.platform.task(task_id)
    assert task["output"] == {"rows": [{"cents": 5, "at": "2024-02-29"}]}


def test_an_encoder_of_the_sdk(bench: Workbench) -> None:
    """An SDK gives it to its workers, unless one has its own."""
    token = bench.platform.create_install_token("agent", max_uses=2)
    with SekuireSDK("agent", api_base_url=bench.platform.url, install_token=token, result_encoder=encoder) as sdk:
        for options, wanted in (({}, "5"), ({"result_encoder": lambda value: "own"}, "own")):
            worker = sdk.create_task_worker(**options)
            worker.include(tasks_of(b"5"))
            with worker:
                task = bench.platform.wait(bench.platform.submit("report", None, "agent"), 30)
            assert task["output"] == {"rows": [wanted]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), f"output.rows[0] is {UNKNOWN}"),
        (1j, "output.rows[0], a complex: result_encoder returned it unchanged"),
        (dt.timedelta(1), "output.rows[0], a timedelta: result_encoder raised ZeroDivisionError"),
        (range(3), f"output.rows[0][1] is {UNKNOWN}"),
    ],
    ids=["unknown", "unchanged", "error", "inside"],
)
def test_what_an_encoder_cannot_do(value: Any, message: str) -> None:
    """The error names the place and what the encoder did, without a value or the text of its error."""
    assert error_of(value) == message


def test_an_encoder_without_an_end() -> None:
    """One that always returns something new ends the task, and not the worker."""
    assert error_of(object(), lambda value: object()) == "output is nested too deep"


def test_an_encoder_is_not_asked_for_what_is_json() -> None:
    """It gets only what has no form, so that it cannot change the others."""
    seen: List[Any] = []

    def note(value: Any) -> Any:
        seen.append(value)
        return None

    assert to_json({"a": [1, dt.date(2024, 1, 1), {2}, b"x"]}, note) == {"a": [1, "2024-01-01", [2], None]}
    assert seen == [b"x"]


def test_details_of_a_failure_are_not_encoded() -> None:
    """They were searched for secrets before, and must be plain."""
    worker = create_worker(agent_id="a", api_base_url=NOWHERE, install_token="skt_x", result_encoder=encoder)

    @worker.on_task("report")
    def report(ctx: Any, input: Any) -> Any:
        raise TaskError("bad", details={"price": Money(5)})

    error = run_task(worker, "report").error
    assert error is not None
    assert (error.code, "error.details.price is of type Money" in error.message) == ("result_not_serializable", True)


def test_a_timedelta() -> None:
    """Without an encoder the message says what to return."""
    assert error_of(dt.timedelta(1), None) == "output.rows[0] is a timedelta; return value.total_seconds()"


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("numpy.datetime64('2024-02-29T12:00:00', 'ns')", "2024-02-29T12:00:00"),
        ("numpy.datetime64('2024-02-29T12:00:00.123456789')", "2024-02-29T12:00:00.123456789"),
        ("numpy.datetime64('2024-02-29T12:00:00.25', 'ms')", "2024-02-29T12:00:00.250000"),
        ("numpy.datetime64('2024-02')", "2024-02-01"),
        ("numpy.datetime64('12024-02-29')", "12024-02-29"),
        ("numpy.datetime64('NaT', 'ns')", None),
        ("numpy.array(['2024-02-29', 'NaT'], 'M8[ns]')", ["2024-02-29T00:00:00", None]),
        ("numpy.array([['2024-02-29'], ['2024-03-01']], 'M8[D]')", [["2024-02-29"], ["2024-03-01"]]),
    ],
)
def test_dates_of_numpy(value: str, wanted: Any) -> None:
    """They are dates whatever unit they are counted in, and never bare numbers."""
    found = to_json(eval(value, {"numpy": pytest.importorskip("numpy")}))
    assert found == wanted
    json.dumps(found)


@pytest.mark.parametrize("value", ["numpy.timedelta64(5, 'ns')", "numpy.array([5], 'm8[ns]')"])
def test_durations_of_numpy(value: str) -> None:
    """They have no agreed form, in whatever unit, as a timedelta has none."""
    with pytest.raises(TypeError, match="has no JSON form"):
        to_json(eval(value, {"numpy": pytest.importorskip("numpy")}))


def test_the_value_of_a_result() -> None:
    """It is the output, or raises what the requester gets, with what the handler raised as its cause."""
    tasks = tasks_of(5)

    @tasks.task("fail")
    def fail(ctx: Any, input: Any) -> Any:
        raise TaskError("no_luck", "not today", True, {"tomorrow": True})

    @tasks.task("break")
    def broken(ctx: Any, input: Any) -> Any:
        return {}["x"]

    assert run_task(tasks, "report").value == {"rows": [5]}
    with pytest.raises(TaskFailed, match="no_luck: not today") as caught:
        _ = run_task(tasks, "fail").value
    assert (caught.value.code, caught.value.retryable, caught.value.details) == ("no_luck", True, {"tomorrow": True})
    assert isinstance(caught.value.__cause__, TaskError)
    with pytest.raises(TaskFailed, match="handler_error: KeyError") as caught:
        _ = run_task(tasks, "break").value
    assert isinstance(caught.value.__cause__, KeyError)
