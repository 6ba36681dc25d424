"""Raise the library's errors from one frame."""

from __future__ import annotations

import functools
from typing import Any, Callable, TypeVar, cast

from ..errors import SekuireError

_Function = TypeVar("_Function", bound=Callable[..., Any])


def raises_here(function: _Function) -> _Function:
    """Return ``function`` so that a traceback of its errors has the caller's line and one of the library's.

    That is for a :class:`SekuireError`, whose text says what to do, and for Ctrl-C. The library's own frames below
    would say nothing to the user. ::

        @raises_here
        def start(self) -> None: ...
    """

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except (SekuireError, KeyboardInterrupt) as error:
            found = error.with_traceback(None)
            found.__context__ = found.__cause__ = None
        raise found

    # A traceback names the frame by its code.
    named: Any = call
    named.__code__ = named.__code__.replace(co_name=function.__name__)
    return cast(_Function, named)
