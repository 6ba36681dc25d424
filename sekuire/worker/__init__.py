"""Receive tasks, run their handlers and report the results.

This is the map of a task's path. Read the modules in this order::

    bytes of the event stream
      │  transport.live, transport.sse   read the answer, cut it into events
      ▼
    stream       decode an event: a task, a command or the greeting; reconnect when the stream ends
      │
      ▼
    control      hand a task on; carry out a command, the desired state, a revocation
      │
      ▼
    dispatch     drop a repeated delivery; then run the task, let it wait, answer it, or give it back
      │          records knows each task's state and what it takes of the worker's limits
      ▼
    running      on a handler's thread: check the lease and start the clock
      │
      ▼
    calling      ask the policy; once the clock runs, call the handler
      │
      ▼
    handlers     outcome calls the handler (invoke, inputs, context) and turns its end into a completion
      │          executors.remote runs it in another process, if the worker has such an executor
      ▼
    answers      hand the completion to the reporter, and note it in the audit log
      │
      ▼
    report       encode the completion, send it, retry until the platform has settled it
      │          results holds it until then, and spool keeps it in the outbox (outbox, outbox_file), if there is one
      ▼
    sending      POST to the platform by transport.http; wire.verdict says what the answer means

The platform may deliver more tasks than the worker asked for. They wait, up to ``max_waiting_bytes``. A task beyond
that is given back: ``release`` asks the platform to accept it again. Only if the platform accepts no releases does the
stream wait until there is room. ``progress`` sends what handlers report while they run.

Every answer of the platform, to whatever request, passes ``wire.verdict``: settled, retry, substitute a failure, drop,
not the platform. The callers only act on that verdict.

``pushed`` accepts tasks that others push to an application. They are on the same path, and only the end differs: each
record has the ``sink`` of whoever gave the task. For the platform's that is the reporter; the others keep the result.

What happens beside that path:

- ``session.heartbeat`` renews the lease. Its answers bring a new token to ``credentials.store``, the policy's hash to
  ``policy.gateway``, and the desired state and a revocation to ``control``.
- ``lease_watch`` starts the tasks that waited for the lease, and cancels the running ones when it is lost.
- ``policy_watch`` loads the policy before the first task, and cancels what a new policy forbids.
- ``life`` knows the worker's phase (new, running, stopping, stopped), its link to the platform, and when and why it
  stops. ``stream``, ``control``, ``sending`` and ``idle`` ask it to stop the worker.
- ``shutdown`` carries out a stop: end the stream, give back what waits, drain, send the reports, beat a last time,
  close.
- ``approvals`` asks people: for a handler, or for a policy before the handler begins. ``gates`` holds such a task
  without a thread. ``questions`` sends the requests and gets the decisions.
- ``announcer`` notifies the audit log and the user's callbacks of commands and of the worker's state.
- ``profile`` describes the worker in the stream's query and in heartbeats.
- ``idle`` stops a worker that has had nothing to do for a while.
- ``registration`` registers handlers, middleware, resources and callbacks.
- ``worker`` is the Worker itself: it makes these parts and starts.

Threads:

- ``sekuire-stream`` runs ``stream``, ``control`` and the intake of ``dispatch``. It never waits for a handler's result.
- ``sekuire-task_N`` runs a handler and sends the first report of its task.
- ``sekuire-report-N`` sends releases, progress and retries.
- ``sekuire-approval-N`` ask people and look for decisions, ``sekuire-approval-handler-N`` run the user's handler.
- ``sekuire-timer`` ends tasks at their deadline and looks at the lease.
- ``sekuire-callback`` runs the user's callbacks, ``sekuire-shutdown`` the stop.
- ``sekuire-heartbeat`` belongs to the installation and serves all of its workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._internal import lazy

if TYPE_CHECKING:
    from .worker import Worker as Worker
    from .worker import create_worker as create_worker

__all__ = ["Worker", "create_worker"]

#: Public name → the module that defines it.
_HOMES = {
    "Worker": "worker",
    "create_worker": "worker",
}

__getattr__, __dir__ = lazy.names_of(__name__, _HOMES)
