"""What docs/deployment.md says, with real servers: connections, shutdown, a full server, and rights by role.

The rights that docs/cluster.md adds to these are tried here, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
import redis.asyncio
import redis.exceptions

import aioresult
from aioresult import Backend, TaskRequest
from aioresult.backends.postgres import PostgresBackend
from aioresult.backends.redis import RedisBackend
from aioresult.chord import CHORD_TOPIC
from aioresult.hub import chunked
from aioresult.log import OUTPUT_TOPIC
from aioresult.progress import GROUP_TOPIC
from aioresult.run import WORKER_TOPIC, WORKERS_TOPIC

from .cluster_servers import Node, RedisCluster, SentinelSetup, slot_of
from .harness import until
from .servers import RedisServer
from .webserver import server_process

_DOCS = Path(__file__).parent.parent / "docs"
PAGE = (_DOCS / "deployment.md").read_text(encoding="utf-8")
CLUSTER_PAGE = (_DOCS / "cluster.md").read_text(encoding="utf-8")
#: Something that a role does through its own backend, beside one with all rights.
Duty = Callable[[Backend, Backend], Awaitable[None]]
Client = redis.asyncio.Redis


def shown(language: str, beginning: str, page: str = PAGE) -> list[str]:
    """The blocks of the page in this language that begin so."""
    found = re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)
    return [block for block in found if block.startswith(beginning)]


# -- connections ----------------------------------------------------------------------------------------------------


async def wait_for_many(backend: Backend, count: int) -> None:
    """Have ``count`` results waited for, and all of them stored."""
    waits = [asyncio.create_task(backend.result(f"t{number}").get(timeout=30)) for number in range(count)]
    await asked(backend, *(f"t{number}" for number in range(count)))
    await asyncio.gather(*(backend.mark_as_done(f"t{number}", number) for number in range(count)))
    assert await asyncio.gather(*waits) == list(range(count))


async def asked(backend: Backend, *topics: str) -> None:
    """Return once the backend has asked its server for news of all of them."""

    def subscribed() -> bool:
        there = [backend._shard_of(topic).hub._topics.get(topic) for topic in topics]
        return all(topic is not None and topic.subscribed for topic in there)

    await until(subscribed)


async def test_redis_has_one_connection_and_a_second_for_all_waiters(redis_url: str, redis_client: Client) -> None:
    async def mine() -> int:
        return sum(client["name"] == "counted" for client in await redis_client.client_list())

    async with aioresult.connect(f"{redis_url}?client_name=counted") as backend:
        await asyncio.gather(*(backend.mark_as_done(f"s{number}", number) for number in range(500)))
        assert await mine() == 1
        await wait_for_many(backend, 500)
        assert await mine() == 2


async def test_postgres_has_six_connections_at_most_and_one_for_all_waiters(postgres_url: str) -> None:
    admin = await asyncpg.connect(postgres_url)
    try:
        async with aioresult.connect(f"{postgres_url}?application_name=counted") as backend:
            await wait_for_many(backend, 500)
            count = await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'counted'")
            assert 2 <= count <= 7
    finally:
        await admin.close()


# -- shutdown -------------------------------------------------------------------------------------------------------

SERVICE = """
import os
from contextlib import asynccontextmanager

import aioresult
from aioresult.sse import HEADERS, events
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route


@asynccontextmanager
async def lifespan(app):
    async with aioresult.connect(os.environ["REDIS_URL"]) as backend:
        app.state.backend = backend
        yield
    print("the backend is closed", flush=True)


async def stream(request):
    return StreamingResponse(events(request.app.state.backend.result("endless").stream()), headers=HEADERS)


