"""`LiveResult`: the methods of a handle that follow a running task, its states and its output, or revoke the task."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, cast

from .handle import ResultStore
from .news import News
from .stream import OutputPage, OutputStream
from .updates import Updates

__all__ = ["LiveResult", "OnLost"]

#: What a wait does if the worker that runs the task dies: ``"raise"`` `WorkerLostError`, or ``"wait"`` for the next
#: attempt of the task.
OnLost = Literal["raise", "wait"]


class LiveResult(News):
    """The part of `aioresult.AsyncResult` that follows a running task."""

    __slots__ = ()

    @property
    @abstractmethod
    def backend(self) -> ResultStore: ...

    def updates(self, on_lost: OnLost = "raise") -> Updates:
        """Iterate over the states of the task: ``async for meta in result.updates()``.

        The present state comes first, the final state last. If the task fails, the iterator does not raise the task's
        exception; the last `TaskMeta` holds it. A slow reader gets the newest state and misses the states in between.

        :param on_lost: what to do if the worker that runs the task dies: ``"raise"`` `WorkerLostError`, or ``"wait"``
            for the next attempt.
        :raises WorkerLostError: see ``on_lost``. For the other errors see `AsyncResult.get`.
        """
        return cast("Updates", self.backend.updates(self.id, on_lost))

    def stream(
        self,
        after: str | None = None,
        *,
        on_lost: OnLost = "raise",
        on_restart: Literal["raise", "continue"] = "raise",
        on_gap: Literal["raise", "skip"] = "raise",
    ) -> OutputStream[Any]:
        """Iterate over the output of the task, the chunks that it sends: ``async for chunk in result.stream()``.

        The stream yields each chunk exactly once, in order, without a gap. It ends when the task has succeeded or
        its output was closed. If the task failed or was revoked, the stream raises the task's exception after the last
        chunk. There is no I/O before the first step.

        :param after: where to begin. ``None`` begins with the first chunk. A cursor, which is a position in the output,
            begins with the chunk after that position: pass the ``cursor`` of a stream or a page. `aioresult.TAIL`
            yields only chunks that are sent from now on.
        :param on_lost: as for `updates`; the error comes after the last chunk.
        :param on_restart: what to do if the task runs again and writes the output from the beginning: ``"raise"``
            `OutputRestarted`, or ``"continue"`` with the first chunk of the new output. ``stream.attempt`` counts such
            attempts.
        :param on_gap: what to do if chunks are gone: ``"raise"`` `OutputGap`, or ``"skip"`` them.
        :raises InvalidCursor: ``after`` is not a cursor.
        :raises OutputRestarted, OutputGap: see ``on_restart`` and ``on_gap``. To go on, pass the error's ``cursor`` as
            ``after``.
        :raises WorkerLostError: see ``on_lost``.
        """
        return cast("OutputStream[Any]", self.backend.stream(self.id, after, on_lost, on_restart, on_gap))

    async def read_output(self, after: str | None = None, limit: int = 500, wait: float = 0.0) -> OutputPage:
        """Return some chunks of the output, the chunks that the task sends. For long polling.

        Returns immediately if there are chunks. Otherwise waits at most ``wait`` seconds for chunks.

        :param after: as for `stream`.
        :param limit: the maximum number of chunks.
        :returns: the chunks, the cursor to go on from, and whether the output has ended.
        :raises InvalidCursor, OutputRestarted, OutputGap: as for `stream`. The task's own exception is not raised.
        """
        return cast("OutputPage", await self.backend.read_output(self.id, after, limit, wait))

    async def revoke(self, reason: str = "") -> bool:
        """Stop the task. If the task has not begun, it never begins. If it runs, the worker cancels its code.

        The worker must run the task inside ``async with backend.running(…)``; see `aioresult.Backend.running`. If no
        worker does, the state becomes REVOKED immediately. Code that is cancelled may clean up. If the code ignores the
        cancellation and returns, the task has succeeded.

        :param reason: the message of the `TaskRevokedError` that awaiting the result raises.
        :returns: false if the task had already succeeded or failed; otherwise true.
        """
        return await self.backend.revoke(self.id, reason)
