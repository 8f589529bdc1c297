"""The output of a task: what its readers get, and what its producer is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from aioresult import (
    TAIL,
    Backend,
    InvalidCursor,
    Keep,
    Output,
    OutputFull,
    OutputGap,
    OutputRestarted,
    OutputStream,
    OutputSuperseded,
    TaskRevokedError,
    UsageError,
)
from aioresult.exceptions import BackendClosedError, BackendStoreError, EncodeError

from ..harness import Gate, Harness, count_calls, intercept, until

Primitive = Callable[..., Awaitable[Any]]

#: Flushes of one, of three, of two chunks.
FLUSHES = (["a"], ["b", "c", "d"], ["e", "f"])
ALL = [chunk for flush in FLUSHES for chunk in flush]


async def put(output: Output, *chunks: Any) -> None:
    """One flush."""
    for chunk in chunks:
        output.send_nowait(chunk)
    await output.flush()


async def read(stream: OutputStream[Any]) -> list[Any]:
    async with stream:
        return [chunk async for chunk in stream]


def reading(backend: Backend, after: str | None = None, **terms: Any) -> asyncio.Task[list[Any]]:
    return asyncio.create_task(read(backend.stream("t", after, **terms)))


async def waiting(backend: Backend, count: int = 1, task_id: str = "t") -> None:
    """So many readers have read what is there, and wait for more."""

    def settled() -> bool:
        tail = backend._streams._tails.get(task_id)
        if tail is None or not tail._confirmed or len(tail) < count:
            return False
        followers = tail._followers.values()
        return all(each._woken is not None and not each._woken.done() for each in followers)

    await until(settled)


# -- joining ----------------------------------------------------------------------------------------------------------


async def test_readers_join_before_every_flush_and_after_the_end(live: Harness) -> None:
    worker, web = await live.pair()
    readers = [reading(web)]
    await waiting(web)
    async with worker.output("t") as output:
        for flush in FLUSHES:
            await put(output, *flush)
            readers.append(reading(web))
            await waiting(web, len(readers))
    assert await asyncio.gather(*readers, read(web.stream("t"))) == [ALL] * 5
    await live.subscribed(0)


async def test_readers_join_at_any_turn_of_the_loop(live: Harness) -> None:
    worker, web = await live.pair()
    output, readers = worker.output("t"), []
    for number in range(60):
        await output.send(number)
        readers.append(reading(web))
        await asyncio.sleep(0)
    await output.close()
    assert await asyncio.gather(*readers) == [list(range(60))] * 60


@pytest.mark.parametrize("over", [False, True], ids=["live", "over"])
async def test_a_reader_goes_on_behind_any_chunk_also_inside_an_entry(live: Harness, over: bool) -> None:
    worker, web = await live.pair()
    output = worker.output("t")
    for flush in FLUSHES:
        await put(output, *flush)
    if over:
        await output.close()
    stream, cursors = web.stream("t"), ["0-0"]
    for chunk in ALL:
        assert await anext(stream) == chunk
        cursors.append(stream.cursor)
    readers = [reading(web, cursor) for cursor in cursors]
    if not over:
        await waiting(web, len(cursors))
        await put(output, "g", "h")
        await output.close()
    rest = [] if over else ["g", "h"]
    assert await asyncio.gather(*readers) == [(ALL + rest)[n:] for n in range(len(cursors))]
    assert cursors[-1].endswith("-6")
    await stream.aclose()


@pytest.mark.parametrize("count", [1, 2, 100])
async def test_any_number_of_readers(live: Harness, count: int) -> None:
    worker, web = await live.pair()
    readers = [reading(web) for _ in range(count)]
    await waiting(web, count)
    async with worker.output("t") as output:
        for number in range(20):
            await output.send(number)
            await asyncio.sleep(0)
    assert await asyncio.gather(*readers) == [list(range(20))] * count


async def test_what_is_over_costs_no_subscription(live: Harness) -> None:
    worker, web = await live.connect(), live.make()
    calls = count_calls(web)
    await live.open(web)
    async with worker.output("t") as output:
        await put(output, 1, 2)
    assert await read(web.stream("t")) == [1, 2]
    assert not calls["_subscribe"]


async def test_an_empty_output(live: Harness) -> None:
    worker, web = await live.pair()
    reader = reading(web)
    await waiting(web)
    async with worker.output("t"):
        pass
    assert await reader == await read(web.stream("t")) == []
    await worker.mark_as_done("u", 1)
    assert await read(web.stream("u")) == []
    assert await web.read_output("t") == ([], (await web.read_output("t")).cursor, True)


async def test_any_json_value_is_a_chunk(live: Harness) -> None:
    values: list[Any] = [
        "",
        " ",
        "\x00",
        "ü\u2028",
        None,
        False,
        0,
        -1.5,
        [],
        {},
        [[]],
        {"": ""},
        b"\x00\xff",
        "x" * 100,
    ]
    worker, web = await live.pair()
    reader = reading(web)
    await waiting(web)
    async with worker.output("t") as output:
        for value in values:
            await output.send(value)
        with pytest.raises(EncodeError, match="chunk of the output of task t"):
            await output.send(object())
        changed = [1]
        await output.send(changed)
        changed.append(2)
    assert await reader == await read(web.stream("t")) == [*values, [1]]


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [16 * 2**10, 64 * 2**10, 2**20], ids=["message", "flush", "unsent"])
async def test_chunks_about_a_limit_of_bytes(live: Harness, limit: int) -> None:
    """As JSON in a list such a text has four bytes more, as JSON two."""
    texts = ["x" * (limit - less) for less in (5, 4, 3, 2, 1, 0)]
    worker, web = await live.pair()
    reader = reading(web)
    await waiting(web)
    async with worker.output("t", keep=Keep(bytes=2**24)) as output:
        for text in texts:
            await put(output, text)
            await output.send("")
    expected = [each for text in texts for each in (text, "")]
    assert await reader == expected
    assert await read(web.stream("t")) == expected


async def test_a_box_that_is_just_full_and_one_chunk_more(live: Harness) -> None:
    worker, web = await live.pair()
    for task_id, chunks in (("just", [0] * 64), ("more", [0] * 65), ("bytes", ["x" * 8186] * 9)):
        stream, output = web.stream(task_id), worker.output(task_id)
        await put(output, "first")
        assert await anext(stream) == "first"
        step = asyncio.ensure_future(anext(stream))
        await waiting(web, task_id=task_id)
        for chunk in chunks:
            await put(output, chunk)
        assert await step == chunks[0]
        assert len(stream._reading._box) <= 65
        await output.close()
        assert await read(stream) == chunks[1:]


async def test_what_is_unsent_is_bounded(live: Harness) -> None:
    worker, web = live.make(), await live.connect()
    gate = Gate(worker, "_append")
    await live.open(worker)
    for task_id, fill in (("t", ["x"] * 256), ("u", ["x" * (2**20 - 3), ""])):
        gate.open.clear()
        output = worker.output(task_id)
        output.send_nowait("first")
        await asyncio.sleep(0)
        assert output._flush is not None
        for chunk in fill:
            output.send_nowait(chunk)
        with pytest.raises(OutputFull, match="unsent"):
            output.send_nowait("too much")
        sender = asyncio.create_task(output.send("waits"))
        cancelled = asyncio.create_task(output.send("never"))
        await asyncio.sleep(0)
        cancelled.cancel()
        gate.open.set()
        await sender
        await output.close()
        assert await read(web.stream(task_id)) == ["first", *fill, "waits"]


async def test_the_log_is_full(live: Harness) -> None:
    worker, web = await live.pair()
    async with worker.output("t", keep=Keep(chunks=3), on_full="fail") as output:
        for number in range(3):
            await output.send(number)
        with pytest.raises(OutputFull, match="raise keep"):
            await output.send(3)
        with pytest.raises(OutputFull, match="raise keep"):
            output.send_nowait(3)
    assert await read(web.stream("t")) == [0, 1, 2]
    async with worker.output("u", keep=Keep(bytes=10), on_full="fail") as output:
        await output.send("x" * 8)
        with pytest.raises(OutputFull):
            await output.send(0)
    assert await read(web.stream("u")) == ["x" * 8]


async def test_what_is_trimmed_is_a_gap_that_says_where_to_go_on(live: Harness) -> None:
    """Which chunks are left is the store's affair, as long as it is at least as many as `Keep` says."""
    worker, web = await live.pair()
    output = worker.output("t", keep=Keep(chunks=10))
    slow = web.stream("t")
    skips = web.stream("t", on_gap="skip")
    for number in range(250):
        await put(output, number)
        if number == 0:
            assert await anext(slow) == await anext(skips) == 0
    await output.close()
    with pytest.raises(OutputGap) as caught:
        await read(slow)
    gap = caught.value
    rest = await read(web.stream("t", gap.cursor))
    assert len(rest) >= 10
    assert rest == list(range(1 + gap.missed, 250))
    assert gap.cursor.endswith(f"-{1 + gap.missed}")
    assert await read(skips) == rest
    with pytest.raises(OutputGap) as caught:
        await web.read_output("t")
    assert caught.value.missed == gap.missed + 1
    assert (await web.read_output("t", caught.value.cursor, limit=2)).chunks == rest[:2]


