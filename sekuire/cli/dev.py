"""Run the local platform as a server to develop against: ``sekuire dev``."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import time
from typing import TYPE_CHECKING, Callable, Iterator, List, Mapping, Optional, Sequence, Tuple

from .._internal.signals import DRAINING, ENDING, SignalQueue
from ..config import CREDENTIALS_FILE_VARIABLE, ENVIRONMENT
from ..envfile import DEFAULT_NAME
from ..errors import APIError, ConfigurationError, PolicyIntegrityError
from . import shells, terminal
from .child import Child, environment, find_program
from .exits import FAILED, INTERRUPTED, OK, CommandError
from .home import Home, write_env_file
from .narrator import Narrator
from .options import local_platform
from .policy import content_of, read_file

if TYPE_CHECKING:
    from ..local import Faults, LocalPlatform

DESCRIPTION = """\
Run a local platform until Ctrl-C or SIGTERM, and print the environment variables with which agents and the other
commands find it. stdout holds nothing but these lines, to be pasted into a shell; stderr has a line for each connect,
task, failure, denial and request for approval. Keys, tokens and tasks are kept in .sekuire/ of the current directory,
and the variables in .env, if there is none yet. With a COMMAND, run it with the variables set, pass signals on to it,
and end with it."""
EPILOG = """\
example:  sekuire dev
          sekuire dev -- python agent.py

