"""Real Celery workers for the tests of interoperability, and what it takes to compare both sides."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, tzinfo
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import kombu.pools
import pytest
import redis
from celery import Celery
from celery.backends.asynchronous import AsyncBackendMixin

from aioresult import AsyncResult, ResultBase

from .celery_app import make_app
from .harness import until

#: Seconds after which a wait has failed.
GUARD = 20


class Worker:
    """A Celery worker in a process of its own, and the app of those who call its tasks.

    ``apart``: that app has no backend, for in one process all of Celery's have the same database tables.
    ``python`` may have another Celery than the tests.
    """

    def __init__(
        self, broker: str, backend: str, conf: Mapping[str, Any], output: Path, apart: bool, python: str
    ) -> None:
        self.app = make_app(broker, None) if apart else make_app(broker, backend, **conf)
        self.backend = backend
        #: In which a database gives the times that it keeps.
        self.zone: tzinfo = UTC
        names = ("BROKER", "BACKEND", "CONF")
        settings = zip(names, (broker, backend, json.dumps(conf)), strict=True)
        environ = os.environ | {f"AIORESULT_TEST_CELERY_{name}": value for name, value in settings}
        options = "--pool threads -c 4 --without-gossip --without-mingle --without-heartbeat -l WARNING"
        command = [python, "-m", "celery", "-A", "tests.celery_app", "worker", *options.split()]
        self._output = output
        with output.open("w") as file:
            self._process = subprocess.Popen(
                command, cwd=Path(__file__).parent.parent, env=environ, stdout=file, stderr=subprocess.STDOUT
            )

    def wait_until_ready(self) -> None:
        while not self.app.control.ping(timeout=0.1, limit=1):
            self.check()

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        close(self.app)

    def check(self) -> None:
        """Fail, with all that it said, if the worker has died."""
        if (code := self._process.poll()) is not None:
            pytest.fail(f"the Celery worker ended with {code}:\n{self._output.read_text()}", pytrace=False)

    def signature(self, name: str, *args: Any) -> Any:
        return self.app.tasks[name].s(*args)

    def call(self, name: str, *args: Any) -> Any:
        return self.signature(name, *args).delay()

    def open(self, gate: str, value: str) -> None:
        """Let the task that waits at the gate go on, and return the value."""
        with redis.Redis.from_url(self.app.conf.broker_url) as client:
            client.rpush(gate, value)


@contextlib.contextmanager
def celery_worker(
    broker: str, backend: str, conf: Mapping[str, Any], output: Path, apart: bool, python: str
) -> Iterator[Worker]:
    worker = Worker(broker, backend, conf, output, apart, python)
    try:
        worker.wait_until_ready()
        yield worker
    finally:
        worker.stop()


class StartWorker(Protocol):
    """Starts the worker of that name, or returns the one that runs."""

    def __call__(
        self, name: str, backend: str, conf: Mapping[str, Any], apart: bool = False, python: str = sys.executable
    ) -> Worker: ...


@contextlib.contextmanager
def celery_workers(redis_url: str, folder: Path) -> Iterator[StartWorker]:
    """All of this Redis is theirs: they have their tasks from it."""
    running: dict[str, Worker] = {}
    with redis.Redis.from_url(redis_url) as client, contextlib.ExitStack() as stack:
        client.flushall()
        stack.callback(client.flushall)
        stack.callback(kombu.pools.reset)  # all apps have them in common

        def start(
            name: str, backend: str, conf: Mapping[str, Any], apart: bool = False, python: str = sys.executable
        ) -> Worker:
            if name not in running:
                broker = urlsplit(redis_url)._replace(path=f"/{len(running) + 1}").geturl()
                output = folder / f"worker-{len(running)}"
                running[name] = stack.enter_context(celery_worker(broker, backend, conf, output, apart, python))
            return running[name]

        yield start


def close(app: Celery) -> None:
    """And its connections with it, which Celery leaves to the garbage collector."""
    backend = app.backend
    if isinstance(backend, AsyncBackendMixin):
        consumer = backend.result_consumer
        consumer.subscribed_to.clear()  # or a result that is dropped later unsubscribes from a server that may be gone
        consumer.stop()
        client = backend.client
        if isinstance(client, redis.RedisCluster):
            client.close()
        else:
            client.connection_pool.disconnect()
    app.close()


@contextlib.contextmanager
def app_with(backend: str, **conf: Any) -> Iterator[Celery]:
    app = make_app(None, backend, **conf)
    try:
        yield app
    finally:
        close(app)


async def both(theirs: Any, ours: ResultBase) -> tuple[Any, Any]:
    """What Celery's ``get`` returns or raises, and what ``await`` does."""

    async def awaited() -> Any:
        async with asyncio.timeout(GUARD):
            value = await ours
        assert not isinstance(value, Exception), "it was returned, not raised"
        return value

    # The interval counts only where Celery polls.
    get = partial(theirs.get, timeout=GUARD, interval=0.05)
    got = await asyncio.gather(asyncio.to_thread(get), awaited(), return_exceptions=True)
    return got[0], got[1]


async def reaches(result: AsyncResult[Any], state: str) -> None:
    async def there() -> bool:
        return await result.state() == state

    await until(there)


def same_exception(theirs: object, ours: object) -> bool:
    assert isinstance(theirs, Exception)
    assert isinstance(ours, Exception)
    return (type(theirs), theirs.args, str(theirs)) == (type(ours), ours.args, str(ours))