async def test_a_slow_reader_keeps_nobody_waiting_and_misses_nothing(live: Harness) -> None:
    worker, web = await live.pair()
    slow, output = web.stream("t"), worker.output("t")
    await put(output, 0)
    assert await anext(slow) == 0
    step = asyncio.ensure_future(anext(slow))
    await waiting(web)
    for number in range(1, 300):
        await output.send(number)
        if number % 3 == 0:
            await output.flush()
    await output.close()
    assert [0, await step, *await read(slow)] == list(range(300))


# -- from now on, and long polls --------------------------------------------------------------------------------------


async def test_from_now_on(live: Harness) -> None:
    worker, web = await live.pair()
    output = worker.output("t")
    early = reading(web, TAIL)
    await waiting(web)
    await put(output, 1, 2)
    late = reading(web, TAIL)
    await waiting(web, 2)
    page = await web.read_output("t", TAIL)
    assert (page.chunks, page.cursor, page.ended) == ([], output.cursor, False)
    await put(output, 3)
    assert (await web.read_output("t", page.cursor)).chunks == [3]
    await output.close()
    assert [await early, await late, await read(web.stream("t", TAIL))] == [[1, 2, 3], [3], []]
    assert (await web.read_output("t", TAIL)).ended


async def test_a_long_poll(live: Harness) -> None:
    worker, web = await live.pair()
    assert await web.read_output("t", wait=0.01) == ([], "0-0", False)
    output = worker.output("t")
    await put(output, 1, 2, 3)
    page = await web.read_output("t", limit=2, wait=30)
    assert (page.chunks, page.ended) == ([1, 2], False)
    page = await web.result("t").read_output(page.cursor, wait=30)
    assert (page.chunks, page.ended) == ([3], False)
    poll = asyncio.create_task(web.read_output("t", page.cursor, wait=30))
    await waiting(web)
    await put(output, 4)
    page = await poll
    assert (page.chunks, page.cursor, page.ended) == ([4], output.cursor, False)
    poll = asyncio.create_task(web.read_output("t", page.cursor, wait=30))
    await waiting(web)
    await output.close()
    assert await poll == ([], page.cursor, True)
    await live.subscribed(0)


