"""The other processes of `benchmarks.running`: ``python -m benchmarks.running_roles SPEC``, one role each.

SPEC is JSON: ``role``, ``url`` and ``params``. A role says when it is ready, waits for the word to begin, and ends with
its figures. Times are of `time.monotonic_ns`, one clock for all processes of a machine; a chunk is the time at which it
was sent, so that its reader knows how long it took.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from statistics import median, quantiles
from time import monotonic_ns, process_time
from typing import Any, Protocol

import asyncpg

import aioresult
from aioresult.backends.memory import MemoryBackend, MemoryStore

from .bare_redis import Commands, connected, pack
from .channel import standard

__all__ = ["ROLES", "SETTLE", "Figures", "Role", "Steps", "backend_for"]

Figures = dict[str, Any]
#: Seconds for subscriptions to stand before anything is measured.
SETTLE = 0.3
#: The store of the memory backend: its roles are in one process.
_MEMORY = MemoryStore()


class Steps(Protocol):
    """How a role and the conductor keep in step."""

    async def ready(self) -> None:
        """Say that the role is ready, and return when it is to begin."""


Role = Callable[..., Awaitable[Figures]]


def backend_for(url: str, **options: Any) -> aioresult.Backend:
    """The library's backend at ``url``."""
    return MemoryBackend(store=_MEMORY, **options) if url.startswith("memory:") else aioresult.connect(url, **options)


async def _paced(count: int, rate: float) -> AsyncIterator[int]:
    """0, 1, 2 …, so many a second."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    for index in range(count):
        due += 1 / rate
        await asyncio.sleep(max(due - loop.time(), 0))
        yield index


class _Times:
    """How long messages took, and when the last one came."""

    def __init__(self) -> None:
        self._latencies: list[int] = []
        self._last = 0
        self._cpu = process_time()

    def heard(self, sent: int) -> None:
        self._last = now = monotonic_ns()
        self._latencies.append(now - sent)

    def figures(self) -> Figures:
        """Latencies in ms, the time in ns, the CPU of this process in seconds."""
        cuts = quantiles(self._latencies, n=100) if len(self._latencies) > 1 else [0.0] * 99
        p50, p99 = median(self._latencies) / 1e6, cuts[98] / 1e6
        return {"p50": p50, "p99": p99, "last": self._last, "cpu": process_time() - self._cpu}


# -- the limit --------------------------------------------------------------------------------------------------------


async def bare_send(
    url: str, steps: Steps, names: Sequence[str], count: int, rate: float = 0.0, burst: int = 1
) -> Figures:
    """PUBLISH, ``burst`` on each channel: ``rate`` times a second, or whenever those before are answered."""
    commands = await connected(url, Commands)
    await steps.ready()
    began = monotonic_ns()
    if rate:
        async for _ in _paced(count, rate):
            commands.send(("PUBLISH", names[0], b"[%d]" % monotonic_ns()))
    else:
        for _ in range(count):
            message = b"[%d]" % monotonic_ns()
            replies = [commands.send(("PUBLISH", name, message)) for name in names for _ in range(burst)]
            await replies[-1]
    await commands.send(("PING",))
    commands.close()
    return {"began": began}


class _Box:
    """Keeps messages for the one coroutine that reads them."""

    def __init__(self) -> None:
        self._box: list[Any] = []
        self._woken: asyncio.Future[None] | None = None

    def put(self, message: Any) -> None:
        self._box.append(message)
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def messages(self) -> list[Any]:
        """What has come, at least one."""
        if not self._box:
            self._woken = asyncio.get_running_loop().create_future()
            await self._woken
        box, self._box = self._box, []
        return box


class _Listener(Commands):
    """Parses each message once, for all readers."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes: list[_Box] = []
        self.parse = True

    def replied(self, reply: Any) -> None:
        if reply[0] == b"message":
            message = json.loads(reply[2])[0] if self.parse else 0
            for box in self.boxes:
                box.put(message)


async def bare_hear(
    url: str, steps: Steps, names: Sequence[str], count: int, readers: int = 1, parse: bool = True
) -> Figures:
    """One connection that is subscribed to all channels, until each reader has had so many messages.

    Without ``parse`` messages of any form are counted.
    """

    async def read(box: _Box) -> None:
        left = count
        while left > 0:
            for sent in await box.messages():
                left -= 1
                times.heard(sent)

    listener = await connected(url, _Listener)
    listener.parse = parse
    listener.boxes = [_Box() for _ in range(readers)]
    listener.write(pack(("SUBSCRIBE", *names)))
    await asyncio.sleep(SETTLE)
    tasks = [asyncio.create_task(read(box)) for box in listener.boxes]
    await steps.ready()
    times = _Times()
    await asyncio.gather(*tasks)
    listener.close()
    return times.figures()


