"""Define the handlers of the application."""

from sekuire import TaskError
from sekuire.contrib.flask import Sekuire

from .models import Note, db

sekuire = Sekuire()


@sekuire.task("add_note", timeout=30)
def add_note(ctx, input):
    text = input.get("text")
    if not isinstance(text, str) or not text.strip():
        raise TaskError("no_text", "a note needs a text")
    note = db.session.query(Note).filter_by(task_id=ctx.task_id).first()
    if note is None:
        note = Note(text=text, task_id=ctx.task_id)
        db.session.add(note)
        db.session.commit()
    return {"note_id": note.id}
