"""Both ways between Celery 5.7 and this library: a real worker, a real Redis, and Celery's own readers as the judge."""

from __future__ import annotations

import asyncio
import json
import operator
import re
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import celery.exceptions
import pytest
import redis
import redis.asyncio
import trustme
from celery import Celery, chain, group
from celery.backends.base import COMPRESSED_PAYLOAD_MAGIC, decompress_payload
from celery.result import AsyncResult as CeleryAsyncResult
from celery.result import GroupResult as CeleryGroupResult

import aioresult
from aioresult import AsyncResult, Backend, EagerResult, states
from aioresult.celery import TaskOutput, backend_from_app, output, result_from_celery, revoke
from aioresult.serialization import Codec

from .celery_app import make_app
from .celery_suite import STORES, Interoperability, celery_request
from .celery_worker import GUARD, StartWorker, Worker, app_with, celery_workers, reaches
from .harness import until
from .servers import RedisServer, TcpProxy

pytestmark = [
    pytest.mark.xdist_group("celery-redis"),
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:Call to deprecated setex"),  # Celery 5.7 on redis-py 8
]


CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = {
    "defaults": {},
    "everything": {
        "result_extended": True,
        "result_expires": 1234,
        "result_compression": "gzip",
        "result_backend_transport_options": {"global_keyprefix": "shop"},
        "timezone": "Asia/Tokyo",
    },
}


@pytest.fixture(scope="module")
def start_worker(shared_redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartWorker]:
    with celery_workers(shared_redis_url, tmp_path_factory.mktemp("celery")) as start:
        yield start


@pytest.fixture(params=CONFIGURATIONS)
def worker(request: pytest.FixtureRequest, start_worker: StartWorker, shared_redis_url: str) -> Iterator[Worker]:
    worker = start_worker(request.param, shared_redis_url, CONFIGURATIONS[request.param])
    worker.check()
    yield worker
    worker.check()


@pytest.fixture
async def backend(worker: Worker) -> AsyncIterator[Backend]:
    async with backend_from_app(worker.app) as backend:
        yield backend


