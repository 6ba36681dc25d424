"""Receive tasks, run their handlers and report the results.

This is the map of a task's path. Read the modules in this order::

    bytes of the event stream
      │  transport.live, transport.sse   read the answer, cut it into events
      ▼
    stream       decode an event: a task, a command or the greeting; reconnect when the stream ends
      │
      ▼
    control      hand a task on; carry out a command, the desired state, the lease, a revocation
      │
      ▼
    dispatch     drop a repeated delivery; refuse, queue or start the task
      │          then, on a handler's thread: check the lease, ask the policy, start the clock
      ▼
    handlers     outcome calls the handler (invoke, inputs, context) and turns its end into a completion
      │          executors.remote runs it in another process, if the worker has such an executor
      ▼
    report       encode the completion, send it, try again until the platform has settled it
      │          outbox keeps it on disk until then, if the worker has one
      ▼
    POST to the platform, by transport.http

What happens beside that path:

- ``session.heartbeat`` renews the lease. Its answers bring a new token to ``credentials.store``, the policy's hash to
  ``policy.gateway``, and the desired state and a revocation to ``control``.
- ``worker`` is the Worker itself: it owns the parts above and their threads, and defines the order of a stop.
- ``idle`` ends a worker that has had nothing to do for a while.

Threads: ``sekuire-stream`` runs ``stream``, ``control`` and the intake of ``dispatch``. It waits for room in the queue,
never for one handler's result. ``sekuire-task-N`` runs a handler and sends the first report of its task.
``sekuire-report-N`` sends what has to be tried again. ``sekuire-heartbeat`` belongs to the installation and serves all
of its workers.
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
