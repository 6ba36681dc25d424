"""Show the policy in force, verify it, and ask what it would allow: ``sekuire policy``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, Optional, Sequence, Tuple

from .._internal import files
from ..config import (
    CREDENTIALS_FILE_VARIABLE,
    ENVIRONMENT,
    POLICY_KEYS_VARIABLE,
    SIGNATURE_FORMS,
    policy_keys_from_environment,
    policy_signature_from_environment,
    source_of,
    variable,
)
from ..credentials.file import CredentialsFile
from ..errors import ConfigurationError, PolicyIntegrityError
from ..secret import Secret, as_secret
from ..service.policies import ORIGINS, client_for
from ..wire import protocol
from ..wire.models import RuntimeCredentials
from . import terminal
from .exits import FAILED, OK, CommandError
from .options import add_connection, api_key, connection, read_input
from .parsing import logging_options

if TYPE_CHECKING:
    from ..policy.document import Policy
    from ..policy.enforcer import Decision, PolicyEnforcer

DESCRIPTION = """\
See the policy of a workspace, verify it, and ask whether it would allow something, and by which rule. The policy comes
from the platform, or from a file."""
EPILOG = """\
examples:
  sekuire policy pull --output policy.json
  sekuire policy check network api.example.com --protocol https
  sekuire policy check tool search --file policy.json

