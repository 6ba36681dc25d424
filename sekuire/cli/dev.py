"""Run the local platform as a server to develop against: ``sekuire dev``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple

from .._internal.signals import SignalQueue
from ..errors import APIError, ConfigurationError, PolicyIntegrityError
from . import terminal
from .exits import INTERRUPTED, OK, CommandError
from .options import local_platform
from .policy import content_of, read_file

if TYPE_CHECKING:
    from ..local import Faults, LocalPlatform

HELP = "run a local platform to develop against"
DESCRIPTION = """\
Run a local platform until Ctrl-C or SIGTERM, and print the environment variables with which agents and the other
commands find it. stdout holds nothing but these lines, to be pasted into a shell."""
EPILOG = """\
Exit codes: 0 stopped by Ctrl-C or SIGTERM, which is its normal end; 2 the port is taken, or another wrong setting;
130 ended by a second signal while it was stopping."""
FAULTS = """\
KIND is latency, error, reset, half-answer, page, interim, cut-streams, stall-streams, expire-tokens or outage.
Examples: latency:0.05-0.2 | error:503,rate=0.1,on=complete,retry-after=2 | reset:rate=0.05,when=after |
page:404,rate=0.05,on=complete | interim:103,rate=0.2 |
cut-streams:every=20-40 | stall-streams:10,every=60 | expire-tokens:every=30 | outage:3,every=20-40"""
LOG_LEVEL = "warning"

_FLAGS = {
    "port": "--port",
    "host": "--host",
    "path": "--db",
    "agent_id": "--agent-id",
    "allowed_hosts": "--allow-host",
    "fault": "--fault",
}
#: Installations that one printed install token can make: a worker is restarted often while it is developed.
_USES = 1000
_SLICE = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=_port, default=9300, help="where to listen (default 9300; 0: any free port)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default 127.0.0.1)")
    parser.add_argument("--db", metavar="PATH", help="keep tasks, tokens and the API key in this file")
    parser.add_argument("--agent-id", default="my-agent", metavar="ID", help="whose install token to make (my-agent)")
    parser.add_argument(
        "--policy",
        metavar="FILE",
        help="a policy's content as JSON (or a whole policy, as sekuire policy pull gives it), signed and made active; "
        "made active again whenever the file is saved",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name to be called by, such as host.docker.internal; may be repeated",
    )
    parser.add_argument("--show-logs", action="store_true", help="print every audit event as a line on stderr")
    group = parser.add_argument_group("faults", FAULTS)
    group.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND[:ARGUMENT,...]",
        help="inject a fault; may be repeated",
    )
    group.add_argument(
        "--fault-seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the random numbers (default 0); the same seed gives the same faults",
    )


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:9]) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    platform_class = local_platform()
    faults = _faults(args)
    with _Signals() as signals:
        problem: Optional[ConfigurationError] = None
        try:
            platform = platform_class(args.db, args.host, args.port, allowed_hosts=args.allow_host, faults=faults)
            platform.start()
        except ConfigurationError as error:
            problem = error
        if problem is not None:
            raise _by_flag(problem)
        try:
            try:
                token = platform.create_install_token(args.agent_id, max_uses=_USES)
            except ConfigurationError as error:
                problem = error
            if problem is not None:
                raise _by_flag(problem)
            policy = None if args.policy is None else _PolicyFile(args.policy, platform)
            variables = {
                "SEKUIRE_API_URL": platform.url,
                "SEKUIRE_AGENT_ID": args.agent_id,
                "SEKUIRE_INSTALL_TOKEN": token,
                "SEKUIRE_API_KEY": platform.api_key,
            }
            if policy is not None:
                variables["SEKUIRE_WORKSPACE_ID"] = policy.workspace_id
                variables["SEKUIRE_POLICY_PUBLIC_KEYS"] = platform.policy_public_key
            terminal.say("\n".join(shell_lines(variables)))
            kept = f"state in {args.db}" if args.db else "state in memory only, see --db"
            terminal.note(f"the local platform runs on {platform.url} ({kept}); Ctrl-C stops it")
            for fault in faults.standing:
                terminal.note(f"fault: {fault}")
            if args.fault:
                terminal.note(f"fault seed: {faults.seed}")
            looks = [] if policy is None else [policy.look]
            if args.show_logs:
                looks.append(_Tail(platform).show)
            signals.wait(looks)
        finally:
            platform.stop()
    if args.fault:
        counts = ", ".join(f"{kind.replace('_', '-')} {n}" for kind, n in faults.injected.items() if n)
        terminal.note(f"injected: {counts or 'nothing'}")
    terminal.note("stopped")
    return OK


def _faults(args: argparse.Namespace) -> Faults:
    # local_platform() has reported a missing extra before.
    from ..local import Faults

    faults = Faults(args.fault_seed)
    problem: Optional[ConfigurationError] = None
    try:
        for text in args.fault:
            faults.add(text)
    except ConfigurationError as error:
        problem = error
    if problem is not None:
        raise _by_flag(problem)
    return faults


def shell_lines(variables: Dict[str, str], windows: bool = os.name == "nt") -> List[str]:
    """Return lines that set ``variables`` in this system's shell."""
    if windows:
        return [f'set "{name}={value}"' for name, value in variables.items()]
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


