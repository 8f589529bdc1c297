"""The clusters and Sentinel set-ups of the tests do what they promise."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from .cluster_servers import (
    RedisCluster,
    SentinelSetup,
    redis_cluster,
    sentinel_setup,
    slot_of,
)
from .harness import ClusterHarness, SentinelHarness, until

pytestmark = pytest.mark.xdist_group("cluster servers")


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[RedisCluster]:
    with redis_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: RedisCluster) -> RedisCluster:
    shared_cluster.restore()
    shared_cluster.flush()
    return shared_cluster


@pytest.fixture(scope="module")
def shared_sentinel() -> Iterator[SentinelSetup]:
    with sentinel_setup(password="of the data", sentinel_password="of the sentinels") as setup:
        yield setup


@pytest.fixture
def setup(shared_sentinel: SentinelSetup) -> SentinelSetup:
    shared_sentinel.restore()
    shared_sentinel.flush()
    return shared_sentinel


def _key(task_id: str) -> str:
    return f"celery-task-meta-{task_id}"


def test_a_slot_that_is_held_has_its_keys_at_the_target_and_still_belongs_to_the_source(cluster: RedisCluster) -> None:
    source, target, other = cluster.masters()
    (task_id,) = cluster.ids_on(source, 1)
    slot, key = slot_of(task_id), _key(task_id)
    moved = threading.Event()
    end = threading.Event()

    def hold() -> bool:
        moved.set()
        return end.is_set()

    with source.client() as at_source, target.client() as at_target:
        at_source.set(key, b"\xff")
        migration = threading.Thread(target=cluster.migrate, args=(slot, target, hold))
        migration.start()
        try:
            assert moved.wait(30)
            with pytest.raises(redis.exceptions.AskError):
                at_source.get(key)
            with pytest.raises(redis.exceptions.MovedError):
                at_target.get(key)
            assert cluster.master_of(slot) is source
        finally:
            end.set()
            migration.join()
        assert at_target.get(key) == b"\xff"
    assert cluster.master_of(slot) is target
    with other.client() as client, pytest.raises(redis.exceptions.MovedError, match=str(target.port)):
        client.get(key)


def test_a_migration_can_be_left_unfinished_and_undone(cluster: RedisCluster) -> None:
    source, target, _ = cluster.masters()
    (task_id,) = cluster.ids_on(source, 1)
    slot, key = slot_of(task_id), _key(task_id)
    with source.client() as client:
        client.set(key, "value")
        assert cluster.begin_migration(slot, target) is source
        assert client.get(key) == b"value"
        assert cluster.move_keys(slot, target) == 1
        with pytest.raises(redis.exceptions.AskError):
            client.get(key)
        cluster.cancel_migration(slot, target)
        assert client.get(key) == b"value"
    assert cluster.master_of(slot) is source


def test_a_node_joins_takes_slots_and_leaves(cluster: RedisCluster) -> None:
    first = cluster.masters()[0]
    (task_id,) = cluster.ids_on(first, 1)
    slots = {*cluster.slots_of(first)[:20], slot_of(task_id)}
    with first.client() as client:
        client.set(_key(task_id), "value")
    node = cluster.add_node()
    cluster.migrate_all(slots, node)
    assert cluster.slots_of(node) == sorted(slots)
    with node.client() as client:
        assert client.get(_key(task_id)) == b"value"
    cluster.migrate_all(slots, first)
    cluster.remove_node(node)
    assert node.ask("CLUSTER", "SLOTS") == []
    assert [len(each.lines()) for each in cluster.nodes] == [6] * 6


def test_a_replica_takes_the_place_of_its_master_and_nothing_is_lost(cluster: RedisCluster) -> None:
    master = cluster.masters()[1]
    slots = cluster.slots_of(master)
    (task_id,) = cluster.ids_on(master, 1)
    with master.client() as client:
        client.set(_key(task_id), "value")
    promoted = cluster.failover(master)
    assert cluster.slots_of(promoted) == slots
    assert master not in cluster.masters()
    with promoted.client() as client:
        assert client.get(_key(task_id)) == b"value"
    cluster.wait_ok()
    assert cluster.replica_of(promoted) is master


def test_a_cluster_without_a_quorum_is_restored(cluster: RedisCluster) -> None:
    for node in (*cluster.masters()[:2], *cluster.replicas()):
        node.kill()
    (left,) = cluster.up()
    left.freeze()
    cluster.restore()
    assert tuple(cluster.up()) == cluster.originals
    assert [len(cluster.slots_of(node)) for node in cluster.masters()] == [5461, 5461, 5462]
    assert len(cluster.replicas()) == 3


def test_nothing_remains_of_a_cluster_that_did_not_start() -> None:
    cluster = RedisCluster("--no-such-option", "1")
    with pytest.raises(RuntimeError, match="did not start"):
        cluster.start()
    assert not any(node.folder.exists() for node in cluster.nodes)


async def test_the_harness_sees_a_cluster(cluster: RedisCluster) -> None:
    harness = ClusterHarness(cluster)
    ids = [cluster.ids_on(master, 1)[0] for master in cluster.masters()]
    try:
        assert await harness.holdings() == {}
        assert await harness.subscriptions() == 0
        client: Any
        with cluster.masters()[2].client(socket_timeout=10) as client, client.pubsub() as pubsub:
            pubsub.ssubscribe(_key(ids[2]))
            pubsub.subscribe("classic")
            await until(lambda: cluster.shard_channels() + cluster.classic_channels() == 2)
            assert await harness.subscriptions() == 2
            for task_id in ids:
                await harness.put_raw(task_id, b"value")
            told = [await asyncio.to_thread(pubsub.get_sharded_message, timeout=10) for _ in range(3)]
            assert [each["data"] for each in told if each and each["type"] == "smessage"] == [b"value"]
        assert {key: 50 < (left or 0) <= 60 for key, left in (await harness.holdings()).items()} == dict.fromkeys(
            map(_key, ids), True
        )
        assert 50 < (await harness.seconds_left(ids[1]) or 0) <= 60
    finally:
        await harness.close()


# -- Sentinel --------------------------------------------------------------------------------------------------------


async def test_sentinels_replace_a_master_in_agreement_with_it(setup: SentinelSetup) -> None:
    old = setup.master()
    with old.client() as client:
        client.set("key", "value")
        assert client.wait(1, 10_000) == 1
    new = await asyncio.to_thread(setup.failover)
    assert new is setup.master() is not old
    assert setup.replicas() == [old]
    with new.client() as client:
        assert client.get("key") == b"value"


async def test_sentinels_replace_a_master_that_is_frozen(setup: SentinelSetup) -> None:
    old = setup.master()
    old.freeze()
    new = await asyncio.to_thread(setup.wait_replaced, old)
    assert new is not old
    old.thaw()
    await asyncio.to_thread(setup.wait_ok)
    assert [old.ask("ROLE")[0], new.ask("ROLE")[0]] == ["slave", "master"]


async def test_redis_py_understands_the_sentinels(setup: SentinelSetup) -> None:
    hosts = [sentinel.address for sentinel in setup.sentinels]
    make: Any = redis.Sentinel  # it has no annotations
    options = {"sentinel_kwargs": {"password": setup.sentinels[0].password}, "min_other_sentinels": 2}
    service = make(hosts, password=setup.nodes[0].password, **options)
    with service.master_for(setup.master_name) as client:
        client.set("key", "value")
    with setup.master().client() as client:
        assert client.get("key") == b"value"
    for sentinel in service.sentinels:
        sentinel.close()


async def test_a_sentinel_set_up_without_a_server_is_restored(setup: SentinelSetup) -> None:
    for node in (*setup.nodes, *setup.sentinels):
        node.kill()
    await asyncio.to_thread(setup.restore)
    assert setup.master() is setup.nodes[0]


async def test_the_harness_sees_a_sentinel_set_up(setup: SentinelSetup) -> None:
    harness = SentinelHarness(setup)
    try:
        assert await harness.subscriptions() == 0
        await harness.put_raw("task", b"value")
        assert [*await harness.holdings()] == [_key("task")]
    finally:
        await harness.close()
