"""Check an input against the schema that an agent's workers have published: ``sekuire send --check``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Dict, Iterator, List, Optional

from ..client import SekuireClient
from ..errors import APIError
from . import terminal
from .exits import FAILED, CommandError

#: Problems that are shown.
_MOST = 5


class InputCheck:
    """Check inputs for a capability of an agent. Write a note if there is no schema to check them by.

    :raises CommandError: what checks them is not installed.
    """

    def __init__(self, client: SekuireClient, capability: str, agent_id: str) -> None:
        if find_spec("jsonschema") is None or find_spec("referencing") is None:
            raise CommandError("--check needs an extra; run: pip install 'sekuire[cli]'")
        import jsonschema
        import referencing

        # With a registry of its own it fetches nothing that a schema refers to.
        self._validators = [
            jsonschema.Draft202012Validator(schema, registry=referencing.Registry())
            for schema in _schemas(_installations(client), capability, agent_id)
        ]
        if not self._validators:
            terminal.note(f"not checked: no worker of agent {agent_id!r} has published a schema for {capability!r}")

    def problems_of(self, value: Any) -> List[str]:
        """Return why the input does not fit, in a sentence each, or nothing if it fits one of the schemas."""
        problems: List[str] = []
        for validator in self._validators:
            try:
                errors = list(validator.iter_errors(value))
            except Exception as error:  # noqa: BLE001  # Another program may publish anything as a schema.
                terminal.note(f"not checked: the published schema cannot be used ({type(error).__name__})")
                self._validators = []
                return []
            if not errors:
                return []
            problems = problems or [_described(error) for error in errors]
        return problems


def check_input(client: SekuireClient, capability: str, value: Any, agent_id: str) -> None:
    """Check the input of a task that is about to be submitted.

    :raises CommandError: the input does not fit, or what checks it is not installed.
    """
    problems = InputCheck(client, capability, agent_id).problems_of(value)
    if not problems:
        return
    more = [f"and {len(problems) - _MOST} more"] if len(problems) > _MOST else []
    raise CommandError(
        f"the input does not fit {capability!r}, and was not sent", *problems[:_MOST], *more, code=FAILED
    )


def _installations(client: SekuireClient) -> List[Any]:
    try:
        return list(client.installations())
    except APIError as error:
        if error.status not in (404, 405, 501):
            raise
    return []


def _schemas(installations: List[Any], capability: str, agent_id: str) -> Iterator[Dict[str, Any]]:
    """Yield each schema that an installation of the agent has published for the capability."""
    for one in installations:
        if not isinstance(one, dict) or one.get("agent_id") != agent_id or one.get("revoked") is True:
            continue
        for info in one.get("capability_info") or ():
            schema: Optional[Any] = info.get("input_schema") if isinstance(info, dict) else None
            if isinstance(schema, dict) and info.get("name") == capability:
                yield schema


def _described(error: Any) -> str:
    path = "input" + "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in error.absolute_path)
    return f"{path}: {error.message[:200]}"
