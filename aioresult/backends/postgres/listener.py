"""The connection that LISTENs. One task asks it for a sign of life; notifications arrive by a plain callback."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import asyncpg

from ...exceptions import BackendConnectionError

__all__ = ["Listener", "bounded", "close_connection"]

T = TypeVar("T")

#: What a connection in trouble raises. `BackendConnectionError` is an `OSError`, too.
_TROUBLE = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)


async def bounded(
    connection: Any, operation: Awaitable[T], seconds: float, on_silence: Callable[[BaseException], None] | None = None
) -> T:
    """``operation`` on ``connection``, which is torn down if it takes longer than ``seconds``, or is cancelled.

    ``on_silence`` is told of the former before the connection ends.

    Not asyncpg's own timeout: that asks the server over a further connection to cancel the query, and waits; a peer
    that has vanished answers neither.
    """
    task = asyncio.ensure_future(operation)
    try:
        await asyncio.wait({task}, timeout=0.9 * seconds)
        if not task.done():  # but the answer may be here, if it is this loop that was busy all the time
            await asyncio.wait({task}, timeout=0.1 * seconds)
        if not task.done():
            error = BackendConnectionError(f"the server has not answered for {seconds:g} s")
            if on_silence is not None:
                on_silence(error)
            raise error
        return task.result()
    finally:
        if not task.done():
            # What it will raise is a consequence, and nobody's news, even if the wait for it is cancelled, too.
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
            _tear_down(connection)
            await asyncio.wait({task})


async def close_connection(connection: Any) -> None:
    """Close it, politely if the server answers within a second."""
    try:
        await connection.close(timeout=1.0)
    except _TROUBLE:
        _tear_down(connection)


def _tear_down(connection: Any) -> None:
    with suppress(asyncpg.InterfaceError):  # a connection of a pool that was torn down before
        connection.terminate()


class Listener:
    """Channels of one asyncpg connection, which it closes, or hands to ``give_back`` as it was.

    ``on_notify(payload)`` is called for each notification, ``on_lost(reason)`` once if the connection breaks; neither
    after `close`. An answer is waited for twice ``heartbeat`` seconds at most, whatever is asked.
    """

    def __init__(
        self,
        connection: Any,
        heartbeat: float,
        on_notify: Callable[[str], None],
        on_lost: Callable[[BaseException], None],
        give_back: Callable[[Any], Awaitable[None]] | None = None,
    ) -> None:
        self.lost: bool = False
        self._connection = connection
        self._heartbeat = heartbeat
        self._on_notify: Callable[[str], None] | None = on_notify
        self._on_lost: Callable[[BaseException], None] | None = on_lost
        self._give_back = give_back
        self._channels: set[str] = set()
        # One query at a time on a connection of asyncpg's; LISTEN is a query.
        self._turn = asyncio.Lock()
        connection.add_termination_listener(self._terminated)
        self._beating = asyncio.create_task(self._beat(), name="aioresult-heartbeat")

    async def listen(self, channels: Iterable[str]) -> None:
        """Have the server confirm each channel; those that are listened to already cost nothing."""
        new = [channel for channel in dict.fromkeys(channels) if channel not in self._channels]
        await self._all_at_once("LISTEN", new)
        for channel in new:
            await self._ask(partial(self._connection.add_listener, channel, self._notified))
            self._channels.add(channel)

    async def unlisten(self, channels: Iterable[str]) -> None:
        """The opposite."""
        old = [channel for channel in dict.fromkeys(channels) if channel in self._channels]
        self._channels.difference_update(old)
        await self._all_at_once("UNLISTEN", old)
        for channel in old:
            await self._ask(partial(self._connection.remove_listener, channel, self._notified))

    async def _all_at_once(self, command: str, channels: Sequence[str]) -> None:
        """One round trip instead of one per channel, after which asyncpg finds nothing left to send.

        Its own methods send a statement for each channel that is not in its private table of listeners (0.32). Without
        that table this does nothing, and all goes on at their pace.
        """
        known = getattr(self._connection, "_listeners", None)
        if len(channels) > 1 and isinstance(known, dict):
            statements = "; ".join(f'{command} "{channel}"' for channel in channels)
            await self._ask(partial(self._connection.execute, statements))
            for channel in channels:
                if command == "LISTEN":
                    known.setdefault(channel, set())
                else:
                    known.pop(channel, None)

    async def hears(self, notify: Callable[[str], Awaitable[object]]) -> bool:
        """Whether what ``notify(channel)`` sends over another connection arrives here."""
        channel = f"aioresult_test_{uuid4().hex}"
        arrived = asyncio.Event()

        def hear(*_: Any) -> None:
            arrived.set()

        await self._ask(partial(self._connection.add_listener, channel, hear))
        try:
            await notify(channel)
            await self._ping()  # answered after everything that was there to be sent before
        finally:
            await self._ask(partial(self._connection.remove_listener, channel, hear))
        return arrived.is_set()

    async def close(self) -> None:
        """No more callbacks, no more heartbeat, no more connection."""
        self._on_notify = self._on_lost = None
        self._beating.cancel()
        await asyncio.wait({self._beating})
        if self._give_back is None:
            await close_connection(self._connection)
            return
        try:
            self._connection.remove_termination_listener(self._terminated)
            await self.unlisten(tuple(self._channels))
        except _TROUBLE:
            _tear_down(self._connection)
        with suppress(*_TROUBLE):
            await self._give_back(self._connection)

    async def _ask(self, query: Callable[[], Awaitable[T]]) -> T:
        async with self._turn:
            return await bounded(self._connection, query(), 2 * self._heartbeat, self._break)

    async def _ping(self) -> None:
        await self._ask(lambda: self._connection.fetchval("SELECT 1"))

    async def _beat(self) -> None:
        while not self.lost:
            await asyncio.sleep(self._heartbeat)
            try:
                await self._ping()
            except Exception as exc:  # whatever it is: unwatched, the connection is of no use
                self._break(exc)
                _tear_down(self._connection)

    def _notified(self, connection: Any, pid: int, channel: str, payload: object) -> None:
        if self._on_notify is not None:
            self._on_notify(str(payload))

    def _terminated(self, connection: Any) -> None:
        self._break(BackendConnectionError("the connection was closed"))

    def _break(self, reason: BaseException) -> None:
        self.lost = True
        if (on_lost := self._on_lost) is not None:
            self._on_notify = self._on_lost = None
            on_lost(reason)