async def test_how_the_task_ended_is_no_error_of_a_page(live: Harness) -> None:
    worker, web = await live.pair()
    await put(worker.output("t"), 1)
    await worker.mark_as_failure("t", ValueError())
    page = await web.read_output("t")
    assert page.chunks == [1]
    assert await web.read_output("t", page.cursor) == ([], page.cursor, True)


@pytest.mark.parametrize(
    "cursor", ["", "x", "1", "1-", "-1", "1-1 ", "1--1", "\u0661-\u0661", "1-1\n", "9" * 21 + "-1", 5, b"1-1"]
)
async def test_what_is_no_cursor_is_refused_by_name(live: Harness, cursor: Any) -> None:
    web = await live.connect()
    with pytest.raises(InvalidCursor):
        web.stream("t", cursor)
    with pytest.raises(InvalidCursor):
        await web.read_output("t", cursor)


async def test_a_cursor_of_nowhere(live: Harness) -> None:
    worker, web = await live.pair()
    nowhere = "-".join(["9" * 20] * 2)
    assert await web.read_output("t", nowhere) == ([], nowhere, False)
    await put(worker.output("t"), 1)
    for cursor in (nowhere, f"{nowhere[:20]}-1", "1-1"):
        with pytest.raises(OutputRestarted) as caught:
            await web.read_output("t", cursor)
        assert (await web.read_output("t", caught.value.cursor)).chunks == [1]
    epoch = (await web.read_output("t")).cursor.partition("-")[0]
    assert await web.read_output("t", f"{epoch}-9") == ([], f"{epoch}-9", False)


# -- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["done", "failed", "revoked"])
async def test_a_result_without_an_end_mark_ends_the_output(live: Harness, how: str) -> None:
    """As of a Celery task."""
    worker, web = await live.pair()
    reader = reading(web)
    await waiting(web)
    await put(worker.output("t"), 1)
    if how == "done":
        await worker.mark_as_done("t", 1)
        assert await reader == await read(web.stream("t")) == [1]
        return
    await (worker.mark_as_failure("t", KeyError("x")) if how == "failed" else worker.mark_as_revoked("t", "why"))
    error: type[Exception] = KeyError if how == "failed" else TaskRevokedError
    with pytest.raises(error):
        await reader
    stream = web.stream("t")
    assert await anext(stream) == 1
    with pytest.raises(error):
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_producer_that_fails_leaves_the_end_to_the_task(live: Harness) -> None:
    worker, web = await live.pair()
    reader = reading(web)
    output = worker.output("t")
    await output.__aenter__()
    await output.send(1)
    await output.__aexit__(KeyError, KeyError(), None)
    with pytest.raises(UsageError, match="closed"):
        await output.send(2)
    await waiting(web)
    assert (await web.read_output("t")).ended is False
    await worker.mark_as_done("t", 1)
    assert await reader == [1]


