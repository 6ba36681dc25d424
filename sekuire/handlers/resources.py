"""Open what handlers share, such as a pool of connections, pass it to them, and close it in order.

A resource is a generator function that yields one value. What stands after the ``yield`` closes it. Its scope says how
long the value lives: as long as the worker, as a process of a pool, or as one task.
"""

# Threads: one thread fills `declared`, before a worker starts. An Opened of the worker's scope is filled by start() and
# only read from then on. One of a task belongs to the handler's thread, which opens and closes; other threads of the
# handler may read. One of a process belongs to the thread that runs the calls of that process.

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from typing import Any, Callable, Dict, Generator, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import attrs

from .._internal.logs import get_logger
from ..errors import ConfigurationError
from .context import TaskContext, control_of
from .invoke import Handler, call, keywords_of, where

__all__ = ["Injection", "Opened", "Resource", "needs_of", "plan_of", "resource_of"]

log = get_logger("sekuire.resources")

#: A generator function that yields one value. Its keyword-only parameters receive other resources.
ResourceFunction = Callable[..., Any]

WORKER, PROCESS, TASK = SCOPES = ("worker", "process", "task")
#: A resource may receive those that live at least as long as it does.
_OUTLIVING = {WORKER: (WORKER,), PROCESS: (PROCESS,), TASK: SCOPES}
_REFUSED_SCOPE = "must be 'worker', 'process' or 'task', got "


@attrs.frozen(eq=False)
class Resource:
    """Keep one declared resource. It can be pickled if its function can."""

    name: str
    function: ResourceFunction
    scope: str
    #: The place of the function, for errors.
    where: str
    #: The resources that it receives. :func:`plan_of` finds them.
    needs: Tuple[str, ...] = ()


def resource_of(option: str, function: Any, name: Optional[str], scope: Any) -> Resource:
    """Return what ``@….resource`` declares.

    :raises ConfigurationError: ``function`` is not a generator function, or ``scope`` is not a scope.
    """
    if scope not in SCOPES:
        raise ConfigurationError(f"scope {_REFUSED_SCOPE}{scope!r}", option)
    if not callable(function):
        raise ConfigurationError(f"must be a generator function, got {type(function).__name__}", option)
    if inspect.isasyncgenfunction(function):
        raise ConfigurationError(
            f"{where(function)} is an async generator function; a resource is a plain one: it is opened and closed "
            "outside of the loop of any handler",
            option,
        )
    if not inspect.isgeneratorfunction(function):
        inner = inspect.isgeneratorfunction(inspect.unwrap(function))
        hint = "take its decorator, such as @contextmanager, away" if inner else "yield the value, close it after that"
        raise ConfigurationError(f"{where(function)} is not a generator function; {hint}", option)
    given = getattr(function, "__name__", None) if name is None else name
    if not isinstance(given, str) or not given.isidentifier():
        raise ConfigurationError(
            f"{given!r} cannot name a resource: a handler's parameter must have the same name", option
        )
    return Resource(given, function, scope, where(function))


# -- checking ---------------------------------------------------------------------------------------------------------


def plan_of(
    declared: Iterable[Resource],
    *,
    has_processes: bool = False,
    values: Optional[Mapping[str, Any]] = None,
    roots: Optional[Iterable[str]] = None,
) -> Dict[str, Resource]:
    """Return resources by name, each after those that it receives.

    :param has_processes: handlers run in processes of a pool, which can keep resources.
    :param values: values that replace resources of the same names.
    :param roots: the names whose resources are checked, with those that they receive. None: all are.
    :raises ConfigurationError: two have one name, one receives what it cannot, they need each other, or there are no
        processes for one of the scope ``"process"``.
    """
    by_name: Dict[str, Resource] = {}
    for one in declared:
        option = f"resource({one.name!r})"
        taken = by_name.setdefault(one.name, one)
        if taken is not one:
            raise ConfigurationError(f"is taken by {taken.where}; cannot give it to {one.where} too", option)
        if one.scope == PROCESS and not has_processes:
            raise ConfigurationError(
                f"{one.where} has the scope 'process', and this worker has no pool of processes; give "
                "executor=ProcessExecutor(...), or use the scope 'worker' or 'task'",
                option,
            )
    planner = _Planner(by_name, values or {})
    for name in by_name if roots is None else roots:
        planner.place(name)
    for name in by_name:
        with contextlib.suppress(ConfigurationError):
            planner.place(name)
    return planner.ordered


