"""Handlers by capability, declared by any module and merged by a worker, and the middleware around them."""

from __future__ import annotations

import inspect
import math
from collections import deque
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Tuple, TypeVar, Union, overload

from ..config import check_capability
from ..errors import ConfigurationError
from .invoke import (
    Handler,
    Middleware,
    accepts,
    asked_for,
    compose,
    input_name,
    is_async,
    structure_of,
    where,
    with_structure,
)

__all__ = ["HandlerEntry", "TaskRegistry"]

_H = TypeVar("_H", bound=Handler)
_M = TypeVar("_M", bound=Middleware)

#: Takes an option's name, for errors, and a handler; gives what runs that handler elsewhere.
Carrier = Callable[[str, Handler], Handler]

CATCH_ALL = "*"


class HandlerEntry:
    """One registered handler. ``running`` and ``parked`` are the dispatcher's, under its lock.

    ``function`` is the handler as it was registered; ``call`` is what runs it, with everything around it.
    ``structure`` builds the input that it asks for, where that is not just JSON.
    """

    __slots__ = (
        "call",
        "function",
        "layers",
        "max_concurrency",
        "name",
        "parked",
        "running",
        "structure",
        "timeout",
        "where",
    )

    def __init__(
        self,
        name: str,
        function: Handler,
        timeout: Optional[float] = None,
        max_concurrency: Optional[int] = None,
        layers: Tuple[Middleware, ...] = (),
        structure: Optional[Callable[[Any], Any]] = None,
    ) -> None:
        self.name = name
        self.function = function
        self.timeout = timeout
        self.max_concurrency = max_concurrency
        self.layers = layers
        self.structure = structure
        self.where = where(function)
        self.call = with_structure(function, structure)
        self.running = 0
        self.parked: Deque[Any] = deque()

    def has_room(self) -> bool:
        return self.max_concurrency is None or self.running < self.max_concurrency

    def within(self, layers: Tuple[Middleware, ...]) -> HandlerEntry:
        """The same handler for another registry, with ``layers`` around those that it has."""
        return HandlerEntry(
            self.name, self.function, self.timeout, self.max_concurrency, layers + self.layers, self.structure
        )


