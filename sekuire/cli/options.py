"""Declare and read the options that several commands share: logging, the platform's address, API keys."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from typing import TYPE_CHECKING, Any, ContextManager, Dict, Iterator, Optional, Tuple, Type

from ..config import (
    BOOLEAN_ENVIRONMENT,
    CREDENTIALS_FILE_VARIABLE,
    ENVIRONMENT,
    ConnectionConfig,
    EnvFile,
    boolean_variable,
    file_in_use,
    from_options,
    keep_quiet,
    log_format,
    source_of,
    using_file,
    variable,
)
from ..errors import ConfigurationError
from ..secret import Secret, as_secret
from ..transport.http import Credential
from ..wire import protocol
from . import terminal
from .exits import CommandError

if TYPE_CHECKING:
    from ..local import LocalPlatform


def local_platform() -> Type[LocalPlatform]:
    """Return the class of the local platform. Import it only here, because it brings a web server.

    :raises ConfigurationError: the extra is not installed.
    """
    try:
        from ..local import LocalPlatform
    except ImportError as error:
        problem = f"the local platform cannot be imported ({error}); run: pip install 'sekuire[local]'"
    else:
        return LocalPlatform
    raise ConfigurationError(problem)


def logs(args: argparse.Namespace) -> ContextManager[None]:
    """Return a context in which the log goes to stderr, as far as the options and the command want it.

    :raises ConfigurationError: ``SEKUIRE_LOG_FORMAT`` holds no known format.
    """
    given: Optional[str] = getattr(args, "log_format", None)
    is_json = (log_format(None) if given is None else given) == "json"
    verbose = getattr(args, "verbose", 0)
    if verbose > 1:
        return terminal.logs("DEBUG", others="DEBUG", is_json=is_json)
    level = "debug" if verbose else getattr(args, "log_level", None)
    if getattr(args, "quiet", False):
        keep_quiet(True)
        level = level or "error"
    # A worker's lines are printed by the rule for all programs (docs/running.md), without a handler of ours. In JSON
    # the lines of other packages are to have the same form, which only a handler can give them.
    if args.command == "worker" and not is_json:
        return terminal.printed_logs(None if level is None else level.upper())
    return terminal.logs((level or args.default_level).upper(), is_json=is_json)


def add_env_file(parser: argparse.ArgumentParser) -> None:
    """Add the option that names a file of variables."""
    parser.add_argument(
        "--env-file",
        metavar="FILE",
        help="read SEKUIRE_... variables that are not set from this file (default: .env, if there is one)",
    )


@contextlib.contextmanager
def env_file(args: argparse.Namespace) -> Iterator[None]:
    """Set the variables of the file that ``--env-file`` names, or of a ``.env`` that is there, for one command.

    :raises CommandError: the file cannot be used, or a credential from elsewhere would go to its address.
    """
    if not hasattr(args, "env_file"):
        yield
        return
    with contextlib.ExitStack() as stack:
        _read_env_file(args, stack)
        yield


def _read_env_file(args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    from .. import envfile  # A command that needs no variables needs no such file either.

    problem = ""
    found: Optional[EnvFile] = None
    try:
        found = envfile.find() if args.env_file is None else envfile.read(args.env_file)
        if found is None:
            return
        stack.enter_context(using_file(found))
        if getattr(args, "url", None) is None:
            given = {"--api-key-file": getattr(args, "api_key_file", None)}
            envfile.check_credentials(found, given, variable(CREDENTIALS_FILE_VARIABLE))
    except ConfigurationError as error:
        if error.option != "env_file":
            raise
        problem = error.problem
    if problem or found is None:
        raise CommandError(problem)
    count = len(found.values)
    winners = f"; the environment itself sets {', '.join(found.set_elsewhere)}" if found.set_elsewhere else ""
    if count:
        terminal.note(f"settings from {found.path}: {count} variable{'' if count == 1 else 's'}{winners}")
    stack.enter_context(envfile.in_environment(found))


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the platform is."""
    add_env_file(parser)
    parser.add_argument(
        "--url", "--backend", help="the platform's address (default: SEKUIRE_API_URL, or the public platform's)"
    )
    parser.add_argument(
        "--allow-insecure-http",
        action="store_true",
        help="let keys travel unencrypted to another machine, where the network itself is trusted",
    )


def connection(args: argparse.Namespace) -> ConnectionConfig:
    """Return the connection's configuration from the options and the environment.

    :raises ConfigurationError: the address is wrong; the text names the option or variable it came from.
    """
    allow_insecure = args.allow_insecure_http or boolean_variable(BOOLEAN_ENVIRONMENT["allow_insecure_http"])
    options: Dict[str, Any] = {"allow_insecure_http": allow_insecure}
    source = "--url"
    if args.url is not None:
        options["api_base_url"] = args.url
    else:
        name = ENVIRONMENT["api_base_url"]
        url = variable(name)
        source = source_of(name)
        if url is not None:
            options["api_base_url"] = url
    fingerprint = ENVIRONMENT["device_fingerprint"]
    options["device_fingerprint"] = variable(fingerprint)
    sources = {"api_base_url": source, "device_fingerprint": source_of(fingerprint)}
    try:
        return from_options(ConnectionConfig, options, sources)
    except ConfigurationError as error:
        found = error
    problem = found.problem.replace("pass allow_insecure_http=True", "give --allow-insecure-http")
    raise ConfigurationError(problem, found.option, found.source)


def read_input(path: Optional[str], most: int) -> Tuple[bytes, str]:
    """Return the bytes of a file (None: stdin), and why they cannot be used: unreadable, or above ``most`` MiB."""
    data, problem = b"", ""
    limit = most * 1024 * 1024
    try:
        if path is not None:
            with open(path, "rb") as file:
                data = file.read(limit + 1)
        elif sys.stdin is not None:
            data = sys.stdin.buffer.read(limit + 1)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    return data, problem or (f"it is larger than {most} MiB" if len(data) > limit else "")


def api_key(path: Optional[str]) -> Tuple[Secret, str]:
    """Return the API key, and the file (``path``) or variable (``SEKUIRE_API_KEY``) it came from.

    It never comes from the command line, which other users of the machine can read.

    :raises CommandError: there is no key, or the file cannot be read.
    :raises ConfigurationError: the key is malformed.
    """
    if path is None:
        name = ENVIRONMENT["api_key"]
        text = variable(name)
        if text is None:
            raise CommandError(f"no API key: set {name}, or give --api-key-file PATH")
        used = file_in_use()
        where = f"{name} in {used.path}" if used is not None and name in used.values else name
        return as_secret(text, source_of(name)), where
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(65536)
    except OSError as error:
        problem = error.strerror or type(error).__name__
    except UnicodeDecodeError:
        problem = "it is not text"
    else:
        return as_secret(text.strip(), f"--api-key-file {path}"), path
    raise CommandError(f"--api-key-file: cannot read {path!r}: {problem}")


def key_header(key: Secret) -> Credential:
    """Return a credential that puts ``key`` into a request's header when the request is built."""
    return functools.partial(protocol.api_key_header, key)
