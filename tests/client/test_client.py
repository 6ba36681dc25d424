"""SekuireClient: submitting exactly once, waiting cheaply, and saying what is wrong."""

from __future__ import annotations

import copy
import os
import pathlib
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from sekuire import SekuireClient, SekuireSDK, TaskError, TaskHandle, TaskProgress, errors
from sekuire.errors import (
    APIError,
    ConfigurationError,
    RevokedError,
    SekuireError,
    TaskFailed,
    TaskTimeout,
    TransportError,
)
from sekuire.local import LocalPlatform

from ..chaos.proxy import CALL_FAULTS, FaultProxy, Rule
from ..conftest import AGENT
from ..docs.markdown import blocks
from ..support.builders import NOWHERE
from ..support.servers import Answer, Request, WebServer
from ..support.waiting import GUARD, until

Make = Callable[..., SekuireClient]


@pytest.fixture
def client_of() -> Iterator[Make]:
    """Clients of a platform or a URL, closed at the end."""
    made: List[SekuireClient] = []

    def make(platform: Any, **options: Any) -> SekuireClient:
        url = platform if isinstance(platform, str) else platform.url
        key = getattr(platform, "api_key", "sk_live_test")
        client = SekuireClient(**{"api_base_url": url, "api_key": key, "agent_id": AGENT, **options})
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(platform: LocalPlatform, client_of: Make) -> SekuireClient:
    return client_of(platform)


@pytest.fixture
def working(platform: LocalPlatform, worker_of: Any) -> Any:
    """A worker that echoes, fails, reports progress and waits for ``release``."""
    worker = worker_of(platform)
    release = threading.Event()

    @worker.on_task("echo")
    def echo(ctx: Any, input: Any) -> Any:
        return {"got": input, "trace": ctx.trace_id}

    @worker.on_task("fail")
    def fail(ctx: Any, input: Any) -> Any:
        raise TaskError("no_luck", "not today", True, {"tomorrow": True})

    @worker.on_task("wait")
    def wait(ctx: Any, input: Any) -> Any:
        ctx.report_progress(0.5, "half")
        release.wait(GUARD)
        return "waited"

    worker.start()
    yield release
    release.set()


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith("SEKUIRE_"):
            monkeypatch.delenv(name)
    return monkeypatch


# -- submitting -------------------------------------------------------------------------------------------------------


def test_call(client: SekuireClient, working: Any) -> None:
    """It returns the output of the task."""
    assert client.call("echo", {"n": 1}, trace_id="trace-1") == {"got": {"n": 1}, "trace": "trace-1"}


def test_a_task_that_fails(client: SekuireClient, working: Any) -> None:
    """The error has what the handler said."""
    with pytest.raises(TaskFailed) as caught:
        client.call("fail")
    error = caught.value
    assert (error.code, error.message, error.retryable, error.details) == (
        "no_luck",
        "not today",
        True,
        {"tomorrow": True},
    )
    assert error.task_id is not None
    assert str(error) == f"the task {error.task_id} failed: no_luck: not today"


def test_a_task_that_takes_longer(client: SekuireClient, working: Any) -> None:
    """The time to wait ends, the task goes on, and its id leads back to it."""
    with pytest.raises(TaskTimeout) as caught:
        client.call("wait", wait=0.2)
    assert "has no result yet (it is assigned)" in str(caught.value)
    working.set()
    assert client.handle(caught.value.task_id).result(GUARD) == "waited"


def test_the_fields_of_a_task(platform: LocalPlatform, client: SekuireClient) -> None:
    """All travel, with seconds as milliseconds."""
    before = time.time()
    handle = client.submit(
        "echo", [1], agent_id="other", delay=60.0, expires_in=120, timeout=1.5, max_attempts=3, trace_id="t",
        workspace_id="ws-1",
    )  # fmt: skip
    task = platform.task(handle.id)
    facts = {name: task[name] for name in ("agent_id", "timeout_ms", "max_attempts", "trace_id", "workspace_id")}
    assert facts == {
        "agent_id": "other",
        "timeout_ms": 1500,
        "max_attempts": 3,
        "trace_id": "t",
        "workspace_id": "ws-1",
    }
    assert task["available_at"] > task["created_at"]
    assert before < time.time()
    assert (handle.status(), handle.progress()) == ("queued", None)


