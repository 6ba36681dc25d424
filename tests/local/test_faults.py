"""Faults on demand, as a client without mercy sees them: sockets, bytes and the platform's state."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
import socket
import struct
import threading
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest

from sekuire.errors import ConfigurationError
from sekuire.local import Fault, Faults, LocalPlatform
from sekuire.local.fault_terms import EXAMPLES

from ..contract.client import Installation
from ..support.waiting import GUARD, until
from .conftest import client_of

Make = Callable[..., LocalPlatform]

#: Seconds of a latency or a stall that no test waits for.
LONG = 3600.0


def given(installation: Installation) -> str:
    """A new task that the installation's worker holds."""
    task_id = installation.submit()
    with installation.stream() as stream:
        while stream.next("task")["task_id"] != task_id:
            pass
    return task_id


def submission(installation: Installation) -> int:
    """The status of one request."""
    return installation.client.admin(
        "POST", "/tasks", {"agent_id": installation.agent_id, "capability": "work", "input": {}}
    ).status


class Call(threading.Thread):
    """A request that takes its time."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(name="call", daemon=True)
        self._function = function
        self._result: Any = None
        self._error: Optional[BaseException] = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join(GUARD)
        assert not self.is_alive(), "it was never answered"
        if self._error is not None:
            raise self._error
        return self._result


# -- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_before_the_platform_has_seen_the_request(platform: LocalPlatform, installation: Installation) -> None:
    """The answer is the error that was asked for, nothing was done, and times=1 ends it."""
    task_id = given(installation)
    fault = platform.faults.error(429, times=1, on="complete", retry_after=7, code="SLOW_DOWN")
    answer = installation.complete(task_id)
    assert (answer.status, answer.code, answer.body["error"]) == (429, "SLOW_DOWN", "too_many_requests")
    assert answer.headers["Retry-After"] == "7"
    assert platform.task(task_id)["status"] == "assigned"
    assert platform.completions(task_id) == []
    assert fault.is_over()
    assert installation.complete(task_id).status == 200
    assert platform.requests[-2:] == [("complete", 429), ("complete", 200)]


def test_an_error_after_the_platform_has_acted(platform: LocalPlatform, installation: Installation) -> None:
    """The client gets an error, but the platform has acted. A repetition gets the answer of the first request."""
    task_id = given(installation)
    platform.faults.error(502, times=1, on="complete", when="after")
    answer = installation.complete(task_id, output=1)
    assert (answer.status, answer.code) == (502, "INJECTED")
    assert platform.task(task_id)["output"] == 1
    assert installation.complete(task_id, output=1).status == 200
    assert platform.requests[-2:] == [("complete", 502), ("complete", 200)]


@pytest.mark.parametrize("status", [301, 400, 401, 402, 404, 418, 451, 500, 503, 599])
def test_any_failing_status(platform: LocalPlatform, installation: Installation, status: int) -> None:
    """Each is answered with a JSON body of the contract's shape, and with a Retry-After only if the fault sets one."""
    with platform.faults.error(status, on="tasks"):
        answer = installation.client.admin("GET", "/tasks")
    assert answer.status == status
    assert set(answer.body) >= {"error", "message", "code"}
    assert ("required_plan" in answer.body) == (status == 402)
    assert ("WWW-Authenticate" in answer.headers) == (status == 401)
    assert "Retry-After" not in answer.headers
    assert installation.client.admin("GET", "/tasks").status == 200


def test_an_error_instead_of_a_stream_leaves_no_stream(platform: LocalPlatform, installation: Installation) -> None:
    """Also one that comes after the platform opened it: the tasks it got are there for the next."""
    task_id = installation.submit()
    platform.faults.error(500, times=1, on="task_stream", when="after")
    assert installation.refused().status == 500
    until(lambda: platform.streams() == [])
    with installation.stream() as stream:
        assert stream.next("task")["task_id"] == task_id


# -- pages and interim answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 202, 302, 401, 404, 409, 413, 503, 599])
def test_any_page(platform: LocalPlatform, installation: Installation, status: int) -> None:
    """A page is HTML, whatever its status; nothing was done, and only a Retry-After that was asked for is sent."""
    task_id = given(installation)
    with platform.faults.page(status, on="complete", retry_after=7 if status == 503 else None) as page:
        sock = raw(installation, f"POST /api/v1/tasks/{task_id}/complete", b"{}")
        with contextlib.closing(sock):
            head, body = whole_answer(sock)
        assert head.startswith(f"HTTP/1.1 {status} ")
        assert "\r\nContent-Type: text/html" in head
        assert ("\r\nRetry-After: 7\r\n" in head) == (status == 503)
        assert ("\r\nLocation: " in head) == (status == 302)
        assert body.startswith(b"<!DOCTYPE html>")
        assert page.injected == 1
    assert platform.task(task_id)["status"] == "assigned"
    assert installation.complete(task_id).status == 200


