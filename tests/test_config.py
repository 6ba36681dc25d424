"""Settings: every wrong value is refused at construction, with its option, a hint, and never a token."""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import os
import pathlib
from typing import Any, Callable, Dict

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekuire import Beacon, PolicyClient, SekuireSDK, create_worker
from sekuire.config import (
    ENVIRONMENT,
    KNOWN_VARIABLES,
    AgentConfig,
    BeaconConfig,
    ClientConfig,
    ConnectionConfig,
    PolicyClientConfig,
    SDKConfig,
    WorkerConfig,
    boolean_variable,
    check_capability,
    from_options,
    is_loopback,
    policy_keys_from_environment,
    read_environment,
    unknown_variables,
)
from sekuire.contrib.settings import Settings
from sekuire.errors import ConfigurationError
from sekuire.secret import Secret
from sekuire.wire.protocol import Endpoints

from .support.servers import traces_of

TOKEN = "skt_do_not_show_me"
URL = "https://platform.test"


class Store:
    current = generation = update = None


class Gateway:
    check_request = check_capability = on_heartbeat_response = None


# A pool makes its processes with the first call: this one never has any.
FORKING = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))

SECONDS = [0, -1, float("nan"), float("inf"), 10**400, "5", None, True, [1]]
COUNTS = [0, -1, 1.0, "5", None, True]
FLAGS = [0, 1, "yes", None]
IDS = ["", 5, b"x", ".", "..", "a\nb", "x" * 257]
WRONG: Dict[str, Any] = {
    "agent_id": [*IDS, None],
    "installation_id": IDS,
    "workspace_id": IDS,
    "install_token": ["", f"{TOKEN}\n", f" {TOKEN}", 5, b"x"],
    "runtime_token": ["", f"{TOKEN}\n", f"{TOKEN} {TOKEN}", 5],
    "refresh_token": ["", f"{TOKEN}\n", f"{TOKEN}\x7f", 5],
    "api_key": ["", f"{TOKEN}\n", f"{TOKEN}\u00e9", 5],
    "connect_timeout": SECONDS,
    "read_timeout": SECONDS,
    "heartbeat_interval": SECONDS,
    "stream_idle_timeout": SECONDS,
    "reconnect_min": SECONDS,
    "reconnect_max": SECONDS,
    "task_timeout": [value for value in SECONDS if value is not None],
    "stop_when_idle": [value for value in SECONDS if value is not None],
    "start_timeout": [-1, float("nan"), 10**400, "5", None, True],
    "shutdown_timeout": [-1, float("inf"), "5", None, True],
    "max_workers": COUNTS,
    "max_event_bytes": COUNTS,
    "max_result_bytes": COUNTS,
    "max_waiting_bytes": COUNTS,
    "max_queued": [-1, 1.0, "5", True],
    "allow_insecure_http": FLAGS,
    "device_fingerprint": ["", " x", "é", "a\nb", "x" * 1025, 5, b"x"],
    "policy_required": FLAGS,
    "required": FLAGS,
    "expose_errors": FLAGS,
    "auto_heartbeat": FLAGS,
    "logging_enabled": FLAGS,
    "quiet": [value for value in FLAGS if value is not None],
    "health": [
        8080,
        True,
        "",
        "x",
        ":8080",
        "::1:8080",
        "[::1:8080",
        "a b:8080",
        "http://127.0.0.1:8080",
        "127.0.0.1:65536",
        ("127.0.0.1",),
        ("127.0.0.1", "8080"),
        ("127.0.0.1", True),
        ("127.0.0.1", -1),
        ("", 8080),
        (None, 8080),
    ],
    "log_format": ["xml", "", 1, True],
    "agent_name": ["", 5, "a\nb"],
    "environment": ["", None, 5, "a\nb"],
    "token_provider": ["token", 5],
    "on_status_change": ["f", 5],
    "approval_handler": ["f", 5],
    "result_encoder": ["f", 5],
    "executor": [5, concurrent.futures.ThreadPoolExecutor, FORKING],
    "credentials_store": [5, {}, object()],
    "policy_gateway": [5, {}, object()],
    "policy_options": [5, "x", ["on_change"]],
    "policy_path": ["", 5, b""],
    "policy_signature": ["", "Hash", "none", None, 5, True, ["hash"]],
    "trusted_policy_keys": ["ab" * 32, b"x", 5, [5], [b"x"], [""], None],
    "retry_for": [-1, float("inf"), "5", None, True],
    "cache_ttl": [-1, float("inf"), "5", None, True],
    "path": ["", 5],
    "capabilities": ["summarize", b"x", 5, None, [5], ["a,b"], ["a\nb"], [""], [" a"], ["a "], ["x" * 257], [b"x"]],
    "verify": ["/no/such/file", 5, None, ""],
    "client_cert": ["/no/such/file", 5, (), ("/no/such/file",), ("a", "b", "c"), ("/no/such/file", "/nor/this")],
    "proxies": ["http://p:1", {"https": "p:1"}, {"https": None}, {5: "http://p:1"}, 5],
    "endpoints": [5, {"bootstrapp": "/x"}, {"bootstrap": "x"}],
    "api_base_url": [
        None, 5, "", "platform.test", "ftp://platform.test", "https://", "https:///x", "https://h:99999", "https://[::1",
        "https://h/x y", "https://h\n", "https://h/\u00e9", "https://h\\x", "https://h?x=1", "https://h#x", "https://h?",
        "https://h/../x", "https://h/api/v1", "https://h/api/v1/", "http://platform.test", "https://u:p@h", "https://u@h",
    ],
}  # fmt: skip

