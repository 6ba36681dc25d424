"""Submit many tasks side by side, in bounded memory, and keep their order."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Deque, Iterator, Mapping, Optional, Tuple, TypeVar

from ..errors import ConfigurationError, SekuireError
from .submission import Submission, prepare_item

__all__ = ["ErrorCallback", "submit_each"]

_Handle = TypeVar("_Handle")

#: Called with the number of an item, and why it was not submitted.
ErrorCallback = Callable[[int, SekuireError], object]


def submit_each(
    prepare: Callable[..., Submission],
    send: Callable[[Submission], _Handle],
    items: Iterator[Mapping[str, Any]],
    max_in_flight: int,
    on_error: Optional[ErrorCallback],
) -> Iterator[_Handle]:
    """Yield the handle of each item, in their order. :meth:`SekuireClient.submit_many` documents the arguments."""
    # Threads: the caller prepares, yields and calls on_error; `sekuire-submit_N` send. The generator's end joins them.
    # So many more wait for their turn that no thread has to wait for this one.
    window = 2 * max_in_flight
    pending: Deque[Tuple[int, Future[_Handle]]] = deque()
    problem: Optional[BaseException] = None
    pool = ThreadPoolExecutor(max_in_flight, thread_name_prefix="sekuire-submit")

    def start(number: int, item: Mapping[str, Any]) -> Future[_Handle]:
        try:
            return pool.submit(send, prepare_item(number, item, prepare))
        except ConfigurationError as error:
            if on_error is None:
                raise
            # It is reported in its turn.
            wrong: Future[_Handle] = Future()
            wrong.set_exception(error)
            return wrong

    try:
        number = 0
        while problem is None:
            try:
                pending.append((number, start(number, next(items))))
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001  # Of the user's iterator, too.
                problem = error
            number += 1
            if len(pending) >= window:
                yield from _settle(*pending.popleft(), on_error)
        while pending:
            yield from _settle(*pending.popleft(), on_error)
    finally:
        for _, future in pending:
            future.cancel()
        pool.shutdown(wait=True)
    if problem is not None:
        raise problem


def _settle(number: int, future: Future[_Handle], on_error: Optional[ErrorCallback]) -> Iterator[_Handle]:
    """Yield the handle of one submission, or report its error."""
    try:
        handle = future.result()
    except SekuireError as error:
        if on_error is None:
            raise
        refusal = error
    else:
        yield handle
        return
    on_error(number, refusal)