def test_the_same_key_gets_the_same_task(client: SekuireClient) -> None:
    """Another task under the same key is refused."""
    first = client.submit("echo", 1, idempotency_key="order-1")
    assert client.submit("echo", 1, idempotency_key="order-1").id == first.id
    with pytest.raises(APIError, match="IDEMPOTENCY_KEY_REUSED"):
        client.submit("echo", 2, idempotency_key="order-1")


@pytest.mark.parametrize(
    "text",
    [
        "error:503",
        "error:502,when=after",
        "reset",
        "reset:when=after",
        "half-answer",
        "page:502,when=after",
        "page:401",
    ],
)
def test_one_task_for_each_submission(platform: LocalPlatform, client: SekuireClient, text: str) -> None:
    """Whatever happens to the request or the answer on the way."""
    fault = platform.faults.add(f"{text}{',' if ':' in text else ':'}times=2,on=tasks")
    handle = client.submit("echo", 1)
    assert fault.injected == 2
    assert [task["task_id"] for task in client.tasks()] == [handle.id]


def test_many_submissions_through_a_bad_network(make_platform: Any, client_of: Make) -> None:
    """Each makes one task, in the order of the items."""
    count = 300
    platform = make_platform(allowed_hosts=["127.0.0.1"])
    with FaultProxy(int(platform.url.rpartition(":")[2]), "client", longest_stall=0.2) as proxy:
        faults = {name: weight for name, weight in CALL_FAULTS.items() if "stall" not in name}
        proxy.rules = [Rule("/api/v1/tasks", 0.2, faults)]
        client = client_of(platform, api_base_url=f"http://127.0.0.1:{proxy.port}", read_timeout=2.0)
        items = ({"capability": "echo", "input": n} for n in range(count))
        handles = list(client.submit_many(items, max_in_flight=8))
    tasks = {task["task_id"]: task for task in client_of(platform).tasks()}
    assert len(tasks) == len(handles) == count
    assert [platform.task(handle.id)["input"] for handle in handles] == list(range(count))


def test_a_platform_that_is_not_there(client_of: Make) -> None:
    """The error says that the task may have been submitted, and how to find out."""
    client = client_of(NOWHERE, retry_for=0.3)
    with pytest.raises(TransportError, match=r"nothing was submitted \(does the platform run"):
        client.submit("echo", idempotency_key="order-7")
    with pytest.raises(TransportError, match=r"cannot reach 127\.0\.0\.1:9"):
        client.task("t")


def test_another_server(client_of: Make) -> None:
    """Its answers decide nothing, whatever they look like."""
    with WebServer(lambda request: Answer(200, b"<html>login</html>", [("Content-Type", "text/html")])) as web:
        client = client_of(web.url, retry_for=0.2)
        with pytest.raises(
            TransportError, match=r"that is another server: http.* answered 200, text/html.*; nothing was submitted"
        ):
            client.submit("echo")
    with WebServer(lambda request: Answer(200, {"status": "ok"})) as web:
        with pytest.raises(SekuireError, match="names no task_id; is the URL a Sekuire platform's"):
            client_of(web.url).submit("echo")


def test_a_wrong_key(platform: LocalPlatform, client_of: Make) -> None:
    """It is refused at once, and the error does not hold it."""
    with pytest.raises(APIError, match="HTTP 401 INVALID_API_KEY") as caught:
        client_of(platform, api_key="sk_live_canary").submit("echo")
    assert "canary" not in str(caught.value)


# -- many -------------------------------------------------------------------------------------------------------------


def test_submit_many_reads_its_items_as_they_are_needed(platform: LocalPlatform, client: SekuireClient) -> None:
    """So their number does not matter: no more are read than are in flight."""
    read = 0

    def items() -> Iterator[Dict[str, Any]]:
        nonlocal read
        while True:
            read += 1
            yield {"capability": "echo", "input": read}

    handles = client.submit_many(items(), max_in_flight=4)
    assert read == 0
    got = [next(handles) for _ in range(50)]
    assert [platform.task(handle.id)["input"] for handle in got] == list(range(1, 51))
    assert read <= 50 + 8
    handles.close()  # type: ignore[attr-defined]