CLASSES = (WorkerConfig, SDKConfig, BeaconConfig, PolicyClientConfig, ClientConfig)
CASES = [(name, value) for name, values in WRONG.items() for value in values]


def class_of(option: str) -> Any:
    return next(cls for cls in CLASSES if option in {field.alias for field in attrs.fields(cls)})


def options(**extra: Any) -> Dict[str, Any]:
    if set(extra) & {"cache_ttl", "path", "retry_for"}:
        return {"api_key": TOKEN, "api_base_url": URL, **extra}
    return {"agent_id": "agent", "install_token": TOKEN, "api_base_url": URL, **extra}


@pytest.mark.parametrize(("option", "value"), CASES, ids=[f"{name}-{at}" for at, (name, _) in enumerate(CASES)])
def test_a_wrong_value_is_refused(option: str, value: Any) -> None:
    """Every wrong value of every option is a ConfigurationError that names the option, its source, and no token."""
    with pytest.raises(ConfigurationError) as caught:
        from_options(class_of(option), options(**{option: value}), {option: "file settings.ini"})
    error = caught.value
    assert (error.option or "").partition("[")[0] == option
    assert str(error).startswith(f"{error.option}")
    assert "settings.ini" in str(error) or option == "endpoints"
    assert len(error.problem.split()) >= 2
    assert TOKEN not in str(error) + repr(error)
    assert error.__cause__ is None
    assert error.__context__ is None


def test_every_option_has_wrong_values() -> None:
    """No option is left out of the test above."""
    known = {field.alias for cls in CLASSES for field in attrs.fields(cls)}
    assert known - set(WRONG) <= {"outbox", "beats_at_most", "durable"} | set()


def test_no_token_in_the_frames_of_a_refusal() -> None:
    """The frames of an error about another option do not hold the tokens given beside it."""
    given_options = options(max_workers=0, runtime_token=TOKEN)
    with pytest.raises(ConfigurationError) as caught:
        from_options(WorkerConfig, given_options)
    assert TOKEN not in traces_of(caught.value)


@given(st.sampled_from(sorted(WRONG)), st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.binary()))
def test_any_value_is_taken_or_refused(option: str, value: Any) -> None:
    """No value of an option raises anything but a ConfigurationError."""
    try:
        from_options(class_of(option), options(**{option: value}))
    except ConfigurationError as error:
        problem = error
    else:
        return
    assert problem.option


