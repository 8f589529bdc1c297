"""The first steps, in one process and without a server.

Three waiters wait for one task. A task fails, and its exception is raised in the waiter. The results of a group arrive
as its members finish. Install and run it in a checkout::

    pip install .
    python examples/quickstart.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import aioresult
from aioresult import Backend


class CardDeclined(Exception):
    """An error of the shop. A waiter can catch it by this class."""


async def charge(amount: int) -> str:
    await asyncio.sleep(0.05)  # stands for the work
    if amount > 100:
        raise CardDeclined(f"{amount} is over the limit")
    return f"receipt for {amount}"


async def resize(width: int) -> int:
    await asyncio.sleep(width / 10_000)
    return width


async def work(backend: Backend, task_id: str, task: Coroutine[Any, Any, Any]) -> None:
    """Do what a worker does with a task: run it, and store its value or its exception."""
    await backend.mark_as_started(task_id)
    try:
        value = await task
    except Exception as exc:
        await backend.mark_as_failure(task_id, exc)
    else:
        await backend.mark_as_done(task_id, value)


async def wait(name: str, backend: Backend) -> None:
    value = await backend.result("order-1")
    print(f"  {name} got: {value}")


async def main() -> None:
    async with aioresult.connect("memory://") as backend, asyncio.TaskGroup() as tasks:
        print("Three waiters wait for one task:")
        waiters = [tasks.create_task(wait(name, backend)) for name in ("the browser", "the ledger", "the mailer")]
        tasks.create_task(work(backend, "order-1", charge(42)))
        await asyncio.wait(waiters)

        print("A task fails, and its own exception is raised here:")
        tasks.create_task(work(backend, "order-2", charge(4200)))
        try:
            await backend.result("order-2").get(timeout=10)
        except CardDeclined as exc:
            print(f"  CardDeclined: {exc}")

        print("A group, streamed in the order in which its members finish:")
        widths = {"large": 2000, "medium": 1000, "small": 200}
        for task_id, width in widths.items():
            tasks.create_task(work(backend, task_id, resize(width)))
        thumbnails = backend.group(widths)
        async for result in thumbnails.as_completed(timeout=10):
            print(f"  {result.id}: {await result} pixels")
        print(f"And joined, in the order of the group: {await thumbnails}")


if __name__ == "__main__":
    asyncio.run(main())
