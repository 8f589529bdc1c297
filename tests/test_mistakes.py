"""What users get wrong, and what they are told: at once, and in words that say what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

import aioresult
from aioresult import Backend, ImproperlyConfigured, UsageError


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (None, "must be a str, not NoneType"),
        (b"redis://:secret@localhost", "must be a str, not bytes"),
        ("redis:localhost", "'redis:localhost' is not a URL: write redis://…"),
        ("redis:/:secret@localhost", "'redis:/:**@localhost' is not a URL: write redis://…"),
        ("memory:", "'memory:' is not a URL: write memory://…"),
        ("reddis://localhost", "unknown result backend 'reddis'; known here are memory, "),
        ("localhost:6379", "unknown result backend 'localhost:6379'; known here are memory, "),
        ("amqp://localhost", "Celery has a backend of that name; aioresult has none"),
    ],
)
def test_a_wrong_url_is_told_what_is_right(url: Any, told: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=re.escape(told)):
        aioresult.connect(url)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"expire": 60}, "unknown option 'expire', did you mean 'expires'?; see help(MemoryBackend)"),
        ({"shards": 2}, "unknown option 'shards'; see help(MemoryBackend)"),
        ({"heartbeat": 0}, "heartbeat must be more than 0"),
    ],
)
def test_a_wrong_option_is_told_what_is_right(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=re.escape(told)):
        aioresult.connect("memory://", **options)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda backend: backend.result(7), "an id must be a str or a UUID, not int"),
        (lambda backend: backend.group([7]), "an id must be a str or a UUID, not int"),
        (lambda backend: backend.group("saved"), "pass several results or ids, not 'saved'"),
    ],
)
def test_a_handle_on_nothing_sensible_is_refused_when_it_is_made(make: Callable[[Backend], object], told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        make(aioresult.connect("memory://"))


async def test_ids_may_be_uuids() -> None:
    ids: list[Any] = [uuid4(), uuid4()]
    async with aioresult.connect("memory://") as backend:
        for task_id in ids:
            await backend.mark_as_done(task_id, str(task_id))
        group = backend.group([backend.result(ids[0]), ids[1]])
        assert await group.get(timeout=10) == [str(task_id) for task_id in ids]


@pytest.mark.parametrize("wrong", ["declined", ValueError])
async def test_a_failure_needs_an_exception(wrong: Any) -> None:
    async with aioresult.connect("memory://") as backend:
        for mark in (backend.mark_as_failure, backend.mark_as_retry):
            with pytest.raises(UsageError, match="a task fails with an exception, not with"):
                await mark("task", wrong)
        assert not await backend.exists("task")
