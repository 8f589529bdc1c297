"""The parts of Redis Cluster that need no server, or only one that lies; TLS; and what a quiet cluster can show."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import hiredis
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot as slot_by_redis_py

import aioresult
from aioresult import BackendConnectionError, BackendRefusedError
from aioresult.backends.redis import ClusterBackend
from aioresult.backends.redis.connection import Command
from aioresult.backends.redis.listener import RedisListener, encoded
from aioresult.backends.redis.slots import SLOTS, SlotMap, best_map, key_slot, parse_address, parse_map, units
from aioresult.backends.redis.topology import alone
from aioresult.exceptions import BackendClosedError, BackendError
from aioresult.retry import Backoff
from aioresult.waiter import SingleWaiter

from .cluster_servers import RedisCluster, slot_of
from .harness import until
from .servers import TcpProxy

Address = tuple[str, int]

# -- slots -----------------------------------------------------------------------------------------------------------

#: Texts with braces in all sorts of places.
TEXTS = st.text(alphabet="{}ab\x00é€", max_size=12)


@given(TEXTS)
def test_slots_are_those_of_redis_py(text: str) -> None:
    assert key_slot(text) == key_slot(text.encode()) == slot_by_redis_py(text.encode())


def test_slots_are_those_of_the_server(own_cluster: RedisCluster) -> None:
    chance = random.Random(random.getrandbits(64))
    texts = ["", "{}", "{a}", "a{b}c{d}", "{}{a}", "{{a}}", "}{", "a}b{c", "{a", "\x00", "é{€}"]
    texts += ["".join(chance.choices("{}abé", k=6)) for _ in range(200)]
    with own_cluster.nodes[0].asking() as ask:
        assert [ask("CLUSTER", "KEYSLOT", text) for text in texts] == list(map(key_slot, texts))


def test_commands_that_belong_together() -> None:
    commands: list[Command] = [
        ("MULTI",),
        ("XADD", "{a}.out", "1-1", "d", b"x"),
        ("SPUBLISH", "{a}.out", b"x"),
        ("EXEC",),
        ("GET", "b"),
        ("EVALSHA", "digest", 1, "c", "value"),
        ("TIME",),
    ]
    assert [(unit.start, unit.stop, unit.slot) for unit in units(commands)] == [
        (0, 4, key_slot("a")),
        (4, 5, key_slot("b")),
        (5, 7, key_slot("c")),
    ]
    assert [(unit.start, unit.stop) for unit in units([("PING",), ("GET", "a")])] == [(0, 2)]


ASKED = ("asked.example", 7000)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (b"10.0.0.1", "10.0.0.1"),
        (b"node-1.example", "node-1.example"),
        (b"::1", "::1"),
        (b"", "asked.example"),
        (None, "asked.example"),
        (b"?", "asked.example"),
    ],
    ids=["ip", "hostname", "ipv6", "empty", "null", "unknown"],
)
def test_hosts_that_nodes_name(host: bytes | None, expected: str) -> None:
    replica = [b"10.0.0.9", 7009, b"id"]
    said = [[0, 5, [host, 7001, b"id", [b"hostname", b"other.example"]], replica], [7, 9, [host, 7002, b"id", []]]]
    told = parse_map(said, b"cluster_state:ok\r\ncluster_current_epoch:12\r\n", ASKED, lambda address: address)
    assert told == SlotMap(((0, 5, (expected, 7001)), (7, 9, (expected, 7002))), 12)
    assert told.covered == 9
    remapped = parse_map(said, None, ASKED, lambda address: ("x", address[1] + 1))
    assert remapped == SlotMap(((0, 5, ("x", 7002)), (7, 9, ("x", 7003))), 0)
    if host is not None:
        assert parse_address(f"{host.decode()}:7001", ASKED) == (expected, 7001)


@pytest.mark.parametrize(
    "said",
    [
        None,
        5,
        [[0]],
        [[0, 5]],
        [[0, 5, b"x"]],
        [[0, 5, [b"h", b"port", b"id"]]],
        [[5, 0, [b"h", 1, b"id"]]],
        [[0, SLOTS, [b"h", 1, b"id"]]],
    ],
    ids=range(8),
)
def test_an_answer_without_sense_is_an_error(said: Any) -> None:
    with pytest.raises(BackendConnectionError, match="CLUSTER SLOTS"):
        parse_map(said, b"", ASKED, lambda address: address)


A, B, C = ("a", 1), ("b", 2), ("c", 3)


def whole(*owners: Address, epoch: int = 5) -> SlotMap:
    """Slots in equal parts."""
    share = SLOTS // len(owners)
    ends = [share * number for number in range(len(owners))] + [SLOTS]
    return SlotMap(tuple((ends[n], ends[n + 1] - 1, owner) for n, owner in enumerate(owners)), epoch)


NONE = SlotMap((), 0)
PART = SlotMap(whole(A, B, C).ranges[:2], 5)


@pytest.mark.parametrize(
    ("answers", "known", "best", "at_the_end"),
    [
        ([whole(A, B)], whole(A, C), 0, 0),  # another owner
        ([NONE], whole(A, B), None, None),  # of a node that was removed
        ([NONE, whole(A, B)], whole(A, B), 1, 1),
        ([PART], whole(A, B, C), None, None),  # fewer slots: perhaps the word of a node that is new
        ([PART, PART], whole(A, B, C), 0, 0),
        ([PART, whole(A, B, C)], whole(A, B, C), 1, 1),
        ([PART._replace(epoch=9), whole(A, B, C)], whole(A, B, C), 1, 1),
        ([NONE, NONE], whole(A), None, None),
        ([SlotMap(((0, 9, A),), 5)], whole(A), None, 0),  # the only master
        ([whole(A, B, epoch=4)], whole(A, C), None, None),  # it was cut off
        ([whole(A, B, epoch=4), whole(A, C, epoch=6)], whole(A, C), 1, 1),
        ([whole(A, B, epoch=2), whole(A, B, epoch=2)], whole(A, C), None, 0),  # another cluster at this place
        ([whole(A, B, epoch=2), whole(A, B, epoch=2), whole(A, C)], whole(A, C), 2, 2),
        ([whole(A, B, epoch=0)], whole(A, C), 0, 0),  # it does not say
        ([], whole(A), None, None),
    ],
    ids=range(15),
)
def test_the_answer_to_believe(
    answers: list[SlotMap], known: SlotMap, best: int | None, at_the_end: int | None
) -> None:
    for final, expected in ((False, best), (True, at_the_end)):
        assert best_map(answers, known, final) == (None if expected is None else answers[expected])
        assert best_map(answers[::-1], known, final) == (None if expected is None else answers[expected])


# -- a listener, against a model of the server -----------------------------------------------------------------------


class ModelServer:
    """A node, as a listener sees it: it deals with commands in order, and may lose the slot at any time."""

    def __init__(self, chance: random.Random, push: bool) -> None:
        self._chance, self._push = chance, push
        self._commands: list[list[bytes]] = []
        #: The subscriptions that the server has ended by itself, which the listener does not know yet.
        self._uninvited: list[bytes] = []
        self._reader = hiredis.Reader()
        self.owns = True
        self.subscribed: set[bytes] = set()
        #: How often the listener must have learned of each channel that its subscription has ended.
        self.ended: Counter[bytes] = Counter()
        self.sent = 0
        self._replies = b""

    # As the transport of the listener:

    def write(self, data: bytes) -> None:
        self._reader.feed(data)
        while (command := self._reader.gets()) is not False:
            self._commands.append(command)
            if command[0] == b"SUNSUBSCRIBE":
                self._uninvited = [channel for channel in self._uninvited if channel not in command]

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    # As the server:

    def _say(self, *words: bytes | int, push: bool = True) -> None:
        kind = b">" if self._push and push else b"*"
        parts = [b":%d\r\n" % word if isinstance(word, int) else b"$%d\r\n%s\r\n" % (len(word), word) for word in words]
        self._replies += b"%s%d\r\n%s" % (kind, len(words), b"".join(parts))

    def step(self) -> None:
        """Deal with the next command, or lose the slot, or get it back, or publish."""
        match self._chance.randrange(6):
            case 0 if self.owns:
                self.owns = False
                for channel in sorted(self.subscribed):
                    self.subscribed.discard(channel)
                    self._say(b"sunsubscribe", channel, len(self.subscribed))
                    asked = any(words[0] == b"SUNSUBSCRIBE" and channel in words for words in self._commands)
                    if not asked:
                        self._uninvited.append(channel)
            case 1:
                self.owns = True
            case 2 if self.subscribed:
                self._say(b"smessage", self._chance.choice(sorted(self.subscribed)), b"value")
                self.sent += 1
            case _ if self._commands:
                self._deal_with(self._commands.pop(0))

    def _deal_with(self, words: list[bytes]) -> None:
        name, *channels = words
        if name == b"PING" and (self._push or not self.subscribed):
            self._replies += b"$%d\r\n%s\r\n" % (len(channels[0]), channels[0])
        elif name == b"PING":
            self._say(b"pong", channels[0])
        elif not self.owns:
            self._replies += b"-MOVED 1 127.0.0.1:1\r\n"
        else:
            for channel in channels:
                getattr(self.subscribed, "add" if name == b"SSUBSCRIBE" else "discard")(channel)
                self._say(name.lower(), channel, len(self.subscribed))

    def flush(self, listener: RedisListener) -> None:
        """What was said arrives, in pieces."""
        self.ended.update(self._uninvited)
        self._uninvited.clear()
        cut = self._chance.randrange(len(self._replies) + 1)
        for piece in (self._replies[:cut], self._replies[cut:]):
            listener.data_received(piece)
        self._replies = b""

    @property
    def busy(self) -> bool:
        return bool(self._commands)


@pytest.mark.parametrize("push", [True, False], ids=["RESP3", "RESP2"])
async def test_a_listener_knows_what_is_subscribed_in_whatever_order_things_happen(push: bool) -> None:
    for _ in range(150):
        await _play(random.Random(random.getrandbits(64)), push)


async def _play(chance: random.Random, push: bool) -> None:
    server = ModelServer(chance, push)
    ended: Counter[bytes] = Counter()
    heard: list[bytes] = []
    listener = RedisListener("x", 1000, lambda channel, _: heard.append(channel), lambda c: ended.update([c]))
    listener._transport, listener.closed = server, False  # type: ignore[assignment]
    calls: list[asyncio.Task[Any]] = []

    async def subscribe(some: list[str]) -> None:
        _, missing = await listener.subscribe([("SSUBSCRIBE", *some)])
        assert {channel for _, channel in missing} == {c for c in some if encoded(c) not in listener.subscribed}

    for _ in range(40):
        some = chance.sample(["a", "b", "c"], chance.randint(1, 3))
        match chance.randrange(4):
            case 0:
                calls.append(asyncio.create_task(subscribe(some)))
            case 1:
                calls.append(asyncio.create_task(listener.unsubscribe([("SUNSUBSCRIBE", *some)])))
            case 2:
                server.step()
            case _:
                server.flush(listener)
                assert listener._behind or listener.subscribed == server.subscribed
        for _ in range(chance.randrange(3)):
            await asyncio.sleep(0)
    while server.busy or not all(call.done() for call in calls):
        server.step()
        server.flush(listener)
        await asyncio.sleep(0)
    await asyncio.gather(*calls)
    assert listener.subscribed == server.subscribed
    assert len(heard) == server.sent
    assert not listener._leaving
    # What the server ended by itself is news. It may be news, too, if a command was on its way to end it.
    assert all(ended[channel] >= times for channel, times in server.ended.items())


async def test_channels_of_which_one_is_refused_are_tried_in_one_round_trip() -> None:
    class Listener:
        begun = 0

        async def subscribe(self, commands: Sequence[Command]) -> tuple[list[Any], list[tuple[str, str]]]:
            self.begun += 1
            await until(lambda: self.begun == 3)
            ((command, channel),) = commands
            refused = [(str(command), str(channel))] if channel == "b" else []
            return [hiredis.ReplyError("NOPERM")] * len(refused), refused

    listener: Any = Listener()
    async with asyncio.timeout(5):
        assert list(await alone(listener, [("SUBSCRIBE", channel) for channel in "abc"])) == ["b"]


# -- hubs of several shards, against a model of the cluster ----------------------------------------------------------


VALUE = b'{"status": "SUCCESS", "result": 1, "traceback": null, "children": []}'


class ModelCluster:
    """Two masters, and all that a backend's topology does, at the speed that chance gives it."""

    def __init__(self, chance: random.Random, backend: ClusterBackend) -> None:
        self._chance, self._backend = chance, backend
        self.homes: list[int] = [0] * SLOTS
        self.moved: set[int] = set()
        #: Where each slot is: in truth. The table above learns of it later.
        self.owners: dict[int, int] = {}
        self.stored: dict[str, bytes] = {}
        self.subscribed: tuple[set[str], set[str]] = (set(), set())
        #: The masters that cannot be reached.
        self.away: set[int] = set()

    def doubt(self) -> None:
        pass

    def learn(self) -> None:
        """The table is as it is in truth."""
        for slot, owner in self.owners.items():
            if self.homes[slot] != owner:
                self.homes[slot] = owner
                self.moved.add(slot)

    def move(self, key: str) -> None:
        """The other master gets the slot, and the former ends its subscriptions."""
        slot = key_slot(key)
        former = self.owners.get(slot, 0)
        self.owners[slot] = 1 - former
        if self._chance.random() < 0.5:
            self.learn()
        for channel in [each for each in self.subscribed[former] if key_slot(each) == slot]:
            self.subscribed[former].discard(channel)
            self._backend._ended(channel.encode())

    def lose(self, node: int) -> None:
        """The connection to a master breaks."""
        channels = [channel.encode() for channel in self.subscribed[node]]
        self.subscribed[node].clear()
        self._backend._lost_by_node(None, BackendConnectionError("lost"), channels)  # type: ignore[arg-type]

    def store(self, key: str, value: bytes) -> None:
        self.stored[key] = value
        if key in self.subscribed[self.owners.get(key_slot(key), 0)]:
            self._backend._published(key.encode(), value)

    async def _pause(self) -> None:
        for _ in range(self._chance.randrange(4)):
            await asyncio.sleep(0)

    async def subscribe(self, channels: Sequence[str]) -> Mapping[str, BackendError] | None:
        await self._pause()
        if self._chance.random() < 0.1:
            raise BackendConnectionError("not now")
        if self.away.intersection(self.owners.get(key_slot(channel), 0) for channel in channels):
            self.learn()
            raise BackendConnectionError("away")
        for channel in channels:
            self.subscribed[self.owners.get(key_slot(channel), 0)].add(channel)
        self.learn()
        await self._pause()
        there = [self.owners.get(key_slot(channel), 0) for channel in channels]
        if any(channel not in self.subscribed[node] for channel, node in zip(channels, there, strict=True)):
            return await self.subscribe(channels)
        return None

    async def unsubscribe(self, channels: Sequence[str]) -> None:
        for node in self.subscribed:
            node.difference_update(channels)
        await self._pause()

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        await self._pause()
        found = [self.stored.get(str(command[1])) for command in commands]
        await self._pause()
        return found


