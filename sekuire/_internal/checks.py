"""Check the numbers that a caller passes, and word the errors alike everywhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Union

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from typing_extensions import TypeGuard


def is_number(value: object) -> TypeGuard[Union[int, float]]:
    """Return True if ``value`` is an int or a float, and neither a bool nor NaN nor infinite."""
    # An int that is too large for a float is finite all the same.
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def is_whole(value: object) -> TypeGuard[int]:
    """Return True if ``value`` is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole(option: str, value: Any, *, least: int = 1, or_none: bool = False, subject: str = "") -> None:
    """Check that ``value`` is a whole number that is at least ``least``.

    :param or_none: None is accepted too.
    :param subject: begins the text of the error, where ``option`` is not the name of the value.
    :raises ConfigurationError: it is not.
    """
    if (value is None and or_none) or (is_whole(value) and value >= least):
        return
    raise ConfigurationError(
        f"{subject}must be a whole number, {least} or more{', or None' if or_none else ''}, got {_shown(value)}", option
    )


def check_number(
    option: str,
    value: Any,
    *,
    of: str = "seconds",
    zero: bool = False,
    most: float = math.inf,
    or_none: bool = False,
    subject: str = "",
) -> None:
    """Check that ``value`` is a number above 0 and at most ``most``.

    :param of: what it counts.
    :param zero: 0 is accepted too.
    :param or_none: None is accepted too.
    :param subject: begins the text of the error, where ``option`` is not the name of the value.
    :raises ConfigurationError: it is not.
    """
    if (value is None and or_none) or (is_number(value) and (value > 0 or (zero and value == 0)) and value <= most):
        return
    bound = ", 0 or more" if zero else " above 0"
    raise ConfigurationError(
        f"{subject}must be a number of {of}{bound}{', or None' if or_none else ''}, got {_shown(value)}", option
    )


def _shown(value: object) -> str:
    # Python refuses to write integers of more than 4,300 digits.
    if is_whole(value) and abs(value) > 2**53:
        return "one beyond 2^53"
    return repr(value)[:100]
