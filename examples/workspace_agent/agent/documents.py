"""Write, read and search documents."""

from dataclasses import dataclass
from typing import List

from sekuire import TaskError, TaskRegistry

from .services import Document

tasks = TaskRegistry()


@dataclass
class NewDocument:
    title: str
    text: str = ""


@dataclass
class Addition:
    document_id: str
    text: str


@dataclass
class Which:
    document_id: str


@dataclass
class Query:
    words: str = ""
    limit: int = 10


@tasks.task("documents.create")
def create(ctx, input: NewDocument, *, documents):
    """Create a document."""
    if not input.title.strip():
        raise TaskError("no_title", "a document needs a title")
    # The id comes from the task: a task that is delivered again creates no second document.
    return documents.add(f"doc-{ctx.task_id}", Document(f"doc-{ctx.task_id}", input.title, input.text))


@tasks.task("documents.read")
def read(ctx, input: Which, *, documents):
    """Return a document with its text."""
    return documents.get(input.document_id)


@tasks.task("documents.append")
def append(ctx, input: Addition, *, documents):
    """Add a paragraph at the end of a document."""
    document = documents.get(input.document_id)
    with documents.lock:
        document.text = f"{document.text}\n\n{input.text}".strip()
    return {"document_id": document.document_id, "characters": len(document.text)}


@tasks.task("documents.search")
def search(ctx, input: Query, *, documents):
    """List the documents whose title or text has all the words."""
    words = input.words.lower().split()
    found: List[Document] = [
        one for one in documents.all() if all(word in f"{one.title} {one.text}".lower() for word in words)
    ]
    return [{"document_id": one.document_id, "title": one.title} for one in found[: input.limit]]
