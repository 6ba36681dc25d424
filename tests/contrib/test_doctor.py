"""manage.py sekuire_doctor and flask sekuire doctor: what sekuire doctor finds, with the settings of the framework."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import pytest

from sekuire import PolicyClient, PolicyGateway, RuntimeCredentialsStore
from sekuire.contrib.settings import Settings, diagnose
from sekuire.local import LocalPlatform

from ..cli.conftest import AGENT, Run, variables
from ..cli.test_doctor import credentials, finding
from ..support.servers import Answer, Certificates, WebServer

#: Runs the doctor of a framework, or of the command line, with settings and variables: exit code and stdout.
Doctor = Callable[..., Tuple[int, str]]

FLASK = """
import flask
from sekuire.contrib.flask import Sekuire
app = flask.Flask(__name__)
app.config.update({settings!r})
Sekuire(app)
"""
DJANGO = """
SECRET_KEY = "x"
INSTALLED_APPS = ["sekuire.contrib.django"]
SEKUIRE = {settings!r}
"""


@pytest.fixture(params=["flask", "django"])
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def doctor(framework: str, run: Run, tmp_path: Path) -> Doctor:
    def doctor(*args: str, env: Dict[str, str], **settings: Any) -> Tuple[int, str]:
        if framework == "flask":
            settings = {f"SEKUIRE_{name}": value for name, value in settings.items()}
            (tmp_path / "shop.py").write_text(FLASK.format(settings=settings))
            program: Tuple[str, ...] = ("-m", "flask", "--app", "shop", "sekuire", "doctor")
        else:
            (tmp_path / "project.py").write_text(DJANGO.format(settings=settings))
            program = ("-m", "django", "sekuire_doctor", "--settings", "project", "--pythonpath", ".")
        code, out, err = run(*args, env=env, program=program).end()
        assert "Traceback" not in err
        return code, out

    return doctor


def label(framework: str, name: str) -> str:
    return f"app.config['SEKUIRE_{name}']" if framework == "flask" else f"settings.SEKUIRE['{name}']"


def without_times(out: str) -> str:
    return "\n".join(line.partition(" was reached in ")[0] for line in out.splitlines())


@pytest.mark.parametrize("kind", ["good", "nothing", "nobody", "key"])
def test_the_same_as_the_command(doctor: Doctor, run: Run, platform: LocalPlatform, kind: str) -> None:
    """With variables alone: the same findings, word by word, and the same exit code."""
    env = {**variables(platform), "SEKUIRE_API_KEY": platform.api_key}
    if kind == "nothing":
        env = {"SEKUIRE_API_URL": platform.url}
    elif kind == "nobody":
        env["SEKUIRE_API_URL"] = "http://127.0.0.1:9"
    elif kind == "key":
        env["SEKUIRE_API_KEY"] = "sk_live_wrong"
    code, out, _ = run("doctor", env=env).end()
    assert code == {"good": 0, "nothing": 2, "nobody": 1, "key": 1}[kind]
    found, theirs = doctor(env=env)
    assert found == code
    for option in ("AGENT_ID", "CREDENTIALS_FILE", "WORKSPACE_ID"):
        for framework in ("flask", "django"):
            theirs = theirs.replace(label(framework, option), f"SEKUIRE_{option}")
    theirs = theirs.replace(
        "set it, or the variable SEKUIRE_AGENT_ID, to the agent's id",
        "export SEKUIRE_AGENT_ID=... with the agent's id, or pass agent_id=... in code",
    )
    assert without_times(theirs) == without_times(out)


def test_settings(doctor: Doctor, platform: LocalPlatform, framework: str, tmp_path: Path) -> None:
    """The settings win over the variables, and are named as the user does."""
    path = tmp_path / "credentials.json"
    RuntimeCredentialsStore(path=path).update(credentials(platform))
    code, out = doctor(
        env={"SEKUIRE_API_URL": "http://127.0.0.1:9", "SEKUIRE_INSTALL_TOKEN": "skt_variable"},
        API_URL=platform.url,
        AGENT_ID=AGENT,
        CREDENTIALS_FILE=str(path),
        API_KEY=platform.api_key,
        WORKSPACE_ID="ws_local",
        POLICY_PUBLIC_KEYS=[platform.policy_public_key],
    )
    assert code == 0, out
    assert finding(out, label(framework, "AGENT_ID")) == f"ok       {label(framework, 'AGENT_ID')}: {AGENT}"
    assert "holds credentials" in finding(out, label(framework, "CREDENTIALS_FILE"))
    assert "pins 1 key" in finding(out, label(framework, "POLICY_PUBLIC_KEYS"))
    assert finding(out, "SEKUIRE_INSTALL_TOKEN").startswith("ok ")
    assert "was accepted" in finding(out, "runtime token")
    assert "was accepted" in finding(out, "API key")
    assert platform.api_key not in out


@pytest.mark.parametrize(
    ("settings", "what", "text"),
    [
        ({"INSTALL_TOKEN": "sk_live_a"}, "INSTALL_TOKEN", "holds an API key (sk_live_...)"),
        ({"AGENT_ID": "a\tb"}, "AGENT_ID", "is longer than 256 bytes or holds control characters"),
        ({"CREDENTIALS_FILE": "missing/file"}, "CREDENTIALS_FILE", "-> make it first"),
        ({"OUTBOX": "missing/outbox.db"}, "OUTBOX", "does not exist"),
        ({"POLICY_PUBLIC_KEYS": ["abc"]}, "POLICY_PUBLIC_KEYS", "an Ed25519 public key is 32 bytes"),
        ({"API_URL": "http://10.0.0.1"}, "address", "is http:// to another machine"),
        ({"MAX_WORKERS": 1, "MAX_WORKER": 2}, "settings", "-> did you mean"),
        ({"HEARTBEAT_INTERVAL": "soon"}, "settings", "must be a number"),
    ],
)
def test_wrong_settings(
    doctor: Doctor, platform: LocalPlatform, framework: str, settings: Dict[str, Any], what: str, text: str
) -> None:
    """Each is a finding with the setting's name, and exit code 2."""
    code, out = doctor(env=variables(platform), **settings)
    assert code == 2
    found = finding(out, what if what.islower() else label(framework, what))
    assert found.startswith("WRONG")
    assert text in found


