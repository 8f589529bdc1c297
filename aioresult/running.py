"""A task while this process runs it: `Running`, and what the runs of one backend share.

A run is one attempt of a task in one process; the body is the block of the caller's ``async with``::

    enter          START ── revoked already ──▶ TaskRevokedError; the body never begins
                     │
    body           progress (only the newest is stored) and output; a revoke cancels the body
                     │
    leave          the output is flushed; then FINISH stores the result and ends output and run, in one step
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from copy import deepcopy
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self
from uuid import uuid4

from .exceptions import (
    AioResultError,
    BackendClosedError,
    BackendConnectionError,
    EncodeError,
    OutputSuperseded,
    ResultTooLargeError,
    Retry,
    TaskRevokedError,
    UsageError,
)
from .failure import traceback_of
from .foreign import is_celerys
from .interruption import Interruption
from .liveness import Liveness
from .log import Place
from .output import Output, OutputStore
from .record import Record
from .run import WORKER_TOPIC, RunOp, RunState, RunStep, Verdict
from .states import FAILURE, RETRY, REVOKED, STARTED, SUCCESS
from .tasks import EMPTY, run_to_completion, spawn
from .waiter import Outcome, Waiter

__all__ = ["AlreadyDone", "RunStore", "Running", "Runs", "current_task"]

logger: logging.Logger = logging.getLogger("aioresult")

#: The least number of seconds between two stores of a task's progress.
PROGRESS_INTERVAL = 0.1
#: Seconds after which a worker subscribes again if its subscription has ended with an error.
LISTEN_AGAIN = 1.0

_current: ContextVar[Running | None] = ContextVar("aioresult_current_task", default=None)


def current_task() -> Running | None:
    """Return the task whose body, its ``async with`` block, runs in this context; ``None`` outside of a body."""
    return _current.get()


class RunStore(OutputStore, Protocol):
    """What running tasks need of a backend."""

    @property
    def liveness(self) -> Liveness: ...
    def watch_topic(self, topic: str, waiter: Waiter, read_first: bool = True) -> None: ...
    def unwatch(self, task_id: str, waiter: Waiter) -> None: ...
    def submit_run_step(self, step: RunStep) -> asyncio.Future[RunState]: ...
    async def run_steps(self, steps: Sequence[RunStep]) -> list[RunState | BaseException]: ...
    def record(
        self,
        task_id: str,
        value: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        expires: float | None = None,
        only_new: bool = False,
        meta: Mapping[str, Any] | None = None,
    ) -> Record: ...
    async def follow_up(self, task_id: str, state: str, value: Any, request: Any, expires: float | None) -> None: ...


class AlreadyDone(Exception):
    """Raised by entering a run with ``skip_done`` if the task has succeeded. Callers of the library never see it."""


class Runs:
    """The runs of one open backend, and the subscription to requests to stop them."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._runs: dict[str, Running] = {}
        self._topic = ""
        self._reading: set[asyncio.Task[None]] = set()
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None

    async def add(self, run: str, running: Running) -> None:
        """Register a run, so that requests to stop it reach it. First gets a lease if this process has none."""
        await self._store.liveness.work()
        self._runs[run] = running
        if not self._topic:
            self._listen()

    def _listen(self) -> None:
        self._topic = WORKER_TOPIC + self._store.liveness.worker
        self._store.watch_topic(self._topic, self, read_first=False)

    def _listen_again(self) -> None:
        """Subscribe again. When the hub confirms it, the requests to stop runs are read."""
        self._timer = None
        if self._runs:
            self._store.unwatch(self._topic, self)
            with suppress(AioResultError):
                self._listen()

    def _listen_soon(self) -> None:
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(LISTEN_AGAIN, self._listen_again, context=EMPTY.context)

    def discard(self, run: str) -> None:
        """Remove a run. A second call does nothing."""
        self._runs.pop(run, None)

    def receive(self, topic: str, outcome: Outcome) -> None:
        """Take a request to stop a run from the hub (`aioresult.waiter.Waiter`)."""
        if isinstance(outcome, Exception):
            # The hub has failed or was closed. A run that goes on must still get its requests.
            self._topic = ""
            if not isinstance(outcome, BackendClosedError):
                self._listen_soon()
        elif outcome.result is None:
            # The subscription has begun. The present runs may have missed earlier requests. Later runs cannot miss any.
            if self._runs:
                task = spawn(self._read_wishes())
                self._reading.add(task)
                task.add_done_callback(self._read, context=EMPTY.context)
        elif (running := self._runs.get(outcome.result)) is not None:
            running.stop()

    def _read(self, task: asyncio.Task[None]) -> None:
        self._reading.discard(task)
        if task.cancelled():  # code outside the library, such as a shutdown handler, has cancelled it
            self._listen_soon()

    async def _read_wishes(self) -> None:
        runs = dict(self._runs)
        steps = [RunStep(RunOp.READ, running.task_id) for running in runs.values()]
        states = await self._store.run_steps(steps)
        for (run, running), state in zip(runs.items(), states, strict=True):
            if isinstance(state, RunState) and state.run == run and state.wish is not None:
                running.stop()
        for running, state in zip(runs.values(), states, strict=True):
            if isinstance(state, AioResultError) and not isinstance(state, BackendClosedError):
                logger.warning("could not read whether task %s was revoked: %s", running.task_id, state)
        if any(isinstance(state, BackendConnectionError) for state in states):
            self._listen_soon()

    async def close(self) -> None:
        """Take no more requests to stop runs."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._reading:
            task.cancel()


class Running:
    """A task that runs in this process: ``async with backend.running(task_id) as task``.

    When the block (the *body*) ends, the value that it has assigned to ``task.value`` is stored as the result. While
    the body runs, it may report its `progress` and send `output`.
    """

    def __init__(
        self,
        runs: Runs,
        store: RunStore,
        task_id: str,
        request: Any,
        *,
        track: bool,
        expires: float | None,
        lives: float,
        output_expires: float,
        skip_done: bool = False,
    ) -> None:
        #: The id of the task.
        self.task_id: str = task_id
        #: The request that was given to `aioresult.Backend.running`.
        self.request: Any = request
        #: The result of the task, which is stored with SUCCESS. The body assigns it.
        self.value: Any = None
        self._meta: Mapping[str, Any] | None = None
        self._runs = runs
        self._store = store
        self._track = track
        self._ignored = bool(getattr(request, "ignore_result", False))
        self._expires = expires
        self._lives = lives
        self._output_expires = output_expires
        self._skip_done = skip_done
        self._run = uuid4().hex
        self._interruption = Interruption()
        self._output: Output | None = None
        self._outer: Running | None = None
        #: True while the body runs, false before and after it; ``None`` before `__aenter__`.
        self._inside: bool | None = None
        #: True if the task has succeeded before.
        self._again = False
        #: True if a request to stop the run arrived before the body began.
        self._stopped = False
        self._news: dict[str, Any] | None = None
        self._progress_timer: asyncio.TimerHandle | None = None
        self._storing: asyncio.Future[RunState] | None = None
        self._renewal: asyncio.TimerHandle | None = None

    # -- what the body calls ----------------------------------------------------------------------------------------

    def progress(self, current: float, total: float | None = None, message: str | None = None, **more: Any) -> None:
        """Report to the readers of `aioresult.AsyncResult.updates` how far the task is. Call it as often as you like.

        The newest report is stored as the state ``PROGRESS``, at most every 0.1 seconds. The last report before a pause
        is always stored. ``meta.result`` is then a dict with ``current``, the optional ``total`` and ``message``, and
        the other keyword arguments.

        :raises EncodeError: the serializer cannot hold the report. If the report is stored later, the error is logged.
        :raises UsageError: the body has not begun, or has ended.
        """
        if not self._inside:
            raise UsageError(f"task {self.task_id} is not running: call progress inside 'async with'")
        if total is not None:
            more["total"] = total
        if message is not None:
            more["message"] = message
        self._news = {"current": current, **more}
        if self._progress_timer is None:
            self._store_progress()

    @property
    def output(self) -> Output:
        """The output of the task. Sending the first chunk opens it."""
        if self._output is None:
            if not self._inside:
                raise UsageError(f"task {self.task_id} is not running: use its output inside 'async with'")
            self._output = Output(self._store, self.task_id, expires=self._output_expires, run=self._run)
            if self._again:
                self._output.refuse(
                    OutputSuperseded(
                        f"task {self.task_id} has succeeded before, so its result and its output are kept; pass "
                        f"if_done='skip' to backend.run to skip the task, or forget the result to run it again"
                    )
                )
        return self._output

    @property
    def meta(self) -> Mapping[str, Any] | None:
        """Metadata to store with the end of the task; see `aioresult.Backend.store_result`. Assigning makes a copy.

        Raises `UsageError` or `EncodeError` if the metadata cannot be stored.
        """
        return self._meta

    @meta.setter
    def meta(self, meta: Mapping[str, Any] | None) -> None:
        self._store.record(self.task_id, None, STARTED, meta=meta)  # raises here, where the body can correct it
        self._meta = deepcopy(meta)

    @property
    def revoked(self) -> bool:
        """True if the task was revoked. A revoke cancels the body only one time."""
        return self._interruption.reason is not None

    # -- progress ---------------------------------------------------------------------------------------------------

    def _store_progress(self) -> None:
        news, self._news = self._news, None
        record = self._store.record(self.task_id, news, "PROGRESS", request=self.request, expires=self._expires)
        step = RunStep(RunOp.STORE, self.task_id, self._run, record=record, state="PROGRESS")
        self._storing = self._store.submit_run_step(step)
        self._storing.add_done_callback(self._progress_stored, context=EMPTY.context)
        self._progress_timer = asyncio.get_running_loop().call_later(
            PROGRESS_INTERVAL, self._progress_due, context=EMPTY.context
        )

    def _progress_stored(self, stored: asyncio.Future[RunState]) -> None:
        self._storing = None
        if (error := stored.exception()) is not None:
            logger.warning("the progress of task %s was not stored: %s", self.task_id, error)
        if self._progress_timer is None and self._news is not None:
            self._store_late_progress()

    def _progress_due(self) -> None:
        self._progress_timer = None
        if self._news is not None and self._storing is None:
            self._store_late_progress()

    def _store_late_progress(self) -> None:
        try:
            self._store_progress()
        except AioResultError as exc:
            logger.warning("the progress of task %s was not stored: %s", self.task_id, exc)

    # -- life -------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._inside is not None:
            raise UsageError("a run can be entered only once; call backend.running(…) for each attempt")
        self._store.check()
        self._inside = False
        started: Record | None = None
        if self._track and not self._ignored:
            info = {"pid": os.getpid(), "hostname": getattr(self.request, "hostname", None) or socket.gethostname()}
            started = self._store.record(self.task_id, info, STARTED, request=self.request, expires=self._expires)
        await self._runs.add(self._run, self)
        start = RunStep(
            RunOp.START,
            self.task_id,
            self._run,
            self._store.liveness.worker,
            self._lives,
            started,
            STARTED,
            skip_done=self._skip_done,
        )
        try:
            state = await self._store.submit_run_step(start)
        except BaseException as exc:
            self._runs.discard(self._run)
            if isinstance(exc, BackendConnectionError) or not isinstance(exc, Exception):  # the run may have begun
                with suppress(AioResultError):
                    self._store.submit_run_step(self._release()).add_done_callback(_seen, context=EMPTY.context)
            raise
        if state.verdict is Verdict.DONE:
            self._runs.discard(self._run)
            raise AlreadyDone
        if state.verdict is Verdict.REVOKED or self._stopped:
            refusal: list[TaskRevokedError] = []
            await run_to_completion(partial(self._refused, state, refusal))
            raise refusal[0]
        self._inside, self._again = True, state.verdict is Verdict.AGAIN
        self._outer = _current.get()
        _current.set(self)
        self._interruption.enter()
        self._renew_soon()
        return self

    async def _refused(self, state: RunState, refusal: list[TaskRevokedError]) -> None:
        """Record that the body does not begin. Puts the error that `__aenter__` raises into the list ``refusal``."""
        try:
            if state.verdict is Verdict.REVOKED:
                refusal[:] = [TaskRevokedError(state.wish or "")]
                await self._store.follow_up(self.task_id, REVOKED, refusal[0], self.request, self._expires)
            else:
                refusal[:] = [await self._revoked()]
        finally:
            self._runs.discard(self._run)

    def stop(self) -> None:
        """Cancel the body, because the task was revoked. `Runs` calls this."""
        if self._inside:
            self._interruption.interrupt(TaskRevokedError())
        else:
            self._stopped = True

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._inside = False
        ours = self._interruption.leave(exc)
        _current.set(self._outer)
        for timer in (self._progress_timer, self._renewal):
            if timer is not None:
                timer.cancel()
        self._news = None
        outcome: list[BaseException | None] = []
        await run_to_completion(partial(self._leave, exc, ours, outcome))
        if outcome[0] is not None:
            raise outcome[0]

    async def _leave(self, exc: BaseException | None, ours: bool, outcome: list[BaseException | None]) -> None:
        """Record how the run ended. Puts the error to raise instead of ``exc``, or ``None``, into ``outcome``."""
        trouble = await self._flushed()
        try:
            raised = await self._recorded(exc, ours)
        except Exception as error:
            raised = error
        finally:
            self._runs.discard(self._run)
        if raised is not None and exc is not None and not ours and not isinstance(exc, Exception):
            # A cancellation, or the end of the process, takes precedence over ``raised``.
            if not isinstance(raised, TaskRevokedError):
                logger.warning("the end of task %s was not stored: %s", self.task_id, raised)
            raised = None
        outcome[:] = [trouble if raised is None and exc is None else raised]

    async def _flushed(self) -> Exception | None:
        """Flush all of the output to the store. Returns the error if that fails."""
        if self._output is None:
            return None
        try:
            await self._output.settle()
        except OutputSuperseded:
            return None  # another attempt writes the output now, and its output is complete
        except Exception as exc:
            return exc  # the end mark will have the number after the missing chunks, so readers get `OutputGap`
        finally:
            self._output.stop()
        return None

    async def _recorded(self, exc: BaseException | None, ours: bool) -> Exception | None:
        """Store how the body ended. Returns the error to raise instead of ``exc``, if there is one."""
        if exc is None:
            try:
                await self._finish(SUCCESS, self.value)
            except (EncodeError, ResultTooLargeError) as unstorable:
                await self._finish(FAILURE, unstorable)
                return unstorable
        elif isinstance(exc, asyncio.CancelledError) and self.revoked:
            revoked = await self._revoked()
            return revoked if ours else None
        elif not isinstance(exc, Exception) or is_celerys(exc, "Ignore", "Reject", module="celery.exceptions"):
            return await self._given_up(self._release())
        elif isinstance(exc, Retry) or is_celerys(exc, "Retry", module="celery.exceptions"):
            # As in Celery, the record holds the reason for the retry.
            why = getattr(exc, "exc", None)
            return await self._given_up(self._end(RETRY, why if isinstance(why, BaseException) else exc, exc))
        else:
            await self._finish(FAILURE, exc)
        return None

    async def _finish(self, state: str, value: Any) -> None:
        found = await self._store.submit_run_step(self._end(state, value))
        # The store may have kept an earlier success or a revoke. Then this failure must not fail a chord or a chain.
        if found.verdict in (Verdict.STORED, Verdict.NOTED) or state == SUCCESS:
            await self._store.follow_up(self.task_id, state, value, self.request, self._expires)

    async def _given_up(self, step: RunStep) -> TaskRevokedError | None:
        """Leave the task to its next attempt, with ``step``. Returns an error to raise if the task was revoked."""
        found = await self._store.submit_run_step(step)
        if found.verdict is not Verdict.REVOKED:
            return None
        error = TaskRevokedError(found.wish or "")
        await self._store.follow_up(self.task_id, REVOKED, error, self.request, self._expires)
        return error

    async def _revoked(self) -> TaskRevokedError:
        """End the run with the state REVOKED. Returns the error to raise."""
        found = await self._store.submit_run_step(RunStep(RunOp.READ, self.task_id))
        error = TaskRevokedError(found.wish or "")
        await self._finish(REVOKED, error)
        return error

    def _release(self) -> RunStep:
        return RunStep(RunOp.RELEASE, self.task_id, self._run, lives=self._lives, output=self._place())

    def _end(self, state: str, value: Any, raised: BaseException | None = None) -> RunStep:
        record: Record | None = None
        if state != SUCCESS or not self._ignored:
            traceback: str | None = None
            if state in (FAILURE, RETRY):
                traceback = traceback_of(value if raised is None else raised)
            record = self._store.record(
                self.task_id, value, state, traceback, self.request, self._expires, meta=self._meta
            )
        return RunStep(
            RunOp.FINISH, self.task_id, self._run, lives=self._lives, record=record, state=state, output=self._place()
        )

    def _place(self) -> Place | None:
        """Return the place after which the output is to end; ``None`` if there is no output, or if it has ended."""
        return None if self._output is None or self._output.ended else self._output.place

    def _renew_soon(self) -> None:
        if self._lives:
            self._renewal = asyncio.get_running_loop().call_later(self._lives / 4, self._renew, context=EMPTY.context)

    def _renew(self) -> None:
        """Extend the life of the note, the record that the store keeps of the run."""
        with suppress(AioResultError):
            renewed = self._store.submit_run_step(RunStep(RunOp.RENEW, self.task_id, self._run, lives=self._lives))
            renewed.add_done_callback(_seen, context=EMPTY.context)
        self._renew_soon()

    def __repr__(self) -> str:
        return f"<Running {self.task_id}>"


def _seen(step: asyncio.Future[RunState]) -> None:
    """Mark the error of a step as seen, so that asyncio does not log it. A later step repeats this one if necessary."""
    step.exception()