async def test_no_wait_is_lost_between_the_hubs_of_two_shards() -> None:
    """Waiters come and go, slots move there and back, connections break: in any order."""
    # The first ones have found mistakes.
    for seed in (8, 334, 611, 691, *(random.getrandbits(64) for _ in range(120))):
        await _wait_and_move(random.Random(seed))


def _of_model(chance: random.Random) -> tuple[ClusterBackend, ModelCluster]:
    backend = ClusterBackend("redis+cluster://h")
    cluster = ModelCluster(chance, backend)
    backend._topology = cluster  # type: ignore[assignment]
    backend._loop = asyncio.get_running_loop()
    backend._shards = [backend._new_shard("0"), backend._new_shard("1")]
    for shard in backend._shards:
        shard.hub._backoff = Backoff(0, 0)
        shard.start()
    return backend, cluster


async def _close_model(backend: ClusterBackend) -> None:
    backend._loop = None
    for shard in backend._shards:
        await shard.close(BackendClosedError("closed"))


async def test_ids_whose_slots_moved_to_a_master_that_died_hold_up_no_others() -> None:
    backend, cluster = _of_model(random.Random(0))
    moved, stays, late = (SingleWaiter(task_id, None) for task_id in "abc")
    backend._shard_of("a").hub.watch("a", moved)
    backend._shard_of("b").hub.watch("b", stays)
    channels = {task_id: backend._channel(task_id) for task_id in "abc"}
    await until(lambda: cluster.subscribed[0] == {channels["a"], channels["b"]})
    # The master dies before the waiters of the slot have subscribed there.
    cluster.away.add(1)
    cluster.owners[key_slot(channels["a"])] = 1
    cluster.subscribed[0].discard(channels["a"])
    backend._ended(channels["a"].encode())
    backend._shard_of("c").hub.watch("c", late)
    await until(lambda: cluster.subscribed[0] == {channels["b"], channels["c"]})
    for task_id in "abc":
        cluster.store(channels[task_id], VALUE)
    await asyncio.wait_for(asyncio.gather(stays.future, late.future), 5)
    assert not moved.future.done()
    cluster.away.clear()
    await asyncio.wait_for(moved.future, 5)
    await until(lambda: cluster.subscribed == (set(), set()))
    await _close_model(backend)


