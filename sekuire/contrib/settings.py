"""A framework's settings as options of the SDK and of its workers, with the environment behind them."""

from __future__ import annotations

import difflib
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import attrs

from ..config import ENVIRONMENT, SDKConfig, WorkerConfig
from ..credentials import RuntimeCredentialsStore
from ..errors import ConfigurationError
from ..sdk import SekuireSDK
from ..worker import Worker

PREFIX = "SEKUIRE_"

_SDK = frozenset(str(field.alias) for field in attrs.fields(SDKConfig)) - {"on_status_change"}
#: What a worker has from its SDK is the SDK's; the interval is both's.
_WORKER = (frozenset(str(field.alias) for field in attrs.fields(WorkerConfig)) - _SDK - {"token_provider"}) | {
    "heartbeat_interval"
}
_CREDENTIALS_FILE = "CREDENTIALS_FILE"
#: Key without its prefix → option: named as the environment variable where there is one, else as the option.
_OPTIONS: Dict[str, str] = {name.upper(): name for name in sorted(_SDK | _WORKER)}
for _option, _variable in ENVIRONMENT.items():
    _OPTIONS.pop(_option.upper(), None)
    _OPTIONS[_variable[len(PREFIX) :]] = _option


class Settings:
    """Options read from a framework's settings.

    :param values: key without the prefix ``SEKUIRE_`` → value; None counts as not set. Keys are named as the
        environment variables (``API_URL``, ``INSTALL_TOKEN``, ``CREDENTIALS_FILE``) or as the options
        (``MAX_WORKERS``, ``TASK_TIMEOUT``).
    :param label: the name under which the user knows a key, for errors.
    :raises ConfigurationError: an unknown key.
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
                raise ConfigurationError(f"is no setting of sekuire; {hint}", label(key))
            if value is not None:
                self._keys[option] = key
                self._options[option] = value

    def sdk(self) -> SekuireSDK:
        """An SDK from these settings and, behind them, the environment; not yet started.

        :raises ConfigurationError: a setting or variable is wrong or missing; the text names it.
        """
        options = {name: value for name, value in self._options.items() if name in _SDK}
        try:
            if self._file is not None and "credentials_store" not in options:
                options["credentials_store"] = RuntimeCredentialsStore(path=self._file)
            return SekuireSDK.from_env(**options)
        except ConfigurationError as error:
            found = error
        finally:
            # An error's frames must not hold plain tokens.
            options.clear()
        raise self._named(found)

    def worker(self, sdk: SekuireSDK, **options: Any) -> Worker:
        """A worker of ``sdk`` from these settings; ``options`` win over them.

        :raises ConfigurationError: as :meth:`sdk`.
        """
        own = {name: value for name, value in self._options.items() if name in _WORKER and name not in options}
        try:
            return sdk.create_task_worker(**own, **options)
        except ConfigurationError as error:
            found = error
        raise self._named(found) if found.option in own else found

    def _named(self, error: ConfigurationError) -> ConfigurationError:
        """``error``, new and without its frames, with the name that the user knows its option by."""
        key = self._keys.get(error.option or "")
        if error.option == "path" and self._file is not None:
            key = _CREDENTIALS_FILE
        if error.source is not None or key is None:
            return ConfigurationError(error.problem, error.option, error.source)
        return ConfigurationError(error.problem, self._label(key))


def known_keys() -> Tuple[str, ...]:
    """All keys, without the prefix."""
    return (*_OPTIONS, _CREDENTIALS_FILE)
