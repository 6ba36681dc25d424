"""Hide tokens and keys on their way from the user to a request's header."""

from __future__ import annotations

import hmac
from typing import Any, NoReturn, Optional, Union

from .errors import ConfigurationError

__all__ = ["Secret", "as_secret", "check_secret", "to_secret"]

_MASK = "Secret('***')"


class Secret:
    """Hide a token or key. Only :meth:`reveal` returns its text. ::

        token = Secret("skt_runtime_example")
        print(token)  # Secret('***')
        headers = {"Authorization": f"Bearer {token.reveal()}"}

    A Secret is not a str. ``repr``, ``str`` and ``format`` show a mask, and it cannot be pickled or written as JSON.
    ``==`` takes the same time whatever differs. The text must be visible ASCII without whitespace, because HTTP
    libraries quote a header that they refuse.

    :raises ConfigurationError: the text is empty, or holds anything but visible ASCII.
    """

    __slots__ = ("__text",)

    def __init__(self, text: str) -> None:
        problem = _problem(text)
        if problem:
            raise ConfigurationError(problem)
        object.__setattr__(self, "_Secret__text", text)

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
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self.reveal().encode(), other.reveal().encode())

    def __hash__(self) -> int:
        return hash(("Secret", self.reveal()))

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


def as_secret(value: Union[str, Secret], option: str) -> Secret:
    """Return ``value`` as a :class:`Secret`.

    :raises ConfigurationError: the value cannot be one. The error names ``option`` and does not quote the value.
    """
    if isinstance(value, Secret):
        return value
    problem = _problem(value)
    if problem:
        raise ConfigurationError(problem, option)
    return Secret(value)


def to_secret(value: Union[str, Secret, None]) -> Optional[Secret]:
    """Convert the value of an attrs field. Leave what cannot be a Secret to :func:`check_secret`."""
    is_token = isinstance(value, str) and not _problem(value)
    return Secret(value) if is_token else value  # type: ignore[arg-type, return-value]


def check_secret(instance: object, attribute: Any, value: Any) -> None:
    """Raise ConfigurationError, naming the attrs field, if its value is neither a Secret nor None."""
    if value is not None:
        as_secret(value, attribute.name)


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
