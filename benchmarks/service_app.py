"""The web services that `benchmarks.service` compares: each waits for a result, in one of four ways."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from time import process_time
from typing import Any, TypeAlias

from fastapi import FastAPI

__all__ = ["POLL", "WAYS", "create"]

Get: TypeAlias = Callable[[str], Awaitable[Any]]

#: Seconds between two looks of the service that polls.
POLL = 0.1
#: Longer than a run takes.
TIMEOUT = 300


@asynccontextmanager
async def awaited(url: str) -> AsyncGenerator[Get, None]:
    """aioresult."""
    import aioresult

    async with aioresult.connect(url) as backend:
        yield lambda task_id: backend.result(task_id).get(timeout=TIMEOUT)


@asynccontextmanager
async def threads(url: str) -> AsyncGenerator[Get, None]:
    """`asyncio.to_thread(AsyncResult.get)` with the default executor."""
    from celery import Celery

    app = Celery("service", backend=url)
    yield lambda task_id: asyncio.to_thread(app.AsyncResult(task_id).get, timeout=TIMEOUT)


@asynccontextmanager
async def many_threads(url: str) -> AsyncGenerator[Get, None]:
    """The same with 1,000 threads."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1000))
    async with threads(url) as get:
        yield get


@asynccontextmanager
async def polled(url: str) -> AsyncGenerator[Get, None]:
    """Celery's own ``ready()``, asked in a thread every 0.1 s."""
    from celery import Celery

    app = Celery("service", backend=url)

    async def get(task_id: str) -> Any:
        result = app.AsyncResult(task_id)
        while not await asyncio.to_thread(result.ready):  # noqa: ASYNC110 - which is the point
            await asyncio.sleep(POLL)
        return result.result

    yield get


WAYS = {
    "aioresult": awaited,
    "to_thread(get), default executor": threads,
    "to_thread(get), 1,000 threads": many_threads,
    "ready() every 0.1 s": polled,
}


def create() -> FastAPI:
    """For ``uvicorn --factory``: the way and the URL come by environment."""
    way = WAYS[os.environ["AIORESULT_SERVICE_WAY"]]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        async with way(os.environ["AIORESULT_SERVICE_URL"]) as get:
            app.state.get = get
            yield

    app = FastAPI(lifespan=lifespan)
    waiting = 0

    @app.get("/results/{task_id}")
    async def result(task_id: str) -> dict[str, Any]:
        nonlocal waiting
        waiting += 1
        try:
            return {"value": await app.state.get(task_id)}
        finally:
            waiting -= 1

    @app.get("/figures")
    async def figures() -> dict[str, float]:
        return {"cpu": process_time(), "threads": threading.active_count(), "waiting": waiting}

    return app
