"""`aioresult.sse`: what a browser makes of the bytes, wherever they are cut."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from starlette.responses import StreamingResponse

import aioresult
from aioresult import Backend, Keep, OutputStream
from aioresult.backends.memory import MemoryBackend, MemoryStore
from aioresult.sse import HEADERS, events

from .eventsource import Event, EventSource
from .harness import until

#: What might break a line, an event, a JSON parser or a page.
HARD = ["", "a\nb\r\nc\rd", "data: x\n\nid: 9-9\n\n", "\u2028\u2029\x85", "\0", "ünï😀\ud800", ": ping", " "]


class Page:
    """A page that shows an output, and stores each event that it gets."""

    def __init__(self) -> None:
        self.source = EventSource()
        self.chunks: list[Any] = []
        self.events: list[Event] = []

    def feed(self, data: bytes) -> None:
        for event in self.source.feed(data):
            self.events.append(event)
            if event.name == "message":
                self.chunks.append(event.value)
            elif event.name == "restart":
                self.chunks.clear()

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.events]

    def told(self, name: str) -> list[Any]:
        return [event.value for event in self.events if event.name == name]


async def body_of(stream: OutputStream[Any]) -> bytes:
    return b"".join([data async for data in events(stream)])


async def write(backend: Backend, chunks: list[Any], task_id: str = "t", keep: Keep | None = None) -> None:
    async with backend.output(task_id, keep=keep) as output:
        for chunk in chunks:
            await output.send(chunk)
            await output.flush()


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    async with aioresult.connect("memory://", lease=0.1) as backend:
        yield backend


# -- the parser itself, by the examples of the WHATWG's text ---------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("data: YHOO\ndata: +2\ndata: 10\n\n", [("message", "YHOO\n+2\n10", "")]),
        (
            ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
            [("message", "first event", "1"), ("message", "second event", ""), ("message", " third event", "")],
        ),
        ("data:test\r\rdata: test\r\n\r\nevent: add\ndata: 7\n\n", [("message", "test", "")] * 2 + [("add", "7", "")]),
        ("\ufeffid: 5\n\ndata: x\n\nid: 6\ndata: pending\n", [("message", "x", "5")]),
        ("id: 1\0\ndata: x\n\nevent: only\n\n", [("message", "x", "")]),
    ],
)
def test_the_parser_reads_what_the_standard_shows(text: str, events: list[tuple[str, str, str]]) -> None:
    whole, bytewise = EventSource(), EventSource()
    assert whole.feed(text.encode()) == events
    assert [event for byte in text.encode() for event in bytewise.feed(bytes([byte]))] == events


# -- cut anywhere ----------------------------------------------------------------------------------------------------


async def resumed_at_every_byte(backend: Backend, body: bytes, chunks: list[Any], *, state: str = "CLOSED") -> None:
    """Cut ``body`` at every byte, and have the browser come back: it has ``chunks`` in the end, each once."""
    for cut in range(len(body) + 1):
        page = Page()
        page.feed(body[:cut])
        page.source.cut()
        if "end" not in page.names:
            page.feed(await body_of(backend.stream("t", after=page.source.last_id or None)))
        assert page.chunks == chunks, cut
        assert page.told("end") == [{"state": state}], cut


async def test_cut_at_every_byte_the_text_is_whole_and_nothing_twice(backend: Backend) -> None:
    await write(backend, HARD)
    body = await body_of(backend.stream("t"))
    assert body.isascii()
    await resumed_at_every_byte(backend, body, HARD)


async def test_cut_at_every_byte_of_an_output_that_began_anew(backend: Backend) -> None:
    stream = events(backend.stream("t"))
    body = await anext(stream)
    first = backend.output("t")
    for chunk in ("void", "void, too"):
        await first.send(chunk)
        body += await anext(stream)
    await write(backend, ["a", "b"])
    first.stop()
    body += b"".join([data async for data in stream])
    page = Page()
    page.feed(body)
    assert page.names == ["message", "message", "restart", "message", "message", "end"]
    await resumed_at_every_byte(backend, body, ["a", "b"])


async def test_cut_at_every_byte_of_an_output_with_a_gap(backend: Backend) -> None:
    await write(backend, ["a", "b", "c", "d", "e"], keep=Keep(chunks=2))
    body = await body_of(backend.stream("t"))
    page = Page()
    page.feed(body)
    assert page.names == ["gap", "message", "message", "end"]
    (gap,) = page.told("gap")
    assert gap["missed"] == 3
    assert page.events[0].last_id == ""
    assert await backend.read_output("t", after=gap["cursor"]) == (["d", "e"], page.source.last_id, True)
    await resumed_at_every_byte(backend, body, ["d", "e"])


async def test_each_chunk_of_a_batch_has_its_own_cursor(backend: Backend) -> None:
    async with backend.output("t") as output:
        for n in range(100):
            await output.send(n)
    _, batch, _ = [data async for data in events(backend.stream("t"))]
    page = Page()
    page.feed(batch)
    assert page.chunks == list(range(100))
    for n in (0, 1, 57, 99):
        assert (await backend.read_output("t", after=page.events[n].last_id)).chunks == list(range(n + 1, 100))


async def test_a_batch_that_spans_a_restart_has_the_cursors_of_both(backend: Backend) -> None:
    async with backend.stream("t", on_restart="continue") as stream:
        first = backend.output("t")
        await first.send("old")
        assert [chunk for _, chunk in await stream.batch()] == ["old"]
        await first.send("older")
        await first.flush()
        await write(backend, ["new"])
        first.stop()
        seen = []
        while batch := await stream.batch():
            seen += batch
    assert [chunk for _, chunk in seen] == ["older", "new"]
    assert [cursor.partition("-")[2] for cursor, _ in seen] == ["2", "1"]
    assert (await backend.read_output("t", after=seen[-1][0])).chunks == []


# -- each kind of event ----------------------------------------------------------------------------------------------


async def test_the_headers_are_those_of_an_event_stream() -> None:
    assert HEADERS["Content-Type"].startswith("text/event-stream")
    assert (HEADERS["Cache-Control"], HEADERS["X-Accel-Buffering"]) == ("no-cache", "no")


async def test_the_body_begins_with_the_time_to_reconnect(backend: Backend) -> None:
    body = events(backend.stream("t"), retry=70)
    source = EventSource()
    assert source.feed(await anext(body)) == []
    assert source.retry == 70
    await body.aclose()


async def test_an_end_tells_the_state_and_never_the_value(backend: Backend) -> None:
    async with backend.running("t") as task:
        await task.output.send("chunk")
        task.value = "secret"
    body = await body_of(backend.stream("t"))
    page = Page()
    page.feed(body)
    assert page.names == ["message", "end"]
    assert page.told("end") == [{"state": "SUCCESS"}]
    assert b"secret" not in body


async def test_what_the_task_raised_is_told_without_its_traceback(backend: Backend) -> None:
    with suppress(ValueError):
        async with backend.running("t") as task:
            await task.output.send("chunk")
            raise ValueError("the card\nwas declined")
    body = await body_of(backend.stream("t"))
    page = Page()
    page.feed(body)
    assert page.names == ["message", "error", "end"]
    assert page.told("error") == [{"type": "ValueError", "message": "the card\nwas declined"}]
    assert page.told("end") == [{"state": "FAILURE"}]
    assert b"Traceback" not in body
    assert {event.last_id for event in page.events} == {page.events[0].last_id}
    await resumed_at_every_byte(backend, body, ["chunk"], state="FAILURE")


async def test_a_revoked_task_tells_why(backend: Backend) -> None:
    await backend.revoke("t", "no longer needed")
    page = Page()
    page.feed(await body_of(backend.stream("t")))
    assert page.told("error") == [{"type": "TaskRevokedError", "message": "no longer needed"}]
    assert page.told("end") == [{"state": "REVOKED"}]


async def test_a_lost_worker_is_told_each_time_and_the_next_attempt_follows() -> None:
    store = MemoryStore()
    page = Page()
    async with MemoryBackend(store=store, lease=0.05) as reader:
        body = events(reader.stream("t"), ping=0.03)

        async def read(name: str) -> None:
            while name not in page.names:
                page.feed(await anext(body))

        for attempt in ("first", "second"):
            async with MemoryBackend(store=store, lease=0.05) as worker:
                run = worker.running("t")
                task = await run.__aenter__()
                await task.output.send(attempt)
                await read("message")
                assert page.chunks == [attempt]
                await worker.liveness.close()  # as if the process had died
                await read("lost")
                task.output.stop()
            page.source.comments.clear()
            while len(page.source.comments) < 3:  # longer than a lease
                page.feed(await anext(body))
            assert page.names.count("lost") == 1
            page.events.clear()
        async with reader.running("t") as task:
            await task.output.send("third")
        page.feed(b"".join([data async for data in body]))
    assert page.names == ["restart", "message", "end"]
    assert page.chunks == ["third"]


async def test_what_json_lacks_comes_as_it_is_stored_and_nan_as_null(backend: Backend) -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    await write(backend, [{"at": now}, [math.nan, -math.inf, 1], "NaN", {"Infinity": 1.5}])
    page = Page()
    page.feed(await body_of(backend.stream("t")))
    tagged = {"__type__": "datetime", "__value__": now.isoformat()}
    assert page.chunks == [{"at": tagged}, [None, None, 1], "NaN", {"Infinity": 1.5}]


async def test_a_backend_that_may_only_read_can_tell_a_browser(backend: Backend) -> None:
    await write(backend, ["a"])
    cast("MemoryBackend", backend).codec.write_nothing("it only reads")
    page = Page()
    page.feed(await body_of(backend.stream("t")))
    assert page.chunks == ["a"]


# -- silence ---------------------------------------------------------------------------------------------------------


async def test_silence_is_filled_with_pings_and_loses_nothing(backend: Backend) -> None:
    body = events(backend.stream("t"), ping=0.001)
    page = Page()
    page.feed(await anext(body))
    async with backend.output("t") as output:
        for n in range(5):
            page.feed(await anext(body))
            assert page.source.comments
            page.source.comments.clear()
            await output.send(n)
            await output.flush()
            while len(page.chunks) <= n:
                page.feed(await anext(body))
            cursor = page.source.last_id
            page.feed(await anext(body))
            assert page.source.last_id == cursor
    while "end" not in page.names:
        page.feed(await anext(body))
    assert page.chunks == [0, 1, 2, 3, 4]


async def test_without_a_ping_silence_stays_silence(backend: Backend) -> None:
    body = events(backend.stream("t"), ping=0)
    await anext(body)
    step = asyncio.ensure_future(anext(body))
    await until(lambda: subscribed(backend))
    await write(backend, ["a"])
    assert b'"a"' in await step
    await body.aclose()


# -- the client goes away --------------------------------------------------------------------------------------------


async def subscribed(backend: Backend) -> bool:
    return bool(cast("MemoryBackend", backend).store.listeners)


async def unsubscribed(backend: Backend) -> bool:
    return not await subscribed(backend)


async def test_nothing_is_held_before_the_first_step(backend: Backend) -> None:
    body = events(backend.stream("t"))
    del body
    gc.collect()
    assert await unsubscribed(backend)


@pytest.mark.parametrize("source", ["stream", "updates"])
async def test_a_cancelled_response_ends_the_subscription_at_once(backend: Backend, source: str) -> None:
    async def respond() -> None:
        async for _ in events(getattr(backend, source)("t")):
            pass

    response = asyncio.create_task(respond())
    await until(lambda: subscribed(backend))
    response.cancel()
    with suppress(asyncio.CancelledError):
        await response
    assert not backend._streams._tails
    await until(lambda: unsubscribed(backend))


async def test_a_client_that_disconnects_ends_the_subscription(backend: Backend) -> None:
    gone = asyncio.Event()
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    response = StreamingResponse(events(backend.stream("t")), headers=HEADERS)
    serving = asyncio.ensure_future(response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send))
    await until(lambda: subscribed(backend))
    gone.set()
    await serving
    await until(lambda: unsubscribed(backend))
    assert dict(sent[0]["headers"])[b"content-type"] == HEADERS["Content-Type"].encode()


async def test_a_response_that_is_closed_at_a_ping_ends_the_subscription(backend: Backend) -> None:
    body = events(backend.stream("t"), ping=0.001)
    while await anext(body) != b": ping\n\n":
        pass
    await body.aclose()
    assert [task for task in asyncio.all_tasks() if "_Output" in repr(task)] == []
    await until(lambda: unsubscribed(backend))


async def test_an_error_of_the_backend_ends_the_body() -> None:
    async with aioresult.connect("memory://") as backend:
        body = events(backend.stream("t"))
        await anext(body)
        step = asyncio.ensure_future(anext(body))
        await until(lambda: subscribed(backend))
    with pytest.raises(aioresult.BackendClosedError):
        await step


# -- states ----------------------------------------------------------------------------------------------------------


async def test_a_retry_is_told_with_its_reason(backend: Backend) -> None:
    body, page = events(backend.updates("t")), Page()
    for _ in range(2):
        page.feed(await anext(body))
    await backend.mark_as_retry("t", ConnectionError("the mail server is away"))
    page.feed(await anext(body))
    why = {"type": "ConnectionError", "message": "the mail server is away"}
    assert page.told("state")[1:] == [{"state": "RETRY", "result": None, **why}]
    await body.aclose()


async def test_states_and_progress_are_told_and_the_value_is_not(backend: Backend) -> None:
    body = events(backend.updates("t"))
    page = Page()
    for _ in range(2):
        page.feed(await anext(body))
    assert page.told("state") == [{"state": "PENDING", "result": None}]
    async with backend.running("t") as task:
        page.feed(await anext(body))
        task.progress(3, 10, "loading")
        while len(page.events) < 3:
            page.feed(await anext(body))
        task.value = "secret"
    page.feed(b"".join([data async for data in body]))
    assert page.told("state")[1:] == [
        {"state": "STARTED", "result": None},
        {"state": "PROGRESS", "result": {"current": 3, "total": 10, "message": "loading"}},
    ]
    assert page.told("end") == [{"state": "SUCCESS"}]
    assert "secret" not in str(page.events)


async def test_a_failure_ends_the_states_with_its_error(backend: Backend) -> None:
    await backend.mark_as_failure("t", KeyError("key"))
    updates = backend.updates("t")
    page = Page()
    page.feed(b"".join([data async for data in events(updates)]))
    assert page.told("error") == [{"type": "KeyError", "message": "'key'"}]
    assert page.told("end") == [{"state": "FAILURE"}]
    assert [data async for data in events(updates)] == [b"retry: 2000\n\n"]


async def test_states_go_on_behind_a_lost_worker() -> None:
    store = MemoryStore()
    page = Page()
    async with MemoryBackend(store=store, lease=0.05) as reader:
        body = events(reader.updates("t"))
        async with MemoryBackend(store=store, lease=0.05) as worker:
            await worker.running("t").__aenter__()
            await worker.liveness.close()
            while "lost" not in page.names:
                page.feed(await anext(body))
        await reader.mark_as_done("t", 1)
        page.feed(b"".join([data async for data in body]))
    assert page.told("end") == [{"state": "SUCCESS"}]


# -- mistakes --------------------------------------------------------------------------------------------------------


async def test_mistakes_are_told_before_the_response_begins(backend: Backend) -> None:
    with pytest.raises(aioresult.InvalidCursor):
        backend.stream("t", after="9-9\n")
    for wrong in (-1, True, 1.5):
        with pytest.raises(aioresult.UsageError, match="retry must be a whole number"):
            events(backend.stream("t"), retry=cast("int", wrong))
    with pytest.raises(aioresult.ImproperlyConfigured, match="ping"):
        events(backend.stream("t"), ping=-1)
    with pytest.raises(aioresult.UsageError, match="not an object of type list"):
        events(cast("OutputStream[Any]", []))
