"""Show over HTTP how the workers of this process are: ``/livez``, ``/readyz``, ``/metrics`` and ``/status``.

A worker with the option ``health`` attaches itself to the board, which opens the server with the first one and closes
it with the last. From the top: ``board`` (who is shown, and where), ``pages`` (what a request is answered),
``metrics`` (the Prometheus text), ``server`` (HTTP on one thread), ``meter`` (what is counted as a task ends).
"""
