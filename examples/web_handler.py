"""A web service that returns results: ``GET /tasks/{id}?wait=5`` answers as soon as the task is over.

The status is 200 with the value, 202 if the task is not over yet, 404 if there is no such task, 500 if the task failed,
and 503 if the store cannot be reached. Run as a script, the service sends requests to itself. Install and run it in a
checkout::

    pip install . httpx starlette
    python examples/web_handler.py

To serve it::

    pip install uvicorn
    uvicorn --app-dir examples web_handler:app
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import aioresult

LONGEST_WAIT = 30.0  # seconds; shorter than the time limit of a proxy


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with aioresult.connect(os.environ.get("RESULT_BACKEND", "memory://")) as backend:
        app.state.backend = backend
        yield


async def get_task(request: Request) -> Response:
    backend: aioresult.Backend = request.app.state.backend
    task_id = str(request.path_params["id"])
    try:
        wait = min(max(0.0, float(request.query_params.get("wait", "0"))), LONGEST_WAIT)
    except ValueError:
        return answer(400, error="wait must be a number of seconds")
    try:
        if not await backend.exists(task_id):  # needs mark_as_pending when a task is submitted; Celery does not call it
            return answer(404, error="no such task")
        meta = await backend.wait_for(task_id, timeout=wait)
    except aioresult.TimeoutError:
        return answer(202, state="still running")
    except aioresult.BackendError:
        return answer(503, error="the results cannot be reached")
    if meta.propagates:
        return answer(500, error=f"{type(meta.result).__name__}: {meta.result}")
    return answer(200, value=meta.result)


def answer(status: int, **body: object) -> Response:
    return Response(json.dumps(body, default=str), status, media_type="application/json")


app = Starlette(routes=[Route("/tasks/{id:uuid}", get_task)], lifespan=lifespan)


async def work(backend: aioresult.Backend, paid: str, declined: str) -> None:
    await asyncio.sleep(0.1)  # stands for the work, while the first request waits
    await backend.mark_as_done(paid, {"receipt": 42})
    await backend.mark_as_failure(declined, ValueError("the card was declined"))


async def main() -> None:
    transport = httpx.ASGITransport(app=app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        paid, declined, slow, unknown = (str(uuid4()) for _ in range(4))
        await asyncio.gather(*map(app.state.backend.mark_as_pending, (paid, declined, slow)))
        worker = asyncio.create_task(work(app.state.backend, paid, declined))
        for task_id, wait in ((paid, 10), (declined, 10), (slow, 0.1), (unknown, 10)):
            response = await client.get(f"/tasks/{task_id}", params={"wait": wait})
            print(response.status_code, response.text)
        await worker


if __name__ == "__main__":
    asyncio.run(main())
