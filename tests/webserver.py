"""Web services in processes of their own, for the tests of what the guides show."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from .harness import until

ROOT = Path(__file__).parent.parent


@asynccontextmanager
async def served(folder: Path, settings: Mapping[str, str], *command: str) -> AsyncIterator[str]:
    """The URL of a web service in ``folder`` that ``command`` starts, as soon as it answers."""
    async with server_process(folder, settings, *command) as (url, _):
        yield url


@asynccontextmanager
async def server_process(
    folder: Path, settings: Mapping[str, str], *command: str
) -> AsyncIterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL and the process of a web service in ``folder`` that ``command`` starts, as soon as it answers.

    ``{address}`` and ``{port}`` in the command are replaced; the environment has ``settings`` and ``ADDRESS``. What the
    process prints is in the file ``log`` of the folder.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environ = {
        **os.environ,
        **settings,
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "ADDRESS": address,
    }
    words = [word.format(address=address, port=address.rpartition(":")[2]) for word in command]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
            [sys.executable, *words], cwd=folder, env=environ, stdout=log, stderr=log
        )
    try:
        async with httpx.AsyncClient() as client:

            async def answers() -> bool:
                assert server.poll() is None, (folder / "log").read_text()
                try:
                    return (await client.get(f"http://{address}/none")).status_code == 404
                except httpx.TransportError:
                    return False

            await until(answers)
        yield f"http://{address}", server
    finally:
        server.terminate()
        server.wait(20)
