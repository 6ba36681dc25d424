"""Turn a framework's settings and the environment into options of the SDK and of its workers."""

from __future__ import annotations

import difflib
import os
from typing import Any, Callable, Dict, FrozenSet, Mapping, Optional, Tuple

import attrs

from ..client import SekuireClient
from ..config import (
    CREDENTIALS_FILE_VARIABLE,
    ENVIRONMENT,
    OUTBOX_VARIABLE,
    PINS_NOTHING,
    POLICY_KEYS_VARIABLE,
    ClientConfig,
    ConnectionConfig,
    SDKConfig,
    WorkerConfig,
    conceal,
    from_options,
    policy_keys_from_environment,
    read_environment,
    source_of,
    split_policy_keys,
    variable,
    with_source,
)
from ..credentials import RuntimeCredentialsStore
from ..errors import ConfigurationError
from ..sdk import SekuireSDK
from ..service.doctor import Configuration, examine
from ..service.findings import Finding, Findings
from ..worker.worker import Worker

PREFIX = "SEKUIRE_"
#: Seconds for which a submission is sent again.
RETRY_FOR = 5.0

_SDK = frozenset(str(field.alias) for field in attrs.fields(SDKConfig)) - {"on_status_change"}
#: A worker gets the other options from its SDK. Both have the interval.
_WORKER = (frozenset(str(field.alias) for field in attrs.fields(WorkerConfig)) - _SDK - {"token_provider"}) | {
    "heartbeat_interval"
}
_CREDENTIALS_FILE = "CREDENTIALS_FILE"
#: The variable's name for ``trusted_policy_keys``, which may also be given by the option's.
_POLICY_KEYS = POLICY_KEYS_VARIABLE[len(PREFIX) :]
#: Key without its prefix → option: named as the environment variable where there is one, else as the option.
_OPTIONS: Dict[str, str] = {name.upper(): name for name in sorted(_SDK | _WORKER)}
for _option, _variable in ENVIRONMENT.items():
    _OPTIONS.pop(_option.upper(), None)
    _OPTIONS[_variable[len(PREFIX) :]] = _option
_OPTIONS[_POLICY_KEYS] = "trusted_policy_keys"


