"""The local platform as a process that can be killed: its Python face over JSON lines."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any, Dict

from sekuire.local import LocalPlatform

from .process import question, reply


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    settings = json.loads(sys.argv[1])
    platform = LocalPlatform(settings["path"], allowed_hosts=["127.0.0.1"], **settings["options"])
    platform.start()
    reply(started=True, port=int(platform.url.rpartition(":")[2]))
    while True:
        asked = question()
        op, number = asked.pop("op"), asked.pop("number")
        reply(number=number, **_do(platform, op, asked))
        if op == "stop":
            return


def _do(platform: LocalPlatform, op: str, asked: Dict[str, Any]) -> Dict[str, Any]:
    if op == "submit":
        return {"ids": [platform.submit(**task) for task in asked["tasks"]]}
    if op == "count":
        # Through the store: the HTTP face would read every task.
        query = "SELECT count(*) FROM tasks WHERE status = '{}'"
        with platform._store._lock:
            database = platform._store._connection()
            waiting, given = (database.execute(query.format(status)).fetchone()[0] for status in ("queued", "assigned"))
        return {"waiting": waiting, "given": given}
    if op == "given":
        query = "SELECT task_id, attempt FROM tasks WHERE status = 'assigned'"
        with platform._store._lock:
            return {"tasks": platform._store._connection().execute(query).fetchall()}
    if op == "install_token":
        return {"token": platform.create_install_token(asked["agent_id"], asked["max_uses"])}
    if op == "api_key":
        return {"key": platform.api_key}
    if op == "policy_key":
        return {"workspace_id": platform.workspace_id, "key": platform.policy_public_key}
    if op == "installations":
        return {"ids": [one["installation_id"] for one in platform.installations()]}
    if op == "command":
        platform.hold_commands = asked["lose"]
        for one in platform.installations():
            platform.command(one["installation_id"], asked["type"], "chaos")
        platform.hold_commands = False
    elif op == "policy":
        platform.set_policy(platform.workspace_id, asked["content"])
    elif op == "expire_tokens":
        platform.expire_tokens()
    elif op == "drop_streams":
        platform.drop_streams()
    elif op == "stop":
        platform.stop()
    return {}


if __name__ == "__main__":
    main()