def test_a_page_after_the_platform_has_acted(platform: LocalPlatform, installation: Installation) -> None:
    """The client sees a page, and the task is done."""
    task_id = given(installation)
    body = json.dumps({"task_id": task_id, "status": "completed", "output": 1, "attempt": 1}).encode()
    platform.faults.page(404, times=1, on="complete", when="after")
    with contextlib.closing(raw(installation, f"POST /api/v1/tasks/{task_id}/complete", body)) as sock:
        assert whole_answer(sock)[0].startswith("HTTP/1.1 404 ")
    assert platform.task(task_id)["status"] == "completed"
    assert platform.faults.injected["page"] == 1


def test_a_page_instead_of_a_stream(platform: LocalPlatform, installation: Installation) -> None:
    """A stream that was opened in vain is closed, and the next one gets the tasks."""
    task_id = installation.submit()
    platform.faults.page(200, times=1, on="task_stream", when="after")
    head = f"GET /api/v1/tasks/stream?agent_id={installation.agent_id}&worker_id=w1"
    with contextlib.closing(raw(installation, head)) as sock:
        assert "\r\nContent-Type: text/html" in whole_answer(sock)[0]
    until(lambda: platform.streams() == [])
    with installation.stream() as stream:
        assert stream.next("task")["task_id"] == task_id


@pytest.mark.parametrize("status", [100, 102, 103])
def test_interim_answers(platform: LocalPlatform, installation: Installation, status: int) -> None:
    """They come before the answer, also before an injected error and a stream; the real answer is whole."""
    platform.faults.interim(status)
    for path, wanted in (("installations", 401), ("tasks/stream?agent_id=a&worker_id=w1", 403)):
        with contextlib.closing(raw(installation, f"GET /api/v1/{path}")) as sock:
            assert whole_answer(sock)[0].startswith(f"HTTP/1.1 {status} ")
            assert whole_answer(sock)[0].startswith(f"HTTP/1.1 {wanted} ")
    platform.faults.error(503, on="installations")
    with contextlib.closing(raw(installation, "GET /api/v1/installations")) as sock:
        assert whole_answer(sock)[0].startswith(f"HTTP/1.1 {status} ")
        assert whole_answer(sock)[0].startswith("HTTP/1.1 503 ")
    assert platform.faults.injected["interim"] == 3


def test_an_old_client_gets_no_interim_answer(platform: LocalPlatform, installation: Installation) -> None:
    """HTTP/1.0 does not have them."""
    platform.faults.interim()
    with contextlib.closing(socket.create_connection(installation.client.address, GUARD)) as sock:
        sock.sendall(
            f"GET /api/v1/installations HTTP/1.0\r\nHost: 127.0.0.1:{installation.client.address[1]}\r\n\r\n".encode()
        )
        assert b" 401 " in sock.recv(1000)[:20]


