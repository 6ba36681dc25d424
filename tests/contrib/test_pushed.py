"""Tasks that others push to a Flask application: over HTTP, beside the platform's, by the same worker."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterator, List, Optional

import flask
import pytest
import requests
from cheroot.wsgi import Server

from sekuire import SekuireClient, TaskError, Worker
from sekuire.contrib.flask import Sekuire, pushed_tasks
from sekuire.errors import ConfigurationError, PolicyViolationError
from sekuire.local import LocalPlatform
from sekuire.secret import Secret

from ..conftest import AGENT
from ..support.gateway import FakeGateway
from ..support.waiting import GUARD, until

SECRET = "canary-a2a-0123456789"
HEADERS = {"Authorization": f"Bearer {SECRET}"}


class Site:
    """A Flask application under a real server, with a worker beside it."""

    def __init__(self, platform: LocalPlatform) -> None:
        self.app = flask.Flask("shop")
        self.app.config.update(
            SEKUIRE_API_URL=platform.url,
            SEKUIRE_AGENT_ID=AGENT,
            SEKUIRE_INSTALL_TOKEN=platform.create_install_token(AGENT, max_uses=10),
            SEKUIRE_HEARTBEAT_INTERVAL=0.2,
        )
        self.platform = platform
        self.sekuire = Sekuire(self.app)
        #: Each handler ends once it is set.
        self.gate = threading.Event()
        self.seen: List[Any] = []
        self.worker: Optional[Worker] = None
        self.workers: List[Worker] = []
        self.server: Any = None

        @self.sekuire.task("greet")
        def greet(ctx: Any, input: Any) -> Any:
            self.seen.append(ctx)
            return f"{flask.current_app.name} greets {input['name']}"

        @self.sekuire.task("hold")
        def hold(ctx: Any, input: Any) -> Any:
            self.seen.append(ctx)
            ctx.report_progress(0.5, "half")
            while not self.gate.wait(0.01):
                ctx.raise_if_cancelled()
            return input

        @self.sekuire.task("fail")
        def fail(ctx: Any, input: Any) -> Any:
            raise TaskError(input["code"], f"with {SECRET}", retryable=True, details={"left": 0})

        @self.sekuire.task("object")
        def make_object(ctx: Any, input: Any) -> Any:
            return object()

    def work(self, **options: Any) -> Worker:
        worker = self.worker = self.sekuire.create_worker(self.app, **options)
        worker.sdk.start()
        worker.start()
        self.workers.append(worker)
        assert worker.wait_until_connected(GUARD)
        return worker

    def serve(self, **options: Any) -> None:
        options = {"secret": SECRET, "wait": 30.0, **options}
        if options.get("authenticate") is not None:
            del options["secret"]
        self.app.register_blueprint(pushed_tasks(lambda: self.worker, **options))
        self.server = Server(("127.0.0.1", 0), self.app, numthreads=20)
        self.server.prepare()
        threading.Thread(target=self.server.serve, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.bind_addr[1]}/a2a/tasks"

    def push(self, task: Any, headers: Any = HEADERS) -> requests.Response:
        if isinstance(task, (bytes, str)) or hasattr(task, "__next__"):
            return requests.post(
                self.url, data=task, headers={"Content-Type": "application/json", **headers}, timeout=GUARD
            )
        return requests.post(self.url, json=task, headers=headers, timeout=GUARD)

    def find(self, task_id: str, headers: Any = HEADERS) -> requests.Response:
        return requests.get(f"{self.url}/{task_id}", headers=headers, timeout=GUARD)

    def close(self) -> None:
        self.gate.set()
        for worker in self.workers:
            worker.stop()
            worker.sdk.shutdown()
        if self.server is not None:
            self.server.stop()


@pytest.fixture
def site(platform: LocalPlatform) -> Iterator[Site]:
    site = Site(platform)
    yield site
    site.close()


def error_of(answer: requests.Response) -> Any:
    return answer.status_code, answer.json()["error"]["code"]


class TestPushing:
    def test_a_result_in_time(self, site: Site) -> None:
        """The pushed form of a task, by a handler in the application's context. It is no task of the platform."""
        worker = site.work()
        site.serve()
        answer = site.push({"id": "7", "type": "greet", "input": {"name": "Ada"}, "context": {"requester_id": "peer"}})
        assert answer.status_code == 200
        found = answer.json()
        assert found.pop("execution_time_ms") >= 0
        assert found == {"task_id": "7", "status": "completed", "output": "shop greets Ada"}
        (context,) = site.seen
        assert (context.task_id, context.requester_id, context.attempt) == ("pushed:7", "peer", 1)
        assert site.find("7").json()["output"] == "shop greets Ada"
        assert worker.stats().completed == 1
        assert worker.stats().undelivered == 0
        assert site.platform.count("complete") == 0
        assert site.platform.count("progress") == 0

    def test_a_result_later(self, site: Site) -> None:
        """The answer says where to ask for it."""
        site.work()
        site.serve(wait=0.05)
        answer = site.push({"capability": "hold", "input": 1})
        assert answer.status_code == 202
        task_id = answer.json()["task_id"]
        assert answer.headers["Location"] == f"/a2a/tasks/{task_id}"
        until(lambda: site.find(task_id).json().get("progress") == {"progress": 0.5, "message": "half"})
        assert site.find(task_id).json()["status"] == "assigned"
        site.gate.set()
        until(lambda: site.find(task_id).json()["status"] == "completed")
        assert site.find(task_id).json()["output"] == 1
        assert site.platform.count("progress") == 0

    def test_a_task_of_the_platform_with_the_same_id(self, site: Site) -> None:
        """Both run at once, each has its own result, and a cancel of the one leaves the other alone."""
        worker = site.work()
        site.serve(wait=0.05)
        task_id = site.platform.submit("hold", "platform", agent_id=AGENT)
        assert site.push({"task_id": task_id, "capability": "hold", "input": "pushed"}).status_code == 202
        until(lambda: len(site.seen) == 2)
        assert {context.task_id for context in site.seen} == {task_id, f"pushed:{task_id}"}
        assert worker.stats().duplicates == 0
        with SekuireClient(api_base_url=site.platform.url, api_key=site.platform.api_key) as client:
            client.cancel(task_id)
        assert site.platform.wait(task_id, GUARD)["error"]["code"] == "cancelled"
        assert site.find(task_id).json()["status"] == "assigned"
        site.gate.set()
        until(lambda: site.find(task_id).json()["status"] == "completed")
        assert site.find(task_id).json()["output"] == "pushed"
        assert site.platform.count("complete") == 1

    def test_the_same_push_again(self, site: Site) -> None:
        """It is the same task, while it runs and after; another task under its id is refused."""
        site.work()
        site.serve(wait=0.05)
        task = {"task_id": "7", "capability": "hold", "input": {"a": 1, "b": 2}}
        assert [site.push(task).status_code for _ in range(3)] == [202, 202, 202]
        assert site.push('{"input": {"b": 2, "a": 1}, "capability": "hold", "id": "7"}').status_code == 202
        assert error_of(site.push({**task, "input": 2})) == (409, "id_reused")
        site.gate.set()
        until(lambda: site.push(task).status_code == 200)
        assert site.push(task).json()["output"] == {"a": 1, "b": 2}
        assert len(site.seen) == 1

    def test_many_at_once(self, site: Site) -> None:
        """Beside tasks of the platform. Each gets its own result."""
        site.work(max_workers=4)
        site.serve()
        ids = [site.platform.submit("greet", {"name": f"p{number}"}, agent_id=AGENT) for number in range(20)]
        with ThreadPoolExecutor(16) as pool:
            answers = list(
                pool.map(lambda n: site.push({"task_id": ids[n % 20], "type": "greet", "input": {"name": str(n % 20)}}),
                         range(60))
            )  # fmt: skip
        assert [answer.json()["output"] for answer in answers] == [f"shop greets {n % 20}" for n in range(60)]
        for number, task_id in enumerate(ids):
            assert site.platform.wait(task_id, GUARD)["output"] == f"shop greets p{number}"
        assert len(site.seen) == 40

    def test_a_pusher_that_hangs_up(self, site: Site) -> None:
        """Its task goes on, and the same push gets the result."""
        site.work()
        site.serve()
        task = {"task_id": "7", "type": "hold", "input": 1}
        with pytest.raises(requests.ReadTimeout):
            requests.post(site.url, json=task, headers=HEADERS, timeout=(GUARD, 0.1))
        until(lambda: site.seen)
        site.gate.set()
        assert site.push(task).json()["output"] == 1
        assert len(site.seen) == 1

    def test_an_executor_of_the_users_own(self, site: Site) -> None:
        """The result does not depend on who has the threads."""
        with ThreadPoolExecutor(2) as pool:
            site.work(executor=pool)
            site.serve()
            assert site.push({"type": "greet", "input": {"name": "Ada"}}).json()["output"] == "shop greets Ada"
            assert error_of(site.push({"type": "nothing"})) == (404, "unknown_capability")
            site.close()

    def test_failures_of_a_handler_are_results(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        """Whatever their code is."""
        site.work()
        site.serve()
        answer = site.push({"task_id": "1", "capability": "fail", "input": {"code": "worker_paused"}})
        assert answer.status_code == 200
        assert answer.json()["status"] == "failed"
        # The shared secret is hidden as a token is.
        assert answer.json()["error"] == {
            "code": "worker_paused", "message": "with ***", "retryable": True, "details": {"left": 0},
        }  # fmt: skip
        answer = site.push({"task_id": "2", "capability": "object", "input": None})
        assert (answer.status_code, answer.json()["error"]["code"]) == (200, "result_not_serializable")
        # By the id that all log lines of the task have: 2 may be a task of the platform.
        assert any(line.startswith("[pushed:2] the result has no JSON form") for line in caplog.messages)
        answer = site.push({"task_id": "3", "capability": "hold", "input": None, "timeout_ms": 20})
        assert (answer.status_code, answer.json()["error"]["code"]) == (200, "timeout")


class TestRefusing:
    def test_without_the_secret(self, site: Site) -> None:
        """Nothing of the request is read, not even for a result."""
        site.work()
        site.serve()
        wrong: List[Dict[str, str]] = [
            {}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": f"Bearer {SECRET}x"},
            {"Authorization": f"Basic {SECRET}"}, {"X-API-Key": SECRET}, {"Authorization": "Bearer \u00e9"},
        ]  # fmt: skip
        for headers in wrong:
            sent = {name: value.encode("latin-1") for name, value in headers.items()}
            for answer in (site.push(b"{", sent), site.find("7", sent)):
                assert error_of(answer) == (401, "unauthorized")
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert SECRET not in answer.text
        assert site.seen == []

    def test_a_callable_that_names_the_pusher(self, site: Site) -> None:
        """Each pusher has ids of its own, and sees no other's task. What is neither True nor a name is refused."""
        answers: Dict[str, Any] = {"a": "ada", "b": "bob", "t": True, "n": None, "f": False, "o": 1, "l": ["ada"]}
        site.work()
        site.serve(authenticate=lambda request: answers[request.headers["X-Who"]])
        task = {"task_id": "1", "type": "greet", "context": {"requester_id": "somebody"}}
        for who in "abt":
            answer = site.push({**task, "input": {"name": who}}, {"X-Who": who})
            assert answer.json()["output"] == f"shop greets {who}"
            assert site.find("1", {"X-Who": who}).json()["output"] == f"shop greets {who}"
        assert [context.requester_id for context in site.seen] == ["ada", "bob", "somebody"]
        assert [context.task_id for context in site.seen] == ["pushed:ada:1", "pushed:bob:1", "pushed:1"]
        assert site.push({"task_id": "2", "type": "greet", "input": {"name": "x"}}, {"X-Who": "a"}).ok
        assert error_of(site.find("2", {"X-Who": "b"})) == (404, "unknown_task")
        for who in "nfol":
            assert error_of(site.push(task, {"X-Who": who})) == (401, "unauthorized")

    @pytest.mark.parametrize(
        ("body", "status", "text"),
        [
            (b"{", 400, "the task is not valid JSON"),
            (b"[]", 400, "the task is not a JSON object"),
            (b"\xff", 400, "the task is not UTF-8"),
            (b'{"capability": "greet", "input": NaN}', 400, "the task "),
            (b"[" * 100_000, 400, "the task is nested too deep"),
            (b"{}", 400, "capability must be"),
            (b'{"capability": "a\\nb"}', 400, "capability must be"),
            (b'{"capability": "greet", "task_id": "a/b"}', 400, "task_id must be"),
            (b'{"capability": "greet", "task_id": 7}', 400, "no usable task_id"),
            (b'{"capability": "greet", "timeout_ms": 0}', 400, "timeout_ms must be"),
            (b'"' + b"x" * 1024 * 1024 + b'"', 413, "the task has more than 1048576 bytes"),
        ],
    )
    def test_a_wrong_task(self, site: Site, body: bytes, status: int, text: str) -> None:
        """With its length, and in chunks without one."""
        site.work()
        site.serve()
        for data in (body, iter([body[:10], body[10:]])):
            answer = site.push(data)
            assert error_of(answer) == (status, "invalid_task")
            assert text in answer.json()["error"]["message"]
        assert site.workers[0].stats().received == 0

    def test_another_content_type(self, site: Site) -> None:
        """A web page of somebody else could send it."""
        site.work()
        site.serve()
        answer = requests.post(
            site.url, data='{"type": "greet"}', headers={**HEADERS, "Content-Type": "text/plain"}, timeout=GUARD
        )
        assert error_of(answer) == (415, "invalid_task")

    def test_an_unknown_capability(self, site: Site) -> None:
        """And an unknown id."""
        site.work()
        site.serve()
        assert error_of(site.push({"type": "nothing"})) == (404, "unknown_capability")
        assert error_of(site.find("nothing")) == (404, "unknown_task")

    def test_too_many(self, site: Site) -> None:
        """The pusher learns when to try again. A task that has ended makes room."""
        site.work(max_workers=1)
        site.serve(wait=0.0, max_queued=2)
        assert [site.push({"task_id": str(n), "type": "hold", "input": n}).status_code for n in range(2)] == [202, 202]
        answer = site.push({"task_id": "2", "type": "hold", "input": 2})
        assert error_of(answer) == (429, "too_many_tasks")
        assert int(answer.headers["Retry-After"]) > 0
        assert site.push({"task_id": "1", "type": "hold", "input": 1}).status_code == 202
        assert site.find("1").json()["status"] == "queued"
        site.gate.set()
        until(lambda: site.push({"task_id": "2", "type": "hold", "input": 2}).ok)

    def test_only_so_many_wait(self, site: Site) -> None:
        """Pushes of one task must not hold all threads of the server."""
        site.work()
        site.serve(wait=30.0, max_queued=1)
        task = {"task_id": "1", "type": "hold", "input": 1}
        with ThreadPoolExecutor(3) as pool:
            found = [pool.submit(site.push, task) for _ in range(3)]
            until(lambda: sum(one.done() for one in found) == 2)
            site.gate.set()
            assert sorted(one.result().status_code for one in found) == [200, 202, 202]


class TestTheWorkersState:
    def test_a_worker_that_is_not_started(self, site: Site, platform: LocalPlatform) -> None:
        """And one that is not there. The same push succeeds later."""
        site.serve()
        task = {"task_id": "1", "type": "greet", "input": {"name": "Ada"}}
        answer = site.push(task)
        assert error_of(answer) == (503, "worker_not_ready")
        assert int(answer.headers["Retry-After"]) > 0
        site.worker = site.sekuire.create_worker(site.app)
        assert site.push(task).json()["error"]["message"] == "the worker is not started"
        site.worker.stop()
        site.work()
        assert site.push(task).status_code == 200

    def test_a_worker_of_another_process(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """The threads of one that was started before a fork stayed in the parent."""
        worker = site.work()
        site.serve()
        monkeypatch.setattr(worker, "pid", worker.pid + 1)
        answer = site.push({"type": "greet", "input": {"name": "Ada"}})
        assert error_of(answer) == (503, "worker_not_ready")
        assert answer.json()["error"]["message"].startswith("the worker runs in another process")
        monkeypatch.undo()

    def test_a_worker_that_was_never_connected(self, site: Site) -> None:
        """It has no lease yet, and may be refused."""
        with site.platform.faults.error(503, on="bootstrap"):
            worker = site.worker = site.sekuire.create_worker(site.app, start_timeout=0.1)
            site.workers.append(worker)
            worker.start()
            site.serve()
            answer = site.push({"type": "greet", "input": {"name": "Ada"}})
            assert error_of(answer) == (503, "worker_not_ready")
        assert site.seen == []

    def test_paused(self, site: Site) -> None:
        """What has not begun is refused, what runs goes on, and a later push of the same task is run."""
        worker = site.work(max_workers=1)
        site.serve()
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(site.push, {"task_id": "1", "type": "hold", "input": 1})
            until(lambda: site.seen)
            waiting = pool.submit(site.push, {"task_id": "2", "type": "greet", "input": {"name": "Ada"}})
            until(lambda: worker.stats().waiting == 1)
            worker.pause("lunch")
            assert error_of(waiting.result(GUARD)) == (503, "worker_paused")
            answer = site.push({"task_id": "3", "type": "greet", "input": {"name": "Ada"}})
            assert error_of(answer) == (503, "worker_paused")
            assert answer.json()["error"]["message"] == "the worker is paused: lunch"
            site.gate.set()
            assert running.result(GUARD).json()["output"] == 1
        worker.resume()
        assert site.push({"task_id": "2", "type": "greet", "input": {"name": "Ada"}}).status_code == 200

    def test_a_stop_drains(self, site: Site) -> None:
        """What runs may finish. What waits is given back to its pusher, who has it run by the next worker."""
        worker = site.work(max_workers=1)
        site.serve()
        with ThreadPoolExecutor(3) as pool:
            running = pool.submit(site.push, {"task_id": "1", "type": "hold", "input": 1})
            until(lambda: site.seen)
            waiting = pool.submit(site.push, {"task_id": "2", "type": "greet", "input": {"name": "Ada"}})
            until(lambda: worker.stats().waiting == 1)
            worker.request_stop(GUARD)
            assert error_of(waiting.result(GUARD)) == (503, "worker_shutdown")
            assert error_of(site.push({"type": "greet", "input": {"name": "Ada"}})) == (503, "worker_shutdown")
            site.gate.set()
            assert running.result(GUARD).json()["output"] == 1
        assert worker.wait(GUARD)
        assert error_of(site.push({"type": "greet", "input": {"name": "Ada"}})) == (503, "worker_shutdown")
        assert site.platform.count("release") == 0
        site.work()
        assert site.find("1").json()["output"] == 1
        assert site.push({"task_id": "2", "type": "greet", "input": {"name": "Ada"}}).status_code == 200

    def test_terminated(self, site: Site) -> None:
        """The running handler is cancelled, and says so."""
        worker = site.work()
        site.serve()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(site.push, {"task_id": "1", "type": "hold", "input": 1})
            until(lambda: site.seen)
            site.platform.command(site.platform.installations()[0]["installation_id"], "terminate", "over")
            answer = running.result(GUARD)
        assert (answer.status_code, answer.json()["error"]["code"]) == (200, "worker_terminated")
        assert worker.wait(GUARD)
        assert error_of(site.push({"type": "greet", "input": {"name": "Ada"}})) == (503, "worker_terminated")

    def test_a_policy(self, site: Site) -> None:
        """It is asked as for a task of the platform."""
        site.app.config["SEKUIRE_POLICY_GATEWAY"] = FakeGateway(PolicyViolationError("capability.blocked", "not today"))
        site.work()
        site.serve()
        assert error_of(site.push({"type": "greet", "input": {"name": "Ada"}})) == (403, "policy_denied")
        assert site.seen == []

    @pytest.mark.parametrize(("answer", "code"), [(True, None), (False, "approval_denied"), (None, "approval_denied")])
    def test_an_approval(self, site: Site, answer: Optional[bool], code: Optional[str]) -> None:
        """The operator's own function decides, and nobody without one. The platform does not know the task."""
        if answer is not None:
            site.app.config["SEKUIRE_APPROVAL_HANDLER"] = lambda request: answer

        @site.sekuire.task("pay")
        def pay(ctx: Any, input: Any) -> Any:
            ctx.require_approval("pay", {"cents": 7}, timeout=GUARD)
            return "paid"

        site.work()
        site.serve()
        found = site.push({"type": "pay"}).json()
        assert (found.get("output"), found.get("error", {}).get("code")) == (None if code else "paid", code)
        assert site.platform.count("approvals") == 0

    def test_a_lost_lease(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """What runs is cancelled, what waits is given back, and what comes then waits for the lease."""
        worker = site.work(max_workers=1)
        site.serve(wait=30.0)
        held = [True]
        monkeypatch.setattr("sekuire.session.heartbeat.Lease.is_held", lambda lease: held[0])
        with ThreadPoolExecutor(3) as pool:
            running = pool.submit(site.push, {"task_id": "1", "type": "hold", "input": 1})
            until(lambda: site.seen)
            waiting = pool.submit(site.push, {"task_id": "2", "type": "greet", "input": {"name": "Ada"}})
            until(lambda: worker.stats().waiting == 1)
            held[0] = False
            worker._dispatcher.lose_lease()
            assert error_of(waiting.result(GUARD)) == (503, "worker_shutdown")
            assert running.result(GUARD).json()["error"]["code"] == "cancelled"
            late = pool.submit(site.push, {"task_id": "2", "type": "greet", "input": {"name": "Ada"}})
            until(lambda: worker.stats().waiting == 1)
            held[0] = True
            worker._dispatcher.start_waiting()
            assert late.result(GUARD).json()["output"] == "shop greets Ada"
        assert site.platform.count("release") == 0


class TestKeeping:
    def test_for_an_hour(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """After that the id is unknown. An unnamed task that was answered is not kept."""
        site.work()
        site.serve()
        task = {"task_id": "1", "type": "greet", "input": {"name": "Ada"}}
        assert site.push(task).ok
        unnamed = site.push({"type": "greet", "input": {"name": "Ada"}}).json()["task_id"]
        assert site.find(unnamed).status_code == 404
        assert site.find("1").ok
        monkeypatch.setattr("sekuire.worker.pushed.KEEP", 0.0)
        assert site.find("1").status_code == 404

    @pytest.mark.parametrize(("limit", "value"), [("KEPT", 3), ("KEPT_BYTES", 300)])
    def test_not_without_a_limit(self, site: Site, monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
        """The oldest go first."""
        monkeypatch.setattr(f"sekuire.worker.pushed.{limit}", value)
        site.work()
        site.serve()
        for number in range(6):
            assert site.push({"task_id": str(number), "type": "greet", "input": {"name": "Ada"}}).ok
        found = [site.find(str(number)).status_code for number in range(6)]
        assert (found[0], found[-1]) == (404, 200)
        assert found == sorted(found, reverse=True)

    def test_one_that_never_begins(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """It does not occupy its place without an end."""
        worker = site.work(max_workers=1)
        site.serve(wait=0.0)
        for number in range(2):
            assert site.push({"task_id": str(number), "type": "hold", "input": 1}).status_code == 202
        until(lambda: worker.stats().waiting == 1)
        monkeypatch.setattr("sekuire.worker.pushed.BEGIN_WITHIN", -1.0)
        found = site.find("1").json()
        assert (found["status"], found["error"]["code"]) == ("failed", "cancelled")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "^secret: is required, or everybody could push tasks: give secret="),
        ({"secret": ""}, "^secret: "),
        ({"secret": "short"}, "^secret: must have at least 16 characters"),
        ({"secret": "with a space in it"}, "^secret: holds whitespace"),
        ({"secret": 7}, "^secret: "),
        ({"secret": SECRET, "authenticate": bool}, "^authenticate: give either"),
        ({"authenticate": "me"}, "^authenticate: must be a function, got str"),
        ({"secret": SECRET, "wait": 31}, "^wait: must be"),
        ({"secret": SECRET, "wait": "10"}, "^wait: must be"),
        ({"secret": SECRET, "max_queued": 0}, "^max_queued: must be"),
        ({"worker": None, "secret": SECRET}, "^worker: must be a Worker, or a function that returns one, got NoneType"),
    ],
)
def test_wrong_arguments(options: Dict[str, Any], text: str) -> None:
    """Each names the argument, and no secret."""
    with pytest.raises(ConfigurationError, match=text) as caught:
        pushed_tasks(**{"worker": lambda: None, **options})
    assert "canary" not in str(caught.value)


def test_an_async_authenticate() -> None:
    """It would return what is true."""

    async def authenticate(request: Any) -> bool:
        return False

    with pytest.raises(ConfigurationError, match="authenticate: must be a plain function"):
        pushed_tasks(lambda: None, authenticate=authenticate)  # type: ignore[arg-type]


def test_a_name_that_is_not_an_id(site: Site) -> None:
    """It is the callable's mistake, and lets nobody in."""
    site.work()
    site.serve(authenticate=lambda request: "a\nb")
    assert site.push({"type": "greet"}).status_code == 500
    assert site.seen == []


def test_the_secret_is_compared_as_a_secret() -> None:
    """In constant time, and it is not shown."""
    secret = Secret(SECRET)
    blueprint = pushed_tasks(lambda: None, secret=secret)
    assert SECRET not in repr(vars(blueprint))


def test_a_result_that_is_not_json(site: Site) -> None:
    """The worker's own function is asked for it, as for a task of the platform."""
    site.work(result_encoder=lambda value: type(value).__name__)
    site.serve()
    answer = site.push({"type": "object", "input": {}})
    assert (answer.status_code, answer.json()["output"]) == (200, "object")
