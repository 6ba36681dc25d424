"""``manage.py run_sekuire_worker``: the project's handlers as a worker."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from sekuire import runner
from sekuire.arguments import add_worker_arguments
from sekuire.contrib.django import conf
from sekuire.errors import SekuireError
from sekuire.exitcodes import code_of
from sekuire.reloader import Reloader
from sekuire.worker import Worker


class Command(BaseCommand):
    """Runs until SIGTERM or Ctrl-C, which drain it; a second one stops at once."""

    help = "Run the handlers of all sekuire_tasks.py. SIGTERM and Ctrl-C drain the worker; a second one stops at once."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_worker_arguments(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        problem: SekuireError
        try:
            code = self._reload() if options["reload"] else self._run(options)
        except SekuireError as error:
            problem = error
        else:
            if code:
                sys.exit(code)
            return
        raise CommandError(str(problem), returncode=code_of(problem))

    def _run(self, options: Any) -> int:
        changed = {name: options[name] for name in ("max_workers", "stop_when_idle")}

        def make() -> Worker:
            sdk = conf.read().sdk()
            worker = conf.make_worker(sdk, **{name: value for name, value in changed.items() if value is not None})
            sdk.start()
            return worker

        return runner.run(make, self._report, options["liveness_file"])

    def _report(self, error: SekuireError) -> int:
        self.stderr.write(self.style.ERROR(f"the worker stopped: {error}"))
        return code_of(error)

    def _reload(self) -> int:
        command = [sys.executable, *(one for one in sys.argv if one != "--reload")]
        return Reloader(command, [os.getcwd()], say=lambda line: self.stderr.write(f"reload: {line}")).run()