@pytest.fixture
async def client(shared_redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis.from_url(shared_redis_url) as client:
        yield client


async def subscribed(client: redis.asyncio.Redis, channel: str) -> None:
    async def there() -> bool:
        return bool((await client.pubsub_numsub(channel))[0][1])

    await until(there)


async def stored_bytes(client: redis.asyncio.Redis, key: str | bytes) -> bytes:
    value = await client.get(key)
    assert isinstance(value, bytes)
    return value


def key_of(worker: Worker, task_id: str) -> str:
    """Where Celery keeps the result, and the channel that it publishes it on."""
    return str(worker.app.backend.get_key_for_task(task_id).decode())


class StoredInRedis:
    def __init__(self, app: Celery, client: redis.asyncio.Redis) -> None:
        self._keys = app.backend
        self._client = client

    async def task(self, task_id: str) -> tuple[bool, bytes]:
        data = await stored_bytes(self._client, self._keys.get_key_for_task(task_id))
        without_date = re.sub(rb'"date_done": "[^"]+"', b"", decompress_payload(data))
        return data.startswith(COMPRESSED_PAYLOAD_MAGIC), without_date

    async def group(self, group_id: str) -> bytes:
        return await stored_bytes(self._client, self._keys.get_key_for_group(group_id))


@pytest.fixture
def stored(worker: Worker, client: redis.asyncio.Redis) -> StoredInRedis:
    return StoredInRedis(worker.app, client)


class TestOnRedis(Interoperability):
    pass


@pytest.mark.parametrize(("progress", "state"), [(None, states.STARTED), ({"done": 3}, "PROGRESS")])
async def test_waiter_is_subscribed_before_the_store_and_woken_by_it(
    worker: Worker, backend: Backend, client: redis.asyncio.Redis, progress: Any, state: str
) -> None:
    gate = str(uuid4())
    sent = worker.call("gated", gate, progress)
    result = backend.result(sent.id)
    waiting = asyncio.create_task(result.get(timeout=GUARD))
    await subscribed(client, key_of(worker, sent.id))
    await reaches(result, state)
    assert (sent.state, sent.result) == (state, (await result.fetch()).result)
    assert not waiting.done()
    worker.open(gate, "open")
    assert await waiting == "open"


async def test_a_result_names_its_parent_and_its_group(worker: Worker, backend: Backend) -> None:
    add = worker.app.tasks["add"].s
    chained, grouped = chain(add(1, 2), add(3))(), group([add(1, 1)]).apply_async()
    assert (await backend.wait_for(chained.id, GUARD)).parent_id == chained.parent.id
    assert (await backend.wait_for(grouped.results[0].id, GUARD)).group_id == grouped.id


def test_date_that_no_time_zone_can_hold_is_a_decode_error() -> None:
    with pytest.raises(aioresult.DecodeError, match="OverflowError"):
        Codec().decode("task", b'{"status": "SUCCESS", "date_done": "0001-01-01T00:00:00+09:00"}')


def test_a_chain_that_is_longer_than_the_stack() -> None:
    app = make_app(None, "redis://localhost")
    result = None
    for number in range(1_200):
        result = CeleryAsyncResult(f"t{number}", app=app, parent=result)
    handle = result_from_celery(result, aioresult.connect("memory://"))
    assert isinstance(handle, AsyncResult)
    assert handle.as_list() == [f"t{number}" for number in reversed(range(1_200))]


async def test_failures_expire_by_a_setting_of_their_own(worker: Worker, client: redis.asyncio.Redis) -> None:
    conf = {"result_expires": 3600, "result_failure_expires": 60}
    async with backend_from_app(make_app(None, worker.backend, **conf)) as backend:
        await backend.mark_as_done("fine", 1)
        await backend.mark_as_failure("failed", ValueError())
        await backend.mark_as_failure("kept", ValueError(), expires=600)
    assert await client.ttl("celery-task-meta-fine") > 600
    assert await client.ttl("celery-task-meta-failed") <= 60
    assert 60 < await client.ttl("celery-task-meta-kept") <= 600


def test_eager_results_are_kept() -> None:
    app = make_app(None, None, task_always_eager=True)
    backend = aioresult.connect("memory://")
    sent = chain(app.tasks["add"].s(1, 2), app.tasks["add"].s(3))()
    result = result_from_celery(sent, backend)
    assert isinstance(result, EagerResult)
    assert result.value() == sent.get() == 6
    assert result.as_tuple() == sent.as_tuple()


@pytest.mark.parametrize("result", ["id", None, ("id", None)])
def test_only_celerys_results_are_taken(result: Any) -> None:
    with pytest.raises(aioresult.UsageError, match="not a result of Celery's"):
        result_from_celery(result, aioresult.connect("memory://"))


@pytest.mark.parametrize("store", ["done", "failure: custom", "revoked"])
async def test_celerys_get_that_listens_is_woken(
    worker: Worker, backend: Backend, client: redis.asyncio.Redis, store: str
) -> None:
    method, args = STORES[store]
    sent = worker.app.AsyncResult(str(uuid4()))
    heard: list[dict[str, Any]] = []

    def hear(meta: dict[str, Any]) -> None:  # what comes over the channel, not what Celery reads at first
        if meta["task_id"] == sent.id:
            heard.append(meta)

    getting = asyncio.create_task(asyncio.to_thread(sent.get, timeout=GUARD, propagate=False, on_message=hear))
    await subscribed(client, key_of(worker, sent.id))

    async def listens() -> bool:
        await backend.mark_as_started(sent.id, pid=7)
        return bool(heard)

    await until(listens)
    await getattr(backend, method)(sent.id, *args)
    got, ours = await getting, await backend.result(sent.id).get(propagate=False)
    assert heard[0]["result"] == {"pid": 7}
    assert heard[-1]["status"] == sent.state
    assert (type(got).__name__, str(got)) == (type(ours).__name__, str(ours))


async def test_both_keep_results_and_groups_for_the_same_time(
    worker: Worker, backend: Backend, client: redis.asyncio.Redis
) -> None:
    their_group, their_task, our_group, our_task = (str(uuid4()) for _ in range(4))
    CeleryGroupResult(their_group, [worker.app.AsyncResult(their_task)]).save(worker.app.backend)
    worker.app.backend.mark_as_done(their_task, 1)
    await backend.save_group(our_group, backend.group([our_task]))
    await backend.mark_as_done(our_task, 1)
    group_keys = [worker.app.backend.get_key_for_group(group_id) for group_id in (their_group, our_group)]
    for name in (key_of(worker, their_task), key_of(worker, our_task), *group_keys):
        assert backend.expires - GUARD < await client.ttl(name) <= backend.expires


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "lzma", "zstd"])
async def test_compression_both_ways(shared_redis_url: str, client: redis.asyncio.Redis, compression: str) -> None:
    with app_with(shared_redis_url, result_compression=compression) as app:
        async with backend_from_app(app) as backend:
            theirs, ours = (app.AsyncResult(str(uuid4())) for _ in range(2))
            app.backend.mark_as_done(theirs.id, "theirs" * 999)
            await backend.mark_as_done(ours.id, "ours" * 999)
            heads = [
                (await stored_bytes(client, app.backend.get_key_for_task(each.id))).split(b"\0")[:3]
                for each in (theirs, ours)
            ]
            assert heads[0] == heads[1]  # the marker, and the name of the compression
            assert heads[0][1] == b"celery-compressed"
            assert await backend.result(theirs.id) == "theirs" * 999
            assert ours.get(timeout=GUARD) == "ours" * 999