def whole_answer(sock: socket.socket) -> Tuple[str, bytes]:
    """The next head and body; byte by byte, since another answer may follow."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = sock.recv(1)
        assert piece, head
        head += piece
    found = re.search(rb"\r\nContent-Length: ([0-9]+)\r\n", head)
    body = b""
    while found and len(body) < int(found.group(1)):
        body += sock.recv(int(found.group(1)) - len(body))
    return head.decode(), body


# -- resets and half answers ------------------------------------------------------------------------------------------


def raw(installation: Installation, head: str, body: bytes = b"") -> socket.socket:
    """A connection on which a whole request was sent at once."""
    sock = socket.create_connection(installation.client.address, timeout=GUARD)
    text = (
        f"{head} HTTP/1.1\r\nHost: 127.0.0.1:{installation.client.address[1]}\r\n"
        f"Authorization: Bearer {installation.token}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    sock.sendall(text.encode() + body)
    return sock


@pytest.mark.parametrize(("when", "status"), [("before", "assigned"), ("after", "completed")])
def test_a_reset_is_a_reset(platform: LocalPlatform, installation: Installation, when: str, status: str) -> None:
    """The client sees RST and no byte of an answer; before, nothing was done, and after, all was."""
    task_id = given(installation)
    body = json.dumps({"task_id": task_id, "status": "completed", "output": 1, "attempt": 1}).encode()
    with platform.faults.reset(on="complete", when=when):
        sock = raw(installation, f"POST /api/v1/tasks/{task_id}/complete", body)
        with contextlib.closing(sock), pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert platform.task(task_id)["status"] == status
    assert platform.requests[-1] == ("complete", 0)
    assert installation.complete(task_id, output=1).status == (200 if when == "before" else 409)
    assert platform.faults.injected["reset"] == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_reset_of_a_stream(platform: LocalPlatform, installation: Installation, when: str) -> None:
    """No stream is left of one that was reset as it opened."""
    task_id = installation.submit()
    with platform.faults.reset(on="task_stream", when=when):
        sock = raw(installation, f"GET /api/v1/tasks/stream?agent_id={installation.agent_id}&worker_id=w1")
        with contextlib.closing(sock), pytest.raises(ConnectionResetError):
            sock.recv(1)
    until(lambda: platform.streams() == [])
    with installation.stream() as stream:
        assert stream.next("task")["task_id"] == task_id


def test_half_answers(platform: LocalPlatform, installation: Installation) -> None:
    """Each time another part of the answer is missing, but the platform has acted."""
    platform.faults.half_answer(on="tasks")
    lengths = set()
    for n in range(1, 9):
        with pytest.raises(http.client.IncompleteRead) as caught:
            installation.submit()
        assert caught.value.expected
        lengths.add(len(caught.value.partial))
        assert platform.faults.injected["half_answer"] == n
    assert len(lengths) > 1
    platform.faults.clear()
    assert len(installation.client.admin("GET", "/tasks").body["tasks"]) == 8


def test_half_streams(platform: LocalPlatform, installation: Installation) -> None:
    """A stream is cut in the middle of one of its first events, and each of them can be it."""
    tasks = [installation.submit() for _ in range(8)]
    platform.faults.half_answer(on="task_stream")
    whole = set()
    for _ in range(30):
        connection, response = installation.open()
        assert response.status == 200
        with pytest.raises(http.client.IncompleteRead) as caught:
            response.read()
        connection.close()
        text = caught.value.partial
        *events, rest = text.split(b"\n\n")
        # The half event is there, and is not a whole one.
        assert rest.startswith((b"id: ", b"event: "))
        whole.add(len(events))
    assert whole == set(range(8))
    platform.faults.clear()
    with installation.stream() as stream:
        assert {stream.next("task")["task_id"] for _ in tasks} == set(tasks)


# -- latency ----------------------------------------------------------------------------------------------------------


def test_latency_before(platform: LocalPlatform, installation: Installation) -> None:
    """A delayed request has not reached the platform, others are not held up, and removing it lets it through."""
    task_id = given(installation)
    fault = platform.faults.latency(LONG, on="complete")
    call = Call(lambda: installation.complete(task_id))
    platform.faults.wait("latency", timeout=GUARD)
    assert installation.heartbeat().status == 200
    assert platform.task(task_id)["status"] == "assigned"
    assert call.is_alive()
    fault.remove()
    assert call.result().status == 200
    assert platform.task(task_id)["status"] == "completed"


def test_latency_after(platform: LocalPlatform, installation: Installation) -> None:
    """The platform has acted while the client waits for its answer; clear() lets it go."""
    task_id = given(installation)
    platform.faults.latency(LONG, on="complete", when="after")
    call = Call(lambda: installation.complete(task_id))
    assert platform.wait(task_id, GUARD)["status"] == "completed"
    platform.faults.wait("latency", timeout=GUARD)
    assert call.is_alive()
    platform.faults.clear()
    assert call.result().status == 200


def test_latency_ends_by_itself(platform: LocalPlatform, installation: Installation) -> None:
    """A short delay passes; several add up, and an error comes after them."""
    platform.faults.latency(0.001, 0.002)
    platform.faults.latency(0.001, when="after")
    platform.faults.error(500, times=1)
    assert submission(installation) == 500
    assert submission(installation) == 201
    # The answer that was never made was not late.
    assert platform.faults.injected == {**dict.fromkeys(EXAMPLES, 0), "latency": 3, "error": 1}


def test_a_spent_latency_still_delays_whom_it_struck(platform: LocalPlatform, installation: Installation) -> None:
    """times=1 applies to the next request. The one that was hit goes on waiting."""
    fault = platform.faults.latency(LONG, times=1, on="tasks")
    call = Call(lambda: submission(installation))
    platform.faults.wait("latency", timeout=GUARD)
    assert fault.is_over()
    assert submission(installation) == 201
    assert call.is_alive()
    fault.remove()
    assert call.result() == 201


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_stop_gives_delayed_requests_up(make: Make, when: str) -> None:
    """The platform stops at once; what was on its way to it never arrives."""
    platform = make()
    installation = client_of(platform).install()
    platform.faults.latency(LONG, on="tasks", when=when)
    with installation.stream() as stream:
        call = Call(lambda: submission(installation))
        platform.faults.wait("latency", timeout=GUARD)
        if when == "after":
            # The fault counts as injected when the request comes; that it was handled, the stream says.
            stream.next("task")
        platform.stop()
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        call.result()
    platform.faults.clear()
    platform.start()
    tasks = client_of(platform).admin("GET", "/tasks").body["tasks"]
    assert len(tasks) == (0 if when == "before" else 1)


# -- chance -----------------------------------------------------------------------------------------------------------


def _luck(make: Make, seed: int, disturbed: bool = False) -> List[int]:
    platform = make(faults=Faults(seed))
    installation = client_of(platform).install()
    platform.faults.error(503, rate=0.3, on=["tasks", "heartbeat"])
    platform.faults.error(500, rate=0.3, on="tasks")
    found = []
    for number in range(60):
        found.append(submission(installation))
        if disturbed and number % 3 == 0:
            installation.heartbeat()
    return found


def test_the_same_seed_gives_the_same_faults(make: Make) -> None:
    """The n-th request of an endpoint meets the same fault, whatever requests other endpoints get."""
    first = _luck(make, 7)
    assert set(first) == {201, 500, 503}
    assert _luck(make, 7, disturbed=True) == first
    assert _luck(make, 8) != first


def test_a_drawn_seed_can_be_repeated(make: Make) -> None:
    """Faults(None) draws a seed and returns it."""
    drawn = Faults(None)
    assert drawn.seed != Faults(None).seed
    assert Faults(drawn.seed).seed == drawn.seed
    assert Faults().seed == 0


def test_rates(platform: LocalPlatform, installation: Installation) -> None:
    """Rate 0 never strikes, rate 1 always, and another in between."""
    with platform.faults.error(rate=0), platform.faults.error(rate=0.25) as some:
        statuses = [submission(installation) for _ in range(100)]
    assert statuses.count(503) == some.injected == platform.faults.injected["error"]
    assert 10 <= some.injected <= 40
    with platform.faults.error(rate=1) as always:
        assert [submission(installation) for _ in range(5)] == [503] * 5
    assert always.injected == 5


def test_times_is_exact_for_many_at_once(platform: LocalPlatform, installation: Installation) -> None:
    """Exactly N requests are hit, also if more come at the same time."""
    fault = platform.faults.error(503, times=7)
    calls = [Call(lambda: [submission(installation) for _ in range(5)]) for _ in range(8)]
    statuses = [status for call in calls for status in call.result()]
    assert statuses.count(503) == 7 == fault.injected
    assert platform.faults.standing == []
    assert platform.faults.active is False


# -- streams ----------------------------------------------------------------------------------------------------------


def test_cut_streams(platform: LocalPlatform, installation: Installation) -> None:
    """Every open stream is cut, and counted; with none open, nothing has happened."""
    assert platform.faults.cut_streams().injected == 0
    with installation.stream("w1") as one, installation.stream("w2") as two:
        fault = platform.faults.cut_streams()
        assert fault.is_over()
        assert fault.injected == platform.faults.injected["cut_streams"] == 2
        assert one.next() is two.next() is None
    with installation.stream("w1") as one:
        assert submission(installation) == 201
        one.next("task")


def test_cut_streams_again_and_again(platform: LocalPlatform, installation: Installation) -> None:
    """With every= it goes on until it has happened often enough; a time without a stream is none."""
    fault = platform.faults.cut_streams(every=(0.01, 0.02), times=2)
    while not fault.is_over():
        try:
            stream = installation.stream()
        except (OSError, http.client.HTTPException, AssertionError):
            # Cut before its first event was read.
            continue
        with stream, contextlib.suppress(TimeoutError, socket.timeout):
            # A stream that was opened just after the last cut is not cut.
            stream._connection.sock.settimeout(0.2)
            assert stream.next() is None
    assert fault.injected == 2
    assert platform.faults.standing == []


def _silent(sock: socket.socket) -> bool:
    return not select.select([sock], [], [], 0)[0]


def test_stall_streams(make: Make) -> None:
    """Not a byte comes, no comment either, until it is over; then all that came up is there, in order."""
    platform = make(keepalive_interval=0.02)
    installation = client_of(platform).install()
    with installation.stream("w1") as stalled:
        sock = stalled._connection.sock
        fault = platform.faults.stall_streams(LONG)
        assert fault.injected == 1
        assert platform.faults.standing == [fault]
        tasks = [installation.submit() for _ in range(3)]
        with installation.stream("w2", max_in_flight=0) as other:
            # What was sent before the stall has passed, and a stream opened during the stall is the clock.
            for _ in range(3):
                assert other.line() == ": keep-alive\n"
                assert other.line() == "\n"
            while not _silent(sock):
                stalled.line()
            for _ in range(10):
                assert other.line() == ": keep-alive\n"
                assert other.line() == "\n"
        assert _silent(sock)
        fault.remove()
        assert [stalled.next("task")["task_id"] for _ in tasks] == tasks
        assert fault.is_over()


def test_a_stall_ends_by_itself(platform: LocalPlatform, installation: Installation) -> None:
    """After its seconds the events come, and it stands no more."""
    with installation.stream() as stream:
        fault = platform.faults.stall_streams(0.05)
        longer = platform.faults.stall_streams((0.06, 0.07))
        task_id = installation.submit()
        assert stream.next("task")["task_id"] == task_id
        until(lambda: fault.is_over() and longer.is_over())
    assert platform.faults.injected["stall_streams"] == 2


@pytest.mark.parametrize("end", ["stop", "cut"])
def test_the_end_of_a_stalled_stream(platform: LocalPlatform, installation: Installation, end: str) -> None:
    """A stalled stream ends as any other."""
    with installation.stream() as stream:
        platform.faults.stall_streams(LONG)
        installation.submit()
        platform.stop() if end == "stop" else platform.faults.cut_streams()
        assert stream.next() is None


def test_stalls_again_and_again(platform: LocalPlatform, installation: Installation) -> None:
    """With every= and times= a stall comes so often."""
    with installation.stream():
        fault = platform.faults.stall_streams(0.01, every=0.01, times=3)
        until(fault.is_over)
    assert fault.injected == 3


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_expire_tokens(platform: LocalPlatform, installation: Installation) -> None:
    """The live runtime tokens are refused from now on, of one installation or of all; refresh tokens are not."""
    other = client_of(platform).install()
    assert platform.faults.expire_tokens(installation.id).injected == 1
    assert (installation.heartbeat().status, other.heartbeat().status) == (401, 200)
    assert platform.faults.expire_tokens().injected == 1
    assert other.heartbeat().code == "TOKEN_EXPIRED"
    assert other.refresh(other.grant["refresh_token"]).status == 200
    assert platform.faults.injected["expire_tokens"] == 2


def test_expire_tokens_again_and_again(platform: LocalPlatform, installation: Installation) -> None:
    """With every= tokens given out later expire too."""
    fault = platform.faults.expire_tokens(every=0.01, times=2)
    platform.faults.wait("expire_tokens", 1, GUARD)
    installation.refresh(installation.grant["refresh_token"])
    platform.faults.wait("expire_tokens", 2, GUARD)
    assert fault.is_over()


# -- outages ----------------------------------------------------------------------------------------------------------


def test_an_outage(platform: LocalPlatform, installation: Installation) -> None:
    """Idle connections and streams are reset and new ones refused; afterwards all is as before, on the same port."""
    address = client_of(platform).address
    idle = installation.client.connect()
    idle.request("GET", "/api/v1/tasks", headers={"X-API-Key": platform.api_key})
    idle.getresponse().read()
    connection, response = installation.open()
    response.readline()
    with platform.faults.outage() as fault:
        with pytest.raises(ConnectionResetError):
            idle.sock.recv(1)
        stream_socket = response.fp.raw._sock  # type: ignore[attr-defined]
        with pytest.raises(ConnectionResetError):
            while stream_socket.recv(65536):
                pass
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address)
        # The Python face is not behind that network.
        task_id = platform.submit("work", {}, installation.agent_id)
        assert platform.streams() == []
        assert platform.installations()[0]["installation_id"] == installation.id
        assert not fault.is_over()
        assert platform.faults.standing == [fault]
    assert fault.is_over()
    assert client_of(platform).address == address
    with installation.stream() as stream:
        assert stream.next("task")["task_id"] == task_id
    assert platform.faults.injected["outage"] == 1
    idle.close()
    connection.close()


def test_nobody_else_gets_the_port_in_an_outage(platform: LocalPlatform, installation: Installation) -> None:
    """It stays taken, so that another program's server does not answer in the platform's place."""
    with platform.faults.outage(), socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(client_of(platform).address)


@pytest.mark.skipif(os.name != "posix", reason="two sockets on a port, as POSIX allows it")
def test_a_port_that_was_taken_in_an_outage(platform: LocalPlatform, installation: Installation) -> None:
    """A program that forces its way onto the port is named as the reason; when it goes, the platform comes back."""
    fault = platform.faults.outage()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(client_of(platform).address)
        other.listen()
        with pytest.raises(ConfigurationError, match=r"^port: port \d+ on 127.0.0.1 is taken"):
            fault.remove()
    until(lambda: _status_or_none(installation) == 201)


def _status_or_none(installation: Installation) -> Optional[int]:
    try:
        return submission(installation)
    except OSError:
        return None


def test_an_outage_that_ends_by_itself(platform: LocalPlatform, installation: Installation) -> None:
    """After its seconds the platform is back."""
    fault = platform.faults.outage(0.05)
    until(fault.is_over)
    until(lambda: _status_or_none(installation) == 201)


def test_outages_again_and_again(platform: LocalPlatform, installation: Installation) -> None:
    """With every= they come so often, each with a length of its own."""
    fault = platform.faults.outage((0.005, 0.02), every=(0.005, 0.02), times=3)
    until(fault.is_over)
    assert fault.injected == 3
    until(lambda: _status_or_none(installation) == 201)


def test_outages_that_overlap(platform: LocalPlatform, installation: Installation) -> None:
    """The platform is back when the last one is over."""
    address = client_of(platform).address
    first = platform.faults.outage()
    second = platform.faults.outage()
    first.remove()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    second.remove()
    assert submission(installation) == 201


def test_an_outage_with_a_status(platform: LocalPlatform, installation: Installation) -> None:
    """Streams are cut and every request gets that answer, whatever other faults there are."""
    with installation.stream() as stream:
        platform.faults.error(500)
        with platform.faults.outage(status=503, retry_after=2) as fault:
            assert stream.next() is None
            for answer in (
                installation.refused(),
                installation.heartbeat(),
                client_of(platform).admin("GET", "/tasks"),
            ):
                assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
            assert fault.injected == 1
    assert submission(installation) == 500
    assert platform.faults.injected["error"] == 1


def test_an_outage_loses_what_is_on_its_way(platform: LocalPlatform, installation: Installation) -> None:
    """A request delayed before is never seen, an answer delayed after is never sent."""
    early, late = given(installation), given(installation)
    platform.faults.latency(LONG, times=1, on="complete")
    first = Call(lambda: installation.complete(early))
    platform.faults.wait("latency", 1, GUARD)
    platform.faults.latency(LONG, times=1, on="complete", when="after")
    second = Call(lambda: installation.complete(late))
    platform.wait(late, GUARD)
    platform.faults.wait("latency", 2, GUARD)
    with platform.faults.outage():
        for call in (first, second):
            with pytest.raises((ConnectionError, http.client.HTTPException)):
                call.result()
        # Neither goes on when the faults end, because both have ended.
        until(lambda: platform.count("complete", 0) == 2)
    platform.faults.clear()
    # On a slow machine the platform has taken the first one back by now.
    assert platform.task(early)["status"] in ("assigned", "queued")
    assert platform.task(late)["status"] == "completed"


def test_a_stop_in_an_outage(make: Make) -> None:
    """A platform can be stopped, and started, in an outage, which ends with it."""
    platform = make()
    installation = client_of(platform).install()
    now = platform.faults.outage()
    again = platform.faults.outage(LONG, every=LONG)
    platform.stop()
    assert now.is_over()
    assert not again.is_over()
    now.remove()
    platform.start()
    assert submission(installation) == 201
    assert platform.faults.standing == [again]


def test_outages_from_many_threads(platform: LocalPlatform, installation: Installation) -> None:
    """Whatever order they begin and end in, the platform is there when all are over."""

    def go() -> None:
        for _ in range(5):
            with platform.faults.outage():
                pass

    for call in [Call(go) for _ in range(4)]:
        call.result()
    assert platform.faults.injected["outage"] == 20
    assert submission(installation) == 201


# -- what they are told, and tell -------------------------------------------------------------------------------------


def test_faults_can_be_made_before_the_platform(make: Make) -> None:
    """They are given to it, and strike from its start."""
    faults = Faults(seed=3)
    faults.error(503, times=1)
    faults.expire_tokens(every=0.01, times=1)
    platform = make(faults=faults)
    assert platform.faults is faults
    assert client_of(platform).admin("GET", "/tasks").status == 503
    client_of(platform).install()
    faults.wait("expire_tokens", timeout=GUARD)


def test_a_running_platform_has_its_faults_alone(make: Make) -> None:
    """A second platform is refused them, and has kept nothing of its port; after the first one's stop it gets them."""
    faults = Faults()
    first = make(faults=faults)
    second = LocalPlatform(faults=faults)
    with pytest.raises(ConfigurationError, match=r"^faults: another running platform has them"):
        second.start()
    first.stop()
    with second:
        assert client_of(second).admin("GET", "/tasks").status == 200