class Settings:
    """Hold the options that a framework's settings contain.

    :param values: key without the prefix ``SEKUIRE_`` → value; None counts as not set. Keys have the names of the
        environment variables (``API_URL``, ``INSTALL_TOKEN``, ``CREDENTIALS_FILE``) or of the options
        (``MAX_WORKERS``, ``TASK_TIMEOUT``). ``POLICY_PUBLIC_KEYS`` may be a list, or a text as in the variable.
    :param label: returns the user's name for a key, for errors.
    :raises ConfigurationError: a key is unknown, or two keys set the same option.
    """

    def __init__(self, values: Mapping[str, Any], label: Callable[[str], str]) -> None:
        self._label = label
        self._keys: Dict[str, str] = {}
        self._options: Dict[str, Any] = {}
        self._file: Optional[Any] = None
        for key, value in values.items():
            if key == _CREDENTIALS_FILE:
                self._file = value
                continue
            option = _OPTIONS.get(key)
            if option is None:
                close = difflib.get_close_matches(key, [*_OPTIONS, _CREDENTIALS_FILE], n=1)
                hint = f"did you mean {label(close[0])}?" if close else "the configuration page lists all settings"
                raise ConfigurationError(f"unknown setting; {hint}", label(key))
            if key == _POLICY_KEYS and isinstance(value, str):
                # An empty text counts as not set, as for the variable.
                if value and not split_policy_keys(value):
                    raise ConfigurationError(PINS_NOTHING, label(key))
                value = list(split_policy_keys(value)) or None
            if value is None:
                continue
            if option in self._options:
                raise ConfigurationError(f"says the same as {label(self._keys[option])}; give one of them", label(key))
            self._keys[option] = key
            self._options[option] = value
        conceal(self._options)

    def sdk(self) -> SekuireSDK:
        """Return an SDK from these settings and the environment, not yet started. The settings win.

        :raises ConfigurationError: a setting or variable is wrong or missing; the text names it.
        """
        self.agent_id()
        options = _only(self._options, _SDK)
        try:
            if self._file is not None and "credentials_store" not in options:
                options["credentials_store"] = RuntimeCredentialsStore(path=self._file)
            return SekuireSDK.from_env(**options)
        except ConfigurationError as error:
            found = error
        finally:
            # An error's frames must not hold plain tokens.
            options.clear()
        raise self.named(found)

    def worker(self, sdk: SekuireSDK, **options: Any) -> Worker:
        """Return a worker of ``sdk`` with these settings. ``options`` win over them.

        :raises ConfigurationError: a setting is wrong; the text names it.
        """
        own = {name: value for name, value in self._options.items() if name in _WORKER and name not in options}
        try:
            return sdk.create_task_worker(**own, **options)
        except ConfigurationError as error:
            found = error
        raise self.named(found) if found.option in own else found

    def check(self) -> None:
        """Check every value that is set, here or in the environment. An option that is not set is not an error.

        It opens, creates and requests nothing; it only checks that directories exist.

        :raises ConfigurationError: a value is wrong; the text names it.
        """
        options, sources = self._resolved()
        keys = policy_keys_from_environment()
        if keys and "trusted_policy_keys" not in options and options.get("policy_gateway") is None:
            options["trusted_policy_keys"] = keys
            sources["trusted_policy_keys"] = source_of(POLICY_KEYS_VARIABLE)
        own = _only(self._options, _WORKER)
        try:
            if self._file is not None:
                RuntimeCredentialsStore(path=self._file)
            config = from_options(SDKConfig, {"agent_id": "unknown", **_only(options, _SDK)}, sources)
            worker = from_options(WorkerConfig, {**own, "agent_id": "unknown"})
            if worker.outbox is not None:
                _check_outbox(worker.outbox)
            else:
                outbox = variable(OUTBOX_VARIABLE)
                if outbox is not None:
                    _check_outbox(outbox, source_of(OUTBOX_VARIABLE))
            _check_policy(config, sources)
            return
        except ConfigurationError as error:
            found = error
        finally:
            options.clear()
        raise self.named(found)

    def options(self) -> Dict[str, Any]:
        """Return all options that are set, here or in the environment. Tokens are plain text."""
        return self._resolved()[0]

    def has_credentials_file(self) -> bool:
        """Return True if a credentials file is set, here or in the environment."""
        return self._file is not None or variable(CREDENTIALS_FILE_VARIABLE) is not None

    def runs_elsewhere(self, **options: Any) -> bool:
        """Return True if handlers run in other processes that no initializer prepares. ``options`` win."""
        return is_unprepared(options.get("executor", self._options.get("executor")))

    def agent_id(self) -> str:
        """Return the agent's id.

        :raises ConfigurationError: it is not set.
        """
        agent_id: Optional[str] = self._resolved()[0].get("agent_id")
        if agent_id is None:
            raise ConfigurationError("is required; set SEKUIRE_AGENT_ID", self._label("AGENT_ID"))
        return agent_id

    def client(self) -> SekuireClient:
        """Return a client that uses the API key. It does not try long: a request may wait for it.

        :raises ConfigurationError: there is no API key, or another setting is wrong.
        """
        options, sources = self._resolved()
        known = frozenset(str(field.alias) for field in attrs.fields(ClientConfig))
        try:
            if options.get("api_key") is None:
                raise ConfigurationError("is required to submit tasks; set SEKUIRE_API_KEY", self._label("API_KEY"))
            return SekuireClient(retry_for=RETRY_FOR, **_only(options, known))
        except ConfigurationError as error:
            found = with_source(error, sources)
        finally:
            options.clear()
        raise self.named(found)

    def configuration(self) -> Configuration:
        """Return these settings and the environment for :func:`sekuire.service.doctor.examine`."""
        return _Examined(self)

    def given(self) -> Dict[str, Any]:
        """Return the options that are set here, and the path of the credentials file as ``credentials_file``."""
        return {**self._options, "credentials_file": self._file}

    def name_of(self, option: str) -> str:
        """Return the user's name for an option: that of the setting, unless only the variable is set."""
        key = _CREDENTIALS_FILE if option == "credentials_file" else self._keys.get(option)
        if key is None:
            key = ENVIRONMENT.get(option, PREFIX + option.upper())[len(PREFIX) :]
        is_here = self.given().get(option) is not None
        return PREFIX + key if not is_here and os.environ.get(PREFIX + key) else self._label(key)

    def _resolved(self) -> Tuple[Dict[str, Any], Dict[str, str]]:
        return read_environment(self._options, tuple(ENVIRONMENT))

    def named(self, error: ConfigurationError) -> ConfigurationError:
        """Return a copy of ``error`` that has no frames and names the option as the user does."""
        key = self._keys.get(error.option or "")
        if error.option == "path" and self._file is not None:
            key = _CREDENTIALS_FILE
        if error.source is None and key is None and error.option in self._options.get("policy_options", ()):
            return ConfigurationError(f"{error.option} {error.problem}", self._label(self._keys["policy_options"]))
        if error.source is not None or key is None:
            return ConfigurationError(error.problem, error.option, error.source)
        return ConfigurationError(error.problem, self._label(key))


