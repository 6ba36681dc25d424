"""Run the project's handlers as a worker: ``manage.py run_sekuire_worker``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, List

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from sekuire.config import shown_address
from sekuire.contrib.django import conf
from sekuire.errors import SekuireError
from sekuire.service import runner
from sekuire.service.arguments import IDLE_WITH_RELOAD, add_worker_arguments
from sekuire.service.exit_codes import USAGE, code_of
from sekuire.service.reloader import Reloader, program
from sekuire.worker.worker import Worker


class Command(BaseCommand):
    """Run a worker until SIGTERM or Ctrl-C drains it. A second signal stops it at once."""

    help = "Run the handlers of all sekuire_tasks.py. SIGTERM and Ctrl-C drain the worker; a second one stops at once."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.allow_abbrev = False
        add_worker_arguments(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        problem: SekuireError
        try:
            code = self._reload(options) if options["reload"] else self._run(options)
        except SekuireError as error:
            problem = error
        else:
            if code:
                sys.exit(code)
            return
        raise CommandError(str(problem), returncode=code_of(problem))

    def _run(self, options: Any) -> int:
        changed = {name: options[name] for name in ("max_workers", "stop_when_idle")}
        changed["health"] = options["http"]

        def make() -> Worker:
            options = {name: value for name, value in changed.items() if value is not None}
            return conf.make_worker(conf.read().sdk(), **options)

        return runner.run(make, self._report, options["liveness_file"])

    def _report(self, error: SekuireError) -> int:
        self.stderr.write(self.style.ERROR(f"the worker stopped: {error}"))
        return code_of(error)

    def _reload(self, options: Any) -> int:
        if options["stop_when_idle"] is not None:
            raise CommandError(IDLE_WITH_RELOAD, returncode=USAGE)
        command = [*self._program(options), *_arguments(options)]
        return Reloader(command, [os.getcwd()], say=lambda line: self.stderr.write(f"reload: {line}")).run()

    def _program(self, options: Any) -> List[str]:
        """Return the start of the child's command line: this process's own or, in another program, Django's."""
        name = type(self).__module__.rpartition(".")[2]
        if getattr(self, "_called_from_command_line", False):
            return [*program(), name]
        module = getattr(settings, "SETTINGS_MODULE", None)
        if module is None:
            raise CommandError("a reload needs settings that are a module (DJANGO_SETTINGS_MODULE)", returncode=USAGE)
        # Python puts only the other program's own directory on the path.
        found = {"settings": module, "pythonpath": os.path.abspath(sys.path[0])}
        options.update({key: value for key, value in found.items() if options.get(key) is None})
        return [sys.executable, "-m", "django", name]


def _arguments(options: Any) -> List[str]:
    """Return the child's arguments: those of this process without ``--reload``."""
    line: List[str] = []
    for key in ("settings", "pythonpath", "verbosity", "max_workers", "liveness_file"):
        if options.get(key) is not None:
            line.append(f"--{key.replace('_', '-')}={options[key]}")
    if options.get("http") is not None:
        # A program that calls this command may give either form.
        given = options["http"]
        line.append(f"--http={given if isinstance(given, str) else shown_address(given)}")
    for key in ("traceback", "no_color", "force_color", "skip_checks"):
        if options.get(key):
            line.append(f"--{key.replace('_', '-')}")
    return line
