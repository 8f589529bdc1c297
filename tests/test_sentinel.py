"""A master that sentinels replace, on real servers: the faults, what it takes to connect, and what is left behind."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote
from uuid import uuid4

import pytest
import trustme

import aioresult
from aioresult import Backend, BackendClosedError, BackendConnectionError, BackendRefusedError
from aioresult.backends.redis import SentinelBackend
from aioresult.backends.redis.connection import RedisConnection
from aioresult.backends.redis.sentinel import Sentinel
from aioresult.celery import backend_from_app
from aioresult.retry import Backoff
from aioresult.tasks import cancellable

from .celery_worker import app_with
from .cluster_servers import Node, SentinelNode, SentinelSetup, sentinel_setup
from .fault_proxy import FaultProxy, Wire
from .harness import until
from .servers import TcpProxy

pytestmark = [
    pytest.mark.xdist_group("sentinel"),
    pytest.mark.filterwarnings("ignore:Call to deprecated setex"),  # Celery 5.7 on redis-py 8
]

#: Seconds after which a wait has failed. A sentinel that was held up for two seconds replaces no master for thirty.
GUARD = 60
#: The name of the library's connections at the servers.
NAME = "of-the-library"
# Redis does not quote a password with spaces when a sentinel rewrites its file, and could not start with it again.
PASSWORDS = {"password": "of:the@data", "sentinel_password": "of:the@sentinels"}


@pytest.fixture(scope="module")
def shared() -> Iterator[SentinelSetup]:
    # Only a test has a master replaced, and not a busy machine.
    with sentinel_setup(down_after=30_000, **PASSWORDS) as setup:
        yield setup


@pytest.fixture
def setup(shared: SentinelSetup) -> SentinelSetup:
    shared.restore()
    shared.flush()
    return shared


def make(setup: SentinelSetup, **options: Any) -> SentinelBackend:
    """A backend whose connections have a name, and which notices nothing by silence within a test."""
    given: dict[str, Any] = {"heartbeat": 60, "connect_options": {"client_name": NAME}}
    given["sentinel_kwargs"] = {"client_name": NAME}
    backend = aioresult.connect(setup.service_url, **{**given, **options})
    assert isinstance(backend, SentinelBackend)
    return backend


def topology_of(backend: Backend) -> Sentinel:
    assert isinstance(backend, SentinelBackend)
    assert isinstance(backend._topology, Sentinel)
    return backend._topology


def connections(*nodes: Node) -> int:
    """How many connections of the library these servers have."""
    return sum(node.ask("CLIENT", "LIST").count(f" name={NAME} ") for node in nodes)


def watched(setup: SentinelSetup) -> list[SentinelNode]:
    """The sentinels whose announcements a backend waits for."""
    up = [sentinel for sentinel in setup.sentinels if sentinel.up]
    return [sentinel for sentinel in up if re.search(f" name={NAME} .* sub=1 ", sentinel.ask("CLIENT", "LIST"))]


def notice_soon(setup: SentinelSetup) -> None:
    """Have the sentinels replace a master that is away."""
    for sentinel in setup.sentinels:
        sentinel.ask("SENTINEL", "SET", setup.master_name, "down-after-milliseconds", 300)


@asynccontextmanager
async def ready(setup: SentinelSetup, **options: Any) -> AsyncIterator[SentinelBackend]:
    """A backend that waits for announcements."""
    async with make(setup, **options) as backend:
        await until(lambda: topology_of(backend)._watch is not None)
        yield backend


async def listening(backend: Backend, ids: list[str]) -> list[asyncio.Future[Any]]:
    """Waiters for these results, which are subscribed."""
    waiters: list[asyncio.Future[Any]] = [
        asyncio.ensure_future(backend.result(task_id).get(timeout=GUARD)) for task_id in ids
    ]
    node, channels = topology_of(backend).node, {f"celery-task-meta-{task_id}".encode() for task_id in ids}
    await until(lambda: node.listener is not None and node.listener.subscribed >= channels)
    return waiters


async def store(backend: Backend, ids: list[str]) -> None:
    await asyncio.gather(*(backend.mark_as_done(task_id, task_id) for task_id in ids))


def kept(node: Node, ids: list[str]) -> int:
    return int(node.ask("EXISTS", *(f"celery-task-meta-{task_id}" for task_id in ids)))


def names(word: str, count: int) -> list[str]:
    return [f"{word}-{number}" for number in range(count)]


# -- another master -------------------------------------------------------------------------------------------------


async def test_the_waiters_of_a_killed_master_are_woken_by_the_next_one(setup: SentinelSetup) -> None:
    ids = names("task", 1000)
    old = setup.master()
    notice_soon(setup)
    async with ready(setup) as worker, ready(setup) as web:
        waiters = await listening(web, ids)
        old.kill()
        await asyncio.gather(store(worker, ids), *waiters)
        new = await asyncio.to_thread(setup.wait_replaced, old)
        assert kept(new, ids) == len(ids)
        assert (worker.stats().connected, web.stats().connected) == (True, True)


async def test_a_master_steps_down_under_a_thousand_waiters(
    setup: SentinelSetup, caplog: pytest.LogCaptureFixture
) -> None:
    ids, late = names("task", 1000), names("late", 100)
    old = setup.master()
    async with ready(setup) as worker, ready(setup) as web:
        waiters = await listening(web, [*ids, *late])
        replacing = asyncio.create_task(asyncio.to_thread(setup.failover))
        for at in range(0, len(ids), 50):
            await store(worker, ids[at : at + 50])
        new = await replacing
        await store(worker, late)
        await asyncio.gather(*waiters)
        assert kept(new, late) == len(late)
        assert connections(old) == 0
    said = [record for record in caplog.records if record.getMessage().startswith("the sentinels have replaced")]
    assert len(said) == 2  # each backend says it one time
    assert f"'mymaster', redis://127.0.0.1:{old.port}, by redis://127.0.0.1:{new.port}" in said[0].getMessage()


@pytest.mark.parametrize("noticed", ["announced", "in doubt"])
async def test_nothing_is_stored_on_a_frozen_master_once_the_next_one_is_known(
    setup: SentinelSetup, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, noticed: str
) -> None:
    dropped: list[str] = []
    drop = RedisConnection.drop

    def noted(self: RedisConnection, error: aioresult.BackendError) -> None:
        dropped.append(str(error))
        drop(self, error)

    monkeypatch.setattr(RedisConnection, "drop", noted)
    options: dict[str, Any] = {}
    if noticed == "in doubt":
        for sentinel in setup.sentinels:  # this user may ask, and not subscribe
            sentinel.ask("ACL", "SETUSER", "blind", "on", "nopass", "+@all", "~*", "resetchannels")
        blind = {"username": "blind", "password": "any", "client_name": NAME}
        options = {"heartbeat": 3, "sentinel_kwargs": blind}
    connected = make if noticed == "in doubt" else ready
    in_flight, late = names("in-flight", 20), names("late", 200)
    old = setup.master()
    async with connected(setup, **options) as backend:
        waiters = await listening(backend, [*in_flight, *late])
        old.ask("CONFIG", "RESETSTAT")
        old.freeze()
        storing = asyncio.create_task(store(backend, in_flight))
        new = await asyncio.to_thread(setup.failover)
        await storing
        await store(backend, late)
        await asyncio.gather(*waiters)
        old.thaw()
        await asyncio.to_thread(setup.wait_ok)
        assert kept(new, [*in_flight, *late]) == 220
        ran = re.search(r"evalsha:calls=(\d+)", old.ask("INFO", "commandstats"))
        assert ran is None or int(ran[1]) <= len(in_flight)
    assert not [reason for reason in dropped if "has not answered" in reason]
    assert ("can be watched" in caplog.text) is (noticed == "in doubt")


async def test_an_attempt_to_connect_to_a_frozen_master_ends_when_another_takes_its_place(setup: SentinelSetup) -> None:
    endless = {"socket_timeout": None, "socket_connect_timeout": None, "client_name": NAME}
    old = setup.master()
    async with ready(setup, connect_options=endless) as backend:
        (waiter,) = await listening(backend, ["task"])
        node = topology_of(backend).node
        old.freeze()
        node.drop(BackendConnectionError("cut by the test"))
        storing = asyncio.create_task(backend.mark_as_done("task", 1))
        await until(lambda: node.connect.running)  # and the hub waits for one of the two connections
        await asyncio.to_thread(setup.failover)
        await storing
        assert await waiter == 1
        old.thaw()


async def test_the_two_connections_never_lead_to_two_servers(setup: SentinelSetup) -> None:
    """The listener is lost, and its next connection leads to another master, which nobody has announced."""
    old = setup.master()
    async with ready(setup) as backend:
        (waiter,) = await listening(backend, ["task"])
        topology = topology_of(backend)
        await topology._watcher.stop()
        await topology._checker.stop()
        old.freeze()
        await asyncio.to_thread(setup.failover)
        commands = topology.node.commands
        assert commands is not None
        assert topology.node.listener is not None
        assert not commands.closed
        topology.node.listener.drop(BackendConnectionError("cut by the test"))
        await until(lambda: commands.closed)
        await backend.mark_as_done("task", 1)
        assert await waiter == 1
        old.thaw()


async def test_a_master_that_became_a_replica_by_hand_is_left(setup: SentinelSetup) -> None:
    """Without sentinels that say so, the server's own word counts: READONLY, and its role."""
    old, other = setup.master(), setup.replicas()[0]
    async with ready(setup, retry_for=0) as backend:
        await backend.mark_as_done("a", 1)
        await topology_of(backend)._watcher.stop()
        old.ask("REPLICAOF", *other.address)
        with pytest.raises(BackendConnectionError):
            await backend.mark_as_done("b", 1)
        with pytest.raises(BackendConnectionError, match=f"{old.port} is not the master 'mymaster', but a slave"):
            await backend.mark_as_done("c", 1)
        old.ask("REPLICAOF", "NO", "ONE")
        await until(partial(_stored, backend, "d", 1))
    for sentinel in setup.sentinels:
        sentinel.ask("SENTINEL", "RESET", setup.master_name)


