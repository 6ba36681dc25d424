"""Define the database: one table of notes."""

from flask_sqlalchemy import SQLAlchemy

db = SQLAlchemy()


class Note(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    text = db.Column(db.Text, nullable=False)
    #: The task that wrote the note: a redelivered task must not write it twice.
    task_id = db.Column(db.Text, unique=True, nullable=False)
