"""Resources and handlers at the top level of a module, for other processes to import."""

from __future__ import annotations

import os
import pathlib
import sqlite3
import time
from typing import Any, Dict, Iterator, List

from sekuire import TaskContext, TaskRegistry

#: A directory, for what each process notes.
DIRECTORY = "SHARED_RESOURCES"
GUARD = 180.0

tasks = TaskRegistry()


def note(text: str) -> None:
    with open(pathlib.Path(os.environ[DIRECTORY]) / "notes", "a", encoding="utf-8") as file:
        file.write(f"{text} {os.getpid()}\n")


def notes() -> List[str]:
    path = pathlib.Path(os.environ[DIRECTORY]) / "notes"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@tasks.resource(scope="process")
def db() -> Iterator[sqlite3.Connection]:
    note("open db")
    connection = sqlite3.connect(pathlib.Path(os.environ[DIRECTORY]) / "shared.db", timeout=GUARD)
    yield connection
    connection.close()
    note("close db")


@tasks.resource(scope="task")
def transaction(*, db: sqlite3.Connection) -> Iterator[sqlite3.Cursor]:
    cursor = db.cursor()
    try:
        yield cursor
    except BaseException as error:
        db.rollback()
        note(f"rollback {type(error).__name__}")
        raise
    db.commit()
    note("commit")


@tasks.task("book")
def book(ctx: TaskContext, input: Dict[str, Any], *, transaction: sqlite3.Cursor) -> int:
    transaction.execute("INSERT INTO bookings VALUES (?)", [input["name"]])
    if input.get("fail"):
        raise ValueError("full")
    if input.get("wait"):
        note("waiting")
        while True:
            time.sleep(0.05)
    return os.getpid()


@tasks.task("count")
def count(ctx: TaskContext, input: Any) -> List[Any]:
    [[number]] = ctx.resource("db").execute("SELECT count(*) FROM bookings").fetchall()
    return [number, os.getpid()]
