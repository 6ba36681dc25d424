"""What a process holds: threads, descriptors, memory, and objects by type; and what of it has grown."""

from __future__ import annotations

import collections
import gc
import os
import re
import sys
import threading
from typing import Any, Dict, List, Tuple

import attrs

#: Threads of the library by the beginning of their name, each with the most there may be of it; ``task`` and
#: ``report`` are pools that fill on need.
_SINGLE = ("stream", "heartbeat", "timer", "callback", "refresh", "shutdown")
_REPORT_THREADS = 4

#: What may grow without being a leak: pages that the allocator keeps, a table that doubled, a cache of the interpreter.
RSS_KIB, RSS_SHARE = 8 * 1024, 0.10
OBJECTS, OBJECTS_SHARE = 3000, 0.03
OWN_OBJECTS = 100


def snapshot() -> Dict[str, Any]:
    """What this process holds now, as JSON. Collects garbage first."""
    gc.collect()
    types = collections.Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())
    return {
        "threads": sorted(one.name for one in threading.enumerate() if one is not threading.main_thread()),
        "descriptors": descriptors(),
        "rss_kib": rss_kib(),
        "blocks": sys.getallocatedblocks(),
        "objects": sum(types.values()),
        # Types with a few objects only are of no interest, unless they are the library's.
        "types": {name: count for name, count in types.items() if count > 50 or name.startswith("sekuire.")},
    }


def descriptors() -> int:
    """How many file descriptors this process has open; 0 where that cannot be told."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def rss_kib() -> int:
    """Resident memory in KiB; 0 where that cannot be told."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    except OSError:
        return 0


@attrs.frozen
class Held:
    """One snapshot, as it came from the worker's process."""

    threads: List[str]
    descriptors: int
    rss_kib: int
    blocks: int
    objects: int
    types: Dict[str, int]

    @classmethod
    def of(cls, message: Dict[str, Any]) -> Held:
        return cls(**{field.name: message[field.name] for field in attrs.fields(cls)})

    def groups(self) -> Dict[str, int]:
        """How many threads there are by the kind of their name: ``sekuire-task_3`` is a ``task``."""
        return dict(collections.Counter(_kind(name) for name in self.threads))


def growth(start: Held, end: Held, most: int = 12) -> List[Tuple[str, int, int]]:
    """The types whose objects became more, the most first: name, how many at the start, how many at the end."""
    found = [(name, start.types.get(name, 0), count) for name, count in end.types.items()]
    return sorted((one for one in found if one[2] > one[1]), key=lambda one: one[1] - one[2])[:most]


def verdict(start: Held, end: Held, max_workers: int, is_warm: bool = True) -> List[str]:
    """What is wrong at the end of a run, in sentences; nothing where all is well.

    :param is_warm: whether the start was measured with everything filled that fills once (the memory of finished
        tasks); otherwise growth of memory proves nothing, and only threads and descriptors are judged.
    """
    problems = []
    for kind, count in end.groups().items():
        bound = _bound(kind, max_workers)
        if count > bound:
            problems.append(f"{count} threads of kind {kind!r}, of which there may be {bound}")
    # A kept connection belongs to a thread that posts; the pools of threads fill on need.
    room = sum(_bound(kind, max_workers) for kind in (*_SINGLE, "task", "report"))
    if end.descriptors > start.descriptors + room:
        problems.append(f"descriptors grew from {start.descriptors} to {end.descriptors}")
    if not is_warm:
        return problems
    if end.rss_kib > start.rss_kib + max(RSS_KIB, start.rss_kib * RSS_SHARE):
        problems.append(f"resident memory grew from {start.rss_kib} to {end.rss_kib} KiB")
    if end.objects > start.objects + max(OBJECTS, start.objects * OBJECTS_SHARE):
        problems.append(f"objects grew from {start.objects} to {end.objects}")
    problems += [
        f"objects of {name} grew from {before} to {after}"
        for name, before, after in growth(start, end, most=len(end.types))
        if name.startswith("sekuire.") and after > before + OWN_OBJECTS
    ]
    return problems


def left(before: Held, after: Held) -> List[str]:
    """What a stopped worker has left behind, in sentences."""
    problems = [f"the thread {name} is left" for name in after.threads if name not in before.threads]
    if after.descriptors > before.descriptors:
        problems.append(f"{after.descriptors - before.descriptors} descriptors are left")
    return problems


def _kind(name: str) -> str:
    match = re.match(r"sekuire-([a-z]+(?:-[a-z]+)*)", name)
    return match.group(1) if match else name


def _bound(kind: str, max_workers: int) -> int:
    return {"task": 2 * max_workers, "report": _REPORT_THREADS}.get(kind, 1)
