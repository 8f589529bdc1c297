"""Producers and readers of an output, for a test's own process or one of their own.

- ``python -m tests.running_child produce URL MARKED UNMARKED`` sends what it is told to on stdin
- ``python -m tests.running_child read URL SEED COUNT TASK…`` says what each of its readers got
- ``python -m tests.running_child work URL TASK COUNT`` runs as many tasks, until it is killed
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import aioresult
from aioresult import Backend
from aioresult.retry import Backoff

#: Lease of the workers here, in seconds.
LEASE = 1.0


async def from_the_start(backend: Backend, task_id: str, chance: random.Random) -> list[Any]:
    return [chunk async for chunk in backend.result(task_id).stream()]


async def in_batches(backend: Backend, task_id: str, chance: random.Random) -> list[Any]:
    return [chunk async for chunks in backend.result(task_id).stream().batches() for chunk in chunks]


async def some(backend: Backend, task_id: str, chance: random.Random) -> tuple[list[Any], str]:
    """A few chunks from the start, and the cursor behind them."""
    count, chunks = chance.randrange(1, 100), []
    async with backend.result(task_id).stream() as stream:
        async for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == count:
                break
        return chunks, stream.cursor


async def late(backend: Backend, task_id: str, chance: random.Random) -> list[Any]:
    """Comes when the output is under way."""
    await some(backend, task_id, chance)
    return await from_the_start(backend, task_id, chance)


async def from_the_middle(backend: Backend, task_id: str, chance: random.Random) -> list[Any]:
    """From any place that it has passed, also in the middle of an entry."""
    chunks, cursor = await some(backend, task_id, chance)
    epoch, place = cursor.split("-")[0], chance.randrange(len(chunks))
    stream = backend.result(task_id).stream(after=f"{epoch}-{place}")
    return chunks[:place] + [chunk async for chunk in stream]


async def again_and_again(backend: Backend, task_id: str, chance: random.Random) -> list[Any]:
    """Leaves after some chunks, and goes on from its cursor, until it comes to the end."""
    chunks: list[Any] = []
    cursor: str | None = None
    while True:
        count = chance.randrange(1, 200)
        async with backend.result(task_id).stream(after=cursor) as stream:
            async for chunk in stream:
                chunks.append(chunk)
                count -= 1
                if not count:
                    break
            else:
                return chunks
            cursor = stream.cursor


async def by_long_polls(backend: Backend, task_id: str, chance: random.Random) -> list[Any]:
    chunks: list[Any] = []
    cursor: str | None = None
    while True:
        page = await backend.result(task_id).read_output(cursor, limit=chance.randrange(1, 200), wait=5)
        chunks += page.chunks
        cursor = page.cursor
        if page.ended:
            return chunks


async def from_now(backend: Backend, task_id: str, chance: random.Random) -> list[Any]:
    return [chunk async for chunk in backend.result(task_id).stream(after=aioresult.TAIL)]


Reader = Callable[[Backend, str, random.Random], Coroutine[Any, Any, list[Any]]]
READERS: tuple[Reader, ...] = (
    from_the_start,
    in_batches,
    late,
    from_the_middle,
    again_and_again,
    by_long_polls,
    from_now,
)


def reader_of(number: int) -> Reader:
    return READERS[number % len(READERS)]


def complaint(number: int, chunks: list[Any] | str, count: int) -> str:
    """What is wrong with what that reader got of ``count`` chunks, or with its error; empty if nothing is."""
    if isinstance(chunks, str):
        return f"{reader_of(number).__name__} raised {chunks}"
    first = count - len(chunks) if reader_of(number) is from_now else 0
    if chunks == list(range(first, count)):
        return ""
    wrong = [index for index, chunk in enumerate(chunks) if chunk != first + index]
    return f"{reader_of(number).__name__} got {len(chunks)} of {count}, wrong at {wrong[:1]}: {chunks[-3:]}"


async def send_as_told(*outputs: aioresult.Output) -> int:
    """For each line with a number so many chunks, to the end of stdin."""
    said = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(said), sys.stdin)
    sent = 0
    async for line in said:
        for _ in range(int(line)):
            for output in outputs:
                await output.send(sent)
            sent += 1
            await asyncio.sleep(0)  # so that a flush has a few
    return sent


async def produce(backend: Backend, *task_ids: str) -> None:
    """The same chunks for each: the output of a task that runs has an end mark, any other ends with the result."""
    print("ready", flush=True)
    marked, unmarked = task_ids
    output = backend.output(unmarked)
    async with backend.running(marked) as task:
        task.value = await send_as_told(task.output, output)
    await output.flush()
    output.stop()
    await backend.mark_as_done(unmarked, task.value)


async def read(backend: Backend, seed: str, count: str, *task_ids: str) -> None:
    async def one(number: int) -> None:
        try:
            task_id = task_ids[number % len(task_ids)]
            chunks = await reader_of(number)(backend, task_id, random.Random(f"{seed} {number}"))
        except aioresult.AioResultError as exc:
            print(json.dumps([number, repr(exc)]), flush=True)
        else:
            print(json.dumps([number, chunks]), flush=True)

    print("ready", flush=True)
    await asyncio.gather(*map(one, range(int(count))))


async def work(backend: Backend, task_id: str, count: str) -> None:
    """Says ``ready`` when each of the tasks has sent its number."""

    async def body(number: int) -> None:
        async with backend.running(f"{task_id}{number}") as task:
            await task.output.send(number)
            await task.output.flush()
            ready.release()
            await asyncio.Event().wait()

    ready = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(body(number)) for number in range(int(count))]
    for _ in tasks:
        await ready.acquire()
    print("ready", flush=True)
    await asyncio.gather(*tasks)


async def lines(process: asyncio.subprocess.Process) -> AsyncIterator[list[Any]]:
    """What a process of readers says."""
    assert process.stdout is not None
    async for line in process.stdout:
        yield json.loads(line)


async def main(what: str, url: str, *args: str) -> None:
    async with aioresult.connect(url, heartbeat=0.5, lease=LEASE if what == "work" else 30) as backend:
        does: dict[str, Callable[..., Awaitable[None]]] = {"produce": produce, "read": read, "work": work}
        await does[what](backend, *args)


if __name__ == "__main__":
    Backoff.__init__.__defaults__ = (0.02, 0.2)  # as in the tests: hundreds of reconnects in seconds
    logging.disable(logging.WARNING)
    asyncio.run(main(*sys.argv[1:]))
