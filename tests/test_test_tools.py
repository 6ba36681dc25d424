"""Tools that freeze time or answer HTTP calls themselves, around handlers, workers and the local platform."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import importlib.util
import pathlib
import socket
import subprocess
import sys
import textwrap
import threading
import time
from email.utils import parsedate_to_datetime
from typing import Any, Callable, Iterator

import pytest
import requests
import urllib3

from sekuire import SekuireSDK, TaskRegistry
from sekuire._internal.clock import RealTime, use_real_time
from sekuire.config import ConnectionConfig
from sekuire.local import LocalPlatform
from sekuire.testing import Workbench, run_task, wait_idle
from sekuire.transport.http import HttpClient

from .support.waiting import GUARD, until

URL = "http://model.example/answer"
CASSETTE = f"""
version: 1
interactions:
- request: {{body: null, headers: {{}}, method: GET, uri: "{URL}"}}
  response: {{body: {{string: "42"}}, headers: {{}}, status: {{code: 200, message: OK}}}}
"""

tasks = TaskRegistry()


@tasks.task("ask")
def ask(ctx: Any, input: Any) -> str:
    return requests.get(URL, timeout=5).text


@tasks.task("year")
def year(ctx: Any, input: Any) -> Any:
    left = None if ctx.deadline is None else (ctx.deadline - dt.datetime.now(dt.timezone.utc)).total_seconds()
    return [dt.datetime.now().year, time.gmtime(time.time()).tm_year, left]


@tasks.task("sleep")
async def sleep(ctx: Any, input: Any) -> int:
    await asyncio.wait_for(asyncio.sleep(0.01), 4 * GUARD)
    return dt.datetime.now().year


@tasks.task("wait")
def wait(ctx: Any, input: Any) -> None:
    ctx.wait_cancelled(4 * GUARD)
    ctx.raise_if_cancelled()


@pytest.fixture
def bench() -> Iterator[Workbench]:
    with Workbench() as bench:
        yield bench


# -- HTTP -------------------------------------------------------------------------------------------------------------


def with_responses(path: pathlib.Path) -> Any:
    responses = pytest.importorskip("responses")
    mock = responses.RequestsMock(assert_all_requests_are_fired=False)
    mock.add("GET", URL, body="42")
    return mock


def with_requests_mock(path: pathlib.Path) -> Any:
    mock = pytest.importorskip("requests_mock").Mocker()
    mock.get(URL, text="42")
    return mock


#: VCR.py replaces a class of urllib3 1 that the classes of others refer to by its name, so that their requests fail.
HAS_VCR = importlib.util.find_spec("vcr") is not None and int(urllib3.__version__.partition(".")[0]) >= 2


def with_vcr(mode: str) -> Callable[[pathlib.Path], Any]:
    def make(path: pathlib.Path) -> Any:
        if not HAS_VCR:
            pytest.skip("VCR.py needs urllib3 2 here")
        vcr = pytest.importorskip("vcr")
        path.write_text(CASSETTE)
        return vcr.use_cassette(str(path), record_mode=mode, allow_playback_repeats=True)

    return make


TOOLS = [with_responses, with_requests_mock, with_vcr("none"), with_vcr("once"), with_vcr("new_episodes")]
NAMES = ["responses", "requests-mock", "vcr-none", "vcr-once", "vcr-new"]


@pytest.mark.parametrize("tool", TOOLS, ids=NAMES)
def test_http_of_a_worker(bench: Workbench, tmp_path: pathlib.Path, tool: Any) -> None:
    """The handler gets the tool's answer. The worker speaks to the platform, and nothing of that is recorded."""
    path = tmp_path / "cassette.yaml"
    with tool(path):
        worker = bench.worker(tasks)
        first = bench.platform.submit("ask", None)
        wait_idle(worker)
        bench.platform.expire_tokens()
        bench.platform.drop_streams()
        second = bench.platform.submit("ask", None)
        done = [bench.platform.wait(task_id, timeout=GUARD) for task_id in (first, second)]
        assert [one["output"] for one in done] == ["42", "42"], done
        worker.stop()
    if path.exists():
        assert path.read_text().count("uri:") == 1


@pytest.mark.parametrize("tool", TOOLS, ids=NAMES)
def test_http_of_a_worker_that_runs_already(bench: Workbench, tmp_path: pathlib.Path, tool: Any) -> None:
    """A tool that comes while connections are open changes nothing for them."""
    worker = bench.worker(tasks)
    assert worker.wait_until_connected(GUARD)
    with tool(tmp_path / "cassette.yaml"):
        done = bench.platform.wait(bench.platform.submit("ask", None), timeout=GUARD)
        assert done["output"] == "42", done
        bench.platform.drop_streams()
        done = bench.platform.wait(bench.platform.submit("ask", None), timeout=GUARD)
        assert done["output"] == "42", done


