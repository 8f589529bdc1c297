"""What a store keeps of a running task: the log (its output) and the note (what is known of its last run).

The memory backend uses these classes. For authors of other backends they are the reference of what a `Flush`
(`aioresult.log`) and a `RunStep` (`aioresult.run`) do. They do no I/O, and take the time from the caller.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from ..exceptions import OutputSuperseded
from ..log import START, Entry, Flush, PageRequest, Place
from ..record import Record
from ..run import RunOp, RunState, RunStep, Verdict
from ..states import FAILURE, READY_STATES, RETRY, REVOKED, SUCCESS

__all__ = ["Log", "Note", "superseded"]


class Log:
    """The output of one task. All entries have one epoch, the number of an attempt, and are in order of ``last``."""

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque()
        #: The id of the producer that opened the output.
        self.writer: str = ""
        self.expires_at: float = math.inf

    @property
    def top(self) -> Place:
        """Return the end of the log; `START` if nothing was written."""
        return Place(self.entries[-1].epoch, self.entries[-1].last) if self.entries else START

    def take(self, flush: Flush, now: float) -> tuple[int, bool]:
        """Write the flush. Returns the epoch of the log, and true if the message about the flush must be published.

        ``now`` is the time of day, in seconds. Raises `OutputSuperseded` if the log has a newer epoch.
        """
        top, epoch, news = self.top, flush.epoch, bool(flush.data or flush.state)
        if not epoch:
            if self.entries and self.writer == flush.writer:
                return top.epoch, False  # the producer repeats this flush because its reply was lost
            if flush.run and self.entries and self.entries[-1].state == SUCCESS:
                raise superseded(flush.task_id)
            epoch = max(int(now * 1000), top.epoch + 1)  # above the last epoch even if the clock was set back
            self.entries.clear()
            self.writer = flush.writer
        elif top.epoch > epoch:
            raise superseded(flush.task_id)
        elif (epoch, flush.last) <= top:
            news = False  # a repetition
        elif epoch > top.epoch:
            self.entries.clear()
            self.writer = ""
        if news:
            self.entries.append(Entry(epoch, flush.last, flush.data, flush.state))
            while self.entries[0].last < flush.keep_from:
                self.entries.popleft()
        return epoch, news

    def end(self, own: Place | None, void: bool) -> Place | None:
        """Return the place after which an end mark goes; ``None`` if no mark is needed.

        An end mark says how the output ended. Usually the place is ``own``, the end of the run's own output. There is
        one exception: the log holds the output of a newer run, and that output is ``void`` because the older run has
        succeeded. Then the mark gets a new epoch. From the new epoch, the readers and the producer of the void output
        learn that it is void.
        """
        top = self.top
        if not void or (own is not None and top.epoch <= own.epoch):
            return own
        return None if self.entries and self.entries[-1].state else Place(top.epoch + 1, 0)

    def page(self, request: PageRequest) -> tuple[tuple[Entry, ...], bool, Place]:
        """Return the entries after a place, whether there are more, and the end of the log."""
        after = request.after
        if after is None:
            return tuple(self.entries)[-1:], False, self.top
        found = [entry for entry in self.entries if (entry.epoch, entry.last) > after]
        return tuple(found[: request.limit]), len(found) > request.limit, self.top


class Taken(NamedTuple):
    """What a `RunStep` results in, apart from the change of the note."""

    verdict: Verdict
    #: The record to store and publish.
    store: Record | None = None
    #: The state of the end mark to write after the output of the step; empty for no end mark.
    mark: str = ""
    #: True if the output of a newer run is void, because this run has succeeded; see `Log.end`.
    void: bool = False
    #: True if the worker of the run must be told to stop the run.
    tell: bool = False


class Note:
    """What the store knows of one run of a task: the run that started last."""

    def __init__(self) -> None:
        self.run: str = ""
        self.worker: str = ""
        #: True if that run has ended.
        self.over: bool = True
        #: The request to stop the task: the record of REVOKED to store, or ``None`` if there is no request.
        self.wish: Record | None = None
        #: Why the task must stop.
        self.reason: str = ""
        self.expires_at: float = math.inf

    def take(self, step: RunStep, status: str | None, same: bool) -> Taken:
        """Do the step. ``status`` is the stored state; ``same`` is true if the step's own record is stored already."""
        others = self.run not in ("", step.run)
        match step.op:
            case RunOp.START:
                return self._start(step, status)
            case RunOp.STORE:
                if others:
                    return Taken(Verdict.SUPERSEDED)
                return Taken(Verdict.KEPT) if self.run and self.over else _put(step.record, status, same)
            case RunOp.FINISH:
                return self._finish(step, status, same, others)
            case RunOp.RELEASE if not others:
                self._end(step.run)
                return self._revoked(status) if self.wish is not None else Taken(Verdict.NOTED)
            case RunOp.REVOKE:
                return self._revoke(step, status)
        return Taken(Verdict.SUPERSEDED if step.op is RunOp.RELEASE else Verdict.NOTED)

    def _start(self, step: RunStep, status: str | None) -> Taken:
        if status == SUCCESS and step.skip_done:
            return Taken(Verdict.DONE)
        if status == REVOKED or self.wish is not None:
            self._end(self.run)
            return self._revoked(status)
        self.run, self.worker, self.over = step.run, step.worker, False
        begun = Verdict.AGAIN if status == SUCCESS else Verdict.STARTED
        return Taken(begun, _put(step.record, status, same=False).store)

    def _finish(self, step: RunStep, status: str | None, same: bool, others: bool) -> Taken:
        if step.state != SUCCESS:
            if others:
                return Taken(Verdict.SUPERSEDED)
            if self.run and self.over:  # the caller repeats this step, or a revoke has ended the run of a dead worker
                if status == REVOKED != step.state:
                    return Taken(Verdict.REVOKED)
                return Taken(Verdict.STORED if same else Verdict.KEPT)
        if not others:
            self._end(step.run)
            if step.state == RETRY and self.wish is not None:
                return self._revoked(status)
            if step.state in READY_STATES:
                self.wish = None
        mark = step.state if step.state in READY_STATES else ""
        taken = _put(step.record, status, same)
        return taken._replace(mark=mark, void=others and taken.verdict is Verdict.STORED)

    def _revoke(self, step: RunStep, status: str | None) -> Taken:
        if status == SUCCESS:
            return Taken(Verdict.DONE)
        running = bool(self.run) and not self.over and self.worker not in ("", step.gone)
        if not running and status == FAILURE:
            return Taken(Verdict.DONE)
        self.wish, self.reason = step.record, step.reason
        if running:
            return Taken(Verdict.ASKED, tell=True)
        self._end(self.run)
        return self._revoked(status)

    def _end(self, run: str) -> None:
        self.run, self.worker, self.over = run, "", True

    def _revoked(self, status: str | None) -> Taken:
        return Taken(Verdict.REVOKED, None if status in (SUCCESS, REVOKED) else self.wish, mark=REVOKED)

    def state(self, verdict: Verdict) -> RunState:
        """Return the state of the note after a step with this verdict."""
        under_way = (self.run, self.worker) if not self.over else ("", "")
        return RunState(verdict, *under_way, None if self.wish is None else self.reason)


def _put(record: Record | None, status: str | None, same: bool) -> Taken:
    """Decide whether to store ``record``, by the rules of `Backend._store`."""
    if record is None:
        return Taken(Verdict.NOTED)
    if status == SUCCESS or (record.custom and status in READY_STATES):
        return Taken(Verdict.STORED if same else Verdict.KEPT)
    return Taken(Verdict.STORED, record)


def superseded(task_id: str) -> OutputSuperseded:
    """Return the error for a producer whose output another producer has taken over."""
    return OutputSuperseded(f"another attempt of task {task_id} now writes its output; stop this attempt")
