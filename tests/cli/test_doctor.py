"""sekuire doctor: what is wrong, and how to fix it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

import pytest

from sekuire import RuntimeCredentials, RuntimeCredentialsStore
from sekuire.local import LocalPlatform
from sekuire.service import doctor
from sekuire.service.findings import WARNING, WRONG, Findings

from ..contract.client import Client
from ..support.proxies import ConnectProxy
from .conftest import AGENT, POSIX_ONLY, Call, Run, variables
from .test_send import serve

__all__ = ["serve"]


@pytest.fixture
def environ(platform: LocalPlatform) -> Dict[str, str]:
    return variables(platform)


def credentials(platform: LocalPlatform) -> RuntimeCredentials:
    """Those of a new installation."""
    body = {"install_token": platform.create_install_token(AGENT), "agent_id": AGENT}
    body = {**body, "capabilities": [], "runtime_info": {}}  # type: ignore[dict-item]
    answer = Client(platform.url, "").call("POST", "/installations/bootstrap", body).body
    return RuntimeCredentials(
        installation_id=answer["installation_id"],
        runtime_token=answer["runtime_token"],
        refresh_token=answer["refresh_token"],
    )


def finding(out: str, what: str) -> str:
    """The line about ``what``, and its fix."""
    lines = out.splitlines()
    index = next(i for i, line in enumerate(lines) if line[9:].startswith(f"{what}: "))
    return "\n".join(lines[index : index + 2]) if lines[index + 1].startswith("    ") else lines[index]


@pytest.fixture(autouse=True)
def each_problem_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is wrong or odd comes with what to do."""
    without = []
    add = Findings.add

    def check(self: Findings, state: str, what: str, text: str, fix: str = "") -> None:
        if state in (WARNING, WRONG) and not fix:
            without.append((what, text))
        add(self, state, what, text, fix)

    monkeypatch.setattr(Findings, "add", check)
    yield
    assert without == []


def test_all_is_well(run: Run, platform: LocalPlatform, environ: Dict[str, str], tmp_path: Path) -> None:
    """Exit 0; the install token is not used up."""
    RuntimeCredentialsStore(path=tmp_path / "credentials.json").update(credentials(platform))
    more = {"SEKUIRE_API_KEY": platform.api_key, "SEKUIRE_CREDENTIALS_FILE": "credentials.json"}
    code, out, err = run("doctor", env={**environ, **more}).end()
    assert (code, err) == (0, "")
    assert all(line.startswith("ok ") for line in out.splitlines()[:-2]), out
    assert out.splitlines()[-1] == "all is well"
    for what in ("SEKUIRE_AGENT_ID", "credentials", "address", "name", "port", "platform", "clock", "runtime token"):
        assert finding(out, what)
    assert platform.count("bootstrap") == 1
    assert platform.count("refresh") == 0
    assert platform.count("heartbeat", 200) == 1
    assert len(platform.installations()) == 1


def test_no_secret_is_shown(call: Call, platform: LocalPlatform, environ: Dict[str, str]) -> None:
    """Not even with -v, and not when it is malformed."""
    mine = credentials(platform).to_env()
    secrets = {
        "SEKUIRE_API_KEY": platform.api_key,
        "SEKUIRE_INSTALL_TOKEN": environ["SEKUIRE_INSTALL_TOKEN"],
        "SEKUIRE_RUNTIME_TOKEN": mine["SEKUIRE_RUNTIME_TOKEN"],
        "SEKUIRE_REFRESH_TOKEN": mine["SEKUIRE_REFRESH_TOKEN"],
    }
    for space in ("", " "):
        values = {name: value + space for name, value in secrets.items()}
        _, out, err = call("doctor", "-v", env={**environ, **mine, **values})
        assert not [value for value in secrets.values() if value in out + err]


def test_nothing_is_set(call: Call) -> None:
    """Exit 2; the agent's id and a way to authenticate are asked for."""
    code, out, _ = call("doctor", "--url", "http://127.0.0.1:9")
    assert code == 2
    assert "WRONG    SEKUIRE_AGENT_ID: is not set" in out
    assert "-> set SEKUIRE_INSTALL_TOKEN, or SEKUIRE_RUNTIME_TOKEN, or" in finding(out, "credentials")
    assert out.splitlines()[-1] == "3 wrong, 0 to look at"


