"""What must be true after any chaos: judged from the platform's database, the runs' log and what the proxy saw."""

from __future__ import annotations

import bisect
import collections
import json
import sqlite3
from typing import Counter, Dict, FrozenSet, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

from .proxy import Beat, Seen

#: Failures that answer a task whose handler has not begun (or, of a flaky task, is not to begin again).
UNBEGUN = frozenset({"worker_paused", "worker_terminated", "worker_shutdown", "policy_unavailable"})
#: What the policy of a run denies, whatever comes in its place.
FORBIDDEN = "work.forbidden"
#: Seconds after which a worker has read an answer that was sent to it, and acted on it.
SURELY_SETTLED = 0.4
#: The processes of the second replica count from here.
FIRST_TWIN = 10_001
PLANNED = frozenset({"planned", "flaky"})


class Run(NamedTuple):
    """One run of a handler, as it noted it itself; ``process`` counts the workers' processes from 1."""

    task_id: str
    attempt: int
    pid: int
    name: str
    at: float

    @property
    def process(self) -> int:
        return int(self.name.partition("-")[0])


class Accepted(NamedTuple):
    """A completion that the platform took: under which key and attempt, and what the task was then."""

    key: str
    attempt: int
    status: str


class TaskRow(NamedTuple):
    """A task in the platform's database; ``run`` is the handler's run that its result names."""

    status: str
    code: Optional[str]
    run: Optional[str]
    at: float
    accepted: Tuple[Accepted, ...]
    capability: str = "work"


class End(NamedTuple):
    """How a worker's process ended: killed or stopped, when, and the tasks whose results its outbox held then.

    ``undelivered`` are the tasks whose results a process without an outbox named as not delivered when it stopped.
    """

    killed: bool
    at: float
    in_outbox: FrozenSet[str] = frozenset()
    undelivered: FrozenSet[str] = frozenset()
    has_outbox: bool = True


class Process(NamedTuple):
    """A worker's process: when it began, its installation if it reported one, and whether it keeps its credentials."""

    began: float
    installation_id: Optional[str] = None
    has_file: bool = True


class Evidence(NamedTuple):
    """All that a verdict needs."""

    with_outbox: bool
    submitted: Set[str]
    tasks: Dict[str, TaskRow]
    runs: Sequence[Run]
    seen: Sequence[Seen]
    ends: Dict[int, End]
    processes: Dict[int, Process] = {}
    beats: Sequence[Beat] = ()
    #: Seconds after a lease's end in which a task may still begin; None: leases are not looked at.
    grace: Optional[float] = None


class Verdict(NamedTuple):
    """The figures, and every violated invariant in words."""

    lost: int
    double_accepts: int
    runs: int
    retries: int
    extra_by_kill: int
    extra_by_drop: int
    extra_unexplained: int
    violations: List[str]
    extra_by_move: int = 0
    past_lease: int = 0


def judge(evidence: Evidence) -> Verdict:
    """Whether nothing was lost and nothing ran or was accepted twice without a reason that the contract knows."""
    violations: List[str] = []
    double = _find_double(evidence, violations)
    counts = _check_runs(evidence, violations)
    _check_results(evidence, violations)
    _check_posts(evidence, violations)
    past_lease = _check_leases(evidence, violations)
    _check_installations(evidence, violations)
    lost = _find_lost(evidence, violations)
    return Verdict(
        lost=lost,
        double_accepts=double,
        runs=len(evidence.runs),
        retries=counts["retry"],
        extra_by_kill=counts["kill"],
        extra_by_drop=counts["drop"],
        extra_unexplained=counts["unexplained"],
        violations=violations,
        extra_by_move=counts["move"],
        past_lease=past_lease,
    )


def _find_lost(evidence: Evidence, violations: List[str]) -> int:
    missing = evidence.submitted - set(evidence.tasks)
    violations += [f"{task_id}: submitted, and not in the database" for task_id in sorted(missing)]
    open_ones = [task_id for task_id, row in evidence.tasks.items() if row.status not in ("completed", "failed")]
    violations += [f"{one}: no completion was accepted, it is {evidence.tasks[one].status}" for one in open_ones]
    return len(missing) + len(open_ones)


def _find_double(evidence: Evidence, violations: List[str]) -> int:
    double = 0
    for task_id, row in evidence.tasks.items():
        final = [one for one in row.accepted if one.status in ("completed", "failed")]
        if len(final) > 1:
            double += 1
            violations.append(f"{task_id}: {len(final)} completions were accepted: {final}")
        elif not final and row.status in ("completed", "failed"):
            violations.append(f"{task_id}: it is {row.status} without an accepted completion")
    return double


