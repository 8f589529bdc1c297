"""How many channels? ``python -m benchmarks.postgres_channels`` starts a PostgreSQL, measures, and prints a table.

An id's channel follows from the id's hash, in the trigger and in `PostgresBackend`. Here their number varies. See
docs/postgres.md.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
from collections.abc import Awaitable, Sequence
from statistics import median
from time import monotonic_ns
from typing import Any, Self

import asyncpg

from aioresult.backends.postgres import PostgresBackend, schema
from tests.servers import postgres_server

from .channel import Channel, spawn, standard

#: 0 stands for a channel per id.
CHANNELS = (1, 16, 64, 256, 4096, 0)
#: As many as a channel's name has room for, where each id has one.
DIGITS = 40
PROCESSES = 4
FEW = 25
CONCURRENCY = 1_000


def use(channels: int) -> None:
    """Have ids share so many channels, in this process and in the schema that it makes."""

    def in_sql(prefix: str, id: str) -> str:
        digest = f"substr(encode(sha256(convert_to({id}, 'UTF8')), 'hex'), 1, {DIGITS})"
        number = f"(('x' || substr({digest}, 1, 8))::bit(32)::int8 % {channels})"
        return f"{prefix} || {number if channels else digest}"

    def in_python(self: PostgresBackend, task_id: str) -> str:
        digest = hashlib.sha256(task_id.encode()).hexdigest()[:DIGITS]
        return self._channel_prefix + (str(int(digest[:8], 16) % channels) if channels else digest)

    schema.id_channel_sql = in_sql
    PostgresBackend._channel = in_python  # type: ignore[method-assign, assignment]


def task_ids(numbers: Sequence[int]) -> list[str]:
    return [f"task-{number}" for number in numbers]


class Counting(PostgresBackend):
    """Counts what it hears."""

    heard = 0

    def _notified(self, payload: str) -> None:
        self.heard += 1
        super()._notified(payload)

    def is_settled(self, count: int) -> bool:
        """Whether so many wait, the server has confirmed their channels, and what is stored of them has been read."""
        hub = self._shards[0].hub
        return sum(map(len, self._waiting.values())) == count and not (
            hub._to_read_first or hub._to_subscribe or hub._to_read
        )


async def wait(url: str, channels: int, numbers: Sequence[int]) -> None:
    """A waiting process: tells how long subscribing took; when the last waiter was awake, and how much was heard."""
    use(channels)
    channel = await standard()
    async with Counting(url) as backend:
        began = monotonic_ns()
        waiters = [asyncio.ensure_future(backend.wait_for(task_id)) for task_id in task_ids(numbers)]
        while not backend.is_settled(len(waiters)):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        await channel.send((monotonic_ns() - began) / 1e9)
        await asyncio.gather(*waiters)
        await channel.send([monotonic_ns(), backend.heard])


class Waiting:
    """Waiting processes, each with its share of the waiters."""

    def __init__(self, url: str, channels: int, shares: Sequence[range]) -> None:
        self._specs = [[url, channels, [share.start, share.stop, share.step]] for share in shares]
        self._processes: list[asyncio.subprocess.Process] = []
        self._channels: list[Channel] = []
        #: Seconds that the slowest took to subscribe.
        self.subscribing = 0.0

    async def __aenter__(self) -> Self:
        for spec in self._specs:
            command = [sys.executable, "-m", "benchmarks.postgres_channels", "--wait", json.dumps(spec)]
            process, channel = await spawn(command)
            self._processes.append(process)
            self._channels.append(channel)
        self.subscribing = max([await channel.receive() for channel in self._channels])
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for process in self._processes:
            if process.returncode is None:
                process.terminate()
            await process.wait()

    async def awake(self) -> tuple[int, float]:
        """When the last waiter of all was awake, and how many notifications each process has heard, on average."""
        answers = [await channel.receive() for channel in self._channels]
        return max(at for at, _ in answers), sum(heard for _, heard in answers) / len(answers)


async def store(backend: PostgresBackend, numbers: Sequence[int]) -> None:
    left = iter(task_ids(numbers))

    async def worker() -> None:
        for task_id in left:
            await backend.mark_as_done(task_id, 1)

    await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))


async def rate(count: int, work: Awaitable[None]) -> float:
    """How many of ``count`` per second."""
    began = monotonic_ns()
    await work
    return count * 1e9 / (monotonic_ns() - began)


async def measure(url: str, channels: int, count: int) -> dict[str, float]:
    use(channels)
    connection = await asyncpg.connect(url)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await connection.close()
    warm, idle, others, awaited, quarters, rest = (range(place, place + count) for place in range(0, 6 * count, count))
    figures: dict[str, float] = {}
    async with PostgresBackend(url) as backend:
        await store(backend, warm)
        figures["stores/s"] = await rate(count, store(backend, idle))
        async with Waiting(url, channels, [awaited]) as waiting:
            figures[f"{count:,} subscribe, s"] = waiting.subscribing
            figures["stores/s meanwhile"] = await rate(count, store(backend, others))
            began = monotonic_ns()
            await store(backend, awaited)
            figures["awake/s"] = count * 1e9 / ((await waiting.awake())[0] - began)
        async with Waiting(url, channels, [quarters[place::PROCESSES] for place in range(PROCESSES)]) as waiting:
            await store(backend, quarters)
            figures["heard by each of 4 that wait for a quarter"] = (await waiting.awake())[1] / count
        async with Waiting(
            url, channels, [rest[place * FEW : (place + 1) * FEW] for place in range(PROCESSES)]
        ) as waiting:
            await store(backend, rest[::-1])  # those that are waited for come last
            figures[f"… for {FEW}"] = (await waiting.awake())[1] / count
    return figures


def shown(name: str, value: float) -> str:
    if "heard" in name or "…" in name:
        return f"{value:.1%}"
    return f"{value:.2f}" if name.endswith(" s") else f"{value:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.postgres_channels", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="waiters, and results of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="each figure is the median of so many")
    parser.add_argument("--wait", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.wait:
        url, channels, share = arguments.wait
        asyncio.run(wait(url, channels, range(*share)))
        return
    rows: dict[int, list[dict[str, Any]]] = {channels: [] for channels in CHANNELS}
    with postgres_server() as server:
        for _ in range(arguments.rounds):
            for channels, figures in rows.items():
                figures.append(asyncio.run(measure(server.url, channels, arguments.count)))
    names = list(rows[1][0])
    print(f"| channels | {' | '.join(names)} |\n|---{'|---:' * len(names)}|")
    for channels, figures in rows.items():
        cells = [shown(name, median(each[name] for each in figures)) for name in names]
        print(f"| {channels or 'one per id'} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