SHARED: Dict[str, Any] = {"runtime_token": TOKEN, "api_key": TOKEN, "installation_id": "i"}


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: Beacon("a", install_token=TOKEN, heartbeat_intervall=5), ConfigurationError, "unknown option"),
        (lambda: Beacon("a", "b", install_token=TOKEN), TypeError, "takes its options by keyword"),
        (lambda: Beacon("a", TOKEN), TypeError, "takes its options by keyword"),
        (lambda: Beacon("a", agent_id="b", install_token=TOKEN), TypeError, "several values for 'agent_id'"),
        (lambda: Beacon(install_token=TOKEN), ConfigurationError, "agent_id: is required"),
        (lambda: Beacon("a", runtime_token=TOKEN), ConfigurationError, "installation_id: is needed"),
        (lambda: SekuireSDK("a", on_status_change=print, **SHARED), ConfigurationError, "unknown option"),
        (lambda: SekuireSDK("a", auto_heartbeat=5, **SHARED), ConfigurationError, "auto_heartbeat: must be True"),
        (lambda: SekuireSDK.from_env(agent_id="a", api_url=URL, **SHARED), ConfigurationError, "use api_base_url"),
        (lambda: SekuireSDK.from_env(**SHARED), ConfigurationError, "agent_id: is required; set SEKUIRE_AGENT_ID"),
        (lambda: SekuireSDK("a", **SHARED).create_task_worker(install_token=TOKEN), ConfigurationError, "belongs to"),
        (lambda: PolicyClient(URL, api_key=TOKEN, cache_ttl=-1), ConfigurationError, "cache_ttl: must be"),
        (lambda: create_worker(agent_id="a", install_token=TOKEN, max_workers=0), ConfigurationError, "max_workers: "),
    ],
)  # fmt: skip
def test_no_token_in_the_frames_of_a_wrong_call(make: Callable[[], object], kind: Any, text: str) -> None:
    """Where an object cannot be made, the error's frames hold neither its tokens nor the object."""
    with pytest.raises(kind) as caught:
        make()
    assert text in str(caught.value)
    assert caught.value.__context__ is None
    assert TOKEN not in traces_of(caught.value)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("heartbeat_intervall", "did you mean 'heartbeat_interval'"),
        ("agentid", "did you mean 'agent_id'"),
        ("qqq", "known options: "),
        ("api_url", "use api_base_url$"),
        ("apiUrl", "use api_base_url$"),
        ("url", "use api_base_url$"),
        ("token", "use install_token or runtime_token or credentials_store$"),
        ("heartbeatIntervalMs", r"use heartbeat_interval \(seconds\)$"),
        ("installToken", "use install_token$"),
        ("timeout", "use task_timeout or read_timeout or connect_timeout$"),
        ("name", "known options: "),
    ],
)
def test_a_misspelt_option(name: str, hint: str) -> None:
    """An unknown option is named, with the one that was probably meant."""
    with pytest.raises(ConfigurationError, match=hint) as caught:
        from_options(WorkerConfig, {"agent_id": "a", name: 5})
    assert caught.value.option == name
    assert "WorkerConfig" in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SekuireSDK("a", api_url="http://x"),  # type: ignore[call-arg]
        lambda: SekuireSDK.from_env(api_url="http://x"),  # type: ignore[call-arg]
        lambda: Beacon("a", api_url="http://x"),  # type: ignore[call-arg]
        lambda: create_worker(agent_id="a", api_url="http://x"),  # type: ignore[call-arg]
        lambda: PolicyClient(api_url="http://x"),  # type: ignore[call-arg]
    ],
)
def test_the_name_of_typescript(make: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every constructor answers ``api_url=`` with the option's name here."""
    monkeypatch.setenv("SEKUIRE_AGENT_ID", "a")
    with pytest.raises(ConfigurationError, match="use api_base_url"):
        make()


SERVICE_LINKS = [
    "SEKUIRE_SERVICE_HOST",
    "SEKUIRE_LOCAL_SERVICE_PORT",
    "SEKUIRE_LOCAL_SERVICE_PORT_HTTP",
    "SEKUIRE_PORT",
    "SEKUIRE_PORT_9300_TCP_ADDR",
]


def test_unknown_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that nothing reads is found, with the one that was meant. Service links are not."""
    for name in [name for name in os.environ if name.startswith("SEKUIRE_")]:
        monkeypatch.delenv(name)
    for name in (
        *SERVICE_LINKS,
        *KNOWN_VARIABLES,
        "SEKUIRE_INSTALL_TOKENS",
        "SEKUIRE_COLOUR_OF_LOGS",
        "sekuire_api_url",
    ):
        monkeypatch.setenv(name, "x")
    assert unknown_variables() == {
        "SEKUIRE_COLOUR_OF_LOGS": "",
        "SEKUIRE_INSTALL_TOKENS": "SEKUIRE_INSTALL_TOKEN",
        "sekuire_api_url": "SEKUIRE_API_URL",
    }


def test_a_missing_agent() -> None:
    """The agent's id is required where there is an agent, and said so."""
    with pytest.raises(ConfigurationError, match="is required") as caught:
        from_options(WorkerConfig, {})
    assert caught.value.option == "agent_id"
    assert from_options(ConnectionConfig, {}).api_base_url == "https://api.sekuire.ai"


# -- URLs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2@platform.test",
        "https://hunter2@platform.test/x y",
        "user:hunter2@platform.test",
        "https://user:hunter2@platform.test:99999",
        "https://user:hunter2@[::1",
        "ftp://user:hunter2@platform.test",
        "platform.test?key=hunter2",
        "platform.test#hunter2",
        "https://platform.test?key=hunter2",
        "http://user:hunter2@platform.test",
        "https://user:hunter2@platform.test/api/v1",
    ],
)
def test_credentials_in_a_url_are_not_echoed(url: str) -> None:
    """A URL with a user name, password or query is refused without quoting it."""
    with pytest.raises(ConfigurationError) as caught:
        ConnectionConfig(api_base_url=url)
    assert caught.value.option == "api_base_url"
    assert "hunter2" not in str(caught.value) + repr(caught.value)


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://platform.test", "https://platform.test"),
        ("https://platform.test/", "https://platform.test"),
        ("https://platform.test:8443/base/", "https://platform.test:8443/base"),
        ("http://localhost:9300", "http://localhost:9300"),
        ("http://127.0.0.1:9300", "http://127.0.0.1:9300"),
        ("http://127.8.9.10", "http://127.8.9.10"),
        ("http://[::1]:9300", "http://[::1]:9300"),
        ("http://dev.localhost", "http://dev.localhost"),
        ("HTTPS://platform.test", "HTTPS://platform.test"),
    ],
)
def test_good_urls(url: str, kept: str) -> None:
    """https anywhere and http to this machine are accepted, a slash at the end dropped."""
    assert ConnectionConfig(api_base_url=url).api_base_url == kept


