"""Let others push tasks to a worker, by a Flask blueprint: ``POST /a2a/tasks``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Callable, Optional, Union

import flask

from .._internal.checks import check_number, check_whole
from ..errors import ConfigurationError
from ..secret import Secret, as_secret
from ..wire import protocol
from ..wire.models import Failure, is_id
from ..worker.pushed import PushedTasks, PushRefused
from ..worker.worker import Worker

if TYPE_CHECKING:
    from flask.typing import ResponseReturnValue

__all__ = ["pushed_tasks"]

#: Most bytes of a push.
MAX_BODY = 1024 * 1024
#: Most seconds that a push waits for its result.
MOST_WAIT = 30.0
#: Least characters of a shared secret.
MIN_SECRET = 16
#: Seconds after which a push that was refused may be repeated, and after which an open task may be asked for.
_RETRY_AFTER, _LOOK_AGAIN = "5", "1"
#: Failure of a task that nothing was run of → the answer's status. Any other: 503 if retryable, else 422.
_STATUS_OF = {
    "id_reused": 409,
    "invalid_task": 400,
    "policy_denied": 403,
    "rate_limited": 429,
    "too_many_tasks": 429,
    "unknown_capability": 404,
}

#: Says who sent a request: True, or the name of one of several pushers. Anything else refuses it.
Authenticate = Callable[[flask.Request], Union[bool, str, None]]


def pushed_tasks(
    worker: Union[Worker, Callable[[], Optional[Worker]]],
    *,
    secret: Union[str, Secret, None] = None,
    authenticate: Optional[Authenticate] = None,
    wait: float = 10.0,
    max_queued: int = 100,
    name: str = "sekuire_pushed",
) -> flask.Blueprint:
    """Return a blueprint by which others push tasks to ``worker``: ``POST /a2a/tasks`` and ``GET /a2a/tasks/{id}``.

    A pushed task is run as one of the platform's: by the same handlers and threads, and behind the same policy, lease,
    pause and stop. The platform does not know it, and its id has nothing to do with the ids of the platform's tasks. ::

        app.register_blueprint(pushed_tasks(worker, secret=os.environ["A2A_SECRET"]))

    :param worker: the worker of this process, or a function that returns it, None while there is none.
    :param secret: what every pusher sends as ``Authorization: Bearer ...``; at least 16 characters.
    :param authenticate: a function in its place. It gets the request, and returns True to let it in, or a name: then
        the task belongs to that pusher alone, and the handler reads the name as ``ctx.requester_id``. Whatever else it
        returns refuses the request.
    :param wait: seconds that a push waits for its result, at most 30. After that it is answered 202.
    :param max_queued: how many pushed tasks may be open at once. A further push is answered 429.
    :param name: the blueprint's name.
    :raises ConfigurationError: an argument is wrong, or neither ``secret`` nor ``authenticate`` is given.
    """
    if not isinstance(worker, Worker) and not callable(worker):
        raise ConfigurationError(
            f"must be a Worker, or a function that returns one, got {type(worker).__name__}", "worker"
        )
    check_number("wait", wait, zero=True, most=MOST_WAIT)
    check_whole("max_queued", max_queued)
    who = _authenticator(secret, authenticate)
    endpoint = _Endpoint(
        PushedTasks((lambda: worker) if isinstance(worker, Worker) else worker, max_open=max_queued), wait
    )
    blueprint = flask.Blueprint(name, __name__)

    def check() -> Optional[ResponseReturnValue]:
        # Before anything of the request is read.
        found = who(flask.request)
        if isinstance(found, str) and not is_id(found):
            raise ConfigurationError(
                "returned a name that cannot be an id: empty, long, or with control characters", "authenticate"
            )
        if found is not True and not isinstance(found, str):
            answer = _refusal(401, Failure(code="unauthorized", message="the secret is missing or wrong"))
            answer.headers["WWW-Authenticate"] = "Bearer"
            return answer
        flask.g.sekuire_pusher = "" if found is True else found
        return None

    blueprint.before_request(check)
    blueprint.add_url_rule("/a2a/tasks", "push", endpoint.push, methods=["POST"])
    blueprint.add_url_rule("/a2a/tasks/<task_id>", "show", endpoint.show, methods=["GET"])
    return blueprint


def _authenticator(secret: Any, authenticate: Optional[Authenticate]) -> Authenticate:
    if secret is not None and authenticate is not None:
        raise ConfigurationError("give either secret or authenticate, not both", "authenticate")
    if authenticate is not None:
        if not callable(authenticate):
            raise ConfigurationError(f"must be a function, got {type(authenticate).__name__}", "authenticate")
        if inspect.iscoroutinefunction(authenticate):
            raise ConfigurationError("must be a plain function; an async one is not awaited", "authenticate")
        return authenticate
    if secret is None:
        raise ConfigurationError(
            "is required, or everybody could push tasks: give secret=os.environ['A2A_SECRET'], or a function of the "
            "request as authenticate=; make a secret by: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
            "secret",
        )
    expected = as_secret(secret, "secret")
    if len(expected.reveal()) < MIN_SECRET:
        raise ConfigurationError(f"must have at least {MIN_SECRET} characters, so that nobody guesses it", "secret")

    def compare(request: flask.Request) -> bool:
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        # Secret compares in constant time.
        return kind.lower() == "bearer" and expected == given.strip()

    return compare


class _Endpoint:
    """Answer requests with what becomes of pushed tasks."""

    def __init__(self, pushed: PushedTasks, wait: float) -> None:
        self._pushed = pushed
        self._wait = wait

    def push(self) -> flask.Response:
        """Begin the task in the request's body. Answer its result, or where to ask for it."""
        request = flask.request
        if not request.is_json:
            # Other types can be sent by the form of any web page, with the cookies of whoever looks at it.
            return _refusal(415, _failure("invalid_task", "send the task as Content-Type: application/json"))
        body = _read(request)
        if body is None:
            return _refusal(413, _failure("invalid_task", f"the task has more than {MAX_BODY} bytes"))
        try:
            task = self._pushed.push(body.decode(), flask.g.sekuire_pusher)
        except PushRefused as refused:
            return _refused(refused.failure)
        except (protocol.Malformed, UnicodeDecodeError) as error:
            problem = "the task is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            return _refusal(400, _failure("invalid_task", problem))
        if self._pushed.wait(task, self._wait):
            if task.refusal is not None:
                return _refused(task.refusal)
            self._pushed.note_answered(task)
            return _answer(200, task.body())
        answer = _answer(202, task.body())
        answer.headers["Location"] = flask.url_for(f"{request.blueprint}.show", task_id=task.id)
        answer.headers["Retry-After"] = _LOOK_AGAIN
        return answer

    def show(self, task_id: str) -> flask.Response:
        """Answer what is known of a pushed task."""
        task = self._pushed.find(task_id, flask.g.sekuire_pusher)
        if task is None:
            return _refusal(
                404, _failure("unknown_task", "no task of this id was pushed, or its result is no longer kept")
            )
        return _answer(200, task.body())


def _read(request: flask.Request) -> Optional[bytes]:
    """Return the body of a request, None if it is too large."""
    if (request.content_length or 0) > MAX_BODY:
        return None
    body = b""
    # Without a length it ends when it ends, and one read may bring only a part.
    while len(body) <= MAX_BODY:
        part = request.stream.read(MAX_BODY + 1 - len(body))
        if not part:
            return body
        body += part
    return None


def _failure(code: str, message: str) -> Failure:
    return Failure(code=code, message=message)


def _refused(failure: Failure) -> flask.Response:
    return _refusal(_STATUS_OF.get(failure.code, 503 if failure.retryable else 422), failure)


def _refusal(status: int, failure: Failure) -> flask.Response:
    """Return an answer that says why nothing was run, in the form of the platform's errors."""
    shown = {"code": failure.code, "message": failure.message, "retryable": failure.retryable}
    if failure.details is not None:
        shown["details"] = dict(failure.details)
    answer = _answer(status, protocol.encode_json({"error": shown}))
    if failure.retryable:
        answer.headers["Retry-After"] = _RETRY_AFTER
    return answer


def _answer(status: int, body: bytes) -> flask.Response:
    return flask.Response(body, status, {"Cache-Control": "no-store"}, "application/json")
