"""`Cluster`: the topology of a Redis Cluster. It has a table of which node owns which slot, and keeps the table true.

A command goes to the owner of its key's slot. If the owner has changed, the node asked says so (MOVED), or names the
node to ask this time (ASK); the commands then go there. Subscriptions are made at the owner, too. If the owner changes,
the server ends them, and the hub subscribes and reads again. So each waiter is subscribed at a node that owned the slot
when the node confirmed the subscription, and is read there after that.

The table changes at once when a node says MOVED. Anything suspicious makes `_keep_fresh` ask other masters for their
tables: a lost connection, a server that does not answer, a slot without an owner. A node that owns no slot any more is
left at once: nobody waits for it.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import hiredis

from ...exceptions import BackendConnectionError, BackendError
from ...retry import Backoff
from ...tasks import EMPTY, StandingTask, all_of, spawn
from .asking import ask, ask_in_turn, ask_several, refuse_if_old
from .connection import WAITERS_FIRST, Command, RedisConnection, code_of, is_transient, translate
from .listener import RedisListener, encoded
from .node import Node
from .places import Address
from .scripts import Scripts
from .slots import SLOTS, SlotMap, Unit, key_slot, parse_address, units
from .topology import alone

__all__ = ["NUDGE", "Cluster"]

#: The message that is published at the node that still owns a slot, after a change at the node to which the slot
#: migrates. It says only "read again": as news of an output, it names a place before every other.
NUDGE: Final = b"0-0 "
#: How often commands or subscriptions follow the nodes' redirections before they fail.
_REDIRECTIONS: Final = 8
#: Seconds to wait before commands are repeated that a migration has made impossible for a moment (TRYAGAIN).
_MOMENT: Final = 0.02
#: How many nodes are asked for the table at once.
_ASKED: Final = 3
#: Seconds from one such question to the next, when something is wrong: half of this, or more. See `Backoff`.
_PAUSE: Final = 0.2

_NOTHING = SlotMap((), 0)


class Cluster:
    """The nodes of a Redis Cluster.

    ``start`` are the addresses of some nodes; they are also asked if no other node answers. ``new_node(address)`` makes
    a node, which is not connected. ``remap`` translates the addresses that nodes name. ``is_classic(channel)`` is true
    for channels whose messages go to all nodes; others carry the messages of their slot. Every ``refresh`` seconds
    (0: never) the table is asked for even if nothing is suspicious. ``on_change()`` is called when the table may have
    changed.
    """

    def __init__(
        self,
        start: Sequence[Address],
        new_node: Callable[[Address], Node],
        remap: Callable[[Address], Address],
        scripts: Scripts,
        is_classic: Callable[[str], bool],
        refresh: float,
        on_change: Callable[[], None],
    ) -> None:
        self._start = tuple(start)
        self._new_node = new_node
        self._remap = remap
        self._scripts = scripts
        self._is_classic = is_classic
        self._refresh_every = refresh
        self._on_change = on_change
        self._nodes: dict[Address, Node] = {}
        self._table: list[Node | None] = [None] * SLOTS
        self._known = _NOTHING
        #: The address of the master that each shard stands for. A shard is the number of a place in this list.
        self.shards: list[Address] = []
        #: The shard of each master.
        self._shard_of: dict[Node, int] = {}
        #: The shard of each slot. A slot that has no owner any more keeps its shard.
        self.homes: list[int] = [0] * SLOTS
        #: The slots whose shard has changed since `open`.
        self.moved: set[int] = set()
        #: Nodes to which a redirection has led since the last answer. They may own no slot.
        self._guides: set[Node] = set()
        #: The nodes that know of the last change of an owner: the node that has said MOVED, and the node that it named.
        self._witnesses: tuple[Node, ...] = ()
        self._stale = asyncio.Event()
        # If code outside the library cancels it, the next doubt or subscription starts it again, and no timer: the loop
        # may be about to end.
        self._refresher = StandingTask(self._keep_fresh, "aioresult-topology", lambda: False)
        self._background: set[asyncio.Task[None]] = set()
        #: The nodes that are being probed.
        self._probed: set[Node] = set()

    # -- life -------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        self._apply(await ask_in_turn(self._ask_first, map(self._node, self._start)))
        self.moved.clear()
        self._refresher.start()

    async def _ask_first(self, node: Node) -> SlotMap:
        answer = await self._ask(node)
        await refuse_if_old(node)
        if not answer.ranges:
            raise BackendConnectionError(f"{node.where} is in no cluster, or in one without slots")
        return answer

    async def close(self) -> None:
        await self._refresher.stop()
        closing = (*(node.close() for node in self._nodes.values()), *self._background)
        await asyncio.gather(*closing, return_exceptions=True)

    def abandon(self) -> None:
        for node in self._nodes.values():
            node.abandon()

    def _node(self, address: Address) -> Node:
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = self._new_node(address)
            node.address = address
        return node

    # -- routing ----------------------------------------------------------------------------------------------------

    def _owner(self, slot: int) -> Node:
        node = self._table[slot]
        if node is None:
            self.doubt()
            raise _of_some(f"no node of the cluster serves the hash slot {slot}")
        return node

    def is_doubtful(self, shard: int) -> bool:
        """True if the master of the shard may be away."""
        node = self._nodes.get(self.shards[shard])
        return node is None or node.doubtful

    def is_vacant(self, shard: int) -> bool:
        """True if the shard has no master: its slots have gone to others."""
        return shard not in self._shard_of.values()

    def connection_for(self, key: str) -> RedisConnection | None:
        node = self._table[key_slot(key)]
        connection = None if node is None else node.commands
        return connection if connection is not None and connection.ready else None

    # -- commands ---------------------------------------------------------------------------------------------------

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        first = commands[0] is WAITERS_FIRST
        if first:
            commands = commands[1:]
        replies: list[Any] = [None] * len(commands)
        pending = units(commands)
        for _ in range(_REDIRECTIONS):
            by_node: dict[Node, list[Unit]] = {}
            for unit in pending:
                by_node.setdefault(unit.asked or self._owner(unit.slot), []).append(unit)
            await all_of(self._send(node, some, commands, replies, first) for node, some in by_node.items())
            again = {
                unit: code
                for node, some in by_node.items()
                for unit in some
                if (code := self._redirection(unit, node, replies[unit.start : unit.stop]))
            }
            self._nudge([unit for unit in pending if unit.asked is not None and unit not in again], commands)
            if not again:
                return [WAITERS_FIRST, *replies] if first else replies
            if "TRYAGAIN" in again.values():
                await asyncio.sleep(_MOMENT)
            pending = [unit for unit in pending if unit in again]
        self.doubt()
        if "TRYAGAIN" in again.values():  # a command has several keys
            slots = sorted({unit.slot for unit in pending})
            raise _of_some(f"the hash slots {slots} are being moved, and the keys of a command are on two nodes")
        raise _of_some(f"the nodes of the cluster redirect {len(pending)} commands in a circle")

    async def _send(
        self, node: Node, some: Sequence[Unit], commands: Sequence[Command], replies: list[Any], first: bool
    ) -> None:
        sent: list[Command] = [WAITERS_FIRST] if first else []
        places: list[int | None] = [None] if first else []
        for unit in some:
            if unit.asked is not None:
                sent.append(("ASKING",))
                places.append(None)
            sent += commands[unit.start : unit.stop]
            places += range(unit.start, unit.stop)
        found, _ = await node.request(sent)
        for place, reply in zip(places, found, strict=True):
            if place is not None:
                replies[place] = reply

    def _redirection(self, unit: Unit, node: Node, replies: Sequence[Any]) -> str:
        """Return the code of the error because of which the commands must be sent again, or an empty text.

        Raises `BackendConnectionError` if the node is not ready.
        """
        for reply in replies:
            code = code_of(reply) if isinstance(reply, hiredis.ReplyError) else ""
            if code == "MOVED":
                self._moved(str(reply), node)
                unit.asked = None
            elif code == "ASK":
                unit.asked, unit.source = self._guide(str(reply), node), node
            elif code and code != "TRYAGAIN" and is_transient(reply):
                self.doubt()
                raise translate(reply, node.where)
            if code in ("MOVED", "ASK", "TRYAGAIN"):
                return code
        return ""

    def raise_if_not_ready(self, error: hiredis.ReplyError) -> None:
        if is_transient(error):
            self.doubt()
            raise translate(error, "the cluster")

    def _nudge(self, done: Sequence[Unit], commands: Sequence[Command]) -> None:
        """Have the waiters that are subscribed at the node that still owns the slot read again.

        The messages of these changes were published at the node to which the slot migrates. A waiter that is subscribed
        at the other node would learn of the changes only at the end of the migration, which may never come.
        """
        for unit in done:
            channels = [
                channel for command in commands[unit.start : unit.stop] for channel in self._scripts.channels(command)
            ]
            connection = unit.source.commands
            if channels and connection is not None and connection.ready:
                connection.begin([("SPUBLISH", channel, NUDGE) for channel in channels])

    def _guide(self, redirection: str, node: Node) -> Node:
        """Return the node to which ``MOVED <slot> <host>:<port>``, or ASK, leads. ``node`` has said it.

        Raises `BackendConnectionError` if it makes no sense.
        """
        try:
            guide = self._node(self._remap(parse_address(redirection.split()[2], node.address)))
        except (IndexError, ValueError) as exc:
            self.doubt()
            raise BackendConnectionError(f"{node.where} redirects to no address: {redirection}") from exc
        self._guides.add(guide)
        return guide

    def _moved(self, redirection: str, node: Node) -> None:
        """Follow ``MOVED <slot> <host>:<port>``, which ``node`` has said."""
        owner = self._guide(redirection, node)
        slot = redirection.split()[1]
        if slot.isdecimal() and int(slot) < SLOTS and self._table[int(slot)] is not owner:
            self._table[int(slot)] = owner
            if owner in self._shard_of:
                self._settle(int(slot), int(slot), self._shard_of[owner])
        self._witnesses = (owner, node)
        self.doubt()

    # -- subscriptions ----------------------------------------------------------------------------------------------

    async def subscribe(self, channels: Sequence[str]) -> Mapping[str, BackendError] | None:
        self._refresher.start()
        refused: dict[str, BackendError] = {}
        left: Sequence[str] = channels
        for _ in range(_REDIRECTIONS):
            by_node: dict[Node, list[str]] = {}
            for channel in left:
                try:
                    by_node.setdefault(self._owner(key_slot(channel)), []).append(channel)
                except BackendConnectionError as exc:
                    refused[channel] = exc
            missing = await all_of(self._subscribe_at(node, some, refused) for node, some in by_node.items())
            left = [channel for some in missing for channel in some]
            if not left:
                return refused or None
            await asyncio.sleep(_MOMENT)
        self.doubt()
        refused.update((channel, _of_some("no node of the cluster accepts the subscription")) for channel in left)
        return refused

    async def _subscribe_at(
        self, node: Node, channels: Sequence[str], refused: dict[str, BackendError]
    ) -> Sequence[str]:
        """Subscribe to channels at their node. Returns those that must be tried again, perhaps at another node."""
        listener = node.listener
        if listener is None or listener.closed:
            listener = await node.listen()
        try:
            errors, missing = await listener.subscribe(self._commands("SUBSCRIBE", channels))
        except BackendConnectionError:
            self.doubt()
            raise
        others = 0
        for error in errors:
            if code_of(error) == "MOVED":
                self._moved(str(error), node)
            else:
                others += 1
        if missing and others:
            for channel, error in (await alone(listener, missing)).items():
                if code_of(error) != "MOVED":
                    refused[channel] = translate(error, node.where)
        # The owner may have changed since the node confirmed: then what is read next may not be complete.
        return [
            channel
            for channel in channels
            if channel not in refused
            and (encoded(channel) not in listener.subscribed or self._table[key_slot(channel)] is not node)
        ]

    async def unsubscribe(self, channels: Sequence[str]) -> None:
        # A subscription may be at another node than the owner's: while a slot is moved, or if the messages go to all.
        there: dict[RedisListener, list[str]] = {}
        listeners = [each for node in self._nodes.values() if (each := node.listener) is not None and not each.closed]
        for channel in channels:
            owner, name = self._table[key_slot(channel)], encoded(channel)
            first = None if owner is None else owner.listener
            where = [first] if first is not None and not first.closed and name in first.subscribed else listeners
            for listener in where:
                if name in listener.subscribed:
                    there.setdefault(listener, []).append(channel)
        await all_of(listener.unsubscribe(self._commands("UNSUBSCRIBE", some)) for listener, some in there.items())

    def _commands(self, command: str, channels: Sequence[str]) -> list[Command]:
        """Return SUBSCRIBE or UNSUBSCRIBE for these channels. One command may have only channels of one slot."""
        by_slot: dict[int, list[str]] = {}
        for channel in channels:
            by_slot.setdefault(-1 if self._is_classic(channel) else key_slot(channel), []).append(channel)
        return [(command if slot < 0 else f"S{command}", *some) for slot, some in by_slot.items()]

    # -- the table --------------------------------------------------------------------------------------------------

    def doubt(self) -> None:
        """Have the table asked for soon: something is not as the table says."""
        self._stale.set()
        self._refresher.start()

    async def _keep_fresh(self) -> None:
        backoff = Backoff(_PAUSE, 0.5)
        while True:
            pause = self._refresh_every * random.uniform(0.8, 1.2) or None  # noqa: S311 - spreads load
            try:
                async with asyncio.timeout(pause):
                    await self._stale.wait()
            except TimeoutError:
                pass
            self._stale.clear()
            told = await self._refresh()
            doubtful = [node for node in self.owners() if node.doubtful]
            for node in doubtful:
                if node not in self._probed:
                    self._in_background(self._probe(node))
            if doubtful or not told:
                self._stale.set()
            else:
                backoff.reset()
            await asyncio.sleep(backoff.pause())

    async def _probe(self, node: Node) -> None:
        """Find out whether a node is away. A lost connection is made anew."""
        self._probed.add(node)
        try:
            with suppress(Exception):  # then it is still doubtful; the error may be that of a credential provider
                await node.request([("PING",)])
        finally:
            self._probed.discard(node)

    def owners(self) -> list[Node]:
        """Return the masters."""
        return list(self._shard_of)

    async def _refresh(self) -> bool:
        """Ask some masters for their tables. If none gives a good answer, ask the others, and the start nodes.

        Returns whether there was a good answer.
        """
        witnesses, self._witnesses = self._witnesses, ()
        owners = self.owners()
        random.shuffle(owners)
        sure = [node for node in owners if not node.doubtful]
        rounds = [witnesses, *(sure[at : at + _ASKED] for at in range(0, len(sure), _ASKED))]
        last = [*(node for node in owners if node.doubtful), *map(self._node, self._start)]
        answers: dict[Node, SlotMap] = {}
        for some in (*rounds, last):
            best = await ask_several(self._ask, some, answers, self._known, final=some is last)
            if best is not None:
                self._apply(best)
                return True
        return False

    async def _ask(self, node: Node) -> SlotMap:
        return await ask(node, self._remap)

    def _apply(self, answer: SlotMap) -> None:
        """Put the answer in place of the table, and leave the nodes that own no slot any more."""
        before, table = self._table, [None] * SLOTS  # type: list[Node | None], list[Node | None]
        owned: Counter[Node] = Counter()
        for first, last, address in answer.ranges:
            node = self._node(address)
            table[first : last + 1] = [node] * (last - first + 1)
            owned[node] += last - first + 1
        self._assign_shards(before, table, owned)
        for first, last, address in answer.ranges:
            self._settle(first, last, self._shard_of[self._nodes[address]])
        self._table, self._known = table, answer
        self._on_change()
        guides, self._guides = self._guides, set()
        for address, node in tuple(self._nodes.items()):
            if node not in owned and node not in guides:
                del self._nodes[address]
                self._in_background(node.leave(BackendConnectionError(f"{node.where} owns no slot of the cluster")))

    def _settle(self, first: int, last: int, shard: int) -> None:
        """Note that the slots from ``first`` to ``last`` belong to a shard."""
        homes = self.homes[first : last + 1]
        if homes.count(shard) < len(homes):
            self.moved.update(slot for slot, home in enumerate(homes, first) if home != shard)
            self.homes[first : last + 1] = [shard] * len(homes)

    def _assign_shards(
        self, before: Sequence[Node | None], table: Sequence[Node | None], owned: Mapping[Node, int]
    ) -> None:
        """Decide which shard each owner stands for. A promoted replica takes over the shard of its former master."""
        taken: dict[int, Node] = {}
        fresh: list[Node] = []
        for node in sorted(owned, key=lambda each: -owned[each]):
            shard = self._shard_of.get(node)
            if shard is not None and shard not in taken:
                taken[shard] = node
            else:
                fresh.append(node)
        for node in fresh:
            former = Counter(was for was, now in zip(before, table, strict=True) if now is node and was is not None)
            heirs = [self._shard_of[was] for was, _ in former.most_common() if was in self._shard_of]
            free = [shard for shard in (*heirs, *range(len(self.shards))) if shard not in taken]
            shard = free[0] if free else len(self.shards)
            if shard == len(self.shards):
                self.shards.append(node.address)
            taken[shard] = node
        for shard, node in taken.items():
            self.shards[shard] = node.address
        self._shard_of = {node: shard for shard, node in taken.items()}

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = spawn(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard, context=EMPTY.context)


def _of_some(text: str) -> BackendConnectionError:
    """Return an error that concerns only some commands of a batch: the batch is split until they are alone."""
    error = BackendConnectionError(text)
    error.partial = True
    return error
