"""Check the settings and the handlers, for ``manage.py check``."""

from __future__ import annotations

import os
import sysconfig
import traceback
from typing import Any, List, Optional

import django
from django.apps import AppConfig, apps
from django.core.checks import CheckMessage, Error, Warning

from ...errors import ConfigurationError
from . import conf, handlers

TAG = "sekuire"

_LIBRARY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
#: Folders that hold no code of the project.
_NOT_THEIRS = tuple(
    path + os.sep
    for path in (
        _LIBRARY,
        os.path.dirname(os.path.abspath(django.__file__)),
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    )
)


def check_settings(app_configs: Any, **kwargs: Any) -> List[CheckMessage]:
    """Check the values that are set, here or in the environment. A worker itself reports those that are missing."""
    found: List[CheckMessage] = []
    try:
        settings = conf.read()
        settings.check()
    except ConfigurationError as error:
        return [Error(str(error), id="sekuire.E001")]
    if settings.runs_elsewhere():
        found.append(Warning(f"EXECUTOR: {conf.ELSEWHERE}", hint=conf.PREPARE, id="sekuire.W002"))
    return found


def check_handlers(app_configs: Any, **kwargs: Any) -> List[CheckMessage]:
    """Check that every ``sekuire_tasks.py`` can be imported, and the names, signatures and extras of its handlers."""
    found: List[CheckMessage] = []
    for app in apps.get_app_configs():
        name = f"{app.name}.{handlers.MODULE}"
        try:
            handlers.load(app)
        except handlers.Exited as error:
            found.append(Error(f"{error}{_at(error.__cause__, app)}", id="sekuire.E003"))
        except ConfigurationError as error:
            found.append(Error(f"{name} cannot be used: {error}{_at(error, app)}", id="sekuire.E002"))
        except Exception as error:  # noqa: BLE001  # Whatever a module of the project raises.
            text = f"{name} cannot be imported: {type(error).__name__}: {error}{_at(error, app)}"
            found.append(Error(text, hint="import it in manage.py shell to see all of it", id="sekuire.E003"))
    if not found and handlers.tasks.is_empty():
        hint = f"declare one with @task('name') in a {handlers.MODULE}.py, or take the app out of INSTALLED_APPS"
        found.append(Warning("no handler is declared in any installed app", hint=hint, id="sekuire.W001"))
    return found


def _at(error: Optional[BaseException], app: AppConfig) -> str:
    """Return the place of ``error`` in the project's own code, in brackets, or nothing if it is not known."""
    if isinstance(error, SyntaxError) and error.filename and os.path.isfile(error.filename):
        return f" ({error.filename}:{error.lineno})"
    frames = [] if error is None else traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if os.path.isfile(frame.filename) and not frame.filename.startswith(_NOT_THEIRS)]
    # An app that is itself installed as a package.
    mine = mine or [frame for frame in frames if frame.filename.startswith(app.path + os.sep)]
    return f" ({mine[-1].filename}:{mine[-1].lineno})" if mine else ""


def check_security(app_configs: Any, **kwargs: Any) -> List[CheckMessage]:
    """Warn about options that are for development only, for ``check --deploy``."""
    try:
        options = conf.read().options()
    except ConfigurationError:
        return []  # check_settings() reports it.
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
