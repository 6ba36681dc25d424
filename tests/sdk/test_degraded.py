"""``required=False``: an application goes on where the platform cannot be reached, or refuses the agent."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

import pytest

from sekuire import Beacon, SekuireSDK
from sekuire.errors import AuthenticationError, ConfigurationError, RevokedError, StreamError

from ..conftest import AGENT
from ..support.scripted import Scripted
from ..support.servers import refusing_url
from ..support.waiting import GUARD, client_threads, until

#: Longer than a test may take: whoever waits for it, fails.
NEVER = 100_000.0


@pytest.fixture(params=[SekuireSDK, Beacon])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@contextlib.contextmanager
def made(kind: Any, url: str, **options: Any) -> Iterator[Any]:
    """An SDK or a Beacon, stopped at the end."""
    one = kind(
        AGENT,
        **{"api_base_url": url, "install_token": "skt-1", "heartbeat_interval": 0.05, "read_timeout": 5.0, **options},
    )
    try:
        yield one
    finally:
        (one.shutdown if isinstance(one, SekuireSDK) else one.stop)(1.0)


def status_of(one: Any) -> Any:
    return one.beacon_status if isinstance(one, SekuireSDK) else one.status


def echo(ctx: Any, input: Any) -> Any:
    return input


def test_a_refused_login(kind: Any, scripted: Scripted) -> None:
    """start() returns, and the state is *degraded* with the platform's words."""
    scripted.on["bootstrap"] = lambda request: (403, {"error": "x", "message": "no such agent"})
    with made(kind, scripted.url, required=False) as one:
        one.start(NEVER)
        assert status_of(one).state == "degraded"
        assert "no such agent" in status_of(one).error
        assert not one.installation_credentials
    with made(kind, scripted.url) as one, pytest.raises(AuthenticationError, match="no such agent"):
        one.start(NEVER)


def test_another_server_that_goes_away(kind: Any, scripted: Scripted) -> None:
    """A login that another server answers is tried again, and the state follows."""
    scripted.on["bootstrap"] = lambda request: (404, b"<h1>Not here</h1>", {"Content-Type": "text/html"})
    with made(kind, scripted.url, required=False) as one:
        one.start(NEVER)
        assert status_of(one).state == "degraded"
        del scripted.on["bootstrap"]
        until(one.is_connected)
        assert one.installation_credentials


def test_nothing_to_log_in_with(kind: Any, scripted: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    """Without credentials nothing is sent, and one line says what is missing."""
    with made(kind, scripted.url, install_token=None, required=False) as one:
        one.start(NEVER)
        assert status_of(one).state == "degraded"
        assert "SEKUIRE_INSTALL_TOKEN" in status_of(one).error
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "the agent goes on without the platform"
    ]
    assert not scripted.requests
    with pytest.raises(ConfigurationError, match="no credentials"), made(kind, scripted.url, install_token=None):
        pass


def test_a_revocation_is_raised(kind: Any, scripted: Scripted) -> None:
    """The kill switch counts for an agent that could do without the platform too."""
    scripted.on["heartbeat"] = lambda request: (200, {"revoked": True, "reason": "breach"})
    with made(kind, scripted.url, required=False) as one, pytest.raises(RevokedError, match="breach"):
        one.start(NEVER)
    assert status_of(one).state == "revoked"


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5", None, True])
def test_a_wrong_timeout(kind: Any, scripted: Scripted, timeout: Any) -> None:
    """``timeout`` is a number of seconds; a wrong one leaves the object as it was."""
    with made(kind, scripted.url) as one:
        with pytest.raises(ConfigurationError, match="timeout"):
            one.start(timeout)
        one.start()
        assert one.is_connected()


def test_start_waits_once_in_all() -> None:
    """The worker does not wait again for a platform that its SDK has waited for in vain."""
    with refusing_url() as url, made(SekuireSDK, url, required=False) as sdk:
        worker = sdk.create_task_worker(start_timeout=NEVER)
        worker.on_task("echo", echo)
        sdk.start(0.2)
        assert sdk.beacon_status.state in ("connecting", "degraded")
        worker.start()
        assert worker.is_running()
        assert not worker.is_connected()
        worker.stop(1.0)
    until(lambda: not client_threads())


def test_a_worker_goes_on_trying(scripted: Scripted) -> None:
    """A worker of such an SDK is not ended by a refusal, and works once it is let in."""
    scripted.on["bootstrap"] = lambda request: (404, b"<h1>Not here</h1>", {"Content-Type": "text/html"})
    with made(SekuireSDK, scripted.url, required=False) as sdk:
        worker = sdk.create_task_worker(start_timeout=NEVER, reconnect_min=0.05, reconnect_max=0.1)
        worker.on_task("echo", echo)
        sdk.start(NEVER)
        worker.start()
        assert worker.is_running()
        del scripted.on["bootstrap"]
        assert worker.wait_until_connected(GUARD)


def test_a_worker_with_nothing_to_log_in_with(scripted: Scripted) -> None:
    """start() says so and returns; a process that is nothing but this worker ends with the error."""
    with made(SekuireSDK, scripted.url, install_token=None, required=False) as sdk:
        worker = sdk.create_task_worker()
        worker.on_task("echo", echo)
        sdk.start()
        worker.start()
        assert not worker.is_running()
        with pytest.raises(ConfigurationError, match="SEKUIRE_INSTALL_TOKEN"):
            worker.start(block=True)
        worker.stop()


def test_a_stream_that_is_refused(scripted: Scripted) -> None:
    """A refused stream ends a worker that is required, and not one that can do without."""
    scripted.on["stream"] = lambda request: (403, {"error": "forbidden", "message": "not your stream"})
    for required in (False, True):
        with made(SekuireSDK, scripted.url, required=required) as sdk:
            worker = sdk.create_task_worker(start_timeout=NEVER)
            worker.on_task("echo", echo)
            sdk.start(NEVER)
            if required:
                with pytest.raises(StreamError, match="not your stream"):
                    worker.start()
            else:
                worker.start()
                assert worker.is_running()
