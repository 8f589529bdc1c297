"""A page that shows an answer while a worker writes it, with a progress bar and a button that stops the worker.

Reload the page, or cut its connection: no text is lost, and none appears twice. Install and run it in a checkout, then
open the URL that it prints::

    pip install . starlette uvicorn
    python examples/stream_to_browser.py

There the worker runs in the process of the web server. With a Redis, it runs in a process of its own::

    pip install '.[redis]'
    python examples/stream_to_browser.py redis://localhost
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from uuid import uuid4

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

import aioresult
from aioresult.sse import HEADERS, events

SECONDS_PER_WORD = float(os.environ.get("SECONDS_PER_WORD", "0.1"))
ANSWER = " ".join(f"{n} green bottles hanging on the wall;" for n in range(20, 0, -1)) + " none.\n“Ça suffit!” 🍾"

PAGE = """<!doctype html><meta charset="utf-8"><title>An answer, as it is written</title>
<form method="post" action="/tasks"><button>Ask</button></form>
<div id="task" hidden>
  <progress id="bar" value="0"></progress> <button id="stop">Stop</button> <output id="state"></output>
  <p id="text" style="white-space: pre-wrap"></p> <p id="error"></p>
</div>
<script>
  const id = location.pathname.split("/")[2], $ = name => document.getElementById(name)
  const say = text => { $("state").textContent = text }
  const on = (source, name, handle) =>  // the browser reports a broken connection as an "error" without data
    source.addEventListener(name, event => { if (event.data) handle(JSON.parse(event.data)) })
  if (id) {
    $("task").hidden = false
    $("stop").onclick = () => fetch(id + "/revoke", {method: "POST"})
    const output = new EventSource(id + "/output"), states = new EventSource(id + "/states")
    on(output, "message", chunk => $("text").append(chunk))
    on(output, "restart", () => { $("text").textContent = "" })
    on(output, "gap", gap => $("text").append(` [${gap.missed} chunks are missing] `))
    on(output, "end", () => output.close())
    on(states, "state", ({state, result}) => {
      say(state)
      if (state === "PROGRESS") { $("bar").max = result.total; $("bar").value = result.current }
    })
    on(states, "lost", () => say("The worker has died. Another one may take over."))
    on(states, "error", ({type, message}) => { $("error").textContent = `${type}: ${message}` })
    on(states, "end", ({state}) => {
      states.close()  // otherwise the browser would connect again
      say(state)
      $("stop").disabled = true
      if (state === "SUCCESS") $("bar").value = $("bar").max
    })
  }
</script>"""


async def answer(backend: aioresult.Backend, task_id: str) -> None:
    with suppress(aioresult.TaskRevokedError):  # the task was stopped
        async with backend.running(task_id) as task:
            words = ANSWER.split(" ")
            for n, word in enumerate(words, 1):
                await task.output.send(word if n == 1 else f" {word}")
                task.progress(n, len(words))
                await asyncio.sleep(SECONDS_PER_WORD)
            task.value = len(words)


async def worker(url: str) -> None:
    """Run the tasks whose ids come in on standard input. It stands for the broker."""
    async with aioresult.connect(url) as backend, asyncio.TaskGroup() as tasks:
        while line := await asyncio.to_thread(sys.stdin.readline):
            tasks.create_task(answer(backend, line.strip()))


@asynccontextmanager
async def queue(url: str, backend: aioresult.Backend) -> AsyncIterator[Callable[[str], object]]:
    """Give a function that sends the id of a task to a worker."""
    if url.startswith("memory:"):
        tasks: set[asyncio.Task[None]] = set()
        try:
            yield lambda task_id: tasks.add(asyncio.create_task(answer(backend, task_id)))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    else:
        command = [sys.executable, __file__, url, "worker"]
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
        broker = process.stdin
        assert broker is not None
        try:
            yield lambda task_id: broker.write(f"{task_id}\n".encode())
        finally:
            process.terminate()
            await process.wait()


def app(backend: aioresult.Backend, submit: Callable[[str], object]) -> Starlette:
    def result(request: Request) -> aioresult.AsyncResult[int]:
        return backend.result(str(request.path_params["id"]))  # an application checks here whether the user may see it

    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE)

    async def ask(request: Request) -> Response:
        task_id = str(uuid4())
        submit(task_id)
        return RedirectResponse(f"/tasks/{task_id}", 303)

    async def output(request: Request) -> Response:
        try:  # the browser sends the header when it connects again
            stream = result(request).stream(after=request.headers.get("last-event-id"))
        except aioresult.InvalidCursor:
            return Response(status_code=400)
        return StreamingResponse(events(stream, retry=500), headers=HEADERS)

    async def states(request: Request) -> Response:
        return StreamingResponse(events(result(request).updates(), retry=500), headers=HEADERS)

    async def revoke(request: Request) -> Response:
        return Response(status_code=202 if await result(request).revoke("stopped in the browser") else 409)

    task = "/tasks/{id:uuid}"
    routes = [Route("/", page), Route("/tasks", ask, methods=["POST"]), Route(task, page)]
    routes += [Route(f"{task}/output", output), Route(f"{task}/states", states)]
    return Starlette(routes=[*routes, Route(f"{task}/revoke", revoke, methods=["POST"])])


async def main(url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with aioresult.connect(url) as backend, queue(url, backend) as submit:
            print(f"http://127.0.0.1:{listener.getsockname()[1]}/", flush=True)
            config = uvicorn.Config(app(backend, submit), log_level="critical", timeout_graceful_shutdown=0, ws="none")
            await uvicorn.Server(config).serve(sockets=[listener])


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run((worker if sys.argv[2:] == ["worker"] else main)((sys.argv[1:] or ["memory://"])[0]))
