"""Values of pandas in results."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sekuire import TaskRegistry
from sekuire.testing import run_task

pytestmark = pytest.mark.full

pandas = pytest.importorskip("pandas")

FRAME = pandas.DataFrame({"when": pandas.to_datetime(["2024-02-29T12:00:00.5", None]), "count": [1, 2]})


def result_of(value: Any) -> Any:
    tasks = TaskRegistry()

    @tasks.task("report")
    def report(ctx: Any, input: Any) -> Any:
        return {"it": value}

    return run_task(tasks, "report")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (pandas.Timestamp("2024-02-29T12:00:00Z"), "2024-02-29T12:00:00+00:00"),
        (pandas.Timestamp("2024-02-29", tz="Europe/Berlin"), "2024-02-29T00:00:00+01:00"),
        (pandas.Timestamp("2024-02-29T00:00:00.123456789"), "2024-02-29T00:00:00.123456789"),
        ([pandas.NaT, pandas.NA], [None, None]),
        (
            FRAME.to_dict("records"),
            [{"when": "2024-02-29T12:00:00.500000", "count": 1}, {"when": None, "count": 2}],
        ),
        (FRAME["when"].tolist(), ["2024-02-29T12:00:00.500000", None]),
        (FRAME["when"].to_numpy(), ["2024-02-29T12:00:00.500000", None]),
        (FRAME["count"].to_numpy(), [1, 2]),
    ],
    ids=str,
)
def test_times_and_missing_values(value: Any, wanted: Any) -> None:
    """A Timestamp becomes its text, and what is missing null, alone and in what a frame gives."""
    found = result_of(value).value["it"]
    assert found == wanted
    json.dumps(found)


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (FRAME, "output.it is a DataFrame; return value.to_dict('records')"),
        (FRAME["count"], "output.it is a Series; return value.tolist()"),
        (FRAME.index, "output.it is a RangeIndex; return value.tolist()"),
        (pandas.Timedelta("1D"), "output.it is a Timedelta; return value.total_seconds()"),
    ],
    ids=["frame", "series", "index", "timedelta"],
)
def test_what_to_return_in_place_of_it(value: Any, advice: str) -> None:
    """What has no agreed form is refused, with what has one."""
    error = result_of(value).error
    assert error is not None
    assert error.message == f"the handler's result has no JSON form: report: {advice}"
