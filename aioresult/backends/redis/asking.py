"""Asks nodes of a Redis Cluster which master owns which slots."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Final, TypeAlias

import hiredis

from ...exceptions import BackendConnectionError, BackendError, BackendRefusedError
from ...tasks import cancel_all, spawn
from .connection import translate
from .node import Node
from .places import Address
from .slots import SlotMap, best_map, parse_map

__all__ = ["ask", "ask_in_turn", "ask_several", "refuse_if_old"]

#: Seconds that a node has to tell its table.
_TELL: Final = 1.0

_Ask: TypeAlias = Callable[[Node], Coroutine[Any, Any, SlotMap]]


async def ask(node: Node, remap: Callable[[Address], Address]) -> SlotMap:
    """Return what a node says. Raises `BackendConnectionError`, or `BackendRefusedError` if it is in no cluster."""
    (slots, info), _ = await node.request([("CLUSTER", "SLOTS"), ("CLUSTER", "INFO")])
    if isinstance(slots, hiredis.ReplyError):
        if "cluster support disabled" in str(slots):
            raise BackendRefusedError(
                f"{node.where} is not a node of a Redis Cluster: write redis:// instead of redis+cluster://"
            )
        raise translate(slots, node.where)
    return parse_map(slots, info, node.address, remap)


async def refuse_if_old(node: Node) -> None:
    """Raise `BackendRefusedError` if the server has no sharded pub/sub."""
    # Without arguments, SPUBLISH is an error that needs no right. Only an old server does not know the command.
    (reply,), _ = await node.request([("SPUBLISH",)])
    if isinstance(reply, hiredis.ReplyError) and "unknown command" in str(reply):
        raise BackendRefusedError(
            f"{node.where} is older than Redis 7, and has no sharded pub/sub; use Redis 7 or later, or Valkey"
        )


async def ask_in_turn(ask: _Ask, nodes: Iterable[Node]) -> SlotMap:
    """Return the first answer. Each node is asked when the node before it has failed, or has not answered for a second.

    Raises the last `BackendConnectionError` if all fail, and any other error at once.
    """
    turn = iter(nodes)
    asking: set[asyncio.Task[SlotMap]] = set()
    failure: BackendError | None = None
    try:
        while True:
            if (node := next(turn, None)) is not None:
                asking.add(spawn(ask(node)))
            if not asking:
                raise failure or BackendConnectionError("there are no start nodes")
            limit = None if node is None else _TELL
            done, asking = await asyncio.wait(asking, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is None:
                    return task.result()
                if not isinstance(error, BackendConnectionError):
                    raise error
                failure = error
    finally:
        await cancel_all(asking)


async def ask_several(
    ask: _Ask, nodes: Sequence[Node], answers: dict[Node, SlotMap], known: SlotMap, final: bool
) -> SlotMap | None:
    """Ask nodes at the same time, and add what they say to ``answers``. Return the first answer that is good enough.

    For ``known`` and ``final`` see `best_map`.
    """
    asking = {spawn(ask(node)): node for node in dict.fromkeys(nodes)}
    left = set(asking)
    now = asyncio.get_running_loop().time
    until = now() + _TELL
    try:
        while left and (seconds := until - now()) > 0:
            done, left = await asyncio.wait(left, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            answers |= {asking[task]: task.result() for task in done if task.exception() is None}
            if (best := best_map([*answers.values()], known, final=False)) is not None:
                return best
        return best_map([*answers.values()], known, final)
    finally:
        await cancel_all(left)