async def _stored(backend: Backend, task_id: str, value: object) -> bool:
    try:
        await backend.mark_as_done(task_id, value)
    except BackendConnectionError:
        return False
    return True


# -- sentinels that are away, or wrong ------------------------------------------------------------------------------


async def test_another_sentinel_is_watched_when_the_watched_one_dies(setup: SentinelSetup) -> None:
    async with ready(setup) as backend:
        (sentinel,) = watched(setup)
        sentinel.kill()
        await until(lambda: sentinel not in watched(setup) and len(watched(setup)) == 1)
        old = setup.master()
        old.freeze()
        await asyncio.to_thread(setup.failover)
        await backend.mark_as_done("task", 1)
        old.thaw()


async def test_without_sentinels_connections_stand_and_new_ones_wait(
    setup: SentinelSetup, caplog: pytest.LogCaptureFixture
) -> None:
    async with ready(setup) as backend:
        (waiter,) = await listening(backend, ["task"])
        for sentinel in setup.sentinels:
            sentinel.kill()
        await until(lambda: "no sentinel of redis+sentinel://" in caplog.text)
        await backend.mark_as_done("task", 1)
        assert await waiter == 1
        assert await backend.ping() > 0

        (waiter,) = await listening(backend, ["next"])
        topology_of(backend).node.drop(BackendConnectionError("cut by the test"))
        with pytest.raises(BackendConnectionError, match="no sentinel tells the address of master 'mymaster'"):
            await backend.ping()
        with pytest.raises(BackendConnectionError, match="no sentinel tells"):
            await make(setup).open()
        patient = make(setup, wait_for_server=GUARD)
        opening = asyncio.create_task(patient.open())
        storing = asyncio.create_task(backend.mark_as_done("next", 2))
        await until(lambda: "open() tries again" in caplog.text)
        assert not storing.done()
        for sentinel in setup.sentinels:
            sentinel.start()
        await asyncio.gather(storing, opening)
        assert await waiter == 2
        await patient.aclose()
        assert await backend.ping() > 0
        assert backend.stats().connected


