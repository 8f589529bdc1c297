"""What is specific to the Redis backend: its connections, its URLs, its replies, and how it bears their loss."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
import trustme
from redis.asyncio.connection import Connection

import aioresult
from aioresult import (
    Backend,
    BackendConnectionError,
    BackendGetMetaError,
    BackendRefusedError,
    BackendStoreError,
    ImproperlyConfigured,
)
from aioresult.backends.keyvalue import Op, Write
from aioresult.backends.redis import RedisBackend
from aioresult.backends.redis.connection import RedisConnection, take_over

from .harness import commands_of, until
from .servers import RedisServer, TcpProxy, redis_server

Client = redis.asyncio.Redis


@pytest.fixture
async def backend(redis_url: str) -> AsyncIterator[Backend]:
    async with aioresult.connect(redis_url) as backend:
        yield backend


@pytest.fixture
async def proxy(own_redis: RedisServer, redis_url: str) -> AsyncIterator[TcpProxy]:
    async with TcpProxy(own_redis.port) as proxy:
        yield proxy


@asynccontextmanager
async def through(proxy: TcpProxy, **options: Any) -> AsyncIterator[RedisBackend]:
    """A backend behind the proxy, quick to notice and to recover."""
    backend = RedisBackend(f"redis://127.0.0.1:{proxy.port}/0", **{"heartbeat": 0.2, **options})
    async with backend:
        yield backend


async def subscribed(client: Client, count: int) -> None:
    async def holds() -> bool:
        return len(await client.pubsub_channels()) == count

    await until(holds)


async def calls(client: Client) -> dict[str, int]:
    """How often the server has run each command."""
    stats: dict[str, dict[str, int]] = await client.info("commandstats")
    return {name.removeprefix("cmdstat_"): values["calls"] for name, values in stats.items()}


async def library_connections(client: Client) -> int:
    return len(await client.client_list()) - 1  # less the client that asks


# -- cost -----------------------------------------------------------------------------------------------------------


async def test_ten_thousand_waiters_cost_two_connections_and_nothing_while_they_wait(
    backend: Backend, redis_client: Client
) -> None:
    threads = threading.active_count()
    waiters = [asyncio.ensure_future(backend.result(f"id-{number}").get()) for number in range(10_000)]
    await subscribed(redis_client, 10_000)
    assert await library_connections(redis_client) == 2
    assert threading.active_count() == threads

    await until(lambda: not backend._shards[0].hub._to_subscribe)  # the read that follows the last subscription
    await backend.get_task_meta("done when everything before it is")
    await redis_client.config_resetstat()
    woken = backend.result("one more")
    await asyncio.gather(backend.mark_as_done("one more", 1), woken)
    seen = await calls(redis_client)
    assert set(seen) <= {"config|resetstat", "info", "ping", "get", "subscribe", "unsubscribe", "evalsha"} | LUA
    assert seen["get"] <= 2  # all of them for the one more: those who wait ask for nothing

    for waiter in waiters:
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    await subscribed(redis_client, 0)
    assert len(backend._shards[0].hub) == 0


#: What the script that stores runs inside the server.
LUA = {"getrange", "set", "publish"}


async def test_handles_cost_no_io(backend: Backend, redis_client: Client) -> None:
    await redis_client.config_resetstat()
    for number in range(100_000):
        backend.result(f"id-{number}")
    assert set(await calls(redis_client)) <= {"config|resetstat", "info", "ping"}
    assert len(backend._shards[0].hub) == 0


async def test_a_join_of_finished_results_takes_few_round_trips_and_no_subscription(
    backend: Backend, redis_client: Client, trips: list[int]
) -> None:
    await asyncio.gather(*(backend.mark_as_done(f"id-{number}", number) for number in range(10_000)))
    trips.clear()
    await redis_client.config_resetstat()
    assert await backend.group(f"id-{number}" for number in range(10_000)) == list(range(10_000))
    assert len(trips) <= 36
    assert max(trips) <= 500
    assert "subscribe" not in await calls(redis_client)


async def test_concurrent_stores_share_round_trips(backend: Backend, trips: list[int]) -> None:
    await asyncio.gather(*(backend.mark_as_done(f"id-{number}", number) for number in range(1_000)))
    assert sum(trips) == 1_000 + len(trips)  # a PING before each; see `_WAITERS_FIRST`
    assert len(trips) == 20


async def test_a_backend_that_only_stores_has_one_connection(backend: Backend, redis_client: Client) -> None:
    await backend.mark_as_done("a", 1)
    assert await library_connections(redis_client) == 1


async def test_close_leaves_no_connection(redis_url: str, redis_client: Client) -> None:
    async with aioresult.connect(redis_url) as backend:
        waiter = asyncio.ensure_future(backend.wait_for("a"))
        await subscribed(redis_client, 1)
    with pytest.raises(aioresult.BackendClosedError):
        await waiter

    async def gone() -> bool:
        return await library_connections(redis_client) == 0

    await until(gone)


# -- the wire -------------------------------------------------------------------------------------------------------


async def test_the_stored_bytes_and_the_message_are_celerys(backend: Backend, redis_client: Client) -> None:
    async with redis_client.pubsub() as pubsub:
        await pubsub.subscribe("celery-task-meta-a")
        assert (await pubsub.get_message(timeout=10))["type"] == "subscribe"
        await backend.mark_as_done("a", {"b": [1, "é"]})
        message = await pubsub.get_message(timeout=10)
    stored = await redis_client.get("celery-task-meta-a")
    assert isinstance(stored, bytes)
    assert message["data"] == stored
    assert stored.startswith(b'{"status": "SUCCESS", "result": {"b": [1, "\\u00e9"]}, "traceback": null, "children"')
    assert list(json.loads(stored)) == ["status", "result", "traceback", "children", "date_done", "task_id"]


@pytest.mark.parametrize(("prefix", "key"), [("app", "app_celery"), ("app:", "app:celery"), ("app-", "app-celery")])
async def test_a_prefix_goes_before_every_key_and_channel(
    redis_url: str, redis_client: Client, prefix: str, key: str
) -> None:
    async with aioresult.connect(redis_url, global_keyprefix=prefix) as backend:
        waiter = asyncio.ensure_future(backend.wait_for("a"))
        await subscribed(redis_client, 1)
        assert await redis_client.pubsub_channels() == [f"{key}-task-meta-a".encode()]
        await backend.mark_as_done("a", 1)
        assert (await waiter).result == 1
        await backend.group(["a"], "g").save()
        keys = f"{key}-task-meta-a", f"{key}-taskset-meta-g", f"{{{key}-taskset-meta-g}}.n"
        assert set(await redis_client.keys()) == {each.encode() for each in keys}


async def test_a_result_of_another_kind_of_key_is_an_error_that_says_so(backend: Backend, redis_client: Client) -> None:
    await redis_client.lpush("celery-task-meta-a", "x")
    with pytest.raises(BackendGetMetaError, match="WRONGTYPE"):
        await backend.get_task_meta("a")
    with pytest.raises(BackendStoreError, match="WRONGTYPE"):
        await backend.mark_as_done("a", 1)


# -- URLs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["?protocol=2", "?protocol=3", "?client_name=web&socket_connect_timeout=3"])
async def test_options_in_the_query(redis_url: str, redis_client: Client, query: str) -> None:
    async with aioresult.connect(redis_url + query) as backend:
        waiter = asyncio.ensure_future(backend.wait_for("a"))
        await subscribed(redis_client, 1)
        await backend.mark_as_done("a", 1)
        assert (await waiter).result == 1


@pytest.mark.parametrize("form", ["unix://{}?db=3", "redis+socket://{}?virtual_host=3", "redis+socket://{}?db=3"])
async def test_unix_sockets_with_a_database_number(own_redis: RedisServer, redis_client: Client, form: str) -> None:
    async with aioresult.connect(form.format(own_redis.socket)) as backend:
        await backend.mark_as_done("a", 1)
    async with Client.from_url(f"redis://127.0.0.1:{own_redis.port}/3") as third:
        assert await third.exists("celery-task-meta-a")
        await third.flushdb()
    assert not await redis_client.exists("celery-task-meta-a")


@pytest.fixture
async def user(redis_client: Client) -> AsyncIterator[str]:
    """An account whose name and password need escaping; as it stands in a URL."""
    await redis_client.acl_setuser(
        "b@b:/", enabled=True, passwords=["+p@ss:/?#w ord%"], keys=["*"], channels=["*"], commands=["+@all"]
    )
    yield "b%40b%3A%2F:p%40ss%3A%2F%3F%23w%20ord%25"
    await redis_client.acl_deluser("b@b:/")


@pytest.mark.parametrize("protocol", [2, 3])
async def test_an_acl_user_with_an_odd_password(own_redis: RedisServer, user: str, protocol: int) -> None:
    async with aioresult.connect(f"redis://{user}@127.0.0.1:{own_redis.port}/0?protocol={protocol}") as backend:
        assert await backend.mark_as_done("a", 1)
        assert "ord" not in repr(backend)


async def test_a_wrong_password_is_refused_at_once_and_shown_nowhere(own_redis: RedisServer, user: str) -> None:
    wrong = user.replace("ord", "s3cr3t")
    with pytest.raises(BackendRefusedError, match="invalid username-password pair") as caught:
        await aioresult.connect(f"redis://{wrong}@127.0.0.1:{own_redis.port}/0").open()
    shown = f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"
    assert "s3cr3t" not in shown


async def test_a_password_without_its_colon_is_told_of_the_colon(own_redis: RedisServer) -> None:
    with pytest.raises(BackendRefusedError, match=r"username-password .*write redis://:password@host") as caught:
        await aioresult.connect(f"redis://s3cr3t@127.0.0.1:{own_redis.port}/0").open()
    assert "s3cr3t" not in f"{caught.value!r} {caught.value.__cause__!r}"


async def test_a_permission_missing_to_subscribe_fails_the_waiters_at_once(
    own_redis: RedisServer, redis_client: Client
) -> None:
    """Invariant 7: an error that a retry cannot mend."""
    await redis_client.acl_setuser(
        "deaf", enabled=True, passwords=["+x"], keys=["*"], commands=["+@all", "-subscribe"], channels=["*"]
    )
    try:
        async with aioresult.connect(f"redis://deaf:x@127.0.0.1:{own_redis.port}/0") as backend:
            with pytest.raises(BackendRefusedError, match="NOPERM"):
                await backend.result("a")
            await backend.mark_as_done("a", 1)
            assert await backend.result("a") == 1  # what is there needs no subscription
    finally:
        await redis_client.acl_deluser("deaf")


@pytest.mark.parametrize(
    "url",
    ["redis://h/no-number", "redis://h:port/0", "redis://h/0?protocol=x", "redis://h/0?no_such=1", "redis://h/0?db=x"],
)
def test_a_url_that_makes_no_sense_says_which(url: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="redis://h"):
        aioresult.connect(url)


async def test_a_server_that_is_down_is_told_at_once() -> None:
    async with TcpProxy(1) as nobody:
        nobody.refuse()
        with pytest.raises(BackendConnectionError, match=f"redis://127.0.0.1:{nobody.port}"):
            await aioresult.connect(f"redis://127.0.0.1:{nobody.port}/0").open()


async def test_a_server_that_is_no_redis_is_told_as_such() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(BackendRefusedError, match=f"127.0.0.1:{port}.*Protocol error"):
            await aioresult.connect(f"redis://127.0.0.1:{port}/0").open()


# -- TLS: a proxy that ends it in front of the plain server ---------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> tuple[trustme.CA, Path]:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    return ca, tmp_path / "ca.pem"


def tls_front(server: RedisServer, ca: trustme.CA) -> TcpProxy:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    return TcpProxy(server.port, context)


async def test_tls_with_a_certificate_that_is_right(
    own_redis: RedisServer, redis_client: Client, authority: tuple[trustme.CA, Path]
) -> None:
    ca, path = authority
    async with tls_front(own_redis, ca) as front:
        async with aioresult.connect(f"rediss://localhost:{front.port}/0?ssl_ca_certs={path}") as backend:
            waiter = asyncio.ensure_future(backend.wait_for("a"))
            await subscribed(redis_client, 1)
            await backend.mark_as_done("a", "x" * 1_000_000)
            assert len((await waiter).result) == 1_000_000


async def test_tls_with_a_certificate_of_nobody_is_refused(
    own_redis: RedisServer, redis_url: str, authority: tuple[trustme.CA, Path]
) -> None:
    ca, _ = authority
    async with tls_front(own_redis, ca) as front:
        with pytest.raises(BackendRefusedError, match="certificate verify failed"):
            await aioresult.connect(f"rediss://localhost:{front.port}/0").open()
        async with aioresult.connect(f"rediss://localhost:{front.port}/0?ssl_cert_reqs=CERT_NONE") as backend:
            assert await backend.mark_as_done("a", 1)


async def test_tls_on_one_side_only_is_told_which_scheme_to_write(
    own_redis: RedisServer, authority: tuple[trustme.CA, Path]
) -> None:
    with pytest.raises(BackendConnectionError, match=r"if the server has no TLS, .*write redis://"):
        await aioresult.connect(f"rediss://localhost:{own_redis.port}/0?socket_connect_timeout=0.2").open()
    async with tls_front(own_redis, authority[0]) as front:
        with pytest.raises(aioresult.BackendError, match=r"if the server uses TLS, write rediss://"):
            await aioresult.connect(f"redis://localhost:{front.port}/0").open()
    with pytest.raises(BackendConnectionError) as caught:
        await aioresult.connect("rediss://127.0.0.1:1/0").open()  # where nothing listens
    assert "TLS" not in str(caught.value)


@pytest.mark.parametrize("requirement", ["required", ssl.CERT_REQUIRED, ssl.CERT_NONE, None])
async def test_tls_with_a_certificate_of_another_host(
    own_redis: RedisServer, redis_url: str, authority: tuple[trustme.CA, Path], requirement: ssl.VerifyMode | str | None
) -> None:
    ca, path = authority
    options = {"ssl_ca_certs": str(path), "ssl_cert_reqs": requirement}
    async with tls_front(own_redis, ca) as front:
        backend = aioresult.connect(f"rediss://127.0.0.1:{front.port}/0", connect_options=options)
        if requirement in (ssl.CERT_NONE, None):
            async with backend:
                assert await backend.mark_as_done("a", 1)
        else:
            with pytest.raises(BackendRefusedError, match=r"certificate is not valid for '127\.0\.0\.1'"):
                await backend.open()


# -- loss: of a connection, of the peer, of the server --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pubsub", "normal"])
async def test_a_killed_connection_loses_no_result(redis_url: str, redis_client: Client, kind: str) -> None:
    async with aioresult.connect(redis_url) as web, aioresult.connect(redis_url) as worker:
        waiters = [asyncio.ensure_future(web.result(f"id-{number}").get()) for number in range(100)]
        await subscribed(redis_client, 100)
        for number in range(100):
            await redis_client.client_kill_filter(_type=kind, skipme=True)
            await worker.mark_as_done(f"id-{number}", number)
        assert await asyncio.gather(*waiters) == list(range(100))


async def test_a_result_stored_while_the_listener_is_away_is_found_when_it_returns(
    proxy: TcpProxy, redis_url: str, redis_client: Client
) -> None:
    async with through(proxy) as web, aioresult.connect(redis_url) as worker:
        waiter = asyncio.ensure_future(web.result("a").get())
        await subscribed(redis_client, 1)
        proxy.refuse()
        proxy.cut()
        await subscribed(redis_client, 0)
        await worker.mark_as_done("a", 42)
        proxy.refuse(False)
        assert await waiter == 42


async def test_a_dead_peer_is_noticed_and_replaced(
    proxy: TcpProxy, redis_url: str, redis_client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant 9: nothing is closed, nothing is reset, bytes just vanish."""
    async with through(proxy) as web, aioresult.connect(redis_url) as worker:
        waiter = asyncio.ensure_future(web.result("a").get())
        await subscribed(redis_client, 1)
        proxy.stall()
        await worker.mark_as_done("a", 42)
        await until(lambda: "has not answered" in caplog.text)
        proxy.resume()
        assert await waiter == 42


