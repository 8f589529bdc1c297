"""A process that is going to be killed: ``python -m tests.fault_child (wait|store) URL PREFIX COUNT``."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import aioresult
from aioresult import Backend

from .harness import until


def value_of(number: int) -> dict[str, Any]:
    """Large enough to be torn, if anything could tear it."""
    return {"number": number, "padding": "x" * (number * 37 % 20_000), "again": number}


async def wait(backend: Backend, ids: list[str]) -> None:
    """Says ``ready`` when all are waited for."""
    waiting = [asyncio.ensure_future(backend.result(task_id).get()) for task_id in ids]
    await until(
        lambda: (
            len(backend._shards[0].hub) == len(ids)
            and all(t.subscribed for t in backend._shards[0].hub._topics.values())
        )
    )
    print("ready", flush=True)
    await asyncio.gather(*waiting)


async def store(backend: Backend, ids: list[str]) -> None:
    """Says the number of each result that is stored."""

    async def one(number: int) -> None:
        await backend.mark_as_done(ids[number], value_of(number))
        print(number, flush=True)

    for start in range(0, len(ids), 20):
        await asyncio.gather(*(one(number) for number in range(start, start + 20)))


async def main(what: str, url: str, prefix: str, count: str) -> None:
    async with aioresult.connect(url) as backend:
        await {"wait": wait, "store": store}[what](backend, [f"{prefix}{number}" for number in range(int(count))])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with it ignored
    asyncio.run(main(*sys.argv[1:]))
