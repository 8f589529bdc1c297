"""Lines of JSON between two processes: how a measurement talks to its storer, and to the process that started it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["Channel", "spawn", "standard"]

#: Latency samples come as one line.
_LONGEST_LINE = 2**26


class Channel:
    """Sends and receives objects, one a line."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, message: Any) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")
        await self._writer.drain()

    async def receive(self) -> Any:
        """The next object. Raises `EOFError` if the other side is gone."""
        line = await self._reader.readline()
        if not line:
            raise EOFError("the other process has ended")
        return json.loads(line)

    async def ask(self, message: Any) -> Any:
        """Send, and return the answer."""
        await self.send(message)
        return await self.receive()


async def standard() -> Channel:
    """The channel to the process that started this one; whatever is printed meanwhile goes to standard error."""
    loop = asyncio.get_running_loop()
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    reader = asyncio.StreamReader(_LONGEST_LINE)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, output)
    return Channel(reader, asyncio.StreamWriter(transport, protocol, reader, loop))


async def spawn(command: Sequence[str], **options: Any) -> tuple[asyncio.subprocess.Process, Channel]:
    """Start a process that uses `standard`."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=_LONGEST_LINE, **options)
    assert process.stdin is not None
    assert process.stdout is not None
    return process, Channel(process.stdout, process.stdin)
