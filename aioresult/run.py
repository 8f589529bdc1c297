"""The run of a task: what a store decides in one step when a task starts, ends, or is revoked.

A *run* is one attempt of a task in one process. Beside the result the store keeps a *note*, a record of the last run
that started. Each `RunStep` changes all that belongs to one task in one atomic step: the result, the note, and the end
of the output. So START, FINISH and REVOKE have a defined outcome in any order. A step that refuses to start a run
stores the reason, such as REVOKED.

`aioresult.backends.runs.Note` is the reference implementation of the steps.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

from .log import Place
from .record import Record

__all__ = ["WORKERS_TOPIC", "WORKER_TOPIC", "RunOp", "RunState", "RunStep", "Verdict"]

#: Prefix of the hub's topic for requests to stop the tasks of one worker; the worker's id follows it.
WORKER_TOPIC: Final = "\x00worker "
#: The hub's topic (the name of a subscription) for the news that a worker has died or shut down.
WORKERS_TOPIC: Final = "\x00workers"


class RunOp(enum.Enum):
    """What a `RunStep` does. Every step is idempotent."""

    #: Begin a run and store STARTED, unless the task was revoked. If ``skip_done`` is set, a success also prevents it.
    START = "start"
    #: Store a state of a run that goes on, such as PROGRESS.
    STORE = "store"
    #: End the run: store its final state, or RETRY, and mark the end of its output.
    FINISH = "finish"
    #: End the run without an outcome, so that the queue can run the task again.
    RELEASE = "release"
    #: Extend the life of the note, the record of the last run.
    RENEW = "renew"
    #: Ask the worker that runs the task to stop it. If no worker runs it, store REVOKED at once.
    REVOKE = "revoke"
    #: Change nothing.
    READ = "read"


class Verdict(enum.Enum):
    """The outcome of a step. The words before a colon name the steps that can have the outcome."""

    #: START: the run has begun.
    STARTED = "started"
    #: START: the run has begun, although the task has succeeded before. That success and its output are kept.
    AGAIN = "again"
    #: START with ``skip_done``: the task has succeeded. REVOKE: it has succeeded or failed.
    DONE = "done"
    #: START, RELEASE, REVOKE, and FINISH with RETRY: the task is revoked, and REVOKED is stored.
    REVOKED = "revoked"
    #: REVOKE: the note holds the request to stop, and the worker that runs the task was notified.
    ASKED = "asked"
    #: The record (the state to store) was stored.
    STORED = "stored"
    #: The record was not stored: it would have replaced a success, or it is a PROGRESS that came after a final state.
    KEPT = "kept"
    #: STORE, FINISH, RELEASE: nothing was changed, because another run has started since.
    SUPERSEDED = "superseded"
    #: The step was done, and it had no record to store.
    NOTED = "noted"


class RunStep(NamedTuple):
    """One atomic change of the result, the note and the output of one task."""

    op: RunOp
    task_id: str
    #: The id of the run; for all steps except REVOKE and READ.
    run: str = ""
    #: START: the id of the worker that runs the task.
    worker: str = ""
    #: Seconds that the note lives from now on; 0 for ever, ``None`` to leave its expiry unchanged.
    lives: float | None = None
    #: START: the record of STARTED, or ``None`` to store nothing. STORE, FINISH: the record to store; ``None`` only
    #: ends the run. REVOKE: the record of REVOKED, which this step or a later START, RELEASE or FINISH (RETRY) stores.
    record: Record | None = None
    #: FINISH: the state of `record`, also if `record` is ``None``.
    state: str = ""
    #: REVOKE: the reason for it, which `TaskRevokedError` shows.
    reason: str = ""
    #: START: do not begin a run if the task has succeeded.
    skip_done: bool = False
    #: FINISH, or a RELEASE that stores REVOKED: write the end mark of the output after this place in its log, if the
    #: log still has the epoch of the place.
    output: Place | None = None
    #: REVOKE: the id of a worker that is known to be dead. If the note says that this worker runs the task, the step
    #: stores REVOKED at once.
    gone: str = ""


class RunState(NamedTuple):
    """What a step did, and what the note (the record of the last run) says after the step."""

    verdict: Verdict
    #: The run that is under way, and its worker; both are empty if no run is under way.
    run: str = ""
    worker: str = ""
    #: The reason given in the request to stop the task; ``None`` if there is no request.
    wish: str | None = None