@pytest.mark.parametrize(
    ("name", "value", "what", "text"),
    [
        (
            "SEKUIRE_INSTALL_TOKEN",
            "skt_a ",
            "SEKUIRE_INSTALL_TOKEN",
            "WRONG    SEKUIRE_INSTALL_TOKEN: begins or ends with",
        ),
        ("SEKUIRE_INSTALL_TOKEN", "sk_live_a", "SEKUIRE_INSTALL_TOKEN", "holds an API key (sk_live_...)"),
        (
            "SEKUIRE_INSTALL_TOKEN",
            "other",
            "SEKUIRE_INSTALL_TOKEN",
            "warning  SEKUIRE_INSTALL_TOKEN: does not begin with skt_",
        ),
        ("SEKUIRE_API_KEY", "skt_a", "SEKUIRE_API_KEY", "holds an install token (skt_...)"),
        ("SEKUIRE_API_KEY", "", "SEKUIRE_API_KEY", "warning  SEKUIRE_API_KEY: is set but empty"),
        ("SEKUIRE_RUNTIME_TOKEN", "a\tb", "SEKUIRE_RUNTIME_TOKEN", "WRONG    SEKUIRE_RUNTIME_TOKEN: holds whitespace"),
        ("SEKUIRE_RUNTIME_TOKEN", "rt", "credentials", "SEKUIRE_RUNTIME_TOKEN without SEKUIRE_INSTALLATION_ID"),
        ("SEKUIRE_REFRESH_TOKEN", "rf", "credentials", "WRONG    credentials: SEKUIRE_REFRESH_TOKEN without"),
        ("SEKUIRE_AGENT_ID", "a" * 300, "SEKUIRE_AGENT_ID", "is longer than 256 bytes"),
        ("SEKUIRE_AGENT_ID", "me ", "SEKUIRE_AGENT_ID", "begins or ends with a space"),
        ("SEKUIRE_AGENTID", "x", "SEKUIRE_AGENTID", "-> did you mean SEKUIRE_AGENT_ID?"),
        ("SEKUIRE_ZZZ", "x", "SEKUIRE_ZZZ", "-> unset it, unless another program reads it"),
        ("SEKUIRE_API_URL", "http://10.0.0.1", "address", "api_base_url (from environment variable SEKUIRE_API_URL)"),
        ("SEKUIRE_POLICY_DEV_OVERRIDE", "1", "SEKUIRE_POLICY_DEV_OVERRIDE", "is refused in production"),
        ("SEKUIRE_POLICY_PUBLIC_KEYS", "abc", "SEKUIRE_POLICY_PUBLIC_KEYS", "an Ed25519 public key is 32 bytes"),
        ("SEKUIRE_POLICY_PUBLIC_KEYS", " ,", "SEKUIRE_POLICY_PUBLIC_KEYS", "begins or ends with a space"),
        ("SEKUIRE_POLICY_PUBLIC_KEYS", ",", "SEKUIRE_POLICY_PUBLIC_KEYS", "-> name one, or unset it"),
        ("SEKUIRE_POLICY_DEV_OVERRIDE", "'1'", "SEKUIRE_POLICY_DEV_OVERRIDE", "-> remove the quotes"),
        ("SEKUIRE_POLICY_DEV_OVERRIDE", "maybe", "SEKUIRE_POLICY_DEV_OVERRIDE", "maybe"),
        ("SEKUIRE_ALLOW_INSECURE_HTTP", "maybe", "address", "SEKUIRE_ALLOW_INSECURE_HTTP"),
        ("SEKUIRE_API_URL", "nonsense", "address", "must begin with https://"),
        ("SEKUIRE_OUTBOX", "missing/outbox.db", "SEKUIRE_OUTBOX", "does not exist"),
        ("SEKUIRE_CREDENTIALS_FILE", "missing/file", "SEKUIRE_CREDENTIALS_FILE", "-> make it first"),
        ("SEKUIRE_CREDENTIALS_FILE", "new", "SEKUIRE_CREDENTIALS_FILE", "is still empty; the first login fills it"),
        ("SEKUIRE_CREDENTIALS_FILE", "text", "SEKUIRE_CREDENTIALS_FILE", "is not a credentials file of this library"),
    ],
)
def test_variables(
    call: Call, environ: Dict[str, str], tmp_path: Path, name: str, value: str, what: str, text: str
) -> None:
    """Each mistake has its line; WRONG means exit 2, a warning does not."""
    (tmp_path / "text").write_text("hello")
    (tmp_path / "text").chmod(0o600)
    code, out, _ = call("doctor", env={**environ, name: value})
    assert text in finding(out, what)
    assert code == (2 if "WRONG" in finding(out, what) else 0), out