def _check_results(evidence: Evidence, violations: List[str]) -> None:
    """The accepted result is that of a run that happened, or of none where it says so."""
    runs = _by_task(evidence.runs)
    for task_id, row in evidence.tasks.items():
        names = [run.name for run in runs.get(task_id, ())]
        if row.capability == FORBIDDEN:
            if names:
                violations.append(f"{task_id}: ran as {names} although the policy denies {FORBIDDEN}")
            elif row.status == "completed" or row.code not in (*UNBEGUN, "policy_denied"):
                violations.append(f"{task_id}: {row.status} with {row.code} although the policy denies {FORBIDDEN}")
            continue
        is_planned = row.status == "completed" or row.code in PLANNED
        if is_planned and row.run not in names:
            violations.append(f"{task_id}: its result is of run {row.run}, and its runs were {names}")
        elif row.status == "failed" and not is_planned and row.code not in UNBEGUN:
            violations.append(f"{task_id}: failed with {row.code}, which nothing here should cause")


def _check_runs(evidence: Evidence, violations: List[str]) -> Counter[str]:
    """Every run of a task after its first one has an explanation."""
    counts: Counter[str] = collections.Counter()
    is_shared = any(number >= FIRST_TWIN for number in evidence.processes)
    posted = {seen.run for seen in evidence.seen if seen.kind == "posted" and seen.run}
    dropped = {seen.task_id for seen in evidence.seen if seen.kind == "dropped"}
    for task_id, runs in _by_task(evidence.runs).items():
        row = evidence.tasks.get(task_id)
        if row is None:
            violations.append(f"{task_id}: ran, and is not in the database")
            continue
        for before, after in zip(runs, runs[1:]):
            if _is_tried_again(row, before, after):
                counts["retry"] += 1
                continue
            if is_shared and _is_moved(row, runs, before, after):
                counts["move"] += 1
                continue
            problem = _unexplained(evidence, row, before, after, before.name in posted, task_id in dropped)
            if problem is None:
                counts["drop" if task_id in dropped else "kill"] += 1
            else:
                counts["unexplained"] += 1
                violations.append(f"{task_id}: ran again as {after.name} (attempt {after.attempt}) after {before.name}"
                                  f" (attempt {before.attempt}) although {problem}")  # fmt: skip
    return counts


def _is_tried_again(row: TaskRow, before: Run, after: Run) -> bool:
    """Return True if the platform accepted a retryable failure between two runs."""
    return any(before.attempt <= one.attempt < after.attempt and one.status == "queued" for one in row.accepted)


def _is_moved(row: TaskRow, runs: Sequence[Run], before: Run, after: Run) -> bool:
    """Return True if the platform gave the task to the other replica, which has no result of an earlier run of it.

    Each of the two was given the task under a number of its own. The one with the lower number may run it last: the
    task waited there while the platform, whose stream to it had broken, gave it to the other.
    """
    is_other = (before.process >= FIRST_TWIN) != (after.process >= FIRST_TWIN)
    own = [run for run in runs[: runs.index(after)] if run.process == after.process]
    return is_other and after.attempt != before.attempt and all(_is_tried_again(row, run, after) for run in own)


def _unexplained(
    evidence: Evidence, row: TaskRow, before: Run, after: Run, was_posted: bool, was_dropped: bool
) -> Optional[str]:
    """Why the process of ``before`` does not explain a second run; None where it does."""
    if before.process == after.process:
        return "the process is the same"
    if was_dropped:
        # The platform did not know it; another process cannot know that the result was there once.
        return None
    end = evidence.ends.get(before.process)
    if end is None:
        return f"process {before.process} has not ended"
    if not end.killed and before.task_id not in end.undelivered:
        return f"process {before.process} was stopped in order"
    with_outbox = evidence.with_outbox and end.has_outbox
    if with_outbox and before.task_id in end.in_outbox:
        return "its result was in the outbox"
    if with_outbox and was_posted:
        return "its result had been sent, so it was in the outbox before"
    if row.status in ("completed", "failed") and row.at < end.at:
        return f"its result was accepted {end.at - row.at:.3f} s before the process ended"
    return None


def _check_posts(evidence: Evidence, violations: List[str]) -> None:
    """What was sent for one task: a key has one result, nothing follows a drop, a failure answers one try only."""
    run_of_key: Dict[str, str] = {}
    given: Counter[str] = collections.Counter()
    after_drop: Counter[str] = collections.Counter()
    dropped: Set[Tuple[str, str]] = set()
    settled: Dict[str, Seen] = {}
    answered: Dict[str, Seen] = {}
    for seen in evidence.seen:
        task_id = seen.task_id
        if seen.kind == "given":
            given[task_id] += 1
            accepted = settled.pop(task_id, None)
            if accepted is not None and seen.at - accepted.at > SURELY_SETTLED:
                # The platform took a failure and tries again: what comes next is another run's result. Where both come
                # at once, a worker may see the next try first, and rightly take it for a repetition of this one.
                answered[task_id] = accepted
            continue
        mine = (task_id, seen.worker_id)
        if seen.kind == "dropped":
            dropped.add(mine)
            continue
        if seen.kind == "accepted":
            if seen.run:
                settled[task_id] = seen
            continue
        old = answered.get(task_id)
        is_same = old is not None and (old.run, old.worker_id) == (seen.run, seen.worker_id)
        if old is not None and is_same and old.key != seen.key:
            violations.append(f"{task_id}: the result of run {seen.run} was accepted as {old.key}, and when the task "
                              f"was given again, sent as {seen.key}")  # fmt: skip
        if mine in dropped:
            # Only because it was given again: the first time is what the dropped result was for.
            dropped.discard(mine)
            after_drop[task_id] += 1
            if after_drop[task_id] >= given[task_id]:
                violations.append(f"{task_id}: sent again by {seen.worker_id} after the platform's 404")
        known = run_of_key.setdefault(seen.key, seen.run)
        if known != seen.run:
            violations.append(f"{task_id}: the key {seen.key} came with results of run {known!r} and of {seen.run!r}")
        if seen.key not in (f"{task_id}:{seen.attempt}", f"{task_id}:{seen.attempt}:2"):
            violations.append(f"{task_id}: attempt {seen.attempt} was sent with the key {seen.key!r}")


