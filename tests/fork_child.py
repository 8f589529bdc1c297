"""A process that forks while its backend is open: ``python -m tests.fork_child (refused|closed|opened|pool) URL``.

Prints as JSON what the forked children found, and what the parent's readers and connections have noticed of them.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import redis.asyncio

import aioresult
from aioresult import AioResultError, Backend, TaskRequest

from .conformance.test_lifecycle import CALLS, Ignorer
from .harness import count_calls, servers_of, topics_of, until

#: Every coroutine that reaches for the store.
ALL_CALLS: dict[str, Callable[[Backend], Awaitable[Any]]] = {
    **CALLS,
    "mark_as_done as a part": lambda backend: backend.mark_as_done(
        "t", 1, request=TaskRequest(id="t", group="c", chord=True)
    ),
    "create_chord": lambda backend: backend.create_chord("c", size=1),
    "set_chord_size": lambda backend: backend.set_chord_size("c", 1),
    "on_chord_part_return": lambda backend: backend.on_chord_part_return("c", "t", "SUCCESS", 1),
    "await chord": lambda backend: backend.chord("c").get(),
    "chord.progress": lambda backend: backend.chord("c").progress(),
    "chord.claim": lambda backend: backend.chord("c").claim(),
    "ready_chords": lambda backend: anext(backend.ready_chords()),
    "group.forget": lambda backend: backend.group(["t"]).forget(),
}

#: What the children inherit.
_backend: Backend
_calls: dict[str, int]


async def refused() -> dict[str, Any]:
    """What each call raises, and how many calls have reached the primitives of the backend."""
    before = dict(_calls)
    raised = {}
    for name, call in ALL_CALLS.items():
        try:
            async with asyncio.timeout(20):
                await call(_backend)
            raised[name] = "nothing"
        except Exception as exc:
            raised[name] = f"{type(exc).__name__}: {exc}"
    try:
        _backend.watch("t", Ignorer())
    except AioResultError as exc:
        raised["watch"] = f"{type(exc).__name__}: {exc}"
    return {"raised": raised, "reached": dict(_calls) != before, "is_open": _backend.is_open, "parent": os.getppid()}


async def closed() -> dict[str, Any]:
    was_open = _backend.is_open
    await _backend.aclose()
    await _backend.aclose()
    return {"was_open": was_open, "is_open": _backend.is_open}


async def opened() -> dict[str, Any]:
    async with _backend:
        is_open = _backend.is_open
        waiting = asyncio.create_task(_backend.wait_for("child"))
        await until(lambda: all(topic.subscribed for topic in topics_of(_backend).values()))
        stored = await _backend.mark_as_done("child", os.getpid())
        told = (await waiting).result == os.getpid()
        await _backend.forget("child")
    return {"is_open": is_open, "stored": stored, "told": told, "is_open_after": _backend.is_open}


WORK: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {"refused": refused, "closed": closed, "opened": opened}


async def in_child(work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """What ``work()`` comes to in a forked child, in an event loop of the child's own."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writing, json.dumps(run(work)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(reading, readable.set_result, None)
    await readable  # the child says everything at once, and then ends
    loop.remove_reader(reading)
    report = json.loads(os.read(reading, 2**16))
    os.close(reading)
    _wait_for(pid)
    return dict(report)


def _wait_for(pid: int) -> None:
    assert os.waitpid(pid, 0) == (pid, 0)


def run(work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    async def guarded() -> dict[str, Any]:
        async with asyncio.timeout(30):
            return await work()

    try:
        return asyncio.run(guarded())
    except BaseException as exc:
        return {"failed": f"{type(exc).__name__}: {exc}"}


def in_pool(name: str) -> dict[str, Any]:
    """The job of a `ProcessPoolExecutor`."""
    return run(WORK[name])


@asynccontextmanager
async def readers(backend: Backend, wrong: list[str]) -> AsyncIterator[None]:
    """Read without a pause; what is not as it was stored goes to ``wrong``."""
    stopping = False

    async def read(number: int) -> None:
        while not stopping:
            number = (number + 1) % 20
            try:
                value = (await backend.get_task_meta(f"k{number}")).result
            except AioResultError as exc:
                value = repr(exc)
            if value != number:
                wrong.append(f"{number}: {value!r}")

    tasks = [asyncio.create_task(read(number)) for number in range(5)]
    yield
    stopping = True
    await asyncio.gather(*tasks)


async def connections(url: str) -> set[tuple[str, int]]:
    """All but this function's own, by the numbers that the servers know them by."""
    if url.startswith("redis"):
        found: set[tuple[str, int]] = set()
        for server in servers_of(url):
            async with redis.asyncio.Redis.from_url(server, single_connection_client=True) as client:
                mine = await client.client_id()
                found |= {(server, int(each["id"])) for each in await client.client_list() if int(each["id"]) != mine}
        return found
    if url.startswith("postgres"):
        connection = await asyncpg.connect(url)
        try:
            query = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            return {(url, int(row["pid"])) for row in await connection.fetch(query)}
        finally:
            await connection.close()
    return set()


async def main(what: str, url: str) -> None:
    global _backend, _calls
    _backend = aioresult.connect(url)
    _calls = count_calls(_backend)
    wrong: list[str] = []
    children: list[dict[str, Any]] = []
    async with _backend as backend:
        for number in range(20):
            await backend.mark_as_done(f"k{number}", number)
        waiting = asyncio.create_task(backend.wait_for("later"))
        await until(lambda: len(topics_of(backend)) == 1 and topics_of(backend)["later"].subscribed)
        async with readers(backend, wrong):
            before = await connections(url)
            for _ in range(5):
                if what == "pool":
                    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
                        loop = asyncio.get_running_loop()
                        children += [await loop.run_in_executor(pool, in_pool, name) for name in WORK]
                else:
                    children.append(await in_child(WORK[what]))
            kept = before <= await connections(url)
        left = [task_id for task_id in ("t", "u", "child") if await backend.exists(task_id)]
        groups = [await backend.restore_group("g"), (await backend.chord("c").progress()).done or None]
        await backend.mark_as_done("later", 1)
        told = (await waiting).result
    print(
        json.dumps(
            {
                "children": children,
                "wrong": wrong[:5],
                "kept": kept,
                "left": left + [str(group) for group in groups if group is not None],
                "told": told,
            }
        )
    )


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
