"""A Redis Cluster whose slots move, and whose nodes fail, join and leave, while clients wait and store.

Chance is the one of pytest-randomly. The tests share one cluster, and each leaves it for `RedisCluster.restore`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import redis
from redis.crc import key_slot

import aioresult
from aioresult import BackendConnectionError, BackendRefusedError
from aioresult.backends.redis import ClusterBackend
from aioresult.chord import CHORD_TOPIC
from aioresult.states import SUCCESS

from .cluster_servers import ClusterNode, RedisCluster, redis_cluster, slot_of, wait_for
from .harness import hubs_of, until

pytestmark = pytest.mark.xdist_group("cluster faults")

#: The name of the connections that must be gone at the end.
NAME = "of-the-test"
#: How often a slot goes from one master to the other.
ROUNDS = 100 if os.environ.get("AIORESULT_TEST_THOROUGH") == "1" else 12
#: Of servers that are fast to replace each other.
NODE_TIMEOUT = 1000


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[RedisCluster]:
    with redis_cluster(node_timeout=NODE_TIMEOUT) as cluster:
        yield cluster


@pytest.fixture
async def cluster(shared_cluster: RedisCluster) -> AsyncIterator[RedisCluster]:
    await asyncio.to_thread(shared_cluster.restore)
    shared_cluster.flush()
    yield shared_cluster
    for node in shared_cluster.up():
        assert node.ask("CLIENT", "LIST").count(f"name={NAME}") == 0, f"a connection to {node} is left"


@contextlib.asynccontextmanager
async def opened(cluster: RedisCluster, url: str = "", **options: Any) -> AsyncIterator[ClusterBackend]:
    """A backend that is quick to notice. At the end it has nothing left to do, and nothing is subscribed."""
    url = f"{url or cluster.url}{'&' if '?' in url else '?'}client_name={NAME}"
    async with aioresult.connect(url, **{"heartbeat": 1, "retry_for": 60, **options}) as backend:
        assert isinstance(backend, ClusterBackend)
        yield backend
        if backend.is_open:
            await quiet(backend)
            # A worker waits to be told whom to stop.
            await until(lambda: counts(backend)[0] == int(backend.liveness.works))
            await channels(cluster, 0)


def counts(backend: ClusterBackend) -> tuple[int, int]:
    """How many ids have waiters, and how many are subscribed, as the hubs see it."""
    numbers = [shard.hub.counts() for shard in backend._shards]
    return sum(ids for _, ids, _ in numbers), sum(subscribed for _, _, subscribed in numbers)


async def channels(cluster: RedisCluster, count: int) -> None:
    """Return once so many ids are subscribed, as the servers see it."""

    async def reached() -> bool:
        return await asyncio.to_thread(cluster.shard_channels) == count

    await until(reached)


async def subscribed_at(node: ClusterNode, count: int) -> None:
    """Return once so many ids are subscribed at this node."""

    async def reached() -> bool:
        return len(await asyncio.to_thread(node.ask, "PUBSUB", "SHARDCHANNELS")) == count

    await until(reached)


async def quiet(backend: ClusterBackend) -> None:
    """Return once nobody asks for the table any more."""
    stale = backend._topology._stale
    await until(lambda: bool(stale._waiters) and not stale.is_set())


def waits(backend: ClusterBackend, ids: Iterable[str]) -> dict[str, asyncio.Task[Any]]:
    return {task_id: asyncio.create_task(backend.result(task_id).get()) for task_id in ids}


async def store(backend: ClusterBackend, ids: Iterable[str]) -> None:
    """Store under each id a value that names it."""
    assert all(await asyncio.gather(*(backend.mark_as_done(task_id, f"of {task_id}") for task_id in ids)))


async def told(waiting: dict[str, asyncio.Task[Any]]) -> None:
    values = await asyncio.gather(*waiting.values())
    assert values == [f"of {task_id}" for task_id in waiting]


async def cancelled(waiting: dict[str, asyncio.Task[Any]]) -> None:
    for task in waiting.values():
        task.cancel()
    await asyncio.wait(waiting.values())


async def settings(cluster: RedisCluster, name: str, value: str) -> None:
    for node in cluster.up():
        await asyncio.to_thread(node.ask, "CONFIG", "SET", name, value)


def tagged(cluster: RedisCluster, node: ClusterNode, slots: int, each: int) -> dict[int, list[str]]:
    """Ids on a node, so many in each of so many slots."""
    owned = set(cluster.slots_of(node))
    by_slot: dict[int, list[str]] = {}
    number = 0
    while len(by_slot) < slots:
        tag = f"{{t{number}}}"
        number += 1
        if (slot := slot_of(tag)) in owned and slot not in by_slot:
            by_slot[slot] = [f"{tag}-{member}" for member in range(each)]
    return by_slot


# -- slots that move -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3])
async def test_waiters_wake_while_their_slots_are_held_between_two_masters(
    cluster: RedisCluster, protocol: int
) -> None:
    """Half of the ids have a state already, which moves. And the migrations may as well never end."""
    source, target, _ = cluster.masters()
    by_slot = tagged(cluster, source, 4, 250)
    ids = [task_id for some in by_slot.values() for task_id in some]
    url = f"{cluster.url}?protocol={protocol}"
    async with opened(cluster, url) as web, opened(cluster, url) as worker:
        await asyncio.gather(*(worker.mark_as_started(task_id) for task_id in ids[::2]))
        waiting = waits(web, ids[:900])
        await channels(cluster, 900)
        for slot in by_slot:
            await asyncio.to_thread(cluster.begin_migration, slot, target)
            await asyncio.to_thread(cluster.move_keys, slot, target)
        waiting |= waits(web, ids[900:])  # these subscribe, and read, while it goes on
        await channels(cluster, 1000)
        await store(worker, ids)
        await told(waiting)
        assert [await asyncio.to_thread(cluster.master_of, slot) for slot in by_slot] == [source] * 4
        for slot in by_slot:
            await asyncio.to_thread(cluster.end_migration, slot, target)
        assert [meta.result for meta in await web.get_many(ids)] == [f"of {task_id}" for task_id in ids]
    assert [await asyncio.to_thread(cluster.master_of, slot) for slot in by_slot] == [target] * 4


async def test_a_slot_goes_back_and_forth_under_stores_and_waiters(cluster: RedisCluster) -> None:
    first, second, _ = cluster.masters()
    ((slot, ids),) = tagged(cluster, first, 1, 300).items()
    counted = f"{ids[0]}-counted"
    async with opened(cluster) as web, opened(cluster) as worker:
        waiting = waits(web, ids)
        await channels(cluster, len(ids))
        moving = asyncio.create_task(asyncio.to_thread(_back_and_forth, cluster, slot, first, second))
        last = 0
        while not moving.done():
            # Two stores of one id keep their order, wherever they go.
            last += 2
            if ids:
                task_id = ids.pop()
                await store(worker, [task_id])
            await asyncio.gather(
                worker.store_result(counted, last - 1, "COUNTED"), worker.store_result(counted, last, "COUNTED")
            )
            assert (await web.get_task_meta(counted)).result == last
            await asyncio.sleep(0.01)  # for the thread that moves the slot
        await moving
        await store(worker, ids)
        await told(waiting)


def _back_and_forth(cluster: RedisCluster, slot: int, first: ClusterNode, second: ClusterNode) -> None:
    # A message on the bus that is older than a change may undo it, so the owner is asked for each time.
    for turn in range(ROUNDS):
        target = second if turn % 2 == 0 else first
        wait_for(partial(_move, cluster, slot, target))


def _move(cluster: RedisCluster, slot: int, target: ClusterNode) -> str:
    """Move the slot unless ``target`` has it; for `wait_for`, which looks again."""
    if cluster.master_of(slot) is target:
        return ""
    with contextlib.suppress(redis.ResponseError), cluster._asking_all() as asks:
        cluster._begin(asks, slot, cluster.master_of(slot), target)
        cluster._end(asks, slot, cluster.master_of(slot), target)
    return f"slot {slot} is not at {target}"


async def test_a_node_joins_takes_slots_over_and_leaves(cluster: RedisCluster) -> None:
    first, second, _ = cluster.masters()
    by_slot = tagged(cluster, first, 20, 10)
    ids = [task_id for some in by_slot.values() for task_id in some]
    async with opened(cluster) as web, opened(cluster) as worker:
        waiting = waits(web, ids)
        await channels(cluster, len(ids))
        node = await asyncio.to_thread(cluster.add_node)
        await asyncio.to_thread(cluster.migrate_all, by_slot, node)
        await store(worker, ids[::3])
        # Those whose slots have moved are subscribed there.
        await until(lambda: counts(web)[0] == len(ids) - len(ids[::3]))
        await subscribed_at(node, len(ids) - len(ids[::3]))
        assert len(web._shards) == 4  # it has a shard of its own
        await asyncio.to_thread(cluster.migrate_all, by_slot, second)
        await asyncio.to_thread(cluster.remove_node, node)
        assert node.ask("CLUSTER", "SLOTS") == []
        await store(worker, ids[1::3])
        await worker.mark_as_done(by_id := ids[2], f"of {by_id}")
        # It is a start node, too, and says that there are no slots.
        url = f"redis+cluster://127.0.0.1:{node.port},{cluster.url.partition('//')[2]}"
        async with opened(cluster, url) as late:
            await store(late, ids[5::3])
        await told(waiting)
        assert node.ask("CLIENT", "LIST").count(f"name={NAME}") == 0
    with pytest.raises(BackendConnectionError, match="is in no cluster"):
        await aioresult.connect(f"redis+cluster://127.0.0.1:{node.port}").open()


# -- masters that are replaced ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3])
async def test_a_replica_takes_the_place_of_its_master_in_agreement(cluster: RedisCluster, protocol: int) -> None:
    """It has never seen the scripts. What waits and what stores notices nothing."""
    master = cluster.masters()[0]
    ids = cluster.ids_on(master, 300)
    url = f"{cluster.url}?protocol={protocol}"
    async with opened(cluster, url) as web, opened(cluster, url) as worker:
        waiting = waits(web, ids)
        await channels(cluster, len(ids))
        storing = asyncio.create_task(_store_in_turn(worker, ids))
        promoted = await asyncio.to_thread(cluster.failover, master)
        await told(waiting)
        await storing
        assert promoted in cluster.masters()
        assert len(web._shards) == 3  # it has taken over the shard
        waiting = waits(web, later := cluster.ids_on(promoted, 10, "later"))
        await subscribed_at(promoted, 10)
        await store(worker, later)
        await told(waiting)


async def _store_in_turn(worker: ClusterBackend, ids: Sequence[str]) -> None:
    for task_id in ids:
        await store(worker, [task_id])


async def test_a_master_is_killed_and_its_replica_takes_over(cluster: RedisCluster) -> None:
    dead, alive, _ = cluster.masters()
    ids = cluster.ids_on(dead, 300)
    others = cluster.ids_on(alive, 300)
    async with opened(cluster) as web, opened(cluster) as worker:
        waiting = waits(web, [*ids, *others])
        await channels(cluster, 600)
        dead.kill()
        await asyncio.gather(store(worker, ids), store(worker, others))
        await told(waiting)
        replaced = cluster.masters()
        assert dead not in replaced
        await asyncio.to_thread(dead.start)
        await asyncio.to_thread(cluster.wait_ok)


async def test_a_frozen_master_is_left_as_soon_as_the_others_have_replaced_it(
    cluster: RedisCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """A heartbeat is long here: nothing waits for three of them. The old master gets nothing more."""
    frozen = cluster.masters()[0]
    before, after = cluster.ids_on(frozen, 60), cluster.ids_on(frozen, 200, "after")
    async with opened(cluster, heartbeat=3) as web, opened(cluster, heartbeat=3) as worker:
        waiting = waits(web, [*before, *after])
        await channels(cluster, 260)
        done = _executed(frozen)
        frozen.freeze()
        try:
            storing = asyncio.create_task(store(worker, before))
            await until(lambda: all(frozen.address not in each._topology._nodes for each in (web, worker)))
            await store(worker, after)
            await storing
            await told(waiting)
            lost = [record.message for record in caplog.records if "was lost" in record.message]
            assert lost
            assert all("owns no slot of the cluster" in message for message in lost)
        finally:
            frozen.thaw()
        await asyncio.to_thread(cluster.wait_ok)
        assert _executed(frozen) <= done + len(before)


def _executed(node: ClusterNode) -> int:
    """How many scripts it was asked to execute."""
    line = node.info("commandstats").get("cmdstat_evalsha", "calls=0,")
    return int(line.partition("calls=")[2].partition(",")[0])


async def test_all_masters_start_again(cluster: RedisCluster) -> None:
    # A node that starts again may find a file with results of earlier tests, which it had as a replica.
    ids = [task_id for node in cluster.masters() for task_id in cluster.ids_on(node, 50, "restarted")]
    async with opened(cluster) as web, opened(cluster) as worker:
        waiting = waits(web, ids)
        await channels(cluster, len(ids))
        await asyncio.to_thread(cluster.restart_all_masters)
        await store(worker, ids)
        await told(waiting)


async def test_without_a_quorum_waiters_wait_and_stores_fail_in_time(cluster: RedisCluster) -> None:
    first, second, _ = cluster.masters()
    ids = [task_id for node in cluster.masters() for task_id in cluster.ids_on(node, 5, "quorum")]
    async with opened(cluster) as web, opened(cluster, retry_for=0.5) as worker:
        waiting = waits(web, ids)
        await channels(cluster, len(ids))
        first.kill()
        second.kill()
        await until(lambda: all(_says(node, "cluster_state:fail") for node in cluster.up()))
        outcomes = await asyncio.gather(*(worker.mark_as_done(id, f"of {id}") for id in ids), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {BackendConnectionError}
        assert not any(task.done() for task in waiting.values())
        for node in (first, second):
            await asyncio.to_thread(node.start)
        await asyncio.to_thread(cluster.wait_ok)
        # The first attempt ends the outage.
        await until(lambda: _stored(worker, ids))
        await told(waiting)


def _says(node: ClusterNode, line: str) -> bool:
    return line in node.ask("CLUSTER", "INFO")


async def _stored(worker: ClusterBackend, ids: Sequence[str]) -> bool:
    with contextlib.suppress(BackendConnectionError):
        await store(worker, ids)
        return True
    return False


async def test_what_is_on_healthy_masters_does_not_notice_a_dead_one(cluster: RedisCluster) -> None:
    """Nobody replaces it, and the cluster serves what it still can."""
    dead, alive, _ = cluster.masters()
    replica = cluster.replica_of(dead)
    ids, others = cluster.ids_on(dead, 150, "dead"), cluster.ids_on(alive, 150, "alive")
    await settings(cluster, "cluster-require-full-coverage", "no")
    try:
        async with opened(cluster) as web, opened(cluster, retry_for=0.3) as worker, opened(cluster) as patient:
            waiting = waits(web, [*ids, *others[:100]])
            await channels(cluster, 250)
            replica.kill()
            dead.kill()
            storing = asyncio.create_task(store(patient, ids))
            refused = await asyncio.gather(*(worker.mark_as_done(id, 1) for id in ids), return_exceptions=True)
            assert {type(outcome) for outcome in refused} == {BackendConnectionError}
            await store(worker, others)
            await told({task_id: waiting[task_id] for task_id in others[:100]})
            for _ in range(2):  # the second time, it is known
                outcomes = await worker.get_outcomes([*ids, *others])
                assert {type(outcome) for outcome in outcomes[: len(ids)]} == {BackendConnectionError}
                found = outcomes[len(ids) :]
                assert [each.result for each in found if isinstance(each, aioresult.TaskMeta)] == [
                    f"of {task_id}" for task_id in others
                ]
                with pytest.raises(BackendConnectionError):
                    await worker.get_many([*others, *ids])
                # New waiters, few and many, learn what is there.
                for count in (10, 150):
                    some = [web.result(task_id) for task_id in (*ids[:count], *others[:count])]
                    done, pending = await aioresult.wait(some, return_when=asyncio.FIRST_COMPLETED)
                    assert {each.id for each in done if isinstance(each, aioresult.AsyncResult)} == set(others[:count])
                    assert len(pending) == count
            assert not storing.done()
            assert not any(waiting[task_id].done() for task_id in ids)
            await asyncio.to_thread(dead.start)
            await storing
            await told({task_id: waiting[task_id] for task_id in ids})
            await asyncio.to_thread(replica.start)
            await asyncio.to_thread(cluster.wait_ok)
    finally:
        await settings(cluster, "cluster-require-full-coverage", "yes")


# -- what consists of several keys, and of other channels ------------------------------------------------------------

Change = Callable[[Sequence[str]], Awaitable[None]]


@pytest.fixture(params=["moved", "replaced"])
def change(request: pytest.FixtureRequest, cluster: RedisCluster) -> Change:
    """Moves the slots of keys to other masters, or has replicas take the places of their masters."""

    def changed(keys: Sequence[str]) -> None:
        slots = {key_slot(key.encode()) for key in keys}
        if request.param == "replaced":
            for master in {cluster.master_of(slot) for slot in slots}:
                cluster.failover(master)
        else:
            for slot in slots:
                owner = cluster.master_of(slot)
                cluster.migrate(slot, next(node for node in cluster.masters() if node is not owner))

    return lambda keys: asyncio.to_thread(changed, keys)


async def test_chords_are_completed_and_dispatched(cluster: RedisCluster, change: Change) -> None:
    keys = ["celery-taskset-meta-g", "aioresult-chords"]
    async with opened(cluster) as web, opened(cluster) as worker:
        dispatched: asyncio.Queue[list[Any]] = asyncio.Queue()

        async def dispatch() -> None:
            async for ready in web.ready_chords():
                async with ready:
                    await dispatched.put(ready.results)

        dispatching = asyncio.create_task(dispatch())
        chord = await worker.create_chord("g", body="body", size=4)
        waiting = asyncio.create_task(chord.get())
        await asyncio.to_thread(_until_classic, cluster, 1)
        await worker.on_chord_part_return("g", "t0", SUCCESS, 0, 0)
        for index in (1, 2, 3):
            if index != 2:
                await change(keys)
            # The last part hardly claims the chord: it leaves it to the dispatcher.
            await worker.on_chord_part_return("g", f"t{index}", SUCCESS, index, index, lease=0.001)
        assert await waiting == [0, 1, 2, 3]
        assert await dispatched.get() == [0, 1, 2, 3]
        dispatching.cancel()
        await asyncio.wait([dispatching])


def _until_classic(cluster: RedisCluster, count: int) -> None:
    while cluster.classic_channels() < count:
        pass


async def test_running_tasks_send_output_and_are_revoked(cluster: RedisCluster, change: Change) -> None:
    keys = ["celery-task-meta-t", "aioresult-workers"]
    async with opened(cluster) as web, opened(cluster, lease=5) as worker:
        stream = web.stream("t")
        updates = web.updates("t")
        waiting = waits(web, ["t"])
        begun, send = asyncio.Event(), asyncio.Queue[int]()

        async def body() -> None:
            async with worker.running("t") as task:
                begun.set()
                while True:
                    await task.output.send(await send.get())

        running = asyncio.create_task(body())
        await begun.wait()
        await send.put(0)
        assert await anext(stream) == 0
        assert (await anext(updates)).status == "STARTED"
        for number in range(1, 3):
            await change(keys)
            await send.put(number)
            assert await anext(stream) == number
        assert await worker.alive([worker.liveness.worker]) == [True]
        assert await web.result("t").revoke()
        with pytest.raises(aioresult.TaskRevokedError):
            await running
        with pytest.raises(aioresult.TaskRevokedError):
            await waiting["t"]
        with pytest.raises(aioresult.TaskRevokedError):
            await anext(stream)
        assert [update.status async for update in updates] == ["REVOKED"]


async def test_output_arrives_while_the_slot_is_held(cluster: RedisCluster) -> None:
    """It is a transaction, which is redirected as a whole."""
    slot = slot_of("t")
    target = next(node for node in cluster.masters() if node is not cluster.master_of(slot))
    async with opened(cluster) as web, opened(cluster) as worker:
        stream = web.stream("t")
        async with worker.running("t") as task:
            await task.output.send(0)
            assert await anext(stream) == 0
            await asyncio.to_thread(cluster.begin_migration, slot, target)
            await asyncio.to_thread(cluster.move_keys, slot, target)
            for number in range(1, 20):
                await task.output.send(number)
                assert await anext(stream) == number
            task.value = "of t"
        await told(waits(web, ["t"]))
        assert [chunk async for chunk in stream] == []
        assert await asyncio.to_thread(cluster.master_of, slot) is not target
        await asyncio.to_thread(cluster.end_migration, slot, target)


async def test_what_has_its_keys_on_two_nodes_waits_alone(cluster: RedisCluster) -> None:
    """The server does nothing with them before the slot has moved. Results in the same batch do not wait for that."""
    slot = slot_of("t")
    source = cluster.master_of(slot)
    target = next(node for node in cluster.masters() if node is not source)
    others = cluster.ids_on(source, 40, "other")
    async with opened(cluster) as worker:
        await worker.mark_as_started("t")
        await asyncio.to_thread(cluster.begin_migration, slot, target)
        values = {task_id: asyncio.create_task(worker.run(task_id, _value_of, task_id)) for task_id in ("t", *others)}
        await asyncio.gather(*(values[task_id] for task_id in others))
        assert not values["t"].done()
        await asyncio.to_thread(cluster.end_migration, slot, target)
        await told(values)


async def test_a_chord_whose_keys_are_on_two_nodes_holds_up_no_other_waiter(cluster: RedisCluster) -> None:
    """It cannot be read before its slot has moved."""
    group = "g"
    slot = key_slot(b"celery-taskset-meta-" + group.encode())
    source = cluster.master_of(slot)
    target = next(node for node in cluster.masters() if node is not source)
    async with opened(cluster) as worker, opened(cluster, retry_for=3600) as web:
        await worker.create_chord(group, body="body", size=1)
        await asyncio.to_thread(cluster.begin_migration, slot, target)
        (first, *_) = source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100)
        await asyncio.to_thread(source.ask, "MIGRATE", target.address[0], target.port, first, 0, 5000)
        complete = asyncio.create_task(web.chord(group).get())
        await until(lambda: any(hub.has_waiters(f"{CHORD_TOPIC}{group}") for hub in hubs_of(web)))
        for prefix in ("first", "second"):  # the second after the chord was read in vain
            waiting = waits(web, cluster.ids_on(source, 20, prefix))
            await store(worker, waiting)
            await told(waiting)
        assert not complete.done()
        await asyncio.to_thread(cluster.move_keys, slot, target)
        await asyncio.to_thread(cluster.end_migration, slot, target)
        assert await worker.on_chord_part_return(group, "a", "SUCCESS", 1) is not None
        assert await complete == [1]


async def _value_of(task_id: str) -> str:
    return f"of {task_id}"


# -- rights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3])
async def test_an_id_whose_channel_is_not_allowed_harms_no_other(cluster: RedisCluster, protocol: int) -> None:
    master = cluster.masters()[0]
    good, bad = cluster.ids_on(master, 30, "good"), cluster.ids_on(master, 3, "bad")
    rights = ("on", ">secret", "~*", "+@all", "resetchannels", "&celery-task-meta-good*")
    for node in cluster.nodes:
        node.ask("ACL", "SETUSER", "web", *rights)
    try:
        url = f"{cluster.url.replace('//', '//web:secret@')}?protocol={protocol}"
        async with opened(cluster, url) as web, opened(cluster) as worker:
            waiting = waits(web, [*good[:20], *bad, *good[20:]])
            for task_id in bad:
                with pytest.raises(BackendRefusedError, match="No permissions to access a channel"):
                    await waiting.pop(task_id)
            await channels(cluster, 30)
            await store(worker, good)
            await told(waiting)
        with pytest.raises(BackendRefusedError, match="invalid username-password pair") as caught:
            await aioresult.connect(url.replace("secret", "guessed")).open()
        assert "guessed" not in str(caught.value)
    finally:
        for node in cluster.nodes:
            node.ask("ACL", "DELUSER", "web")


async def test_scripts_are_loaded_again_where_they_are_missing(cluster: RedisCluster) -> None:
    ids = [task_id for node in cluster.masters() for task_id in cluster.ids_on(node, 10)]
    async with opened(cluster) as worker:
        await store(worker, ids[::2])
        for node in cluster.masters()[:2]:
            node.ask("SCRIPT", "FLUSH")
        await store(worker, ids[1::4])
        for node in cluster.masters():
            node.ask("SCRIPT", "FLUSH")
        for task_id in ids[3::4]:  # alone, each is sent at once
            await store(worker, [task_id])


# -- leaving ---------------------------------------------------------------------------------------------------------


async def test_connections_that_are_ended_by_the_server(cluster: RedisCluster) -> None:
    """Again and again, also when nobody waits any more: then nothing is subscribed, and nobody keeps asking."""
    ids = [task_id for node in cluster.masters() for task_id in cluster.ids_on(node, 100)]
    async with opened(cluster) as web, opened(cluster) as worker:
        waiting = waits(web, ids)
        await channels(cluster, len(ids))
        for kind in ("pubsub", "normal", "pubsub"):
            for node in cluster.masters():
                node.ask("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        await store(worker, ids)
        await told(waiting)
        await channels(cluster, 0)
        for node in cluster.masters():
            node.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        listeners = [node.listener for node in web._topology.owners()]
        await until(lambda: all(listener is not None and listener.closed for listener in listeners))


async def test_storms_of_cancellations_leave_nothing(cluster: RedisCluster) -> None:
    """While slots move, and masters are replaced, waiters come and go."""
    chance = random.Random(random.getrandbits(64))
    source, target, _ = cluster.masters()
    by_slot = tagged(cluster, source, 20, 10)
    ids = [task_id for some in by_slot.values() for task_id in some]
    async with opened(cluster) as web, opened(cluster) as worker:
        waiting = waits(web, ids)

        def trouble() -> None:
            for slots in (list(by_slot)[::2], list(by_slot)[1::2]):
                cluster.migrate_all(slots, target)
            cluster.failover(target)
            cluster.migrate_all(by_slot, source)

        troubling = asyncio.create_task(asyncio.to_thread(trouble))
        while not troubling.done():
            for task_id in chance.sample(ids, 30):
                await cancelled({task_id: waiting[task_id]})
                if chance.random() < 0.7:
                    waiting |= waits(web, [task_id])
            await asyncio.sleep(0.001)
        await troubling
        waiting |= waits(web, [task_id for task_id, task in waiting.items() if task.done()])
        leaving = dict(list(waiting.items())[::2])
        await cancelled(leaving)
        staying = {task_id: task for task_id, task in waiting.items() if task_id not in leaving}
        await until(lambda: counts(web)[0] == len(staying))
        await channels(cluster, len(staying))
        await store(worker, ids)
        await told(staying)


async def test_a_backend_is_closed_while_a_master_is_frozen(cluster: RedisCluster) -> None:
    """While it asks for the table, connects, stores, subscribes and reads: at any moment."""
    frozen = cluster.masters()[0]
    ids = cluster.ids_on(frozen, 20)
    url = f"redis+cluster://127.0.0.1:{cluster.masters()[1].port}"
    await asyncio.to_thread(frozen.freeze)
    try:
        for moment in range(3):
            async with opened(cluster, url, heartbeat=0.1) as web:
                tasks = [
                    *waits(web, ids).values(),
                    *(asyncio.create_task(web.mark_as_done(task_id, 1)) for task_id in ids),
                    asyncio.create_task(web.get_many(ids)),
                ]
                for _ in range(moment):
                    await asyncio.wait_for(web._topology._stale.wait(), 30)
                    web._topology._stale.clear()
                await web.aclose()
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
                # The frozen master may have been replaced meanwhile.
                errors = {type(outcome) for outcome in outcomes if isinstance(outcome, Exception)}
                assert errors == {aioresult.BackendClosedError} or (moment and not errors)
    finally:
        frozen.thaw()
