"""How long a runtime token lives, as its answers say over real HTTP: up to 400 days, and what counts as unknown."""

from __future__ import annotations

import datetime as dt
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import pytest

from sekuire import Beacon, RuntimeCredentialsStore
from sekuire.errors import AuthenticationError
from sekuire.wire import protocol

from ..conftest import AGENT
from ..support.scripted import Answer, Request, Scripted, grant
from ..support.waiting import SLACK, until
from .test_login import Clock, Make, clock, make, patience, token  # noqa: F401

DAY = 86_400.0


def ending(days: float) -> Tuple[str, Dict[str, str]]:
    """The end of a token, and the ``Date`` of the answer from which it counts."""
    now = dt.datetime.now(dt.timezone.utc).replace(microsecond=0)
    end = protocol.format_time(now + dt.timedelta(days=days))
    return end, {"Date": format_datetime(now, usegmt=True)}


def granting(scripted: Scripted, days: float, has_date: bool = True) -> None:
    """Have each login bring a token that lives so long, with a ``Date`` in the answer or without."""

    def answer(request: Request) -> Answer:
        number = sum(scripted.count(name) for name in ("bootstrap", "refresh"))
        end, date = ending(days)
        return 201, grant(f"skr_{number}", refresh_token=f"skf_{number}", expires_at=end), date if has_date else {}

    scripted.on["bootstrap"] = scripted.on["refresh"] = answer


def is_about(found: Optional[float], wanted: float) -> bool:
    return found is not None and wanted - SLACK < found <= wanted + 1.0


@pytest.mark.parametrize("has_date", [True, False])
@pytest.mark.parametrize("days", [300, 399])
def test_a_token_of_many_days(
    scripted: Scripted,
    make: Make,  # noqa: F811
    clock: Clock,  # noqa: F811
    days: int,
    has_date: bool,
) -> None:
    """It is used for all its days. Its renewal in the background begins within the last 5 minutes, once."""
    granting(scripted, days, has_date)
    auth = make(scripted, install_token="skt_install")
    assert is_about(auth.snapshot(patience()).time_left(), days * DAY)
    for passed in (0.0, DAY, 0.8 * days * DAY, (days - 1) * DAY, days * DAY - 300.0 - SLACK):
        clock.ahead = passed
        assert token(auth.snapshot(patience())) == "skr_1"
    assert not auth.is_renewing
    assert scripted.count("refresh") == 0
    # Within the window the present token is handed out, and another thread renews it.
    clock.ahead = days * DAY - 200.0
    assert token(auth.snapshot(patience())) == "skr_1"
    scripted.wait_for("refresh")
    clock.ahead = 0.0
    until(lambda: token(auth.snapshot(patience())) == "skr_2")
    assert scripted.count("refresh") == 1
    assert scripted.count("bootstrap") == 1


@pytest.mark.parametrize(("days", "has_date"), [(401, True), (401, False), (0, False), (-5, False), (-500, True)])
def test_an_end_that_is_not_meant(
    scripted: Scripted,
    make: Make,  # noqa: F811
    clock: Clock,  # noqa: F811
    days: int,
    has_date: bool,
) -> None:
    """Beyond 400 days, or past where no ``Date`` says so, the end is unknown: the token is used until a 401."""
    granting(scripted, days, has_date)
    auth = make(scripted, install_token="skt_install")
    assert auth.snapshot(patience()).time_left() is None
    for passed in (0.0, 399 * DAY, 5000 * DAY):
        clock.ahead = passed
        assert token(auth.snapshot(patience())) == "skr_1"
    assert scripted.count("refresh") == 0
    scripted.on["logs"] = lambda request: (
        (401, {"error": "unauthorized"}) if "skr_1" in request.headers["Authorization"] else (200, {})
    )
    reply, used = auth.request("POST", lambda snapshot: "/api/v1/logs", body=b"{}", deadline=patience())
    assert (reply.status, token(used)) == (200, "skr_2")
    assert scripted.count("refresh") == 1


@pytest.mark.parametrize("days", [0, -1, -399])
def test_an_end_that_has_passed(
    scripted: Scripted,
    make: Make,  # noqa: F811
    days: int,
) -> None:
    """A login whose token has expired by the answer's own ``Date`` is refused."""
    granting(scripted, days)
    with pytest.raises(AuthenticationError, match="has expired already"):
        make(scripted, install_token="skt_install").snapshot(patience())
    assert scripted.count("bootstrap") == 1


@pytest.mark.parametrize(
    ("days", "lifetime"), [(300, 300 * DAY), (399, 399 * DAY), (401, None), (0, None), (-5, None), (-500, None)]
)
def test_a_token_that_a_heartbeat_brings(scripted: Scripted, days: int, lifetime: Optional[float]) -> None:
    """The same holds for a heartbeat's token, which is used at once; one without a known end costs no login."""

    def beat(request: Request) -> Answer:
        end, date = ending(days)
        fields = {"refreshed_token": "skr_beat", "refreshed_token_expires_at": end}
        return 200, fields if scripted.count("heartbeat") == 1 else {}, date

    scripted.on["heartbeat"] = beat
    granting(scripted, 1)
    store = RuntimeCredentialsStore()
    beacon = Beacon(
        AGENT,
        api_base_url=scripted.url,
        install_token="skt_install",
        credentials_store=store,
        heartbeat_interval=0.05,
    )
    with beacon:
        beats = scripted.wait_for("heartbeat", 4)
        assert [one.headers["Authorization"] for one in beats[:2]] == ["Bearer skr_1", "Bearer skr_beat"]
        found = store.snapshot.lifetime
        assert found is None if lifetime is None else is_about(found, lifetime)
    assert (scripted.count("bootstrap"), scripted.count("refresh")) == (1, 0)


def test_over_a_restart(
    scripted: Scripted,
    make: Make,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The file keeps the end of a token of many days: the next run neither logs in nor renews."""
    granting(scripted, 399)
    path = tmp_path / "credentials.json"
    make(scripted, install_token="skt_install", store=RuntimeCredentialsStore(path=path)).snapshot(patience())
    again: Any = make(scripted, store=RuntimeCredentialsStore(path=path)).snapshot(patience())
    assert token(again) == "skr_1"
    assert is_about(again.time_left(), 399 * DAY)
    assert (scripted.count("bootstrap"), scripted.count("refresh")) == (1, 0)
