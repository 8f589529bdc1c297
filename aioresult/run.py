"""The run of a task: what a store decides in one step when a task starts, ends, or is revoked.

A *run* is one attempt of a task in one process. Beside the result the store keeps a note of the last run that started.
Each `RunStep` is atomic on what belongs to one task: the result, that note, and the end of the output. So any order of
START, FINISH and REVOKE has one outcome, and a step that refuses a run stores why.

`aioresult.backends.runs.Note` is the reference of what a step does.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

from .log import Place
from .record import Record

__all__ = ["WORKERS_TOPIC", "WORKER_TOPIC", "RunOp", "RunState", "RunStep", "Verdict"]

#: What the hub knows the revokes for one worker by, before the worker's id.
WORKER_TOPIC: Final = "\x00worker "
#: What the hub knows the news of workers by that have died or said good-bye.
WORKERS_TOPIC: Final = "\x00workers"


class RunOp(enum.Enum):
    """What a `RunStep` does. Each bears being done twice."""

    #: Begin a run and store STARTED; unless the task was revoked, or, with ``skip_done``, has succeeded.
    START = "start"
    #: Store a state of the run that has begun, such as PROGRESS.
    STORE = "store"
    #: End the run: store its final state, or RETRY, and mark the end of its output.
    FINISH = "finish"
    #: Give the run up without an outcome: the next attempt will have one.
    RELEASE = "release"
    #: Let the note of the run live longer.
    RENEW = "renew"
    #: PageRequest the worker that runs the task to stop it. Where no worker runs it, the task is REVOKED at once.
    REVOKE = "revoke"
    #: Change nothing.
    READ = "read"


class Verdict(enum.Enum):
    """What came of a step."""

    #: START: the run has begun.
    STARTED = "started"
    #: START: the same, although the task has succeeded before: that success stays, and so does its output.
    AGAIN = "again"
    #: START with ``skip_done``: the task has succeeded. REVOKE: it has succeeded or failed.
    DONE = "done"
    #: START, RELEASE, REVOKE, and FINISH with RETRY: the task is revoked, and is stored as that.
    REVOKED = "revoked"
    #: REVOKE: the wish is noted, and the worker that runs the task was told.
    ASKED = "asked"
    #: The record was stored.
    STORED = "stored"
    #: It was not: a success stays, and so does a final state where a state such as PROGRESS comes late.
    KEPT = "kept"
    #: STORE, FINISH: nothing was changed, for another run has started since.
    SUPERSEDED = "superseded"
    #: There was nothing to store.
    NOTED = "noted"


class RunStep(NamedTuple):
    """One atomic change of what belongs to the run of one task."""

    op: RunOp
    task_id: str
    #: Names the run; for all but REVOKE and READ.
    run: str = ""
    #: START: the process that runs the task.
    worker: str = ""
    #: Seconds that the note lives from now on; 0 for ever, ``None`` to leave that as it is.
    lives: float | None = None
    #: START: STARTED, or ``None`` to store nothing. STORE, FINISH: the state to store; ``None`` only ends the run.
    #: REVOKE: the REVOKED that is stored by this step or by a later START, RELEASE or FINISH with RETRY.
    record: Record | None = None
    #: FINISH: the state of `record`, or the one that it would have.
    state: str = ""
    #: REVOKE: why.
    reason: str = ""
    #: START: begin no run of a task that has succeeded.
    skip_done: bool = False
    #: FINISH: mark the end of the output behind this place, if the log is of that epoch.
    output: Place | None = None
    #: REVOKE: a worker that is known to be dead. A run of its is taken for none.
    gone: str = ""


class RunState(NamedTuple):
    """What a step did, and what the note says after it."""

    verdict: Verdict
    #: The run that is under way, and its worker; empty if none is.
    run: str = ""
    worker: str = ""
    #: Why the task is to be stopped; ``None`` if nobody asked for that.
    wish: str | None = None