@pytest.mark.parametrize(
    "url", ["http://platform.test", "http://10.0.0.1:9300", "http://localhost.evil.test", "http://127.0.0.1.evil.test"]
)
def test_http_to_another_machine(url: str) -> None:
    """http to another machine is refused with the way out, and allowed by allow_insecure_http."""
    with pytest.raises(ConfigurationError, match="allow_insecure_http=True") as caught:
        ConnectionConfig(api_base_url=url)
    assert caught.value.option == "api_base_url"
    assert ConnectionConfig(api_base_url=url, allow_insecure_http=True).api_base_url == url


def test_the_prefix_is_not_part_of_the_url() -> None:
    """A URL that ends with the contract's prefix is refused, and the error says that the library adds it."""
    with pytest.raises(ConfigurationError, match="the library adds it"):
        ConnectionConfig(api_base_url="https://platform.test/api/v1/")


@given(st.text())
def test_any_url_is_taken_or_refused(url: str) -> None:
    """Any text is a URL that requests could use or a ConfigurationError."""
    for value in (url, f"https://{url}", f"https://h/{url}"):
        try:
            kept = ConnectionConfig(api_base_url=value).api_base_url
        except ConfigurationError:
            continue
        assert kept.isascii()
        assert kept.lower().startswith(("http://", "https://"))
        assert "@" not in kept.partition("//")[2].partition("/")[0]


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("localhost", True), ("a.localhost", True), ("127.0.0.1", True), ("::1", True), ("0.0.0.0", False),
     ("10.0.0.1", False), ("platform.test", False), ("", False)],
)  # fmt: skip
def test_what_is_this_machine(host: str, is_local: bool) -> None:
    """Only the loopback range and names below localhost are this machine."""
    assert is_loopback(host) is is_local


