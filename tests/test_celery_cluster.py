"""Celery 5.7's workers on a Redis Cluster, with the result backend that Celery lacks and this library has."""

from __future__ import annotations

import asyncio
import itertools
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any
from uuid import uuid4

import celery.exceptions
import pytest
import redis
from celery import Celery, chain, chord
from celery.app.task import Context
from celery.backends.base import COMPRESSED_PAYLOAD_MAGIC, decompress_payload
from celery.exceptions import ChordError as CeleryChordError
from celery.result import GroupResult as CeleryGroupResult
from redis.exceptions import ClusterDownError, RedisClusterException, TryAgainError

import aioresult
from aioresult import Backend, ChordError, GroupResult, states
from aioresult.backends.redis.blocking import ClusterClient
from aioresult.backends.redis.connection import Command
from aioresult.celery import TaskOutput, backend_from_app, dispatch, output, result_from_celery
from aioresult.celery_cluster import ClusterBackend

from .celery_app import make_app
from .celery_suite import Interoperability
from .celery_worker import GUARD, StartWorker, Worker, app_with, celery_workers
from .cluster_servers import RedisCluster, redis_cluster, slot_of
from .harness import until
from .test_celery_redis import let_go_on, told
from .test_chord_beside_celery import Site, header, nested, ours, part, theirs

pytestmark = [pytest.mark.xdist_group("celery-cluster"), pytest.mark.timeout(60)]

CLASS = "aioresult.celery:ClusterBackend+"
CONF = {
    "result_extended": True,
    "result_expires": 1234,
    "result_failure_expires": 60,
    "result_compression": "gzip",
    "result_backend_transport_options": {"global_keyprefix": "shop"},
}


@pytest.fixture(scope="module")
def start_worker(shared_redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartWorker]:
    with celery_workers(shared_redis_url, tmp_path_factory.mktemp("celery")) as start:
        yield start


@pytest.fixture
def worker(start_worker: StartWorker, own_cluster: RedisCluster) -> Iterator[Worker]:
    worker = start_worker("cluster", CLASS + own_cluster.url, CONF)
    worker.check()
    yield worker
    worker.check()


@pytest.fixture
async def backend(worker: Worker) -> AsyncIterator[Backend]:
    async with backend_from_app(worker.app) as backend:
        yield backend


class StoredInCluster:
    def __init__(self, app: Celery) -> None:
        self._celerys = app.backend

    async def task(self, task_id: str) -> tuple[bool, bytes]:
        data = self._celerys.get(self._celerys.get_key_for_task(task_id))
        return data.startswith(COMPRESSED_PAYLOAD_MAGIC), re.sub(
            rb'"date_done": "[^"]+"', b"", decompress_payload(data)
        )

    async def group(self, group_id: str) -> bytes:
        stored: bytes = self._celerys.get(self._celerys.get_key_for_group(group_id))
        return stored


@pytest.fixture
def stored(worker: Worker) -> StoredInCluster:
    return StoredInCluster(worker.app)


class TestOnCluster(Interoperability):
    pass


# -- with a worker --------------------------------------------------------------------------------------------------


def is_channel(cluster: RedisCluster, key: str) -> bool:
    """Whether it has a subscriber."""
    return any(key in node.ask("PUBSUB", "SHARDCHANNELS") for node in cluster.up())


async def test_a_message_wakes_the_waiter(worker: Worker, own_cluster: RedisCluster) -> None:
    async with backend_from_app(worker.app, heartbeat=1000) as backend:
        gate = str(uuid4())
        sent = worker.call("gated", gate)
        key = worker.app.backend.get_key_for_task(sent.id).decode()
        waiting = asyncio.create_task(backend.result(sent.id).get(timeout=GUARD))
        await until(lambda: is_channel(own_cluster, key))
        worker.open(gate, "open")
        assert await waiting == "open"


async def test_chains_and_chords_in_each_other(worker: Worker, backend: Backend) -> None:
    s = worker.signature
    inner = chord([s("add", 1), s("add", 2)], s("total"))
    sent = chord([chain(s("add", 1, 2), inner), s("echo", 7)])(s("echo"))
    assert await backend.result(sent.id).get(timeout=GUARD) == [9, 7]
    failing = chain(chord([s("fail", "custom"), s("add", 1, 1)], s("total")), s("echo")).apply_async()
    with pytest.raises(ChordError, match="4242"):
        await backend.result(failing.parent.id).get(timeout=GUARD)
    with pytest.raises(CeleryChordError, match="4242"):
        await asyncio.to_thread(failing.parent.get, timeout=GUARD, interval=0.02, follow_parents=False)


