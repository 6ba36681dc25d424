"""How a handler is called: its types, its middleware, and an async one awaited."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Callable, Sequence

from .context import TaskContext

#: What a capability is given: ``handler(ctx, input)``; its return, awaited where it is async, is the task's output.
Handler = Callable[[TaskContext, Any], Any]
#: What a middleware calls to go on, once: the next middleware or the handler, with an input of its choice.
CallNext = Callable[[Any], Any]
#: What is put around handlers: ``middleware(ctx, input, call_next)``; its return is the output.
Middleware = Callable[[TaskContext, Any, CallNext], Any]


def call(function: Handler, context: TaskContext, input: Any) -> Any:
    """The handler's result; that of an async one is awaited, in a loop of its own."""
    result = function(context, input)
    if inspect.iscoroutine(result):
        import asyncio  # A quarter of what importing this library would cost, for those who need it.

        return asyncio.run(result)
    return result


def compose(layers: Sequence[Middleware], function: Handler) -> Handler:
    """``function`` with ``layers`` around it, the first of them outermost."""
    if not layers:
        return function

    composed: Handler = functools.partial(call, function)
    for layer in reversed(layers):
        composed = _around(layer, composed)
    return composed


def _around(layer: Middleware, inner: Handler) -> Handler:
    def run(context: TaskContext, input: Any) -> Any:
        is_open = True

        def call_next(input: Any) -> Any:
            nonlocal is_open
            if not is_open:
                name = getattr(layer, "__qualname__", type(layer).__qualname__)
                raise RuntimeError(f"{name} called call_next a second time, or after its own end; a task runs once")
            is_open = False
            return inner(context, input)

        try:
            return layer(context, input, call_next)
        finally:
            is_open = False

    return run


def where(function: Any) -> str:
    """Where ``function`` was written, for an error's text."""
    name = getattr(function, "__qualname__", None) or repr(function)
    code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code is not None else name


def accepts(function: Any, count: int) -> bool:
    """Whether ``function`` can be called with ``count`` positional arguments, as far as its signature says."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        return True  # A builtin without a signature: nothing to check.
    return True


def is_async(function: Any) -> bool:
    """Whether a call of ``function`` gives a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