# -- TLS, proxies, endpoints ------------------------------------------------------------------------------------------


def test_paths_may_be_path_objects(tmp_path: pathlib.Path) -> None:
    """CA bundle and client certificate may be given as Path, and as a list instead of a pair."""
    file = tmp_path / "cert.pem"
    file.write_text("x")
    config = ConnectionConfig(verify=file, client_cert=file)  # type: ignore[arg-type]
    assert (config.verify, config.client_cert) == (str(file), str(file))
    pair: Any = [file, str(file)]
    assert ConnectionConfig(client_cert=pair).client_cert == (str(file), str(file))
    assert ConnectionConfig(verify=str(tmp_path)).verify == str(tmp_path)
    assert ConnectionConfig(verify=False).verify is False


def test_proxies_are_not_shown() -> None:
    """Proxies are taken as they are and, because their URLs may hold a password, not shown."""
    config = ConnectionConfig(proxies={"https": "http://user:hunter2@proxy.test:3128"})
    assert "hunter2" not in repr(config)
    with pytest.raises(ConfigurationError) as caught:
        ConnectionConfig(proxies={"https": "user:hunter2@proxy.test:3128"})
    assert "hunter2" not in str(caught.value)
    assert ConnectionConfig(proxies={}).proxies == {}


def test_endpoints_are_built_once() -> None:
    """Endpoints given as a mapping become Endpoints, and those are kept."""
    config = ConnectionConfig(endpoints={"logs": "/x"})  # type: ignore[arg-type]
    assert config.endpoints.path("logs") == "/x"
    endpoints = Endpoints()
    assert ConnectionConfig(endpoints=endpoints).endpoints is endpoints


# -- who and how ------------------------------------------------------------------------------------------------------


def test_tokens_become_secrets_and_are_not_shown() -> None:
    """Tokens become secrets, and no settings object shows one."""
    tokens = dict.fromkeys(("install_token", "runtime_token", "refresh_token"), TOKEN)
    for cls in (WorkerConfig, SDKConfig, BeaconConfig):
        extra = {"api_key": TOKEN} if cls is not WorkerConfig else {}
        config: AgentConfig = cls(agent_id="a", installation_id="i", **tokens, **extra)
        assert config.install_token == Secret(TOKEN)
        assert TOKEN not in repr(config)
        assert TOKEN not in str(attrs.asdict(config, recurse=False))


def test_a_refresh_token_needs_its_installation() -> None:
    """A refresh token without installation_id is refused, unless a store may tell it."""
    with pytest.raises(ConfigurationError, match="refresh_token") as caught:
        WorkerConfig(agent_id="a", refresh_token=TOKEN)
    assert caught.value.option == "installation_id"
    WorkerConfig(agent_id="a", refresh_token=TOKEN, installation_id="i")
    WorkerConfig(agent_id="a", refresh_token=TOKEN, credentials_store=Store())


def test_a_beacon_needs_its_installation() -> None:
    """A runtime token without installation_id is refused for a Beacon, not for a Worker."""
    with pytest.raises(ConfigurationError, match="runtime_token") as caught:
        BeaconConfig(agent_id="a", runtime_token=TOKEN)
    assert caught.value.option == "installation_id"
    BeaconConfig(agent_id="a", runtime_token=TOKEN, credentials_store=Store())
    WorkerConfig(agent_id="a", runtime_token=TOKEN)


