"""Running tasks in a browser: `events` turns a stream of output, or of states, into server-sent events.

The format is that of the WHATWG (https://html.spec.whatwg.org/multipage/server-sent-events.html). It works with any web
framework: the body of the response is an async iterator of bytes, and its headers are `HEADERS`. With Starlette::

    async def answer(request):
        try:
            stream = backend.result(task_id).stream(after=request.headers.get("last-event-id"))
        except aioresult.InvalidCursor:  # a client can send any header
            return Response(status_code=400)
        return StreamingResponse(events(stream), headers=HEADERS)

An ``EventSource`` reconnects whenever the body ends, and sends the id of the last event that it has got. So each
chunk carries its cursor as its id, and no other event carries an id. To stop reconnecting, call ``close()`` in the page
on the event ``end``. An answer such as 204 or 400 also stops it.
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
from .states import ALL_STATES, RETRY
from .stream import OutputStream
from .tasks import spawn
from .updates import Updates

__all__ = ["HEADERS", "events"]

#: The headers of a response with events. No proxy may cache or buffer the response (``X-Accel-Buffering`` is nginx's).
HEADERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",
    }
)


def events(source: OutputStream[Any] | Updates, ping: Seconds = 15.0, retry: int = 2000) -> AsyncGenerator[bytes, None]:
    """Turn ``source`` into the body of a response: server-sent events. Each item holds all events that are there.

    There is no I/O before the first step. Closing the iterator closes ``source``, also when the client disconnects.
    ``data`` is always one line of JSON. From ``result.stream()``:

    =========== ======================================================================================================
    event       data
    =========== ======================================================================================================
    (message)   a chunk; the event's id is its cursor. Types that JSON lacks are tagged as in the store; NaN is null
    ``restart`` ``{"cursor"}``: another attempt writes the output again; discard all chunks so far. Its chunks follow
    ``gap``     ``{"missed", "cursor"}``: ``missed`` chunks are gone. The chunks after them follow
    ``lost``    ``{}``: the worker has died. The events go on if the queue runs the task again
    ``error``   ``{"type", "message"}``: the exception of the task; ``end`` follows. ``EventSource`` also calls its own
                errors ``error``, but they have no data
    ``end``     ``{"state"}``: the final state of the task, or ``"CLOSED"``. Never the value. Nothing follows
    =========== ======================================================================================================

    ``restart`` and ``gap`` are sent if the stream was opened with ``on_restart="raise"`` and ``on_gap="raise"``, the
    default. ``result.updates()`` gives ``lost``, ``error`` and ``end`` in the same way. For each state before the final
    one it gives:

    =========== ======================================================================================================
    ``state``   ``{"state", "result"}``: the state, and the value stored with it; null for Celery's own states. RETRY
                has ``type`` and ``message``, too: why the task will run again
    =========== ======================================================================================================

    :param ping: seconds without an event after which a comment is sent, so that no proxy closes an idle connection; 0
        sends no comments.
    :param retry: milliseconds that the browser waits before it reconnects.
    :raises BackendError, SerializationError: ``source`` has raised it. That ends the body, and the browser reconnects.
    :raises UsageError: an argument is of the wrong type.
    """
    if isinstance(retry, bool) or not isinstance(retry, int) or retry < 0:
        raise UsageError(f"retry must be a whole number of milliseconds, not {retry!r}")
    if not isinstance(source, (OutputStream, Updates)):
        raise UsageError(
            f"events needs result.stream() or result.updates(), not an object of type {type(source).__qualname__}"
        )
    told: _Told = _Output(source) if isinstance(source, OutputStream) else _States(source)
    return _events(told, checked_seconds("ping", ping) or None, retry)


class _Told(Protocol):
    """A source of events. `next` waits for events and returns all that are there; `aclose` never waits."""

    #: True if no more events follow.
    over: bool

    async def next(self) -> bytes: ...
    async def aclose(self) -> None: ...


async def _events(told: _Told, ping: float | None, retry: int) -> AsyncGenerator[bytes, None]:
    step: asyncio.Task[bytes] | None = None
    try:
        yield b"retry: %d\n\n" % retry
        while not told.over:
            # The task `step` goes on while pings are sent: cancelling it could lose the chunks that it has taken.
            step = spawn(told.next())
            while not (await asyncio.wait([step], timeout=ping))[0]:
                yield b": ping\n\n"
            if data := step.result():
                yield data
    finally:
        await told.aclose()
        if step is not None and not step.done():
            step.cancel()
            with anyio.CancelScope(shield=True):  # anyio repeats its cancellations until the task ends
                await asyncio.wait([step])
        if step is not None and step.done() and not step.cancelled():
            step.exception()  # marks the error as seen, because there is no reader any more


class _Output:
    """Makes the events from a stream of output."""

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
        """Resume the stream after ``exc``, and return the event for that error. Raises an error that ends it."""
        stream = self._stream
        match exc:
            case OutputRestarted():
                self._stream = self._first.resumed(exc.cursor)  # reports a lost worker again, as the first stream did
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
    """Makes the events from the states of a task."""

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
        if meta is None:  # the updates had ended before
            return b""
        if not meta.ready:
            # Celery's own states have internal data: STARTED has the worker's host name and process id, for example.
            result = None if meta.status in ALL_STATES else meta.result
            why = _described(meta.result) if meta.status == RETRY else {}
            return _event(updates, "state", state=meta.status, result=result, **why)
        error = _error(updates, meta.result) if meta.propagates else b""
        return error + _event(updates, "end", state=meta.status)

    async def aclose(self) -> None:
        await self._updates.aclose()


def _error(source: OutputStream[Any] | Updates, exc: Any) -> bytes:
    return _event(source, "error", **_described(exc))


def _described(exc: Any) -> dict[str, str]:
    return {"type": type(exc).__name__, "message": safe_text(exc)}


def _event(source: OutputStream[Any] | Updates, name: str, **data: Any) -> bytes:
    """Encode an event without an id, so that the browser keeps the cursor of the last chunk."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), source.dumps(data))