def test_an_item_that_is_wrong(platform: LocalPlatform, client: SekuireClient) -> None:
    """The handles of those before it come first; then the error names its number."""
    items: List[Any] = [{"capability": "echo", "input": n} for n in range(2)] + [{"capability": "a,b"}, {}]
    handles = client.submit_many(items)
    # They are sent side by side, so the platform may have them in another order.
    assert [platform.task(next(handles).id)["input"] for _ in range(2)] == [0, 1]
    with pytest.raises(ConfigurationError, match=r"items\[2\].capability: 'a,b' cannot name a capability"):
        next(handles)


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"input": 1}, r"items\[0\].capability: is required"),
        ("echo", r"items\[0\]: must be a mapping"),
        ({"capability": "echo", "prio": 1}, r"items\[0\].prio: unknown field of a task"),
        (
            {"capability": "echo", "timeout_ms": 1},
            r"items\[0\].timeout_ms: unknown field of a task; use timeout \(seconds\)",
        ),
    ],
)
def test_items_that_are_wrong(client: SekuireClient, item: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        list(client.submit_many([item]))


def test_a_submission_among_many_that_is_refused(platform: LocalPlatform, client: SekuireClient) -> None:
    """Its error ends the iterator at its place."""
    handles = client.submit_many(
        [{"capability": "echo"}, {"capability": "echo", "max_attempts": 2_000_000}, {"capability": "echo"}]
    )
    assert isinstance(next(handles), TaskHandle)
    with pytest.raises(APIError, match="max_attempts"):
        next(handles)
    assert list(handles) == []


def test_the_readmes_script(
    platform: LocalPlatform, worker_of: Any, tmp_path: pathlib.Path, clean_environment: pytest.MonkeyPatch
) -> None:
    """It has fifteen lines, writes a result for each row, and submits nothing twice."""
    files = {block.marks["file"]: block.text for block in blocks("README.md") if "file" in block.marks}
    script = files["summarize_csv.py"]
    assert len(script.splitlines()) <= 15
    (tmp_path / "texts.csv").write_text(files["texts.csv"] + "3,\n")
    clean_environment.chdir(tmp_path)
    for name, value in (("API_URL", platform.url), ("API_KEY", platform.api_key), ("AGENT_ID", AGENT)):
        clean_environment.setenv(f"SEKUIRE_{name}", value)
    worker = worker_of(platform)

    @worker.on_task("summarize")
    def summarize(ctx: Any, input: Any) -> Any:
        if not input["text"]:
            raise TaskError("no_text", "there is no text")
        return {"summary": input["text"][:10]}

    worker.start()
    for _ in range(2):
        exec(compile(script, "summarize_csv.py", "exec"), {"__name__": "__main__"})
        assert (tmp_path / "summaries.csv").read_text().splitlines() == [
            "1,A long sto",
            "2,Another on",
            "3,failed: no_text",
        ]
    assert worker.stats().received == 3


def test_refusals_among_many(platform: LocalPlatform, client: SekuireClient) -> None:
    """With on_error the others go on, in their order; its own error ends the iterator."""
    items: List[Any] = [{"capability": "echo", "input": n} for n in range(200)]
    items[0] = {"capability": "a,b"}
    items[70] = {"capability": "echo", "max_attempts": 2_000_000}
    items[199] = "echo"
    seen: List[Any] = []
    for handle in client.submit_many(items, on_error=lambda number, error: seen.append((number, type(error)))):
        seen.append(platform.task(handle.id)["input"])
    wrong = {0: ConfigurationError, 70: APIError, 199: ConfigurationError}
    assert seen == [(n, wrong[n]) if n in wrong else n for n in range(200)]

    def stop(number: int, error: SekuireError) -> None:
        raise KeyError(number)

    handles = client.submit_many(items[1:], on_error=stop)
    with pytest.raises(KeyError, match="69"):
        list(handles)
    with pytest.raises(ConfigurationError, match="on_error: must be callable, got str"):
        client.submit_many([], on_error="log")  # type: ignore[arg-type]


# -- waiting ----------------------------------------------------------------------------------------------------------


def test_a_call_is_one_submission_and_one_question(
    platform: LocalPlatform, client: SekuireClient, working: Any
) -> None:
    """However long it takes within 20 seconds."""
    threading.Timer(1.0, working.set).start()
    assert client.call("wait", wait=GUARD) == "waited"
    assert (platform.count("tasks"), platform.count("task")) == (1, 1)


def test_many_that_wait_ask_together(platform: LocalPlatform, client: SekuireClient, working: Any) -> None:
    """Handles of one client share one question at a time; the first, which asked alone, has its own."""
    handles = list(client.submit_many({"capability": "echo", "input": n, "delay": 1.0} for n in range(150)))
    asked = Concurrency(client)
    results: List[Any] = []
    threads = [threading.Thread(target=lambda h=one: results.append(h.result(GUARD)["got"])) for one in handles]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(150))
    assert asked.most("ids=") == 1
    assert asked.most("wait_ms=") <= 1