def test_capabilities() -> None:
    """Capabilities are any names in order, each once; a single str is told how to be a list."""
    assert WorkerConfig(agent_id="a", capabilities=["b", "a", "b", "é *"]).capabilities == ("b", "a", "é *")
    assert WorkerConfig(agent_id="a", capabilities=(name for name in "ab")).capabilities == ("a", "b")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"\['summarize'\], not a single str"):
        WorkerConfig(agent_id="a", capabilities="summarize")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError) as caught:
        check_capability("a,b", "on_task")
    assert caught.value.option == "on_task"


def test_objects_must_offer_what_is_used() -> None:
    """A store or gateway of another make is accepted if it has the methods, and else told what is missing."""
    config = WorkerConfig(agent_id="a", credentials_store=Store(), policy_gateway=Gateway())
    assert isinstance(config.policy_gateway, Gateway)
    with pytest.raises(ConfigurationError, match="must offer check_request, check_capability"):
        WorkerConfig(agent_id="a", policy_gateway=5)


def test_executors() -> None:
    """Any executor is accepted, but for a pool that forks, which is told what to use instead."""
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        assert WorkerConfig(agent_id="a", executor=executor).executor is executor
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert WorkerConfig(agent_id="a", executor=pool).executor is pool
    with pytest.raises(ConfigurationError, match=r"use sekuire.ProcessExecutor\(\), or give the pool mp_context="):
        WorkerConfig(agent_id="a", executor=FORKING)


def test_settings_that_belong_together() -> None:
    """The longest reconnect delay is at least the first; the queue is as long as there are threads, unless said."""
    with pytest.raises(ConfigurationError, match="at least reconnect_min") as caught:
        WorkerConfig(agent_id="a", reconnect_min=2.0, reconnect_max=1.0)
    assert caught.value.option == "reconnect_max"
    assert WorkerConfig(agent_id="a", max_workers=3).queue_size == 3
    assert WorkerConfig(agent_id="a", max_workers=3, max_queued=0).queue_size == 0


def test_defaults_of_the_documentation() -> None:
    """The defaults are those of the documented interface."""
    config = WorkerConfig(agent_id="a")
    assert (config.connect_timeout, config.read_timeout, config.verify) == (3.0, 10.0, True)
    assert (config.heartbeat_interval, config.max_workers, config.task_timeout) == (10.0, 8, None)
    assert (config.start_timeout, config.shutdown_timeout, config.stream_idle_timeout) == (10.0, 30.0, 45.0)
    assert (config.reconnect_min, config.reconnect_max, config.expose_errors) == (0.5, 30.0, True)
    assert config.max_event_bytes == config.max_result_bytes == 16 * 1024 * 1024
    assert config.max_waiting_bytes == 64 * 1024 * 1024
    sdk = SDKConfig(agent_id="a")
    assert (sdk.heartbeat_interval, sdk.auto_heartbeat, sdk.environment) == (60.0, True, "production")


# -- the environment --------------------------------------------------------------------------------------------------


def test_the_environment_is_read_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables give what no argument gives, with their names as sources; empty ones count as not set."""
    for name, variable in ENVIRONMENT.items():
        monkeypatch.setenv(variable, f"value-of-{name}")
    monkeypatch.setenv("SEKUIRE_WORKSPACE_ID", "")
    found, sources = read_environment({"agent_id": "mine"}, tuple(ENVIRONMENT))
    assert found["agent_id"] == "mine"
    assert "agent_id" not in sources
    assert "workspace_id" not in found
    assert found["api_base_url"] == "value-of-api_base_url"
    assert sources["api_base_url"] == "environment variable SEKUIRE_API_URL"
    assert read_environment({}, ("agent_id",))[0] == {"agent_id": "value-of-agent_id"}


@pytest.mark.parametrize("name", sorted(ENVIRONMENT))
def test_a_wrong_variable_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong value from the environment names option and variable."""
    monkeypatch.setenv(ENVIRONMENT[name], f"{TOKEN}\n{TOKEN}")
    others = {"agent_id": "a", "installation_id": "i"}
    others.pop(name, None)
    with pytest.raises(ConfigurationError) as caught:
        from_options(SDKConfig, *read_environment(others, (name,)))
    assert caught.value.option == name
    assert caught.value.source == f"environment variable {ENVIRONMENT[name]}"
    assert f"{name} (from environment variable {ENVIRONMENT[name]}): " in str(caught.value)
    if "token" in name or "key" in name:
        assert TOKEN not in str(caught.value)


