"""Check the project's settings and the platform, and say how to fix what is wrong: ``manage.py sekuire_doctor``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, ClassVar, List

from django.core.management.base import BaseCommand

from sekuire.contrib.django import conf
from sekuire.contrib.settings import diagnose
from sekuire.service.findings import GOOD, WARNING, WRONG, Finding


class Command(BaseCommand):
    """Do what ``sekuire doctor`` does, with the settings that the worker of this project has."""

    help = "Check the settings, the credentials and the way to the platform, and say how to fix what is wrong."
    # The checks of the project report a wrong setting before this command could say how to fix it.
    requires_system_checks: ClassVar[List[str]] = []

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.allow_abbrev = False
        parser.add_argument("--json", action="store_true", help="print all findings as one JSON object")

    def handle(self, *args: Any, **options: Any) -> None:
        findings = diagnose(conf.read, (lambda finding: None) if options["json"] else self._show)
        if options["json"]:
            self.stdout.write(json.dumps(findings.as_json(), indent=2))
        else:
            self.stdout.write("\n" + findings.verdict())
        if findings.exit_code:
            sys.exit(findings.exit_code)

    def _show(self, finding: Finding) -> None:
        styles = {GOOD: self.style.SUCCESS, WARNING: self.style.WARNING, WRONG: self.style.ERROR}
        label = finding.state.ljust(8)
        painted = styles[finding.state](label) if finding.state in styles else label
        for line in finding.lines(painted):
            self.stdout.write(line)
