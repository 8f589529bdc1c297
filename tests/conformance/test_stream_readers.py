"""Readers of an output that leave, are cancelled, come back, or get in each other's way; producers that do."""

from __future__ import annotations

import asyncio
import gc
import random
from typing import Any

import pytest

from aioresult import Backend, OutputStream, UsageError
from aioresult.backends.memory import MemoryBackend
from aioresult.exceptions import BackendConnectionError

from ..harness import Gate, Harness, intercept, topics_of, until
from .test_streams import put, read, reading, waiting


async def nothing_is_left(live: Harness, web: Backend) -> None:
    await live.subscribed(0)
    await until(lambda: not topics_of(web))
    assert not web._streams._tails


# -- leaving ----------------------------------------------------------------------------------------------------------


async def test_a_stream_that_was_never_begun_holds_nothing(live: Harness) -> None:
    web = await live.connect()
    for _ in range(100):
        web.stream("t")
        web.updates("t")
    stream = web.stream("t")
    batches = stream.batches()
    await batches.aclose()
    await stream.aclose()
    assert [chunk async for chunk in stream] == []
    await nothing_is_left(live, web)


async def test_break_without_aclose(live: Harness) -> None:
    worker, web = await live.pair()
    output = worker.output("t")
    await put(output, 1)
    step = asyncio.ensure_future(anext(web.stream("t", output.cursor)))
    await waiting(web)
    await put(output, 2)
    assert await step == 2
    del step
    stream = web.stream("t")
    async for chunk in stream:
        if chunk == 2:
            break
    waits = asyncio.ensure_future(anext(stream))
    await waiting(web)
    waits.cancel()
    await asyncio.wait([waits])
    del stream, waits
    gc.collect()
    await nothing_is_left(live, web)


async def test_leaving_the_block_ends_the_subscription(live: Harness) -> None:
    worker, web = await live.pair()
    async with worker.output("t") as output:
        await put(output, 1)
        async with web.stream("t") as stream:
            assert await anext(stream) == 1
            waits = asyncio.ensure_future(anext(stream))
            await waiting(web)
            waits.cancel()
            await asyncio.wait([waits])
        await nothing_is_left(live, web)


async def test_batches_that_are_left_early_lose_nothing(live: Harness) -> None:
    worker, web = await live.pair()
    output = worker.output("t")
    await put(output, 1, 2)
    stream = web.stream("t")
    async for chunks in stream.batches():
        assert chunks == [1, 2]
        break
    await put(output, 3)
    assert await anext(stream) == 3
    batches = stream.batches()
    step = asyncio.ensure_future(anext(batches))
    await waiting(web)
    step.cancel()
    await asyncio.wait([step])
    await put(output, 4, 5)
    assert [chunks async for chunks in batches] == []  # a generator that was cancelled has ended
    await output.close()
    assert [chunks async for chunks in stream.batches()] == [[4, 5]]
    await nothing_is_left(live, web)


async def test_a_stream_that_is_closed_by_another_task_ends(live: Harness) -> None:
    worker, web = await live.pair()
    stream, updates = web.stream("t"), web.updates("t")
    await anext(updates)
    readers = [asyncio.create_task(read(stream)), asyncio.create_task(_states(updates))]
    await waiting(web)
    await stream.aclose()
    await updates.aclose()
    assert await asyncio.wait_for(readers[0], 5) == []
    assert await asyncio.wait_for(readers[1], 5) == []
    await nothing_is_left(live, web)
    await worker.mark_as_done("t", 1)


async def _states(updates: Any) -> list[str]:
    return [meta.status async for meta in updates]


async def test_a_reader_is_cancelled_at_any_turn_and_goes_on(live: Harness) -> None:
    worker, web = await live.pair()
    output, stream, got = worker.output("t"), web.stream("t"), list[Any]()
    for turns in range(25):
        await output.send(turns)
        step = asyncio.ensure_future(anext(stream))
        for _ in range(turns):
            await asyncio.sleep(0)
        if not step.cancel() or not (await asyncio.wait([step]) and step.cancelled()):
            got.append(step.result())
    await output.close()
    assert got + await read(stream) == list(range(25))
    await nothing_is_left(live, web)


async def test_a_reader_is_cancelled_in_the_middle_of_a_page(live: Harness) -> None:
    worker, web = await live.connect(), live.make()
    gate = Gate(web, "_pages")
    await live.open(web)
    await put(worker.output("t"), 1, 2)
    stream = web.stream("t")
    step = asyncio.ensure_future(anext(stream))
    await gate.reached.wait()
    step.cancel()
    await asyncio.wait([step])
    gate.open.set()
    assert [await anext(stream), await anext(stream)] == [1, 2]