async def test_a_chord_of_many_parts_on_four_threads(worker: Worker, backend: Backend) -> None:
    sent = [
        chord([worker.signature("echo", number) for number in range(size)])(worker.signature("echo"))
        for size in (1, 2, *[30] * 8)
    ]
    for each in sent:
        result = result_from_celery(each, backend)
        size = len(each.parent.results)
        assert await result.get(timeout=GUARD) == list(range(size))
        handle = backend.chord(each.parent.id)
        assert await handle.get(timeout=GUARD) == list(range(size))  # its parts are kept
        assert await handle.claim() is None
    assert await backend.active_chords() == []


async def test_a_celery_task_is_followed_as_it_runs(worker: Worker, backend: Backend) -> None:
    gate = str(uuid4())
    sent = await asyncio.to_thread(worker.call, "talk", ["to", "be", "or not"], gate)
    result = backend.result(sent.id)
    async with asyncio.timeout(GUARD), result.stream() as stream, result.updates() as updates:
        assert [await anext(stream), await anext(stream)] == ["to", "be"]
        progress = [meta.result async for meta in updates if let_go_on(meta, worker, gate)]
        assert progress == [{"words": 2}]
        assert [chunk async for chunk in stream] == ["or not"]
    assert await told(result) == ["to", "be", "or not"]
    assert (await result.read_output()).ended


async def test_celerys_get_reads_until_it_is_there(worker: Worker, backend: Backend) -> None:
    result = worker.app.AsyncResult(str(uuid4()))
    with pytest.raises(celery.exceptions.TimeoutError):
        await asyncio.to_thread(result.get, timeout=0.01)
    looks: list[int] = []
    getting = asyncio.create_task(
        asyncio.to_thread(result.get, timeout=GUARD, interval=0.01, on_interval=lambda: looks.append(1))
    )
    await until(lambda: bool(looks))
    await backend.mark_as_done(result.id, "there")
    assert await getting == "there"
    result.forget()
    assert not await backend.exists(result.id)
    assert worker.app.AsyncResult(result.id).state == states.PENDING


def test_parents_are_looked_at_after_a_failure(worker: Worker) -> None:
    """A parent and its child may both fail between two looks. Celery raises what the parent did."""
    looks: list[int] = []
    worker.app.backend.mark_as_failure(task_id := str(uuid4()), ValueError())
    worker.app.backend.wait_for(task_id, on_interval=lambda: looks.append(1))
    assert looks == [1]


async def test_results_groups_and_failures_expire_as_celery_is_told(worker: Worker, backend: Backend) -> None:
    celerys, client = worker.app.backend, worker.app.backend.client
    done, failed, group_id = (str(uuid4()) for _ in range(3))
    CeleryGroupResult(group_id, [worker.app.AsyncResult(done)]).save(celerys)
    celerys.mark_as_done(done, 1)
    celerys.mark_as_failure(failed, ValueError())
    for key in (celerys.get_key_for_task(done), celerys.get_key_for_group(group_id)):
        assert 1234 - GUARD < client.ttl(key) <= 1234
    assert client.ttl(celerys.get_key_for_task(failed)) <= 60
    CeleryGroupResult.restore(group_id, backend=celerys, app=worker.app).delete()
    assert await GroupResult.restore(group_id, backend) is None


async def test_members_that_celery_runs_are_counted(worker: Worker, backend: Backend) -> None:
    ids = [str(uuid4()) for _ in range(3)]
    saved = backend.group(ids)
    await saved.save()
    worker.app.backend.mark_as_done(ids[0], 1, Context(id=ids[0], group=saved.id, group_index=0))
    worker.app.backend.mark_as_failure(ids[1], ValueError(), request=Context(id=ids[1], group=saved.id, group_index=1))
    assert await backend.group_counts(saved.id) == (1, 1)


# -- chords without a worker ----------------------------------------------------------------------------------------


@pytest.fixture
def new_site(start_worker: StartWorker, cluster_url: str) -> Iterator[Callable[..., Site]]:
    """Kombu's pools are one for all apps: they are reset when the worker has ended."""
    sites: list[Site] = []

    def make(**conf: Any) -> Site:
        sites.append(Site(CLASS + cluster_url, **conf))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


