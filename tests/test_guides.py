"""The services and scripts that the guides show, run as their readers would run them, against a real server."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import redis.asyncio

import aioresult

from .test_readme import blocks, lay_out, run
from .webserver import served

DOCS = Path(__file__).parent.parent / "docs"


@asynccontextmanager
async def running(folder: Path, settings: Mapping[str, str], *words: str) -> AsyncIterator[None]:
    """A worker: ``python`` with these words."""
    environ = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join([str(folder), str(DOCS.parent)])}
    worker = subprocess.Popen([sys.executable, *words], cwd=folder, env=environ)  # noqa: ASYNC220 - returns at once
    try:
        yield
    finally:
        worker.terminate()
        await asyncio.to_thread(worker.wait, 60)


async def test_the_tutorial_from_the_first_result_to_the_errors(
    redis_url: str, redis_client: redis.asyncio.Redis, tmp_path: Path
) -> None:
    page = DOCS / "tutorial.md"
    lay_out(page, tmp_path)
    environ = {"REDIS_URL": redis_url}
    async with served(tmp_path, environ, "-m", "uvicorn", "web:app", "--port", "{port}") as site:
        async with httpx.AsyncClient(base_url=site, timeout=60) as client:

            async def charge(amount: int) -> str:
                return str((await client.post("/charges", params={"amount": amount})).json()["id"])

            early = await charge(1)
            response = await client.get(f"/charges/{early}", params={"wait": 0.1})
            assert (response.status_code, response.json()) == (202, {"state": "PENDING"})
            response = await client.get(f"/charges/{uuid4()}")
            assert response.status_code == 404

            async with running(tmp_path, environ, "worker.py"):
                assert (await client.get(f"/charges/{early}")).json() == {"receipt": "receipt for 1"}
                paid, declined = await charge(42), await charge(4200)
                assert (await client.get(f"/charges/{paid}")).json() == {"receipt": "receipt for 42"}
                response = await client.get(f"/charges/{declined}")
                assert (response.status_code, response.json()) == (402, {"error": "declined", "limit": 100})

                many = next(block for block in blocks(page) if block.name == "many.py")
                assert await asyncio.to_thread(run, tmp_path, "many.py", **environ) == many.prints


async def test_the_service_of_the_fastapi_guide(redis_url: str, tmp_path: Path) -> None:
    lay_out(DOCS / "fastapi.md", tmp_path)
    environ = {"REDIS_URL": redis_url}
    async with (
        aioresult.connect(redis_url) as worker,
        served(tmp_path, environ, "-m", "uvicorn", "plain:app", "--port", "{port}") as site,
        httpx.AsyncClient(base_url=site, timeout=60) as client,
    ):
        ids = {name: str(uuid4()) for name in ("done", "failed", "revoked", "never", "written")}
        waiting = asyncio.create_task(client.get(f"/tasks/{ids['done']}"))
        async with worker.running(ids["written"]) as task:
            await task.output.send("a chunk")
        await worker.mark_as_done(ids["done"], 42)
        await worker.mark_as_failure(ids["failed"], NotImported("no"))
        await worker.mark_as_revoked(ids["revoked"], "too late")
        assert (await waiting).json() == {"value": 42}
        assert (await client.get(f"/plain/{ids['done']}")).json() == {"value": 42}
        seen = {name: await client.get(f"/tasks/{ids[name]}", params={"wait": 0}) for name in ids}
        codes = {name: response.status_code for name, response in seen.items()}
        assert codes == {"done": 200, "failed": 500, "revoked": 410, "never": 202, "written": 200}
        assert seen["failed"].json() == {"error": "NotImported: no"}
        assert (await client.get("/health")).json()["seconds"] < 60
        assert '"a chunk"' in (await client.get(f"/tasks/{ids['written']}/output")).text
        cursor = {"last-event-id": "no cursor"}
        assert (await client.get(f"/tasks/{ids['written']}/output", headers=cursor)).status_code == 400
        group = await client.get("/groups", params={"ids": f"{ids['done']},{ids['failed']}"})
        assert "data: 0 42\n\n" in group.text


class NotImported(Exception):
    """The service does not know this module."""


async def test_the_service_of_the_guide_for_fastapi_with_celery(redis_url: str, tmp_path: Path) -> None:
    lay_out(DOCS / "fastapi_celery.md", tmp_path)
    environ = {"REDIS_URL": redis_url}
    words = ("-m", "celery", "-A", "tasks", "worker", "-c", "2", "-l", "error", "--without-gossip", "--without-mingle")
    async with (
        running(tmp_path, environ, *words),
        served(tmp_path, environ, "-m", "uvicorn", "service:web", "--port", "{port}") as site,
        httpx.AsyncClient(base_url=site, timeout=60) as client,
    ):

        async def sent(path: str, **arguments: Any) -> str:
            return str((await client.post(path, **arguments)).json()["id"])

        async def answer(task_id: str, wait: float = 30) -> tuple[int, Any]:
            response = await client.get(f"/tasks/{task_id}", params={"wait": wait})
            return response.status_code, response.json()

        assert await answer(await sent("/add", params={"x": 1, "y": 2})) == (200, {"value": 3})
        assert await answer(str(uuid4())) == (404, {"error": "no such task"})
        declined = {"error": "declined", "amount": 500, "limit": 100}
        assert await answer(await sent("/charge", params={"amount": 500})) == (402, declined)
        assert await answer(await sent("/sum", json=[1, 2, 3])) == (200, {"value": 14})
        many = (await client.get("/add-many", params={"to": 3})).text
        assert all(f"data: {place} {2 * place}\n\n" in many for place in range(3))
        assert many.endswith("event: end\ndata: [0, 2, 4]\n\n")

        counted = await sent("/count", params={"to": 3})
        states = (await client.get(f"/tasks/{counted}/states")).text
        assert 'event: end\ndata: {"state": "SUCCESS"}' in states
        written = (await client.get(f"/tasks/{counted}/output")).text
        assert re.findall(r"^data: (\d)$", written, re.M) == ["1", "2", "3"]
        (cursor, *_) = re.findall(r"^id: (.+)$", written, re.M)
        rest = (await client.get(f"/tasks/{counted}/output", headers={"last-event-id": cursor})).text
        assert re.findall(r"^data: (\d)$", rest, re.M) == ["2", "3"]

        tried = (await client.get(f"/tasks/{await sent('/flaky')}/states")).text
        assert '"type": "ConnectionError"' in tried

        long = await sent("/count", params={"to": 10_000})
        async with client.stream("GET", f"/tasks/{long}/states") as stream:
            async for line in stream.aiter_lines():
                if '{"state": "PROGRESS", "result": {"current": ' in line:
                    break
        waiting = asyncio.create_task(answer(long))
        assert (await client.post(f"/tasks/{long}/revoke")).json() == {"stopped": True}
        status, told = await waiting
        # The reason may be Celery's own: its worker stores REVOKED once more when it ends the process.
        assert (status, told["error"].partition(":")[0]) == (410, "stopped")


def test_the_tests_of_the_testing_guide(tmp_path: Path) -> None:
    lay_out(DOCS / "testing.md", tmp_path)
    (tmp_path / "test_fixture.py").write_text(
        "async def test_it(backend):\n    await backend.mark_as_done('t', 1)\n    assert await backend.result('t')\n"
    )
    options = ("-q", "-o", "asyncio_mode=auto", "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist")
    assert "3 passed" in run(tmp_path, "-m", "pytest", *options)


EAGER = """
import asyncio, aioresult, celery, eager

app = celery.Celery(broker="memory://", backend="cache+memory://")
app.conf.task_always_eager = True

@app.task
def divide(x, y):
    return x / y

async def main():
    async with aioresult.connect("memory://") as backend:
        good, bad = divide.delay(4, 2), divide.delay(1, 0)
        await eager.store_eager(backend, good)
        await eager.store_eager(backend, bad)
        print(await backend.result(good.id), repr(await backend.result(bad.id).get(propagate=False)))

asyncio.run(main())
"""


def test_what_ran_on_the_spot_is_stored_as_the_testing_guide_shows(tmp_path: Path) -> None:
    lay_out(DOCS / "testing.md", tmp_path)
    assert run(tmp_path, "-c", EAGER) == "2.0 ZeroDivisionError('division by zero')\n"
