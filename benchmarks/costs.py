"""What one awaited result costs on Redis, all apart: ``python -m benchmarks.costs``. See docs/scale.md."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass
from typing import Any

import psutil
import redis

import aioresult
from tests.servers import redis_server

from .resident import resident_bytes
from .storer import RemoteStorer
from .subject import new_ids, text

_VALUE = text(100)
_OURS = "benchmarks.ours:Ours"


@dataclass
class _Reading:
    """Counters at one moment: seconds of CPU and bytes."""

    server: float
    waiter: float
    storer: float
    to_server: int
    from_server: int
    held: int
    resident: int

    def since(self, earlier: _Reading, count: int) -> dict[str, float]:
        """Per result, in µs and bytes."""
        micro = {name: (getattr(self, name) - getattr(earlier, name)) / count * 1e6 for name in _CPU}
        return micro | {name: (getattr(self, name) - getattr(earlier, name)) / count for name in _BYTES}


_CPU = ("server", "waiter", "storer")
_BYTES = ("to_server", "from_server", "held", "resident")


class _Meter:
    def __init__(self, url: str, server: int, storer: int) -> None:
        self._client = redis.Redis.from_url(url)
        self._processes = [psutil.Process(server), psutil.Process(), psutil.Process(storer)]

    def read(self) -> _Reading:
        """The client's own traffic is a few hundred bytes."""
        stats: dict[str, Any] = self._client.info("stats")
        held: dict[str, Any] = self._client.info("memory")
        server, waiter, storer = (sum(process.cpu_times()[:2]) for process in self._processes)
        return _Reading(
            server,
            waiter,
            storer,
            stats["total_net_input_bytes"],
            stats["total_net_output_bytes"],
            held["used_memory"],
            resident_bytes(),
        )


async def measure(count: int) -> dict[str, dict[str, float]]:
    """By what was done."""
    with redis_server() as server:
        storer = await RemoteStorer.start({"subject": _OURS, "url": server.url, "options": {}})
        try:
            async with aioresult.connect(server.url) as backend:
                meter = _Meter(server.url, server.pid, storer._process.pid)
                waited, alone = new_ids(count), new_ids(count)
                await storer.store_many(practice := new_ids(3000), _VALUE, 1000)
                await backend.group(practice[:50])
                at = [meter.read()]
                waiters = [asyncio.ensure_future(backend.result(task_id).get()) for task_id in waited]
                await _settled(backend, count)
                at.append(meter.read())
                await storer.store_many(waited, _VALUE, 1000)
                await asyncio.gather(*waiters)
                await _settled(backend, 0)
                at.append(meter.read())
                await storer.store_many(alone, _VALUE, 1000)
                at.append(meter.read())
        finally:
            await storer.close()
    names = ("begin to wait", "store and wake", "store alone")
    return {name: at[step + 1].since(at[step], count) for step, name in enumerate(names)}


async def _settled(backend: Any, count: int) -> None:
    """So many wait, and whatever there was to read, to subscribe or to undo is done."""
    hub = backend._shards[0].hub
    while len(hub) != count or hub._to_read_first or hub._to_subscribe or hub._to_unsubscribe or hub._to_read:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await backend.get_task_meta("sent after all of that")
    await asyncio.sleep(0.2)  # for what is still on its way


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs", description=__doc__)
    parser.add_argument("--count", type=int, default=50_000, help="how many results")
    rows = asyncio.run(measure(parser.parse_args().count))
    names = (*_CPU, *_BYTES)
    print("per result".ljust(16), *(name.rjust(12) for name in names))
    for done, figures in rows.items():
        cells = (f"{figures[name]:.1f} µs" if name in _CPU else f"{figures[name]:.0f} B" for name in names)
        print(done.ljust(16), *(cell.rjust(12) for cell in cells))


if __name__ == "__main__":
    main()