async def _wait_and_move(chance: random.Random) -> None:
    backend, cluster = _of_model(chance)
    waiting: list[tuple[str, SingleWaiter]] = []
    for _ in range(60):
        task_id = chance.choice("ab")
        match chance.randrange(8):
            case 0 | 1:
                waiter = SingleWaiter(task_id, None)
                backend._shard_of(task_id).hub.watch(task_id, waiter, read_first=chance.random() < 0.5)
                waiting.append((task_id, waiter))
            case 2 if waiting:
                task_id, waiter = waiting.pop(chance.randrange(len(waiting)))
                backend._shard_of(task_id).hub.unwatch(task_id, waiter)
            case 3:
                cluster.move(backend._channel(task_id))
            case 4:
                cluster.learn()
            case 5:
                cluster.lose(chance.randrange(2))
            case _:
                for _ in range(chance.randrange(8)):
                    await asyncio.sleep(0)
    for task_id in "ab":
        cluster.store(backend._channel(task_id), VALUE)
    await asyncio.sleep(0)
    if unsettled := [waiter.future for _, waiter in waiting if not waiter.future.done()]:
        await asyncio.wait(unsettled, timeout=5)
    assert [task_id for task_id, waiter in waiting if not waiter.future.done()] == []
    await until(lambda: not any(shard.hub._to_unsubscribe or len(shard.hub) for shard in backend._shards))
    await until(lambda: cluster.subscribed == (set(), set()))
    await _close_model(backend)


