"""`per_loop`: each event loop has an open backend of its own. A Django site that uses it works under every server."""

from __future__ import annotations

import asyncio
import gc
import logging
from pathlib import Path
from threading import Barrier, Thread, get_ident
from typing import Any

import httpx
import pytest
import redis.asyncio

import aioresult
from aioresult import Backend, BackendClosedError, BackendConnectionError, ImproperlyConfigured, PerLoop
from aioresult.backends.memory import MemoryBackend, MemoryStore
from aioresult.tasks import EMPTY
from aioresult.waiter import Outcome

from .harness import until
from .test_readme import lay_out, run
from .webserver import served

ROOT = Path(__file__).parent.parent


async def value(backends: PerLoop, task_id: str = "t") -> tuple[Backend, object]:
    backend = await backends.current()
    return backend, await backend.result(task_id).get(timeout=30)


def stored(value: object) -> MemoryStore:
    store = MemoryStore()

    async def main() -> None:
        async with MemoryBackend(store=store) as backend:
            await backend.mark_as_done("t", value)

    asyncio.run(main())
    return store


def test_each_loop_has_a_backend_of_its_own_which_ends_with_it() -> None:
    closed: list[Backend] = []

    class Noting(MemoryBackend):
        async def aclose(self) -> None:
            await super().aclose()
            closed.append(self)

    store = stored(42)
    backends = aioresult.per_loop(lambda: Noting(store=store))
    first, found = asyncio.run(value(backends))
    second, again = asyncio.run(value(backends))
    assert (found, again) == (42, 42)
    assert first is not second
    assert closed == [first, second]
    assert not backends._held


async def test_callers_of_one_loop_share_the_backend_and_its_opening() -> None:
    backends = aioresult.per_loop("memory://")
    some = await asyncio.gather(*(backends.current() for _ in range(10)))
    assert len(set(map(id, some))) == 1
    assert await backends.current() is some[0]
    await backends.aclose()
    assert not some[0].is_open
    assert (await backends.current()).is_open
    await backends.aclose()
    await backends.aclose()


async def test_a_backend_that_was_closed_is_opened_again() -> None:
    backends = aioresult.per_loop("memory://")
    backend = await backends.current()
    await backend.aclose()
    assert await backends.current() is backend
    assert backend.is_open
    await backend.aclose()
    assert (await backends.current()).is_open
    await backends.aclose()


@pytest.mark.parametrize(
    ("given", "options", "told"),
    [
        (MemoryBackend(), {}, r"takes a URL, or a function .*; not aioresult\.backends\.memory\.MemoryBackend"),
        (MemoryBackend, {"retry_for": 5, "expires": 5}, "give expires, retry_for to the backend in your function"),
    ],
    ids=["a backend", "options"],
)
def test_a_mistake_is_told_before_the_first_request(given: Any, options: Any, told: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=told):
        aioresult.per_loop(given, **options)


async def test_closing_during_the_opening_ends_it_and_the_next_call_opens_anew() -> None:
    entered, never = asyncio.Event(), asyncio.Event()
    made: list[Backend] = []

    class Slow(MemoryBackend):
        async def _open(self) -> None:
            made.append(self)
            if len(made) == 1:
                entered.set()
                await never.wait()

    backends = aioresult.per_loop(Slow)
    opening = asyncio.create_task(backends.current())
    await entered.wait()
    await backends.aclose()
    with pytest.raises(BackendClosedError):
        await opening
    second = await backends.current()
    assert second.is_open
    # Before the task that opens has begun, too. A caller meanwhile gets an open backend, or that error.
    _, third, _, fourth = await asyncio.gather(
        backends.aclose(), backends.current(), backends.aclose(), backends.current(), return_exceptions=True
    )
    assert isinstance(third, BackendClosedError)
    assert isinstance(fourth, Backend)
    assert fourth.is_open
    await backends.aclose()
    assert not any(backend.is_open for backend in made)


async def test_an_opening_that_a_stranger_cancels_begins_again() -> None:
    backends = aioresult.per_loop("memory://")
    opening = asyncio.create_task(backends.current())
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - {opening, asyncio.current_task()}:
        task.cancel()
    assert (await opening).is_open
    await backends.aclose()


def test_a_callback_in_one_thread_does_not_hinder_the_timers_of_another() -> None:
    """Python refuses to enter a context in two threads at once: then the timeout would never come."""
    errors: list[BaseException] = []

    async def main() -> None:
        async with aioresult.connect("memory://") as backend, asyncio.timeout(10):
            with pytest.raises(aioresult.TimeoutError):
                await backend.result("t").get(timeout=0.001)

    def work() -> None:
        try:
            asyncio.run(main())
        except BaseException as exc:
            errors.append(exc)

    def callback() -> None:
        thread = Thread(target=work)
        thread.start()
        thread.join()

    EMPTY.context.run(callback)
    assert not errors