async def test_readers_come_and_go_at_random(live: Harness) -> None:
    worker, web = await live.pair()
    chance, output = random.Random(11), worker.output("t")
    readers: list[asyncio.Task[list[Any]]] = []
    for number in range(150):
        await output.send(number)
        readers.append(reading(web, on_lost=chance.choice(["raise", "wait"])))
        for reader in chance.sample(readers, 1):
            if chance.random() < 0.5:
                reader.cancel()
        if chance.random() < 0.1:
            for reader in readers:
                reader.cancel()
        if chance.random() < 0.5:
            await asyncio.sleep(0)
    await output.close()
    outcomes = await asyncio.gather(*readers, return_exceptions=True)
    whole = [outcome for outcome in outcomes if not isinstance(outcome, asyncio.CancelledError)]
    assert whole
    assert all(outcome == list(range(150)) for outcome in whole)
    await nothing_is_left(live, web)
    assert not web.liveness._watched


async def test_all_leave_and_others_come_in_the_same_turn(live: Harness) -> None:
    worker, web = await live.pair()
    output = worker.output("t")
    old = [reading(web) for _ in range(10)]
    await waiting(web, 10)
    for number in range(5):
        for reader in old:
            reader.cancel()
        await asyncio.wait(old)
        old = [reading(web) for _ in range(10)]
        await asyncio.sleep(0)
        await output.send(number)
    await output.close()
    assert await asyncio.gather(*old) == [[0, 1, 2, 3, 4]] * 10
    await nothing_is_left(live, web)


async def test_a_long_poll_does_not_wait_out_an_outage(live: Harness) -> None:
    """A stream does."""
    worker, web = await live.connect(), live.make(retry_for=0.01)
    down = [True]

    async def fail(original: Any, *args: Any) -> Any:
        if down:
            raise BackendConnectionError("away, by the test")
        return await original(*args)

    intercept(web, "_pages", fail)
    await live.open(web)
    reader = reading(web)
    with pytest.raises(BackendConnectionError):
        await web.read_output("t")
    assert not reader.done()
    down.clear()
    async with worker.output("t") as output:
        await output.send(1)
    assert await reader == [1]


# -- in each other's way ----------------------------------------------------------------------------------------------


async def test_two_streams_of_one_reader(live: Harness) -> None:
    worker, web = await live.pair()
    first, second, output = web.stream("t"), web.stream("t"), worker.output("t")
    for number in range(10):
        steps = [asyncio.ensure_future(anext(first)), asyncio.ensure_future(anext(second))]
        await asyncio.sleep(0)
        await output.send(number)
        assert await asyncio.gather(*steps) == [number, number]
    await output.close()
    assert await read(first) == await read(second) == []


async def test_one_stream_has_one_reader_at_a_time(live: Harness) -> None:
    worker, web = await live.pair()
    stream, updates = web.stream("t"), web.updates("t")
    await anext(updates)
    steps = [asyncio.ensure_future(anext(stream)), asyncio.ensure_future(anext(updates))]
    await asyncio.sleep(0)
    for other in (stream, updates, stream.batches()):
        with pytest.raises(UsageError, match="one reader at a time"):
            await anext(other)
    await put(worker.output("t"), 1)
    assert await steps[0] == 1
    await worker.mark_as_started("t")
    assert (await steps[1]).status == "STARTED"
    await stream.aclose()
    await updates.aclose()


async def test_what_is_no_choice_is_refused(live: Harness) -> None:
    web = await live.connect()
    for terms in ({"on_lost": "x"}, {"on_gap": "continue"}, {"on_restart": "skip"}):
        with pytest.raises(UsageError, match=next(iter(terms))):
            web.stream("t", **terms)
    for keep in ((0, 1), (1, 0)):
        with pytest.raises(UsageError, match="keep"):
            web.output("t", keep=keep)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="limit"):
        await web.read_output("t", limit=0)