class Concurrency:
    """Count how many questions of a kind a client asks at once."""

    def __init__(self, client: SekuireClient) -> None:
        self._lock = threading.Lock()
        self._now: Dict[str, int] = {}
        self._most: Dict[str, int] = {}
        call = client._link._call

        def counted(method: str, path: str, *rest: Any) -> Any:
            kind = path.partition("?")[2].partition("=")[0] + "="
            with self._lock:
                self._now[kind] = self._now.get(kind, 0) + 1
                self._most[kind] = max(self._most.get(kind, 0), self._now[kind])
            try:
                return call(method, path, *rest)
            finally:
                with self._lock:
                    self._now[kind] -= 1

        client._link._call = counted

    def most(self, kind: str) -> int:
        return self._most.get(kind, 0)


@pytest.mark.slow
def test_ten_thousand_handles(client_of: Make) -> None:
    """However many wait: one question for all at a time, and one of the handle that asked first, alone."""
    count, ends = 10_000, time.monotonic() + 1.0

    def answer(request: Request) -> Answer:
        path, _, query = request.path.partition("?")
        status = "completed" if time.monotonic() > ends else "queued"
        if path.endswith("/tasks"):
            ids = query.partition("ids=")[2].split(",")
            assert len(ids) <= 100
            return Answer(200, {"tasks": [{"task_id": one, "status": status} for one in ids]})
        time.sleep(max(0.0, ends - time.monotonic()))
        return Answer(200, {"task_id": path.rpartition("/")[2], "status": "completed", "output": 1})

    with WebServer(answer) as web, ThreadPoolExecutor(200) as pool:
        client = client_of(web.url)
        asked = Concurrency(client)
        handles = [client.handle(f"task_{n}") for n in range(count)]
        assert all(pool.map(lambda handle: handle.wait(GUARD), handles))
        assert asked.most("ids=") == 1
        assert asked.most("wait_ms=") <= 1
        assert len(web.requests) < count / 10


def test_one_after_the_other(platform: LocalPlatform, client: SekuireClient, working: Any) -> None:
    """A loop over many handles asks once for each at most."""
    handles = list(client.submit_many({"capability": "echo", "input": n} for n in range(100)))
    assert [handle.result(GUARD)["got"] for handle in handles] == list(range(100))
    assert platform.count("task") <= 100
    before = platform.count("task")
    assert [handle.result(GUARD)["got"] for handle in handles] == list(range(100))
    assert platform.count("task") == before, "what has ended is not asked for again"


def test_threads_that_wait_for_one_task(platform: LocalPlatform, client: SekuireClient, working: Any) -> None:
    """They share one question."""
    handle = client.submit("wait")
    results: List[Any] = []
    threads = [threading.Thread(target=lambda: results.append(client.handle(handle.id).wait(GUARD))) for _ in range(10)]
    for thread in threads:
        thread.start()
    until(lambda: client._waits._awaited[handle.id].threads == 10 if handle.id in client._waits._awaited else False)
    working.set()
    for thread in threads:
        thread.join()
    assert results == [True] * 10
    assert platform.count("task") == 1


def test_progress(client: SekuireClient, working: Any) -> None:
    """A callback gets each new value, and the handle the newest."""
    seen: List[TaskProgress] = []

    def note(progress: TaskProgress) -> None:
        seen.append(progress)
        working.set()

    handle = client.submit("wait")
    assert handle.result(GUARD, on_progress=note) == "waited"
    assert seen == [TaskProgress(0.5, "half")]
    assert handle.progress() == TaskProgress(0.5, "half")


def test_progress_of_several(client: SekuireClient, working: Any) -> None:
    """It comes with the shared question, too."""
    first, second = client.submit("wait"), client.submit("wait")
    seen: List[Tuple[int, TaskProgress]] = []
    threads = [
        threading.Thread(target=lambda n=n, h=h: h.wait(GUARD, on_progress=lambda p: seen.append((n, p))))  # type: ignore[misc]
        for n, h in enumerate((first, second))
    ]
    for thread in threads:
        thread.start()
    until(lambda: len(seen) == 2)
    working.set()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [(0, TaskProgress(0.5, "half")), (1, TaskProgress(0.5, "half"))]


