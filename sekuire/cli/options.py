"""Declare and read the options that several commands share: logging, the platform's address, API keys."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import TYPE_CHECKING, Any, Dict, Optional, Tuple, Type

from ..config import ENVIRONMENT, ConnectionConfig, from_options, source_of, variable
from ..errors import ConfigurationError
from ..secret import Secret, as_secret
from ..transport.http import Credential
from ..wire import protocol
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


LEVELS = ("debug", "info", "warning", "error")


def logging_options() -> argparse.ArgumentParser:
    """Return a parent parser with the logging options. Options that are not given are not set."""
    parent = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = parent.add_argument_group("logging")
    group.add_argument("-v", "--verbose", action="store_true", help="log everything to stderr; the same as debug")
    group.add_argument("--log-level", choices=LEVELS, type=str.lower, help="log to stderr from this level on")
    return parent


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the platform is."""
    parser.add_argument("--url", help="the platform's address (default: SEKUIRE_API_URL, or the public platform's)")
    parser.add_argument(
        "--allow-insecure-http",
        action="store_true",
        help="let keys travel unencrypted to another machine, where the network itself is trusted",
    )


def connection(args: argparse.Namespace) -> ConnectionConfig:
    """Return the connection's configuration from the options and the environment.

    :raises ConfigurationError: the address is wrong; the text names the option or variable it came from.
    """
    options: Dict[str, Any] = {"allow_insecure_http": args.allow_insecure_http}
    source = "--url"
    if args.url is not None:
        options["api_base_url"] = args.url
    else:
        name = ENVIRONMENT["api_base_url"]
        url = variable(name)
        source = source_of(name)
        if url is not None:
            options["api_base_url"] = url
    try:
        return from_options(ConnectionConfig, options, {"api_base_url": source})
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
        return as_secret(text, source_of(name)), name
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
