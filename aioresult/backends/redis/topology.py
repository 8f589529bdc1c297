"""`Topology`: which server has which key. `Single` is the topology of one server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import hiredis

from ...exceptions import BackendConnectionError, BackendError
from ...tasks import all_of
from .connection import Command, RedisConnection, code_of, is_transient, translate
from .listener import RedisListener
from .node import Node

__all__ = ["Single", "Topology", "alone"]


class Topology(Protocol):
    """Sends commands to the servers that have their keys, and subscribes to channels there."""

    async def open(self) -> None:
        """Connect. Try once. Raises `BackendConnectionError` or `BackendRefusedError`."""

    async def close(self) -> None:
        """Close all connections."""

    def abandon(self) -> None:
        """Drop all sockets without using the event loop."""

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Send the commands, and return the reply to each.

        Raises `BackendConnectionError` if any reply says that a server is not ready. Then the caller must repeat all of
        the commands.
        """

    def raise_if_not_ready(self, error: hiredis.ReplyError) -> None:
        """Raise if ``error``, which was inside another reply, says that the server is not ready."""

    def connection_for(self, key: str) -> RedisConnection | None:
        """Return the connection to the server that has ``key``; ``None`` if it is not open, or its buffer is full."""

    async def subscribe(self, channels: Sequence[str]) -> Mapping[str, BackendError] | None:
        """Subscribe to channels, by the rules of `BackendContract._subscribe`."""

    async def unsubscribe(self, channels: Sequence[str]) -> None:
        """Unsubscribe from channels. Ignores those that are not subscribed."""


class Single:
    """One server has every key."""

    def __init__(self, node: Node) -> None:
        self.node = node

    async def open(self) -> None:
        await self.node.connect()

    async def close(self) -> None:
        await self.node.close()

    def abandon(self) -> None:
        self.node.abandon()

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        replies, refused = await self.node.request(commands)
        for index in refused:
            self.raise_if_not_ready(replies[index])
        return replies

    def raise_if_not_ready(self, error: hiredis.ReplyError) -> None:
        if is_transient(error):
            reason = translate(error, self.node.where)
            if code_of(error) == "READONLY" and self.node.commands is not None:
                # After a failover, the host name or the sentinels may lead to the new master: connect again.
                self.node.commands.drop(reason)
            raise reason

    def connection_for(self, key: str) -> RedisConnection | None:
        connection = self.node.commands
        return connection if connection is not None and connection.ready else None

    async def subscribe(self, channels: Sequence[str]) -> Mapping[str, BackendError] | None:
        listener = self.node.listener
        if listener is None or listener.closed:
            listener = await self.node.listen()
        errors, missing = await listener.subscribe([("SUBSCRIBE", *channels)])
        if not missing:
            return None
        if not errors:
            raise BackendConnectionError(f"{self.node.where} has ended subscriptions")
        refused = {channels[0]: errors[0]} if len(channels) == 1 else await alone(listener, missing)
        return {channel: translate(error, self.node.where) for channel, error in refused.items()}

    async def unsubscribe(self, channels: Sequence[str]) -> None:
        listener = self.node.listener
        if listener is not None and not listener.closed:
            await listener.unsubscribe([("UNSUBSCRIBE", *channels)])


async def alone(listener: RedisListener, missing: Sequence[tuple[str, str]]) -> dict[str, hiredis.ReplyError]:
    """Subscribe to each channel separately, because the server refuses a whole command for one channel.

    ``missing`` is as `RedisListener.subscribe` returns it. Returns the error for each channel that is refused.
    """
    outcomes = await all_of(listener.subscribe([(command, channel)]) for command, channel in missing)  # one round trip
    return {
        channel: errors[0] for (_, channel), (errors, still) in zip(missing, outcomes, strict=True) if still and errors
    }