def test_counts_and_waiting(platform: LocalPlatform, installation: Installation) -> None:
    """injected has every kind; wait() returns when the count is there, and raises when it is not."""
    faults = platform.faults
    assert faults.injected == dict.fromkeys(EXAMPLES, 0)
    faults.wait("error", 0)
    with pytest.raises(TimeoutError, match=r"^error was injected 0 and not 1 times within 0\.01 s$"):
        faults.wait("error", timeout=0.01)
    waiting = Call(lambda: faults.wait("error", 3, GUARD))
    # Three times: a client may send a request again whose connection was closed while it was idle.
    with faults.error(503, times=3):
        for _ in range(3):
            submission(installation)
    waiting.result()
    faults.clear()
    assert faults.injected["error"] == 3
    assert "seed=0: none" in repr(faults)


def test_many_faults_at_once(platform: LocalPlatform, installation: Installation) -> None:
    """Standing ones are listed in order; of errors, resets and half answers the first one strikes."""
    faults = platform.faults
    made = [
        faults.error(500, on="heartbeat"),
        faults.cut_streams(every=LONG),
        faults.error(503, times=1),
        faults.error(504),
    ]
    assert faults.standing == made
    assert [installation.heartbeat().status, submission(installation), submission(installation)] == [500, 503, 504]
    assert faults.standing == [made[0], made[1], made[3]]
    assert "<Fault error:500,on=heartbeat>" in repr(made[0])
    faults.clear()
    assert faults.standing == []
    assert all(fault.is_over() for fault in made)