async def test_silence_is_questioned_one_heartbeat_after_the_last_word(redis_url: str) -> None:
    """And not at the beat after that: three heartbeats are all that a dead peer gets."""
    async with RedisBackend(redis_url, heartbeat=60) as backend:
        await backend.exists("a")
        connection = commands_of(backend)
        assert connection is not None
        connection._beat()
        assert connection._timer is not None
        assert connection._timer.when() == connection._heard_at + 60


async def test_a_server_that_only_sends_late_is_not_taken_for_dead(
    proxy: TcpProxy, redis_client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    async with through(proxy, heartbeat=0.1) as backend:
        waiter = asyncio.ensure_future(backend.result("a").get())
        await subscribed(redis_client, 1)
        before = (await calls(redis_client)).get("ping", 0)

        async def pinged() -> bool:
            return (await calls(redis_client)).get("ping", 0) >= before + 6

        await until(pinged)
        assert proxy.accepted == 2
        await backend.mark_as_done("a", 42)
        assert await waiter == 42


async def test_the_command_connection_is_checked_too(proxy: TcpProxy, redis_url: str, redis_client: Client) -> None:
    async with through(proxy) as backend:
        proxy.stall()
        reading = asyncio.ensure_future(backend.get_task_meta("a"))
        await until(lambda: commands_of(backend).closed)
        proxy.resume()
        assert (await reading).status == "PENDING"


async def test_a_slow_subscription_beside_fast_commands_misses_nothing(
    own_redis: RedisServer, proxy: TcpProxy, redis_url: str, redis_client: Client
) -> None:
    """The result is stored between the first look and a confirmation that comes late."""
    async with aioresult.connect(redis_url) as worker, through(proxy, heartbeat=5) as web:
        fast = commands_of(web)
        proxy.delay = 0.1
        waiters = [asyncio.ensure_future(web.result(f"id-{number}").get()) for number in range(50)]
        await subscribed(redis_client, 50)  # the server's side of it; the confirmation is still on its way
        assert commands_of(web) is fast
        await asyncio.gather(*(worker.mark_as_done(f"id-{number}", number) for number in range(50)))
        assert await asyncio.gather(*waiters) == list(range(50))


async def test_replies_in_single_bytes(own_redis: RedisServer) -> None:
    connection = RedisConnection("here", 5)
    await connection.connect(Connection(host="127.0.0.1", port=own_redis.port))
    receive = connection.data_received

    def trickle(data: bytes) -> None:
        for index in range(len(data)):
            receive(data[index : index + 1])

    connection.data_received = trickle  # type: ignore[method-assign]
    ok, value, error = await connection.request([("SET", "k", b"v" * 100), ("GET", "k"), ("NOSUCH",)])
    assert (ok, value) == (b"OK", b"v" * 100)
    assert "unknown command" in str(error)
    await connection.close()


async def test_a_subscriber_disconnected_for_its_output_buffer_gets_its_results_all_the_same(
    own_redis: RedisServer, redis_url: str, redis_client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    await redis_client.config_set("client-output-buffer-limit", "pubsub 100kb 0 0")
    try:
        async with aioresult.connect(redis_url) as web, aioresult.connect(redis_url) as worker:
            waiters = [asyncio.ensure_future(web.result(f"id-{number}").get()) for number in range(20)]
            await subscribed(redis_client, 20)
            await asyncio.gather(*(worker.mark_as_done(f"id-{number}", "x" * 2**20) for number in range(20)))
            assert {len(value) for value in await asyncio.gather(*waiters)} == {2**20}
            assert "the listener" in caplog.text  # which tells of each loss
    finally:
        await redis_client.config_set("client-output-buffer-limit", "pubsub 33554432 8388608 60")


async def test_a_restart_of_the_server_loses_no_result() -> None:
    with redis_server("--appendonly", "yes", "--appendfsync", "always") as server:
        async with aioresult.connect(server.url) as web, aioresult.connect(server.url) as worker:
            await worker.mark_as_done("before", 1)
            waiter = asyncio.ensure_future(web.result("after").get())
            async with Client.from_url(server.url) as client:
                await subscribed(client, 1)
            server.stop()
            storing = asyncio.ensure_future(worker.mark_as_done("after", 2))  # while it is down
            reading = asyncio.ensure_future(web.result("before").get())
            await asyncio.to_thread(server.start)
            assert await storing
            assert await waiter == 2
            assert await reading == 1


async def test_a_long_outage_fails_calls_and_not_waiters() -> None:
    with redis_server() as server:
        async with aioresult.connect(server.url, retry_for=0.2) as backend:
            waiter = asyncio.ensure_future(backend.result("a").get())
            async with Client.from_url(server.url) as client:
                await subscribed(client, 1)
            server.stop()
            with pytest.raises(BackendConnectionError):
                await backend.mark_as_done("a", 1)
            with pytest.raises(BackendConnectionError):
                await backend.get_task_meta("a")
            assert not waiter.done()
            await asyncio.to_thread(server.start)
            await backend.mark_as_done("a", 2)
            assert await waiter == 2


async def test_only_the_first_to_register_an_id_did_so(backend: Backend) -> None:
    assert [await backend.mark_as_pending("a") for _ in range(2)] == [True, False]


# -- replies that say no --------------------------------------------------------------------------------------------


async def test_scripts_flushed_from_the_server_are_loaded_again(backend: Backend, redis_client: Client) -> None:
    await redis_client.script_flush()
    assert await asyncio.gather(*(backend.mark_as_done(str(number), number) for number in range(10))) == [True] * 10


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that are stored through a batch, and not at once."""
    keys: list[str] = []
    write = RedisBackend._write

    async def noted(self: RedisBackend, writes: Sequence[Write]) -> list[bool | BaseException]:
        keys.extend(each.key.removeprefix("celery-task-meta-") for each in writes)
        return await write(self, writes)

    monkeypatch.setattr(RedisBackend, "_write", noted)
    return keys


async def test_who_stores_alone_takes_the_short_way(backend: Backend, long_way: list[str]) -> None:
    waiting = asyncio.ensure_future(backend.result("b").get())
    assert await backend.mark_as_done("a", 1)
    assert await backend.mark_as_done("b", 2)
    assert await waiting == 2
    assert await backend.mark_as_done("b", 3) is False
    assert await backend.mark_as_pending("b") is False
    assert long_way == ["a"]
    assert (await backend.get_task_meta("b")).result == 2


async def test_a_member_of_a_group_takes_the_long_way(backend: Backend, long_way: list[str]) -> None:
    await backend.mark_as_done("a", 1)
    await backend.mark_as_done("b", 2, aioresult.TaskRequest(id="b", group="g"))
    assert long_way == ["a", "b", "celery-taskset-meta-g"]


@pytest.mark.parametrize("options", [{"compression": "zlib"}, {"serializer": "pickle", "accept": ("json", "pickle")}])
async def test_what_the_script_cannot_judge_takes_the_long_way(
    redis_url: str, long_way: list[str], options: dict[str, Any]
) -> None:
    async with aioresult.connect(redis_url, **options) as backend:
        await backend.mark_as_started("a")
        await backend.mark_as_started("b")
    assert long_way == ["a", "b"]


async def test_two_stores_of_an_id_keep_their_order_whichever_way_they_take(
    backend: Backend, redis_url: str, long_way: list[str]
) -> None:
    """The first is sent at once, and has to be done over, for what is stored is compressed."""
    async with aioresult.connect(redis_url, compression="zlib") as other:
        for number in range(20):
            task_id = f"t{number}"
            await other.mark_as_pending(task_id)
            await backend.mark_as_done("alone", 1)
            starting = asyncio.ensure_future(backend.mark_as_started(task_id))
            await asyncio.gather(starting, backend.mark_as_failure(task_id, KeyError(number)))
            assert await backend.result(task_id).state() == "FAILURE"
    assert {f"t{number}" for number in range(20)} <= set(long_way)


async def test_the_short_way_keeps_account_of_outages(backend: RedisBackend, redis_client: Client) -> None:
    def down_since() -> float | None:
        return backend._shards[0].persistence.down_since

    await backend.mark_as_done("a", 1)
    backend._shards[0].persistence.not_reached(BackendConnectionError("away"))
    await backend.mark_as_done("b", 1)
    assert down_since() is None
    before = asyncio.get_running_loop().time()
    storing = asyncio.ensure_future(backend.mark_as_done("c", 1))
    await asyncio.sleep(0)
    commands_of(backend).connection_lost(None)
    await asyncio.sleep(0)
    assert (down_since() or 0) >= before
    assert await storing


@pytest.mark.parametrize("trouble", ["no script", "compressed", "lost"])
async def test_what_fails_on_the_short_way_is_stored_all_the_same(
    proxy: TcpProxy, redis_url: str, redis_client: Client, long_way: list[str], trouble: str
) -> None:
    def cut(data: bytes, to_server: bool) -> bytes:
        if trouble == "lost" and b"EVALSHA" in data:
            proxy.filter = None
            proxy.cut()
            return b""
        return data

    async with through(proxy) as backend:
        await backend.mark_as_done("a", 1)
        if trouble == "no script":
            await redis_client.script_flush()
        elif trouble == "compressed":
            async with aioresult.connect(redis_url, compression="zlib") as other:
                await other.mark_as_started("b")
        else:
            proxy.filter = cut
        assert await backend.mark_as_done("b", 2)
        assert long_way[-1] == "b"
        assert (await backend.get_task_meta("b")).result == 2


async def test_out_of_memory_is_told_to_the_storer_and_nothing_is_stored(
    backend: Backend, redis_client: Client
) -> None:
    await redis_client.config_set("maxmemory", "1")
    try:
        with pytest.raises(BackendStoreError, match="OOM"):
            await backend.mark_as_done("a", 1)
    finally:
        await redis_client.config_set("maxmemory", "0")
    assert not await backend.exists("a")


async def test_out_of_memory_refuses_nothing_that_needs_no_memory(backend: Backend, redis_client: Client) -> None:
    """A store that is repeated after its reply was lost is told what became of it."""
    await backend.store_result("a", 1, "SUCCESS")
    stored: Any = await redis_client.get("celery-task-meta-a")
    await redis_client.config_set("maxmemory", "1")
    try:
        again = Write("celery-task-meta-a", Op.PUT_UNLESS_SUCCESS, stored, 60)
        assert await backend._write([again]) == [True]  # type: ignore[attr-defined]
        assert await backend.mark_as_failure("a", KeyError("late")) is False
        assert await backend.mark_as_pending("a") is False
    finally:
        await redis_client.config_set("maxmemory", "0")


async def test_a_server_busy_with_a_script_is_waited_for(
    own_redis: RedisServer, backend: Backend, redis_client: Client
) -> None:
    await redis_client.config_set("busy-reply-threshold", "1")
    looping = asyncio.ensure_future(redis_client.eval("while true do end", 0))
    try:
        async with Client.from_url(own_redis.url) as other:

            async def busy() -> bool:
                try:
                    await other.ping()
                except redis.exceptions.ResponseError as exc:
                    return "BUSY" in str(exc)
                return False

            await until(busy)
            storing = asyncio.ensure_future(backend.mark_as_done("a", 1))
            await other.script_kill()
        assert await storing
        with pytest.raises(redis.exceptions.ResponseError):
            await looping
    finally:
        await redis_client.config_set("busy-reply-threshold", "5000")


async def test_a_replica_is_left_for_the_next_connection(redis_client: Client) -> None:
    """After a failover the old master answers READONLY: the name may lead to the new one by the next attempt."""
    with redis_server() as server:
        async with aioresult.connect(server.url) as backend, Client.from_url(server.url) as client:
            await client.replicaof("127.0.0.1", 1)  # a master that never answers
            first = commands_of(backend)
            storing = asyncio.ensure_future(backend.mark_as_done("a", 1))
            await until(lambda: first.closed)
            await client.replicaof("NO", "ONE")
            assert await storing


# -- redis-py -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusing", [True, False])
async def test_whoever_is_cancelled_while_connecting_ends_whatever_the_server_says(
    own_redis: RedisServer, refusing: bool
) -> None:
    """Up to Python 3.11 a cancellation that meets the outcome in the same turn of the loop can be lost on the way."""
    async with TcpProxy(own_redis.port) as proxy:
        proxy.refuse(refusing)
        met = 0
        for turns in range(40):
            for _ in range(10):
                connection = RedisConnection("here", 5)
                connecting = asyncio.create_task(connection.connect(Connection(port=proxy.port)))
                for _ in range(turns):
                    await asyncio.sleep(0)
                if connecting.cancel():
                    met += 1
                    with pytest.raises(asyncio.CancelledError):
                        await connecting
                    assert connection.closed
                else:
                    await asyncio.gather(connecting, return_exceptions=True)
                    await connection.close()
        assert met > 50


async def test_redis_py_still_has_what_the_take_over_needs(own_redis: RedisServer) -> None:
    """Fails when redis-py renames its one private attribute that we need; `take_over` is the place to mend."""
    link = Connection(host="127.0.0.1", port=own_redis.port)
    with pytest.raises(BackendRefusedError, match="redis-py"):
        take_over(link, asyncio.Protocol())
    await link.connect()  # type: ignore[no-untyped-call]
    protocol = asyncio.Protocol()
    transport = take_over(link, protocol)
    assert transport.get_protocol() is protocol
    await link.disconnect(nowait=True)


async def test_a_reply_that_nobody_asked_for_ends_the_connection(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    connection = RedisConnection("here", 5)
    await connection.connect(Connection(host="127.0.0.1", port=own_redis.port))
    asking = asyncio.ensure_future(connection.request([("BLPOP", "nothing", 0)]))
    await asyncio.sleep(0)
    connection.data_received(b"?nonsense\r\n")
    with pytest.raises(BackendConnectionError, match="protocol"):
        await asking
    await connection.close()
    assert caplog.get_records("call") == [] or caplog.records[0].levelno < logging.ERROR