# -- nodes that lie --------------------------------------------------------------------------------------------------


class FakeNode:
    """Speaks enough of the protocol to be asked. ``answer`` gives the reply to what only a test knows."""

    def __init__(self, answer: Callable[[list[bytes]], bytes]) -> None:
        self._answer = answer
        #: How often each command was asked for.
        self.asked: Counter[bytes] = Counter()
        #: What CLUSTER SLOTS says: the ports of the owners, of equal parts.
        self.owners: list[int] = []
        self.port = 0
        #: It takes connections, and says nothing.
        self.silent = False
        self.pong = b"+OK\r\n"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.owners = [self.port]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = hiredis.Reader()
        while data := await reader.read(65536):
            parser.feed(data)
            while (words := parser.gets()) is not False:
                self.asked[words[0]] += 1
                if not self.silent:
                    writer.write(self._reply(words))
        writer.close()

    def _reply(self, words: list[bytes]) -> bytes:
        match words:
            case [b"CLUSTER", b"SLOTS"]:
                said = b"*%d\r\n" % len(self.owners)
                for first, last, (_, port) in (
                    whole(*(("", port) for port in self.owners)).ranges if self.owners else ()
                ):
                    said += b"*3\r\n:%d\r\n:%d\r\n*2\r\n$0\r\n\r\n:%d\r\n" % (first, last, port)
                return said
            case [b"CLUSTER", b"INFO"]:
                return b"$25\r\ncluster_current_epoch:5\r\n\r\n"
            case [b"SPUBLISH", *_]:
                return b":0\r\n"
            case [b"PING", *_]:
                return self.pong
            case [b"SCRIPT" | b"CLIENT" | b"ASKING", *_]:
                return b"+OK\r\n"
        return self._answer(words)