async def test_a_reader_that_failed_and_stays_is_nothing_to_those_that_come(live: Harness) -> None:
    """What broke was broken for the readers of that time."""
    worker, web = await live.connect(), live.make()
    broken = [True]

    async def refuse(original: Any, ids: Any) -> Any:
        if broken and any(each.startswith("\x00output") for each in ids):
            raise PermissionError("refused by the test")
        return await original(ids)

    intercept(web, "_subscribe", refuse)
    await live.open(web)
    stays = web.stream("t")
    step = asyncio.ensure_future(anext(stays))
    with pytest.raises(Exception, match="refused by the test"):
        await step
    idle, joined, join = web.stream("t"), asyncio.Event(), web._streams.join

    def and_tell(*args: Any) -> None:
        join(*args)
        joined.set()

    web._streams.join = and_tell  # type: ignore[method-assign, assignment]
    step = asyncio.ensure_future(anext(idle))
    await joined.wait()
    step.cancel()  # it has joined, and never looks again
    await asyncio.wait([step])
    await until(lambda: idle._follower.failure is not None)
    broken.clear()
    comes = reading(web)
    await put(output := worker.output("t"), 1)
    await output.close()
    assert await asyncio.wait_for(comes, 1) == [1]
    await idle.aclose()


# -- producers --------------------------------------------------------------------------------------------------------


async def test_closing_while_others_send(live: Harness) -> None:
    """Two flushes of one output are never on their way at once, and nothing stands behind the end."""
    worker, web = live.make(), await live.connect()
    together: list[int] = []
    append = worker._append

    async def watched(flushes: Any) -> Any:
        together.append(len(flushes))
        await asyncio.sleep(0)
        return await append(flushes)

    worker._append = watched  # type: ignore[method-assign]
    await live.open(worker)
    for turns in range(12):
        output, sent = worker.output(f"t{turns}"), list[Any]()

        async def produce() -> None:
            try:
                while True:
                    chunk = "x" * 2000
                    await output.send(chunk)  # noqa: B023
                    sent.append(chunk)  # noqa: B023
                    if len(sent) % 300 == 0:  # noqa: B023
                        await asyncio.sleep(0)
            except UsageError:
                pass

        producer = asyncio.create_task(produce())
        for _ in range(turns):
            await asyncio.sleep(0)
        await output.close()
        await producer
        assert await read(web.stream(f"t{turns}", on_gap="raise")) == sent or len(sent) > 2000
    assert set(together) == {1}


async def test_closing_while_the_log_is_renewed(live: Harness) -> None:
    worker, web = live.make(), await live.connect()
    gate = Gate(worker, "_append")
    gate.open.set()
    await live.open(worker)
    output = worker.output("t")
    await put(output, 1)
    gate.open.clear()
    gate.reached.clear()
    output._renew()
    await gate.reached.wait()
    closing = asyncio.create_task(output.close())
    await asyncio.sleep(0)
    assert output._flush is not None
    assert not output._flush.state, "the end is on its way beside the renewal"
    gate.open.set()
    await closing
    await output.close()
    assert await read(web.stream("t")) == [1]


async def test_two_close_one_output(live: Harness) -> None:
    worker, web = await live.pair()
    output = worker.output("t")
    await output.send(1)
    await asyncio.gather(output.close(), output.close(), output.close())
    assert await read(web.stream("t")) == [1]


# -- collected too late -----------------------------------------------------------------------------------------------


def test_a_stream_that_outlives_its_event_loop_says_nothing() -> None:
    kept: list[Any] = []

    async def main() -> None:
        backend = await MemoryBackend().open()
        kept.extend([backend.stream("t"), backend.updates("t")])
        await anext(kept[1])
        steps = [asyncio.ensure_future(anext(each)) for each in kept]
        for _ in range(20):
            await asyncio.sleep(0)
        for step in steps:
            step.cancel()
        await asyncio.wait(steps)

    asyncio.run(main())
    kept.clear()
    gc.collect()


async def test_a_stream_that_is_collected_in_another_thread(live: Harness) -> None:
    web = await live.connect()

    class Cycle:
        def __init__(self, *streams: Any) -> None:
            self.streams, self.me = streams, self

    async def leave() -> None:
        streams: tuple[OutputStream[Any], Any] = (web.stream("t"), web.updates("t"))
        await anext(streams[1])
        steps = [asyncio.ensure_future(anext(each)) for each in streams]
        await waiting(web)
        for step in steps:
            step.cancel()
        await asyncio.wait(steps)
        Cycle(*streams)

    loop = asyncio.get_running_loop()
    loop.set_debug(True)  # what is no business of another thread's is an error then
    gc.collect()
    gc.disable()
    try:
        await leave()
        await asyncio.to_thread(gc.collect)
    finally:
        gc.enable()
        loop.set_debug(False)
    await nothing_is_left(live, web)
