"""`LiveResult`: what a handle can tell of a task that is not over: its states, its output; and how to stop it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, cast

from .handle import ResultStore
from .news import News
from .stream import OutputPage, OutputStream
from .updates import Updates

__all__ = ["LiveResult", "OnLost"]

#: What a waiter does about a worker that died: raise `WorkerLostError`, or wait for the next attempt.
OnLost = Literal["raise", "wait"]


class LiveResult(News):
    """The part of `aioresult.AsyncResult` that follows a running task."""

    __slots__ = ()

    @property
    @abstractmethod
    def backend(self) -> ResultStore: ...

    def updates(self, on_lost: OnLost = "raise") -> Updates:
        """The states of the task: ``async for meta in result.updates()``. The present one first, the final one last.

        The task's own exception is not raised: the last `TaskMeta` says it. A slow reader gets the newest state.

        :param on_lost: ``"raise"``: `WorkerLostError` when the process that ran the task has died; ``"wait"``: wait for
            the next attempt.
        :raises WorkerLostError: see ``on_lost``. For the rest see `AsyncResult.get`.
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
        """The output of the task: ``async for chunk in result.stream()``. Each chunk once, in order, without a hole.

        It ends when the task has succeeded or its output was closed. If the task failed or was revoked, it raises what
        awaiting the result raises, behind the last chunk. No I/O before the first step.

        :param after: where to begin: ``None`` for the first chunk, the ``cursor`` of a stream or a page for the chunk
            behind it, `aioresult.TAIL` for what is sent from now on.
        :param on_lost: as for `updates`; the error comes behind the last chunk.
        :param on_restart: when another attempt of the task writes the output from the beginning: ``"raise"``
            `OutputRestarted`, or ``"continue"`` with its first chunk; ``stream.attempt`` counts them.
        :param on_gap: when chunks are gone: ``"raise"`` `OutputGap`, or ``"skip"`` them.
        :raises InvalidCursor: ``after`` is no cursor.
        :raises OutputRestarted, OutputGap, WorkerLostError: see above; their ``cursor`` is where to go on.
        """
        return cast("OutputStream[Any]", self.backend.stream(self.id, after, on_lost, on_restart, on_gap))

    async def read_output(self, after: str | None = None, limit: int = 500, wait: float = 0.0) -> OutputPage:
        """Some chunks of the output, for long polling: those that are there, or that come within ``wait`` seconds.

        :param after: as for `stream`.
        :param limit: at most so many chunks.
        :returns: the chunks, the cursor to go on from, and whether the output has ended.
        :raises InvalidCursor, OutputRestarted, OutputGap: as for `stream`. How the task ended is not raised.
        """
        return cast("OutputPage", await self.backend.read_output(self.id, after, limit, wait))

    async def revoke(self, reason: str = "") -> bool:
        """Stop the task: one that waits never begins, the body of one that runs is cancelled.

        A task that no worker runs under `aioresult.Backend.running` is REVOKED at once. A body may clean up, and it may
        ignore the cancellation and return: then the task has succeeded.

        :param reason: for the `TaskRevokedError` that awaiting the result raises.
        :returns: false if the task had succeeded or failed before.
        """
        return await self.backend.revoke(self.id, reason)
