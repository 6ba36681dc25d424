"""Run the handlers of a Django project's apps, by ``manage.py run_sekuire_worker`` (extra ``django``).

Put ``"sekuire.contrib.django"`` into ``INSTALLED_APPS``, settings into ``SEKUIRE = {...}``,
and handlers into the modules ``sekuire_tasks.py`` of your apps::

    from sekuire.contrib.django import task

    @task("summarize")
    def summarize(ctx, input):
        ...
"""

try:
    import django  # noqa: F401  # Imported here, where the error can say what to install.
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"sekuire.contrib.django needs Django ({error}); run: pip install 'sekuire[django]'", name=error.name
    ) from error

from .handlers import middleware, task, tasks
from .submit import OnCommitHandle, submit_on_commit

__all__ = ["OnCommitHandle", "middleware", "submit_on_commit", "task", "tasks"]
