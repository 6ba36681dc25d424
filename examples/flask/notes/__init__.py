"""Make the application: a notebook whose notes a Sekuire worker writes."""

import os

import click
import flask

from . import pages, tasks
from .models import db


def create_app(**config):
    app = flask.Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///" + os.path.abspath("notes.db")
    app.config.from_prefixed_env("NOTES")
    app.config.update(config)
    db.init_app(app)
    tasks.sekuire.init_app(app)
    app.register_blueprint(pages.blueprint)
    app.cli.add_command(init_db)
    return app


@click.command("init-db")
@flask.cli.with_appcontext
def init_db():
    """Make the tables."""
    db.create_all()
