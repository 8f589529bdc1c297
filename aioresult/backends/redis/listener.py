"""One connection to Redis that carries messages. Subscriptions are confirmed by a *fence*, and not by counting replies.

A fence is a PING that is sent behind the commands. When its reply has arrived, the server has dealt with the commands:
a channel that is in `RedisListener.subscribed` then is subscribed, and any other is not. Counting would go wrong on a
Redis Cluster. There the server ends subscriptions without being asked when it loses a slot, with the same reply as for
SUNSUBSCRIBE; and it answers SUNSUBSCRIBE with an error instead, if it has lost the slot before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from hiredis import ReplyError

from ...exceptions import BackendError
from .connection import Command, RedisConnection, code_of, is_transient, pack, translate

__all__ = ["RedisListener", "encoded", "ignore"]

#: Errors with which a server answers every command.
_OF_THE_SERVER = ("LOADING", "BUSY", "MASTERDOWN")


class RedisListener(RedisConnection):
    """A connection for subscriptions.

    ``on_message`` is called with the channel and the value of each published message, and ``on_ended`` with a channel
    whose subscription the server has ended without being asked. For the other parameters see `RedisConnection`.
    """

    def __init__(
        self,
        where: str,
        heartbeat: float,
        on_message: Callable[[bytes, bytes], None],
        on_ended: Callable[[bytes], None],
        on_lost: Callable[[BackendError], None] | None = None,
        on_doubt: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(where, heartbeat, on_lost, on_doubt)
        self._on_message = on_message
        self._on_ended = on_ended
        #: The channels that are subscribed on this connection, as the server has said.
        self.subscribed: set[bytes] = set()
        #: The number of the last fence, and of the last that was passed. The PING carries it, and so does its reply.
        self._fences = self._passed_fence = 0
        #: Channel → the fence behind the command that ends its subscription. Up to that fence the end is no news.
        self._leaving: dict[bytes, int] = {}

    async def subscribe(self, commands: Sequence[Command]) -> tuple[list[ReplyError], list[tuple[str, str]]]:
        """Do these commands, SUBSCRIBE or SSUBSCRIBE with channels.

        Returns the errors, and for each channel that is not subscribed now the command and the channel. Raises
        `BackendConnectionError` if the connection breaks, or if the server is not ready.
        """
        await self._writing()
        errors = await self._fenced(commands)
        subscribed = self.subscribed
        missing = [
            (str(command), str(channel))
            for command, *channels in commands
            for channel in channels
            if encoded(channel) not in subscribed
        ]
        return errors, missing

    async def unsubscribe(self, commands: Sequence[Command]) -> None:
        """Do these commands, UNSUBSCRIBE or SUNSUBSCRIBE with channels. Raises the same errors as `subscribe`.

        If the server has lost the slot of a channel, it has ended the subscription already.
        """
        await self._writing()
        # Only now, directly before the commands are sent: until then, the end of a subscription is news.
        channels = [encoded(channel) for _, *some in commands for channel in some]
        fence = self._fences + 1
        self._leaving.update(dict.fromkeys(channels, fence))
        try:
            await self._fenced(commands)
        finally:
            for channel in channels:
                if self._leaving.get(channel) == fence:
                    del self._leaving[channel]

    async def _fenced(self, commands: Sequence[Command]) -> list[ReplyError]:
        errors = await self._fence(b"".join(map(pack, commands)))
        for error in errors:
            if is_transient(error):
                raise translate(error, self._where)
        return errors

    def _fence(self, data: bytes) -> asyncio.Future[list[Any]]:
        self._fences += 1
        return self._post(data + pack(("PING", self._fences)), self._fences)

    def _ping(self) -> None:
        self._fence(b"")

    def _handle(self, reply: Any) -> bool:
        if isinstance(reply, list):
            kind = reply[0]
            if kind in (b"smessage", b"message"):
                self._on_message(reply[1], reply[2])
                return True
            if kind in (b"ssubscribe", b"subscribe"):
                self.subscribed.add(reply[1])
                return False
            if kind in (b"sunsubscribe", b"unsubscribe"):
                self._unsubscribed(reply[1])
                return True
            if kind != b"pong":  # a push message of another kind
                return False
            reply = reply[1]
        if isinstance(reply, ReplyError):
            self._failed(reply)
        elif isinstance(reply, bytes) and reply.isdigit():
            self._passed(int(reply))
        else:
            raise ValueError("a reply that belongs to no command")
        return True

    def _unsubscribed(self, channel: bytes) -> None:
        """Note that a subscription has ended. If the server has ended it by itself, that is news."""
        asked = self._leaving.pop(channel, 0) > self._passed_fence
        if channel in self.subscribed:
            self.subscribed.discard(channel)
            if not asked:
                self._on_ended(channel)

    def _failed(self, error: ReplyError) -> None:
        """Record an error. It belongs to the first fence that has not been passed; each caller awaits its fence.

        If the whole server is not ready, it refuses the PING, too. So nothing more is awaited: the caller tries again.
        """
        waiting = next((fence for fence in self._requests if not fence.future.done()), None)
        if waiting is None:
            return
        waiting.replies.append(error)
        if code_of(error) in _OF_THE_SERVER or "'ping'" in str(error):  # the user has no right to PING
            waiting.future.set_result(waiting.replies)
            self._forget_done()

    def _passed(self, number: int) -> None:
        if not 0 < number <= self._fences:
            raise ValueError("a reply to a PING that was not sent")
        self._passed_fence = number
        while self._requests and self._requests[0].want <= number:
            fence = self._requests.popleft()
            if not fence.future.done():
                fence.future.set_result(fence.replies)

    def _forget_done(self) -> None:
        """Drop fences that nothing more is awaited for, so that they do not count as unanswered."""
        while self._requests and self._requests[0].future.done():
            self._requests.popleft()


def encoded(channel: str | bytes | int) -> bytes:
    """Return a channel as the server names it."""
    return channel.encode("utf-8", "surrogateescape") if isinstance(channel, str) else bytes(str(channel), "ascii")


def ignore(_: object) -> None:
    """Do nothing, for an event that needs nothing done."""
