"""Django: handlers found in installed apps, connections kept clean, checks, and ``manage.py run_sekuire_worker``.

The extra is ``django``. Put ``"sekuire.contrib.django"`` into ``INSTALLED_APPS``, settings into ``SEKUIRE = {...}``,
and handlers into the modules ``sekuire_tasks.py`` of your apps::

    from sekuire.contrib.django import task

    @task("summarize")
    def summarize(ctx, input):
        ...
"""

from .handlers import middleware, task, tasks
from .submit import submit_on_commit

__all__ = ["middleware", "submit_on_commit", "task", "tasks"]