# -- the settings of an app -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conf", "attribute", "value"),
    [
        ({}, "expires", 86400.0),
        ({"result_expires": timedelta(hours=1)}, "expires", 3600.0),
        ({"result_expires": 60}, "expires", 60.0),
        ({"result_expires": None}, "expires", 0.0),
        ({}, "extended", False),
        ({"result_extended": True}, "extended", True),
        ({}, "codec.serializer", "json"),
        ({"result_serializer": "pickle", "accept_content": ["pickle"]}, "codec.serializer", "pickle"),
        ({}, "codec.accept", {"json"}),
        (
            {"accept_content": ["application/json", "application/x-python-serialize", "yaml"]},
            "codec.accept",
            {"json", "pickle"},
        ),
        ({"accept_content": ["json", "pickle"], "result_accept_content": ["json"]}, "codec.accept", {"json"}),
        ({}, "codec.compression", None),
        ({"result_compression": "bzip2"}, "codec.compression", "application/x-bz2"),
        ({"result_backend": "redis://:secret@there:1/2"}, "as_uri", "redis://:**@there:1/2"),
    ],
)
def test_a_setting_is_taken_over(conf: Mapping[str, Any], attribute: str, value: Any) -> None:
    backend = backend_from_app(make_app(None, "redis://", **conf))
    found = operator.attrgetter(attribute)(backend)
    assert (found() if callable(found) else found) == value


async def test_options_go_before_the_settings(worker: Worker, client: redis.asyncio.Redis) -> None:
    options: dict[str, Any] = {"expires": 60, "extended": False, "compression": None, "global_keyprefix": "mine."}
    async with backend_from_app(worker.app, **options) as backend:
        request = celery_request(worker.app, task_id := str(uuid4()))
        await backend.mark_as_done(task_id, 1, request=request)
    key = f"mine.celery-task-meta-{task_id}"
    assert 60 - GUARD < await client.ttl(key) <= 60
    assert "worker" not in json.loads(await stored_bytes(client, key))


def test_url_given_to_the_class_of_the_app() -> None:
    class Service(Celery):  # type: ignore[misc] # Celery has no annotations
        backend_cls = "redis://there/2"

    assert backend_from_app(Service("service")).as_uri() == "redis://there/2"


@pytest.mark.parametrize(
    "url", ["redis://localhost:{}/0", "rediss://localhost:{}/0", "rediss://localhost:{}/0?ssl_cert_reqs=required"]
)
@pytest.mark.parametrize("requirement", [ssl.CERT_REQUIRED, "CERT_REQUIRED", "required"])
async def test_tls_settings(own_redis: RedisServer, tmp_path: Path, url: str, requirement: Any) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca")
    certificate = ca.issue_cert("client")
    certificate.private_key_pem.write_to_path(tmp_path / "key")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "certificate")
    settings = {
        "ssl_cert_reqs": requirement,
        "ssl_ca_certs": str(tmp_path / "ca"),
        "ssl_keyfile": str(tmp_path / "key"),
        "ssl_certfile": str(tmp_path / "certificate"),
        "ssl_ca_data": None,
    }
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    ca.issue_cert("localhost").configure_cert(context)
    ca.configure_trust(context)
    async with TcpProxy(own_redis.port, tls=context) as front:
        with app_with(url.format(front.port), redis_backend_use_ssl=settings) as app:
            task_id = str(uuid4())
            await asyncio.to_thread(app.backend.mark_as_done, task_id, "over TLS")
            async with backend_from_app(app) as backend:
                assert await backend.result(task_id).get(timeout=GUARD) == "over TLS"


def test_tls_is_not_switched_on_by_empty_settings() -> None:
    app = make_app(None, "redis://there/2", redis_backend_use_ssl={})
    assert backend_from_app(app).as_uri() == "redis://there/2"


@pytest.mark.parametrize(
    ("url", "conf", "message"),
    [
        (None, {}, "'tests' has no result backend; set result_backend"),
        ("disabled://", {}, "'tests' has no result backend; set result_backend"),
        ("rpc://", {}, "Celery has a backend of that name; aioresult has none"),
        ("redis://", {"result_serializer": "yaml", "accept_content": ["yaml"]}, "unknown serializer 'yaml'"),
        ("redis://", {"result_compression": "brotli"}, "unknown compression 'brotli'"),
        # The app writes what it does not read; neither do we, for reading a pickle is running it.
        ("redis://", {"result_serializer": "pickle"}, "'pickle' is not in accept"),
    ],
)
def test_an_app_whose_results_cannot_be_had(url: str | None, conf: Mapping[str, Any], message: str) -> None:
    with pytest.raises(aioresult.ImproperlyConfigured, match=message):
        backend_from_app(make_app(None, url, **conf))


# -- running tasks ---------------------------------------------------------------------------------------------------


