"""Show how the agent is, and submit tasks: a Flask application beside the worker, in its process."""

import contextlib
import threading

import flask
from werkzeug.serving import make_server

from sekuire import TaskFailed, TaskTimeout, errors


def create_app(sdk, worker):
    app = flask.Flask(__name__)
    # One for all requests: those that wait share their questions to the platform.
    client = sdk.client()

    @app.get("/health")
    def health():
        """Answer 200 while the agent can get tasks, and 503 while it cannot, for a monitor."""
        stats = worker.stats()
        state = "paused" if worker.is_paused() else sdk.beacon_status.state
        report = {
            "state": state,
            "capabilities": sorted(worker.capabilities),
            "running": stats.running,
            "completed": stats.completed,
            "failed": stats.failed,
        }
        return report, 200 if state == "connected" and worker.is_connected() else 503

    @app.post("/tasks/<capability>")
    def submit(capability):
        """Have the agent do something. Wait up to 10 s for it."""
        try:
            return {"output": client.call(capability, flask.request.get_json(), wait=10.0)}
        except TaskTimeout as error:
            return {"task_id": error.task_id, "status": error.status}, 202
        except TaskFailed as error:
            return {"task_id": error.task_id, "error": {"code": error.code, "message": error.message}}, 422
        except errors.ConfigurationError as error:
            return {"error": {"code": "bad_request", "message": str(error)}}, 400
        except errors.SekuireError as error:
            return {"error": {"code": "platform", "message": str(error)}}, 502

    @app.get("/tasks/<task_id>")
    def task(task_id):
        """Return a task that :func:`submit` has not waited for."""
        found = client.task(task_id)
        return {name: found.get(name) for name in ("task_id", "status", "progress", "output", "error")}

    @app.errorhandler(errors.APIError)
    def refused(error):
        return {"error": {"code": error.code, "message": error.message}}, error.status

    return app


@contextlib.contextmanager
def serving(app, port):
    """Serve an application on this machine alone, by a thread. Yield its port."""
    server = make_server("127.0.0.1", port, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, name="web", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