@pytest.mark.parametrize("tool", TOOLS, ids=NAMES)
def test_http_of_an_sdk(bench: Workbench, tmp_path: pathlib.Path, tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats and audit events reach the platform too."""
    for name, value in bench.environment().items():
        monkeypatch.setenv(name, value)
    with tool(tmp_path / "cassette.yaml"):
        with SekuireSDK.from_env() as sdk:
            sdk.log("health", {"a": 1})
        assert bench.platform.logs("health")


def test_mocks_of_another_platform() -> None:
    """A platform that is not on this machine can be mocked, as any other service."""
    responses = pytest.importorskip("responses")
    with responses.RequestsMock() as mock:
        mock.add("GET", "https://api.sekuire.ai/healthz", body="mocked")
        http = HttpClient(ConnectionConfig(api_base_url="https://api.sekuire.ai"))
        try:
            assert http.request("GET", "/healthz").body == b"mocked"
        finally:
            http.close()


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def frozen() -> Any:
    return pytest.importorskip("freezegun").freeze_time


def test_a_handler_in_frozen_time(frozen: Any) -> None:
    """It sees the frozen time, and a deadline by that time; its timeout ends it all the same."""
    with frozen("2020-02-29"):
        assert run_task(tasks, "year").output == [2020, 2020, None]
        assert run_task(tasks, "sleep").output == 2020
        left = run_task(tasks, "year", timeout=4 * GUARD).output[2]
        assert 0 < left <= 4 * GUARD
        error = run_task(tasks, "wait", timeout=0.05).error
    assert error is not None
    assert error.code == "timeout"


@pytest.mark.parametrize("is_frozen_first", [True, False])
def test_a_worker_in_frozen_time(frozen: Any, is_frozen_first: bool) -> None:
    """Heartbeats, time limits, renewed tokens, waits and the stop go on; handlers see the frozen time."""
    with contextlib.ExitStack() as stack:
        if is_frozen_first:
            clock = stack.enter_context(frozen("2020-02-29"))
        bench = stack.enter_context(Workbench())
        worker = bench.worker(tasks, heartbeat_interval=0.1)
        assert worker.wait_until_connected(GUARD)
        if not is_frozen_first:
            clock = stack.enter_context(frozen("2020-02-29"))
        platform = bench.platform
        assert platform.wait(platform.submit("year", None), timeout=GUARD)["output"][0] == 2020
        beats = platform.count("heartbeat", 200)
        until(lambda: platform.count("heartbeat", 200) > beats + 1)
        late = platform.wait(platform.submit("wait", None, timeout_ms=50), timeout=GUARD)
        assert late["error"]["code"] == "timeout"
        platform.expire_tokens()
        platform.drop_streams()
        clock.tick(dt.timedelta(days=366))
        assert platform.wait(platform.submit("year", None), timeout=GUARD)["output"][0] == 2021
        with pytest.raises(TimeoutError):
            platform.wait(platform.submit("year", None, agent_id="nobody"), timeout=0.05)
        worker.stop(timeout=GUARD)
        assert not worker.is_running()


@pytest.mark.parametrize("year", ["2020-02-29", "2040-02-29"])
def test_a_lease_in_frozen_time(frozen: Any, year: str) -> None:
    """The local platform's answers have the real time in their Date too, or a lease would end never, or at once."""
    with frozen(year), LocalPlatform() as platform:
        dates = [requests.get(f"{platform.url}/api/v1/tasks", timeout=GUARD).headers["Date"]]
        with socket.create_connection(("127.0.0.1", int(platform.url.rpartition(":")[2]))) as malformed:
            malformed.sendall(b"GET\r\n\r\n")
            dates += [line[6:] for line in malformed.makefile("r").read().splitlines() if line.startswith("Date: ")]
    assert len(dates) == 2
    for date in dates:
        assert abs(parsedate_to_datetime(date).timestamp() - RealTime().time()) < GUARD


def test_the_clocks_are_the_real_ones(frozen: Any) -> None:
    """Also where the library is imported while time is frozen. A frozen clock stands still."""
    with frozen("2020-02-29"):
        real = RealTime()
        assert time.time() == time.time() < real.time()
        began = real.monotonic()
        real.sleep(0.01)
        assert real.monotonic() > began


def test_sleep_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gevent replaces it, maybe after the library was imported."""
    slept = threading.Event()
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.set())
    RealTime().sleep(3600)
    assert slept.is_set()


def test_a_loop_with_a_clock_of_its_own(frozen: Any) -> None:
    """A loop that is not asyncio's own is left alone."""

    class Loop:
        __slots__ = ()

    with frozen("2020-02-29"):
        use_real_time(Loop())


@pytest.mark.slow
def test_tools_that_begin_before_the_fixtures(tmp_path: pathlib.Path) -> None:
    """The plugin imports the library before the first test, so a fixture may come after what freezes or records."""
    for name in ("freezegun", "responses", "vcr"):
        pytest.importorskip(name)
    (tmp_path / "cassette.yaml").write_text(CASSETTE)
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
            import datetime, freezegun, pytest, responses, sys, vcr

            @pytest.fixture(params=TOOLS)
            def tool(request):
                made = {
                    "time": lambda: freezegun.freeze_time("2020-02-29"),
                    "responses": lambda: responses.RequestsMock(),
                    "vcr": lambda: vcr.use_cassette("cassette.yaml", record_mode="none"),
                }
                with made[request.param]():
                    yield request.param

            def test_it(tool, sekuire_platform, sekuire_worker):
                worker = sekuire_worker({"year": lambda ctx, input: datetime.date.today().year}, heartbeat_interval=0.1)
                done = sekuire_platform.wait(sekuire_platform.submit("year", None), timeout=30)
                assert (done["output"] == 2020) is (tool == "time")
                sekuire_platform.wait(sekuire_platform.submit("year", None), timeout=30)

            def test_other(request):
                assert "sekuire.testing" in sys.modules
        """).replace("TOOLS", repr(["time", "responses", *(["vcr"] if HAS_VCR else [])]))
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=4 * GUARD,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert f"{4 if HAS_VCR else 3} passed" in done.stdout