class _Planner:
    """Put resources into an order in which they can be opened."""

    def __init__(self, by_name: Mapping[str, Resource], values: Mapping[str, Any]) -> None:
        self.ordered: Dict[str, Resource] = {}
        self._by_name = by_name
        self._values = values
        self._known = {**by_name, **values}
        self._chain: List[Resource] = []

    def place(self, name: str) -> None:
        """Put a resource into ``ordered``, after those that it receives."""
        if name in self.ordered or name in self._values:
            return
        resource = self._by_name[name]
        option = f"resource({name!r})"
        if resource in self._chain:
            cycle = [*self._chain[self._chain.index(resource) :], resource]
            raise ConfigurationError("needs itself: " + " needs ".join(one.where for one in cycle), option)
        _check_shape(option, resource)
        needs = needs_of(option, resource.function, self._known)
        self._chain.append(resource)
        try:
            for inner in needs:
                self._place_inner(option, resource, inner)
        finally:
            self._chain.pop()
        self.ordered[name] = attrs.evolve(resource, needs=needs)

    def _place_inner(self, option: str, resource: Resource, name: str) -> None:
        self.place(name)
        inner = self.ordered.get(name)
        if inner is not None and inner.scope not in _OUTLIVING[resource.scope]:
            raise ConfigurationError(
                f"{resource.where} has the scope {resource.scope!r} and receives {name!r}, {inner.where}, of the scope "
                f"{inner.scope!r}, which ends earlier or is in another process",
                option,
            )


def _check_shape(option: str, resource: Resource) -> None:
    positional = [
        one.name
        for one in inspect.signature(resource.function).parameters.values()
        if one.kind not in (one.KEYWORD_ONLY, one.VAR_KEYWORD)
    ]
    if positional:
        name = resource.function.__name__
        raise ConfigurationError(
            f"{resource.where} has the positional parameter {positional[0]!r}; a resource receives other resources by "
            f"keyword only; write: def {name}(*, {', '.join(positional)}):",
            option,
        )


def needs_of(option: str, function: Any, known: Mapping[str, Any]) -> Tuple[str, ...]:
    """Return the resources that ``function`` receives.

    :raises ConfigurationError: it asks for one that is not ``known``.
    """
    needed = keywords_of(function)
    for name, is_required in needed.items():
        if is_required and name not in known:
            raise ConfigurationError(f"{where(function)} asks for {name!r}, and {_unknown(name, known)}", option)
    return tuple(name for name in needed if name in known)


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    import difflib  # Only for an error.

    close = difflib.get_close_matches(name, list(known), n=1)
    if close:
        found = known[close[0]]
        at = f", {found.where}" if isinstance(found, Resource) else ""
        return f"there is no such resource; did you mean {close[0]!r}{at}?"
    names = ", ".join(map(repr, known)) or "none"
    return f"there is no such resource ({names}); declare it: @….resource above def {name}():"


# -- opening and closing ----------------------------------------------------------------------------------------------


class Opened:
    """Hold the open resources of one scope. Open them when they are asked for, and close them in reverse order.

    :param plan: all resources of the worker, by name.
    :param scopes: the scopes that are opened here.
    :param outer: the open resources that outlive these, if there are any.
    :param values: values that stand for resources, which are then not opened.
    """

    __slots__ = ("_is_closed", "_outer", "_scopes", "_stack", "_thread", "_values", "plan")

    def __init__(
        self,
        plan: Mapping[str, Resource],
        scopes: Sequence[str],
        outer: Optional[Opened] = None,
        values: Optional[Mapping[str, Any]] = None,
    ) -> None:
        self.plan = plan
        self._scopes = scopes
        self._outer = outer
        self._values: Dict[str, Any] = dict(values or ())
        self._stack: List[Tuple[Resource, Generator[Any, None, None]]] = []
        self._thread = threading.get_ident()
        self._is_closed = False

    def has_opened(self) -> bool:
        """Return True if something is open here."""
        return bool(self._stack)

    def get(self, name: str) -> Any:
        """Return the value of a resource. Open it if it is not open.

        :raises ConfigurationError: there is no such resource here.
        """
        if name in self._values:
            return self._values[name]
        resource = self.plan.get(name)
        if resource is None:
            raise ConfigurationError(_unknown(name, {**self.plan, **self._values}), f"resource({name!r})")
        if resource.scope in self._scopes:
            return self.open(resource)
        if self._outer is None:
            raise ConfigurationError(
                f"{resource.where} has the scope {resource.scope!r}, and the handler runs in another process; use the "
                "scope 'process' or 'task'",
                f"resource({name!r})",
            )
        return self._outer.get(name)

    def open(self, resource: Resource) -> Any:
        """Open a resource and return its value. What its function raises is raised."""
        option = f"resource({resource.name!r})"
        if self._is_closed:
            raise ConfigurationError("is closed already: what uses it has ended", option)
        if threading.get_ident() != self._thread:
            raise ConfigurationError(
                "is opened and closed in the handler's own thread; ask for it there first, or receive it as a "
                "keyword-only parameter",
                option,
            )
        generator = resource.function(**{name: self.get(name) for name in resource.needs})
        try:
            value = next(generator)
        except StopIteration:
            value = generator
        if value is generator:
            raise ConfigurationError(f"{resource.where} has ended without a yield; yield the value once", option)
        self._stack.append((resource, generator))
        self._values[resource.name] = value
        return value

    def close(self, error: Optional[BaseException] = None) -> Optional[BaseException]:
        """Close what is open, the last one first. Return the first error of a resource, if ``error`` is None.

        :param error: what the handler has raised. Resources of a task get it at their ``yield``.
        """
        self._is_closed = True
        failed: Optional[BaseException] = None
        while self._stack:
            resource, generator = self._stack.pop()
            self._values.pop(resource.name, None)
            cause = error or failed
            try:
                _close(resource, generator, cause if resource.scope == TASK else None)
            except BaseException as raised:  # Whatever it is, the others must be closed.
                if cause is None:
                    failed = raised
                    continue
                log.warning(
                    "closing the resource %r failed too: %s", resource.name, type(raised).__name__, exc_info=raised
                )
        return failed


