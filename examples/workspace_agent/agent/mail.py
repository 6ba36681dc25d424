"""Send mail: one message, or a letter to everybody in a sheet."""

from dataclasses import dataclass

from sekuire import TaskError, TaskRegistry

tasks = TaskRegistry()

#: The office's own domain. Mail to any other is the tool ``external-mail``, which a policy can forbid.
DOMAIN = "example.com"


@dataclass
class Message:
    to: str
    subject: str
    text: str = ""


@dataclass
class Letter:
    document_id: str
    sheet_id: str
    column: str = "email"


@tasks.task("mail.send", timeout=30)
def send(ctx, input: Message, *, outbox):
    """Send one message."""
    deliver(ctx, outbox, ctx.task_id, input)
    return {"message_id": ctx.task_id}


@tasks.task("mail.merge", timeout=600, max_concurrency=1)
def merge(ctx, input: Letter, *, documents, sheets, outbox):
    """Send a document to each address in a column of a sheet."""
    document, sheet = documents.get(input.document_id), sheets.get(input.sheet_id)
    if input.column not in sheet.columns:
        raise TaskError("no_such_column", f"the sheet has the columns {', '.join(sheet.columns)}")
    at = sheet.columns.index(input.column)
    rows = list(sheet.rows)
    for number, row in enumerate(rows):
        # Between two messages, where a stop does no harm.
        ctx.raise_if_cancelled()
        ctx.report_progress(number / len(rows), f"to {row[at]}")
        deliver(ctx, outbox, f"{ctx.task_id}/{number}", Message(row[at], document.title, document.text))
    return {"sent": len(rows)}


@tasks.task("mail.list")
def list_messages(ctx, input, *, outbox):
    """List what has been sent."""
    return [{"to": one.to, "subject": one.subject} for one in outbox.all()]


def deliver(ctx, outbox, message_id, message):
    """Send a message, unless one with this id has been sent: a task may be delivered again."""
    name, _, domain = message.to.partition("@")
    if not name or not domain:
        raise TaskError("bad_address", f"{message.to!r} is not an address of mail", details={"to": message.to})
    if domain.lower() != DOMAIN:
        ctx.policy.enforce_tool("external-mail")
    outbox.add(message_id, message)
    ctx.logger.info("sent %s to %s", message_id, message.to)