async def test_without_a_quorum_calls_fail_and_waiters_wait(
    setup: SentinelSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, asked = setup.master(), []
    ask = Sentinel._ask

    async def noted(self: Sentinel, sentinel: tuple[str, int]) -> Any:
        asked.append((sentinel, asyncio.get_running_loop().time()))
        return await ask(self, sentinel)

    async with ready(setup, retry_for=0.3) as backend:
        (waiter,) = await listening(backend, ["task"])
        for sentinel in setup.sentinels[1:]:
            sentinel.kill()
        old.kill()
        monkeypatch.setattr(Sentinel, "_ask", noted)
        stores = [backend.mark_as_done(task_id, 1) for task_id in names("other", 1000)]
        outcomes = await asyncio.gather(*stores, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {BackendConnectionError}
        assert f"Connect call failed ('127.0.0.1', {old.port})" in str(outcomes[0])
        assert not waiter.done()
        # Twenty batches retry, and together they ask each sentinel ten times a second.
        times = [time for sentinel, time in asked if sentinel == setup.sentinels[0].address]
        assert len(times) > 2
        assert all(later - earlier > 0.09 for earlier, later in pairwise(times[1:]))
        assert not waiter.done()


@pytest.fixture
def stale(setup: SentinelSetup) -> Iterator[SentinelNode]:
    """A sentinel of nobody's, for which the replica is the master."""
    sentinel = SentinelNode(PASSWORDS["sentinel_password"])
    lines = [
        f"port {sentinel.port}",
        "bind 127.0.0.1",
        f"unixsocket {sentinel.socket}",
        f'requirepass "{sentinel.password}"',
        f"sentinel monitor {setup.master_name} 127.0.0.1 {setup.replicas()[0].port} 1",
    ]
    sentinel.conf.write_text("\n".join([*lines, ""]))
    sentinel.start()
    yield sentinel
    sentinel.remove()


def listing(setup: SentinelSetup, *sentinels: Node, query: str = "") -> str:
    """The URL of the master with these sentinels."""
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
    return _url(hosts, query=query)


def _url(hosts: str, scheme: str = "redis", database: int = 0, query: str = "", passwords: Any = None) -> str:
    given = {name: quote(value) for name, value in {**PASSWORDS, **(passwords or {})}.items()}
    secret = f"sentinel_password={given['sentinel_password']}"
    return f"{scheme}+sentinel://:{given['password']}@{hosts}/mymaster/{database}?{secret}{query}"


@pytest.mark.parametrize("others", [1, 3])
async def test_a_sentinel_that_names_a_replica_counts_as_away(
    setup: SentinelSetup, stale: SentinelNode, others: int
) -> None:
    url = listing(setup, stale, *setup.sentinels[:others])
    for _ in range(3):  # whichever answers first
        async with aioresult.connect(url) as backend:
            await backend.mark_as_done("task", 1)
    with pytest.raises(BackendConnectionError, match=f"{setup.replicas()[0].port} is not the master 'mymaster', but a"):
        await aioresult.connect(listing(setup, stale)).open()


async def test_a_sentinel_that_was_cut_off_does_not_lead_away_from_the_master(
    setup: SentinelSetup, stale: SentinelNode
) -> None:
    url = listing(setup, *setup.sentinels, stale)
    async with aioresult.connect(url, heartbeat=60) as backend:
        topology = topology_of(backend)
        await topology._watcher.stop()
        await topology._checker.stop()
        first = topology.node.commands
        assert first is not None
        for sentinel in setup.sentinels:
            sentinel.freeze()
        try:
            await topology._check()  # the one that answers names another server
        finally:
            for sentinel in setup.sentinels:
                sentinel.thaw()
        assert topology.node.commands is first
        assert not first.closed


async def test_an_announcement_that_fits_nothing_leads_to_a_question(setup: SentinelSetup) -> None:
    async with ready(setup) as backend:
        topology = topology_of(backend)
        await until(lambda: not topology._doubt.is_set() and not topology._find.running)
        connection = topology.node.commands
        topology._announced(b"+switch-master", b"other 127.0.0.1 1 127.0.0.1 2")
        assert not topology._doubt.is_set()
        topology._announced(b"+switch-master", b"mymaster 127.0.0.1 1 127.0.0.1 2")
        assert topology._doubt.is_set()
        await backend.mark_as_done("task", 1)
        assert topology.node.commands is connection


async def test_an_announcement_is_followed_at_once_and_the_server_is_asked_for_its_role(setup: SentinelSetup) -> None:
    old, other = setup.master().port, setup.replicas()[0].port
    async with ready(setup) as backend:
        topology = topology_of(backend)
        connection = topology.node.commands
        assert connection is not None
        topology._announced(b"+switch-master", f"mymaster 127.0.0.1 {old} 127.0.0.1 {other}".encode())
        assert connection.closed
        assert topology._address == ("127.0.0.1", other)
        await backend.mark_as_done("task", 1)  # it is a replica, so the sentinels are asked
        assert topology._address == ("127.0.0.1", old)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"+OK\r\n", "does not answer as a sentinel does"),
        (b"*2\r\n$1\r\na\r\n$1\r\n1\r\n", "does not answer as a sentinel does"),
        (b"-ERR unknown command 'SENTINEL'\r\n", "is no sentinel: .* port 26379"),
        (b"$-1\r\n", "watches no master 'mymaster'; check master_name"),
        (b"-IDONTKNOW what\r\n", "says: IDONTKNOW what"),
        (b"*1\r\n", "none answers within 3 s"),
    ],
    ids=["text", "no fields", "a Redis", "nothing", "an error", "silence"],
)
async def test_a_server_that_is_no_sentinel(answer: bytes, message: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line.startswith(b"*"):
                handshake = b"HELLO" in (await reader.readline(), await reader.readline())[1]
                writer.write(b"-ERR\r\n" if handshake else answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    options = {"protocol": 2, "lib_name": None, "lib_version": None}
    backend = aioresult.connect(f"redis+sentinel://127.0.0.1:{port}/mymaster", sentinel_kwargs=options)
    with pytest.raises(aioresult.BackendError, match=message):
        await backend.open()
    server.close()
    await server.wait_closed()


async def test_a_sentinel_that_hangs_up_at_once_is_not_asked_without_pause(
    setup: SentinelSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    class Noted(Backoff):
        def pause(self) -> float:
            pause = super().pause()
            if self._cap == 2.0:  # the one of the watch
                pauses.append(self._next)
                return 0
            return pause

    async def hang_up(wire: Wire, data: bytes, to_server: bool) -> AsyncIterator[bytes]:
        if b"+switch-master" in data and not to_server:
            yield data
            await asyncio.sleep(0)
            raise ConnectionAbortedError
        yield data

    monkeypatch.setattr("aioresult.backends.redis.sentinel.Backoff", Noted)
    async with FaultProxy(setup.sentinels[0].port) as proxy:
        proxy.behaviour = hang_up
        async with aioresult.connect(_url(f"127.0.0.1:{proxy.port}"), heartbeat=60) as backend:
            await until(lambda: proxy.cuts >= 7)
            await backend.mark_as_done("task", 1)
    assert pauses[5] == 2.0


# -- to connect -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3])
async def test_both_spellings_of_the_url_lead_to_a_database_of_the_master(setup: SentinelSetup, protocol: int) -> None:
    first, *others = setup.url.split(";")
    celerys = ";".join([f"{first}/3?protocol={protocol}", *others])
    kwargs = {"password": PASSWORDS["sentinel_password"], "protocol": protocol}
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in setup.sentinels)
    async with (
        aioresult.connect(celerys, master_name="mymaster", sentinel_kwargs=kwargs, min_other_sentinels=2) as worker,
        aioresult.connect(_url(hosts, database=3, query=f"&protocol={protocol}")) as web,
    ):
        assert worker.store_id == web.store_id
        (waiter,) = await listening(web, ["task"])
        await worker.mark_as_done("task", "value")
        assert await waiter == "value"
        assert await web.ping() > 0
    with setup.master().client(db=3) as client:
        assert client.keys() == [b"celery-task-meta-task"]


@pytest.mark.parametrize(
    ("options", "passwords", "kind", "message"),
    [
        ({"master_name": "wrong"}, {}, BackendRefusedError, r"watches no master 'wrong'; check master_name"),
        (
            {"min_other_sentinels": 3},
            {},
            BackendConnectionError,
            "knows 2 other sentinels, and min_other_sentinels is 3",
        ),
        ({}, {"password": "s3cr3t"}, BackendRefusedError, "refuses: .*password"),
        ({"connect_options": {"password": None}}, {}, BackendRefusedError, "refuses: .*authenticated"),
        ({}, {"sentinel_password": "s3cr3t"}, BackendRefusedError, r"sentinel://.* refuses: .*sentinel_kwargs"),
        ({"sentinel_kwargs": {"password": None}}, {}, BackendRefusedError, r"sentinel://.* refuses: .*sentinel_kwargs"),
    ],
    ids=[
        "no such master",
        "too few others",
        "password",
        "no password",
        "sentinels' password",
        "no sentinels' password",
    ],
)
async def test_what_is_wrong_is_said_by_name_and_without_a_password(
    setup: SentinelSetup, options: dict[str, Any], passwords: dict[str, str], kind: type[Exception], message: str
) -> None:
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in setup.sentinels)
    backend = aioresult.connect(_url(hosts, passwords=passwords), **options)
    with pytest.raises(kind, match=message) as caught:
        await backend.open()
    assert "s3cr3t" not in f"{caught.value!r} {caught.value.__cause__!r} {backend!r}"
    assert all(quote(secret) not in str(caught.value) for secret in PASSWORDS.values())


class Front(TcpProxy):
    """A proxy on another address than 127.0.0.1."""

    def __init__(self, target_port: int, host: str) -> None:
        super().__init__(target_port)
        self._host = host

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self._host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no ::1")
async def test_servers_with_ipv6_addresses(setup: SentinelSetup) -> None:
    master = setup.master()
    async with Front(setup.sentinels[0].port, "::1") as sentinel, Front(master.port, "::1") as front:
        remap = {f"127.0.0.1:{master.port}": f"[::1]:{front.port}"}
        async with aioresult.connect(_url(f"[::1]:{sentinel.port}"), address_remap=remap) as backend:
            (waiter,) = await listening(backend, ["task"])
            await backend.mark_as_done("task", 1)
            assert await waiter == 1
        assert front.accepted == 2


async def test_tls_to_all_servers_with_names_and_a_failover(setup: SentinelSetup, tmp_path: Path) -> None:
    """The certificates are for names, and sentinels name addresses: ``address_remap`` gives the names."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    async with (
        TcpProxy(setup.sentinels[0].port, context) as sentinel,
        TcpProxy(setup.nodes[0].port, context) as first,
        TcpProxy(setup.nodes[1].port, context) as second,
    ):
        fronts = {setup.nodes[0].port: first, setup.nodes[1].port: second}

        def remap(address: tuple[str, int]) -> tuple[str, int]:
            return "localhost", fronts[address[1]].port

        url = _url(f"localhost:{sentinel.port}", "rediss", query=f"&ssl_ca_certs={tmp_path / 'ca'}")
        # A sentinel closes the connections to the server that it promotes. The proxy cannot pass that on within TLS.
        async with aioresult.connect(url, address_remap=remap, heartbeat=1) as backend:
            await until(lambda: topology_of(backend)._watch is not None)
            (waiter,) = await listening(backend, ["task"])
            new = await asyncio.to_thread(setup.failover)
            await until(lambda: topology_of(backend)._address == ("localhost", fronts[new.port].port))
            await backend.mark_as_done("task", 1)
            assert await waiter == 1
            assert kept(new, ["task"]) == 1
        with pytest.raises(BackendRefusedError, match="certificate"):
            await aioresult.connect(_url(f"localhost:{sentinel.port}", "rediss")).open()


async def test_an_address_remap_that_fails_for_the_next_master(
    setup: SentinelSetup, caplog: pytest.LogCaptureFixture
) -> None:
    old = setup.master()

    def remap(address: tuple[str, int]) -> tuple[str, int]:
        if address[1] != old.port:
            raise LookupError(address)
        return address

    async with ready(setup, address_remap=remap, retry_for=0) as backend:
        await asyncio.to_thread(setup.failover)
        await until(lambda: "cannot follow the sentinels" in caplog.text)
        topology_of(backend).node.drop(BackendConnectionError("cut by the test"))
        with pytest.raises(aioresult.ImproperlyConfigured, match="address_remap raised LookupError"):
            await backend.mark_as_done("task", 1)
    assert "will be restarted" not in caplog.text


async def test_results_that_celerys_own_backend_stores(setup: SentinelSetup) -> None:
    transport = {"master_name": "mymaster", "sentinel_kwargs": {"password": PASSWORDS["sentinel_password"]}}
    first, *others = setup.url.split(";")
    url = ";".join([f"{first}/2", *others])
    with app_with(url, result_backend_transport_options=transport) as app:
        task_id = str(uuid4())
        async with backend_from_app(app) as backend:
            assert type(backend) is SentinelBackend
            (waiter,) = await listening(backend, [task_id])
            await asyncio.to_thread(app.backend.store_result, task_id, ["of", "Celery"], "SUCCESS")
            assert await waiter == ["of", "Celery"]
            await backend.mark_as_done("ours", 1)
            assert (await asyncio.to_thread(app.AsyncResult("ours").get, timeout=GUARD)) == 1


# -- what is left behind --------------------------------------------------------------------------------------------


async def test_one_connection_at_the_sentinels_and_none_after_the_end(setup: SentinelSetup) -> None:
    master, *_ = servers = [setup.master(), *setup.replicas(), *setup.sentinels]
    async with ready(setup) as backend:
        await until(lambda: connections(*setup.sentinels) == 1)
        assert connections(*setup.nodes) == connections(master) == 1
        (waiter,) = await listening(backend, ["task"])
        assert connections(*setup.nodes) == connections(master) == 2
        await backend.mark_as_done("task", 1)
        await waiter
        assert connections(*servers) == 3
        assert len(watched(setup)) == 1
    await until(lambda: connections(*servers) == 0)
    assert watched(setup) == []


async def test_a_backend_that_nobody_uses_does_not_ask_for_ever_after_a_lost_connection(
    setup: SentinelSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled = asyncio.Event()

    class Noted(Backoff):
        def reset(self) -> None:
            settled.set()  # the questions are over

    async with ready(setup) as backend:
        topology = topology_of(backend)
        await topology._checker.stop()
        monkeypatch.setattr("aioresult.backends.redis.sentinel.Backoff", Noted)
        commands = topology.node.commands
        assert commands is not None
        setup.master().ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await until(lambda: commands.closed)
        checking = asyncio.create_task(topology._keep_checking())
        await settled.wait()
        checking.cancel()
        await backend.mark_as_done("task", 1)
    await asyncio.wait([checking])


async def _open(backend: SentinelBackend, setup: SentinelSetup) -> Awaitable[Any]:
    for sentinel in setup.sentinels:
        sentinel.freeze()
    opening = asyncio.create_task(backend.open())
    await until(lambda: topology_of(backend)._find.running)
    return opening


async def _lose(backend: SentinelBackend, setup: SentinelSetup) -> Awaitable[Any]:
    await backend.open()
    await listening(backend, ["task"])
    for sentinel in setup.sentinels:
        sentinel.freeze()
    topology = topology_of(backend)
    topology.node.drop(BackendConnectionError("cut by the test"))
    storing = asyncio.create_task(backend.mark_as_done("task", 1))
    await until(lambda: topology._find.running and topology.node.connect.running)
    return storing


async def _connect(backend: SentinelBackend, setup: SentinelSetup) -> Awaitable[Any]:
    setup.master().freeze()
    opening = asyncio.create_task(backend.open())
    await until(lambda: topology_of(backend).node.connect.running and topology_of(backend)._address is not None)
    return opening


@pytest.mark.parametrize("busy", [_open, _lose, _connect], ids=["opening", "asking", "connecting"])
@pytest.mark.parametrize("how", ["closed", "cancelled"])
async def test_a_backend_closes_while_it_is_busy(
    setup: SentinelSetup, busy: Callable[..., Awaitable[Awaitable[Any]]], how: str
) -> None:
    backend = make(setup)
    call = asyncio.ensure_future(await busy(backend, setup))
    if how == "cancelled":
        call.cancel()
    else:
        await backend.aclose()
    for node in (*setup.nodes, *setup.sentinels):
        if not node.up:
            node.thaw()
    with pytest.raises(asyncio.CancelledError if how == "cancelled" else BackendClosedError):
        await call
    await backend.aclose()
    await until(lambda: connections(*setup.nodes, *setup.sentinels) == 0)


async def test_an_attempt_that_swallows_its_cancellation_is_cancelled_again() -> None:
    """On Python 3.11, redis-py does so now and then, and goes on with its handshake."""
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while swallowed < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed += 1
        await asyncio.Event().wait()

    call = asyncio.create_task(cancellable(stubborn()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert swallowed == 2
