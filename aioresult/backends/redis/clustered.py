"""The backend for a Redis Cluster."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Unpack

import hiredis
from redis.asyncio.connection import AbstractConnection, SSLConnection

from ...chord import CHORD_TOPIC, READY_TOPIC
from ...exceptions import BackendError, BackendRefusedError
from ...log import OUTPUT_TOPIC
from ...progress import GROUP_TOPIC
from ...record import Record
from ...seconds import Seconds, checked_seconds
from ...tasks import all_of
from ..base import BackendOptions
from ..keyvalue import sibling
from ..shard import Shard
from .backend import RedisBackend
from .cluster import NUDGE, Cluster
from .connection import Command, code_of, translate
from .node import Node, NodeEvents
from .places import Address, checked_remap, cluster_place, place_url
from .scripts import SHARDED, Scripts
from .slots import key_slot

__all__ = ["ClusterBackend"]


class ClusterBackend(RedisBackend):
    """Keeps results in a Redis Cluster of Redis 7 or later, or of Valkey.

    The URL is ``redis+cluster://[user:password@]host1[:6379][,host2[:port]…]``, and ``rediss+cluster://`` for TLS. The
    hosts are some nodes of the cluster, from which the backend learns of the others. The query takes the same options
    as that of `RedisBackend`. Each master has its own hub and batches, so a dead master delays no caller of the others.
    docs/cluster.md says what a failover can lose.

    Further options beside those of `RedisBackend`:

    - ``address_remap``: a function, or a mapping, that replaces the address ``(host, port)`` that a node announces with
      the address to connect to.
    - ``topology_refresh``: every so many seconds the backend asks which node owns which keys, even if nothing has
      failed. 0 turns this off.

    Celery itself has no result backend for a cluster. Its workers can use ``aioresult.celery:ClusterBackend``.
    """

    _scripts: Scripts = SHARDED
    _topology: Cluster

    groups_apart = True
    # Celery's own script does not run on a cluster.
    chords_beside = False

    def __init__(
        self,
        url: str = "redis+cluster://",
        *,
        address_remap: Mapping[Any, Any] | Callable[[tuple[str, int]], tuple[str, int]] | None = None,
        topology_refresh: Seconds = 60.0,
        global_keyprefix: str = "",
        connect_options: Mapping[str, Any] | None = None,
        chord_ordered: bool = True,
        **options: Unpack[BackendOptions],
    ) -> None:
        self._remap = checked_remap(address_remap)
        self._topology_refresh = checked_seconds("topology_refresh", topology_refresh)
        super().__init__(
            url,
            global_keyprefix=global_keyprefix,
            connect_options=connect_options,
            chord_ordered=chord_ordered,
            **options,
        )

    def _read_url(self, url: str, given: Mapping[str, Any]) -> str:
        self._place = cluster_place(url, given)
        return url

    @property
    def store_id(self) -> Hashable:
        """Return what identifies the store: the class, the start nodes and the prefix."""
        return type(self), self._place.url, self._task_prefix

    def _new_topology(self) -> Cluster:
        return Cluster(
            self._place.start,
            self._new_node,
            self._remap,
            self._scripts,
            self._is_classic,
            self._topology_refresh,
            self._sharded_anew,
        )

    def _new_node(self, address: Address) -> Node:
        host, port = address

        async def link() -> AbstractConnection:
            return self._place.connection_class(**{**self._place.options, "host": host, "port": port})

        events = NodeEvents(self._published, self._lost_by_node, self._ended, lambda _: self._topology.doubt())
        return Node(self._shown(address), link, self.heartbeat, self._scripts, events)

    def _shown(self, address: Address) -> str:
        return place_url("rediss" if issubclass(self._place.connection_class, SSLConnection) else "redis", address)

    def _is_classic(self, channel: str) -> bool:
        """True for the channels on which scripts publish from other slots. These messages go to all nodes."""
        return channel == self._ready_channel or channel.startswith(self._worker_prefix)

    # -- shards -----------------------------------------------------------------------------------------------------

    def _shard_names(self) -> Sequence[str]:
        return [self._shown(address) for address in self._topology.shards]

    def _new_shard(self, where: str) -> Shard:
        return Shard(self, where, self._hand_over)

    def _hand_over(self, shard: Shard, topics: Sequence[str]) -> None:
        """Give those of the topics whose slots have moved to the hubs of the shards that own the slots now.

        Otherwise ``shard`` would wait for another master, which may be away.
        """
        if self._topology.moved and self._loop is not None:
            for topic in topics:
                self._give(topic, shard, self._owner_of(topic))

    def _give(self, topic: str, shard: Shard, owner: Shard) -> bool:
        """Move the waiters of a topic from one shard to another. False if they must stay."""
        if shard is owner or shard.is_changing(topic) or (moved := shard.hub.release(topic)) is None:
            return False
        owner.hub.adopt(topic, moved)
        return True

    def _shard_of(self, topic: str) -> Shard:
        return self._owner_of(topic, and_now=True)

    def _owner_of(self, topic: str, and_now: bool = False) -> Shard:
        """Return the shard of the topic's slot; ``and_now``, the shard that serves the topic now.

        What has begun at one shard ends there: a waiter is found there, and the changes of an id keep their order.
        """
        topology = self._topology
        slot = key_slot(self._channel(topic))
        owner = self._shards[topology.homes[slot]]
        if and_now and slot in topology.moved and not owner.is_busy_with(topic):
            for shard in self._shards:
                if shard.is_busy_with(topic):
                    return shard
        return owner

    def _is_away(self, shard: Shard) -> bool:
        return super()._is_away(shard) or self._topology.is_doubtful(self._shards.index(shard))

    def _sharded_anew(self) -> None:
        """Make a shard for each master that is new. Try again at once what waits for a master that was replaced."""
        for index, name in enumerate(self._shard_names() if self._shards else ()):
            if index == len(self._shards):
                self._shards.append(self._new_shard(name))
                if self._loop is not None:
                    self._shards[index].start()
            if self._topology.is_vacant(index):
                self._shards[index].health.connected = True  # its last master is not missed
            if self._shards[index].health.where != name:  # another node is the master
                self._shards[index].health.where = name
                self._shards[index].try_again()

    # -- messages, and the ends of subscriptions --------------------------------------------------------------------

    def _published(self, channel: bytes, value: bytes) -> None:
        if value != NUDGE:
            super()._published(channel, value)
            return
        for topic in self._topics_of(channel):
            if topic.startswith(OUTPUT_TOPIC):
                self._output_news(topic.removeprefix(OUTPUT_TOPIC), 0, 0, None)
            elif topic.startswith(GROUP_TOPIC):
                self._group_news(topic.removeprefix(GROUP_TOPIC))
            else:
                self.read_again(topic)

    def _topics_of(self, channel: bytes) -> list[str]:
        """Return the topics that have this channel."""
        topics = [self._routes[channel]] if channel in self._routes else []
        name = channel.decode("utf-8", "surrogateescape")
        if name.startswith(self._task_prefix):
            topics.append(name.removeprefix(self._task_prefix))
        elif name.startswith(self._group_prefix):
            topics.append(CHORD_TOPIC + name.removeprefix(self._group_prefix))
        elif name == self._ready_channel:
            topics.append(READY_TOPIC)
        return topics

    def _ended(self, channel: bytes) -> None:
        """Subscribe again, because the node that owned the channel's slot has ended the subscription."""
        self._topology.doubt()
        self._lose([channel], None)

    def _lost_by_node(self, node: Node, reason: BackendError, channels: Sequence[bytes]) -> None:
        self._lose(channels, reason)

    def _lose(self, channels: Iterable[bytes], reason: BackendError | None) -> None:
        """Have the topics of these channels subscribed again, each by the hub of the shard that owns it now.

        Without a ``reason``, the connection on which they were subscribed is still open.
        """
        if self._loop is None:
            return
        lost: dict[Shard, list[str]] = {}
        moved = self._topology.moved
        for channel in channels:  # there may be 100,000 of them, and the event loop waits meanwhile
            slot = key_slot(channel)
            shard = owner = self._shards[self._topology.homes[slot]]
            for topic in self._topics_of(channel):
                if slot in moved:
                    shard = self._shard_of(topic)
                if shard is owner or not self._give(topic, shard, owner):
                    lost.setdefault(shard, []).append(topic)
        for shard, some in lost.items():
            if reason is None:
                shard.hub.lost(some, outage=False)
            else:
                shard.listener_lost(reason, some)

    async def _unsubscribe(self, task_ids: Sequence[str]) -> None:
        if not self._topology.moved:
            await super()._unsubscribe(task_ids)
            return
        # After a slot was moved, the hub of another shard may wait for an id that this hub gives up.
        await super()._unsubscribe([topic for topic in task_ids if not self._shard_of(topic).hub.inherit(topic)])
        self._note_routes([topic for topic in task_ids if self._shard_of(topic).hub.has_waiters(topic)])

    # -- commands ---------------------------------------------------------------------------------------------------

    async def _ping(self) -> None:
        """Every master must answer."""
        owners = self._topology.owners()
        answers = await all_of(node.request([("PING",)]) for node in owners)
        for node, ((reply,), refused) in zip(owners, answers, strict=True):
            if refused:
                raise translate(reply, node.where)

    async def _execute_in_turn(self, first: Sequence[Command], then: Sequence[Command]) -> list[Any]:
        if first:  # other nodes may execute them
            for reply in await self._execute(first):
                if isinstance(reply, hiredis.ReplyError):
                    raise self._refusal(reply, BackendError, "add to the list of chords")
        return await self._execute(then)

    async def _keep_group_of(self, task_id: str, group_id: str, expires: float) -> None:
        # The group may be in another shard, which must not hold up the steps of this one.
        self._shard_of(CHORD_TOPIC + group_id).extensions.submit(
            Record(task_id, b"", expires, False, group_id, False, None, False)
        )

    def _chord_key(self, group_key: str, suffix: str) -> str:
        """Return the name of a further key of a chord. Unlike Celery's name, it is in the slot of the group's key."""
        return sibling(group_key, suffix)

    def _refusal(self, reply: hiredis.ReplyError, kind: type[BackendError], what: str) -> BackendError:
        if code_of(reply) == "CROSSSLOT" or "non local key" in str(reply):
            return BackendRefusedError(
                f"cannot {what}: a Redis Cluster cannot keep its keys on one node, because the id or the prefix has a "
                f"brace '}}' but no hash tag '{{…}}'; use another id"
            )
        return super()._refusal(reply, kind, what)
