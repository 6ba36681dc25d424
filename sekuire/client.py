"""Submit tasks to agents and wait for their results: the other end of a task."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any, Dict, Iterable, Iterator, Mapping, NoReturn, Optional, Tuple, Type

from ._internal import instrumentation
from ._internal.checks import check_number, check_whole
from ._internal.threads import Deadline
from .calls import submission
from .calls.administration import Administration
from .calls.bulk import ErrorCallback, submit_each
from .calls.link import Caller
from .calls.submission import Submission, check_id, check_names, check_reason
from .calls.waits import ProgressCallback, TaskProgress, Waits, progress_of
from .config import ClientConfig, from_options, method_of_options, read_environment, with_source
from .credentials import Authenticator
from .errors import APIError, ConfigurationError, SekuireError, TaskFailed, TaskTimeout, TransportError
from .transport.http import MAX_ANSWER, HttpClient, Reply
from .wire import protocol

__all__ = ["SekuireClient", "TaskHandle", "TaskProgress"]

#: Connections kept open, as many as threads that call.
POOL_SIZE = 64
#: Options that environment variables give.
_FROM_ENVIRONMENT = ("api_base_url", "api_key", "agent_id", "workspace_id", "device_fingerprint")


class TaskHandle:
    """Follow one submitted task. :meth:`SekuireClient.submit` returns one. ::

        handle = client.submit("summarize", {"text": "Once upon a time"})
        print(handle.id, handle.status())
        print(handle.result(timeout=60))

    Any thread may use it. It is small: it keeps nothing of the task until the task has ended.
    """

    __slots__ = ("__weakref__", "_client", "_final", "_id")

    def __init__(self, client: SekuireClient, task_id: str) -> None:
        self._id = task_id
        self._client = client
        #: The task with its output, once that is known.
        self._final: Optional[Dict[str, Any]] = None

    @property
    def id(self) -> str:
        """Return the task's id."""
        return self._id

    def status(self) -> str:
        """Return ``"queued"``, ``"assigned"``, ``"completed"`` or ``"failed"``.

        :raises APIError: the platform does not know the task (404).
        """
        return str(self._look().get("status"))

    def progress(self) -> Optional[TaskProgress]:
        """Return the newest progress that the handler has reported, None without one."""
        return progress_of(self._look())

    def wait(self, timeout: Optional[float] = None, *, on_progress: Optional[ProgressCallback] = None) -> bool:
        """Wait until the task has ended. Return False if it has not after ``timeout`` seconds.

        :param timeout: None waits without a limit.
        :param on_progress: called, in this thread, with each new :class:`TaskProgress`. It may be a second late.
        :raises APIError: the platform refuses to answer, or does not know the task.
        :raises TransportError: the platform has been unreachable for a minute.
        """
        task, _ = self._await(timeout, on_progress)
        return task.get("status") in protocol.FINAL_STATES

    def result(self, timeout: Optional[float] = None, *, on_progress: Optional[ProgressCallback] = None) -> Any:
        """Wait for the task's output, as :meth:`wait` does, and return it.

        :raises TaskFailed: the task failed.
        :raises TaskTimeout: it has not ended after ``timeout`` seconds. It goes on.
        """
        task, problem = self._await(timeout, on_progress)
        if task.get("status") not in protocol.FINAL_STATES:
            raise TaskTimeout(self.id, text_of(task.get("status")), problem)
        if self._final is None:
            # What asks for several tasks does not bring their outputs.
            task = self._look()
        if task.get("status") == "completed":
            return task.get("output")
        raise _failure_of(self.id, task)

    def cancel(self, reason: Optional[str] = None) -> None:
        """Cancel the task, as :meth:`SekuireClient.cancel` does."""
        self._client.cancel(self.id, reason)

    def _look(self) -> Dict[str, Any]:
        return self._final or self._keep(self._client._waits.look(self.id))

    def _await(
        self, timeout: Optional[float], on_progress: Optional[ProgressCallback]
    ) -> Tuple[Dict[str, Any], Optional[str]]:
        """Return the task when it has ended, or at the end of the time, and why it could not be asked for last."""
        check_number("timeout", timeout, zero=True, or_none=True)
        if on_progress is not None and not callable(on_progress):
            raise ConfigurationError(f"must be callable, got {type(on_progress).__name__}", "on_progress")
        if self._final is not None:
            return self._final, None
        awaited = self._client._waits.wait(self.id, timeout, on_progress)
        return self._keep(awaited.task), awaited.problem

    def _keep(self, task: Dict[str, Any]) -> Dict[str, Any]:
        if task.get("status") in protocol.FINAL_STATES and "output" in task:
            # Without its input, which may be large, and which its submitter has.
            self._final = {name: value for name, value in task.items() if name != "input"}
        return task

    def __reduce__(self) -> NoReturn:
        raise TypeError("a TaskHandle cannot be pickled; pass its id on, and use client.handle(task_id) there")

    def __repr__(self) -> str:
        return f"<TaskHandle {self.id}>"


