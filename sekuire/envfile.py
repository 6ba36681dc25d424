"""Read the ``SEKUIRE_...`` lines of a ``.env`` file, and refuse a file or a combination that could leak a credential.

A cloned repository or a shared directory may hold a ``.env`` that someone else wrote. An address in it decides where
credentials go, so a file's address is used only with credentials of the same file. A file that was found, and not
named by the user, may only name an address of this machine.
"""

# Threads: a file is read and checked on the thread that starts a command or makes an SDK. Nothing here is shared.

from __future__ import annotations

import contextlib
import os
import re
import stat
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple, Union
from urllib.parse import urlsplit

from ._internal.files import Guard
from .config import (
    BOOLEAN_ENVIRONMENT,
    CREDENTIALS_FILE_VARIABLE,
    ENVIRONMENT,
    OWN_VARIABLES,
    POLICY_OVERRIDE_VARIABLE,
    EnvFile,
    is_loopback,
    variable,
)
from .errors import ConfigurationError

__all__ = ["DEFAULT_NAME", "check_credentials", "find", "format_line", "in_environment", "parse", "read"]

#: The file that a command reads if none is named.
DEFAULT_NAME = ".env"

_PREFIX = "SEKUIRE_"
_MOST_BYTES = 1024 * 1024
_GUARD = Guard("env_file", is_secret=False)
_NAME = re.compile(r"SEKUIRE_[A-Z0-9_]+\Z")
#: What needs no quotes, in a shell neither.
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+\Z")
_ESCAPED = re.compile(r'\\(["\\$`])')

_URL = ENVIRONMENT["api_base_url"]
#: Options that hold a credential.
CREDENTIALS = ("install_token", "runtime_token", "refresh_token", "api_key")
#: What a file that was only found must not set: each switches a protection off.
_REFUSED_BY_DEFAULT = (POLICY_OVERRIDE_VARIABLE, BOOLEAN_ENVIRONMENT["allow_insecure_http"])

_Path = Union[str, "os.PathLike[str]"]


# -- reading ----------------------------------------------------------------------------------------------------------


def read(path: _Path) -> EnvFile:
    """Return the variables of the file that the user named.

    :raises ConfigurationError: it is missing, cannot be trusted, or a line is malformed.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigurationError(f"must be a path, got {path!r}", "env_file")
    name = os.fspath(path)
    problem = ""
    try:
        return _read(name)
    except FileNotFoundError:
        problem = f"there is no file {name!r}"
    except OSError as error:
        problem = f"cannot read {name!r}: {error.strerror or type(error).__name__}"
    raise ConfigurationError(problem, "env_file")


def find() -> Optional[EnvFile]:
    """Return the variables of ``.env`` in the current directory, or None if there is none with such a line.

    What is not a regular file, such as a virtual environment of that name, counts as none.

    :raises ConfigurationError: it cannot be trusted, a line is malformed, or it sets what only a file that the user
        names may set.
    """
    if not _mentions_us(DEFAULT_NAME):
        return None
    problem = ""
    found: Optional[EnvFile] = None
    try:
        found = _read(DEFAULT_NAME)
    except OSError as error:
        problem = f"cannot read {DEFAULT_NAME!r}: {error.strerror or type(error).__name__}"
    if found is None:
        raise ConfigurationError(problem, "env_file")
    _check_found(found)
    return found


def _mentions_us(path: str) -> bool:
    """Return True if the file holds the prefix of our variables. Nothing in it is used."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        with open(descriptor, "rb") as file:
            return _PREFIX.encode() in file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return False
    except OSError:
        # The reading itself says what is wrong.
        return True


def _read(path: str) -> EnvFile:
    with _GUARD.open(path) as file:
        data = file.read(_MOST_BYTES + 1)
    problem = ""
    text = ""
    if len(data) > _MOST_BYTES:
        problem = "is larger than 1 MiB"
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            problem = "is not UTF-8 text"
    if problem:
        raise ConfigurationError(f"{path!r} {problem}; name another file", "env_file")
    found = parse(text, path)
    elsewhere = [name for name in found if name in os.environ]
    return EnvFile(path, {name: value for name, value in found.items() if name not in elsewhere}, elsewhere)


def parse(text: str, path: str) -> Dict[str, str]:
    """Return the ``SEKUIRE_...`` variables in the text of a file. Lines of other names are skipped unread.

    :raises ConfigurationError: a line is malformed. The error names file and line, and shows no value.
    """
    found: Dict[str, Tuple[int, str]] = {}
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        rest = line.strip()
        if re.match(r"export[ \t]", rest):
            rest = rest[len("export") :].lstrip()
        if not rest.startswith(_PREFIX):
            continue
        name, separator, value = rest.partition("=")
        problem = _name_problem(name, separator)
        if not problem and name in found:
            problem = f"{name} is set in line {found[name][0]} already; keep one of them"
        if not problem:
            value, problem = _value(value)
            problem = problem and f"{name}: {problem}"
        if problem:
            raise ConfigurationError(f"{path}, line {number}: {problem}", "env_file")
        found[name] = number, value
    return {name: value for name, (_, value) in found.items() if value}


def _name_problem(name: str, separator: str) -> str:
    if not separator:
        return "must be NAME=VALUE"
    if name.endswith((" ", "\t")):
        return f"remove the space before the = of {name.strip()[:80]}"
    if not _NAME.match(name):
        return f"{name[:80]!r} is not the name of a variable; it has capital letters, digits and _"
    return f"{name} is set by the library itself; remove the line" if name in OWN_VARIABLES else ""