async def test_another_producer_begins_anew(live: Harness) -> None:
    worker, web = await live.pair()
    old, new = worker.output("t"), worker.output("t")
    await put(old, "old 1", "old 2")
    raises, goes_on, inside = web.stream("t"), web.stream("t", on_restart="continue"), web.stream("t")
    for stream in (raises, goes_on):
        assert [await anext(stream), await anext(stream)] == ["old 1", "old 2"]
    assert await anext(inside) == "old 1"
    cursor = raises.cursor
    reader = asyncio.create_task(read(raises))
    await waiting(web)
    await put(new, "new 1")
    with pytest.raises(OutputRestarted) as caught:
        await reader
    await put(new, "new 2")
    with pytest.raises(OutputSuperseded):
        await put(old, "old 3")
    with pytest.raises(OutputSuperseded):
        await old.send("old 4")
    await new.close()
    assert await read(web.stream("t", caught.value.cursor)) == ["new 1", "new 2"]
    assert await read(goes_on) == ["new 1", "new 2"]
    assert goes_on.attempt == 1
    with pytest.raises(OutputRestarted):
        await read(web.stream("t", cursor))
    assert await read(web.stream("t")) == ["new 1", "new 2"]
    assert await anext(inside) == "old 2"
    with pytest.raises(OutputRestarted):
        await anext(inside)


async def test_a_forgotten_output_is_made_anew(live: Harness) -> None:
    worker, web = await live.pair()
    reader, output = reading(web), worker.output("t")
    await put(output, 1)
    await waiting(web)
    await web.forget("t")
    await put(output, 2)
    await output.close()
    assert await reader == [1, 2]
    with pytest.raises(OutputGap) as caught:
        await web.read_output("t")
    assert caught.value.missed == 1


# -- what breaks ------------------------------------------------------------------------------------------------------


async def test_a_listener_that_is_lost_again_and_again(live: Harness) -> None:
    worker, web = await live.pair()
    readers = [reading(web) for _ in range(3)]
    async with worker.output("t") as output:
        for number in range(100):
            await output.send(number)
            if number % 5 == 0:
                web._listener_lost(ConnectionError("cut by the test"))
            if number % 7 == 0:
                await output.flush()
    assert await asyncio.gather(*readers) == [list(range(100))] * 3


async def test_a_flush_whose_reply_is_lost_is_there_once(live: Harness) -> None:
    worker, web = live.make(), await live.connect()
    calls = 0

    async def lose_replies(original: Primitive, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        outcome = await original(*args)
        if calls % 2:
            raise BackendStoreError("lost by the test")
        return outcome

    intercept(worker, "_append", lose_replies)
    await live.open(worker)
    output, sent = worker.output("t"), 0
    while sent < 10:
        try:
            await output.send(sent)
            sent += 1
            await output.flush()
        except BackendStoreError:
            pass
    for _ in range(3):
        with suppress(BackendStoreError):
            await output.close()
    assert await read(web.stream("t")) == list(range(10))


async def test_a_flush_that_failed_unseen_is_made_good_by_the_next(live: Harness) -> None:
    """What `flush` and `close` raise is of their own attempt."""
    worker, web = live.make(), await live.connect()
    fails = [True]

    async def fail_first(original: Primitive, *args: Any) -> Any:
        if fails and fails.pop():
            raise BackendStoreError("refused by the test")
        return await original(*args)

    intercept(worker, "_append", fail_first)
    await live.open(worker)
    output = worker.output("t")
    await output.send(1)
    await until(lambda: output._stalled)
    await output.flush()
    await output.close()
    assert await read(web.stream("t")) == [1]


async def test_closing_the_backend_ends_everybody(live: Harness) -> None:
    worker, web = await live.connect(), live.make()
    await web.open()
    readers = [reading(web), asyncio.create_task(web.read_output("t", wait=30))]
    await waiting(web, 2)
    await web.aclose()
    for reader in readers:
        with pytest.raises(BackendClosedError):
            await reader
    output = worker.output("t")
    await worker.aclose()
    with pytest.raises(BackendClosedError):
        await output.send(1)
