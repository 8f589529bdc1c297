"""Celery's chords, their parts run partly by a real worker and partly by us."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import pytest
import redis
from celery import Celery, chord
from celery.exceptions import ChordError as CeleryChordError

import aioresult
from aioresult import Backend, TaskRequest
from aioresult.celery import backend_from_app, dispatch

from .celery_worker import GUARD, StartWorker, Worker, celery_workers
from .harness import until

pytestmark = [
    pytest.mark.xdist_group("celery-chords"),
    pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning"),  # of redis-py, about Celery
]


@pytest.fixture(scope="module")
def start_worker(shared_redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartWorker]:
    with celery_workers(shared_redis_url, tmp_path_factory.mktemp("celery")) as start:
        yield start


@pytest.fixture
def worker(start_worker: StartWorker, shared_redis_url: str) -> Iterator[Worker]:
    worker = start_worker("chords", shared_redis_url, {})
    worker.check()
    yield worker
    worker.check()


@pytest.fixture
async def backend(worker: Worker) -> AsyncIterator[Backend]:
    """Ours, which dispatches what it claims."""
    async with backend_from_app(worker.app, on_chord_ready=partial(dispatch, app=worker.app)) as backend:
        yield backend


def send(worker: Worker, name: str, *args: Any) -> Any:
    """A chord of two parts, the first for the worker and the second for us; its body gives back what it gets."""
    ours = worker.signature("add", 2, 2).set(queue="ours")
    return chord([worker.signature(name, *args), ours], worker.signature("echo"))()


def take(app: Celery) -> TaskRequest:
    """Our part, as a worker gets it from the broker."""
    with app.connection_for_read() as connection, connection.SimpleQueue("ours") as queue:
        message = queue.get(timeout=GUARD)
        message.ack()
    (_, _, embedded), headers = message.payload, message.headers
    return TaskRequest(
        id=headers["id"],
        group=headers["group"],
        group_index=headers["group_index"],
        chord=embedded["chord"],
    )


async def parts_have_come(backend: Backend, group_id: str | None, count: int) -> None:
    assert group_id is not None

    async def there() -> bool:
        return (await backend.chord(group_id).progress()).done == count

    await until(there)


async def test_we_bring_the_last_part_and_publish_the_body(worker: Worker, backend: Backend) -> None:
    sent = send(worker, "add", 1, 1)
    request = await asyncio.to_thread(take, worker.app)
    await parts_have_come(backend, request.group, 1)
    waiting = asyncio.ensure_future(backend.result(sent.id).get(timeout=GUARD))
    assert await backend.mark_as_done(request.id, 4, request=request)
    assert await waiting == [2, 4]
    assert await asyncio.to_thread(sent.get, timeout=GUARD) == [2, 4]


async def test_celery_brings_the_last_part_and_its_body_runs(worker: Worker, backend: Backend) -> None:
    sent = send(worker, "gated", "the last part")
    request = await asyncio.to_thread(take, worker.app)
    waiting = asyncio.ensure_future(backend.result(sent.id).get(timeout=GUARD))
    for _ in range(2):  # a part that comes twice counts once
        await backend.mark_as_done(request.id, 4, request=request)
    worker.open("the last part", "passed")
    assert await waiting == ["passed", 4]


async def test_a_part_that_comes_after_the_body_was_published_changes_nothing(
    worker: Worker, backend: Backend, shared_redis_url: str
) -> None:
    sent = send(worker, "add", 1, 1)
    request = await asyncio.to_thread(take, worker.app)
    await backend.mark_as_done(request.id, 4, request=request)
    assert await backend.result(sent.id).get(timeout=GUARD) == [2, 4]
    await until(lambda: finished(shared_redis_url, request.group))
    with redis.Redis.from_url(shared_redis_url) as client:
        before = set(client.keys(f"*{request.group}*"))
        await backend.mark_as_done(request.id, 4, request=request)
        assert set(client.keys(f"*{request.group}*")) == before


def finished(url: str, group_id: str | None) -> bool:
    with redis.Redis.from_url(url) as client:
        return bool(client.get(f"celery-taskset-meta-{group_id}.c") == b"done")


async def test_a_part_of_celerys_fails_and_we_come_last(worker: Worker, backend: Backend) -> None:
    sent = send(worker, "fail", "builtin")
    request = await asyncio.to_thread(take, worker.app)
    await parts_have_come(backend, request.group, 1)
    await backend.mark_as_done(request.id, 4, request=request)
    await the_body_fails(sent, backend, "by zero")


async def test_a_part_of_ours_fails_and_celery_comes_last(worker: Worker, backend: Backend) -> None:
    sent = send(worker, "gated", "after the failure")
    request = await asyncio.to_thread(take, worker.app)
    await backend.mark_as_failure(request.id, ValueError("ours"), request=request)
    with pytest.raises(aioresult.ChordError, match=request.id):
        await backend.chord(str(request.group)).get(timeout=GUARD)  # at once, though a part is missing
    worker.open("after the failure", "passed")
    await the_body_fails(sent, backend, "ours")


async def the_body_fails(sent: Any, backend: Backend, why: str) -> None:
    """For our reader and for Celery's."""
    with pytest.raises(aioresult.ChordError, match=why):
        await backend.result(sent.id).get(timeout=GUARD)
    with pytest.raises(CeleryChordError, match=why):
        # Not following the parents, for there Celery finds the part's own exception.
        await asyncio.to_thread(sent.get, timeout=GUARD, follow_parents=False)
