"""The methods of a backend for running tasks: run them, send and read their output, follow and revoke them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from inspect import isawaitable
from math import inf
from typing import Any, Literal, TypeVar
from uuid import UUID

from ..exceptions import TaskRevokedError, UsageError
from ..interruption import Interruption
from ..liveness import Liveness
from ..log import Flush, Page, PageRequest
from ..output import Keep, Output, Overflow
from ..progress import GROUP_TOPIC, GroupCounts
from ..run import WORKERS_TOPIC, RunOp, RunState, RunStep, Verdict
from ..running import AlreadyDone, Running, Runs
from ..seconds import Seconds, checked_seconds
from ..states import REVOKED, SUCCESS
from ..stream import OutputPage, OutputStream, Streams
from ..tree import raise_or_return
from ..updates import Updates
from .reader import ReaderSide

__all__ = ["LiveSide"]

T = TypeVar("T")


class LiveSide(ReaderSide):
    """The methods for running tasks, a part of `aioresult.backends.base.Backend`."""

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        super()._start(loop)
        #: Renews the lease by which this worker counts as alive, and watches the workers of the awaited tasks.
        self.liveness: Liveness = Liveness(self)
        self._streams = Streams(self)
        self._running = Runs(self)

    async def _say_goodbye(self) -> None:
        await self._running.close()
        await self.liveness.close()
        if self.liveness.works:
            await self._beat(self.liveness.worker, 0.0)

    # -- the worker's side ------------------------------------------------------------------------------------------

    def running(
        self,
        task_id: str | UUID,
        request: Any = None,
        *,
        track: bool = True,
        expires: Seconds | None = None,
        output_expires: Seconds | None = None,
    ) -> Running:
        """Run a task in this process: ``async with backend.running(task_id) as task``. The call itself does no I/O.

        Entering stores STARTED. Inside, ``task.progress(…)`` and ``task.output.send(…)`` publish news of the task, and
        ``task.value = …`` sets its result. Leaving stores how the body, the code inside ``async with``, has ended. The
        end of the output is stored in the same step:

        - the body came to its end: SUCCESS, even if a revoke has cancelled it before.
        - the body raised an exception that is not named below: FAILURE.
        - the body raised `aioresult.Retry`, or Celery's ``Retry``: RETRY. The next attempt writes the output.
        - `revoke` cancelled the body: REVOKED. `TaskRevokedError` is raised in place of the cancellation.
        - anything else cancelled the body, such as a shutdown, or the body raised Celery's ``Ignore`` or ``Reject``:
          nothing is stored, and the next attempt starts from the beginning.

        Each attempt is a run of its own. If a queue delivers a task twice, the run that started last decides the
        outcome. An older run counts only if it succeeds.

        :param request: what is known of the task; see `store_result`. If it names a chord, the task counts as a part of
            the chord. If the task fails, the tasks after it in its chain fail, too.
        :param track: store STARTED, with the process id and the host name, as Celery's ``task_track_started``.
        :param expires: seconds to keep the result, instead of the backend's default; 0 for ever.
        :param output_expires: seconds to keep the output; by default as long as results are kept.
        :raises TaskRevokedError: on entering, the task was revoked before; on leaving, it was revoked while it ran.
            REVOKED is stored.
        :raises BackendError: nothing could be stored; see `store_result`.
        """
        return self._run(task_id, request, track, expires, output_expires)

    def _run(
        self,
        task_id: str | UUID,
        request: Any,
        track: bool = True,
        expires: Seconds | None = None,
        output_expires: Seconds | None = None,
        skip_done: bool = False,
    ) -> Running:
        return Running(
            self._running,
            self,
            self._valid_id(task_id),
            request,
            track=bool(track),
            expires=None if expires is None else checked_seconds("expires", expires),
            lives=self._lifetime(expires),
            output_expires=self._lifetime(output_expires),
            skip_done=skip_done,
        )

    def _lifetime(self, expires: Seconds | None) -> float:
        return self.expires if expires is None else checked_seconds("expires", expires)

    async def run(
        self,
        task_id: str | UUID,
        function: Callable[..., Any],
        *args: Any,
        request: Any = None,
        if_done: Literal["run", "skip"] = "run",
        **kwargs: Any,
    ) -> Any:
        """Call ``function(*args, **kwargs)`` inside `running`, and return its value.

        ``function`` is a coroutine function. A plain function works, too: it runs in the event loop and blocks it.
        Inside the function, `aioresult.current_task` returns this task.

        :param if_done: with ``"skip"``, a task that has succeeded before is not run again: its stored value is
            returned.
        :raises Exception: what the function raises. For the other errors see `running`.
        """
        if if_done not in ("run", "skip"):
            raise UsageError(f"if_done must be 'run' or 'skip', not {if_done!r}")
        try:
            async with self._run(task_id, request, skip_done=if_done == "skip") as task:
                value = function(*args, **kwargs)
                task.value = await value if isawaitable(value) else value
            return task.value
        except AlreadyDone:
            pass
        meta = await self.wait_for(task_id, inf)
        if meta.status == SUCCESS:  # the worker may have died after it stored the success, before it counted the part
            await self.follow_up(str(task_id), SUCCESS, meta.result, request, None)
        return raise_or_return(meta)

    def output(
        self,
        task_id: str | UUID,
        *,
        keep: Keep | None = None,
        on_full: Overflow = "trim",
        expires: Seconds | None = None,
    ) -> Output:
        """Write the output of a task that another framework runs: ``async with backend.output(task_id) as out``.

        Inside `running` use ``task.output`` instead. If two producers open the output of one task, the producer that
        opened it last writes it. The other producer gets `OutputSuperseded`.

        :param keep: how much of the output is kept; ``Keep(chunks=10_000, bytes=4 * 2**20)`` by default.
        :param on_full: what happens when the output has grown to this limit. ``"trim"`` drops the oldest chunks;
            ``"fail"`` raises `OutputFull`.
        :param expires: seconds to keep the output after its last chunk; by default as long as results are kept.
        """
        self.check()
        return Output(self, self._valid_id(task_id), expires=self._lifetime(expires), keep=keep, on_full=on_full)

    # -- the reader's side ------------------------------------------------------------------------------------------

    def stream(
        self,
        task_id: str | UUID,
        after: str | None = None,
        on_lost: str = "raise",
        on_restart: str = "raise",
        on_gap: str = "raise",
    ) -> OutputStream[Any]:
        """See `aioresult.AsyncResult.stream`."""
        self.check()
        return self._streams.stream(self._valid_id(task_id), after, on_lost, on_restart, on_gap)

    async def read_output(
        self, task_id: str | UUID, after: str | None = None, limit: int = 500, wait: Seconds = 0.0
    ) -> OutputPage:
        """See `aioresult.AsyncResult.read_output`."""
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise UsageError(f"limit must be a number of chunks, at least 1, not {limit!r}")
        async with self.stream(task_id, after, on_lost="wait") as stream:
            return await stream.page(limit, checked_seconds("wait", wait))

    def updates(self, task_id: str | UUID, on_lost: str = "raise") -> Updates:
        """See `aioresult.AsyncResult.updates`."""
        self.check()
        return Updates(self, self._valid_id(task_id), on_lost)

    async def revoke(self, task_id: str | UUID, reason: str = "") -> bool:
        """See `aioresult.AsyncResult.revoke`."""
        self.check()
        task_id = self._valid_id(task_id)
        record = self.record(task_id, TaskRevokedError(reason), REVOKED)
        step = RunStep(RunOp.REVOKE, task_id, lives=self.expires, record=record, reason=reason)
        found = await self.submit_run_step(step)
        if found.verdict is Verdict.ASKED:
            (lives,) = await self.alive([found.worker])
            if not lives:  # a dead worker never hears of the request
                found = await self.submit_run_step(step._replace(gone=found.worker))
        return found.verdict is not Verdict.DONE

    async def unless_lost(self, task_id: str, waiting: Coroutine[Any, Any, T]) -> T:
        """Await the coroutine ``waiting``, and return its result. Used by handles.

        Raises `WorkerLostError` as soon as the worker that runs the task is lost.
        """
        interruption, liveness = Interruption(), self.liveness
        interruption.enter()
        try:
            liveness.watch(task_id, interruption.interrupt)
            result = await waiting
        except BaseException as exc:
            if interruption.leave(exc) and interruption.reason is not None:
                raise interruption.reason from None
            raise
        finally:
            waiting.close()
            liveness.unwatch(task_id, interruption.interrupt)
        interruption.leave(None)
        return result

    async def group_size(self, group_id: str) -> int | None:
        """Return the number of members of a saved group; ``None`` if the store does not count them. Used by handles."""
        return await self._about_group(self._group_size, group_id)

    async def group_counts(self, group_id: str) -> GroupCounts:
        """Return how many members of a saved group are over. Used by handles."""
        return await self._about_group(self._group_counts, group_id)

    async def _about_group(self, operation: Callable[[str], Coroutine[Any, Any, T]], group_id: str) -> T:
        return await self._call(partial(operation, self._valid_id(group_id)), GROUP_TOPIC + group_id)

    # -- for `aioresult.output`, `stream`, `running` and `liveness` -------------------------------------------------

    def dumps_chunk(self, task_id: str, chunk: Any) -> bytes:
        """Encode a chunk of the task's output for the store."""
        return self.codec.dumps_chunk(chunk, f"a chunk of the output of task {task_id}")

    def dumps_text(self, task_id: str, value: Any) -> bytes:
        """Encode a chunk of the task's output, or its progress, as JSON for a browser."""
        return self.codec.dumps_text(value, f"the output or progress of task {task_id} for a browser")

    def loads_chunks(self, task_id: str, data: bytes) -> list[Any]:
        """Decode the chunks in one entry of the task's output."""
        return self.codec.loads_chunks(data, f"the output of task {task_id}")

    def append(self, flush: Flush) -> asyncio.Future[int]:
        """Append a flush, some output of a task, to the log of the task. The future's result is the log's epoch."""
        self.check()
        return self._shard_of(flush.task_id).appends.submit(flush, flush.task_id, len(flush.data))

    async def page(self, request: PageRequest) -> Page:
        """Read a page of the log, the stored output of a task."""
        return await self._shard_of(request.task_id).page_reads.submit(request)

    def submit_run_step(self, step: RunStep) -> asyncio.Future[RunState]:
        """Do a step of a run. The steps of one task are done in the order in which they were submitted."""
        self.check()
        size = 0 if step.record is None else self._payload_size(step.record.payload)
        return self._extending(self._shard_of(step.task_id).runs.submit(step, step.task_id, size), step.record)

    async def run_steps(self, steps: Sequence[RunStep]) -> list[RunState | BaseException]:
        """Do many steps of runs. If a step fails, its error takes the place of its state."""
        return await asyncio.gather(*map(self.submit_run_step, steps), return_exceptions=True)

    async def beat(self, worker: str, lease: float, last: float | None = None, persist: bool = False) -> float:
        """Renew the lease of ``worker``. A failed call is retried only with ``persist``: a late beat is of no use."""
        if persist:
            return await self._call(partial(self._beat, worker, lease, last), WORKERS_TOPIC)
        return await self._beat(worker, lease, last)

    async def alive(self, workers: Sequence[str]) -> Sequence[bool]:
        """Return for each worker whether its lease is still valid."""
        return await self._call(partial(self._alive, workers), WORKERS_TOPIC)