class TaskRegistry:
    """Handlers that a module declares without having a worker: ``@tasks.task("summarize")``.

    A worker takes them with :meth:`Worker.include() <sekuire.Worker.include>`; any number of workers may. A registry
    may include others. Once it is included it is frozen: a later declaration is an error, because the worker would
    never see it.

    Filled by one thread, before a worker starts; only read from then on.
    """

    def __init__(self, *, _option: str = "task") -> None:
        #: What an error calls the way by which handlers come in: the worker's own are given to ``on_task``.
        self._option = _option
        self._entries: Dict[str, HandlerEntry] = {}
        self._catch_all: Optional[HandlerEntry] = None
        self._layers: List[Middleware] = []
        self._frozen: Optional[str] = None

    # -- declaring --

    @overload
    def task(
        self, name: str, handler: _H, *, timeout: Optional[float] = None, max_concurrency: Optional[int] = None
    ) -> _H: ...

    @overload
    def task(
        self, name: str, handler: None = None, *, timeout: Optional[float] = None, max_concurrency: Optional[int] = None
    ) -> Callable[[_H], _H]: ...

    def task(
        self,
        name: str,
        handler: Optional[_H] = None,
        *,
        timeout: Optional[float] = None,
        max_concurrency: Optional[int] = None,
    ) -> Union[_H, Callable[[_H], _H]]:
        """Declare ``handler(ctx, input)`` for a capability; as ``@tasks.task("x")`` or ``tasks.task("x", f)``.

        The handler itself is returned, unchanged.

        :param name: the capability, or ``"*"`` for every one without a handler of its own.
        :param timeout: seconds its run may take.
        :param max_concurrency: how many of its runs may go on at once, in each worker.
        :raises ConfigurationError: a wrong argument, a name taken, or a registry that was included already.
        """
        if not isinstance(name, str):
            raise ConfigurationError(
                f"needs the capability's name first: @….{self._option}('summarize'), got {shown(name)}",
                self._option,
            )

        def register(function: _H) -> _H:
            self.add(name, function, timeout, max_concurrency)
            return function

        return register if handler is None else register(handler)

    def add(
        self,
        name: str,
        function: Handler,
        timeout: Optional[float] = None,
        max_concurrency: Optional[int] = None,
    ) -> None:
        """As :meth:`task`, without the decorator."""
        option = f"{self._option}({name!r})"
        self._check_open("register every handler", option)
        if name != CATCH_ALL:
            check_capability(name, self._option)
        _check(option, function, timeout, max_concurrency)
        entry = HandlerEntry(name, function, timeout, max_concurrency, structure=_structure_of(option, function))
        self._check_free(entry, option)
        self._put(entry)

    def middleware(self, function: _M) -> _M:
        """Put ``function(ctx, input, call_next)`` around every handler of this registry; also ``@tasks.middleware``.

        It runs in the handler's thread, within the task's time, after lease and policy have allowed the task. The
        first one registered is outermost. ``call_next(input)`` runs what is inside it, once, and returns the output
        (of an async handler: awaited) or raises; what the middleware returns or raises takes its place. Without a call
        of ``call_next`` the handler does not run.

        :raises ConfigurationError: it cannot be called so, is async, or the registry was included already.
        """
        option = "middleware"
        self._check_open("register every middleware", option)
        if not callable(function):
            raise ConfigurationError(f"must be callable, got {type(function).__name__}", option)
        if not accepts(function, 3):
            raise ConfigurationError(
                f"{where(function)} must accept three arguments: middleware(ctx, input, call_next)", option
            )
        if is_async(function):
            raise ConfigurationError(
                f"{where(function)} is async; a middleware is a plain function, also around async handlers", option
            )
        self._layers.append(function)
        return function

    def include(self, registry: TaskRegistry) -> None:
        """Take over every handler of ``registry``, its middleware around them, and freeze it.

        The middleware of this registry is put around that of ``registry``, whichever was registered first.

        :raises ConfigurationError: a name that is taken (both places are named; nothing is taken over then), or a
            registry that was included or started already.
        """
        option = "include"
        self._check_open("include every registry", option)
        if not isinstance(registry, TaskRegistry):
            raise ConfigurationError(f"must be a TaskRegistry, got {type(registry).__name__}", option)
        if registry is self:
            raise ConfigurationError("a registry cannot include itself", option)
        layers = tuple(registry._layers)
        entries = [entry.within(layers) for entry in registry]
        for entry in entries:
            self._check_free(entry, f"{option}(), {entry.name!r}")
        for entry in entries:
            self._put(entry)
        if registry._frozen is None:
            registry._frozen = "the registry is included already; {} before include()"

    # -- used --

    def copy(self) -> TaskRegistry:
        """One with the same handlers and middleware, not frozen; what becomes of it does not show in this one."""
        copy = TaskRegistry(_option=self._option)
        copy._layers = list(self._layers)
        for entry in self:
            copy._put(entry.within(()))
        return copy

    def freeze(self, carrier: Optional[Carrier] = None) -> None:
        """Take nothing more, and put the middleware around the handlers, once for all tasks.

        :param carrier: what makes of a handler one that runs elsewhere; None: handlers run where they are called.
        :raises ConfigurationError: a handler that cannot be carried.
        """
        layers = tuple(self._layers)
        calls = []
        for entry in self:
            if carrier is None:
                inner = with_structure(entry.function, entry.structure)
            else:
                inner = carrier(f"{self._option}({entry.name!r})", entry.function)
            calls.append((entry, compose(layers + entry.layers, inner)))
        # Only now: with a handler that cannot be carried nothing has started, and the handlers may still be changed.
        if self._frozen is None:
            self._frozen = "the worker has started; {} before start()"
        for entry, composed in calls:
            entry.call = composed

    def find(self, capability: str) -> Optional[HandlerEntry]:
        return self._entries.get(capability, self._catch_all)

    @property
    def names(self) -> List[str]:
        """The capabilities that have a handler of their own."""
        return list(self._entries)

    @property
    def has_catch_all(self) -> bool:
        return self._catch_all is not None

    def is_empty(self) -> bool:
        return not self._entries and self._catch_all is None

    def __iter__(self) -> Iterator[HandlerEntry]:
        yield from self._entries.values()
        if self._catch_all is not None:
            yield self._catch_all

    def __repr__(self) -> str:
        names = [*self._entries, *([CATCH_ALL] if self._catch_all else [])]
        return f"<TaskRegistry {', '.join(names) or 'empty'}>"

    # -- inside --

    def _check_open(self, what: str, option: str) -> None:
        if self._frozen is not None:
            raise ConfigurationError(self._frozen.format(what), option)

    def _check_free(self, entry: HandlerEntry, option: str) -> None:
        taken = self._catch_all if entry.name == CATCH_ALL else self._entries.get(entry.name)
        if taken is not None:
            raise ConfigurationError(f"is taken by {taken.where}; cannot give it to {entry.where} too", option)

    def _put(self, entry: HandlerEntry) -> None:
        if entry.name == CATCH_ALL:
            self._catch_all = entry
        else:
            self._entries[entry.name] = entry


def shown(name: Any) -> str:
    """What stands in the place of a capability's name: of a function where it is, which finds a bare decorator."""
    return where(name) if inspect.isroutine(name) else type(name).__name__


def _structure_of(option: str, function: Handler) -> Optional[Callable[[Any], Any]]:
    place = where(function)
    try:
        annotation = asked_for(function)
        place += f", parameter {input_name(function)!r}" if annotation is not None else ""
        return structure_of(annotation)
    except ConfigurationError as error:
        problem = error.problem
    raise ConfigurationError(f"{place}: {problem}", option)


def _check(option: str, function: Any, timeout: Any, max_concurrency: Any) -> None:
    if not callable(function):
        raise ConfigurationError(f"the handler must be callable, got {type(function).__name__}", option)
    if not accepts(function, 2):
        raise ConfigurationError(f"{where(function)} must accept two arguments: handler(ctx, input)", option)
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf
    ):
        raise ConfigurationError(f"timeout must be a number of seconds above 0, got {timeout!r}", option)
    if max_concurrency is not None and (
        isinstance(max_concurrency, bool) or not isinstance(max_concurrency, int) or max_concurrency < 1
    ):
        raise ConfigurationError(f"max_concurrency must be a whole number, 1 or more, got {max_concurrency!r}", option)