app = Starlette(routes=[Route("/stream", stream)], lifespan=lifespan)
"""


@pytest.mark.parametrize("bounded", [True, False], ids=["with the option", "without"])
async def test_uvicorn_waits_for_streams_unless_its_shutdown_is_bounded(
    redis_url: str, tmp_path: Path, bounded: bool
) -> None:
    (tmp_path / "service.py").write_text(SERVICE, encoding="utf-8")
    found = re.search(r"^uvicorn service:app (--timeout-graceful-shutdown) 5$", PAGE, re.M)
    assert found is not None
    command = ["-m", "uvicorn", "service:app", "--port", "{port}", *([found[1], "1"] if bounded else [])]
    async with (
        aioresult.connect(redis_url) as worker,
        server_process(tmp_path, {"REDIS_URL": redis_url}, *command) as (site, server),
        httpx.AsyncClient(base_url=site, timeout=60) as client,
        client.stream("GET", "/stream") as response,
    ):
        pieces = response.aiter_bytes()
        assert (await anext(pieces)).startswith(b"retry")
        server.terminate()

        def waits() -> bool:
            return "Waiting for connections to close" in (tmp_path / "log").read_text(encoding="utf-8")

        await until(waits)
        if not bounded:  # it would wait for ever: only the end of the task ends the stream, and so the process
            assert server.poll() is None
            await worker.mark_as_done("endless", None)
        with contextlib.suppress(httpx.RemoteProtocolError):
            async for _ in pieces:
                pass
        await asyncio.to_thread(server.wait, 20)
        log = (tmp_path / "log").read_text(encoding="utf-8")
        assert "the backend is closed" in log
        assert ("timeout graceful shutdown exceeded" in log) == bounded


async def test_the_tasks_of_a_worker_that_is_stopped_are_not_lost_and_wait_for_the_next_attempt(redis_url: str) -> None:
    """Unless the backend is closed first: then readers are told at once that the worker has gone."""
    begun = asyncio.Event()

    async def endless() -> None:
        begun.set()
        await asyncio.Event().wait()

    async with aioresult.connect(redis_url) as web:
        first, second = aioresult.connect(redis_url), aioresult.connect(redis_url)
        async with first:
            running = asyncio.create_task(first.run("t", endless))
            waiting = asyncio.create_task(web.result("t").get(timeout=30, on_lost="raise"))
            await asked(web, "t", WORKERS_TOPIC)
            await begun.wait()
            running.cancel()
            await asyncio.wait([running])
        assert await web.result("t").state() == "STARTED"
        async with second:
            await second.run("t", asyncio.sleep, 0, "by the next one")
        assert await waiting == "by the next one"

        hasty = await aioresult.connect(redis_url).open()
        begun.clear()
        running = asyncio.create_task(hasty.run("u", endless))
        waiting = asyncio.create_task(web.result("u").get(timeout=30, on_lost="raise"))
        await asked(web, "u", WORKERS_TOPIC)
        await begun.wait()
        await hasty.aclose()
        with pytest.raises(aioresult.WorkerLostError):
            await waiting
        running.cancel()
        await asyncio.wait([running])


# -- expiry and eviction --------------------------------------------------------------------------------------------


async def test_a_redis_that_may_not_evict_refuses_stores_and_serves_everything_else(
    own_redis: RedisServer, redis_url: str, redis_client: Client
) -> None:
    async with aioresult.connect(redis_url) as backend:
        await backend.mark_as_done("old", 1)
        waiting = asyncio.create_task(backend.result("new").get(timeout=30))
        await asked(backend, "new")
        await redis_client.config_set("maxmemory", 1)
        try:
            for store in (backend.mark_as_done("new", 2), backend.mark_as_started("new")):
                with pytest.raises(aioresult.BackendStoreError, match="OOM"):
                    await store
            assert await backend.result("old") == 1
            await backend.forget("old")
        finally:
            await redis_client.config_set("maxmemory", 0)
        assert await backend.mark_as_done("new", 2)
        assert await waiting == 2


async def test_a_redis_that_may_evict_loses_results_that_were_not_read(redis_url: str, redis_client: Client) -> None:
    ids = [f"t{number}" for number in range(300)]
    used = (await redis_client.info("memory"))["used_memory"]
    await redis_client.config_set("maxmemory-policy", "volatile-lru")
    await redis_client.config_set("maxmemory", used + 2**20)
    try:
        async with aioresult.connect(redis_url) as backend:
            for some in chunked(ids, 10):  # what is on the way counts, too, and cannot be evicted
                assert all(await asyncio.gather(*(backend.mark_as_done(each, "x" * 10_000) for each in some)))
            assert any(meta.status == "PENDING" for meta in await backend.get_many(ids))
    finally:
        await redis_client.config_set("maxmemory", 0)
        await redis_client.config_set("maxmemory-policy", "noeviction")


async def test_what_redis_keeps_and_for_how_long(redis_url: str, redis_client: Client) -> None:
    """The table of keys has a row for each key that is there, and each lives for as long as its option says."""
    rows = dict(re.findall(r"^\| `(\S+)` \| .* \| (`\w+`|none) \|$", PAGE, re.M))
    lives = {"`expires`": 1000, "`failure_expires`": 2000, "`chord_expires`": 3000, "none": -1}
    async with aioresult.connect(redis_url, expires=1000, failure_expires=2000, chord_expires=3000) as backend:
        await everything(backend)
        keys: list[Any] = await redis_client.keys()
        seen = {}
        for key in sorted(keys):
            pattern = _pattern(key.decode())
            assert pattern in rows, f"the table has no row for {key!r}"
            seen[pattern] = await redis_client.ttl(key)
    assert rows.keys() == seen.keys()
    for pattern, option in rows.items():
        # A group may live longer than its option says: as long as its results, or as its chord.
        assert lives[option] - 5 <= seen[pattern] <= (3000 if lives[option] > 0 else -1), pattern
    for task_id, seconds in (("done", 1000), ("failed", 2000)):
        assert seconds - 5 <= await redis_client.ttl(f"celery-task-meta-{task_id}") <= seconds


def _pattern(key: str) -> str:
    """The row of the table for ``key``: its id is a word without a dash."""
    return re.sub(r"-meta-\w+", "-meta-<id>", key)


async def everything(backend: Backend) -> None:
    """Have something of each kind stored, which will expire."""
    await backend.mark_as_done("done", 1)
    await backend.mark_as_failure("failed", ValueError())
    await backend.save_group("g", backend.group(["m1", "m2"]))
    await backend.mark_as_done("m1", 1, TaskRequest(id="m1", group="g", group_index=0))
    await backend.mark_as_failure("m2", ValueError(), request=TaskRequest(id="m2", group="g", group_index=1))
    for chord in ("c1", "c2"):
        await backend.create_chord(chord, "body")
        await backend.set_chord_size(chord, 2)
        await backend.on_chord_part_return(chord, "p1", "SUCCESS", 1, index=0)
    ready = await backend.on_chord_part_return("c2", "p2", "SUCCESS", 1, index=1)
    assert ready is not None
    async with ready:
        pass
    async with backend.running("run") as task:
        await task.output.send("a chunk")


# -- rights by role -------------------------------------------------------------------------------------------------


async def waits(mine: Backend, owner: Backend) -> None:
    waiting = asyncio.create_task(mine.result("w").get(timeout=30))
    await asked(mine, "w")
    await owner.mark_as_done("w", 1)
    assert await waiting == 1
    await owner.mark_as_failure("f", ValueError("no"))
    assert [meta.status for meta in await mine.get_many(["w", "f"])] == ["SUCCESS", "FAILURE"]
    with pytest.raises(aioresult.TimeoutError):
        await mine.result("nothing").get(timeout=0.01)


async def reads_groups(mine: Backend, owner: Backend) -> None:
    await owner.save_group("g", owner.group(["g1", "g2"], id="g"))
    group = await mine.restore_group("g")
    assert group is not None

    async def done() -> list[int]:
        return [step.done async for step in group.progress(interval=0)]

    progress = asyncio.create_task(done())
    await (asked(mine, GROUP_TOPIC + "g") if isinstance(mine, RedisBackend) else asked(mine, "g1", "g2"))
    for index, member in enumerate(("g1", "g2")):
        await owner.mark_as_done(member, index, TaskRequest(id=member, group="g", group_index=index))
    assert await group.get(timeout=30) == [0, 1]
    assert (await progress)[-1] == 2


async def awaits_chords(mine: Backend, owner: Backend) -> None:
    await owner.set_chord_size("of another program", 2)
    for chord in ("unknown", "of another program"):
        await mine.chord(chord).progress()
    await owner.create_chord(owner.group(["c1", "c2"], id="c"), "body")
    waiting = asyncio.create_task(mine.chord("c").get(timeout=30))
    await asked(mine, CHORD_TOPIC + "c")
    for index, part in enumerate(("c1", "c2")):
        ready = await owner.on_chord_part_return("c", part, "SUCCESS", index, index=index)
    assert ready is not None
    async with ready:
        pass
    assert await waiting == [0, 1]


async def follows_a_task(mine: Backend, owner: Backend) -> None:
    async def read() -> list[Any]:
        return [chunk async for chunk in mine.result("s").stream()]

    async def states() -> list[str]:
        return [meta.status async for meta in mine.result("s").updates()]

    reading, watching = asyncio.create_task(read()), asyncio.create_task(states())
    await asked(mine, "s", OUTPUT_TOPIC + "s", WORKERS_TOPIC)
    async with owner.running("s") as task:
        await task.output.send("a")
    assert await reading == ["a"]
    assert (await watching)[-1] == "SUCCESS"
    page = await mine.result("s").read_output()
    assert (await mine.result("s").read_output(page.cursor)).chunks == []
    assert [chunk async for chunk in mine.result("s").stream(after=aioresult.TAIL)] == []


async def looks_for_dead_workers(mine: Backend, owner: Backend) -> None:
    await owner._beat("dead", 0.001)

    async def over() -> bool:
        return await owner._alive(["dead"]) == [False]

    await until(over)
    assert await mine._alive(["dead"]) == [False]
    await mine._beat("", 600.0, await owner._beat("", 600.0))


async def stores(mine: Backend, owner: Backend) -> None:
    await mine.mark_as_pending("p")
    await mine.mark_as_started("p")
    await mine.store_result("p", {"done": 1}, "PROGRESS")
    await mine.mark_as_retry("p", ValueError())
    waiting = asyncio.create_task(owner.result("p").get(timeout=30))
    await asked(owner, "p")
    assert await mine.mark_as_done("p", 1)
    assert not await mine.mark_as_done("p", 2)
    assert await waiting == 1
    assert await mine.mark_as_failure("q", ValueError())
    assert await mine.mark_as_revoked("r", "no")
    assert await asyncio.gather(*(mine.mark_as_done(f"many{number}", number) for number in range(5))) == [True] * 5
    assert await mine.mark_as_done("ever", 1, expires=0)
    await owner.save_group("m", owner.group(["m1", "m2"]))
    await mine.mark_as_done("m1", 1, TaskRequest(id="m1", group="m", group_index=0))
    await mine.mark_as_failure("m2", ValueError(), request=TaskRequest(id="m2", group="m", group_index=1))
    await mine.mark_as_done("m2", 1, TaskRequest(id="m2", group="m", group_index=1), expires=0)
    assert [step.done async for step in owner.group(["m1", "m2"], id="m").progress()][-1] == 2


async def runs(mine: Backend, owner: Backend) -> None:
    async with mine.running("run") as task:
        for number in range(3):
            await task.output.send(number)
            await task.output.flush()
        task.progress(1, 2)
        task.value = 3
    assert await owner.result("run") == 3
    for attempt in (1, 2):
        with contextlib.suppress(aioresult.Retry):
            async with mine.running("again") as task:
                await task.output.send(attempt)
                if attempt == 1:
                    raise aioresult.Retry("again")
    with contextlib.suppress(ValueError):
        async with mine.running("fails"):
            raise ValueError
    begun: asyncio.Queue[None] = asyncio.Queue()

    async def endless() -> None:
        begun.put_nowait(None)
        await asyncio.Event().wait()

    stopped = asyncio.create_task(mine.run("stopped", endless))
    revoked = asyncio.create_task(mine.run("revoked", endless))
    for _ in range(2):
        await begun.get()
    stopped.cancel()
    assert await owner.result("revoked").revoke("stop")
    with pytest.raises(aioresult.TaskRevokedError):
        await revoked
    await asyncio.wait([stopped])
    await owner.result("early").revoke("stop")
    with pytest.raises(aioresult.TaskRevokedError):
        await mine.run("early", asyncio.sleep, 0)
    async with mine.output("of another framework") as output:
        await output.send(1)
        await output.flush()
        await mine.append(output._flush_of(1, b""))  # what keeps it alive while nothing is sent


async def counts_for_chords(mine: Backend, owner: Backend) -> None:
    early = await mine.on_chord_part_return("x", "x1", "SUCCESS", 1, index=0)  # before the chord is created
    assert early is None
    await owner.create_chord(owner.group(["x1", "x2"], id="x"), "body")
    ready = await mine.on_chord_part_return("x", "x2", "SUCCESS", 2, index=1)
    assert ready is not None
    async with ready:
        assert ready.results == [1, 2]
    await owner.create_chord(owner.group(["y1"], id="y"), "body")
    ready = await mine.on_chord_part_return("y", "y1", "FAILURE", ValueError("no"), index=0)
    assert ready is not None
    with pytest.raises(aioresult.ChordError):
        async with ready:
            assert ready.results is None
    await owner.create_chord(owner.group(["z1"], id="z"), "body")
    ready = await mine.on_chord_part_return("z", "z1", "SUCCESS", 2, index=0)
    assert ready is not None
    with contextlib.suppress(KeyError):
        async with ready:
            raise KeyError
    assert await mine.mark_as_done("k", 1, TaskRequest(id="k", group="z", group_index=0, chord="body"))


async def manages(mine: Backend, owner: Backend) -> None:
    await mine.save_group("k", mine.group(["k1"]))
    await mine.mark_as_done("k1", 1)
    async with owner.running("k2") as task:
        await task.output.send(1)
    await mine.forget("k1")
    await mine.forget("k2")
    await mine.forget("nothing")
    await mine.delete_group("k")
    assert not await mine.exists("k1")
    assert not await mine.exists("k2")
    running = asyncio.create_task(owner.run("k3", asyncio.Event().wait))
    await asked(owner, WORKER_TOPIC + owner.liveness.worker)
    assert await mine.result("k3").revoke("stop")
    with pytest.raises(aioresult.TaskRevokedError):
        await running
    assert await mine.result("k4").revoke("stop")
    for _ in range(2):  # the second time over what is left of the first
        await mine.create_chord("d", "body")
        await mine.set_chord_size("d", 1)
        claimed = await owner.on_chord_part_return("d", "d1", "SUCCESS", 2, index=0)
        assert claimed is not None
        with contextlib.suppress(KeyError):
            async with claimed:
                raise KeyError  # so that it is left to a dispatcher
        async with contextlib.aclosing(mine.ready_chords()) as chords:
            async for ready in chords:
                async with ready:
                    pass
                if ready.id == "d":
                    break
    await mine.cleanup()


READER = [waits, reads_groups, awaits_chords, follows_a_task, looks_for_dead_workers]
STORER = [stores]
WORKER = [stores, runs, counts_for_chords, looks_for_dead_workers]
ROLES = {"reader": READER, "storer": STORER, "worker": WORKER, "admin": [*READER, *WORKER, manages]}


async def cannot_store(mine: Backend) -> None:
    await mine.mark_as_done("new", 1)


async def cannot_save(mine: Backend) -> None:
    await mine.save_group("theirs", mine.group(["a"]))


async def cannot_run(mine: Backend) -> None:
    await mine.run("theirs", asyncio.sleep, 0)


async def cannot_send(mine: Backend) -> None:
    async with mine.output("theirs") as output:
        await output.send(1)
        await output.flush()


async def cannot_create(mine: Backend) -> None:
    await mine.create_chord("theirs", "body")


async def cannot_count(mine: Backend) -> None:
    await mine.on_chord_part_return("theirs", "a", "SUCCESS", 1, index=0)


async def cannot_revoke(mine: Backend) -> None:
    await mine.result("theirs").revoke()


async def cannot_forget(mine: Backend) -> None:
    await mine.forget("theirs")


async def cannot_delete(mine: Backend) -> None:
    await mine.delete_group("theirs")


REFUSED: dict[str, list[Callable[[Backend], Awaitable[None]]]] = {
    "reader": [
        *(cannot_store, cannot_save, cannot_run, cannot_send, cannot_create, cannot_count, cannot_revoke),
        *(cannot_forget, cannot_delete),
    ],
    "storer": [cannot_run, cannot_send, cannot_create, cannot_count, cannot_revoke, cannot_forget, cannot_delete],
    "worker": [cannot_forget, cannot_delete],
    "admin": [],
}


async def does_its_work(role: str, mine: Backend, owner: Backend, caplog: pytest.LogCaptureFixture) -> None:
    for duty in ROLES[role]:
        await duty(mine, owner)
    assert caplog.messages == []


async def does_no_more(role: str, mine: Backend, owner: Backend) -> None:
    await owner.save_group("theirs", owner.group(["a"]))
    await owner.mark_as_done("theirs", 1)
    for attempt in REFUSED[role]:
        with pytest.raises(aioresult.BackendRefusedError):
            await attempt(mine)
    assert await owner.result("theirs") == 1
    assert await owner.restore_group("theirs") is not None


def acl_rules(prefix: str) -> dict[str, list[str]]:
    """For each user of the page, the words behind ``ACL SETUSER``, for a ``global_keyprefix``."""
    (block,) = shown("sh", "redis-cli ACL")
    return {
        user: [re.sub(r"([~&]\{?)(?=\w)", rf"\g<1>{prefix}", word) for word in words]
        for user, words in users_in(block).items()
    }


def users_in(block: str) -> dict[str, list[str]]:
    """For each user, the words behind ``ACL SETUSER``."""
    found = {}
    for line in block.replace("\\\n", " ").splitlines():
        setuser = re.fullmatch(r"redis-cli (?:-p 26379 )?ACL SETUSER (\w+) (.*)", line)
        assert setuser is not None, line
        found[setuser[1]] = shlex.split(setuser[2])
    return found


@pytest.fixture
async def redis_users(own_redis: RedisServer, redis_url: str, redis_client: Client) -> AsyncIterator[Client]:
    if urlsplit(redis_url).port != own_redis.port:
        pytest.skip("this Redis is not the tests' own, and its users are left alone")
    yield redis_client
    await redis_client.acl_deluser(*ROLES)
    await redis_client.acl_log_reset()


@pytest.mark.parametrize("prefix", ["", "shop_"])
@pytest.mark.parametrize("role", ROLES)
async def test_each_role_of_redis_does_its_work_and_no_more(
    redis_users: Client, redis_url: str, role: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    rules = acl_rules(prefix)
    assert rules.keys() == ROLES.keys()
    command: Any = redis_users.execute_command
    await command("ACL", "SETUSER", role, *rules[role])
    url = redis_url.replace("redis://", f"redis://{role}:password@")
    async with (
        aioresult.connect(redis_url, global_keyprefix=prefix) as owner,
        aioresult.connect(url, global_keyprefix=prefix) as mine,
    ):
        await redis_users.acl_log_reset()
        await does_its_work(role, mine, owner, caplog)
        assert await redis_users.acl_log() == []
        await does_no_more(role, mine, owner)

    async with redis.asyncio.Redis.from_url(url) as client:
        own, foreign = f"{prefix}celery-task-meta-theirs", "session:1"
        forbidden: list[tuple[str | int, ...]] = [("KEYS", "*"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("EVAL", "", 0)]
        forbidden += [("GET", foreign), ("SET", foreign, 1), ("PUBLISH", "news", 1), ("SUBSCRIBE", "news")]
        if role == "reader":
            script = await client.script_load("return redis.call('SET', KEYS[1], 'x')")
            forbidden += [("EVALSHA", script, 1, own), ("PUBLISH", own, "forged"), ("SET", own, "forged")]
        command = client.execute_command
        for words in forbidden:
            with pytest.raises(redis.ResponseError, match=r"permission|ACL failure"):
                await command(*words)


@contextlib.contextmanager
def users(rules: Mapping[str, Sequence[str]], nodes: Iterable[Node]) -> Iterator[Callable[[], list[Any]]]:
    """Give these users to all nodes. What it returns tells what the nodes have refused to anybody since."""
    with contextlib.ExitStack() as left:
        asks = [left.enter_context(node.asking()) for node in nodes]
        for ask in asks:
            ask("ACL", "LOG", "RESET")
            for user, words in rules.items():
                ask("ACL", "SETUSER", user, *words)
        try:
            yield lambda: [entry for ask in asks for entry in ask("ACL", "LOG")]
        finally:
            for ask in asks:
                ask("ACL", "DELUSER", *rules)


@pytest.mark.parametrize("role", ROLES)
async def test_each_role_of_a_cluster_does_its_work_and_no_more(
    own_cluster: RedisCluster, cluster_url: str, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With the rights of both pages."""
    (block,) = shown("sh", "redis-cli ACL SETUSER reader +ssubscribe", CLUSTER_PAGE)
    further = users_in(block)
    assert further.keys() == ROLES.keys()
    url = cluster_url.replace("://", f"://{role}:password@")
    with users({role: [*acl_rules("")[role], *further[role]]}, own_cluster.nodes) as refused:
        async with aioresult.connect(cluster_url) as owner, aioresult.connect(url) as mine:
            await does_its_work(role, mine, owner, caplog)
            assert refused() == []
            await does_no_more(role, mine, owner)
        key = "celery-task-meta-theirs"
        with own_cluster.master_of(slot_of("theirs")).client(username=role, password="password") as client:
            command: Any = client.execute_command
            assert command("ASKING")  # the backend sends it while a slot moves
            forbidden = [("GET", "session:1"), ("SPUBLISH", "news", 1), ("SSUBSCRIBE", "news"), ("CLUSTER", "NODES")]
            for words in [*forbidden, *([("SET", key, 1), ("SPUBLISH", key, 1)] if role == "reader" else [])]:
                with pytest.raises(redis.exceptions.NoPermissionError):
                    command(*words)