class _Examined(Configuration):
    """Show the doctor a framework's settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def given(self) -> Mapping[str, Any]:
        return self._settings.given()

    def name(self, option: str) -> str:
        return self._settings.name_of(option)

    def check(self) -> None:
        self._settings.check()

    def connection(self) -> ConnectionConfig:
        try:
            return super().connection()
        except ConfigurationError as error:
            found = error
        raise self._settings.named(found)


def diagnose(read: Callable[[], Settings], show: Callable[[Finding], object]) -> Findings:
    """Return what the doctor finds with the settings that ``read`` returns. Each finding is also shown at once."""
    findings = Findings(show)
    configuration: Optional[Configuration] = None
    with findings.catching("settings"):
        configuration = read().configuration()
    findings.is_usage = configuration is None
    if configuration is not None:
        examine(configuration, findings)
    return findings


def is_unprepared(executor: Any) -> bool:
    """Return True if ``executor`` runs calls in processes that no initializer of the user prepares."""
    if executor is None:
        return False
    # A web process, which has none, need not pay for it.
    from ..executors.backends import backend_of

    backend = backend_of(executor)
    return backend is not None and not backend.is_prepared()


def _check_outbox(path: Any, source: Optional[str] = None) -> None:
    from ..worker.outbox import checked_path

    try:
        checked_path(path)
        return
    except ConfigurationError as error:
        problem = error.problem
    raise ConfigurationError(problem, "outbox" if source is None else None, source)


def _check_policy(config: SDKConfig, sources: Mapping[str, str]) -> None:
    """Check the policy's options as the SDK will, without connecting to a shared store."""
    from ..policy.client import missing_packages
    from ..policy.gateway import InstallationGateway

    # A web process does not need the extra. The worker reports that it is missing.
    if config.policy_gateway is not None or missing_packages():
        return
    options = {name: value for name, value in (config.policy_options or {}).items() if name != "storage_uri"}
    try:
        InstallationGateway(config, options)
        return
    except ConfigurationError as error:
        found = error
    option = "policy_path" if found.option == "path" else found.option
    raise ConfigurationError(found.problem, option, found.source or sources.get(option or ""))


def _only(options: Mapping[str, Any], names: FrozenSet[str]) -> Dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}