Exit codes: 0 fine, or allowed; 1 denied, refused, or not available; 2 wrong usage or configuration."""
LOG_LEVEL = "warning"

#: MiB.
_LONGEST_FILE = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("--workspace", metavar="ID", help="the policy's workspace (default: SEKUIRE_WORKSPACE_ID)")
    source.add_argument(
        "--trusted-key",
        action="append",
        metavar="KEY",
        help="a public key that may have signed it; may be repeated (default: SEKUIRE_POLICY_PUBLIC_KEYS)",
    )
    source.add_argument(
        "--policy-signature",
        choices=SIGNATURE_FORMS,
        help="hash: a signature over the hash alone is accepted too (default: SEKUIRE_POLICY_SIGNATURE, or bound)",
    )
    source.add_argument("--api-key-file", metavar="PATH", help="a file with the API key (default: SEKUIRE_API_KEY)")
    add_connection(source)
    file = argparse.ArgumentParser(add_help=False)
    file.add_argument(
        "--file", metavar="PATH", help="a policy as pull writes it, or a policy's content alone; - for stdin"
    )

    def add(
        name: str, act: Callable[[argparse.Namespace], int], text: str, *parents: Any, aliases: Sequence[str] = ()
    ) -> argparse.ArgumentParser:
        described = f"{text[0].upper()}{text[1:]}."
        one = actions.add_parser(
            name, aliases=aliases, help=text, description=described, parents=[*parents, source, logging_options()]
        )
        one.set_defaults(act=act)
        return one

    pull = add("pull", _pull, "fetch the policy, verify it, and write it unchanged")
    pull.add_argument("--output", "--out", metavar="PATH", help="the file to write (default: stdout)")
    add("verify", _verify, "verify hash, signature, key and workspace", file, aliases=["validate"])
    add("show", _show, "show what the policy says", file)
    accept = actions.add_parser(
        "accept",
        help="let a policy return that was replaced (policy_signature='hash')",
        description="Let a policy be in force again that was replaced. Running workers find it at their next refresh.",
        parents=[logging_options()],
    )
    accept.add_argument("hash", metavar="HASH", help="its hash, as the error names it: 64 hex digits")
    accept.add_argument(
        "--policy-path", required=True, metavar="PATH", help="the file of policy_path=, which keeps what was replaced"
    )
    accept.add_argument("--workspace", metavar="ID", help="only in this workspace (default: in each of the file)")
    accept.set_defaults(act=_accept)
    check = actions.add_parser("check", help="ask whether something is allowed", description="Ask what is allowed.")
    kinds = check.add_subparsers(title="kinds", dest="kind", metavar="KIND", required=True)
    for kind, noun in _KINDS.items():
        one = kinds.add_parser(kind, help=f"may this {noun} be used?", parents=[file, source, logging_options()])
        one.add_argument("names", nargs="+", metavar=noun.upper(), help=f"the {noun}; several are asked one by one")
        one.set_defaults(act=_check)
        if kind == "network":
            one.add_argument("--protocol", default="https", help="how it is reached (https)")
        elif kind == "filesystem":
            one.add_argument("--operation", default="read", help="what is done with it (read)")
        elif kind == "model":
            one.add_argument("--provider", help="who provides it")


_KINDS = {
    "tool": "tool",
    "network": "domain",
    "filesystem": "path",
    "model": "model",
    "api": "service",
    "capability": "capability",
}


def run(args: argparse.Namespace) -> int:
    act: Callable[[argparse.Namespace], int] = args.act
    wrong: Optional[PolicyIntegrityError] = None
    try:
        return act(args)
    except PolicyIntegrityError as error:
        wrong = error
    lines = [f"the policy is refused: {wrong}"]
    if wrong.expected is not None or wrong.found is not None:
        lines.append(f"expected {wrong.expected or 'something else'}, found {wrong.found or 'nothing'}")
    raise CommandError(*lines, code=FAILED)


# -- the actions ------------------------------------------------------------------------------------------------------


def _pull(args: argparse.Namespace) -> int:
    policy = _fetch(args)
    if policy is None:
        raise CommandError("the workspace has no policy: everything is allowed", code=FAILED)
    _warn(policy)
    text = policy.raw.decode("utf-8").rstrip("\n")
    if args.output is None:
        terminal.say(text)
        return OK
    try:
        files.replace(args.output, (text + "\n").encode())
    except OSError as error:
        problem = error.strerror or type(error).__name__
    else:
        terminal.note(f"{_named(policy)} is in {args.output}: {ORIGINS[policy.origin]}")
        return OK
    raise CommandError(f"--output: cannot write {args.output!r}: {problem}")


def _verify(args: argparse.Namespace) -> int:
    policy = _read(args, whole=True) if args.file is not None else _fetch(args)
    if policy is None:
        raise CommandError("the workspace has no policy, so there is nothing to verify", code=FAILED)
    _warn(policy)
    terminal.say(f"{terminal.clean(_named(policy))} is good: {ORIGINS[policy.origin]}")
    return OK


def _show(args: argparse.Namespace) -> int:
    policy = _policy(args)
    if policy is None:
        terminal.say("the workspace has no policy: everything is allowed")
        return OK
    _warn(policy)
    facts = {
        "policy": policy.policy_id,
        "workspace": policy.workspace_id,
        "version": policy.version,
        "status": policy.status,
        "hash": policy.hash,
        "origin": ORIGINS[policy.origin],
        "signed by": policy.signing_key_id,
        "activated": policy.activated_at,
        "updated": policy.updated_at,
    }
    from ..policy.document import thaw

    for name, value in facts.items():
        if value is not None:
            terminal.say(f"{name:<10} {terminal.clean(str(value))}")
    terminal.say(json.dumps(thaw(policy.content), indent=2, ensure_ascii=False))
    return OK


def _check(args: argparse.Namespace) -> int:
    from ..policy.enforcer import PolicyEnforcer

    policy = _policy(args)
    if policy is not None:
        _warn(policy)
    ask = _question(args, PolicyEnforcer(policy))
    code = OK
    for name in args.names:
        decision = ask(name)
        word, colour = ("allowed", "green") if decision.allowed else ("denied", "red")
        rule = f" {decision.rule}:" if decision.rule else ""
        reason = _without_verdict(decision.reason) if decision.allowed else decision.reason
        terminal.say(f"{terminal.paint(word, colour)} {terminal.clean(name)}:{rule} {terminal.clean(reason)}")
        if not decision.allowed:
            code = FAILED
    return code


def _without_verdict(reason: str) -> str:
    for start in ("allowed: ", "allowed "):
        if reason.startswith(start):
            return reason[len(start) :]
    return reason


def _question(args: argparse.Namespace, enforcer: PolicyEnforcer) -> Callable[[str], Decision]:
    if args.kind == "network":
        return lambda name: enforcer.check_network(name, args.protocol)
    if args.kind == "filesystem":
        return lambda name: enforcer.check_filesystem(name, args.operation)
    if args.kind == "model":
        return lambda name: enforcer.check_model(name, args.provider)
    asked: Dict[str, Callable[[str], Decision]] = {
        "tool": enforcer.check_tool,
        "api": enforcer.check_api,
        "capability": enforcer.check_capability,
    }
    return asked[args.kind]


def _accept(args: argparse.Namespace) -> int:
    from ..policy.cache import PolicyCache

    digest, path = args.hash.lower(), args.policy_path
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise CommandError(f"HASH: must be 64 hex digits, got {args.hash[:80]!r}")
    if not os.path.exists(path):
        raise CommandError(f"--policy-path: there is no file {path!r}")
    try:
        found = PolicyCache(path).accept(digest, args.workspace)
    except ConfigurationError as error:
        problem = error.problem
    else:
        for workspace_id in found:
            terminal.say(f"accepted: the policy {digest} may be in force again in {terminal.clean(workspace_id)}")
        if found:
            return OK
        where = f" in {args.workspace}" if args.workspace is not None else ""
        raise CommandError(f"{path!r} does not have {digest} among the replaced policies{where}", code=FAILED)
    raise CommandError(f"--policy-path: {problem}")


def _named(policy: Policy) -> str:
    return f"policy {policy.policy_id} of {policy.workspace_id}, version {policy.version}"


def _warn(policy: Policy) -> None:
    for warning in policy.warnings:
        terminal.note(terminal.clean(f"warning: {warning}"))


# -- where it comes from ----------------------------------------------------------------------------------------------


def _policy(args: argparse.Namespace) -> Optional[Policy]:
    return _read(args) if args.file is not None else _fetch(args)


def _keys(args: argparse.Namespace) -> Tuple[str, ...]:
    return tuple(args.trusted_key) if args.trusted_key else policy_keys_from_environment()


def _signature_form(args: argparse.Namespace) -> str:
    """Return what a signature must cover.

    :raises ConfigurationError: the variable holds something else.
    """
    given: Optional[str] = args.policy_signature
    return given or policy_signature_from_environment()


def _keys_source(args: argparse.Namespace) -> str:
    return "--trusted-key" if args.trusted_key else source_of(POLICY_KEYS_VARIABLE)


def read_file(path: str, option: str) -> Tuple[bytes, Dict[str, Any]]:
    """Return a policy file's bytes, and the JSON object in it.

    :raises CommandError: the file cannot be read, or is not a JSON object.
    """
    from ..policy.document import read_document

    payload: Any = None
    data, problem = read_input(None if path == "-" else path, _LONGEST_FILE)
    try:
        if not problem:
            payload = protocol.decode_body(data)
            # Refuse what is refused in every policy, such as a key that occurs twice.
            read_document(data)
    except PolicyIntegrityError as error:
        problem = str(error)
    except ValueError as error:
        problem = f"it {error}"
    if not problem and not isinstance(payload, dict):
        problem = "it is not a JSON object"
    if problem:
        raise CommandError(f"{option}: cannot use {path!r}: {problem}")
    return data, payload


def content_of(payload: Dict[str, Any]) -> Dict[str, Any]:
    """Return the content if ``payload`` is a whole policy, else ``payload`` itself."""
    content = payload.get("content")
    return (
        content if isinstance(content, dict) and not set(payload) & {"permissions", "agent", "rate_limits"} else payload
    )


def _read(args: argparse.Namespace, whole: bool = False) -> Policy:
    from ..policy.client import require_extra
    from ..policy.document import Policy, decode_policy, parse_key

    data, payload = read_file(args.file, "--file")
    if whole or "hash" in payload:
        require_extra()
        stated = payload.get("workspace_id")
        workspace = args.workspace or variable(ENVIRONMENT["workspace_id"])
        if workspace is None:
            workspace = stated if isinstance(stated, str) else ""
        with _naming(_keys_source(args)):
            keys = [parse_key(key) for key in _keys(args)]
        accepts_hash = _signature_form(args) == "hash"
        return decode_policy(data, workspace_id=workspace, trusted_keys=keys, accepts_hash=accepts_hash)
    if _keys(args):
        terminal.note("warning: the file holds a policy's content alone, which no key can prove")
    return Policy.from_content(content_of(payload))


@contextlib.contextmanager
def _naming(source: str) -> Iterator[None]:
    """Name the origin of a wrong key in its error."""
    try:
        yield
        return
    except ConfigurationError as error:
        found = error
    if found.option != "trusted_policy_keys":
        raise found
    raise CommandError(f"{source}: {found.problem}")


def _fetch(args: argparse.Namespace) -> Optional[Policy]:
    config = connection(args)
    stored = _stored()
    key: Optional[Secret] = None
    token = None if stored is None else stored.runtime_token
    given = variable(ENVIRONMENT["runtime_token"])
    if args.api_key_file is not None or variable(ENVIRONMENT["api_key"]) is not None:
        key = api_key(args.api_key_file)[0]
    elif given is not None:
        token = as_secret(given, source_of(ENVIRONMENT["runtime_token"]))
    elif token is None:
        raise CommandError(
            "nothing to authenticate with: set SEKUIRE_API_KEY (or give --api-key-file PATH), SEKUIRE_RUNTIME_TOKEN or "
            "SEKUIRE_CREDENTIALS_FILE; or give --file PATH"
        )
    workspace = args.workspace or variable(ENVIRONMENT["workspace_id"]) or (stored and stored.workspace_id)
    if not workspace:
        raise CommandError("whose policy? give --workspace, or set SEKUIRE_WORKSPACE_ID")
    if not protocol.is_id(workspace):
        raise CommandError(f"--workspace: must be at most 256 bytes without control characters, got {workspace!r}")
    signature = _signature_form(args)
    with _naming(_keys_source(args)):
        client = client_for(config, _keys(args), signature, key, token)
    with client:
        return client.fetch_active_policy(workspace)


def _stored() -> Optional[RuntimeCredentials]:
    path = variable(CREDENTIALS_FILE_VARIABLE)
    if path is None:
        return None
    stored = CredentialsFile(path).load()
    return None if stored is None else stored.credentials
