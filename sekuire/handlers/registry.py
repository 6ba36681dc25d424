"""Keep handlers by capability, with the middleware around them. A module declares them, a worker includes them."""

from __future__ import annotations

import inspect
from collections import deque
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Deque,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Protocol,
    Tuple,
    TypeVar,
    Union,
    overload,
)

import attrs

from .._internal.checks import check_number, check_whole
from ..config import check_capability
from ..errors import ConfigurationError
from .invoke import (
    Handler,
    Middleware,
    asked_for,
    compose,
    input_name,
    is_async,
    shape_problem,
    structure_of,
    where,
    with_structure,
)
from .resources import WORKER, Injection, Opened, Resource, needs_of, plan_of, resource_of

if TYPE_CHECKING:
    from .invoke import DeclaredHandler

__all__ = ["Carrier", "HandlerEntry", "TaskRegistry"]

_H = TypeVar("_H", bound="DeclaredHandler")
_M = TypeVar("_M", bound=Middleware)

_R = TypeVar("_R", bound=Callable[..., Any])

CATCH_ALL = "*"


class Carrier(Protocol):
    """Have handlers run elsewhere than where they are called."""

    #: True if they run in processes that can keep resources.
    has_processes: bool
    #: Values that replace resources.
    values: Optional[Mapping[str, Any]]

    def carry(self, option: str, function: Handler, injection: Optional[Injection]) -> Handler:
        """Return what runs ``function`` elsewhere, with the resources of ``injection``.

        :param option: for errors, where the handler was declared.
        :raises ConfigurationError: it cannot run there.
        """


@attrs.define(eq=False, repr=False)
class HandlerEntry:
    """Keep one registered handler. The dispatcher assigns ``running`` and ``parked``, under its lock.

    ``function`` is the handler as it was registered. ``call`` runs it with everything around it. ``structure`` builds
    its input from JSON; it is None for a handler that accepts JSON as it comes.
    """

    name: str
    function: Handler
    timeout: Optional[float] = None
    max_concurrency: Optional[int] = None
    layers: Tuple[Middleware, ...] = ()
    structure: Optional[Callable[[Any], Any]] = None
    where: str = attrs.field(init=False)
    call: Handler = attrs.field(init=False)
    running: int = attrs.field(init=False, default=0)
    parked: Deque[Any] = attrs.field(init=False, factory=deque)

    def __attrs_post_init__(self) -> None:
        self.where = where(self.function)
        self.call = with_structure(self.function, self.structure)

    def has_room(self) -> bool:
        """Return True if one more run may begin."""
        return self.max_concurrency is None or self.running < self.max_concurrency

    def within(self, layers: Tuple[Middleware, ...]) -> HandlerEntry:
        """Return the same handler for another registry, with ``layers`` around the layers that it has."""
        return attrs.evolve(self, layers=layers + self.layers)