def _failure_of(task_id: str, task: Mapping[str, Any]) -> TaskFailed:
    found = task.get("error")
    error: Mapping[str, Any] = found if isinstance(found, dict) else {}
    details = error.get("details")
    return TaskFailed(
        text_of(error.get("code")) or "unknown",
        text_of(error.get("message")) or "",
        details if isinstance(details, dict) else None,
        error.get("retryable") is True,
        task_id,
    )


def text_of(value: Any) -> Optional[str]:
    return value if isinstance(value, str) and value else None


class SekuireClient(Administration):
    """Submit tasks and wait for their results; list, cancel and retry them; command installations. ::

        with SekuireClient(api_base_url="http://localhost:9300", api_key="sk_live_...", agent_id="writer") as client:
            print(client.call("summarize", {"text": "Once upon a time"}))

    :meth:`from_env` reads the options from environment variables, and ``sdk.client()`` acts with the credentials of a
    :class:`~sekuire.SekuireSDK`.

    Each call is sent again, under the same ``Idempotency-Key``, while the platform cannot be reached or says that it is
    busy, for ``retry_for`` seconds. However often a submission is sent, it makes one task.

    Any thread may use it, and its handles. It has no thread of its own but those of :meth:`submit_many`.

    :raises ConfigurationError: an option is unknown or wrong, or there is no API key.
    """

    @method_of_options(ClientConfig)
    def __init__(self, options: Dict[str, Any]) -> None:
        config = from_options(ClientConfig, options)
        if config.api_key is None:
            raise ConfigurationError("is required; set SEKUIRE_API_KEY and use from_env(), or pass it", "api_key")
        http = HttpClient(config, pool_size=POOL_SIZE)
        credential = functools.partial(protocol.api_key_header, config.api_key)

        def call(
            method: str, path: str, body: Optional[bytes], key: Optional[str], max_bytes: int, longer: float
        ) -> Reply:
            return http.request(
                method, path, body=body, credential=credential, idempotency_key=key, max_bytes=max_bytes, longer=longer
            )

        self._set_up(config, call)
        self._http: Optional[HttpClient] = http

    @classmethod
    @method_of_options(ClientConfig)
    def from_env(cls, options: Dict[str, Any]) -> SekuireClient:
        """Return a client with its options from the environment. Keywords win over variables.

        The variables are ``SEKUIRE_API_URL``, ``SEKUIRE_API_KEY``, ``SEKUIRE_AGENT_ID``, ``SEKUIRE_WORKSPACE_ID``,
        ``SEKUIRE_DEVICE_FINGERPRINT`` and ``SEKUIRE_ALLOW_INSECURE_HTTP``.

        :raises ConfigurationError: a variable or option is missing or wrong; the error names it.
        """
        found: Optional[ConfigurationError] = None
        complete, sources = read_environment(options, _FROM_ENVIRONMENT)
        try:
            return cls(**complete)
        except ConfigurationError as error:
            # Without its traceback, whose frames hold the options, tokens included.
            found = error.with_traceback(None)
        finally:
            complete.clear()
        raise with_source(found, sources)

    @classmethod
    def of_agent(cls, config: ClientConfig, auth: Authenticator) -> SekuireClient:
        """Return a client that acts with an agent's runtime token. ``SekuireSDK.client()`` calls it."""
        seconds = config.connect_timeout + config.read_timeout

        def call(
            method: str, path: str, body: Optional[bytes], key: Optional[str], max_bytes: int, longer: float
        ) -> Reply:
            reply, _ = auth.request(
                method,
                lambda snapshot: path,
                body=body,
                idempotency_key=key,
                deadline=Deadline(seconds),
                max_bytes=max_bytes,
                longer=longer,
            )
            return reply

        client = cls.__new__(cls)
        client._set_up(config, call)
        client._is_agent = True
        client._http = None
        return client

    def _set_up(self, config: ClientConfig, call: Caller) -> None:
        super()._set_up(config, call)
        # The envelope of a task comes on top of its input and output.
        self._waits = Waits(self._link, config.max_result_bytes + MAX_ANSWER, config.endpoints.path)

    # -- submitting --

    def submit(
        self,
        capability: str,
        input: Any = None,
        *,
        agent_id: Optional[str] = None,
        idempotency_key: Optional[str] = None,
        delay: Optional[float] = None,
        expires_in: Optional[float] = None,
        timeout: Optional[float] = None,
        max_attempts: Optional[int] = None,
        trace_id: Optional[str] = None,
        workspace_id: Optional[str] = None,
    ) -> TaskHandle:
        """Submit a task and return its handle.

        :param input: any value with a JSON form.
        :param agent_id: the agent that gets it; None: the client's own agent.
        :param idempotency_key: within 24 hours the same key gets the same task. None: a new key for this call.
        :param delay: seconds before it may begin, up to 30 days.
        :param expires_in: seconds within which it must begin; else it fails with the code ``expired``.
        :param timeout: seconds that its handler may run.
        :param max_attempts: how often it is tried while it fails retryably. None: once.
        :param trace_id: an id that travels with it, to find it in traces.
        :raises ConfigurationError: an argument is wrong, or no agent is named.
        :raises TransportError: no answer came within ``retry_for`` seconds. The task may have been submitted; the error
            names the key under which a further call gets the same task.
        :raises APIError: the platform refused the task.
        """
        return self.send(
            self.prepare(
                capability,
                input,
                agent_id=agent_id,
                idempotency_key=idempotency_key,
                delay=delay,
                expires_in=expires_in,
                timeout=timeout,
                max_attempts=max_attempts,
                trace_id=trace_id,
                workspace_id=workspace_id,
            )
        )

    def call(
        self,
        capability: str,
        input: Any = None,
        *,
        wait: Optional[float] = 30.0,
        on_progress: Optional[ProgressCallback] = None,
        **fields: Any,
    ) -> Any:
        """Submit a task, wait for its output and return it.

        :param wait: seconds to wait for it; None waits without a limit.
        :param on_progress: called, in this thread, with each new :class:`TaskProgress`.
        :param fields: as for :meth:`submit`.
        :raises TaskFailed: the task failed.
        :raises TaskTimeout: it has not ended in time. It goes on, and the error has its id.
        """
        check_number("wait", wait, zero=True, or_none=True)
        check_names({name: value for name, value in fields.items() if name != "agent_id"})
        return self.submit(capability, input, **fields).result(wait, on_progress=on_progress)

    def submit_many(
        self,
        items: Iterable[Mapping[str, Any]],
        *,
        max_in_flight: int = 32,
        on_error: Optional[ErrorCallback] = None,
    ) -> Iterator[TaskHandle]:
        """Submit many tasks side by side. Yield their handles in the order of ``items``. ::

            items = ({"capability": "resize", "input": {"file": name}} for name in names)
            for handle in client.submit_many(items):
                print(handle.id)

        It reads the items as they are needed, so that their number does not matter. Nothing is submitted before the
        first handle is asked for. After an error the iterator ends: items behind the one that failed may have been
        submitted. With an ``idempotency_key`` in each item, all of it can be repeated.

        :param items: mappings with the names of :meth:`submit`'s parameters.
        :param max_in_flight: how many submissions are sent at once, each by a thread.
        :param on_error: called, in this thread and in the order of the items, with the number, from 0, and the error of
            an item that is wrong or was refused. The others go on. It may raise an error to end the iteration.
        :raises ConfigurationError: an item is wrong; the error has its number, from 0. Raised after the handles of the
            items before it.
        """
        check_whole("max_in_flight", max_in_flight)
        if isinstance(items, (str, bytes, Mapping)):
            raise ConfigurationError(f"must be an iterable of mappings, got {type(items).__name__}", "items")
        if on_error is not None and not callable(on_error):
            raise ConfigurationError(f"must be callable, got {type(on_error).__name__}", "on_error")
        return submit_each(self.prepare, self.send, iter(items), max_in_flight, on_error)

    def prepare(
        self, capability: str, input: Any = None, *, agent_id: Optional[str] = None, **fields: Any
    ) -> Submission:
        """Check a task and write it as JSON, for :meth:`send`. Later changes to ``input`` have no effect.

        :param fields: as for :meth:`submit`.
        :raises ConfigurationError: an argument is wrong, or no agent is named.
        """
        if fields.get("workspace_id") is None:
            fields["workspace_id"] = self.config.workspace_id
        agent_id = self.config.agent_id if agent_id is None else agent_id
        watching = instrumentation.current
        if watching is None:
            return submission.prepare(capability, input, agent_id, fields)
        span = watching.begin_submit(capability, agent_id, fields, self.config.api_base_url)
        if span is not None and span.trace_id is not None:
            fields["trace_id"] = span.trace_id
        return submission.prepare(capability, input, agent_id, fields)._replace(span=span)

    def send(self, prepared: Submission) -> TaskHandle:
        """Submit a prepared task and return its handle. It raises what :meth:`submit` raises."""
        span = prepared.span
        return self._send(prepared) if span is None else span.run(functools.partial(self._send, prepared))

    def _send(self, prepared: Submission) -> TaskHandle:
        try:
            # The answer is the task, with its input.
            limit = 2 * len(prepared.body) + MAX_ANSWER
            task = self._link.ask(
                "tasks", "POST", self._path("tasks"), prepared.body, key=prepared.key, max_bytes=limit
            )
        except TransportError as error:
            problem, was_sent = str(error), error.was_sent
        except APIError as error:
            if not protocol.is_transient(error.status):
                raise
            problem, was_sent = str(error), True
        else:
            task_id = task.get("task_id") or task.get("id")
            if not protocol.is_id(task_id):
                raise SekuireError("the platform's answer names no task_id; is the URL a Sekuire platform's?")
            return TaskHandle(self, task_id)
        if not was_sent:
            raise TransportError(f"{problem}; nothing was submitted (does the platform run, and is the URL right?)")
        given = f"idempotency_key={prepared.key!r}"
        if prepared.span is not None and prepared.span.trace_id is not None:
            # Without it the body would be another one, which the platform refuses under the same key.
            given += f" and trace_id={prepared.span.trace_id!r}"
        raise TransportError(
            f"{problem}; whether the task was submitted is not known, submit it again with {given} to get the same task"
        )

    # -- tasks --

    def handle(self, task_id: str) -> TaskHandle:
        """Return a handle for a task by its id. The platform is not asked."""
        check_id("task_id", task_id)
        return TaskHandle(self, task_id)

    def task(self, task_id: str) -> Dict[str, Any]:
        """Return a task as the platform describes it: ``status``, ``input``, ``output``, ``error``, ``timeline`` ...

        :raises APIError: the platform does not know the task (404).
        """
        check_id("task_id", task_id)
        return self._waits.look(task_id)

    def tasks(
        self,
        *,
        status: Optional[str] = None,
        capability: Optional[str] = None,
        agent_id: Optional[str] = None,
        limit: Optional[int] = None,
    ) -> Iterator[Dict[str, Any]]:
        """Yield tasks, newest first, without input and output. Further pages are asked for as they are needed.

        :param status: only those that are ``"queued"``, ``"assigned"``, ``"completed"`` or ``"failed"``.
        :param limit: so many at most; None: all.
        """
        check_whole("limit", limit, or_none=True)
        for name, value in (("status", status), ("capability", capability), ("agent_id", agent_id)):
            if value is not None:
                check_id(name, value)
        filters = {"status": status, "capability": capability, "agent_id": agent_id}
        limit_of_page = self.config.max_result_bytes + MAX_ANSWER
        return self._link.pages("tasks", self._path("tasks"), "tasks", filters, limit, limit_of_page)

    def cancel(self, task_id: str, reason: Optional[str] = None) -> None:
        """Cancel a task. One that waits fails with the code ``cancelled``; the handler of one that runs is notified.

        :raises APIError: the task has ended already (409), or the platform does not know it (404).
        """
        check_id("task_id", task_id)
        self._link.ask(
            "cancel", "POST", self._path("cancel", task_id=task_id), protocol.reason_body(check_reason(reason))
        )

    def retry(self, task_id: str) -> TaskHandle:
        """Queue a failed task again, as its next attempt, and return a handle for it.

        :raises APIError: the task has not failed (409), or the platform does not know it (404).
        """
        check_id("task_id", task_id)
        limit = self.config.max_result_bytes + MAX_ANSWER
        self._link.ask("retry", "POST", self._path("retry", task_id=task_id), b"{}", max_bytes=limit)
        return TaskHandle(self, task_id)

    # -- its end --

    def close(self) -> None:
        """Close the connections, and end every wait with an error. Calling it again is harmless.

        A thread that asks the platform at this moment waits for the answer first, up to 20 seconds.
        """
        self._link.closed.set()
        self._waits.wake()
        if self._http is not None:
            self._http.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SekuireClient cannot be pickled; make one in each process, by from_env() for example")

    def __enter__(self) -> SekuireClient:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SekuireClient {self.config.api_base_url} {self.config.agent_id or ''}".rstrip() + ">"