@pytest.mark.parametrize(
    "conf",
    [
        {},
        {"result_backend_transport_options": {"result_chord_ordered": False}},
        {"result_serializer": "pickle", "accept_content": ["pickle", "json"]},
        {"result_compression": "gzip"},
    ],
    ids=["ordered", "not ordered", "pickled", "compressed"],
)
async def test_a_chord_goes_the_same_way_whoever_runs_what(new_site: Callable[..., Site], conf: dict[str, Any]) -> None:
    """A frozen chord of two parts is sent three times: at last, a part fails."""
    site = new_site(**conf)
    ordered = "result_backend_transport_options" not in conf
    async with site.backend(heartbeat=1000) as backend:
        for we in itertools.product([True, False], repeat=2):
            frozen = chord(header(site, 2), site.s("echo").on_error(site.s("total")))
            frozen.freeze()
            for number in range(3):
                sent = frozen.apply_async()
                first, second = site.requests()
                handle = backend.chord(first.group)
                waiting = asyncio.ensure_future(handle.get(timeout=GUARD))
                await part(site, backend, we[1], second, f"second of {number}")
                await part(site, backend, we[1], second, f"second of {number}")  # counts once
                await part(site, backend, we[0], first, ValueError("no") if number == 2 else f"first of {number}")
                expected = [f"first of {number}", f"second of {number}"]
                expected = expected if ordered else expected[::-1]
                if number < 2:
                    assert await waiting == expected
                    await until(partial(finished, site, first))
                    assert [args for name, args in site.sent() if name == "echo"] == [[expected]]
                    assert site.app.backend.get_state(sent.id) == states.PENDING
                else:
                    with pytest.raises(ChordError, match="no"):
                        await waiting
                    with pytest.raises((ChordError, CeleryChordError), match="no"):
                        await backend.result(sent.id).get(timeout=GUARD)
                    assert [name for name, _ in site.sent()] == ["total"]
                assert await handle.progress() == (2, 2)


def finished(site: Site, request: Context) -> bool:
    return bool(site.redis.get(site.key(request, ".c")) == b"done")


@pytest.mark.parametrize("we", [True, False], ids=["ours", "Celery's"])
async def test_a_part_that_fails_is_told_at_once(
    new_site: Callable[..., Site], own_cluster: RedisCluster, we: bool
) -> None:
    site = new_site()
    async with site.backend(heartbeat=1000) as backend:
        chord(header(site, 2))(site.s("echo"))
        first, _ = site.requests()
        waiting = asyncio.ensure_future(backend.chord(first.group).get(timeout=GUARD))
        await until(lambda: is_channel(own_cluster, site.key(first)))
        await part(site, backend, we, first, ValueError("no"))
        with pytest.raises(ChordError, match=first.id):
            await waiting


async def test_nested_groups_keep_their_shape(new_site: Callable[..., Site]) -> None:
    site = new_site()
    async with site.backend(heartbeat=1000) as backend:
        for we_last in (True, False):
            requests = nested(site)
            handle = backend.chord(requests[0].group)
            theirs(site, requests[0], 0)
            await ours(backend, requests[1], 1)
            await part(site, backend, we_last, requests[2], 2)
            assert await handle.get(timeout=GUARD) == [[0, 1], 2]
            assert site.sent() == [("echo", [[[0, 1], 2]])]


async def test_a_task_that_is_replaced_by_a_group_adds_to_its_chord(new_site: Callable[..., Site]) -> None:
    """Celery counts its parts in ``add_to_chord`` before it sends them."""
    site = new_site()
    async with site.backend(heartbeat=1000) as backend:
        chord(header(site, 1))(site.s("echo"))
        (first,) = site.requests()
        site.app.backend.add_to_chord(first.group, None)
        theirs(site, first, 1)
        assert await backend.chord(first.group).progress() == (1, 2)
        theirs(site, Context(vars(first), id="second", group_index=1), 2)
        assert site.sent() == [("echo", [[1, 2]])]


async def test_a_chord_lives_as_celery_is_told(new_site: Callable[..., Site]) -> None:
    site = new_site(result_expires=100, result_chord_expires=3600)
    first, *_ = nested(site)
    theirs(site, first, 1)
    for suffix in (".j", ".s", ".d", ".a", ""):
        left = site.ttl(first, suffix)
        assert left is not None
        assert 3590 < left <= 3600