READ = (*ENVIRONMENT.values(), "SEKUIRE_CREDENTIALS_FILE", "SEKUIRE_OUTBOX", "SEKUIRE_POLICY_PUBLIC_KEYS")


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ('"{}"', "a quote"), ("'{}'", "a quote"), ('"{}', "a quote"), ("{}`", "a quote"), ("\u201c{}\u201d", "a quote"),
        ("{} ", "a space"), (" {}", "a space"), ("\u00a0{}", "a space"), ("{}\t", "a space"), (" ", "a space"),
        ("{}\n", "a line end"), ("{}\r", "a line end"), ("{}\r\n", "a line end"),
        ("\ufeff{}", "a byte order mark"), ("{}\u200b", "a byte order mark"), ('\ufeff"{}"', "a byte order mark"),
    ],
)  # fmt: skip
def test_what_is_around_a_value_is_refused(name: str, form: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variable that is read refuses quotes, marks, spaces and line ends, by its name and without its value."""
    for other in READ:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("SEKUIRE_AGENT_ID", "a")
    monkeypatch.setenv(name, form.format("value-to-keep"))
    with pytest.raises(ConfigurationError) as caught:
        SekuireSDK.from_env()
    assert f"environment variable {name}: begins or ends with {problem}" in str(caught.value).replace(")", "")
    assert "value-to-keep" not in str(caught.value)


def test_a_boolean_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has two readings, whatever its case, and no third."""
    name = "SEKUIRE_POLICY_DEV_OVERRIDE"
    monkeypatch.delenv(name, raising=False)
    assert boolean_variable(name) is False
    for value, meaning in (("1 true YES On", True), ("0 False no OFF", False)):
        for text in value.split():
            monkeypatch.setenv(name, text)
            assert boolean_variable(name) is meaning
    monkeypatch.setenv(name, "")
    assert boolean_variable(name) is False
    for text in ("2", "y", "enabled", "truee", "1,", "\u0661", "00"):
        monkeypatch.setenv(name, text)
        with pytest.raises(ConfigurationError, match=f"environment variable {name}: must be one of 1, true"):
            boolean_variable(name)


@pytest.mark.parametrize("text", [",", ",,", ", ,"])
def test_keys_that_pin_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of keys without a key in it is an error, not the absence of a pin."""
    monkeypatch.setenv("SEKUIRE_POLICY_PUBLIC_KEYS", text)
    with pytest.raises(ConfigurationError, match="SEKUIRE_POLICY_PUBLIC_KEYS: names no key"):
        policy_keys_from_environment()
    with pytest.raises(ConfigurationError, match="SEKUIRE_POLICY_PUBLIC_KEYS: names no key"):
        SekuireSDK.from_env(agent_id="a", runtime_token="t", installation_id="i")
    with pytest.raises(ConfigurationError, match="POLICY_PUBLIC_KEYS: names no key"):
        Settings({"POLICY_PUBLIC_KEYS": text}, lambda key: key)
    monkeypatch.setenv("SEKUIRE_POLICY_PUBLIC_KEYS", "")
    assert policy_keys_from_environment() == ()


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Making settings logs nothing."""
    with caplog.at_level(logging.DEBUG):
        from_options(WorkerConfig, options())
    assert not caplog.records