async def test_a_shared_memory_store_tells_each_loop_in_its_own_thread() -> None:
    store, told = MemoryStore(), asyncio.Event()
    threads: list[int] = []

    class Noting:
        def receive(self, task_id: str, outcome: Outcome) -> None:
            threads.append(get_ident())
            told.set()

    async def main() -> None:
        async with MemoryBackend(store=store) as backend:
            await backend.mark_as_done("t", 1)

    async with MemoryBackend(store=store) as backend:
        backend.watch("t", Noting())
        await until(lambda: bool(store.listeners))
        await asyncio.to_thread(asyncio.run, main())
        await told.wait()
    assert threads == [get_ident()]


def test_threads_with_loops_of_their_own_do_not_meet() -> None:
    store = stored("value")
    backends = aioresult.per_loop(lambda: MemoryBackend(store=store))
    together, found = Barrier(5), list[tuple[Backend, object]]()

    async def main() -> tuple[Backend, object]:
        mine = await value(backends)
        await asyncio.to_thread(together.wait, 30)  # all five loops are alive now
        return mine

    threads = [Thread(target=lambda: found.append(asyncio.run(main()))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each for _, each in found] == ["value"] * 5
    assert len({id(backend) for backend, _ in found}) == 5
    assert not backends._held


def test_a_loop_that_ends_without_a_word_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    store = stored(42)
    backends = aioresult.per_loop(lambda: MemoryBackend(store=store))
    caplog.set_level(logging.CRITICAL, "asyncio")  # which complains of the hub's task, as of any in such a loop
    loop = asyncio.new_event_loop()
    backend, _ = loop.run_until_complete(value(backends))
    loop.close()
    asyncio.run(value(backends))
    assert not backend.is_open
    assert not backends._held
    del backend, loop
    gc.collect()  # here, where asyncio's complaint is not heard


def test_a_mistake_is_seen_where_it_is_made() -> None:
    with pytest.raises(ImproperlyConfigured, match="unknown result backend"):
        aioresult.per_loop("no-such-scheme://")
    with pytest.raises(ImproperlyConfigured, match="expires"):
        aioresult.per_loop("memory://", expires=-1)


async def test_a_server_that_cannot_be_reached_is_tried_again(unused_tcp_port: int) -> None:
    made: list[Backend] = []

    def make() -> Backend:
        made.append(aioresult.connect(f"redis://127.0.0.1:{unused_tcp_port}/0"))
        return made[-1]

    backends = aioresult.per_loop(make)
    for _ in range(2):
        with pytest.raises(BackendConnectionError):
            await backends.current()
    assert len(made) == 1
    await backends.aclose()


# -- the site of docs/django.md ----------------------------------------------------------------------------------------


WSGI = (
    "import os\n"
    "from wsgiref.simple_server import make_server\n"
    "from site_of_results import wsgi_application\n"
    "host, port = os.environ['ADDRESS'].split(':')\n"
    "make_server(host, int(port), wsgi_application).serve_forever()"
)


@pytest.mark.parametrize(
    ("command", "loops"),
    [
        pytest.param(
            ("site_of_results.py", "runserver", "--noreload", "--skip-checks", "{address}"), "many", id="runserver"
        ),
        pytest.param(("-c", WSGI), "many", id="wsgi"),
        pytest.param(("-m", "uvicorn", "site_of_results:application", "--port", "{port}"), "one", id="asgi"),
    ],
)
async def test_a_django_site_works_under_every_server(
    command: tuple[str, ...], loops: str, redis_url: str, redis_client: redis.asyncio.Redis, tmp_path: Path
) -> None:
    async def connected() -> bool:
        return len(await redis_client.client_list()) > others

    async def unconnected() -> bool:
        return not await connected()

    lay_out(ROOT / "docs" / "django.md", tmp_path)
    async with aioresult.connect(redis_url) as worker, httpx.AsyncClient(timeout=60) as client:
        others = len(await redis_client.client_list())
        async with served(tmp_path, {"RESULTS_URL": redis_url}, *command) as site:
            for number, view in enumerate(("results", "results", "plain")):
                waiting = asyncio.create_task(client.get(f"{site}/{view}/t{number}"))
                await worker.mark_as_done(f"t{number}", number)
                assert (await waiting).json() == {"value": number}
            await until(connected if loops == "one" else unconnected)
        await until(unconnected)


def test_the_other_blocks_of_the_page_run(tmp_path: Path) -> None:
    lay_out(ROOT / "docs" / "django.md", tmp_path)
    assert run(tmp_path, "-W", "error", "results.py") == ""
