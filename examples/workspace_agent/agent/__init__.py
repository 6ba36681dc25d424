"""An agent for an office: it writes documents, keeps sheets and sends mail."""

from sekuire import TaskRegistry

from . import documents, mail, services, sheets

#: All that the agent can do. A test runs one capability of it by ``run_task(tasks, "mail.send", {...})``.
tasks = TaskRegistry()
for module in (services, documents, sheets, mail):
    tasks.include(module.tasks)
