"""Restart a command whenever source files change, each time after it has ended in order."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from .._internal.clock import time
from .._internal.signals import DRAINING, SignalQueue
from ..config import CREDENTIALS_FILE_VARIABLE
from ..errors import ConfigurationError
from .exit_codes import INTERRUPTED, OK

#: Seconds between two checks of the child.
_SLICE = 0.1
#: Milliseconds for which changes are collected: an editor saves in several steps, a checkout in hundreds.
_DEBOUNCE = 300
#: Seconds that the watch may take to start, and to end.
_PATIENCE = 10.0

#: What the main thread receives: changed files, or the number of a signal.
_Event = Union[Tuple[str, ...], int]

#: The variable in which children find the process id of their reloader.
RELOADER_VARIABLE = "SEKUIRE_RELOADER"
#: Seconds between two checks of a child that its reloader still runs.
_PARENT_SLICE = 0.5


class Reloader:
    """Run ``command`` as a child, and restart it when a Python file below ``paths`` is saved (extra ``reload``).

    The child gets SIGTERM (on Windows CTRL_BREAK), which lets a worker drain. The next child starts when it has ended.
    A child that ends by itself, because of a syntax error for example, is not started again before the next save.

    The first child may use up an install token. Therefore the children share a temporary credentials file that only
    this user can read, unless the environment names one. A child finds the process id of this process in the
    environment, and ends in order when this process has died (:func:`end_with_reloader`). It cannot be a Reloader
    itself: a command that reloads again would never stop starting processes.

    :param say: called with each line for the user, on the main thread.
    :raises ConfigurationError: the extra is not installed, a path is not a directory, or this is a reloader's child.
    """

    # Threads: run() belongs to the main thread, which alone starts and ends children. `sekuire-reload` watches the
    # files and puts changes into a queue; it ends with run(). A signal handler puts one item into the same queue.

    def __init__(self, command: Sequence[str], paths: Sequence[str], *, say: Callable[[str], None]) -> None:
        outer = os.environ.get(RELOADER_VARIABLE)
        if outer:
            raise ConfigurationError(
                f"this process was started by a reloader, that of process {outer} ({RELOADER_VARIABLE}); use only one",
                "reload",
            )
        for path in paths:
            if not os.path.isdir(path):
                raise ConfigurationError(f"there is no directory {path!r} to watch", "reload")
        self._watch = _watcher()
        self._command = list(command)
        self._paths = list(paths)
        self._say = say
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._over = threading.Event()
        self._child: Optional[subprocess.Popen[bytes]] = None
        self._first_signal: Optional[int] = None
        self._is_watching = threading.Event()

    def run(self) -> int:
        """Run until a signal has ended the child. Return the exit code: 130 after Ctrl-C, else 0."""
        # SIGHUP too: a closed terminal would leave the child behind.
        with SignalQueue(DRAINING, self._events):
            self._run()
        return INTERRUPTED if self._first_signal == signal.SIGINT else OK

    def _run(self) -> None:
        thread = threading.Thread(target=self._report_changes, name="sekuire-reload", daemon=True)
        directory = None if os.environ.get(CREDENTIALS_FILE_VARIABLE) else tempfile.mkdtemp(prefix="sekuire-")
        environ = {**os.environ, RELOADER_VARIABLE: str(os.getpid())}
        if directory is not None:
            environ[CREDENTIALS_FILE_VARIABLE] = os.path.join(directory, "credentials.json")
        try:
            thread.start()
            # A save between the import of a file and the first look at it would be missed.
            self._is_watching.wait(_PATIENCE)
            self._loop(environ)
        finally:
            self._over.set()
            if self._child is not None:
                self._child.kill()
                self._child.wait()
            thread.join(_PATIENCE)
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)

    # -- the main thread --

    def _loop(self, environ: Mapping[str, str]) -> None:
        self._begin(environ)
        while self._first_signal is None:
            event = self._next_event()
            if isinstance(event, int):
                self._first_signal = event
            elif event is not None:
                self._say(f"{_named(event)} changed; {'restarting' if self._child is None else 'draining'}")
                self._end()
                if self._first_signal is None:
                    self._begin(environ)
            else:
                self._notice_end()
        self._end()

    def _begin(self, environ: Mapping[str, str]) -> None:
        # Apart from this process's terminal and group: else Ctrl-C would reach it twice, and cut its drain short.
        options: Dict[str, Any] = {"start_new_session": True}
        if os.name == "nt":
            options = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        self._child = subprocess.Popen(self._command, env=environ, stdin=subprocess.DEVNULL, **options)

    def _notice_end(self) -> None:
        code = None if self._child is None else self._child.poll()
        if code is not None:
            self._child = None
            self._say(f"the worker has ended (exit code {code}); it starts again when a file is saved")

    def _end(self) -> None:
        """End the child in order. Further signals hurry it; files that change until it ends belong to this restart."""
        child, hurries = self._child, 0
        if child is None:
            return
        _send(child)
        while child.poll() is None:
            event = self._next_event()
            if not isinstance(event, int):
                continue
            self._first_signal = self._first_signal or event
            hurries += 1
            if hurries > 2:
                child.kill()
            else:
                _send(child)
        self._child = None

    def _next_event(self) -> Optional[_Event]:
        try:
            return self._events.get(timeout=_SLICE)
        except queue.Empty:
            return None

    # -- the watching thread --

    def _report_changes(self) -> None:
        changes = self._watch(
            *self._paths, stop_event=self._over, debounce=_DEBOUNCE, rust_timeout=200, yield_on_timeout=True,
            raise_interrupt=False,
        )  # fmt: skip
        for found in changes:
            # The first yield, of no change, shows that the watch runs.
            self._is_watching.set()
            if found:
                self._events.put(tuple(sorted(path for _, path in found)))


def program() -> List[str]:
    """Return the command line that started this process, up to its arguments, to start its program again."""
    options = [*(f"-W{one}" for one in sys.warnoptions)]
    options += [f"-X{name}" if value is True else f"-X{name}={value}" for name, value in sys._xoptions.items()]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    # `__main__` alone is a directory or an archive that holds a __main__.py, so it is started as a file.
    if spec is not None and spec.name != "__main__":
        return [sys.executable, *options, "-m", spec.parent if spec.name.endswith(".__main__") else spec.name]
    script = sys.argv[0]
    # On Windows pip installs a program, which removes the ending from its own name.
    if not os.path.exists(script) and os.path.exists(f"{script}.exe"):
        return [f"{script}.exe"]
    return [sys.executable, *options, script]


# -- in the child -----------------------------------------------------------------------------------------------------


def is_reloaded() -> bool:
    """Return True if this process is the child of a :class:`Reloader`. Its own children only inherit the variable."""
    return os.environ.get(RELOADER_VARIABLE) == str(os.getppid())


def end_with_reloader() -> None:
    """End this process as on SIGTERM when its :class:`Reloader` has died. Does nothing outside a reloader's child.

    The child has a session of its own, so it would not notice otherwise: it would go on with old code, beside the next
    child. On POSIX only: on Windows ``getppid()`` does not change when the parent dies.
    """
    if os.name == "posix" and is_reloaded():
        threading.Thread(target=_end_with, args=(os.getppid(),), name="sekuire-parent", daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_SLICE)
    # Sent to the process, not to this thread: it must reach a main thread that waits.
    os.kill(os.getpid(), signal.SIGTERM)


# -- inside -----------------------------------------------------------------------------------------------------------


def _watcher() -> Callable[..., Any]:
    try:
        import watchfiles
    except ImportError as error:
        problem = f"needs the package watchfiles ({error}); run: pip install 'sekuire[reload]'"
    else:
        only_python = watchfiles.PythonFilter()

        def watch(*paths: str, **options: Any) -> Any:
            return watchfiles.watch(*paths, watch_filter=only_python, **options)

        return watch
    raise ConfigurationError(problem, "reload")


def _named(paths: Sequence[str]) -> str:
    names: List[str] = []
    for path in paths[:3]:
        # On Windows a path on another drive has no relative form.
        try:
            names.append(os.path.relpath(path))
        except ValueError:
            names.append(path)
    return ", ".join(names) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _send(child: subprocess.Popen[bytes]) -> None:
    """Ask the child to stop in order. Does nothing if it has ended."""
    child.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM) if os.name == "nt" else signal.SIGTERM)