async def told(result: AsyncResult[Any], **options: Any) -> list[Any]:
    async with asyncio.timeout(GUARD):
        return [chunk async for chunk in result.stream(**options)]


def let_go_on(meta: aioresult.TaskMeta, worker: Worker, gate: str) -> bool:
    """Open the gate once the progress is seen; whether it is that."""
    if meta.status == "PROGRESS":
        worker.open(gate, "go on")
    return meta.status == "PROGRESS"


async def test_a_celery_task_is_followed_as_it_runs(worker: Worker, backend: Backend) -> None:
    """And Celery's own waiter beside it does not notice."""
    gate = str(uuid4())
    theirs = await asyncio.to_thread(worker.call, "talk", ["to", "be", "or not"], gate)
    result = backend.result(theirs.id)
    waiting = asyncio.create_task(asyncio.to_thread(theirs.get, timeout=GUARD))
    async with asyncio.timeout(GUARD), result.stream() as stream, result.updates() as updates:
        assert [await anext(stream), await anext(stream)] == ["to", "be"]
        progress = [meta.result async for meta in updates if let_go_on(meta, worker, gate)]
        assert progress == [{"words": 2}]
        assert [chunk async for chunk in stream] == ["or not"]
        assert await result == await waiting == 3
    assert await told(result) == ["to", "be", "or not"]
    page = await result.read_output()
    assert page.ended
    assert await told(result, after=page.cursor) == []


async def test_a_celery_task_that_fails_in_the_middle(worker: Worker, backend: Backend) -> None:
    gate = str(uuid4())
    theirs = await asyncio.to_thread(worker.call, "talk", ["to", "be"], gate)
    worker.open(gate, "fail")
    async with asyncio.timeout(GUARD), backend.result(theirs.id).stream() as stream:
        assert await anext(stream) == "to"
        with pytest.raises(Exception, match="in the middle"):
            await anext(stream)


async def test_a_celery_task_that_is_retried_writes_its_output_anew(worker: Worker, backend: Backend) -> None:
    gate = str(uuid4())
    theirs = await asyncio.to_thread(worker.call, "talk", ["to", "be"], gate)
    async with asyncio.timeout(GUARD), backend.result(theirs.id).stream() as stream:
        assert await anext(stream) == "to"
        worker.open(gate, "retry")
        with pytest.raises(aioresult.OutputRestarted) as restarted:
            await anext(stream)
        worker.open(gate, "go on")
    assert await told(backend.result(theirs.id), after=restarted.value.cursor) == ["to", "be"]


async def test_a_revoke_reaches_celerys_workers(worker: Worker, backend: Backend) -> None:
    """The task waits in the queue: the worker drops it, and for its waiters it is over at once."""
    signature = worker.signature("echo", "never").set(countdown=3600)
    theirs = await asyncio.to_thread(signature.delay)
    result = backend.result(theirs.id)
    assert await revoke(result, worker.app, "not needed")
    with pytest.raises(aioresult.TaskRevokedError, match="not needed"):
        await result
    with pytest.raises(celery.exceptions.TaskRevokedError):
        await asyncio.to_thread(theirs.get, timeout=GUARD)

    async def dropped() -> bool:
        revoked = await asyncio.to_thread(worker.app.control.inspect(timeout=1).revoked)
        return any(theirs.id in ids for ids in (revoked or {}).values())

    await until(dropped)
    assert not await revoke(await finished(worker, backend), worker.app)


async def finished(worker: Worker, backend: Backend) -> AsyncResult[Any]:
    result = backend.result((await asyncio.to_thread(worker.call, "echo", 1)).id)
    await result
    return result


def test_the_output_of_a_celery_task_needs_redis() -> None:
    with app_with("cache+memory://") as app, pytest.raises(aioresult.ImproperlyConfigured, match="Redis"):
        output(app.tasks["talk"])


def test_a_blocking_producer_repeats_and_is_superseded(shared_redis_url: str) -> None:
    with app_with(shared_redis_url) as app:
        task_id = str(uuid4())
        out = TaskOutput(app.backend, task_id, aioresult.Keep(chunks=2))
        with pytest.raises(aioresult.EncodeError):
            out.send(object())
        out.send("a", "b")
        out._sent = 0  # as after a reply that was lost
        out.send("a", "b")
        out.send()
        out.send("c")
        newer = TaskOutput(app.backend, task_id)
        newer.send("z")
        with pytest.raises(aioresult.OutputSuperseded):
            out.send("d")
        newer.close()
        newer.close()
        with pytest.raises(aioresult.UsageError, match="closed"):
            newer.send("y")
        app.backend.client.set("celery-task-meta-x.out", "no log")
        app.backend.client.set("{celery-task-meta-x}.out", "no log")
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            TaskOutput(app.backend, "x").send(1)
