"""Operations against servers that fail, and from threads that are not the backend's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from math import inf
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

import aioresult
from aioresult import BackendClosedError, BackendConnectionError, TaskNotFoundError, TimeoutError, WrongEventLoopError
from aioresult.backends.memory import MemoryBackend
from aioresult.waiter import Outcome

from .conformance.test_operations import idle, warnings
from .conformance.test_waiting import cancel, wait
from .harness import Gate, MemoryHarness, subscribed, until
from .sites import RedisSite, Site

pytestmark = pytest.mark.xdist_group("operations")


def good_news(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]


async def test_a_listener_that_is_back_is_told_of_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aioresult")
    async with site.backend() as web, site.backend() as worker:
        waiting = [wait(web, f"t{number}") for number in range(1204)]
        await subscribed(web, 1204)
        for reconnects in (1, 2):
            caplog.clear()
            await site.kill("subscriptions")
            await until(lambda: bool(good_news(caplog)))
            (line,) = good_news(caplog)
            assert line.startswith(f"the listener of {web.as_uri()} is back after ")
            assert line.endswith(" s; 1,204 subscriptions were restored")
            stats = web.stats()
            assert (stats.connected, stats.reconnects, stats.subscriptions) == (True, reconnects, 1204)
            assert stats.last_error is not None
        for number in range(1204):
            waiting[number].cancel()
        await asyncio.wait(waiting)
        assert await worker.mark_as_done("t", 1)
        assert len(good_news(caplog)) == 1


async def test_a_listener_that_nobody_needs_is_back_with_the_next_wait(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioresult")
    async with site.backend() as web:
        await cancel(await _waiting(web))
        await idle(web, 0)
        await site.kill("all")
        await until(lambda: bool(warnings(caplog)))
        assert web.stats().connected
        assert not good_news(caplog)
        task = await _waiting(web)
        await until(lambda: bool(good_news(caplog)))
        assert good_news(caplog)[0].endswith("; 1 subscription was restored")
        await cancel(task)


async def _waiting(web: aioresult.Backend) -> asyncio.Task[Any]:
    task = wait(web)
    await subscribed(web, 1)
    return task


async def test_a_ping_fails_at_once_while_the_server_is_away_and_finds_it_when_it_is_back(
    redis_site: RedisSite, caplog: pytest.LogCaptureFixture
) -> None:
    await redis_site.empty()
    async with redis_site.backend(retry_for=600) as web:
        waiting = wait(web)
        await subscribed(web, 1)
        web._shards[0].hub.unheard.after = 0.02
        redis_site.stop("orderly")
        try:
            await until(lambda: not web.stats().connected)
            for _ in range(2):
                with pytest.raises(BackendConnectionError):
                    await web.ping()
            assert not web.stats().connected
            late = aioresult.connect(redis_site.url(), wait_for_server=60)
            opening = asyncio.create_task(late.open())
            await until(lambda: any("wait_for_server" in line for line in warnings(caplog)))
            assert not any("no worker has stored" in line for line in warnings(caplog))
        finally:
            await asyncio.to_thread(redis_site.server.start)
        await opening
        assert await late.mark_as_done("t", 1)
        assert (await waiting).result == 1
        assert await web.ping() >= 0
        assert web.stats().connected
        await late.aclose()


async def test_no_ping_takes_longer_than_three_heartbeats() -> None:
    """Whatever the driver is about, and however many pings are under way."""

    class Wedged(MemoryBackend):
        async def _ping(self) -> None:
            await asyncio.Event().wait()

    async with Wedged(heartbeat=0.01) as backend, asyncio.timeout(20):
        pings: list[asyncio.Task[float]] = []
        for _ in range(4):
            pings.append(asyncio.create_task(backend.ping()))
            await asyncio.sleep(0)
        for ping in pings:
            with pytest.raises(BackendConnectionError, match=r"has not answered a ping for 0\.03 s"):
                await ping
        assert not backend.stats().connected


async def test_a_chord_and_a_worker_that_lives_are_waited_for_with_the_default_and_without_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with aioresult.connect("memory://", default_timeout=0.01) as backend:
        waits: list[Callable[..., Coroutine[Any, Any, Any]]] = [
            backend.chord("g").get,
            partial(backend.result("t").get, on_lost="raise"),
        ]
        for call in waits:
            with pytest.raises(TimeoutError, match=r"not ready within default_timeout=0\.01 seconds"):
                await call()
        with pytest.raises(TaskNotFoundError):
            await backend.result("t").get(on_lost="raise", must_exist=True)
        backend._shards[0].hub.unheard.after = 0.02
        chord = asyncio.create_task(backend.chord("g").get(inf))
        await until(lambda: len(backend._shards[0].hub) == 1)
        chord_topic = next(iter(backend._shards[0].hub._topics))
        waiting = wait(backend, "t", inf)
        await until(lambda: bool(warnings(caplog)))
        assert "task t." in warnings(caplog)[0]
        assert backend._shards[0].hub._topics[chord_topic].looks == 0
        await cancel(chord, waiting)


class Silent:
    """A waiter that must not be told anything."""

    def receive(self, task_id: str, outcome: Outcome) -> None:
        raise AssertionError


async def warned_beside(waiter: Silent, caplog: pytest.LogCaptureFixture) -> str:
    """The first warning while ``waiter`` waits for "own", and a plain waiter for "t"."""
    async with aioresult.connect("memory://") as backend:
        backend._shards[0].hub.unheard.after = 0.02
        backend.watch("own", waiter)
        waiting = wait(backend, "t")
        await until(lambda: bool(warnings(caplog)))
        await cancel(waiting)
        backend.unwatch("own", waiter)
    return warnings(caplog)[0]


async def test_the_callback_of_a_celery_chord_may_store_nothing_for_long(caplog: pytest.LogCaptureFixture) -> None:
    class Patient(Silent):
        expects_nothing = True

    assert "task t." in await warned_beside(Patient(), caplog)


async def test_a_waiter_that_answers_every_question_with_an_error_harms_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Own(Silent):
        def __getattr__(self, name: str) -> Any:
            raise KeyError(name)

    assert "tasks own, t." in await warned_beside(Own(), caplog)


async def test_a_deadline_holds_while_it_is_not_known_whether_the_task_exists() -> None:
    harness = MemoryHarness()
    backend = harness.make()
    gate = Gate(backend, "_fetch")
    await harness.open(backend)
    with pytest.raises(TimeoutError, match="within timeout=1 seconds"):
        await backend.wait_for("t", 1, must_exist=True)
    gate.open.set()
    await harness.close()


async def test_a_backend_that_closes_ends_its_pings() -> None:
    harness = MemoryHarness()
    backend = harness.make()
    gate = Gate(backend, "_ping")
    await harness.open(backend)
    ping = asyncio.create_task(backend.ping())
    await gate.reached.wait()
    await backend.aclose()
    with pytest.raises(BackendClosedError):
        await ping


async def test_the_error_in_another_thread_names_what_works_there() -> None:
    loop = asyncio.get_running_loop()
    async with aioresult.connect("memory://") as backend:
        await backend.mark_as_done("t", 1)
        result = backend.result("t")

        def wrong() -> str:
            with pytest.raises(WrongEventLoopError) as raised:
                asyncio.run(backend.get_task_meta("t"))
            return str(raised.value)

        text = await asyncio.to_thread(wrong)
        for remedy in ("asyncio.run_coroutine_threadsafe(coroutine, loop)", "anyio.from_thread.run(function, *args)"):
            assert remedy in text
        works: list[Callable[[], Any]] = [
            lambda: asyncio.run_coroutine_threadsafe(result.get(), loop).result(),
            lambda: anyio.from_thread.run(result.get),
        ]
        assert [await anyio.to_thread.run_sync(remedy) for remedy in works] == [1, 1]


def test_the_error_in_another_loop_of_the_same_thread_names_a_backend_per_loop() -> None:
    backend = aioresult.connect("memory://")
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        first.run_until_complete(backend.open())
        with pytest.raises(WrongEventLoopError, match=r"another event loop.*aioresult\.per_loop\(url\)") as raised:
            second.run_until_complete(backend.get_task_meta("t"))
        assert "thread" not in str(raised.value)
        first.run_until_complete(backend.aclose())
    finally:
        first.close()
        second.close()
