"""Register what a worker runs: handlers, middleware, resources and callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Optional, TypeVar, Union, overload

from ..errors import ConfigurationError
from ..handlers.invoke import Middleware
from ..handlers.registry import TaskRegistry
from ..wire.models import Command
from .announcer import Announcer

if TYPE_CHECKING:
    from ..handlers.invoke import DeclaredHandler

_H = TypeVar("_H", bound="DeclaredHandler")
_M = TypeVar("_M", bound=Middleware)
_R = TypeVar("_R", bound=Callable[..., Any])
CommandCallback = Callable[[Command], object]
_C = TypeVar("_C", bound=CommandCallback)


class Registration:
    """Hold what a user registers before the start. A :class:`~sekuire.Worker` is one. ::

    @worker.on_task("greet")
    def greet(ctx, input):
        return "Hello, " + input["name"]

    """

    #: The handlers, their middleware and their resources.
    handlers: TaskRegistry
    _announcer: Announcer

    @overload
    def on_task(
        self, name: str, handler: _H, *, timeout: Optional[float] = None, max_concurrency: Optional[int] = None
    ) -> _H: ...

    @overload
    def on_task(
        self, name: str, handler: None = None, *, timeout: Optional[float] = None, max_concurrency: Optional[int] = None
    ) -> Callable[[_H], _H]: ...

    def on_task(
        self,
        name: str,
        handler: Optional[_H] = None,
        *,
        timeout: Optional[float] = None,
        max_concurrency: Optional[int] = None,
    ) -> Union[_H, Callable[[_H], _H]]:
        """Register ``handler(ctx, input)`` for a capability: ``@worker.on_task("x")`` or ``on_task("x", handler)``.

        :param name: the capability, or ``"*"`` for each one that has no handler.
        :param timeout: seconds its run may take.
        :param max_concurrency: how many of its runs may go on at once.
        :raises ConfigurationError: an argument is wrong, the name is in use, or the worker has started.
        """
        if handler is None:
            return self.handlers.task(name, timeout=timeout, max_concurrency=max_concurrency)
        return self.handlers.task(name, handler, timeout=timeout, max_concurrency=max_concurrency)

    def include(self, registry: TaskRegistry) -> None:
        """Add every handler of ``registry``, with its middleware around them. This freezes the registry.

        :raises ConfigurationError: a name is in use (both places are named, and nothing is added), or the worker has
            started.
        """
        self.handlers.include(registry)

    def middleware(self, function: _M) -> _M:
        """Put ``function(ctx, input, call_next)`` around every handler of this worker; also ``@worker.middleware``.

        It runs in the handler's thread, within the task's time, after the lease and the policy have allowed the task.
        The first one registered is outermost. Middleware of included registries is inside.

        ``call_next(input)`` runs what is inside, once, and returns its output (of an async handler, the awaited one) or
        raises its error. The middleware's own output or error takes the place of that. Without a call of ``call_next``
        the handler does not run.

        :raises ConfigurationError: the function cannot be called so, is async, or the worker has started.
        """
        return self.handlers.middleware(function)

    @overload
    def resource(self, function: _R, *, name: Optional[str] = None, scope: str = "worker") -> _R: ...

    @overload
    def resource(
        self, function: None = None, *, name: Optional[str] = None, scope: str = "worker"
    ) -> Callable[[_R], _R]: ...

    def resource(
        self, function: Optional[_R] = None, *, name: Optional[str] = None, scope: str = "worker"
    ) -> Union[_R, Callable[[_R], _R]]:
        """Declare what handlers share: ``@worker.resource`` on a generator function that yields one value.

        A handler receives it as a keyword-only parameter, ``def book(ctx, input, *, db)``. See
        :meth:`TaskRegistry.resource`.

        :param name: its name, if not that of the function.
        :param scope: how long the value lives: ``"worker"``, ``"process"`` (of a pool) or ``"task"``.
        """
        if function is None:
            return self.handlers.resource(name=name, scope=scope)
        return self.handlers.resource(function, name=name, scope=scope)

    def on_command(self, callback: _C) -> _C:
        """Call ``callback(command)`` after each command took effect: in order, on a thread for callbacks only.

        A revocation of the installation comes as a ``terminate`` with its reason. If a command was lost and the
        platform's desired state repeats it, it comes without ``command_id``.
        """
        if not callable(callback):
            raise ConfigurationError(f"must be callable, got {type(callback).__name__}", "on_command")
        self._announcer.add_callback(callback)
        return callback