class _Tail:
    """Print the audit events that have come since the last call. Main thread only."""

    def __init__(self, platform: LocalPlatform) -> None:
        self._platform = platform
        known = platform.logs_after(0)
        self._last = known[-1][0] if known else 0

    def show(self) -> None:
        for number, event in self._platform.logs_after(self._last):
            self._last = number
            terminal.note(line_of(event))


def line_of(event: Dict[str, Any]) -> str:
    """Return an audit event as one line. Escape what could steer a terminal."""
    data = json.dumps(event["event_data"], ensure_ascii=False)
    text = " ".join((event["event_timestamp"], event["severity"], event["event_type"], event["sekuire_id"], data))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _by_flag(error: ConfigurationError) -> CommandError:
    flag = _FLAGS.get(error.option or "")
    return CommandError(f"{flag}: {error.problem}" if flag else str(error))


class _PolicyFile:
    """Keep the content of the file of ``--policy`` the active policy of the platform's workspace. Main thread only.

    :raises CommandError: the file cannot be used.
    """

    def __init__(self, path: str, platform: LocalPlatform) -> None:
        self.workspace_id = platform.workspace_id
        self._path = path
        self._platform = platform
        self._state = self._stat()
        self._activate()

    def look(self) -> None:
        """Read the file again if it was saved. Leave the policy as it is if the file cannot be used."""
        state = self._stat()
        if state is None or state == self._state:
            return
        self._state = state
        try:
            self._activate()
        except CommandError as error:
            terminal.note(f"{'; '.join(error.lines)}; the policy stays as it was")

    def _stat(self) -> Optional[Tuple[int, int, int]]:
        with contextlib.suppress(OSError):
            found = os.stat(self._path)
            return found.st_mtime_ns, found.st_size, found.st_ino
        return None

    def _activate(self) -> None:
        from ..policy.document import Policy

        content = content_of(read_file(self._path, "--policy")[1])
        active = self._platform.policy(self.workspace_id)
        problem = ""
        try:
            policy = Policy.from_content(content)
            if active is None or active["hash"] != policy.hash:
                active = self._platform.set_policy(self.workspace_id, content)
        except PolicyIntegrityError as error:
            problem = str(error)
        except APIError as error:
            problem = error.message
        if problem or active is None:
            raise CommandError(f"--policy: cannot use {self._path!r}: {problem}")
        for warning in policy.warnings:
            terminal.note(terminal.clean(f"warning: {warning}; with a pinned key such a policy is refused"))
        terminal.note(f"policy {self._path}: version {active['version']} is active in {self.workspace_id}")


class _Signals(SignalQueue):
    """Receive signals while the platform runs. The second one ends the process."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def wait(self, looks: Sequence[Callable[[], None]] = ()) -> None:
        """Wait for a signal. Call each of ``looks`` a few times a second."""
        while True:
            for look in looks:
                look()
            if self.get(_SLICE) is not None:
                return

    def note(self, number: int) -> None:
        self._count += 1
        if self._count > 1:
            os._exit(INTERRUPTED)
        super().note(number)
