"""What ``manage.py check`` says of the settings and the handlers."""

from __future__ import annotations

from typing import Any, List

from django.core.checks import CheckMessage, Error, Warning

from ...errors import ConfigurationError
from . import conf, handlers

TAG = "sekuire"


def check_settings(app_configs: Any, **kwargs: Any) -> List[CheckMessage]:
    """Values that are set, here or in the environment; what a worker needs beyond them is the worker's to say."""
    found: List[CheckMessage] = []
    try:
        conf.read().check()
    except ConfigurationError as error:
        found.append(Error(str(error), id="sekuire.E001"))
    return found


def check_handlers(app_configs: Any, **kwargs: Any) -> List[CheckMessage]:
    """Every ``sekuire_tasks.py`` can be imported and declares what can be declared: names, signatures, extras."""
    try:
        handlers.discover()
    except ConfigurationError as error:
        return [Error(f"a {handlers.MODULE}.py cannot be used: {error}", id="sekuire.E002")]
    except Exception as error:  # noqa: BLE001  # Whatever a module of the project raises.
        return [
            Error(
                f"a {handlers.MODULE}.py cannot be imported: {type(error).__name__}: {error}",
                hint="import it in manage.py shell to see where",
                id="sekuire.E003",
            )
        ]
    if handlers.tasks.is_empty():
        hint = f"declare one with @task('name') in a {handlers.MODULE}.py, or take the app out of INSTALLED_APPS"
        return [Warning("no handler is declared in any installed app", hint=hint, id="sekuire.W001")]
    return []


def check_security(app_configs: Any, **kwargs: Any) -> List[CheckMessage]:
    """``check --deploy``: options that are for development only."""
    try:
        options = conf.read().options()
    except ConfigurationError:
        return []  # check_settings says it.
    found: List[CheckMessage] = []
    if options.get("verify") is False:
        found.append(
            Warning(
                "the platform's certificate is not checked (VERIFY is False): tokens can be stolen on the way",
                hint="give the path of your CA's bundle instead",
                id="sekuire.W010",
            )
        )
    if options.get("allow_insecure_http"):
        found.append(
            Warning(
                "tokens travel unencrypted (ALLOW_INSECURE_HTTP)", hint="use https:// in API_URL", id="sekuire.W011"
            )
        )
    keeps = options.get("credentials_store") is not None or conf.read().has_credentials_file()
    if options.get("install_token") is not None and not keeps:
        found.append(
            Warning(
                "an install token without CREDENTIALS_FILE: a restarted worker cannot log in again",
                hint="name a file that the worker's user can write and others cannot read",
                id="sekuire.W012",
            )
        )
    if options.get("environment") not in (None, "production"):
        found.append(Warning(f"ENVIRONMENT is {options['environment']!r}, not 'production'", id="sekuire.W013"))
    return found