@pytest.mark.parametrize("role", ROLES)
async def test_each_role_behind_sentinel_does_its_work(
    own_sentinel: SentinelSetup, sentinel_url: str, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    (nodes,) = shown("sh", "redis-cli ACL SETUSER reader +role", CLUSTER_PAGE)
    (sentinels,) = shown("sh", "redis-cli -p 26379", CLUSTER_PAGE)
    further, watchers = users_in(nodes), users_in(sentinels)
    assert further.keys() == ROLES.keys()
    url = own_sentinel.service_url.replace("://", f"://{role}:password@")
    url += "?sentinel_username=watcher&sentinel_password=password"
    with (
        users({role: [*acl_rules("")[role], *further[role]]}, own_sentinel.nodes) as refused,
        users(watchers, own_sentinel.sentinels) as refused_by_sentinels,
    ):
        async with (
            aioresult.connect(sentinel_url, master_name=own_sentinel.master_name) as owner,
            aioresult.connect(url) as mine,
        ):
            await does_its_work(role, mine, owner, caplog)
            await until(partial(is_watched, own_sentinel))
        assert refused() == refused_by_sentinels() == []


def is_watched(setup: SentinelSetup) -> bool:
    """Whether a sentinel has confirmed the subscription of the user of the page."""
    clients = [line for node in setup.sentinels for line in node.ask("CLIENT", "LIST").splitlines()]
    return any(" user=watcher " in line and " sub=1 " in line and " cmd=ping " in line for line in clients)


@pytest.fixture
async def postgres_roles(postgres_url: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    admin = await asyncpg.connect(postgres_url)
    (statements,) = shown("sql", "CREATE ROLE")
    await PostgresBackend(postgres_url).create_schema()
    await admin.execute(statements)
    try:
        yield admin
    finally:
        for role in ROLES:
            await admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await admin.close()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.usefixtures("postgres_roles")
async def test_each_role_of_postgres_does_its_work_and_no_more(
    postgres_url: str, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = postgres_url.replace("postgres@", f"{role}:password@")
    async with aioresult.connect(postgres_url) as owner, aioresult.connect(url, create=False) as mine:
        await does_its_work(role, mine, owner, caplog)
        await does_no_more(role, mine, owner)
    connection = await asyncpg.connect(url)
    try:
        for statement in ("TRUNCATE celery_taskmeta", "DROP TABLE celery_taskmeta", "CREATE TABLE mine ()"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
    finally:
        await connection.close()
