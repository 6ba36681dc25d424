"""Declare the Django app and register its checks."""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks


class SekuireConfig(AppConfig):
    """Register the checks. This is the app's entry in ``INSTALLED_APPS``; it starts nothing."""

    name = "sekuire.contrib.django"
    label = "sekuire"
    verbose_name = "Sekuire"

    def ready(self) -> None:
        from . import checks as own

        checks.register(own.check_settings, own.TAG)
        checks.register(own.check_handlers, own.TAG)
        checks.register(own.check_security, own.TAG, deploy=True)