def test_an_install_token_without_a_file(call: Call, environ: Dict[str, str]) -> None:
    """A restart would need another token."""
    code, out, _ = call("doctor", env=environ)
    assert code == 0
    assert finding(out, "SEKUIRE_CREDENTIALS_FILE").startswith("warning  SEKUIRE_CREDENTIALS_FILE: is not set, so a")


def test_a_credentials_file_that_cannot_be_written(
    call: Call, environ: Dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a volume that is mounted for reading."""
    monkeypatch.setattr(doctor.CredentialsFile, "_is_read_only", lambda self: True)
    code, out, _ = call("doctor", env={**environ, "SEKUIRE_CREDENTIALS_FILE": "credentials.json"})
    assert code == 0
    assert "make it and its directory writable" in finding(out, "SEKUIRE_CREDENTIALS_FILE")


@POSIX_ONLY
def test_a_credentials_file_that_others_can_read(call: Call, environ: Dict[str, str], tmp_path: Path) -> None:
    """The line says how to fix it."""
    (tmp_path / "credentials.json").write_text("{}")
    (tmp_path / "credentials.json").chmod(0o644)
    code, out, _ = call("doctor", env={**environ, "SEKUIRE_CREDENTIALS_FILE": "credentials.json"})
    assert code == 2
    assert "-> run: chmod 600" in finding(out, "SEKUIRE_CREDENTIALS_FILE")


def test_a_key_from_a_file(call: Call, platform: LocalPlatform, environ: Dict[str, str], tmp_path: Path) -> None:
    """--api-key-file is checked like the variable."""
    (tmp_path / "key").write_text(platform.api_key)
    code, out, _ = call("doctor", "--api-key-file", "key", env=environ)
    assert (code, finding(out, "API key")) == (0, "ok       API key: was accepted")
    code, out, _ = call("doctor", "--api-key-file", "missing", env=environ)
    assert code == 2
    assert "cannot read 'missing'" in finding(out, "API key")


# -- for programs -----------------------------------------------------------------------------------------------------


def test_json(call: Call, platform: LocalPlatform, environ: Dict[str, str]) -> None:
    """One object on stdout with all findings, the same as the lines; and the same exit code."""
    env = {**environ, "SEKUIRE_API_KEY": "sk_live_wrong", "SEKUIRE_ZZZ": "x"}
    code, out, err = call("doctor", "--json", env=env)
    found = json.loads(out)
    assert (code, err) == (1, "")
    assert {name: value for name, value in found.items() if name != "findings"} == {
        "verdict": "1 wrong, 2 to look at", "exit_code": 1, "wrong": 1, "warnings": 2,
    }  # fmt: skip
    lines = []
    for one in found["findings"]:
        assert list(one) == ["state", "what", "text", "fix"]
        state = "WRONG" if one["state"] == "wrong" else one["state"]
        lines.append(f"{state.ljust(8)} {one['what']}: {one['text']}")
        lines += [f"         -> {one['fix']}"] if one["fix"] is not None else []
    text = call("doctor", env=env)[1]
    assert [line.partition(" was reached in")[0] for line in [*lines, "", found["verdict"]]] == [
        line.partition(" was reached in")[0] for line in text.splitlines()
    ]
    assert platform.count("bootstrap") == 0


def test_json_of_a_wrong_setting(call: Call) -> None:
    """Exit 2 also in the object."""
    code, out, _ = call("doctor", "--json", "--url", "http://127.0.0.1:9")
    assert (code, json.loads(out)["exit_code"]) == (2, 2)


# -- the platform -----------------------------------------------------------------------------------------------------


def test_credentials_that_are_rejected(call: Call, platform: LocalPlatform, environ: Dict[str, str]) -> None:
    """A dead token with nothing to replace it is wrong, exit 1; with a refresh token it is a warning."""
    mine = credentials(platform).to_env()
    refresh = mine.pop("SEKUIRE_REFRESH_TOKEN")
    platform.expire_tokens()
    code, out, _ = call("doctor", env={**environ, **mine, "SEKUIRE_API_KEY": "sk_live_wrong"})
    assert code == 1
    assert "WRONG    runtime token: was rejected: HTTP 401" in out
    assert "WRONG    API key: was rejected: HTTP 401 INVALID_API_KEY" in out
    code, out, _ = call(
        "doctor", env={**environ, **mine, "SEKUIRE_REFRESH_TOKEN": refresh, "SEKUIRE_API_KEY": platform.api_key}
    )
    assert code == 0
    assert "warning  runtime token: was rejected (HTTP 401" in out
    assert platform.count("refresh") == 0


def test_a_revoked_installation(call: Call, platform: LocalPlatform, environ: Dict[str, str]) -> None:
    """The line gives the reason."""
    mine = credentials(platform)
    platform.revoke(str(mine.installation_id), "leaked")
    code, out, _ = call("doctor", env={**environ, **mine.to_env()})
    assert code == 1
    assert "the installation is revoked" in finding(out, "runtime token")
    assert "leaked" in finding(out, "runtime token")


def test_a_paused_agent(call: Call, platform: LocalPlatform, environ: Dict[str, str]) -> None:
    """The line gives the state that the platform wants of the agent."""
    mine = credentials(platform)
    platform.command(str(mine.installation_id), "pause")
    code, out, _ = call("doctor", env={**environ, **mine.to_env()})
    assert code == 0
    assert "but the platform wants this agent paused" in finding(out, "runtime token")


def test_a_runtime_token_alone(call: Call, environ: Dict[str, str]) -> None:
    """Without an installation id it cannot be tried."""
    code, out, _ = call("doctor", env={**environ, "SEKUIRE_RUNTIME_TOKEN": "rt"})
    assert code == 0
    assert finding(out, "runtime token").startswith("skipped")


def test_nobody_listens(call: Call, environ: Dict[str, str]) -> None:
    """The port is named; what follows is not tried."""
    code, out, _ = call("doctor", env={**environ, "SEKUIRE_API_URL": "http://127.0.0.1:9"})
    assert code == 1
    assert "WRONG    port: 127.0.0.1 port 9: Connection refused" in out
    assert "platform:" not in out


def test_a_name_that_is_none(call: Call, environ: Dict[str, str]) -> None:
    code, out, _ = call("doctor", env={**environ, "SEKUIRE_API_URL": "https://host.invalid"})
    assert code == 1
    assert "host.invalid cannot be resolved" in finding(out, "name")


def test_a_look_up_that_hangs(call: Call, environ: Dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up after a while."""
    import threading

    gate = threading.Event()
    monkeypatch.setattr(doctor.socket, "getaddrinfo", lambda *args, **options: gate.wait(30) and [])
    monkeypatch.setattr(doctor, "_RESOLVE_TIME", 0.1)
    code, out, _ = call("doctor", env=environ)
    gate.set()
    assert code == 1
    assert "no answer within 0.1 s" in finding(out, "name")


def test_tls_that_is_none(call: Call, platform: LocalPlatform, environ: Dict[str, str]) -> None:
    """https to a server that speaks http: the TLS line says so."""
    url = platform.url.replace("http://", "https://")
    code, out, _ = call("doctor", env={**environ, "SEKUIRE_API_URL": url})
    assert code == 1
    assert finding(out, "TLS").startswith("WRONG")


def behind(environ: Dict[str, str], proxy: str, no_proxy: str = "") -> Dict[str, str]:
    """Variables for a platform that only ``proxy`` may be able to reach."""
    url = "https://host.invalid"
    # Those in lower case would win.
    proxies = {"HTTPS_PROXY": proxy, "https_proxy": proxy, "NO_PROXY": no_proxy, "no_proxy": no_proxy}
    return {**environ, **proxies, "SEKUIRE_API_URL": url}


def test_a_proxy_that_is_not_there(call: Call, environ: Dict[str, str]) -> None:
    """Name and port are those of the proxy, whose password is not shown."""
    code, out, err = call("doctor", env=behind(environ, "http://user:canary@127.0.0.1:9"))
    assert code == 1
    network = finding(out, "network")
    assert network.startswith("ok ")
    assert "through the proxy http://127.0.0.1:9 (HTTPS_PROXY), with user and password" in network
    assert finding(out, "name").startswith("ok ")
    assert "is the proxy running? does a firewall stand in between? check HTTPS_PROXY" in finding(out, "port")
    assert "canary" not in out + err
    code, out, err = call("doctor", env=behind(environ, "http://user:canary@proxy.invalid:3128"))
    assert code == 1
    assert "proxy.invalid cannot be resolved" in finding(out, "name")
    assert "check HTTPS_PROXY and the DNS" in finding(out, "name")
    assert "canary" not in out + err


@pytest.mark.parametrize(
    ("answer", "problem", "fix"),
    [
        (b"HTTP/1.1 407 X\r\n\r\n", "rejected its user and password (407)", "check them in environment variable HTTPS"),
        (b"HTTP/1.1 403 X\r\n\r\n", "does not allow connections to host.invalid:443 (403)", "NO_PROXY if it can"),
        (b"HTTP/1.1 502 X\r\n\r\n", "cannot connect to host.invalid:443 (502)", "that the proxy can resolve"),
        (b"HTTP/1.1 503 X\r\nX-Squid-Error: ERR_DNS_FAIL 0\r\n\r\n", "cannot resolve the name", "the proxy's DNS"),
        (b"\x15\x03\x03\x00\x02\x02\x16", "did not answer in HTTP", "https:// for an HTTP proxy"),
    ],
)
def test_what_a_proxy_answers(call: Call, environ: Dict[str, str], answer: bytes, problem: str, fix: str) -> None:
    """It is a finding about the proxy, with what to do on the next line."""
    with ConnectProxy(9, answer=answer) as proxy:
        code, out, err = call("doctor", env=behind(environ, proxy.url.replace("//", "//user:canary@")))
    assert code == 1
    found = finding(out, "proxy").splitlines()
    assert found[0].startswith("WRONG")
    assert problem in found[0]
    assert fix in found[1]
    assert "canary" not in out + err


def test_a_proxy_that_cannot_be_used(call: Call, environ: Dict[str, str]) -> None:
    """A URL of no known kind is named by its variable; NO_PROXY by its entry."""
    code, out, err = call("doctor", env=behind(environ, "ftp://user:canary@proxy.test"))
    assert code == 2
    assert finding(out, "network").startswith("WRONG")
    assert "environment variable HTTPS_PROXY" in finding(out, "network")
    assert "canary" not in out + err
    code, out, _ = call("doctor", env=behind(environ, "http://proxy.test", no_proxy="a.test, *.invalid"))
    assert code == 1
    assert "no proxy: HTTPS_PROXY does not apply: NO_PROXY holds '*.invalid'" in finding(out, "network")


@pytest.mark.parametrize(
    ("answer", "what", "text", "code"),
    [
        ((200, b"<html>"), "clock", "ok ", 0),
        ((404, b"<html>"), "platform", "no JSON: this is another server", 1),
        ((302, b""), "platform", "it answered with a redirect (302)", 1),
    ],
)
def test_other_servers(
    call: Call, environ: Dict[str, str], serve: Any, answer: Any, what: str, text: str, code: int
) -> None:
    found, out, _ = call("doctor", env={**environ, "SEKUIRE_API_URL": serve(lambda method: answer)})
    assert text in finding(out, what)
    assert found == code


REVOKED = b'{"code": "INSTALLATION_REVOKED", "message": "it was stolen"}'


@pytest.mark.parametrize(
    ("answer", "text", "code"),
    [
        ((403, REVOKED), "WRONG    runtime token: the installation is revoked: HTTP 403 INSTALLATION_REVOKED", 1),
        ((200, b'{"revoked": true, "reason": "stolen"}'), "WRONG    runtime token: the installation is revoked", 1),
        ((200, b"<html>"), "ok       runtime token: was accepted", 0),
        ((401, b'{"code": "X"}'), "WRONG    runtime token: was rejected: HTTP 401", 1),
    ],
)
def test_answers_to_the_heartbeat(
    call: Call, environ: Dict[str, str], serve: Any, answer: Any, text: str, code: int
) -> None:
    url = serve(lambda method: answer if method == "POST" else (401, b'{"code": "X", "message": "no"}'))
    tokens = {"SEKUIRE_RUNTIME_TOKEN": "rt", "SEKUIRE_INSTALLATION_ID": "inst-1"}
    found, out, _ = call("doctor", env={**environ, **tokens, "SEKUIRE_API_URL": url})
    assert text in finding(out, "runtime token")
    assert found == code


@pytest.mark.parametrize("what", ["runtime token", "API key"])
def test_a_platform_that_stops_answering(call: Call, environ: Dict[str, str], serve: Any, what: str) -> None:
    """The first question is answered, and the one that counts is not."""
    asked = []

    def answers(method: str) -> Any:
        asked.append(method)
        if len(asked) > 1:
            raise ConnectionError
        return 401, b'{"code": "X", "message": "no"}'

    env = {"SEKUIRE_API_KEY": "sk_live_x"}
    if what == "runtime token":
        env = {"SEKUIRE_RUNTIME_TOKEN": "rt", "SEKUIRE_INSTALLATION_ID": "inst-1"}
    code, out, _ = call("doctor", env={**environ, **env, "SEKUIRE_API_URL": serve(answers)})
    assert code == 1
    assert finding(out, what).startswith("WRONG")
    assert "-> try again" in finding(out, what)


@pytest.mark.parametrize(("offset", "text"), [(-3600, "3600 s ahead of"), (3600, "3600 s behind")])
def test_a_wrong_clock(
    call: Call, environ: Dict[str, str], monkeypatch: pytest.MonkeyPatch, offset: int, text: str
) -> None:
    """A skew of more than a minute is a warning: the library counts lifetimes by the platform's clock."""
    monkeypatch.setattr(
        doctor.protocol,
        "parse_http_date",
        lambda value: doctor.protocol.dt.datetime.fromtimestamp(time.time() + offset, doctor.protocol.dt.timezone.utc),
    )
    code, out, _ = call("doctor", env=environ)
    assert code == 0
    assert text in finding(out, "clock")


def test_no_clock(call: Call, environ: Dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.protocol, "parse_http_date", lambda value: None)
    assert "sent no time" in finding(call("doctor", env=environ)[1], "clock")


def test_an_api_key_where_there_are_no_tasks(call: Call, environ: Dict[str, str], serve: Any) -> None:
    """A platform that does not offer the question leaves the key unchecked."""
    url = serve(lambda method: (404, b'{"code": "NOT_FOUND"}'))
    code, out, _ = call("doctor", env={**environ, "SEKUIRE_API_URL": url, "SEKUIRE_API_KEY": "sk_live_x"})
    assert code == 0
    assert "cannot be checked here: HTTP 404 NOT_FOUND" in finding(out, "API key")


# -- the policy -------------------------------------------------------------------------------------------------------


def of_policy(out: str) -> str:
    return "\n".join(line for line in out.splitlines() if " policy: " in line)


@pytest.mark.parametrize("by", ["key", "token", "file"])
def test_a_policy(call: Call, platform: LocalPlatform, environ: Dict[str, str], tmp_path: Path, by: str) -> None:
    """The policy is fetched with the available credential, verified, and reported."""
    platform.set_policy("ws_local", {"permissions": {"unknown": 1}})
    environ["SEKUIRE_WORKSPACE_ID"] = "ws_local"
    if by == "key":
        environ["SEKUIRE_API_KEY"] = platform.api_key
    elif by == "token":
        environ.update(credentials(platform).to_env(), SEKUIRE_WORKSPACE_ID="ws_local")
    else:
        environ["SEKUIRE_CREDENTIALS_FILE"] = "credentials.json"
        RuntimeCredentialsStore(path=tmp_path / "credentials.json").update(credentials(platform))
    code, out, _ = call("doctor", env=environ)
    assert code == 0
    assert "ok       policy: version 1 of ws_local is good: whole" in out
    assert "warning  policy: permissions.unknown is unknown" in out


def test_a_pinned_policy(call: Call, platform: LocalPlatform, environ: Dict[str, str]) -> None:
    """With the right key it is good, with another one WRONG."""
    platform.set_policy("ws_local", {})
    environ.update(SEKUIRE_API_KEY=platform.api_key, SEKUIRE_WORKSPACE_ID="ws_local")
    environ["SEKUIRE_POLICY_PUBLIC_KEYS"] = platform.policy_public_key
    code, out, _ = call("doctor", env=environ)
    assert code == 0
    assert "signed by a pinned key" in of_policy(out)
    assert "pins 1 key" in finding(out, "SEKUIRE_POLICY_PUBLIC_KEYS")
    platform.rotate_policy_key()
    code, out, _ = call("doctor", env=environ)
    assert code == 1
    assert "WRONG    policy: is refused" in of_policy(out)


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [
        ("hash", 0, "warning  SEKUIRE_POLICY_SIGNATURE: is 'hash': older policies can be replayed"),
        ("bound", 0, None),
        ("loose", 2, "WRONG    SEKUIRE_POLICY_SIGNATURE: must be 'bound' or 'hash', got 'loose'"),
        ("'hash'", 2, "WRONG    SEKUIRE_POLICY_SIGNATURE: begins or ends with a quote"),
    ],
)
def test_what_a_signature_covers(
    call: Call, platform: LocalPlatform, environ: Dict[str, str], value: str, code: int, text: Optional[str]
) -> None:
    """A platform that signs the hash alone is a warning, because older policies can be replayed. It is said once."""
    platform.set_policy("ws_local", {})
    environ.update(SEKUIRE_API_KEY=platform.api_key, SEKUIRE_WORKSPACE_ID="ws_local", SEKUIRE_POLICY_SIGNATURE=value)
    environ["SEKUIRE_POLICY_PUBLIC_KEYS"] = platform.policy_public_key
    found, out, _ = call("doctor", env=environ)
    assert found == code
    lines = [line for line in out.splitlines() if "SEKUIRE_POLICY_SIGNATURE:" in line]
    assert len(lines) == (0 if text is None else 1)
    assert text is None or text in lines[0]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"SEKUIRE_WORKSPACE_ID": "ws_none", "SEKUIRE_API_KEY": "good"}, "ok       policy: ws_none has none"),
        ({"SEKUIRE_WORKSPACE_ID": "ws_local"}, "skipped  policy: not asked for: there is no runtime token"),
        ({"SEKUIRE_WORKSPACE_ID": "ws_local", "SEKUIRE_API_KEY": "bad"}, "warning  policy: is not available"),
        ({}, "ok       policy: the login names the workspace"),
    ],
)
def test_no_policy(
    call: Call, platform: LocalPlatform, environ: Dict[str, str], more: Dict[str, str], text: str
) -> None:
    """A policy that cannot be fetched or does not exist is reported as such."""
    if more.get("SEKUIRE_API_KEY") == "good":
        more = {**more, "SEKUIRE_API_KEY": platform.api_key}
    assert text in call("doctor", env={**environ, **more})[1]


@pytest.mark.parametrize(("keys", "code"), [("", 0), ("ab" * 32, 2)])
def test_without_the_extra(
    call: Call, environ: Dict[str, str], monkeypatch: pytest.MonkeyPatch, keys: str, code: int
) -> None:
    """A missing extra is a warning, and wrong where a key is pinned."""
    from sekuire.policy import client

    monkeypatch.setattr(client, "missing_packages", lambda: ("blake3",))
    if keys:
        environ["SEKUIRE_POLICY_PUBLIC_KEYS"] = keys
    found, out, _ = call("doctor", env=environ)
    assert found == code
    assert "blake3 is not installed" in of_policy(out)
    assert "pip install 'sekuire[policy]'" in out


def test_an_override_outside_production(call: Call, environ: Dict[str, str]) -> None:
    """Where it is not refused it is a warning."""
    more = {"SEKUIRE_POLICY_DEV_OVERRIDE": "1", "SEKUIRE_ENVIRONMENT": "development"}
    code, out, _ = call("doctor", env={**environ, **more})
    assert code == 0
    assert "policies are not enforced" in finding(out, "SEKUIRE_POLICY_DEV_OVERRIDE")