Exit codes: 0 stopped by Ctrl-C or SIGTERM, which is its normal end; 2 the port is taken, or another wrong setting;
130 ended by a second signal while it was stopping. With a COMMAND: its exit code (128 + the number of the signal that
ended it)."""
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
#: Seconds that a command has after the second signal.
_AFTER_SECOND = 5.0
#: What another platform's login would be for a command that runs beside this one.
_OTHER_LOGINS = (
    ENVIRONMENT["runtime_token"],
    ENVIRONMENT["refresh_token"],
    ENVIRONMENT["installation_id"],
    CREDENTIALS_FILE_VARIABLE,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=_port, default=9300, help="where to listen (default 9300; 0: any free port)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default 127.0.0.1)")
    parser.add_argument("--db", metavar="PATH", help="keep keys, tokens and tasks in this file (.sekuire/dev.db)")
    parser.add_argument("--ephemeral", action="store_true", help="keep everything in memory, and write no .env")
    parser.add_argument(
        "--reset", action="store_true", help="delete what is kept: make new keys and tokens and an empty store"
    )
    parser.add_argument(
        "--env-file",
        dest="env_path",
        metavar="FILE",
        help="write the variables into this file, if there is none (default .env)",
    )
    parser.add_argument(
        "--shell", choices=shells.SHELLS, help="whose form the printed lines have (default: as far as can be seen)"
    )
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
    parser.add_argument("--no-ui", action="store_true", help="serve no dashboard")
    parser.add_argument("--open", action="store_true", dest="opens", help="open the dashboard in a browser")
    parser.add_argument(
        "--link",
        action="store_true",
        help="print another link to the dashboard of the platform that runs already, as .env or the environment names "
        "it, and exit",
    )
    parser.add_argument("--show-logs", action="store_true", help="print every audit event as a line on stderr")
    parser.add_argument("program", nargs="*", metavar="-- COMMAND", help="a program to run, with its arguments")
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
    if args.link:
        return _print_link(args)
    if args.opens and args.no_ui:
        raise CommandError("--open opens the dashboard, so it does not go with --no-ui")
    platform_class = local_platform()
    faults = _faults(args)
    if args.ephemeral and (args.db is not None or args.reset):
        raise CommandError(f"--ephemeral keeps nothing, so it does not go with {'--reset' if args.reset else '--db'}")
    if args.program:
        find_program(args.program[0], os.environ)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(_Signals(ends_process=not args.program))
        home = None if args.ephemeral else stack.enter_context(Home(args.db))
        with _naming_flags():
            if args.reset and home is not None:
                _reset(home.path)
            path = None if home is None else home.path
            platform = platform_class(
                path, args.host, args.port, allowed_hosts=args.allow_host, faults=faults, ui=not args.no_ui
            )
            platform.start()
        try:
            with _naming_flags():
                token = platform.reuse_install_token(args.agent_id, _USES)
            code = _serve(args, platform, token, home, signals)
        finally:
            platform.stop()
    if args.fault:
        counts = ", ".join(f"{kind.replace('_', '-')} {n}" for kind, n in faults.injected.items() if n)
        terminal.note(f"injected: {counts or 'nothing'}")
    terminal.note("stopped")
    return code


def _serve(
    args: argparse.Namespace, platform: LocalPlatform, token: str, home: Optional[Home], signals: _Signals
) -> int:
    """Say where the platform is, and what happens on it, until a signal comes or the command has ended."""
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
    if home is not None:
        home.publish(platform.url)
    if not args.program:
        # With a command, stdout is the command's.
        terminal.say("\n".join(shells.lines(variables, args.shell or shells.detect())))
    terminal.note(f"the local platform runs on {platform.url}; Ctrl-C stops it")
    if not args.no_ui:
        link = platform.dashboard_link()
        terminal.note(f"dashboard: {link}")
        if args.opens:
            _open(link)
    kept = "in memory only" if home is None else f"in {home.path}; --reset makes it new"
    terminal.note(f"keys, tokens and tasks are kept {kept}")
    env_path = args.env_path or (None if args.ephemeral else DEFAULT_NAME)
    if env_path is not None:
        terminal.note(write_env_file(env_path, variables))
    for fault in args.fault and platform.faults.standing:
        terminal.note(f"fault: {fault}")
    if args.fault:
        terminal.note(f"fault seed: {platform.faults.seed}")
    narrator = Narrator(platform, shows_logs=args.show_logs)
    looks = [narrator.look] if policy is None else [policy.look, narrator.look]
    if args.program:
        code = _run_command(args, variables, signals, looks)
    else:
        signals.wait(looks)
        code = OK
    # What came between the last look and the signal.
    narrator.look(is_last=True)
    return code


def _open(link: str) -> None:
    import webbrowser

    is_opened = False
    with contextlib.suppress(Exception):
        is_opened = webbrowser.open(link)
    if not is_opened:
        terminal.note("no browser could be started; open the link yourself")


def _print_link(args: argparse.Namespace) -> int:
    """Ask the platform that runs for a link to its dashboard, and print it."""
    from .. import envfile
    from ..config import ConnectionConfig, using_file, variable
    from ..errors import TransportError
    from ..transport.http import HttpClient
    from .options import api_key, key_header

    found = envfile.find() if args.env_path is None else envfile.read(args.env_path)
    with using_file(found):
        url = variable(ENVIRONMENT["api_base_url"]) or f"http://127.0.0.1:{args.port}"
        if found is not None:
            envfile.check_credentials(found, {}, variable(CREDENTIALS_FILE_VARIABLE))
        key, where = api_key(None)
    client = HttpClient(ConnectionConfig(api_base_url=url), pool_size=1)
    problem = ""
    try:
        reply = client.request("POST", "/ui/links", credential=key_header(key), body=b"", timeout=10.0)
        link = reply.json().get("url") if reply.status == 201 else None
    except TransportError as error:
        problem = f"no platform answers at {url} ({error}); start it: sekuire dev"
        raise CommandError(problem, code=FAILED) from None
    finally:
        client.close()
    if reply.status == 401:
        problem = f"the platform at {url} does not accept the key of {where}; it belongs to another one"
    elif not isinstance(link, str):
        problem = f"the platform at {url} has no dashboard; start it without --no-ui"
    if problem:
        raise CommandError(problem, code=FAILED)
    terminal.say(str(link))
    return OK


def _run_command(
    args: argparse.Namespace, variables: Mapping[str, str], signals: _Signals, looks: Sequence[Callable[[], None]]
) -> int:
    """Run the command until it ends, and return its exit code. The platform is there for its last reports."""
    command: List[str] = args.program
    name = terminal.clean(" ".join(command))
    prefix = terminal.clean(args.agent_id)

    def say(line: str, is_stdout: bool) -> None:
        # On a thread for each of its two outputs.
        text = f"{prefix} | {line}"
        if not is_stdout:
            terminal.note(text)
            return
        with contextlib.suppress(terminal.OutputClosed, CommandError):
            terminal.say(text)

    environ, left_out = environment(os.environ, variables, _OTHER_LOGINS)
    if left_out:
        terminal.note(f"{', '.join(left_out)} of another platform: not set for {command[0]}")
    child = Child(command, environ, say)
    code = OK
    try:
        terminal.note(f"started {name} (process {child.pid})")
        _until_ended(child, name, signals, looks)
    finally:
        code = child.close()
    terminal.note(f"{name} ended with exit code {code}")
    return code


def _until_ended(child: Child, name: str, signals: _Signals, looks: Sequence[Callable[[], None]]) -> None:
    """Pass signals on until the command has ended. It is killed some seconds after the second signal."""
    count = 0
    kill_at = math.inf
    while not child.has_ended():
        for look in looks:
            look()
        number = signals.get(_SLICE)
        if number is not None:
            count += 1
            child.signal(number)
            if count == 1:
                terminal.note(f"stopping: waiting for {name} to end")
            kill_at = time.monotonic() + _AFTER_SECOND if count == 2 else kill_at
        if count > 2 or time.monotonic() >= kill_at:
            child.kill()


def _reset(path: str) -> None:
    from ..local.store import erase

    if erase(path):
        terminal.note(f"{path} was deleted: new keys and tokens, no tasks")


def _faults(args: argparse.Namespace) -> Faults:
    # local_platform() has reported a missing extra before.
    from ..local import Faults

    faults = Faults(args.fault_seed)
    with _naming_flags():
        for text in args.fault:
            faults.add(text)
    return faults


@contextlib.contextmanager
def _naming_flags() -> Iterator[None]:
    """Name the option on the command line in an error, instead of the parameter."""
    try:
        yield
        return
    except ConfigurationError as error:
        found = error
    flag = _FLAGS.get(found.option or "")
    raise CommandError(f"{flag}: {found.problem}" if flag else str(found))


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
    """Receive signals while the platform runs.

    :param ends_process: the second one ends the process. Else all are passed on to a command.
    """

    def __init__(self, *, ends_process: bool = True) -> None:
        super().__init__(ENDING if ends_process else DRAINING)
        self._ends_process = ends_process
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
        if self._count > 1 and self._ends_process:
            os._exit(INTERRUPTED)
        super().note(number)