BAD_NUMBERS = [-1, float("nan"), float("inf"), True, "1", None, 1e9]


@pytest.mark.parametrize(
    ("method", "arguments", "option"),
    [
        *(("latency", {"low": value}, "low") for value in BAD_NUMBERS),
        ("latency", {"low": 0}, "seconds"),
        ("latency", {"low": 2, "high": 1}, "high"),
        ("latency", {"low": 1, "when": "later"}, "when"),
        *(("error", {"rate": value}, "rate") for value in BAD_NUMBERS),
        ("error", {"rate": 1.01}, "rate"),
        *(("error", {"status": value}, "status") for value in (0, 200, 299, 600, 500.0, True, "503", None)),
        *(("error", {"times": value}, "times") for value in (0, -1, 1.5, True, "1")),
        *(("error", {"on": value}, "on") for value in ("", [], "completes", ["complete", "x"], 1, None, {"*": 1})),
        *(("error", {"retry_after": value}, "retry_after") for value in (-1, 0.5, True, "1", 100_000)),
        *(("error", {"code": value}, "code") for value in ("", "two words", "a\r\nb", 1)),
        ("reset", {"when": None}, "when"),
        ("half_answer", {"rate": 2}, "rate"),
        *(("page", {"status": value}, "status") for value in (199, 204, 205, 304, 600, "404", None)),
        *(("interim", {"status": value}, "status") for value in (99, 101, 200, True, None)),
        ("cut_streams", {"every": 0}, "every"),
        ("cut_streams", {"every": (2, 1)}, "every"),
        ("cut_streams", {"every": (1, 2, 3)}, "every"),
        ("cut_streams", {"times": 2}, "times"),
        ("stall_streams", {"seconds": -1}, "seconds"),
        ("expire_tokens", {"installation_id": 1}, "installation_id"),
        ("outage", {"every": 1}, "seconds"),
        ("outage", {"seconds": "3"}, "seconds"),
        ("outage", {"retry_after": 1}, "retry_after"),
        ("outage", {"status": 200}, "status"),
    ],
)
def test_wrong_arguments(method: str, arguments: Dict[str, Any], option: str) -> None:
    """A ConfigurationError names the argument, and nothing is set."""
    faults = Faults()
    with pytest.raises(ConfigurationError) as caught:
        getattr(faults, method)(**arguments)
    assert caught.value.option == option
    assert faults.standing == []


