"""Running tasks in a browser: `events` turns a stream of output, or of states, into server-sent events.

The format is that of the WHATWG (https://html.spec.whatwg.org/multipage/server-sent-events.html). No web framework is
needed: the body is an async iterator of bytes, and `HEADERS` are what it needs beside it. With Starlette::

    async def answer(request):
        try:
            stream = backend.result(task_id).stream(after=request.headers.get("last-event-id"))
        except aioresult.InvalidCursor:  # the header comes from outside
            return Response(status_code=400)
        return StreamingResponse(events(stream), headers=HEADERS)

An ``EventSource`` reconnects after every end of the body, and sends the id of the last event that it has seen. So each
chunk carries its cursor as the id, and nothing else carries one. Only ``close()`` stops it, or an answer such as 204 or
400: a page closes on the event ``end``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from types import MappingProxyType
from typing import Any, Final, Protocol

import anyio

from .exceptions import OutputGap, OutputRestarted, UsageError, WorkerLostError
from .failure import safe_text
from .seconds import Seconds, checked_seconds
from .states import ALL_STATES
from .stream import OutputStream
from .tasks import spawn
from .updates import Updates

__all__ = ["HEADERS", "events"]

#: What a response of events needs: nothing on the way may keep it, or hold it back (``X-Accel-Buffering`` is nginx's).
HEADERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",
    }
)


def events(source: OutputStream[Any] | Updates, ping: Seconds = 15.0, retry: int = 2000) -> AsyncGenerator[bytes, None]:
    """The body of a response: ``source`` as server-sent events, as many in one item as there are at the time.

    No I/O before the first step. ``source`` belongs to the iterator and is closed with it, at once when the client goes
    away. ``data`` is always one line of JSON. From ``result.stream()``:

    =========== ======================================================================================================
    event       data
    =========== ======================================================================================================
    (message)   a chunk; the event's id is its cursor. What JSON lacks is tagged as in the store; NaN is null
    ``restart`` ``{"cursor"}``: another attempt begins anew, and what was shown is void. Its chunks follow
    ``gap``     ``{"missed", "cursor"}``: so many chunks are gone. Those behind them follow
    ``lost``    ``{}``: the worker has died. The events go on if the queue runs the task again
    ``error``   ``{"type", "message"}``: what the task raised; ``end`` follows. ``EventSource`` gives its own trouble
                the same name, but without data
    ``end``     ``{"state"}``: how the task ended, or ``"CLOSED"``. Never the value. Nothing follows
    =========== ======================================================================================================

    ``restart`` and ``gap`` are told if the stream was opened with ``on_restart="raise"`` and ``on_gap="raise"``, the
    default. From ``result.updates()`` come ``lost``, ``error`` and ``end`` in the same way, and for each state before
    the final one:

    =========== ======================================================================================================
    ``state``   ``{"state", "result"}``: the state, and what the task told with it; null for the states of Celery's own
    =========== ======================================================================================================

    :param ping: seconds of silence after which a comment is sent, so that nothing on the way takes the connection for
        dead; 0 for none.
    :param retry: milliseconds that the browser waits before it reconnects.
    :raises BackendError, SerializationError: as ``source`` does. That ends the body, and the browser reconnects.
    """
    if isinstance(retry, bool) or not isinstance(retry, int) or retry < 0:
        raise UsageError(f"retry is a whole number of milliseconds, not {retry!r}")
    if not isinstance(source, (OutputStream, Updates)):
        raise UsageError(f"events are made of result.stream() or result.updates(), not of {type(source).__qualname__}")
    told: _Told = _Output(source) if isinstance(source, OutputStream) else _States(source)
    return _events(told, checked_seconds("ping", ping) or None, retry)


class _Told(Protocol):
    """What events are made of. `next` gives as many as there are; `aclose` does not wait for anything."""

    #: Nothing follows.
    over: bool

    async def next(self) -> bytes: ...
    async def aclose(self) -> None: ...


async def _events(told: _Told, ping: float | None, retry: int) -> AsyncGenerator[bytes, None]:
    step: asyncio.Task[bytes] | None = None
    try:
        yield b"retry: %d\n\n" % retry
        while not told.over:
            # A step outlives any number of pings: to cancel it could lose what it has taken.
            step = spawn(told.next())
            while not (await asyncio.wait([step], timeout=ping))[0]:
                yield b": ping\n\n"
            if data := step.result():
                yield data
    finally:
        await told.aclose()
        if step is not None and not step.done():
            step.cancel()
            with anyio.CancelScope(shield=True):  # against cancellations that are repeated until they are obeyed
                await asyncio.wait([step])
        if step is not None and step.done() and not step.cancelled():
            step.exception()  # nobody's news any more


class _Output:
    """The events of an output."""

    def __init__(self, stream: OutputStream[Any]) -> None:
        self.over = False
        self._first = self._stream = stream

    async def next(self) -> bytes:
        stream = self._stream
        try:
            batch = await stream.batch()
        except Exception as exc:
            if not stream.state:
                return self._gone_on(exc)
            self.over = True
            return _error(stream, exc) + _event(stream, "end", state=stream.state)
        if batch:
            return b"".join([b"id: %b\ndata: %b\n\n" % (at.encode(), stream.dumps(chunk)) for at, chunk in batch])
        self.over = True
        return _event(stream, "end", state=stream.state)

    def _gone_on(self, exc: Exception) -> bytes:
        """Tell of what stands in the way, and go on behind it. Raises ``exc`` if there is no way on."""
        stream = self._stream
        match exc:
            case OutputRestarted():
                self._stream = self._first.resumed(exc.cursor)  # whose worker may be lost in its turn
                return _event(stream, "restart", cursor=exc.cursor)
            case OutputGap():
                self._stream = stream.resumed(exc.cursor)
                return _event(stream, "gap", missed=exc.missed, cursor=exc.cursor)
            case WorkerLostError():
                self._stream = stream.resumed(stream.cursor, on_lost="wait")
                return _event(stream, "lost")
        raise exc

    async def aclose(self) -> None:
        await self._stream.aclose()


class _States:
    """The events of the states of a task."""

    def __init__(self, updates: Updates) -> None:
        self.over = False
        self._updates = updates

    async def next(self) -> bytes:
        updates = self._updates
        try:
            meta = await anext(updates, None)
        except WorkerLostError:
            self._updates = updates.resumed(on_lost="wait")
            return _event(updates, "lost")
        self.over = meta is None or meta.ready
        if meta is None:  # it had ended before
            return b""
        if not meta.ready:
            # The worker's host name and process id come with STARTED, for instance: they are not for browsers.
            result = None if meta.status in ALL_STATES else meta.result
            return _event(updates, "state", state=meta.status, result=result)
        error = _error(updates, meta.result) if meta.propagates else b""
        return error + _event(updates, "end", state=meta.status)

    async def aclose(self) -> None:
        await self._updates.aclose()


def _error(source: OutputStream[Any] | Updates, exc: Any) -> bytes:
    return _event(source, "error", type=type(exc).__name__, message=safe_text(exc))


def _event(source: OutputStream[Any] | Updates, name: str, **data: Any) -> bytes:
    """An event without an id: the browser keeps the cursor that it has."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), source.dumps(data))
