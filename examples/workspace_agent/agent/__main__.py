"""Run the agent: ``python -m agent``."""

import os

from sekuire import SekuireSDK

from . import tasks, web


def main():
    sdk = SekuireSDK.from_env(agent_name="Workspace agent")
    worker = sdk.create_task_worker(max_workers=4)
    worker.include(tasks)

    @worker.on_command
    def note(command):
        # An audit event: who looks at the platform sees that the agent has obeyed, and why it was asked to.
        sdk.log("health", {"message": f"{command.type} by the platform", "reason": command.reason})
        print(f"{command.type}: {command.reason or 'no reason given'}")

    with sdk, web.serving(web.create_app(sdk, worker), int(os.environ.get("PORT", "8002"))) as port:
        print(f"health and tasks on http://127.0.0.1:{port}")
        sdk.log("health", {"message": "started", "port": port})
        # Until a signal, a terminate command or a revocation.
        worker.start(block=True)


if __name__ == "__main__":
    main()
