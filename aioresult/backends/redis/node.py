"""One Redis server, and the two connections to it: one for commands, and one for subscriptions once a caller waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import hiredis
from redis.asyncio.connection import AbstractConnection

from ...exceptions import BackendConnectionError, BackendError, BackendRefusedError
from ...tasks import EMPTY, SingleFlight, copy_of_error
from .connection import Command, RedisConnection, code_of, translate
from .listener import RedisListener, ignore
from .scripts import Scripts

__all__ = ["Node", "NodeEvents"]


class NodeEvents(NamedTuple):
    """What a node calls when something happens."""

    #: A message was published: the channel and the value.
    on_message: Callable[[bytes, bytes], None]
    #: The connection for subscriptions was lost, and these subscriptions with it.
    on_listener_lost: Callable[[Node, BackendError, Sequence[bytes]], None]
    #: The server has ended the subscription to this channel, because it has lost the channel's slot. A server that is
    #: in no cluster does not do that.
    on_ended: Callable[[bytes], None] = ignore
    #: The server has not answered for half a heartbeat, or a connection to it was lost or could not be made.
    on_doubt: Callable[[Node], None] = ignore


class Node:
    """A server. ``where`` names it in errors: it is a URL without a password.

    ``new_link()`` returns a new connection object of redis-py, which is not connected. ``greet(link)`` checks the
    server after that link was connected, and raises if it is the wrong one. Each connection is made by one attempt at a
    time; callers that need it share the outcome.
    """

    def __init__(
        self,
        where: str,
        new_link: Callable[[], Awaitable[AbstractConnection]],
        heartbeat: float,
        scripts: Scripts,
        events: NodeEvents,
        greet: Callable[[AbstractConnection], Awaitable[None]] | None = None,
    ) -> None:
        self.where: str = where
        #: The address, in a cluster.
        self.address: tuple[str, int] = ("", 0)
        self._new_link = new_link
        self._heartbeat = heartbeat
        self._scripts = scripts
        self._events = events
        self._greet = greet
        #: The connections; ``None`` before they are needed. They may be closed.
        self.commands: RedisConnection | None = None
        self.listener: RedisListener | None = None
        #: Why no connection may be made any more: the node has left the cluster, or the backend is closed.
        self._gone: BackendError | None = None
        #: True if an attempt to connect has failed, or takes more than half a heartbeat, and none has succeeded since.
        self.failing: bool = False
        #: True if a connection was lost, and the server has answered nothing since.
        self._has_lost = False
        self.connect: SingleFlight[RedisConnection] = SingleFlight(self._connect)
        self.listen: SingleFlight[RedisListener] = SingleFlight(self._listen)

    # -- commands ---------------------------------------------------------------------------------------------------

    async def _connect(self) -> RedisConnection:
        if self.commands is None or self.commands.closed:
            if self.commands is not None:
                await self.commands.close()
            self.commands = None
            connection = RedisConnection(self.where, self._heartbeat, self._commands_lost, self._doubted)
            await self._attempt(connection)
            try:
                await self._load_scripts(connection)
            except BaseException:
                await connection.close()
                raise
            self.commands = connection
        return self.commands

    async def _attempt(self, connection: RedisConnection) -> None:
        self._refuse_if_gone()
        slow = asyncio.get_running_loop().call_later(self._heartbeat / 2, self._not_reached, context=EMPTY.context)
        try:
            await connection.connect(await self._new_link(), self._greet)
        except BackendConnectionError:
            self._not_reached()
            raise
        finally:
            slow.cancel()
        try:
            self._refuse_if_gone()  # it may have left in the meantime
        except BackendError:
            await connection.close()
            raise
        self.failing = self._has_lost = False

    def _refuse_if_gone(self) -> None:
        if self._gone is not None:
            raise copy_of_error(self._gone)

    async def _load_scripts(self, connection: RedisConnection) -> None:
        for reply in await connection.request([("SCRIPT", "LOAD", script) for script in self._scripts.texts.values()]):
            if isinstance(reply, hiredis.ReplyError):
                if "unknown command" in str(reply):
                    raise BackendRefusedError(
                        f"{self.where} runs no Lua scripts (SCRIPT LOAD, EVALSHA); aioresult needs them"
                    )
                raise translate(reply, self.where)

    async def request(self, commands: Sequence[Command]) -> tuple[list[Any], list[int]]:
        """Send the commands. Returns the reply to each, and the places of the error replies among them.

        Raises `BackendConnectionError` if the server cannot be reached, or the connection breaks.
        """
        connection = self.commands
        if connection is None or connection.closed:
            connection = await self.connect()
        replies = await connection.request(commands)
        self._has_lost = False
        refused = [index for index, reply in enumerate(replies) if isinstance(reply, hiredis.ReplyError)]
        missing = [index for index in refused if code_of(replies[index]) == "NOSCRIPT"]
        if missing:  # after SCRIPT FLUSH, at a promoted replica, or after a restart behind a proxy
            await self._load_scripts(connection)
            again = await connection.request([commands[index] for index in missing])
            for index, reply in zip(missing, again, strict=True):
                replies[index] = reply
            refused = [index for index in refused if isinstance(replies[index], hiredis.ReplyError)]
        return replies, refused

    # -- subscriptions ----------------------------------------------------------------------------------------------

    async def _listen(self) -> RedisListener:
        if self.listener is None or self.listener.closed:
            if self.listener is not None:
                await self.listener.close()
            self.listener = None
            events = self._events
            listener = RedisListener(
                self.where,
                self._heartbeat,
                events.on_message,
                events.on_ended,
                self._listener_lost,
                self._doubted,
            )
            await self._attempt(listener)
            self.listener = listener
        return self.listener

    # -- life -------------------------------------------------------------------------------------------------------

    def _not_reached(self) -> None:
        self.failing = True
        self._doubted()

    def _commands_lost(self, reason: BackendError) -> None:
        self._has_lost = True
        self._doubted()

    def _listener_lost(self, reason: BackendError) -> None:
        listener = self.listener
        if listener is not None and listener.closed:
            self._events.on_listener_lost(self, reason, tuple(listener.subscribed))
        self._has_lost = True
        self._doubted()

    def _doubted(self) -> None:
        self._events.on_doubt(self)

    @property
    def doubtful(self) -> bool:
        """True if the server may be away: it does not answer, or it could not be reached when that was last tried.

        A closed connection alone does not mean that. Perhaps nobody needs it any more.
        """
        connections = (self.commands, self.listener)
        return self.failing or self._has_lost or any(each is not None and each.doubtful for each in connections)

    @property
    def overdue(self) -> bool:
        """True if an attempt to connect is under way, or an open connection was not answered for half a heartbeat."""
        both = (self.commands, self.listener)
        connecting = self.connect.running or self.listen.running
        return connecting or any(each is not None and each.doubtful for each in both)

    def drop(self, reason: BackendError) -> None:
        """Close both connections at once, as if they were lost. Attempts to connect begin again, with a new link."""
        self.connect.restart()
        self.listen.restart()
        for connection in (self.commands, self.listener):
            if connection is not None:
                connection.drop(reason)

    async def leave(self, reason: BackendError) -> None:
        """Close both connections for good, as if they were lost: the server no longer belongs to the store."""
        self._gone = reason
        self.drop(reason)
        await self.close()

    async def close(self) -> None:
        """Close both connections for good. Requests in flight raise `BackendConnectionError`."""
        if self._gone is None:  # a caller that still waits for a connection must not make another one
            self._gone = BackendConnectionError(f"the connection to {self.where} was closed")
        await self.connect.stop()
        await self.listen.stop()
        for connection in (self.commands, self.listener):
            if connection is not None:
                await connection.close()
        self.commands = self.listener = None

    def abandon(self) -> None:
        """Drop both sockets without using the event loop, which has ended or belongs to the parent process."""
        for connection in (self.commands, self.listener):
            if connection is not None:
                connection.abandon()
        self.commands = self.listener = None