async def test_a_worker_that_dies_with_the_claim_is_stood_in_for(
    new_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a service that starts later. Here the worker ends at the moment at which it would send the callback."""
    site = new_site()
    chord(header(site, 1))(site.s("echo"))
    (first,) = site.requests()

    def die(*args: object) -> None:
        raise SystemExit

    monkeypatch.setattr(site.app.amqp, "_retry_publish", die)
    with pytest.raises(SystemExit):
        theirs(site, first, 1)
    site.redis.delete(site.key(first, ".c"))  # the lease has run out
    async with backend_from_app(site.app) as backend, asyncio.timeout(GUARD):
        async for ready in backend.ready_chords():
            async with ready:
                await dispatch(ready, site.app)
            break
    assert site.sent() == [("echo", [[1]])]


@pytest.mark.parametrize("group_id", ["a}b", "{}"])
async def test_a_chord_that_no_slot_holds_is_refused_by_name(new_site: Callable[..., Site], group_id: str) -> None:
    with pytest.raises(celery.exceptions.BackendStoreError, match="brace '}' but no hash tag"):
        new_site().app.backend.set_chord_size(group_id, 1)


# -- the cluster ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    """For the tests that change it. All nodes have a password."""
    with redis_cluster(password="s3cr3t") as cluster:
        yield cluster


async def test_through_a_migration_that_is_held_and_a_failover(cluster: RedisCluster) -> None:
    app = make_app(None, CLASS + cluster.url)
    celerys = app.backend
    assert "s3cr3t" not in celerys.as_uri()
    source, target, _ = cluster.masters()
    moved, later, other = cluster.ids_on(source, 1) + cluster.ids_on(source, 1, "later") + cluster.ids_on(target, 1)
    async with backend_from_app(app, heartbeat=1000) as backend:
        celerys.mark_as_started(moved)
        waiting = {
            task_id: asyncio.create_task(backend.result(task_id).get(timeout=GUARD)) for task_id in (moved, other)
        }
        await until(lambda: cluster.shard_channels() == 2)

        # The source sends stores to the target, and the waiter has subscribed at the source.
        slot = slot_of(moved)
        await asyncio.to_thread(cluster.begin_migration, slot, target)
        await asyncio.to_thread(cluster.move_keys, slot, target)
        del celerys.client.nodes_manager.nodes_cache["{}:{}".format(*target.address)]  # as if it were new
        await asyncio.to_thread(celerys.mark_as_done, moved, "moved")
        assert await waiting[moved] == "moved"
        assert celerys.mget([celerys.get_key_for_task(moved)]) == [celerys.get(celerys.get_key_for_task(moved))]
        await asyncio.to_thread(cluster.end_migration, slot, target)
        assert celerys.get_result(moved) == "moved"
        out = TaskOutput(celerys, moved)
        out.send("a")
        out.send("b")
        out.close()
        assert await told(backend.result(moved)) == ["a", "b"]

        # Its replica takes over, and knows no scripts.
        for node in cluster.up():
            node.ask("SCRIPT", "FLUSH")
        target.kill()
        await asyncio.to_thread(celerys.mark_as_done, other, "other")
        assert await waiting[other] == "other"
        await asyncio.to_thread(celerys.mark_as_done, later, "later")
        assert await backend.result(later).get(timeout=GUARD) == "later"
    celerys.client.close()


def test_an_operation_is_repeated_while_the_cluster_is_not_ready(
    own_cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = {"interval_start": 0, "interval_step": 0, "interval_max": 0, "max_retries": 5}
    conf = {"result_backend_transport_options": {"retry_policy": again}}
    with app_with(CLASS + own_cluster.url, **conf) as app:
        clients = {id(app.backend.client): app.backend.client}
        errors = [RedisClusterException("no node answers"), ClusterDownError("CLUSTERDOWN"), TryAgainError()]
        run = ClusterClient.run

        def fails_first(self: ClusterClient, command: Command) -> Any:
            clients[id(self)] = self
            if errors:
                raise errors.pop(0)
            return run(self, command)

        monkeypatch.setattr(ClusterClient, "run", fails_first)
        app.backend.mark_as_done(task_id := str(uuid4()), "stored")
        assert not errors
        assert app.backend.get_result(task_id) == "stored"
        assert len(clients) == 2  # the nodes may all be others, so it asked those of the URL again
        for client in clients.values():
            client.close()


async def test_the_addresses_are_replaced_for_both(own_cluster: RedisCluster) -> None:
    """The URL and the nodes name addresses that only ``address_remap`` makes right."""
    ports = {node.port: node.port + 1 for node in own_cluster.nodes}
    remap = {f"127.0.0.1:{port}": f"localhost:{port}" for port in ports}
    conf = {"result_backend_transport_options": {"address_remap": remap}}
    with app_with(CLASS + own_cluster.url, **conf) as app:
        nodes = {node.host for node in app.backend.client.get_nodes()}
        assert nodes == {"127.0.0.1"}  # redis-py looks a localhost up
        assert vars(backend_from_app(app))["_remap"](("127.0.0.1", own_cluster.nodes[0].port))[0] == "localhost"


async def test_nothing_is_stored_without_its_message(own_cluster: RedisCluster) -> None:
    for node in own_cluster.masters():
        node.ask("ACL", "SETUSER", "mute", "on", ">pw", "~*", "+@all", "resetchannels")
    try:
        host, port = own_cluster.nodes[0].address
        with app_with(f"{CLASS}redis+cluster://mute:pw@{host}:{port}") as app:
            with pytest.raises(celery.exceptions.BackendStoreError, match="ACL SETUSER"):
                app.backend.mark_as_done(task_id := str(uuid4()), 1)
            assert app.backend.get(app.backend.get_key_for_task(task_id)) is None
    finally:
        for node in own_cluster.masters():
            node.ask("ACL", "DELUSER", "mute")


async def test_a_blocking_producer_repeats_and_is_superseded(worker: Worker) -> None:
    task_id = str(uuid4())
    out = TaskOutput(worker.app.backend, task_id, aioresult.Keep(chunks=2))
    out.send("a", "b")
    out.send("c")
    out._sent = 2  # as after a reply that was lost
    out.send("c")
    newer = TaskOutput(worker.app.backend, task_id)
    newer.send("z")
    with pytest.raises(aioresult.OutputSuperseded):
        out.send("d")
    newer.close()
    client = worker.app.backend.client
    assert 1234 - GUARD < client.ttl(f"{{shop_celery-task-meta-{task_id}}}.out") <= 1234
    client.set("{shop_celery-task-meta-x}.out", "no log")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        TaskOutput(worker.app.backend, "x").send(1)


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", [f"{CLASS}redis+cluster://h1,h2:7", f"{CLASS.replace(':', '.')}redis+cluster://h1,h2:7"]
)
def test_both_sides_read_the_same_settings(url: str) -> None:
    conf = {"redis_password": "pw", "redis_client_name": "web", "redis_backend_use_ssl": {"ssl_ca_certs": "/ca"}}
    app = make_app(None, url, redis_socket_timeout=7, result_expires=60, **conf)
    assert isinstance(app.backend, ClusterBackend)
    params = app.backend.connparams
    assert params.pop("remap")(("h", 1)) == ("h", 1)
    for name in ("driver_info", "lib_name", "lib_version"):
        params.pop(name, None)
    place = vars(backend_from_app(app))["_place"]
    assert place.start == params.pop("start") == (("h1", 6379), ("h2", 7))
    assert params.pop("socket_timeout") == 7
    assert params.pop("ssl")
    assert params == place.options
    assert app.backend.as_uri() == "redis+cluster://h1,h2:7"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (CLASS.removesuffix("+"), "needs the URL of a cluster after the class"),
        (f"{CLASS}redis://h", "needs the URL of a cluster after the class"),
        (f"{CLASS}redis+cluster://h/1", "a cluster has one database"),
        (f"{CLASS}rediss+cluster://h?ssl_ciphers=x", "does not take ssl_ciphers"),
    ],
)
def test_what_is_not_for_a_cluster_is_refused_by_name(url: str, told: str) -> None:
    with pytest.raises(aioresult.ImproperlyConfigured, match=told):
        _ = make_app(None, url).backend


def test_a_single_server_is_refused_by_name(shared_redis_url: str) -> None:
    app = make_app(None, f"{CLASS}{shared_redis_url.replace('redis:', 'redis+cluster:')}")
    with pytest.raises(aioresult.ImproperlyConfigured, match="no Redis Cluster; write redis://"):
        app.backend.mark_as_done("a", 1)


def test_redis_is_imported_when_the_class_is_used() -> None:
    code = (
        "import sys, aioresult.celery\n"
        "before = 'redis' in sys.modules\n"
        "print(before, aioresult.celery.ClusterBackend.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "ClusterBackend"]
    with pytest.raises(AttributeError, match="has no attribute 'Cluster'"):
        _ = aioresult.celery.Cluster


def test_output_needs_redis_or_a_cluster() -> None:
    with app_with("cache+memory://") as app, pytest.raises(aioresult.ImproperlyConfigured, match="ClusterBackend"):
        output(app.tasks["talk"])
