"""Hide tokens and keys on their way from the user to a request's header."""

from __future__ import annotations

import functools
import hmac
import itertools
import weakref
from typing import Any, Callable, Dict, List, Mapping, NoReturn, Optional, Type, TypeVar, Union, cast
from urllib.parse import unquote

from .errors import ConfigurationError

__all__ = [
    "HiddenUrls",
    "Secret",
    "as_secret",
    "check_secret",
    "discreet",
    "discreet_class",
    "hide",
    "living",
    "to_secret",
    "without_frames",
]

_F = TypeVar("_F", bound=Callable[..., Any])
_C = TypeVar("_C", bound=Type[Any])
_E = TypeVar("_E", bound=BaseException)

_MASK = "Secret('***')"

# Threads: any thread makes secrets. There is no lock: each operation on `_living` is one step of a dict, and no number
# is used twice.
_living: Dict[int, weakref.ref[Secret]] = {}
_numbers = itertools.count(1)
#: After so many new secrets, those that are gone are forgotten.
_ROUND = 256


def without_frames(error: _E) -> _E:
    """Return ``error`` without its traceback, cause and context, whose frames may hold plain tokens."""
    error.__cause__ = error.__context__ = None
    error.__traceback__ = None
    return error


def discreet(function: _F) -> _F:
    """Return ``function``, whose errors do not show what it was called with: plain tokens may be among it."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except Exception as error:  # noqa: BLE001
            found = without_frames(error)
        # This frame is the only one of the library's in the error.
        del args
        options.clear()
        raise found

    return cast(_F, call)


def discreet_class(cls: _C) -> _C:
    """Make the constructor of ``cls`` :func:`discreet`."""
    cls.__init__ = discreet(cls.__init__)
    return cls


class Secret:
    """Hide a token or key. Only :meth:`reveal` returns its text. ::

        token = Secret("skt_runtime_example")
        print(token)  # Secret('***')
        headers = {"Authorization": f"Bearer {token.reveal()}"}

    A Secret is not a str. ``repr``, ``str`` and ``format`` show a mask, and it cannot be pickled or written as JSON.
    ``==`` compares it with a Secret or a str, and takes the same time whatever differs. Its hash is that of its text.
    The text must be visible ASCII without whitespace, because HTTP libraries quote a header that they refuse.

    :raises ConfigurationError: the text is empty, or holds anything but visible ASCII.
    """

    __slots__ = ("__text", "__weakref__")

    @discreet
    def __init__(self, text: str) -> None:
        problem = _problem(text)
        if problem:
            raise ConfigurationError(problem)
        _fill(self, text)

    def reveal(self) -> str:
        """Return the text. Call it only where a header or a body is built."""
        return self.__text  # type: ignore[attr-defined, no-any-return]

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a Secret cannot be changed")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a Secret cannot be changed")

    def __init_subclass__(cls, **kwargs: Any) -> NoReturn:
        raise TypeError("Secret cannot be subclassed")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Secret):
            text = other.reveal()
        elif isinstance(other, str):
            text = other
        else:
            return NotImplemented
        # The user's text may hold a lone surrogate, which has no UTF-8 form.
        return hmac.compare_digest(_bytes_of(self), text.encode("utf-8", "surrogatepass"))

    def __hash__(self) -> int:
        return hash(self.reveal())

    def __repr__(self) -> str:
        return _MASK

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return _MASK

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Secret cannot be pickled; persist credentials with a RuntimeCredentialsStore(path=...)")


def hide(text: str) -> Secret:
    """Return any text as a Secret, also one that could not stand in a header, such as a URL with a password."""
    secret = object.__new__(Secret)
    _fill(secret, text)
    return secret


class HiddenUrls:
    """Hide the URLs of proxies, which may hold passwords. ``urls[name]`` and ``dict(urls)`` show them. ::

        proxies = HiddenUrls({"https": "http://user:password@proxy.example:3128"})
        print(proxies)  # HiddenUrls(https)

    It is not a Mapping, because tools that report errors show what is in each Mapping.
    """

    __slots__ = ("__parts", "__urls")

    def __init__(self, urls: Mapping[str, str]) -> None:
        self.__urls = {name: hide(url) for name, url in urls.items()}
        # Each is found in texts by its own.
        self.__parts = [part for url in urls.values() for part in _parts_of(url)]

    def keys(self) -> List[str]:
        return list(self.__urls)

    def __getitem__(self, name: str) -> str:
        return self.__urls[name].reveal()

    def __len__(self) -> int:
        return len(self.__urls)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (HiddenUrls, Mapping)):
            return NotImplemented
        return dict(self) == dict(other)

    def __hash__(self) -> int:
        return hash(frozenset(self.__urls))

    def __repr__(self) -> str:
        return f"HiddenUrls({', '.join(self.__urls)})"


def living() -> List[Secret]:
    """Return the secrets of this process that are not gone, whoever made them."""
    found = [reference() for reference in _living.copy().values()]
    return [secret for secret in found if secret is not None]


@discreet
def as_secret(value: Union[str, Secret], option: str) -> Secret:
    """Return ``value`` as a :class:`Secret`.

    :raises ConfigurationError: the value cannot be one. The error names ``option`` and does not quote the value.
    """
    secret = to_secret(value)
    if isinstance(secret, _Unusable):
        raise ConfigurationError(secret.problem, option)
    if secret is None:
        raise ConfigurationError(_problem(None), option)
    return secret


class _Unusable:
    """Stand for a value that cannot be a Secret, in an object that is not whole. It does not hold the value."""

    __slots__ = ("problem",)

    def __init__(self, problem: str) -> None:
        self.problem = problem


def to_secret(value: Union[str, Secret, _Unusable, None]) -> Optional[Secret]:
    """Convert the value of an attrs field. What cannot be a Secret is left to :func:`check_secret`."""
    if value is None or isinstance(value, (Secret, _Unusable)):
        return cast(Optional[Secret], value)
    problem = _problem(value)
    return cast(Secret, _Unusable(problem)) if problem else Secret(value)


def check_secret(instance: object, attribute: Any, value: Any) -> None:
    """Raise ConfigurationError, naming the attrs field, if its value is neither a Secret nor None."""
    if isinstance(value, _Unusable):
        raise ConfigurationError(value.problem, attribute.name)


def _fill(secret: Secret, text: str) -> None:
    object.__setattr__(secret, "_Secret__text", text)
    number = next(_numbers)
    _living[number] = weakref.ref(secret)
    if number % _ROUND == 0:
        for old, reference in _living.copy().items():
            if reference() is None:
                _living.pop(old, None)


def _parts_of(url: str) -> List[Secret]:
    """Return the secrets within a URL: its password, and its user with the password, as HTTP's Basic encodes them."""
    userinfo, at, _ = url.rpartition("@")
    user, _, password = userinfo.rpartition("//")[2].partition(":")
    if not at or not password:
        return []
    texts = {password, unquote(password), f"{user}:{password}", f"{unquote(user)}:{unquote(password)}"}
    # Short ones may be plain words.
    return [hide(text) for text in texts if len(text) >= 8]


def _bytes_of(secret: Secret) -> bytes:
    # What hide() was given may hold lone surrogates: the environment's bytes that are not UTF-8.
    return secret.reveal().encode("utf-8", "surrogatepass")


def _problem(text: object) -> str:
    if not isinstance(text, str):
        return f"must be a str, got {type(text).__name__}"
    if not text:
        return "is empty"
    if text != text.strip():
        return "begins or ends with whitespace (a newline read from a file?); strip it"
    if not all("!" <= character <= "~" for character in text):
        return "holds whitespace or characters outside visible ASCII; check that it was copied whole"
    return ""