def _value(text: str) -> Tuple[str, str]:
    """Return a value without quotes and comment, and what is wrong with it."""
    if text[:1] in (" ", "\t"):
        return ("", "") if not text.strip() or text.lstrip().startswith("#") else ("", "remove the space after the =")
    quote = text[:1]
    rest = ""
    problem = ""
    if quote == "'":
        value, closing, rest = text[1:].partition("'")
        problem = "" if closing else "the ' is not closed on this line"
    elif quote == '"':
        match = re.match(r'"((?:[^"\\]|\\.)*)"(.*)\Z', text)
        value, rest = match.groups() if match else ("", "")
        problem = _literal_problem(value) if match else 'the " is not closed on this line'
        value = _ESCAPED.sub(r"\1", value)
    else:
        value = re.split(r"[ \t]#", text, maxsplit=1)[0].rstrip()
        problem = _plain_problem(value)
    if not problem and rest.strip() and not re.match(r"[ \t]+#", rest):
        problem = "there is text after the closing quote; a comment begins with a space and a #"
    if not problem and not value.isprintable():
        problem = "the value holds a control character"
    return value, problem


def _plain_problem(value: str) -> str:
    if any(character.isspace() for character in value):
        return "put a value with spaces in quotes"
    if any(character in "'\"`\\" for character in value):
        return "put a value with a quote or a backslash in quotes as a whole"
    return _literal_problem(value)


def _literal_problem(value: str) -> str:
    """Return what is wrong with a value that a shell would not take as it is."""
    return "a $ is not replaced here; put the value in '...'" if re.search(r"(?<!\\)(?:\\\\)*\$", value) else ""


def format_line(name: str, value: str) -> str:
    """Return a line that sets ``name``, as this module and a POSIX shell read it."""
    if _PLAIN.match(value):
        return f"{name}={value}"
    if "'" not in value:
        return f"{name}='{value}'"
    escaped = re.sub(r'(["\\$`])', r"\\\1", value)
    return f'{name}="{escaped}"'


# -- what may be combined ---------------------------------------------------------------------------------------------


def _check_found(found: EnvFile) -> None:
    """Check what a file that the user did not name may set.

    :raises ConfigurationError: it sets more.
    """
    for name in _REFUSED_BY_DEFAULT:
        if name in found.values:
            raise ConfigurationError(
                f"{found.path} sets {name}, which a file that was only found must not; set it in the environment, or "
                f"name the file: --env-file {found.path}",
                "env_file",
            )
    if _URL in found.values and not _is_of_this_machine(found.values[_URL]):
        raise ConfigurationError(
            f"{found.path} sets {_URL} to another machine, and a file that was only found may name this machine only; "
            f"set {_URL} in the environment, or name the file: --env-file {found.path}",
            "env_file",
        )


def _is_of_this_machine(url: str) -> bool:
    # What is not a URL is reported where it is used.
    if "\\" in url or not url.isascii() or not url.isprintable():
        return False
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


def check_credentials(found: EnvFile, elsewhere: Mapping[str, Any], stored: Optional[_Path] = None) -> None:
    """Check that no credential from elsewhere goes to the address that the file names.

    A stored file that grew from the credentials in this file is not elsewhere.

    :param elsewhere: where a credential was given, such as ``"--api-key-file"`` → the credential or None.
    :param stored: the path of the credentials file, if one is used.
    :raises ConfigurationError: one would.
    """
    if _URL not in found.values:
        return
    sources = [
        f"the environment ({ENVIRONMENT[option]})" for option in CREDENTIALS if os.environ.get(ENVIRONMENT[option])
        and ENVIRONMENT[option] not in found.values
    ]  # fmt: skip
    sources += [source for source, value in elsewhere.items() if value is not None]
    if not sources and stored is not None and not _grew_from(found, os.fspath(stored)):
        sources = [f"the file {os.fspath(stored)!r} ({CREDENTIALS_FILE_VARIABLE})"]
    if sources:
        raise ConfigurationError(
            f"{found.path} names the platform, and a credential comes from {sources[0]}: a file must not decide where "
            f"other credentials go; set {_URL} in the environment too, or take both from one place",
            "env_file",
        )


def _grew_from(found: EnvFile, path: str) -> bool:
    """Return True if the credentials file is empty, or holds what a login with this file's own credentials brought."""
    from .credentials.file import CredentialsFile
    from .credentials.store import mark_of

    file = None
    with contextlib.suppress(ConfigurationError):
        # Its problem is reported where it is opened for use.
        file = CredentialsFile(path).load()
    if file is None:
        return True
    given = {option: found.values.get(ENVIRONMENT[option]) for option in CREDENTIALS}
    installation_id = variable(ENVIRONMENT["installation_id"])
    mark = mark_of(given["install_token"], given["runtime_token"], installation_id, given["refresh_token"])
    return mark is not None and mark in file.seeds


@contextlib.contextmanager
def in_environment(found: EnvFile) -> Iterator[None]:
    """Set the file's variables in this process's environment, for what the process starts and imports."""
    os.environ.update(found.values)
    try:
        yield
    finally:
        for name, value in found.values.items():
            if os.environ.get(name) == value:
                del os.environ[name]