def test_json(doctor: Doctor, run: Run, platform: LocalPlatform, framework: str) -> None:
    """The same object, but for the names of settings."""
    env = {**variables(platform), "SEKUIRE_API_KEY": platform.api_key, "SEKUIRE_CREDENTIALS_FILE": "c.json"}
    code, out = doctor("--json", env=env, WORKSPACE_ID="")
    assert code == 2
    found = json.loads(out)
    assert found["exit_code"] == 2
    wrong = [one for one in found["findings"] if one["state"] == "wrong"]
    assert [one["what"] for one in wrong] == [label(framework, "WORKSPACE_ID")]


# -- what only settings can say ---------------------------------------------------------------------------------------


def found_with(**values: Any) -> Dict[str, Any]:
    """The findings for settings, by what they are about."""
    findings = diagnose(lambda: Settings(values, lambda key: f"settings[{key!r}]"), lambda finding: None)
    return {one["what"]: one for one in findings.as_json()["findings"]}


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_tls(tmp_path: Path) -> None:
    """A certificate that is not checked is a warning with the setting's name; with its CA it is good."""
    certificates = Certificates(str(tmp_path))
    refuse = {"code": "X", "message": "no"}
    with WebServer(lambda request: Answer(401, refuse), certificates.server_context()) as server:
        common = {"API_URL": server.url, "AGENT_ID": AGENT, "INSTALL_TOKEN": "skt_x"}
        odd = found_with(**common, VERIFY=False)["TLS"]
        good = found_with(**common, VERIFY=certificates.ca)["TLS"]
        wrong = found_with(**common)["TLS"]
    assert odd["state"] == "warning"
    assert odd["fix"] == "give the path of your CA's bundle as settings['VERIFY']"
    assert good["state"] == "ok"
    assert wrong["state"] == "wrong"
    assert "verify=" in wrong["fix"]


def test_objects_of_the_program(platform: LocalPlatform) -> None:
    """A store's credentials are examined; a gateway is not."""
    store = RuntimeCredentialsStore(credentials(platform))
    with PolicyClient(platform.url, api_key=platform.api_key) as client:
        found = found_with(
            API_URL=platform.url,
            AGENT_ID=AGENT,
            CREDENTIALS_STORE=store,
            POLICY_GATEWAY=PolicyGateway(client, "ws_local"),
        )
    assert found["settings['CREDENTIALS_STORE']"]["text"] == "is a store of the program's own"
    assert found["runtime token"]["text"] == "was accepted by a heartbeat"
    assert found["policy"]["text"] == "a gateway of the program's own decides"