@pytest.mark.parametrize("method", ["cut_streams", "expire_tokens", "outage"])
def test_a_moment_needs_a_running_platform(method: str) -> None:
    """What would happen now cannot, before start(); the text says what to do."""
    platform = LocalPlatform()
    with pytest.raises(ConfigurationError, match="start it first, or give every="):
        getattr(platform.faults, method)()
    assert platform.faults.standing == []


def test_wrong_kinds_of_objects() -> None:
    """faults= takes Faults, a seed is an integer, wait() knows its kinds."""
    with pytest.raises(ConfigurationError, match=r"^faults: "):
        LocalPlatform(faults=7)  # type: ignore[arg-type]
    for seed in ("7", 1.5, True):
        with pytest.raises(ConfigurationError, match=r"^seed: "):
            Faults(seed)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"^kind: must be one of latency, "):
        Faults().wait("errors")


# -- as text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        *((text, text) for text in EXAMPLES.values()),
        ("error", "error:503"),
        ("error:rate=0.1,status=500,on=complete+heartbeat", "error:500,rate=0.1,on=complete+heartbeat"),
        ("error:status=429,retry_after=2,code=SLOW,times=3,when=after", None),
        (" latency : seconds = 0.1-0.2 , on = * ", "latency:0.1-0.2"),
        ("latency:0-0.5", "latency:0-0.5"),
        ("latency:2", "latency:2"),
        ("reset", "reset"),
        ("half_answer:on=task_stream", "half-answer:on=task_stream"),
        ("page:404,retry_after=2,when=after", "page:404,when=after,retry-after=2"),
        ("page", "page:502"),
        ("interim:on=complete", "interim:103,on=complete"),
        ("stall-streams:1-2,every=3,times=4", "stall-streams:1-2,every=3,times=4"),
        ("outage:3,every=4,status=503,retry-after=1", "outage:3,every=4,status=503,retry-after=1"),
    ],
)
def test_text(text: str, spelled: Optional[str]) -> None:
    """add() takes a fault as text, and str() gives it back so that add() takes that, and gives the same."""
    faults = Faults()
    fault = faults.add(text)
    assert isinstance(fault, Fault)
    assert spelled in (None, str(fault))
    again = faults.add(str(fault))
    assert (again.kind, again.terms, str(again)) == (fault.kind, fault.terms, str(fault))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "unknown kind; known are latency, error, reset, half-answer"),
        ("eror:rate=0.1", "unknown kind; known are latency, error, reset, half-answer"),
        ("error:rate", "status: must be a whole number, got 'rate'"),
        ("error:503,0.1", "'0.1' is not NAME=VALUE"),
        ("error:503,", "'' is not NAME=VALUE"),
        ("reset:0.5", "'0.5' is not NAME=VALUE"),
        ("error:rate=a", "rate: must be a number, got 'a'"),
        ("error:rate=2", "rate: must be a number from 0 to 1"),
        ("error:rate=nan", "rate: must be a number from 0 to 1"),
        ("error:503,status=500", "status: given twice"),
        ("error:times=-1", "times: must be a whole number"),
        ("error:every=3", "every: unknown argument; known are status, rate, times"),
        ("error:on=completes", "on: there is no endpoint 'completes'; known are approval, "),
        ("error:on=", "on: there is no endpoint ''"),
        ("latency", "seconds: missing"),
        ("latency:0.2-0.1", "high: must be a number of seconds from 0.2"),
        ("latency:-1", "seconds: must be seconds such as 0.5 or 0.1-0.5, got '-1'"),
        ("cut-streams", "every: missing"),
        ("stall-streams:every=3", "seconds: missing"),
        ("outage:3", "every: missing"),
        ("outage:every=3", "seconds: how long?"),
    ],
)
def test_wrong_text(text: str, problem: str) -> None:
    """Wrong text is reported with the reason and an example that works."""
    faults = Faults()
    with pytest.raises(ConfigurationError) as caught:
        faults.add(text)
    told = str(caught.value)
    assert told.startswith(f"fault: {text!r}: {problem}")
    example = told.rpartition("; for example ")[2]
    assert faults.standing == []
    assert str(faults.add(example)) == example


def test_text_that_is_none() -> None:
    """add() takes nothing but text."""
    with pytest.raises(ConfigurationError, match=r"^fault: must be text"):
        Faults().add(503)  # type: ignore[arg-type]


# -- the server under it ----------------------------------------------------------------------------------------------


def test_a_client_that_resets_its_own_connection_is_no_fault(platform: LocalPlatform) -> None:
    """A reset from outside leaves the server as it was."""
    with socket.create_connection(client_of(platform).address) as sock:
        sock.sendall(b"GET /api/v1/tasks HTTP/1.1\r\n")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert client_of(platform).admin("GET", "/tasks").status == 200


def test_faults_of_what_is_not_there(platform: LocalPlatform) -> None:
    """A path that the platform does not know is hit by faults of any endpoint, but not by those of a named one."""
    client = client_of(platform)
    with platform.faults.error(500, on="tasks"):
        assert client.admin("GET", "/nothing").status == 404
    with platform.faults.error(500):
        assert client.admin("GET", "/nothing").status == 500