def _check_leases(evidence: Evidence, violations: List[str]) -> int:
    """Check that no handler began after its lease and the grace had ended, whatever answered the heartbeats."""
    if evidence.grace is None:
        return 0
    beats: Dict[str, List[Beat]] = {}
    for beat in evidence.beats:
        if beat.ends is not None:
            beats.setdefault(beat.installation_id, []).append(beat)
    times = {installation_id: [beat.at for beat in mine] for installation_id, mine in beats.items()}
    past = 0
    for run in evidence.runs:
        process = evidence.processes.get(run.process)
        if process is None or process.installation_id is None:
            continue
        mine = beats.get(process.installation_id, [])
        last = bisect.bisect_right(times.get(process.installation_id, []), run.at)
        # A beat of the process before proves nothing to this one.
        ends = [beat.ends for beat in mine[max(0, last - 1) : last] if beat.at >= process.began]
        if ends and ends[0] is not None and run.at > ends[0] + evidence.grace:
            past += 1
            violations.append(f"{run.task_id}: began as {run.name} {run.at - ends[0]:.1f} s after the lease had ended")
    return past


def _check_installations(evidence: Evidence, violations: List[str]) -> None:
    """Check that each replica is an installation of its own: one for each credentials file or process without one."""
    owners: Dict[str, Set[str]] = {}
    files: Dict[str, Set[str]] = {}
    for number, process in evidence.processes.items():
        if process.installation_id is None:
            continue
        file = "twin" if number >= FIRST_TWIN else "first"
        owner = file if process.has_file else f"process {number}"
        owners.setdefault(process.installation_id, set()).add(owner)
        if process.has_file:
            files.setdefault(file, set()).add(process.installation_id)
    for installation_id, names in owners.items():
        if len(names) > 1:
            violations.append(f"{installation_id}: one installation of {len(names)} replicas: {sorted(names)}")
    for file, found in files.items():
        if len(found) > 1:
            violations.append(f"the {file} credentials file had {len(found)} installations: {sorted(found)}")


def _by_task(runs: Iterable[Run]) -> Dict[str, List[Run]]:
    found: Dict[str, List[Run]] = {}
    for run in runs:
        found.setdefault(run.task_id, []).append(run)
    return found


# -- where the evidence is --------------------------------------------------------------------------------------------


def read_runs(path: str) -> List[Run]:
    """The runs' log."""
    runs = []
    try:
        with open(path, encoding="ascii") as file:
            for line in file:
                task_id, attempt, pid, name, at = line.split()
                runs.append(Run(task_id, int(attempt), int(pid), name, float(at)))
    except FileNotFoundError:
        pass
    return runs


def read_tasks(path: str) -> Dict[str, TaskRow]:
    """Every task of a platform's database, with what was accepted for it. The platform must not run."""
    database = sqlite3.connect(path)
    try:
        accepted: Dict[str, List[Accepted]] = {}
        for task_id, key, answer in database.execute("SELECT task_id, key, answer FROM completions"):
            told = json.loads(answer)
            accepted.setdefault(task_id, []).append(Accepted(key, told["attempt"], told["status"]))
        tasks = {}
        query = "SELECT task_id, status, result, updated_at, capability FROM tasks"
        for task_id, status, result, at, capability in database.execute(query):
            code, run = _result(result)
            tasks[task_id] = TaskRow(status, code, run, at, tuple(accepted.get(task_id, ())), capability)
        return tasks
    finally:
        database.close()


def count_tasks(path: str) -> int:
    """How many tasks a platform's database holds. The platform must not run."""
    database = sqlite3.connect(path)
    try:
        return int(database.execute("SELECT count(*) FROM tasks").fetchone()[0])
    finally:
        database.close()


def _result(text: Optional[str]) -> Tuple[Optional[str], Optional[str]]:
    result = json.loads(text) if text else {}
    error = result.get("error")
    if error:
        return error["code"], (error.get("details") or {}).get("run")
    return None, (result.get("output") or {}).get("run")


def read_outbox(path: Optional[str]) -> FrozenSet[str]:
    """The tasks whose results an outbox holds. No worker may use it now."""
    if path is None:
        return frozenset()
    try:
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    except sqlite3.Error:
        return frozenset()
    try:
        return frozenset(row[0] for row in database.execute("SELECT task_id FROM completion"))
    except sqlite3.OperationalError:
        # Killed before it had made its tables.
        return frozenset()
    finally:
        database.close()