class TaskRegistry:
    """Declare the handlers of a module, which needs no worker for it.

    >>> from sekuire import TaskContext, TaskRegistry
    >>> tasks = TaskRegistry()
    >>> @tasks.task("summarize", timeout=30.0)
    ... def summarize(ctx: TaskContext, input: dict) -> dict:
    ...     return {"summary": input["text"][:20]}
    >>> tasks
    <TaskRegistry summarize>

    Any number of workers may include a registry with :meth:`Worker.include() <sekuire.Worker.include>`, and a registry
    may include others. An included registry is frozen. A later declaration is an error, because no worker would see it.

    One thread fills a registry, before a worker starts. From then on it is only read.
    """

    def __init__(self, *, _option: str = "task") -> None:
        # The name of the method that declares a handler, for errors. A worker's own registry has "on_task".
        self._option = _option
        self._entries: Dict[str, HandlerEntry] = {}
        self._catch_all: Optional[HandlerEntry] = None
        self._layers: List[Middleware] = []
        #: The declared resources, in order.
        self.resources: List[Resource] = []
        #: The open resources of the worker's scope. None without any, and before :meth:`freeze`.
        self.opened: Optional[Opened] = None
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
        """Declare ``handler(ctx, input)`` for a capability: ``@tasks.task("x")`` or ``tasks.task("x", handler)``.

        It returns the handler, unchanged.

        :param name: the capability, or ``"*"`` for every one without a handler of its own.
        :param timeout: the most seconds that a run may last.
        :param max_concurrency: the most runs at the same time, in each worker.
        :raises ConfigurationError: a wrong argument, a name that is taken, or a registry that was included already.
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
        """Declare a handler, as :meth:`task` does, but not as a decorator."""
        option = f"{self._option}({name!r})"
        self._check_open("register every handler", option)
        if name != CATCH_ALL:
            check_capability(name, self._option)
        _check(option, function, timeout, max_concurrency)
        entry = HandlerEntry(name, function, timeout, max_concurrency, structure=_structure_of(option, function))
        self._check_free(entry, option)
        self.put(entry)

    def middleware(self, function: _M) -> _M:
        """Put ``function(ctx, input, call_next)`` around every handler of this registry; also ``@tasks.middleware``.

        It runs in the handler's thread, within the task's time, after lease and policy have allowed the task. The
        first one registered is outermost. ``call_next(input)`` runs what is inside, once. It returns the handler's
        output, awaited for an async handler, or raises the handler's error. What the middleware returns or raises
        replaces it. Without a call of ``call_next`` the handler does not run.

        :raises ConfigurationError: it cannot be called with three arguments, is async or a generator function, or the
            registry was included already.
        """
        option = "middleware"
        self._check_open("register every middleware", option)
        if not callable(function):
            raise ConfigurationError(f"must be callable, got {type(function).__name__}", option)
        problem = shape_problem(function, "middleware", ("ctx", "input", "call_next"))
        if problem:
            raise ConfigurationError(problem, option)
        if is_async(function):
            raise ConfigurationError(
                f"{where(function)} is async; a middleware is a plain function, also around async handlers", option
            )
        self._layers.append(function)
        return function

    @overload
    def resource(self, function: _R, *, name: Optional[str] = None, scope: str = "worker") -> _R: ...

    @overload
    def resource(
        self, function: None = None, *, name: Optional[str] = None, scope: str = "worker"
    ) -> Callable[[_R], _R]: ...

    def resource(
        self, function: Optional[_R] = None, *, name: Optional[str] = None, scope: str = "worker"
    ) -> Union[_R, Callable[[_R], _R]]:
        """Declare what handlers share: ``@tasks.resource`` on a generator function that yields one value.

        >>> from sekuire import TaskRegistry
        >>> tasks = TaskRegistry()
        >>> @tasks.resource
        ... def greeting():
        ...     yield "Hello"  # What follows the yield closes the resource.
        >>> @tasks.task("greet")
        ... def greet(ctx, input, *, greeting):
        ...     return f"{greeting}, {input['name']}"

        A handler, or another resource, receives it as a keyword-only parameter of its name. The worker checks all of
        them when it starts. All registries of a worker share one set of names.

        :param name: its name, if not that of the function.
        :param scope: how long the value lives: ``"worker"``, ``"process"`` (of a pool) or ``"task"``.
        :raises ConfigurationError: it is not a generator function, or the registry was included already.
        """

        def register(function: _R) -> _R:
            option = f"resource({(name or getattr(function, '__name__', ''))!r})"
            self._check_open("declare every resource", option)
            self.resources.append(resource_of(option, function, name, scope))
            return function

        return register if function is None else register(function)

    def include(self, registry: TaskRegistry) -> None:
        """Add every handler of ``registry``, with its middleware around them, and freeze that registry.

        Its resources are added too, for all handlers of this registry. The middleware of this registry goes around that
        of ``registry``, whichever was registered first.

        :raises ConfigurationError: a name that is taken (the error names both places, and nothing is added), or this
            registry was included or started already.
        """
        option = "include"
        self._check_open("include every registry", option)
        if not isinstance(registry, TaskRegistry):
            raise ConfigurationError(f"must be a TaskRegistry, got {type(registry).__name__}", option)
        if registry is self:
            raise ConfigurationError("a registry cannot include itself", option)
        entries = [entry.within(registry.layers) for entry in registry]
        for entry in entries:
            self._check_free(entry, f"{option}(), {entry.name!r}")
        for entry in entries:
            self.put(entry)
        self.resources += registry.resources
        registry.close("the registry is included already; {} before include()")

    # -- used --

    def copy_for(self, capability: str) -> TaskRegistry:
        """Return a registry with the handler of one capability, the same middleware and the same resources.

        It is not frozen, and shares nothing with this one.
        """
        copy = TaskRegistry(_option=self._option)
        copy.resources += self.resources
        for layer in self.layers:
            copy.middleware(layer)
        entry = self.find(capability)
        if entry is not None:
            copy.put(entry.within(()))
        return copy

    def close(self, reason: str) -> None:
        """Refuse later declarations with ``reason``, in which ``{}`` stands for what to do. The first reason counts."""
        if self._frozen is None:
            self._frozen = reason

    def freeze(self, carrier: Optional[Carrier] = None) -> None:
        """Refuse later declarations, and compose handlers and middleware, once for all tasks.

        :param carrier: returns what runs a handler elsewhere. None: handlers run where they are called.
        :raises ConfigurationError: a handler that cannot run elsewhere.
        """
        calls = []
        injections = self.injections(carrier)
        plan = next((one.plan for one in injections.values() if one is not None), {})
        has_own = any(one.scope == WORKER for one in plan.values()) and (carrier is None or carrier.values is None)
        opened = Opened(plan, (WORKER,)) if has_own else None
        for entry in self:
            injection = injections[entry.name]
            if carrier is not None:
                inner = carrier.carry(self._option_of(entry), entry.function, injection)
            else:
                inner = entry.function if injection is None else injection.around(entry.function, opened)
                inner = with_structure(inner, entry.structure)
            calls.append((entry, compose(self.layers + entry.layers, inner)))
        # Only now: after an error of the carrier nothing has started, and the handlers may still be changed.
        self.close("the worker has started; {} before start()")
        self.opened = opened
        for entry, composed in calls:
            entry.call = composed

    def injections(self, carrier: Optional[Carrier] = None) -> Dict[str, Optional[Injection]]:
        """Check the resources. Return what each handler receives, None for each if nothing is declared.

        :raises ConfigurationError: a name that no resource has, or that two have, resources that need each other, or
            one with a positional parameter or a scope that it cannot have.
        """
        values = None if carrier is None else carrier.values
        named = {one.name: one for one in self.resources}
        known = {**named, **(values or {})}
        needs = {entry.name: needs_of(self._option_of(entry), entry.function, known) for entry in self}
        if not known:
            return dict.fromkeys(needs)
        roots = None if values is None else [name for names in needs.values() for name in names]
        plan = plan_of(
            self.resources,
            has_processes=carrier is not None and carrier.has_processes,
            values=values,
            roots=roots,
        )
        injections = {entry.name: Injection(needs[entry.name], plan) for entry in self}
        if carrier is not None and carrier.values is None:
            for entry in self:
                injections[entry.name].for_process(self._option_of(entry), entry.function)
        return dict(injections)

    def find(self, capability: str) -> Optional[HandlerEntry]:
        """Return the handler of a capability, else the one for ``"*"``, else None."""
        return self._entries.get(capability, self._catch_all)

    @property
    def names(self) -> List[str]:
        """Return the capabilities that have a handler of their own."""
        return list(self._entries)

    @property
    def layers(self) -> Tuple[Middleware, ...]:
        """Return the middleware of this registry, the outermost first."""
        return tuple(self._layers)

    @property
    def has_catch_all(self) -> bool:
        """Return True if ``"*"`` has a handler."""
        return self._catch_all is not None

    def is_empty(self) -> bool:
        """Return True if no handler is declared."""
        return not self._entries and self._catch_all is None

    def __iter__(self) -> Iterator[HandlerEntry]:
        yield from self._entries.values()
        if self._catch_all is not None:
            yield self._catch_all

    def __repr__(self) -> str:
        names = [*self._entries, *([CATCH_ALL] if self._catch_all else [])]
        return f"<TaskRegistry {', '.join(names) or 'empty'}>"

    # -- inside --

    def _option_of(self, entry: HandlerEntry) -> str:
        return f"{self._option}({entry.name!r})"

    def _check_open(self, what: str, option: str) -> None:
        if self._frozen is not None:
            raise ConfigurationError(self._frozen.format(what), option)

    def _check_free(self, entry: HandlerEntry, option: str) -> None:
        taken = self._catch_all if entry.name == CATCH_ALL else self._entries.get(entry.name)
        if taken is not None:
            raise ConfigurationError(f"is taken by {taken.where}; cannot give it to {entry.where} too", option)

    def put(self, entry: HandlerEntry) -> None:
        """Add a handler whose name is free."""
        if entry.name == CATCH_ALL:
            self._catch_all = entry
        else:
            self._entries[entry.name] = entry


def shown(name: Any) -> str:
    """Describe what was given instead of a capability's name: the place of a function, or a type."""
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
    problem = shape_problem(function, "handler", ("ctx", "input"))
    if problem:
        raise ConfigurationError(problem, option)
    if timeout is not None:
        check_number(option, timeout, subject="timeout ")
    if max_concurrency is not None:
        check_whole(option, max_concurrency, subject="max_concurrency ")
