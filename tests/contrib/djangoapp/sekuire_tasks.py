"""Handlers that tell what they find around them."""

from __future__ import annotations

from typing import Any, Dict

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


@task("async")
async def async_look(ctx: Any, input: Any) -> int:
    count: int = await Note.objects.acount()
    return count
