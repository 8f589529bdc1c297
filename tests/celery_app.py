"""The tasks that real Celery workers run for the tests of interoperability.

A worker's app is configured by the environment: ``AIORESULT_TEST_CELERY_BROKER`` and ``AIORESULT_TEST_CELERY_BACKEND``
are URLs, ``AIORESULT_TEST_CELERY_CONF`` is JSON of further settings.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import redis
from celery import Celery, group, shared_task, states
from celery.result import GroupResult


def make_app(broker: str | None, backend: str | None, **conf: Any) -> Celery:
    """An app with the tasks below; the same on the side that calls them, which has several apps."""
    made = Celery("tests", broker=broker, backend=backend, set_as_current=False)
    # One backend for all threads: a result is made in the thread of the event loop, and waited for in another.
    made.conf.update({"result_backend_thread_safe": True, **conf})
    return made


app = make_app(
    os.environ.get("AIORESULT_TEST_CELERY_BROKER"),
    os.environ.get("AIORESULT_TEST_CELERY_BACKEND"),
    **json.loads(os.environ.get("AIORESULT_TEST_CELERY_CONF", "{}")),
)


class CardDeclined(Exception):
    pass


class Shop:
    class Closed(LookupError):
        pass


class OutOfStock(Exception):
    def __init__(self, *, item: str) -> None:
        super().__init__(item)
        self.item = item


#: What the task ``fail`` can fail with.
FAILURES: Mapping[str, Callable[[], Exception]] = {
    "builtin": lambda: ZeroDivisionError("by zero"),
    "no arguments": ValueError,
    "constructor in C": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    "custom": lambda: CardDeclined("4242", 17, {"größe": [1]}),
    "nested": lambda: Shop.Closed("on sundays"),
    "argument without JSON": lambda: ValueError("a", object()),
    "argument without pickle": lambda: ValueError("a", threading.Lock()),
    "keyword-only": lambda: OutOfStock(item="tea"),
    "imported by the worker alone": lambda: importlib.import_module("wave").Error("no header"),
}


def task(name: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Celery's own decorator, which has no annotations."""
    decorate: Callable[[Callable[..., Any]], Any] = shared_task(name=name, **options)
    return decorate


@task("echo")
def echo(value: Any) -> Any:
    return value


@task("add")
def add(x: int, y: int) -> int:
    return x + y


@task("total")
def total(numbers: list[int]) -> int:
    return sum(numbers)


@task("fail")
def fail(kind: str) -> None:
    raise FAILURES[kind]()


@task("ignored", ignore_result=True)
def ignored() -> int:
    return 42


@task("gated", bind=True, track_started=True)
def gated(self: Any, gate: str, progress: Any = None) -> str:
    """Return what somebody pushes onto the list ``gate`` of the broker."""
    if progress is not None:
        self.update_state(state="PROGRESS", meta=progress)
    return _pass(self, gate)


@task("talk", bind=True)
def talk(self: Any, words: list[str], gate: str) -> int:
    """Says the words, with a pause at the gate before the last; ``"fail"`` and ``"retry"`` from there do that."""
    from aioresult.celery import output

    with output(self) as out, redis.Redis.from_url(self.app.conf.broker_url) as client:
        for word in words[:-1]:
            out.send(word)
        self.update_state(state="PROGRESS", meta={"words": len(words) - 1})
        said = client.blpop([gate], timeout=30)
        if said and said[1] == b"retry":
            raise self.retry(countdown=0)
        if said and said[1] == b"fail":
            raise CardDeclined("in the middle")
        out.send(words[-1])
    return len(words)


@task("flaky", bind=True)
def flaky(self: Any, gate: str) -> str:
    """Fail at first, then as `gated`."""
    if self.request.retries == 0:
        raise self.retry(exc=CardDeclined("not yet"), countdown=0)
    return _pass(self, gate)


@task("hopeless", bind=True, max_retries=1)
def hopeless(self: Any, with_exception: bool) -> None:
    while self.request.retries and self.AsyncResult(self.request.id).state != states.RETRY:
        time.sleep(0.002)  # Celery sends a retry before it stores RETRY, which could end up on top of the failure
    raise self.retry(exc=CardDeclined("never") if with_exception else None, countdown=0)


@task("look_up", bind=True)
def get_outcomes(self: Any, task_id: str) -> list[Any]:
    found = self.AsyncResult(task_id)
    return [found.state, found.result]


@task("save_again", bind=True)
def save_again(self: Any, group_id: str) -> str:
    """Save a group that is stored under another id, too."""
    found = GroupResult.restore(group_id, app=self.app)
    found.id = self.request.id
    found.save()
    return str(found.id)


@task("parent")
def parent() -> str:
    add.delay(1, 2)
    group(add.s(3, 4), add.s(5, 6)).delay()
    return "busy"


def _pass(task: Any, gate: str) -> str:
    with redis.Redis.from_url(task.app.conf.broker_url) as client:
        opened = client.blpop([gate], timeout=60)
    return "" if opened is None else opened[1].decode()
