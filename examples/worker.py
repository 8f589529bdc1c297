"""An asyncio worker, in one process and without a server.

It runs several tasks at once, retries them, and shuts down gracefully. A reader stops one of the tasks. Install and run
it in a checkout::

    pip install .
    python examples/worker.py
"""

from __future__ import annotations

import asyncio

import aioresult

mail_server_is_away = [True, True, False]


async def spell(task: aioresult.Running, word: str) -> int:
    for number, letter in enumerate(word, 1):
        await task.output.send(letter)  # the readers get each letter at once
        task.progress(number, len(word))
        await asyncio.sleep(0.05)
    return len(word)


async def send_mail(task: aioresult.Running, address: str) -> str:
    if mail_server_is_away.pop(0):
        raise aioresult.Retry(exc=ConnectionError("the mail server is away"))
    return f"sent to {address}"


async def work(queue: asyncio.Queue[tuple[str, str]], backend: aioresult.Backend) -> None:
    while True:
        task_id, argument = job = await queue.get()
        try:
            async with backend.running(task_id) as task:
                task.value = await (send_mail if "@" in argument else spell)(task, argument)
        except aioresult.Retry:
            queue.put_nowait(job)  # stored as RETRY; a real queue would wait a little
        except asyncio.CancelledError:
            queue.put_nowait(job)  # a shutdown: nothing is stored, and the next worker runs the task again
            raise
        except Exception as exc:  # stored as FAILURE or REVOKED; the worker goes on
            print(f"the worker: {task_id}: {exc!r}")


async def main() -> None:
    queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue()  # a real queue is in Redis, RabbitMQ, …
    async with aioresult.connect("memory://") as backend, asyncio.TaskGroup() as group:
        workers = [group.create_task(work(queue, backend)) for _ in range(2)]
        for job in [("short", "hello"), ("mail", "ann@example.org"), ("long", "x" * 1000), ("last", "bye")]:
            queue.put_nowait(job)
        print("".join([letter async for letter in backend.result("short").stream()]))
        print([meta.status async for meta in backend.result("mail").updates()][-1], await backend.result("mail"))
        async for _ in backend.result("long").stream():  # the first letter: the task runs
            await backend.result("long").revoke("a thousand letters are too many")
            break
        print(repr(await backend.result("long").get(propagate=False)), await backend.result("last"))
        for worker in workers:
            worker.cancel()


asyncio.run(main())