def of_fakes(*nodes: FakeNode, **options: Any) -> ClusterBackend:
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
    backend = aioresult.connect(f"redis+cluster://{hosts}?protocol=2", **{"retry_for": 0, **options})
    assert isinstance(backend, ClusterBackend)
    return backend


@pytest.mark.parametrize("kind", [b"MOVED", b"ASK"])
async def test_nodes_that_redirect_in_a_circle(kind: bytes) -> None:
    """Each names the other. That ends, and the other commands of the batch are not touched by it."""

    def to(other: Callable[[], int]) -> Callable[[list[bytes]], bytes]:
        def answer(words: list[bytes]) -> bytes:
            if b"celery-task-meta-good" in words:
                return b":1\r\n"
            return b"-%s %d 127.0.0.1:%d\r\n" % (kind, slot_of("bad"), other())

        return answer

    first, second = FakeNode(to(lambda: second.port)), FakeNode(to(lambda: first.port))
    async with first, second:
        async with of_fakes(first, second, retry_for=0.2) as backend:
            bad = asyncio.create_task(backend.mark_as_done("bad", 1))
            assert await backend.mark_as_done("good", 1)
            with pytest.raises(BackendConnectionError, match="redirect 1 commands in a circle"):
                await bad
            assert first.asked[b"EVALSHA"] + second.asked[b"EVALSHA"] > 8


