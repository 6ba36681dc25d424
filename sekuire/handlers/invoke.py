"""Call a handler: within its middleware, with the input that it asks for, and in a loop if it is async."""

from __future__ import annotations

import collections.abc
import contextvars
import functools
import inspect
import types
import typing
from typing import Any, Callable, Coroutine, Dict, Mapping, MutableMapping, Optional, Sequence

from .._internal.logs import get_logger
from ..errors import ConfigurationError, TaskError
from .context import TaskContext

log = get_logger("sekuire.task")

#: A capability's ``handler(ctx, input)``. It returns the task's output. If it is async, the output is awaited.
Handler = Callable[[TaskContext, Any], Any]
#: A middleware calls it once, with an input of its choice, to run the next middleware or the handler.
CallNext = Callable[[Any], Any]
#: A function around handlers, ``middleware(ctx, input, call_next)``. It returns the output.
Middleware = Callable[[TaskContext, Any, CallNext], Any]


def call(function: Handler, context: TaskContext, input: Any) -> Any:
    """Return the handler's result. Await that of an async handler in a loop of its own."""
    result = function(context, input)
    if inspect.iscoroutine(result):
        return _await(result)
    return result


def _await(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run ``coroutine`` in a loop of its own, and set here the context variables that it has set.

    So middleware, and a log filter when the handler fails, see the same context as with a plain handler. asyncio runs a
    coroutine in a copy of the context. It accepts another context only from Python 3.11 on.
    """
    import asyncio  # Only for async handlers: it would add a quarter to the time that importing this library takes.

    inner = contextvars.copy_context()

    async def main() -> Any:
        nonlocal inner
        try:
            return await coroutine
        finally:
            inner = contextvars.copy_context()

    try:
        return asyncio.run(main())
    finally:
        for variable, value in inner.items():
            variable.set(value)


def compose(layers: Sequence[Middleware], function: Handler) -> Handler:
    """Return ``function`` with ``layers`` around it, the first of them outermost."""
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


# -- the input that a handler asks for --------------------------------------------------------------------------------

_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_PLAIN = (Any, object, Dict, Mapping, MutableMapping, *_MAPPINGS)


def asked_for(function: Handler) -> Any:
    """Return the annotation of the input of ``function``, None if the function accepts JSON as it comes.

    :raises ConfigurationError: the annotation cannot be resolved.
    """
    annotation = _annotation(function)
    if annotation in _PLAIN:
        return None
    if typing.get_origin(annotation) in _MAPPINGS:
        key, value = typing.get_args(annotation)
        if key in (str, Any) and value in (Any, object):
            return None
    return annotation


def structure_of(annotation: Any) -> Optional[Callable[[Any], Any]]:
    """Return what builds an input that is :func:`asked_for`, None if nothing is asked for.

    :raises ConfigurationError: it cannot be built, or needs an extra that is not installed.
    """
    if annotation is None:
        return None
    from . import inputs

    return inputs.structure_of(annotation)


def with_structure(function: Handler, structure: Optional[Callable[[Any], Any]]) -> Handler:
    """Return ``function`` with its input built by ``structure``. A mismatch fails the task as ``invalid_task``."""
    if structure is None:
        return function
    from .mismatch import Mismatch

    def run(context: TaskContext, input: Any) -> Any:
        try:
            built = structure(input)
        except Mismatch as error:
            mismatch = error
        else:
            return function(context, built)
        log.warning(
            "[%s] the input does not fit: %s", context.task_id, mismatch,
            extra={"task_id": context.task_id, "capability": context.capability},
        )  # fmt: skip
        raise TaskError("invalid_task", str(mismatch), details=mismatch.details())

    return run


def input_name(function: Any) -> str:
    """Return the name of the parameter that receives the input, an empty text if there is none."""
    parameter = _parameter(function)
    return "" if parameter is None else parameter.name


def _parameter(function: Any) -> Optional[inspect.Parameter]:
    """Return the second positional parameter of ``function``."""
    try:
        signature = inspect.signature(function)
        names = list(signature.bind(None, None).arguments)
    except (TypeError, ValueError):
        return None
    parameter = signature.parameters[names[-1]]
    return None if len(names) < 2 or parameter.kind is parameter.VAR_POSITIONAL else parameter


def _annotation(function: Any) -> Any:
    """Return the resolved annotation of the input, ``Any`` without one."""
    parameter = _parameter(function)
    if parameter is None or parameter.annotation is parameter.empty:
        return Any
    annotation = parameter.annotation
    # Only this annotation is resolved: the class of the context may be imported for type checkers alone.
    holder = types.SimpleNamespace(__annotations__={"input": annotation})
    try:
        return typing.get_type_hints(holder, globalns=_globals(function), include_extras=True)["input"]
    except Exception as error:  # noqa: BLE001  # The annotation is code.
        problem = f"{type(error).__name__}: {error}"
    raise ConfigurationError(
        f"the annotation {annotation!r} of {parameter.name!r} cannot be resolved ({problem}); define or import it at "
        "the top level of the handler's module, above the handler"
    )


def _globals(function: Any) -> Dict[str, Any]:
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if not inspect.isroutine(function):
        function = inspect.unwrap(type(function).__call__)
    return getattr(getattr(function, "__func__", function), "__globals__", {})


# -- what a function is -----------------------------------------------------------------------------------------------


def where(function: Any) -> str:
    """Return the name and the place of ``function``, for an error's text."""
    name = getattr(function, "__qualname__", None) or repr(function)
    code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code is not None else name


def accepts(function: Any, count: int) -> bool:
    """Return True if ``function`` accepts ``count`` positional arguments, as far as its signature says."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        return True  # A builtin without a signature cannot be checked.
    return True


def is_async(function: Any) -> bool:
    """Return True if a call of ``function`` returns a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
