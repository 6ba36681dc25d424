"""The commands read a .env file: which settings come from it, and which combinations are refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import List

import pytest

from sekuire import RuntimeCredentials
from sekuire.credentials.file import CredentialsFile, Stored
from sekuire.local import LocalPlatform

from .conftest import AGENT, POSIX_ONLY, Call, Run, variables

WORKER = """
from sekuire import SekuireSDK

def make():
    sdk = SekuireSDK.from_env({options})
    sdk.start()
    worker = sdk.create_task_worker(heartbeat_interval=0.2)
    worker.on_task("echo", lambda ctx, input: input)
    return worker
"""


def write(directory: Path, platform: LocalPlatform, name: str = ".env", **more: str) -> Path:
    path = directory / name
    settings = {**variables(platform), "SEKUIRE_API_KEY": platform.api_key, **more}
    path.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    path.chmod(0o600)
    return path


def test_send_finds_it(call: Call, platform: LocalPlatform, tmp_path: Path) -> None:
    """The file in the current directory is read and named; afterwards the environment is as before."""
    write(tmp_path, platform)
    code, out, err = call("send", "echo", "1")
    assert code == 0
    assert platform.task(out.strip())["agent_id"] == AGENT
    assert err == "settings from .env: 4 variables\n"
    assert [name for name in os.environ if name.startswith("SEKUIRE_")] == []


def test_the_environment_wins(call: Call, platform: LocalPlatform, tmp_path: Path) -> None:
    write(tmp_path, platform)
    code, out, err = call("send", "echo", "1", env={"SEKUIRE_AGENT_ID": "another"})
    assert code == 0
    assert platform.task(out.strip())["agent_id"] == "another"
    assert err == "settings from .env: 3 variables; the environment itself sets SEKUIRE_AGENT_ID\n"


def test_a_wrong_key(call: Call, platform: LocalPlatform, tmp_path: Path) -> None:
    """The refusal names the file that it came from."""
    write(tmp_path, platform, SEKUIRE_API_KEY="sk_live_wrong")
    code, _, err = call("send", "echo", "1")
    assert code == 1
    assert "the platform refused the API key from SEKUIRE_API_KEY in .env: " in err


def test_a_named_file(call: Call, platform: LocalPlatform, tmp_path: Path) -> None:
    """--env-file names another; then .env is not read."""
    (tmp_path / ".env").write_text("SEKUIRE_A\n")
    write(tmp_path, platform, "local.env")
    code, _, err = call("send", "echo", "1", "--env-file", "local.env")
    assert (code, err) == (0, "settings from local.env: 4 variables\n")
    code, _, err = call("send", "echo", "1", "--env-file", "missing")
    assert (code, err) == (2, "sekuire send: error: there is no file 'missing'\n")
    code, _, err = call("send", "echo", "1")
    assert (code, err) == (2, "sekuire send: error: .env, line 1: must be NAME=VALUE\n")


def test_a_key_from_elsewhere(call: Call, platform: LocalPlatform, tmp_path: Path) -> None:
    """It never goes to the address of the file. With --url, the file does not name the address."""
    write(tmp_path, platform)
    (tmp_path / "key").write_text(platform.api_key)
    requests = len(platform.requests)
    code, _, err = call("send", "echo", "1", "--api-key-file", "key")
    assert code == 2
    assert "a credential comes from --api-key-file: a file must not decide where other credentials go" in err
    code, _, err = call("send", "echo", "1", env={"SEKUIRE_API_KEY": "sk_live_production"})
    assert code == 2
    assert "a credential comes from the environment (SEKUIRE_API_KEY)" in err
    assert "sk_live" not in err
    assert len(platform.requests) == requests
    assert call("send", "echo", "1", "--api-key-file", "key", "--url", platform.url)[0] == 0


@pytest.mark.parametrize("command", [["policy", "show"], ["doctor"], ["worker", "x:y"], ["send", "echo", "1"]])
def test_stored_credentials(call: Call, platform: LocalPlatform, tmp_path: Path, command: List[str]) -> None:
    """Those of another login are not sent to the file's address."""
    login = RuntimeCredentials(installation_id="i", runtime_token="rt_production")
    CredentialsFile(tmp_path / "stored.json").save(Stored(credentials=login, revision=1, seeds=("of another login",)))
    write(tmp_path, platform)
    code, _, err = call(*command, env={"SEKUIRE_CREDENTIALS_FILE": "stored.json"})
    assert code == 2
    assert "a credential comes from the file 'stored.json'" in err
    assert "rt_production" not in err
    assert platform.requests == []


@pytest.mark.parametrize("command", ["send", "doctor", "worker", "policy"])
def test_an_address_elsewhere(call: Call, tmp_path: Path, command: str) -> None:
    (tmp_path / ".env").write_text("SEKUIRE_API_URL=https://platform.example\n")
    (tmp_path / ".env").chmod(0o600)
    rest = {"send": ["echo", "1"], "worker": ["x:y"], "policy": ["show"]}.get(command, [])
    code, _, err = call(command, *rest)
    assert code == 2
    assert "may name this machine only" in err


def test_commands_that_need_none(call: Call, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SEKUIRE_A\n")
    code, _, err = call("id")
    assert "SEKUIRE_A" not in err
    assert code == 2


def test_doctor(call: Call, platform: LocalPlatform, tmp_path: Path) -> None:
    write(tmp_path, platform, SEKUIRE_CREDENTIALS_FILE="credentials.json")
    code, out, err = call("doctor")
    assert code == 0, out
    assert "API key: was accepted" in out
    assert err == "settings from .env: 5 variables\n"


@pytest.mark.slow
@POSIX_ONLY
@pytest.mark.parametrize("reloads", [False, True])
def test_a_worker(run: Run, platform: LocalPlatform, tmp_path: Path, reloads: bool) -> None:
    """The variables are there for the module, also in the child of --reload."""
    if reloads:
        pytest.importorskip("watchfiles")
    write(tmp_path, platform)
    (tmp_path / "tasks.py").write_text(WORKER.format(options=""))
    process = run("worker", "tasks:make", "-v", *(["--reload"] if reloads else []))
    process.line("stderr", "connected to ")
    process.line("stderr", "settings from .env: 4 variables")
    assert platform.wait(platform.submit("echo", 5, AGENT), 60)["output"] == 5
    process.signal(signal.SIGTERM)
    code, _, err = process.end()
    assert code == 0
    assert "the environment itself sets" not in err.replace("sets SEKUIRE_CREDENTIALS_FILE", "")


@pytest.mark.slow
@POSIX_ONLY
@pytest.mark.parametrize("reloads", [False, True])
def test_a_token_in_the_module(run: Run, platform: LocalPlatform, tmp_path: Path, reloads: bool) -> None:
    """A credential in code does not go to the address of a file either."""
    if reloads:
        pytest.importorskip("watchfiles")
    write(tmp_path, platform)
    (tmp_path / "tasks.py").write_text(WORKER.format(options="install_token='skt_production'"))
    process = run("worker", "tasks:make", *(["--reload"] if reloads else []))
    process.line("stderr", "a credential comes from the option install_token")
    assert platform.count("bootstrap") == 0
    process.signal(signal.SIGTERM)
    process.end()
