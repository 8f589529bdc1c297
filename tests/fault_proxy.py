"""A proxy that knows which connection it is looking at, and the ways in which a network can misbehave on it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Protocol

from .servers import TcpProxy

#: How a message begins: in RESP2, in RESP3, in PostgreSQL's protocol.
_MESSAGES = (b"*3\r\n$7\r\nmessage\r\n", b">3\r\n$7\r\nmessage\r\n", b"A")


class Wire:
    """One connection through the proxy."""

    def __init__(self) -> None:
        #: Whether it carries subscriptions: it has asked for one.
        self.subscribes = False
        #: Nothing comes out at the other end any more, and nothing closes.
        self.swallowed = False
        #: What a behaviour keeps of it, by direction.
        self.notes: dict[bool, object] = {}


class Behaviour(Protocol):
    """Gives what arrives at the other end for a piece of data, in pieces; raises `OSError` to cut the connection."""

    def __call__(self, wire: Wire, data: bytes, to_server: bool) -> AsyncIterator[bytes]: ...


_wire: ContextVar[Wire] = ContextVar("_wire")


class FaultProxy(TcpProxy):
    """`behaviour` is applied to everything that passes; ``None`` is a good network."""

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port)
        self.behaviour: Behaviour | None = None
        #: How often a behaviour cut a connection.
        self.cuts = 0
        self.wires: list[Wire] = []

    def swallow(self) -> None:
        """Make a black hole of every connection that there is; a new one is sound."""
        for wire in self.wires:
            wire.swallowed = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = Wire()
        self.wires.append(wire)
        _wire.set(wire)  # inherited by the two tasks that pump
        try:
            await super()._serve(reader, writer)
        finally:
            self.wires.remove(wire)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to_server: bool) -> None:
        wire = _wire.get()
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if to_server and (b"SUBSCRIBE" in data or b"LISTEN" in data):
                    wire.subscribes = True
                if wire.swallowed:
                    continue
                if self.behaviour is None:
                    writer.write(data)
                    await writer.drain()
                    continue
                try:
                    async for piece in self.behaviour(wire, data, to_server):
                        writer.write(piece)
                        await writer.drain()
                except ConnectionAbortedError:
                    self.cuts += 1
                    raise


def cut_anywhere(chance: random.Random, at_most: int = 20_000) -> Behaviour:
    """Every connection ends after a random number of bytes, each way a number of its own; pieces come late and torn."""

    async def behave(wire: Wire, data: bytes, to_server: bool) -> AsyncIterator[bytes]:
        left = wire.notes.setdefault(to_server, chance.randrange(1, at_most))
        assert isinstance(left, int)
        wire.notes[to_server] = left - len(data)
        tear = chance.randrange(len(data))
        for piece in (data[:left][:tear], data[:left][tear:]):
            yield piece
            await asyncio.sleep(chance.uniform(0, 0.005))
        if left <= len(data):
            raise ConnectionAbortedError

    return behave


def die_after(proxy: FaultProxy, count: int, sent: list[int], died: Callable[[], object]) -> Behaviour:
    """What a killed process looks like: the server gets ``count`` bytes of all that it sends, and its connections end.

    The lengths of what was to be sent are noted in ``sent``; ``died`` is called at the end.
    """

    async def behave(wire: Wire, data: bytes, to_server: bool) -> AsyncIterator[bytes]:
        if not to_server:
            yield data
            return
        left = count - sum(sent)
        sent.append(len(data))
        yield data[: max(left, 0)]
        if left <= len(data):
            proxy.refuse()
            proxy.cut()
            died()
            raise ConnectionAbortedError

    return behave


def trickle(chance: random.Random, singles: int = 300) -> Behaviour:
    """Up to ``singles`` bytes of every piece, from a random place on, go one at a time."""

    async def behave(wire: Wire, data: bytes, to_server: bool) -> AsyncIterator[bytes]:
        start = chance.randrange(len(data))
        yield data[:start]
        for index in range(start, min(start + singles, len(data))):
            yield data[index : index + 1]
            await asyncio.sleep(0)
        yield data[start + singles :]

    return behave


def late_subscriptions(seconds: float) -> Behaviour:
    """What the server says on a subscription's connection comes so much later, and everything else at once."""

    async def behave(wire: Wire, data: bytes, to_server: bool) -> AsyncIterator[bytes]:
        if wire.subscribes and not to_server:
            await asyncio.sleep(seconds)
        yield data

    return behave


def eat_messages(frame_length: Callable[[bytes], int | None], eaten: list[bytes]) -> Behaviour:
    """Every message is taken out of the stream, and kept in ``eaten``; the rest passes."""

    async def behave(wire: Wire, data: bytes, to_server: bool) -> AsyncIterator[bytes]:
        if to_server or not wire.subscribes:
            yield data
            return
        before = wire.notes.get(to_server, b"")
        assert isinstance(before, bytes)
        data, passed = before + data, b""
        while (length := frame_length(data)) is not None:
            frame, data = data[:length], data[length:]
            if frame.startswith(_MESSAGES):
                eaten.append(frame)
            else:
                passed += frame
        wire.notes[to_server] = data
        yield passed

    return behave


def resp_frame(data: bytes) -> int | None:
    """How long the first frame of Redis' protocol in ``data`` is; ``None`` if it is not all there."""
    line = data.find(b"\r\n")
    if line < 0:
        return None
    kind, end = data[:1], line + 2
    if kind in (b"$", b"=", b"!"):
        end += max(int(data[1:line]) + 2, 0)
    elif kind in (b"*", b">", b"~", b"%"):
        for _ in range(int(data[1:line]) * (2 if kind == b"%" else 1)):
            inner = resp_frame(data[end:])
            if inner is None:
                return None
            end += inner
    return end if end <= len(data) else None


def postgres_frame(data: bytes) -> int | None:
    """The same for what a PostgreSQL server sends, on a connection that did not ask for TLS."""
    if len(data) < 5:
        return None
    length = 1 + int.from_bytes(data[1:5], "big")
    return length if length <= len(data) else None
