"""Show the notes, and count their words in a handler of the blueprint."""

import flask

from sekuire import TaskError
from sekuire.contrib.flask import tasks_of

from .models import Note, db

blueprint = flask.Blueprint("pages", __name__)
tasks = tasks_of(blueprint)


@blueprint.get("/")
def index():
    return {"notes": [note.text for note in db.session.query(Note).order_by(Note.id)]}


@tasks.task("count_words")
def count_words(ctx, input):
    note = db.session.get(Note, input.get("note_id"))
    if note is None:
        raise TaskError("no_such_note", f"there is no note {input.get('note_id')!r}")
    return {"words": len(note.text.split())}
