"""A program that uses the whole library, well and badly, and shows all that a tool could show of it.

Every logger logs at DEBUG, http.client may print what it sends, and each error is printed with the variables of its
frames. No frame of this file holds a secret: it reads them from the environment where it passes them on. At its end it
writes the secrets that it had into a file, for whoever scans the output.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import inspect
import json
import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from typing import Any, Callable, Dict, Iterator, List, Optional, Set
from urllib.parse import quote

from sekuire import (
    Beacon,
    PolicyClient,
    PolicyGateway,
    RuntimeCredentials,
    SekuireSDK,
    TaskError,
    WorkerConfig,
    beacon,
    create_worker,
)
from sekuire.policy import client as policy_client
from sekuire.policy.document import Rate
from sekuire.secret import Secret, living

from .waiting import GUARD

had: Set[str] = set()
#: What else gets each error, such as an error tracker.
reporters: List[Callable[[BaseException], object]] = []


def note() -> None:
    """Note the secrets that there are now."""
    had.update(secret.reveal() for secret in living() if len(secret.reveal()) >= 8)


def show(error: Optional[BaseException], seen: int = 0) -> None:
    """Print an error and all that it came from, with the variables of their frames."""
    if error is None or seen > 5:
        return
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    print("".join(shown.format()), repr(error), error.args, vars(error), file=sys.stderr)
    show(error.__cause__, seen + 1)
    show(error.__context__, seen + 1)
    if not seen:
        for report in reporters:
            report(error)


@contextlib.contextmanager
def shown_errors() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        show(error)
    note()


class LocalsFormatter(logging.Formatter):
    def formatException(self, ei: Any) -> str:
        return "".join(traceback.TracebackException(*ei, capture_locals=True).format())

    def format(self, record: logging.LogRecord) -> str:
        return f"{super().format(record)} {vars(record)}"


def listen() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LocalsFormatter("%(levelname)s %(name)s %(message)s"))
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.DEBUG)
    for name in list(logging.root.manager.loggerDict):
        logging.getLogger(name).setLevel(logging.DEBUG)
    http.client.HTTPConnection.debuglevel = 1
    threading.excepthook = lambda args: show(args.exc_value)


def look_at(*values: Any) -> None:
    """Print what a debugger, a pickle or a careless log line shows of an object."""
    for value in values:
        held = getattr(value, "__dict__", {})
        print(repr(value), str(value), held, json.dumps(held, default=repr), file=sys.stderr)
        with contextlib.suppress(Exception):
            print(pickle.dumps(value), file=sys.stderr)


def forms() -> Iterator[str]:
    """Every secret that there is, in every encoding. For an expression: it must not become a variable of a handler."""
    for secret in living():
        text = secret.reveal()
        if len(text) < 8:
            continue
        yield from (
            text,
            repr(text),
            json.dumps(text),
            json.dumps(json.dumps(text)),
            quote(text, safe=""),
            text.upper(),
        )
        yield base64.b64encode(text.encode()).decode()
        yield base64.urlsafe_b64encode(f"user:{text}".encode()).decode()
        yield text.encode().hex()


def work(sdk: SekuireSDK, worker: Any) -> None:
    """Register handlers that end in every way."""

    @worker.on_task("fine")
    def fine(ctx: Any, input: Any) -> Any:
        return {"fine": True}

    @worker.on_task("broken")
    def broken(ctx: Any, input: Any) -> Any:
        return 1 // (input or 0)

    @worker.on_task("quotes")
    def quotes(ctx: Any, input: Any) -> Any:
        raise ValueError(" and ".join(forms()))

    @worker.on_task("own_error")
    def own_error(ctx: Any, input: Any) -> Any:
        note()
        raise TaskError(
            f"code {next(forms())}", " ".join(forms()), details={"deep": [{text: {text}} for text in forms()]}
        )

    @worker.on_task("progress")
    def progress(ctx: Any, input: Any) -> Any:
        ctx.report_progress(0.5, " ".join(forms()))
        # So that it is sent before the task ends.
        ctx.wait_cancelled(1.0)
        for event in ("tool_execution", "model_call"):
            sdk.log(event, {"texts": list(forms()), **dict.fromkeys(forms(), 1)})
        return {}

    @worker.on_task("no_json")
    def no_json(ctx: Any, input: Any) -> Any:
        class Odd(Dict[str, int]):
            def items(self) -> Any:
                raise ValueError(" ".join(forms()))

        return Odd(one=1)


def live() -> None:
    """Log in, run what comes and be revoked."""
    sdk = SekuireSDK.from_env(heartbeat_interval=0.2, proxies={"https": os.environ["PROXY_WITH_PASSWORD"]})
    worker = sdk.create_task_worker(
        heartbeat_interval=0.2, reconnect_min=0.01, reconnect_max=0.05, outbox=os.environ["OUTBOX"]
    )
    work(sdk, worker)
    sdk.start()
    worker.start()
    assert worker.wait_until_connected(GUARD)
    generation = -1
    while worker.is_running():
        time.sleep(0.02)
        note()
        if sdk.config.credentials_store.generation != generation:
            generation = sdk.config.credentials_store.generation
            look_at(sdk, worker, sdk.config, worker.config, sdk.audit, sdk.audit.buffer, sdk.policy_gateway)
            look_at(worker.installation, worker.installation.http, worker.installation.http.route, sdk.beacon_status)
    sdk.shutdown(GUARD)


def be_refused(url: str) -> None:
    """Ask for everything where every answer is an error that quotes the request."""
    for given in ("SEKUIRE_INSTALL_TOKEN", "ODD_TOKEN"):
        with shown_errors():
            worker = create_worker(api_base_url=url, agent_id="a", install_token=os.environ[given], start_timeout=1.0)
            worker.on_task("*", lambda ctx, input: None)
            try:
                worker.start()
            finally:
                worker.stop(1.0)
    with shown_errors():
        one = Beacon(
            "a", api_base_url=url, installation_id="i", refresh_token=os.environ["ODD_TOKEN"],
            api_key=os.environ["SEKUIRE_API_KEY"], workspace_id="ws",
        )  # fmt: skip
        try:
            one.start()
        finally:
            one.stop(1.0)
    with shown_errors():
        PolicyClient(url, api_key=os.environ["ODD_TOKEN"]).fetch_active_policy("ws")


def meet_proxies() -> None:
    """Ask by a proxy that refuses and quotes, and by one that is not there."""
    for proxy in ("PROXY_WITH_PASSWORD", "DEAD_PROXY"):
        for url in ("http://platform.test", "https://platform.test"):
            with shown_errors():
                client = PolicyClient(
                    url,
                    api_key=os.environ["SEKUIRE_API_KEY"],
                    allow_insecure_http=True,
                    connect_timeout=2.0,
                    read_timeout=2.0,
                    proxies={"http": os.environ[proxy], "https": os.environ[proxy]},
                )
                look_at(client)
                client.fetch_active_policy("ws")


def be_wrong() -> None:
    """Give wrong values beside secrets, and secrets that are wrong."""
    with shown_errors():
        WorkerConfig(agent_id="a", install_token=os.environ["ODD_TOKEN"], max_workers=0)
    with shown_errors():
        WorkerConfig(agent_id="a", install_token=os.environ["ODD_TOKEN"] + "\n")
    with shown_errors():
        RuntimeCredentials(runtime_token=os.environ["ODD_TOKEN"], refresh_token=os.environ["ODD_TOKEN"] + "\n")
    with shown_errors():
        Secret(os.environ["ODD_TOKEN"] + "\n")
    with shown_errors():
        SekuireSDK("a", install_token=os.environ["ODD_TOKEN"], heartbeat_interval=-1)
    with shown_errors():
        create_worker(agent_id="a", install_token=os.environ["ODD_TOKEN"], proxies=os.environ["DEAD_PROXY"])
    with shown_errors():
        create_worker(agent_id="a", api_base_url=os.environ["DEAD_PROXY"], install_token=os.environ["ODD_TOKEN"])
    half = RuntimeCredentials.__new__(RuntimeCredentials)
    with shown_errors():
        half.__init__(runtime_token=os.environ["ODD_TOKEN"] + "\n")  # type: ignore[misc]
    look_at(half)


def count_elsewhere() -> None:
    """Count rates in stores that are wrong or not there, at addresses with a password."""
    client = PolicyClient(os.environ["SEKUIRE_API_URL"], api_key=os.environ["SEKUIRE_API_KEY"])
    for name in ("DEAD_STORE", "WRONG_STORE"):
        with shown_errors():
            gateway = PolicyGateway(client, "ws", storage_uri=os.environ[name])
            look_at(gateway)
            # Not pickled: a handler in another process needs the address.
            print(gateway.limiter, vars(gateway.limiter), file=sys.stderr)
            gateway.limiter.hit("requests", Rate(max_per_minute=1))
        with shown_errors():
            sdk = SekuireSDK.from_env(policy_options={"storage_uri": os.environ[name]})
            look_at(sdk.config)


def be_interrupted() -> None:
    """Press Ctrl-C while a call waits for its answer."""
    policy_client.FETCH_TIMEOUT = GUARD
    client = PolicyClient(os.environ["SILENT_URL"], api_key=os.environ["ODD_TOKEN"], read_timeout=GUARD)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with shown_errors():
        client.fetch_active_policy("ws")
    timer.join()


def main() -> None:
    # Each of many calls and logins below fails, and would be tried again for as long.
    policy_client.FETCH_TIMEOUT = 0.5
    for start in (beacon.LeaseKeeper.start, SekuireSDK.start):
        inspect.unwrap(start).__defaults__ = (0.5,)
    listen()
    live()
    be_refused(os.environ["ECHO_URL"])
    be_refused(os.environ["BROKEN_URL"])
    meet_proxies()
    be_wrong()
    count_elsewhere()
    be_interrupted()
    note()
    with open(os.environ["SECRETS_FILE"], "w") as file:
        json.dump(sorted(had), file)
    print("the end", file=sys.stderr)


if __name__ == "__main__":
    main()