async def bare_commit(url: str, steps: Steps, names: Sequence[str], count: int, rate: float) -> Figures:
    """An INSERT of one row by asyncpg, so many a second."""
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE IF NOT EXISTS bare (name text, number bigint, data bytea)")
    insert = await connection.prepare("INSERT INTO bare VALUES ($1, $2, $3)")
    await insert.fetch(names[0], -1, b"[0]")
    await steps.ready()
    times = _Times()
    async for index in _paced(count, rate):
        began = monotonic_ns()
        await insert.fetch(names[0], index, b"[%d]" % began)
        times.heard(began)
    await connection.close()
    return times.figures()


async def bare_queues(url: str, steps: Steps, names: Sequence[str], count: int, rate: float = 0.0) -> Figures:
    """In one process: a queue of each name, with a reader."""
    times = _Times()
    queues: list[asyncio.Queue[int]] = [asyncio.Queue() for _ in names]

    async def read(queue: asyncio.Queue[int]) -> None:
        for _ in range(count):
            times.heard(await queue.get())

    readers = [asyncio.create_task(read(queue)) for queue in queues]
    await steps.ready()
    began = monotonic_ns()
    if rate:
        async for _ in _paced(count, rate):
            queues[0].put_nowait(monotonic_ns())
    else:
        for _ in range(count):
            for queue in queues:
                queue.put_nowait(monotonic_ns())
            await asyncio.sleep(0)
    await asyncio.gather(*readers)
    return {**times.figures(), "began": began}


# -- the library ------------------------------------------------------------------------------------------------------


async def send(url: str, steps: Steps, names: Sequence[str], count: int, rate: float = 0.0, burst: int = 1) -> Figures:
    """As `bare_send`, to the outputs of tasks; each has one chunk before it begins."""
    async with backend_for(url) as backend:
        outputs = [backend.output(name) for name in names]
        for output in outputs:
            output.send_nowait(0)
        for output in outputs:
            await output.flush()
        await steps.ready()
        began = monotonic_ns()
        if rate:
            async for _ in _paced(count, rate):
                await outputs[0].send(monotonic_ns())
        else:
            for _ in range(count):
                now = monotonic_ns()
                for output in outputs:
                    for _ in range(burst):
                        output.send_nowait(now)
                for output in outputs:
                    await output.flush()
        for output in outputs:
            await output.flush()
            output.stop()
    return {"began": began}


async def hear(url: str, steps: Steps, names: Sequence[str], count: int, readers: int = 1) -> Figures:
    """``readers`` of each output, until each has had so many chunks."""
    times = _Times()
    waiting = len(names) * readers
    all_there = asyncio.Event()

    async def read(name: str) -> None:
        nonlocal waiting
        left = count
        async with backend.stream(name) as stream:
            async for sent in stream:
                if not sent:
                    waiting -= 1
                    if not waiting:
                        all_there.set()
                    continue
                times.heard(sent)
                left -= 1
                if not left:
                    return

    async with backend_for(url) as backend:
        tasks = [asyncio.create_task(read(name)) for name in names for _ in range(readers)]
        await all_there.wait()
        await asyncio.sleep(SETTLE)
        await steps.ready()
        times = _Times()
        await asyncio.gather(*tasks)
        return times.figures()


async def run(url: str, steps: Steps, names: Sequence[str], count: int) -> Figures:
    """Run tasks whose bodies only wait, until ``count`` of them have been cancelled; when each of them was."""
    at: dict[str, int] = {}
    inside = 0
    all_there = asyncio.Event()

    async def body(name: str) -> None:
        nonlocal inside
        try:
            async with backend.running(name):
                inside += 1
                if inside == len(names):
                    all_there.set()
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    at[name] = monotonic_ns()
                    raise
        except aioresult.TaskRevokedError:
            pass

    async with backend_for(url) as backend:
        tasks = [asyncio.create_task(body(name)) for name in names]
        await all_there.wait()
        await asyncio.sleep(SETTLE)
        await steps.ready()
        await asyncio.gather(*tasks[:count])
        for task in tasks[count:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {"at": [at[name] for name in names[:count]]}


async def revoke(url: str, steps: Steps, names: Sequence[str], count: int, rate: float) -> Figures:
    """Revoke the first ``count`` tasks, so many a second; when each call began."""
    began: list[int] = []
    async with backend_for(url) as backend:
        await steps.ready()
        async for index in _paced(count, rate):
            began.append(monotonic_ns())
            await backend.revoke(names[index])
    return {"began": began}


ROLES: dict[str, Role] = {
    role.__name__: role for role in (bare_send, bare_hear, bare_commit, bare_queues, send, hear, run, revoke)
}


async def _main(spec: dict[str, Any]) -> None:
    channel = await standard()

    class Standard:
        async def ready(self) -> None:
            await channel.ask("ready")

    try:
        await channel.send(await ROLES[spec["role"]](spec["url"], Standard(), **spec["params"]))
    except Exception as exc:
        await channel.send({"error": f"{type(exc).__name__}: {exc}"[:300]})


if __name__ == "__main__":
    asyncio.run(_main(json.loads(sys.argv[1])))
