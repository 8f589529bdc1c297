"""A web service whose requests wait for results: ``python -m benchmarks service``. See docs/benchmarks.md.

FastAPI on uvicorn, in a process of its own. All requests are open before the first result is stored. Then the results
are stored one after the other, in random order, at a steady rate. A latency is the time from the call that stores a
result to the moment its response has arrived, both in this process.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from statistics import median, quantiles
from time import perf_counter
from typing import NamedTuple

import aioresult
from aioresult import Backend

from .servers import Server
from .service_app import WAYS
from .subject import new_ids

__all__ = ["Service", "drawing", "measure", "table"]

_ROOT = Path(__file__).resolve().parent.parent
#: Results stored per second.
_RATE = 500.0
#: Seconds for which the idle service is watched.
_IDLE = 3.0


class Service(NamedTuple):
    """What was seen of one way to wait."""

    way: str
    #: Milliseconds from storing to the response.
    p50: float
    p99: float
    #: Milliseconds of CPU that the service used for each request, from its arrival on.
    cpu: float
    threads: float
    connections: float
    #: Commands per second while all requests wait and nothing is stored, heartbeats among them.
    idle: float


class _Site:
    """A service that runs."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def get(self, path: str) -> bytes:
        """The body. One connection for each request, as many browsers would have."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            return await reader.read()
        finally:
            writer.close()

    async def figures(self) -> dict[str, float]:
        found: dict[str, float] = json.loads(await self.get("/figures"))
        return found


@asynccontextmanager
async def _serve(way: str, url: str) -> AsyncGenerator[_Site, None]:
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
        environment = {
            **os.environ,
            "PYTHONPATH": str(_ROOT),
            "AIORESULT_SERVICE_WAY": way,
            "AIORESULT_SERVICE_URL": url,
        }
        descriptor = listening.fileno()
        words = ["benchmarks.service_app:create", "--factory", "--fd", str(descriptor), "--log-level", "warning"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "uvicorn", *words, env=environment, pass_fds=[descriptor]
        )
        try:
            site = _Site(listening.getsockname()[1])
            await site.figures()  # the connection waits until the service accepts it
            yield site
        finally:
            process.kill()  # threads that wait would keep it from ending by itself
            await process.wait()


async def _measured(way: str, server: Server, count: int, chance: Random) -> Service:
    server.reset()
    ids = new_ids(count)
    arrived: dict[str, float] = {}

    async def request(task_id: str) -> None:
        body = await site.get(f"/results/{task_id}")
        arrived[task_id] = perf_counter()
        assert json.loads(body) == {"value": task_id}

    async with aioresult.connect(server.url) as worker:
        others = server.counters()["connections"]
        async with _serve(way, server.url) as site:
            before = await site.figures()
            requests = [asyncio.create_task(request(task_id)) for task_id in ids]
            while (await site.figures())["waiting"] < count:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.1)
            await asyncio.sleep(1.0)  # subscriptions and threads are made
            idle = await _idle(server)
            waiting, connections = await site.figures(), server.counters()["connections"]
            stored = await _store(worker, chance.sample(ids, count))
            await asyncio.gather(*requests)
            after = await site.figures()
    latencies = sorted(1000 * (arrived[task_id] - stored[task_id]) for task_id in ids)
    return Service(
        way,
        median(latencies),
        quantiles(latencies, n=100)[98],
        1000 * (after["cpu"] - before["cpu"]) / count,
        max(waiting["threads"], after["threads"]),
        connections - others,
        idle,
    )


async def _idle(server: Server) -> float:
    begin, first = perf_counter(), server.counters()
    await asyncio.sleep(_IDLE)
    last = server.counters()
    commands = sum(last[name] - first[name] for name in ("commands", "heartbeats"))
    return commands / (perf_counter() - begin)


async def _store(worker: Backend, task_ids: Sequence[str]) -> dict[str, float]:
    stored: dict[str, float] = {}
    begin = perf_counter()
    for index, task_id in enumerate(task_ids):
        await asyncio.sleep(begin + index / _RATE - perf_counter())
        stored[task_id] = perf_counter()
        await worker.mark_as_done(task_id, task_id)
    return stored


async def measure(server: Server, quick: bool) -> list[Service]:
    """Each way, in turn; the median of three repetitions of each figure, or one run if ``quick``."""
    chance = Random(0)
    runs: dict[str, list[Service]] = {way: [] for way in WAYS}
    for _ in range(1 if quick else 3):
        for way in WAYS:
            runs[way].append(await _measured(way, server, 1000, chance))
    return [_median(seen) for seen in runs.values()]


def _median(seen: Sequence[Service]) -> Service:
    figures = zip(*(each[1:] for each in seen), strict=True)
    return Service._make((seen[0].way, *map(median, figures)))


def table(services: Sequence[Service]) -> str:
    """For people."""
    head = f"{'1,000 requests wait':<34}{'store → response, p50':>23}{'p99':>11}{'CPU/request':>13}"
    lines = [f"{head}{'threads':>9}{'connections':>13}{'idle commands/s':>17}"]
    lines += [
        f"{each.way:<34}{each.p50:>20,.1f} ms{each.p99:>8,.1f} ms{each.cpu:>10,.2f} ms"
        f"{each.threads:>9,.0f}{each.connections:>13,.0f}{each.idle:>17,.1f}"
        for each in services
    ]
    return "\n".join(lines)


def drawing(services: Sequence[Service]) -> str:
    """An SVG: for each way a bar from 1 ms to its p50 and, paler, to its p99, on a logarithmic axis."""

    def place(milliseconds: float) -> float:
        return 250 + 100 * math.log10(max(milliseconds, 1.0))

    parts = []
    for number, each in enumerate(services):
        y, colour = 50 + 34 * number, "#0b6e4f" if number == 0 else "#9a6a00"
        p50, p99 = place(each.p50), place(each.p99)
        parts += [
            f'<text x="240" y="{y + 15}" text-anchor="end">{each.way}</text>',
            f'<rect x="250" y="{y}" width="{p99 - 250:.1f}" height="20" fill="{colour}" opacity="0.35"/>',
            f'<rect x="250" y="{y}" width="{p50 - 250:.1f}" height="20" fill="{colour}"/>',
            f'<text x="{p99 + 8:.1f}" y="{y + 15}">{each.p50:,.1f} ms, p99 {each.p99:,.1f}</text>',
        ]
    for milliseconds in (1, 10, 100, 1000):
        x = place(milliseconds)
        parts.append(f'<path d="M{x} 44V{56 + 34 * len(services)}" stroke="#999" stroke-dasharray="2 4"/>')
        parts.append(f'<text x="{x}" y="{72 + 34 * len(services)}" text-anchor="middle">{milliseconds:,} ms</text>')
    title = "1,000 waiting requests: from storing the result to its response"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {84 + 34 * len(services)}" role="img" '
        f'aria-label="{title}" font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="16" y="26" font-size="16">{title}</text>{"".join(parts)}</svg>\n'
    )