@pytest.mark.parametrize("timeout", [0, 0.001, 0.3])
def test_a_short_wait(client: SekuireClient, timeout: float) -> None:
    """It asks at least once."""
    handle = client.submit("echo")
    assert handle.wait(timeout) is False
    with pytest.raises(TaskTimeout, match="it is queued"):
        handle.result(timeout)


def test_waiting_under_faults(platform: LocalPlatform, client: SekuireClient, working: Any) -> None:
    """A wait goes on through whatever happens on the way, alone and with others."""
    for text in ("error:503", "reset", "half-answer", "error:429,when=after", "page:200"):
        fault = platform.faults.add(f"{text}{',' if ':' in text else ':'}times=2,on=task")
        handles = [client.submit("echo", n) for n in range(3)]
        assert handles[0].result(GUARD)["got"] == 0
        threads = [threading.Thread(target=handle.result, args=(GUARD,)) for handle in handles[1:]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [handle.result(GUARD)["got"] for handle in handles] == [0, 1, 2]
        fault.remove()


def test_a_platform_that_restarts(platform: LocalPlatform, client: SekuireClient, working: Any) -> None:
    """The wait goes on with the platform."""
    handle = client.submit("wait")
    until(lambda: platform.task(handle.id)["status"] == "assigned")
    done: List[Any] = []
    thread = threading.Thread(target=lambda: done.append(handle.result(GUARD)))
    thread.start()
    until(lambda: platform._hub._polls)
    platform.stop()
    platform.start()
    working.set()
    thread.join()
    assert done == ["waited"]


def test_a_platform_that_stays_away(platform: LocalPlatform, client_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a minute the wait ends with the reason; a shorter wait says it too."""
    client = client_of(platform)
    handle, other = client.submit("echo"), client.submit("echo")
    platform.stop()
    with pytest.raises(TaskTimeout, match="has no result yet; cannot reach"):
        handle.result(0.3)
    monkeypatch.setattr("sekuire.calls.waits._PATIENCE", 0.3)
    with pytest.raises(TransportError, match="cannot reach"):
        handle.result()
    problems: List[BaseException] = []

    def wait(one: TaskHandle) -> None:
        try:
            one.result()
        except TransportError as error:
            problems.append(error)

    threads = [threading.Thread(target=wait, args=(one,)) for one in (handle, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(problems) == 2


def test_a_task_that_is_unknown(client: SekuireClient) -> None:
    """Alone or among others, its wait ends at once."""
    known = client.submit("echo")
    for handle in (client.handle("task_unknown"), client.handle("a,b/c?d")):
        with pytest.raises(APIError, match="TASK_NOT_FOUND"):
            handle.wait(GUARD)
        thread = threading.Thread(target=known.wait, args=(1.0,))
        thread.start()
        until(lambda: known.id in client._waits._awaited)
        with pytest.raises(APIError, match="TASK_NOT_FOUND"):
            handle.wait(GUARD)
        thread.join()


def test_an_older_platform(client_of: Make) -> None:
    """One that knows neither ``wait_ms`` nor ``ids`` is asked for each task, at growing intervals."""
    ends = time.monotonic() + 1.0

    def answer(request: Request) -> Answer:
        if "/tasks/" not in request.path:
            return Answer(200, {"tasks": [], "next_before": None})
        done = time.monotonic() >= ends
        return Answer(200, {"task_id": "t", "status": "completed" if done else "queued", "output": 1 if done else None})

    with WebServer(answer) as web:
        client = client_of(web.url)
        assert client.handle("t").result(GUARD) == 1
        alone = len(web.requests)
        assert alone <= 8
        ends = time.monotonic() + 1.0
        threads = [threading.Thread(target=client.handle(name).result, args=(GUARD,)) for name in ("t", "u")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(web.requests) - alone <= 40


def test_close_ends_a_wait(platform: LocalPlatform, client: SekuireClient) -> None:
    """Every wait ends with an error, those for one task when their question is answered."""
    problems: List[str] = []

    def wait(handle: TaskHandle) -> None:
        try:
            handle.result(GUARD)
        except SekuireError as error:
            problems.append(str(error))

    threads = [threading.Thread(target=wait, args=(client.submit("echo"),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: len(client._waits._awaited) == 3)
    client.close()
    client.close()
    platform.stop()
    for thread in threads:
        thread.join()
    assert problems == ["the client is closed"] * 3
    with pytest.raises(SekuireError, match="the client is closed"):
        client.submit("echo")


def test_an_interrupt_of_one_wait(client: SekuireClient, working: Any) -> None:
    """A callback that fails ends its own wait; the others go on."""
    first, second = client.submit("wait"), client.submit("wait")

    def fail(progress: TaskProgress) -> None:
        raise KeyboardInterrupt

    done: List[Any] = []
    thread = threading.Thread(target=lambda: done.append(second.result(GUARD)))
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        first.wait(GUARD, on_progress=fail)
    working.set()
    thread.join()
    assert done == ["waited"]
    assert client._waits._awaited == {}


# -- tasks and installations ------------------------------------------------------------------------------------------


def test_lists(client: SekuireClient) -> None:
    """All pages, newest first, with filters and a limit."""
    ids = [
        handle.id for handle in client.submit_many(({"capability": f"c{n % 2}"} for n in range(230)), max_in_flight=1)
    ]
    assert [task["task_id"] for task in client.tasks()] == ids[::-1]
    assert [task["task_id"] for task in client.tasks(limit=150)] == ids[:79:-1]
    assert [task["task_id"] for task in client.tasks(capability="c0", limit=2)] == [ids[228], ids[226]]
    assert list(client.tasks(status="failed")) == list(client.tasks(agent_id="nobody")) == []
    with pytest.raises(APIError, match="status must be one of"):
        list(client.tasks(status="done"))


def test_cancel_and_retry(platform: LocalPlatform, client: SekuireClient) -> None:
    """A queued task ends, and can be tried again; what is too late is refused."""
    handle = client.submit("echo")
    handle.cancel("not needed")
    with pytest.raises(TaskFailed) as caught:
        handle.result(GUARD)
    assert caught.value.code == "cancelled"
    assert "not needed" in caught.value.message
    again = client.retry(handle.id)
    assert (again.id, again.status()) == (handle.id, "queued")
    with pytest.raises(APIError, match="HTTP 409 NOT_FAILED"):
        client.retry(handle.id)
    with pytest.raises(APIError, match="TASK_NOT_FOUND"):
        client.cancel("task_unknown")


def test_a_retry_whose_answer_is_lost(platform: LocalPlatform, client: SekuireClient) -> None:
    """It is sent again and is one retry."""
    handle = client.submit("echo")
    handle.cancel()
    platform.faults.add("reset:when=after,times=1,on=retry")
    assert client.retry(handle.id).status() == "queued"


def test_expiry(client: SekuireClient) -> None:
    """A task that has not begun in its time fails."""
    with pytest.raises(TaskFailed) as caught:
        client.call("nobody", expires_in=0.05, wait=GUARD)
    assert caught.value.code == "expired"


def test_administration(platform: LocalPlatform, client: SekuireClient, working: Any) -> None:
    """Installations are listed, commanded and revoked."""
    installation = until(client.installations)[-1]
    name = installation["installation_id"]
    assert installation["agent_id"] == AGENT
    for order, state in ((client.pause, "paused"), (client.resume, "running"), (client.terminate, "terminated")):
        order(name, "a reason")
        assert client.installations()[-1]["desired_state"] == state
    client.revoke(name, "gone", shutdown_timeout=0.5)
    assert client.installations()[-1]["revoked"] is True
    with pytest.raises(APIError, match="HTTP 409 INSTALLATION_REVOKED"):
        client.pause(name)
    with pytest.raises(APIError, match="INSTALLATION_NOT_FOUND"):
        client.pause("inst_unknown")


def test_an_install_token(platform: LocalPlatform, client: SekuireClient, worker_of: Any) -> None:
    """An agent logs in with it."""
    worker = worker_of(platform, install_token=client.create_install_token(max_uses=2))
    worker.on_task("echo", lambda ctx, input: input)
    worker.start()
    assert client.call("echo", 5, wait=GUARD) == 5
    with pytest.raises(ConfigurationError, match="max_uses: must be a whole number"):
        client.create_install_token(max_uses=0)


# -- options and arguments --------------------------------------------------------------------------------------------


def test_from_env(platform: LocalPlatform, clean_environment: pytest.MonkeyPatch) -> None:
    """The variables give the options, and keywords win."""
    clean_environment.setenv("SEKUIRE_API_URL", platform.url)
    clean_environment.setenv("SEKUIRE_API_KEY", platform.api_key)
    clean_environment.setenv("SEKUIRE_AGENT_ID", AGENT)
    with SekuireClient.from_env() as client:
        assert platform.task(client.submit("echo").id)["agent_id"] == AGENT
    with SekuireClient.from_env(agent_id="other") as client:
        assert platform.task(client.submit("echo").id)["agent_id"] == "other"
    clean_environment.setenv("SEKUIRE_API_URL", "nonsense")
    with pytest.raises(ConfigurationError, match=r"api_base_url \(from environment variable SEKUIRE_API_URL\)"):
        SekuireClient.from_env()
    clean_environment.delenv("SEKUIRE_API_KEY")
    with pytest.raises(ConfigurationError, match="api_key: is required; set SEKUIRE_API_KEY"):
        SekuireClient.from_env(api_base_url=platform.url)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"api_url": "http://localhost:1"}, "api_url: unknown option of ClientConfig; use api_base_url"),
        ({"api_key": None}, "api_key: is required"),
        ({"agent_id": ""}, "agent_id: must be a non-empty str"),
        ({"retry_for": -1}, "retry_for: must be a number of seconds, 0 or more"),
        ({"max_result_bytes": 0}, "max_result_bytes: must be a whole number, 1 or more"),
    ],
)
def test_wrong_options(client_of: Make, options: Dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        client_of(NOWHERE, **options)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"capability": ""}, "capability: '' cannot name a capability"),
        ({"capability": 7}, "capability: a capability's name must be a str, got int"),
        ({"input": {1, 2}}, "the task cannot be written as JSON: TypeError"),
        ({"input": float("nan")}, "the task cannot be written as JSON: ValueError"),
        ({"agent_id": ""}, "agent_id: must be a non-empty str"),
        ({"idempotency_key": ""}, "idempotency_key: must be a str of 1 to 256 printable ASCII characters"),
        ({"idempotency_key": "a\nb"}, "idempotency_key: must be a str"),
        ({"delay": -1}, "delay: must be a number of seconds, 0 or more"),
        ({"delay": 10**9}, "delay: must be a number of seconds"),
        ({"expires_in": 0}, "expires_in: must be a number of seconds above 0"),
        ({"delay": 60, "expires_in": 60}, "expires_in: must be more than delay, got 60 s and 60 s"),
        ({"timeout": "5s"}, "timeout: must be a number of seconds above 0, got '5s'"),
        ({"max_attempts": 0}, "max_attempts: must be a whole number, 1 or more"),
        ({"trace_id": 7}, "trace_id: must be a non-empty str"),
        ({"workspace_id": ""}, "workspace_id: must be a non-empty str"),
        ({"wait": -1}, "wait: must be a number of seconds, 0 or more"),
        ({"on_progress": 1}, "on_progress: must be callable, got int"),
        ({"timeout_ms": 5}, r"timeout_ms: unknown field of a task; use timeout \(seconds\)"),
        ({"prio": 5}, "prio: unknown field of a task; known are capability, input, agent_id"),
    ],
)
def test_wrong_arguments(platform: LocalPlatform, client: SekuireClient, arguments: Dict[str, Any], text: str) -> None:
    """They are refused before anything is sent, but for the callback, and named."""
    with pytest.raises(ConfigurationError, match=text):
        client.call(**{"capability": "echo", **arguments})


def test_nobody_is_named(client_of: Make) -> None:
    with pytest.raises(ConfigurationError, match="agent_id: is required: whose task is it"):
        client_of(NOWHERE, agent_id=None).submit("echo")


def test_wrong_ids(client: SekuireClient) -> None:
    for call in (client.handle, client.task, client.cancel, client.retry, client.pause, client.revoke):
        with pytest.raises(ConfigurationError, match="must be a non-empty str"):
            call("")
    with pytest.raises(ConfigurationError, match="reason: must be a str"):
        client.cancel("t", 5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="timeout: must be a number of seconds, 0 or more, or None"):
        client.handle("t").result(-1)


def test_no_key_in_its_repr(client: SekuireClient) -> None:
    assert "sk_live" not in repr(client) + repr(client.config)
    assert repr(client.handle("t")) == "<TaskHandle t>"


def test_a_large_result(platform: LocalPlatform, client_of: Make, worker_of: Any) -> None:
    """An answer may be as large as results may be."""
    worker = worker_of(platform)
    worker.on_task("large", lambda ctx, input: "x" * input)
    worker.start()
    assert len(client_of(platform).call("large", 8 * 1024 * 1024, wait=GUARD)) == 8 * 1024 * 1024


def test_an_answer_that_is_too_large(platform: LocalPlatform, client_of: Make) -> None:
    """It is asked for once: the same question brings the same answer. The error names the option."""
    small = client_of(platform, max_result_bytes=1000)
    handle = small.submit("nobody", "x" * 3 * 1024 * 1024)
    # An ended task is answered at once.
    client_of(platform).cancel(handle.id)
    before = platform.count("task")
    for ask in (handle.result, handle.status, lambda: small.task(handle.id)):
        with pytest.raises(
            TransportError, match=r"the answer is larger than .*; give the client a larger max_result"
        ) as e:
            ask()
        assert (e.value.is_too_large, e.value.retryable) == (True, False)
    assert platform.count("task") == before + 3


def test_tasks_that_are_too_large_together(platform: LocalPlatform, client_of: Make, worker_of: Any) -> None:
    """A list comes in smaller pages, and tasks that are waited for together are asked for one by one."""
    worker = worker_of(platform)
    gate = threading.Event()

    @worker.on_task("fail")
    def fail(ctx: Any, input: Any) -> Any:
        gate.wait(GUARD)
        raise TaskError("no_luck", "not today", details={"why": "x" * 400_000})

    worker.start()
    client = client_of(platform, max_result_bytes=1000)
    handles = [client.submit("fail") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        waits = [pool.submit(handle.wait, GUARD) for handle in handles]
        until(lambda: len(client._waits._awaited) == 4)
        gate.set()
        assert [one.result() for one in waits] == [True] * 4
    assert [one["task_id"] for one in client.tasks()] == [handle.id for handle in reversed(handles)]


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy])
def test_what_cannot_be_pickled(client: SekuireClient, copied: Callable[[Any], Any]) -> None:
    """The error says what to do, and not that a secret is in it."""
    with pytest.raises(TypeError, match=r"pass its id on, and use client\.handle\(task_id\)"):
        copied(client.handle("t"))
    with pytest.raises(TypeError, match="make one in each process"):
        copied(client)


# -- with an SDK ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sdk(platform: LocalPlatform) -> Iterator[SekuireSDK]:
    """The SDK of an agent that asks others."""
    token = platform.create_install_token("asker")
    with SekuireSDK("asker", api_base_url=platform.url, install_token=token, logging_enabled=False) as sdk:
        yield sdk


def test_an_agents_client(platform: LocalPlatform, client: SekuireClient, sdk: SekuireSDK, working: Any) -> None:
    """It acts as the agent, sees what the agent submitted, alone and among others, and nothing else."""
    mine = sdk.client()
    assert mine.call("echo", 1, agent_id=AGENT)["got"] == 1
    first, second = (mine.submit("wait", agent_id=AGENT) for _ in range(2))
    assert platform.task(first.id)["requester_agent_id"] == "asker"
    threads = [threading.Thread(target=handle.wait, args=(GUARD,)) for handle in (first, second)]
    for thread in threads:
        thread.start()
    working.set()
    for thread in threads:
        thread.join()
    other = client.submit("echo")
    assert other.id not in [task["task_id"] for task in mine.tasks()]
    for call in (mine.task, mine.cancel):
        with pytest.raises(APIError, match="TASK_NOT_FOUND"):
            call(other.id)
    own = mine.submit("nobody")
    assert platform.task(own.id)["agent_id"] == "asker"
    own.cancel()
    assert platform.task(own.id)["error"]["code"] == "cancelled"
    with pytest.raises(APIError, match="HTTP 401"):
        mine.installations()


def test_an_agents_token_is_renewed(platform: LocalPlatform, sdk: SekuireSDK) -> None:
    """A token that has expired costs one renewal, not a task."""
    mine = sdk.client()
    platform.expire_tokens()
    handle = mine.submit("echo")
    assert [task["task_id"] for task in mine.tasks()] == [handle.id]


def test_a_revoked_agent(platform: LocalPlatform, sdk: SekuireSDK) -> None:
    """Its client is refused with the reason."""
    platform.revoke(sdk.installation_credentials.installation_id or "", "compromised")
    with pytest.raises(RevokedError, match="compromised"):
        sdk.client().submit("echo")


def test_exports() -> None:
    assert errors.TaskFailed is TaskFailed
    assert errors.TaskTimeout is TaskTimeout