def _close(resource: Resource, generator: Generator[Any, None, None], error: Optional[BaseException]) -> None:
    """Let a generator run to its end, with ``error`` at its ``yield`` if there is one."""
    if error is None:
        try:
            next(generator)
        except StopIteration:
            return
    else:
        traceback = error.__traceback__
        try:
            generator.throw(error)
        except StopIteration:
            return
        except BaseException as raised:
            # A StopIteration of the handler comes back inside a RuntimeError.
            if raised is error or raised.__cause__ is error:
                return
            raise
        finally:
            # Without the frames of the generators: the handler's failure is logged with it.
            error.__traceback__ = traceback
    generator.close()
    raise RuntimeError(f"{resource.where} has yielded twice; a resource yields one value")


# -- around a handler -------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Injection:
    """Keep what one handler receives. It can be pickled, for handlers in other processes.

    :param names: the resources that are keyword-only parameters of the handler.
    :param plan: all resources that it may ask for.
    """

    names: Tuple[str, ...]
    plan: Mapping[str, Resource]

    def for_process(self, option: str, function: Handler) -> Injection:
        """Return what goes to another process, where no resource of the worker can be.

        :raises ConfigurationError: ``function`` receives one, or one that receives one.
        """
        for name in self.names:
            for one in self._behind(name):
                if one.scope == WORKER:
                    raise ConfigurationError(
                        f"{where(function)} runs in another process and receives {one.name!r}, {one.where}, of the "
                        "scope 'worker'; use the scope 'process' or 'task'",
                        option,
                    )
        # The functions of those need not be picklable.
        plan = {
            name: attrs.evolve(one, function=_stay, needs=()) if one.scope == WORKER else one
            for name, one in self.plan.items()
        }
        return Injection(self.names, plan)

    def _behind(self, name: str) -> Iterator[Resource]:
        """Yield a resource, and all that it receives."""
        yield self.plan[name]
        for inner in self.plan[name].needs:
            yield from self._behind(inner)

    def around(self, function: Handler, outer: Optional[Opened]) -> Handler:
        """Return ``function`` with its resources passed in, and those of its task opened and closed around it."""
        return self.within(function, lambda: Opened(self.plan, (TASK,), outer))

    def around_alone(self, function: Handler, values: Mapping[str, Any]) -> Handler:
        """Return ``function`` for a test: each resource is opened for the one call, unless ``values`` replaces it."""
        return self.within(function, lambda: Opened(self.plan, SCOPES, values=values))

    def in_process(self, function: Handler) -> Handler:
        """Return ``function`` for this process, which keeps its own resources until it ends."""
        return self.around(function, _opened_here(self.plan))

    def within(self, function: Handler, make: Callable[[], Opened]) -> Handler:
        """Return ``function`` with its resources from ``make()``, which is called for each task."""
        names = self.names

        def run(context: TaskContext, input: Any) -> Any:
            opened = make()
            control_of(context).resources = opened
            try:
                values = {name: opened.get(name) for name in names}
                if opened.has_opened():
                    # Opening takes time, in which the task may have been cancelled.
                    context.raise_if_cancelled()
                output = call(functools.partial(function, **values), context, input)
            except BaseException as error:
                opened.close(error)
                raise
            failed = opened.close()
            if failed is not None:
                raise failed
            return output

        return run


def _stay() -> Any:
    """Stand for the function of a resource that stays in the worker's process."""


#: The open resources of this process, for each set of resources that handlers have brought along.
_opened: Dict[Tuple[Any, ...], Opened] = {}


def _opened_here(plan: Mapping[str, Resource]) -> Opened:
    key = tuple((one.name, one.function) for one in plan.values() if one.scope == PROCESS)
    opened = _opened.get(key)
    if opened is None:
        opened = _opened[key] = Opened(plan, (PROCESS,))
        if len(_opened) == 1:
            import multiprocessing.util

            # It runs at the end of a process that its pool ends. A killed one closes nothing.
            multiprocessing.util.Finalize(None, _close_all_here, exitpriority=10)
    return opened


def _close_all_here() -> None:
    while _opened:
        _, opened = _opened.popitem()
        failed = opened.close()
        if failed is not None:
            log.error("closing a resource of this process failed", exc_info=failed)
