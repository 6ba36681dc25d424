"""Handlers that tell what they find around them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Dict, List

from asgiref.sync import async_to_sync, sync_to_async
from django.db import connection, transaction
from django.utils import timezone, translation

from sekuire.contrib.django import task

from .models import Note


@task("look")
def look(ctx: Any, input: Any) -> Dict[str, Any]:
    """What a task begins with; then it leaves traces."""
    was_open = connection.connection is not None
    queries = len(connection.queries_log)
    language, zone = translation.get_language(), timezone.get_current_timezone_name()
    translation.activate("fr")
    timezone.activate("Asia/Tokyo")
    count = Note.objects.count()
    return {
        "was_open": was_open,
        "queries": queries,
        "language": language,
        "zone": zone,
        "count": count,
        "connection": id(connection.connection),
    }


@task("spoil")
def spoil(ctx: Any, input: Any) -> None:
    """Leave a transaction open."""
    transaction.set_autocommit(False)
    Note.objects.create(text="not committed")


#: Two database threads of async handlers meet here.
MEETING = threading.Barrier(2)


@task("async")
async def async_look(ctx: Any, input: Any) -> Dict[str, Any]:
    """What an async task begins with; then it leaves traces."""

    def look_in_thread() -> List[Any]:
        found = [connection.connection is not None, translation.get_language(), timezone.get_current_timezone_name()]
        translation.activate("fr")
        timezone.activate("Asia/Tokyo")
        return found

    found = await sync_to_async(look_in_thread)()
    return {"found": found, "language": translation.get_language(), "count": await Note.objects.acount()}


@task("async-spoil")
async def async_spoil(ctx: Any, input: Any) -> None:
    """Leave a transaction open."""
    await sync_to_async(transaction.set_autocommit)(False)
    await Note.objects.acreate(text="not committed")


@task("async-write")
async def async_write(ctx: Any, input: Any) -> int:
    note = await Note.objects.acreate(text="kept")
    return int(note.pk)


@task("async-cut")
async def async_cut(ctx: Any, input: Any) -> None:
    """Do what a restart of the database server does to a connection."""

    def cut() -> None:
        Note.objects.count()
        connection.connection.close()

    await sync_to_async(cut)()


@task("async-meet")
async def async_meet(ctx: Any, input: Any) -> int:
    """Hold the database's thread until the other handler holds its own."""

    def meet() -> int:
        Note.objects.count()
        MEETING.wait(60)
        return id(connection.connection)

    return await sync_to_async(meet)()


@task("async-elsewhere")
async def async_elsewhere(ctx: Any, input: Any) -> int:
    """Use the ORM in a thread that asgiref does not know, and in a task that the handler leaves behind."""

    async def last() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await Note.objects.acount()

    left = asyncio.ensure_future(last())
    await asyncio.sleep(0)
    assert not left.done()
    return await asyncio.to_thread(Note.objects.count) if hasattr(asyncio, "to_thread") else 0


@task("plain-with-loop")
def plain_with_loop(ctx: Any, input: Any) -> int:
    """A plain handler that runs coroutines itself, in both ways."""
    asyncio.run(async_write(ctx, input))
    return int(async_to_sync(async_write)(ctx, input))
