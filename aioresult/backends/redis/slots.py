"""Slots of a Redis Cluster: which slot a command belongs to, and what `CLUSTER SLOTS` says of the nodes that own them.

A cluster divides its keys among 16,384 slots, and each slot belongs to one master. See the Redis Cluster specification:
https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from ...exceptions import BackendConnectionError
from .connection import Command
from .places import Address

__all__ = ["SLOTS", "SlotMap", "Unit", "best_map", "key_slot", "parse_address", "parse_map", "units"]

SLOTS: Final = 16_384

#: Commands without a key. They go to the node of the command before them, or of the command after them.
_KEYLESS: Final = frozenset({"PING", "TIME", "MULTI", "EXEC"})


def key_slot(key: str | bytes | int) -> int:
    """Return the slot of a key or channel."""
    # A text that cannot be written as UTF-8 is no valid id, and the backend refuses it later.
    name = key if isinstance(key, bytes) else str(key).encode("utf-8", "surrogatepass")
    start = name.find(b"{")
    if start >= 0:
        end = name.find(b"}", start + 1)
        if end > start + 1:
            name = name[start + 1 : end]
    return crc_hqx(name, 0) & (SLOTS - 1)


class Unit:
    """Commands that one node must execute one after the other: a single command, or a transaction."""

    __slots__ = ("asked", "slot", "source", "start", "stop")

    def __init__(self, start: int, stop: int, slot: int) -> None:
        #: The commands are ``commands[start:stop]``.
        self.start: int = start
        self.stop: int = stop
        self.slot: int = slot
        #: During a migration of the slot: the node that executes the commands, and the node that still owns the slot.
        self.asked: Any = None
        self.source: Any = None


def units(commands: Sequence[Command]) -> list[Unit]:
    """Divide commands into units. At least one of the commands must have a key."""
    found: list[Unit] = []
    keyless = 0  # commands without a key, before the first command with a key
    begun: int | None = None  # where the transaction began
    for index, command in enumerate(commands):
        name = command[0]
        if name == "MULTI":
            begun = index
        elif name == "EXEC" and begun is not None:
            found[-1].stop = index + 1
            begun = None
        elif name in _KEYLESS:
            if found:
                found[-1].stop = index + 1
            else:
                keyless += 1
        elif begun is not None and found and found[-1].start == begun:
            found[-1].stop = index + 1
        else:
            start = index if begun is None else begun
            found.append(Unit(start, index + 1, key_slot(command[3] if name == "EVALSHA" else command[1])))
    if keyless:
        found[0].start = 0
    return found


class SlotMap(NamedTuple):
    """The answer of one node."""

    #: ``(first slot, last slot, master)``, in order.
    ranges: tuple[tuple[int, int, Address], ...]
    #: The highest configuration epoch that the node knows; 0 if it does not say.
    epoch: int

    @property
    def covered(self) -> int:
        """The number of slots that have a master."""
        return sum(last - first + 1 for first, last, _ in self.ranges)


def parse_address(text: str, asked: Address) -> Address:
    """Read ``host:port``, as in a MOVED or ASK error. Without a host, it is that of the node that was ``asked``."""
    host, _, port = text.rpartition(":")
    return _host(host.strip("[]"), asked), int(port)


def _host(host: str, asked: Address) -> str:
    """Return the host of a node. A node that does not know its name says nothing or "?": it is the host asked."""
    return asked[0] if host in ("", "?") else host


def parse_map(slots: Any, info: Any, asked: Address, remap: Callable[[Address], Address]) -> SlotMap:
    """Read the replies to ``CLUSTER SLOTS`` and ``CLUSTER INFO``.

    Raises `BackendConnectionError` if they make no sense.
    Without a host, a master is at the host that was ``asked``: the node does not know its own name.
    """
    try:
        ranges = []
        for first, last, (host, port, *_), *_ in slots:
            name = host.decode() if isinstance(host, bytes) else ""
            ranges.append((int(first), int(last), remap((_host(name, asked), int(port)))))
        ranges.sort()
        if any(not 0 <= first <= last < SLOTS for first, last, _ in ranges):
            raise ValueError("there is no such slot")
    except (TypeError, ValueError, AttributeError) as exc:
        raise BackendConnectionError(f"the answer to CLUSTER SLOTS cannot be read: {exc}") from exc
    epoch = 0
    if isinstance(info, bytes):
        lines = dict(line.partition(":")[::2] for line in info.decode("utf-8", "replace").splitlines())
        said = lines.get("cluster_current_epoch", "")
        epoch = int(said) if said.isdecimal() else 0
    return SlotMap(tuple(ranges), epoch)


def best_map(answers: Sequence[SlotMap], known: SlotMap, final: bool) -> SlotMap | None:
    """Return the answer to believe; ``None`` if none of them is good enough. Each answer is that of another node.

    A node that has left the cluster, or is new in it, knows no slots, or only some of them. A node that was cut off
    knows an older state. So an answer that knows less than what is ``known`` needs a second node that says the same, or
    is the answer of the only master. With ``final``, no further answer will come: only then an older epoch is believed.
    The whole cluster may have been replaced by a new one, whose epochs begin again.
    """
    lone = len(answers) == 1 and len({master for *_, master in known.ranges}) <= 1
    older: SlotMap | None = None
    for answer in sorted(answers, key=lambda each: (each.epoch, each.covered), reverse=True):
        agree = sum(each.ranges == answer.ranges for each in answers) > 1 or (final and lone)
        if not answer.ranges:
            continue
        if answer.epoch and answer.epoch < known.epoch:
            older = older or (answer if agree else None)
        elif answer.covered >= known.covered or agree:
            return answer
    return older if final else None
