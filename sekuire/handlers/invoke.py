"""Call a handler: within its middleware, with the input that it asks for, and in a loop if it is async."""

from __future__ import annotations

import collections.abc
import contextvars
import functools
import inspect
import types
import typing
from typing import TYPE_CHECKING, Any, Callable, Coroutine, Dict, Mapping, MutableMapping, Optional, Sequence

from .._internal.clock import use_real_time
from .._internal.logs import get_logger
from ..errors import ConfigurationError, TaskCancelled, TaskError
from .context import TaskContext, TaskControl, control_of

if TYPE_CHECKING:
    from typing_extensions import Concatenate

    #: A handler as it is declared: it may have keyword-only parameters too, which receive resources. A type checker
    #: cannot say that nothing else may follow.
    DeclaredHandler = Callable[Concatenate[TaskContext, Any, ...], Any]

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
        return _await(result, control_of(context))
    return result


def _await(coroutine: Coroutine[Any, Any, Any], control: TaskControl) -> Any:
    """Run ``coroutine`` in a loop of its own, and set here the context variables that it has set.

    The coroutine is cancelled when its task is. One that goes on all the same, or leaves a thread of ``to_thread()``
    behind, keeps this thread until it ends.

    So middleware, and a log filter when the handler fails, see the same context as with a plain handler. asyncio runs a
    coroutine in a copy of the context. It accepts another context only from Python 3.11 on.
    """
    import asyncio  # Only for async handlers: it would add a quarter to the time that importing this library takes.

    inner = contextvars.copy_context()

    async def main() -> Any:
        nonlocal inner
        use_real_time(asyncio.get_running_loop())
        task = asyncio.current_task()
        assert task is not None
        control.attach_loop(asyncio.get_running_loop(), task.cancel)
        try:
            return await coroutine
        finally:
            control.detach_loop()
            inner = contextvars.copy_context()

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        reason = control.reason()
        if reason is None:
            # The handler has cancelled itself.
            raise
    finally:
        for variable, value in inner.items():
            variable.set(value)
    raise TaskCancelled(reason)


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


def returned_by(function: Handler) -> Any:
    """Return the annotation of the result of ``function``, None if it has none.

    :raises ConfigurationError: the annotation cannot be resolved.
    """
    try:
        annotation = inspect.signature(function).return_annotation
    except (TypeError, ValueError):
        return None
    if annotation is inspect.Signature.empty:
        return None
    found = _resolved(function, annotation, "the result")
    return type(None) if found is None else found


def structure_of(annotation: Any) -> Optional[Callable[[Any], Any]]:
    """Return the function that builds an input that is :func:`asked_for`, None if nothing is asked for.

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
        names = list(_positional(signature).bind(None, None).arguments)
    except (TypeError, ValueError):
        return None
    parameter = signature.parameters[names[-1]]
    return None if len(names) < 2 or parameter.kind is parameter.VAR_POSITIONAL else parameter


def _annotation(function: Any) -> Any:
    """Return the resolved annotation of the input, ``Any`` without one."""
    parameter = _parameter(function)
    if parameter is None or parameter.annotation is parameter.empty:
        return Any
    return _resolved(function, parameter.annotation, repr(parameter.name))


def _resolved(function: Any, annotation: Any, what: str) -> Any:
    # Only this annotation is resolved: the class of the context may be imported for type checkers alone.
    holder = types.SimpleNamespace(__annotations__={"input": annotation})
    try:
        return typing.get_type_hints(holder, globalns=_globals(function), include_extras=True)["input"]
    except Exception as error:  # noqa: BLE001  # The annotation is code.
        problem = f"{type(error).__name__}: {error}"
    raise ConfigurationError(
        f"the annotation {annotation!r} of {what} cannot be resolved ({problem}); define or import it at the top level "
        "of the handler's module, above the handler"
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


def _positional(signature: inspect.Signature) -> inspect.Signature:
    """Return ``signature`` without the keyword-only parameters, which receive resources."""
    return signature.replace(parameters=[one for one in signature.parameters.values() if one.kind != one.KEYWORD_ONLY])


def keywords_of(function: Any) -> Dict[str, bool]:
    """Return the keyword-only parameters of ``function``, each with True if a call needs it."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {one.name: one.default is one.empty for one in parameters if one.kind is one.KEYWORD_ONLY}


def accepts(function: Any, count: int, *, has_resources: bool = False) -> bool:
    """Return True if ``function`` accepts ``count`` positional arguments, as far as its signature says.

    :param has_resources: it may have keyword-only parameters too, which receive resources.
    """
    try:
        signature = inspect.signature(function)
        (_positional(signature) if has_resources else signature).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        return True  # A builtin without a signature cannot be checked.
    return True


def is_async(function: Any) -> bool:
    """Return True if a call of ``function`` returns a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def is_generator(function: Any) -> bool:
    """Return True if a call of ``function`` returns a generator, of either kind."""
    return any(
        inspect.isgeneratorfunction(one) or inspect.isasyncgenfunction(one)
        for one in (function, type(function).__call__)
    )


def shape_problem(function: Any, kind: str, parameters: Sequence[str]) -> str:
    """Return why ``function`` cannot be called with ``parameters``, and how it should look. An empty text if it can.

    :param kind: what the function is to be: ``"handler"`` or ``"middleware"``.
    """
    if not accepts(function, len(parameters), has_resources=kind == "handler"):
        count = {2: "two", 3: "three"}[len(parameters)]
        problem = f"must accept {count} arguments: {kind}({', '.join(parameters)})"
    elif is_generator(function):
        problem = "is a generator function, and nothing reads what it yields; return the result instead"
    elif _has_context_second(function):
        problem = "takes its parameters in the wrong order; the context comes first"
    else:
        return ""
    return f"{where(function)} {problem}{_signature(function, parameters)}"


def _has_context_second(function: Any) -> bool:
    try:
        first, second = list(inspect.signature(function).parameters.values())[:2]
    except (TypeError, ValueError):
        return False
    # An input may well be named "context".
    return _is_context(second, "ctx", *(("context",) if first.name == "input" else ())) and not _is_context(
        first, "ctx", "context"
    )


def _is_context(parameter: inspect.Parameter, *names: str) -> bool:
    """Return True if a parameter is for the context, by its annotation or, if that says nothing, by its name."""
    annotation = parameter.annotation
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    name = name.rpartition(".")[2]
    if annotation is parameter.empty or name in ("Any", "object"):
        return parameter.name in names
    return name in ("TaskContext", "RemoteTaskContext")


def _signature(function: Any, parameters: Sequence[str]) -> str:
    """Return the first line that ``function`` should have, as the end of an error's text."""
    name = getattr(function, "__name__", "")
    if not name.isidentifier():  # A lambda, or an object with __call__.
        return ""
    kind = "async def" if is_async(function) or inspect.isasyncgenfunction(function) else "def"
    return f"; write: {kind} {name}({', '.join(parameters)}):"