@pytest.mark.parametrize("said", [b"MOVED", b"MOVED 1", b"MOVED 1 nowhere", b"ASK 1 host:port", b"MOVED x 127.0.0.1:1"])
async def test_a_redirection_without_sense_is_an_error(said: bytes) -> None:
    async with FakeNode(lambda _: b"-%s\r\n" % said) as node, of_fakes(node) as backend:
        with pytest.raises(BackendConnectionError):
            await backend.mark_as_done("t", 1)


async def test_a_start_node_that_does_not_answer_is_not_waited_for() -> None:
    """However long a connection may take to be made."""
    async with FakeNode(lambda _: b":1\r\n") as silent, FakeNode(lambda _: b":1\r\n") as node:
        silent.silent = True
        patient = {"socket_connect_timeout": 1000, "socket_timeout": 1000}
        async with of_fakes(silent, node, connect_options=patient, heartbeat=1000) as backend:
            assert await backend.mark_as_done("t", 1)
            assert silent.asked


async def test_a_node_that_knows_no_slots_any_more_is_not_believed() -> None:
    async with FakeNode(lambda _: b":1\r\n") as first, FakeNode(lambda _: b":1\r\n") as second:
        first.owners = second.owners = [first.port, second.port]
        async with of_fakes(first, second) as backend:
            first.owners = []
            backend._topology.doubt()
            await until(lambda: first.asked[b"CLUSTER"] > 2 and not backend._topology._stale.is_set())
            assert len({await backend.mark_as_done(f"t{number}", 1) for number in range(50)}) == 1
            second.owners = []  # nobody knows any
            asked = second.asked[b"CLUSTER"]
            backend._topology.doubt()
            await until(lambda: second.asked[b"CLUSTER"] > asked + 2)
            assert await backend.mark_as_done("still", 1)
            assert len(backend._topology.owners()) == 2


async def test_a_master_that_left_while_it_failed_does_not_count_as_missing() -> None:
    loading = b"-LOADING\r\n"
    async with FakeNode(lambda words: b"$-1\r\n") as one, FakeNode(lambda words: loading) as two:
        one.owners = two.owners = [one.port, two.port]
        task_id = next(each for each in map(str, range(100)) if slot_of(each) >= SLOTS // 2)
        async with of_fakes(one, two) as backend:
            with pytest.raises(BackendConnectionError, match="LOADING"):
                await backend.get_task_meta(task_id)
            assert not backend.stats().connected
            one.owners = two.owners = [one.port]
            await until(lambda: backend.stats().connected)


async def test_a_join_does_not_wait_for_a_master_that_refuses_its_first_connection() -> None:
    done = b"$%d\r\n%s\r\n" % (len(VALUE), VALUE)
    async with FakeNode(lambda words: done) as one:
        async with FakeNode(lambda words: done) as gone:
            one.owners = [one.port, gone.port]
        here, there = (
            next(each for each in map(str, range(100)) if (slot_of(each) >= SLOTS // 2) is second)
            for second in (False, True)
        )
        async with of_fakes(one, heartbeat=60, retry_for=60) as backend, asyncio.timeout(5):
            both = backend.result(here), backend.result(there)
            assert await aioresult.wait(both, return_when=asyncio.FIRST_COMPLETED) == ({both[0]}, {both[1]})


async def test_a_credential_provider_that_fails_is_not_logged_by_asyncio(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeNode(lambda words: b"-ERR\r\n") as one, FakeNode(lambda words: b"-ERR\r\n") as two:
        one.owners = two.owners = [one.port, two.port]
        async with of_fakes(one, two) as backend:
            await backend.ping()
            tried = 0

            async def provide() -> Any:
                nonlocal tried
                tried += 1
                raise LookupError("no credentials")

            node = next(node for node in backend._topology.owners() if node.address[1] == two.port)
            node._new_link = provide
            node.drop(BackendConnectionError("cut by the test"))
            await until(lambda: tried > 2)
    gc.collect()
    assert "never retrieved" not in caplog.text


@pytest.mark.parametrize(
    ("pong", "error"),
    [(b"-BUSY a script\r\n", BackendConnectionError), (b"-NOPERM ping\r\n", BackendRefusedError)],
    ids=["busy", "refused"],
)
async def test_a_ping_that_one_master_refuses_is_an_error(pong: bytes, error: type[BackendError]) -> None:
    async with FakeNode(lambda words: b"-ERR\r\n") as one, FakeNode(lambda words: b"-ERR\r\n") as two:
        one.owners = two.owners = [one.port, two.port]
        async with of_fakes(one, two) as backend:
            await backend.ping()
            two.pong = pong
            with pytest.raises(error, match=str(two.port)):
                await backend.ping()


async def test_the_table_is_asked_for_ten_times_in_a_second_at_most() -> None:
    now = asyncio.get_running_loop().time
    async with FakeNode(lambda _: b":1\r\n") as node, of_fakes(node) as backend:
        before, began = node.asked[b"CLUSTER"], now()
        while (told := (node.asked[b"CLUSTER"] - before) // 2) < 6:
            backend._topology.doubt()
            await asyncio.sleep(0.001)
        assert told <= 1 + 10 * (now() - began)


async def test_every_so_often_the_table_is_asked_for_unless_that_is_off() -> None:
    async with FakeNode(lambda _: b":1\r\n") as node:
        async with of_fakes(node, topology_refresh=0.01) as often, of_fakes(node, topology_refresh=0) as never:
            asked = node.asked[b"CLUSTER"]
            await until(lambda: node.asked[b"CLUSTER"] > asked + 4)
            assert often._topology.owners()
            assert not never._topology._stale.is_set()


# -- TLS: a proxy that ends it before each node ----------------------------------------------------------------------


@pytest.fixture
async def fronts(own_cluster: RedisCluster, tmp_path: Path) -> AsyncIterator[dict[Address, Address]]:
    """Proxies for the nodes by their addresses. Each has a certificate for a name of its own alone."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    names = ("localhost", "127.0.0.1")
    async with contextlib.AsyncExitStack() as stack:
        found = {}
        for number, node in enumerate(own_cluster.originals):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            ca.issue_cert(names[number % 2]).configure_cert(context)
            front = await stack.enter_async_context(TcpProxy(node.port, context))
            found[node.address] = (names[number % 2], front.port)
        yield found


async def test_tls_with_a_name_for_each_node(
    own_cluster: RedisCluster, cluster_url: str, fronts: dict[Address, Address], tmp_path: Path
) -> None:
    ids = [own_cluster.ids_on(node, 1)[0] for node in own_cluster.masters()]
    host, port = fronts[own_cluster.nodes[0].address]
    url = f"rediss+cluster://{host}:{port}?ssl_ca_certs={tmp_path / 'ca.pem'}"
    async with aioresult.connect(url, address_remap=fronts) as backend:
        waiting = [asyncio.create_task(backend.result(task_id).get()) for task_id in ids]
        await until(lambda: backend.stats().subscriptions == len(ids))
        for task_id in ids:
            await backend.mark_as_done(task_id, task_id)
        assert await asyncio.gather(*waiting) == ids


async def test_tls_with_the_name_of_another_node_is_refused(
    own_cluster: RedisCluster, cluster_url: str, fronts: dict[Address, Address], tmp_path: Path
) -> None:
    """The other nodes are not affected."""
    right, wrong, _ = own_cluster.masters()
    swapped = {"localhost": "127.0.0.1", "127.0.0.1": "localhost"}
    host, port = fronts[wrong.address]
    remap = {**fronts, wrong.address: (swapped[host], port)}
    start = fronts[right.address]
    url = f"rediss+cluster://{start[0]}:{start[1]}?ssl_ca_certs={tmp_path / 'ca.pem'}"
    async with aioresult.connect(url, address_remap=remap) as backend:
        with pytest.raises(BackendRefusedError, match="certificate verify failed"):
            await backend.mark_as_done(own_cluster.ids_on(wrong, 1)[0], 1)
        assert await backend.mark_as_done(own_cluster.ids_on(right, 1)[0], 1)
