"""One connection to Redis, after its handshake.

redis-py connects: it does TLS, authentication, unix sockets, the database number and the protocol version. Then this
module takes over the transport and uses it directly; hiredis parses the replies. Commands are written immediately,
without waiting for the replies to earlier ones, and one callback reads all replies. This is several times as fast as
any layer of redis-py. And a cancelled caller cannot interrupt a read or a write halfway.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias, cast

from hiredis import PushNotification, Reader, pack_command
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection, SSLConnection

from ...exceptions import BackendConnectionError, BackendError, BackendRefusedError
from ...sockets import silence
from ...tasks import LONGEST_STEP, cancellable, copy_of_error, fail

__all__ = ["WAITERS_FIRST", "Command", "RedisConnection", "Request", "code_of", "is_transient", "pack", "translate"]

Command: TypeAlias = tuple[str | bytes | int, ...]

#: The first command of every batch of writes. Redis writes to its clients in the reverse order of their first pending
#: replies. A script's reply comes after the message that the script published. So the storing process would wake before
#: the waiting ones, and keep them from the processor. With this command its first reply is early, and it wakes last.
WAITERS_FIRST: Final[Command] = ("PING",)

_NOT_ENOUGH: Final = object()
#: Return the bytes of a command. A cast, because the annotation in hiredis allows only tuples of one element.
pack: Callable[[Command], bytes] = cast("Callable[[Command], bytes]", pack_command)

#: Replies that mean "not now": the server is starting or busy, has lost its master role, or has lost a script that was
#: loaded a moment ago.
_TRANSIENT = ("LOADING", "BUSY", "TRYAGAIN", "MASTERDOWN", "CLUSTERDOWN", "READONLY", "NOREPLICAS", "NOSCRIPT")
_REFUSED = ("NOAUTH", "WRONGPASS", "NOPERM", "DENIED", "UNAUTHORIZED")


_OF_A_LONE_USER = "; for a password without a user name write redis://:password@host, with a colon before the password"


#: In Redis before version 7, an error in a script begins with its line: "@user_script: 12: -READONLY You can't …".
_IN_SCRIPT = re.compile(r"@user_script: ?\d+: -?([A-Z]+) ")
#: How the error reads, with the code "ERR", if the user has no right to a command in a script. The second text is that
#: of Redis before version 7.
_NO_RIGHT_IN_SCRIPT = ("ACL failure in script", "The user executing the script can't")


def code_of(error: BaseException) -> str:
    """Return the first word of an error reply, which tells its kind, such as ``"NOAUTH"``."""
    text = str(error)
    found = _IN_SCRIPT.search(text)
    code = found[1] if found else text.partition(" ")[0].rstrip(":")
    return "NOPERM" if code == "ERR" and any(sign in text for sign in _NO_RIGHT_IN_SCRIPT) else code


def is_transient(error: BaseException) -> bool:
    """True for an error reply that means "not now"."""
    return code_of(error) in _TRANSIENT


def translate(error: BaseException, where: str) -> BackendError:
    """Turn an error reply, or an error of redis-py, into an error of this library. This happens nowhere else."""
    text = str(error)
    code = code_of(error)
    if isinstance(error, redis_errors.AuthenticationError) or code in _REFUSED:
        remedy = _OF_A_LONE_USER if "://**@" in where and "username-password" in text else ""
        return BackendRefusedError(f"{where} refuses: {text}{remedy}")
    if code in ("MOVED", "ASK", "CROSSSLOT"):
        return BackendRefusedError(f"{where} is a node of a Redis Cluster: write redis+cluster:// instead of redis://")
    if code in _TRANSIENT or isinstance(error, redis_errors.BusyLoadingError):
        return BackendConnectionError(f"{where} is not ready: {text}")
    if isinstance(error.__context__, ssl.SSLCertVerificationError):
        return BackendRefusedError(f"{where}: {error.__context__}")  # redis-py 5 has only its number in the text
    if isinstance(error, (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError)):
        return BackendConnectionError(f"cannot reach {where}: {text}")
    return BackendRefusedError(f"{where} says: {text}")


def _tls_hint(link: AbstractConnection, error: BaseException) -> str:
    """Return a hint for the message of ``error`` if perhaps only one side uses TLS; otherwise an empty text."""
    kinds = {type(error), type(error.__context__)}
    cut = ConnectionResetError in kinds or "closed by server" in str(error)
    if not isinstance(link, SSLConnection):
        return "; if the server uses TLS, write rediss://" if cut else ""
    if cut or isinstance(error, (redis_errors.TimeoutError, TimeoutError)) or ssl.SSLError in kinds:
        return "; if the server has no TLS, it does not answer the TLS handshake: then write redis://"
    return ""


class Request:
    """Commands in flight: how many replies they need, and the replies that have arrived."""

    __slots__ = ("future", "replies", "want")

    def __init__(self, future: asyncio.Future[list[Any]], want: int) -> None:
        self.future: asyncio.Future[list[Any]] = future
        self.want: int = want
        self.replies: list[Any] = []


class RedisConnection(asyncio.Protocol):
    """A connection to Redis. Commands go out in order, and their replies come back in order.

    ``where`` names the server in errors. ``heartbeat`` is in seconds: after that much silence the connection pings the
    server, and a server that leaves anything unanswered for twice as long counts as dead. ``on_lost`` is called one
    time, with the reason, when the connection is lost, but not after `close`. ``on_doubt`` is called when the server
    has left something unanswered for half a heartbeat.
    """

    def __init__(
        self,
        where: str,
        heartbeat: float,
        on_lost: Callable[[BackendError], None] | None = None,
        on_doubt: Callable[[], None] | None = None,
    ) -> None:
        #: True before the connection is made, and after it was lost or closed.
        self.closed: bool = True
        self._where = where
        self._heartbeat = heartbeat
        self._on_lost = on_lost
        self._on_doubt = on_doubt
        self._reader = Reader(notEnoughData=_NOT_ENOUGH)
        self._requests: deque[Request] = deque()
        self._loop = asyncio.get_running_loop()
        self._writable = asyncio.Event()
        self._writable.set()
        self._heard_at = self._asked_at = self._loop.time()
        self._unsent = 0
        self._timer: asyncio.TimerHandle | None = None
        #: True if replies have arrived that the last turn of the event loop had no time to handle.
        self._behind = False

    async def connect(
        self, link: AbstractConnection, greet: Callable[[AbstractConnection], Awaitable[None]] | None = None
    ) -> None:
        """Connect ``link``, a connection object of redis-py, and take over its transport.

        ``greet(link)`` may ask the server something first, and raise if this is the wrong server.

        Raises `BackendConnectionError` if the server cannot be reached or is not ready, and `BackendRefusedError` if it
        refuses.
        """
        self._link = link
        try:
            # redis-py awaits in `asyncio.wait_for`. Up to Python 3.11 that may swallow a cancellation, and go on.
            await cancellable(self._handshake(link, greet))
        except (redis_errors.RedisError, OSError, ValueError) as exc:
            await self.close()
            error = translate(exc, self._where)
            error.args = (f"{error}{_tls_hint(link, exc)}",)
            raise error from exc
        except BaseException:
            await self.close()
            raise
        self._transport = take_over(link, self)
        self.closed = False
        self._timer = self._loop.call_later(self._heartbeat, self._beat)

    async def _handshake(
        self, link: AbstractConnection, greet: Callable[[AbstractConnection], Awaitable[None]] | None
    ) -> None:
        await link.connect()  # type: ignore[no-untyped-call]
        if greet is not None:
            await greet(link)

    # -- asyncio.Protocol -------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        try:
            self._reader.feed(data)
        except Exception as exc:
            self.drop(self._nonsense(exc))
        if not self._behind:
            self._look_through()

    def _look_through(self) -> None:
        """Handle the replies that have arrived, for a few milliseconds.

        If there are more replies, the next turn of the event loop handles them. Nothing more is read until then.
        """
        gets, handle, time = self._reader.gets, self._handle, self._loop.time
        pause_at = time() + LONGEST_STEP
        try:
            while not self.closed and (reply := gets()) is not _NOT_ENOUGH:
                if handle(reply) and time() >= pause_at:
                    break
            else:
                if self._behind and not self.closed:
                    self._transport.resume_reading()
                self._behind = False
                return
            if not self._behind:
                self._behind = True
                self._transport.pause_reading()
            self._loop.call_soon(self._look_through)
        except Exception as exc:  # a reply in a form that Redis never sends may raise anything in the code above
            self.drop(self._nonsense(exc))

    def _handle(self, reply: Any) -> bool:
        """Handle one reply. Returns true if that may have made work for the event loop."""
        if isinstance(reply, PushNotification):
            return False
        if not self._requests:
            raise ValueError("a reply without a request")
        request = self._requests[0]
        request.replies.append(reply)
        if len(request.replies) < request.want:
            return False
        self._requests.popleft()
        if not request.future.done():
            request.future.set_result(request.replies)
        return True

    def _nonsense(self, exc: Exception) -> BackendConnectionError:
        return BackendConnectionError(f"{self._where} does not speak Redis' protocol: {exc}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.drop(BackendConnectionError(f"the connection to {self._where} was lost: {exc or 'closed by the server'}"))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # -- requests ---------------------------------------------------------------------------------------------------

    async def request(self, commands: Sequence[Command]) -> list[Any]:
        """Send the commands, and return the reply to each. An error reply is a `hiredis.ReplyError` in its place.

        All commands are sent at once; they do not wait for the replies to earlier ones. Raises `BackendConnectionError`
        if the connection breaks before the last reply. Then the server may or may not have executed the commands.
        """
        await self._writing()
        return await self.begin(commands)

    async def _writing(self) -> None:
        """Wait until the transport takes more data. Commands are not even packed before that, to save memory."""
        while not self._writable.is_set():  # a loop, because another caller may have filled the buffer again
            await self._writable.wait()
        if self.closed:
            raise BackendConnectionError(f"the connection to {self._where} is closed")

    @property
    def ready(self) -> bool:
        """True if `begin` may be called: the connection is open, and its write buffer is not full."""
        return not self.closed and self._writable.is_set()

    def begin(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """Send the commands before this returns; otherwise do as `request`. The future must not be cancelled."""
        return self._post(b"".join(map(pack, commands)), len(commands))

    def _post(self, data: bytes, want: int) -> asyncio.Future[list[Any]]:
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        self._transport.write(data)
        if not self._requests:
            self._asked_at = self._loop.time()
        self._requests.append(Request(future, want))
        return future

    # -- life -------------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Ping a silent server, and give up one that does not answer.

        A dead server is noticed within three heartbeats: one of silence, and two without an answer to the ping. So each
        call schedules the next call for the moment when one of the two is due. Calls at fixed intervals would be late.
        With ``on_doubt`` it also reports a server that has not answered for half a heartbeat.
        """
        now, unsent = self._loop.time(), self._transport.get_write_buffer_size()
        if unsent < self._unsent:
            self._asked_at = now  # progress in sending a large value over a slow line is a sign of life
        self._unsent = unsent
        due = self._heard_at + self._heartbeat
        if not self._requests and now >= due:
            self._ping()
        if self._requests:
            since = max(self._heard_at, self._asked_at)
            due = since + 2 * self._heartbeat
            if now >= due:
                self.drop(BackendConnectionError(f"{self._where} has not answered for {2 * self._heartbeat:g} s"))
                return
            if self._on_doubt is not None and now < since + self._heartbeat / 2:
                due = since + self._heartbeat / 2
            elif self._on_doubt is not None:
                self._on_doubt()
        self._timer = self._loop.call_at(min(due, now + self._heartbeat), self._beat)

    def _ping(self) -> None:
        self._post(pack(("PING",)), 1)

    @property
    def doubtful(self) -> bool:
        """True if the server has left something unanswered for half a heartbeat."""
        since = max(self._heard_at, self._asked_at)
        return not self.closed and bool(self._requests) and self._loop.time() >= since + self._heartbeat / 2

    def drop(self, error: BackendError) -> None:
        """Close the socket at once, as a connection that was lost because of ``error``."""
        if self.closed:
            return
        self.closed = True
        self._stop_timer()
        self._transport.abort()
        self._writable.set()  # callers that wait in `_writing` wake up and find the connection closed
        requests, self._requests = self._requests, deque()
        for request in requests:
            if not request.future.done():
                broken = copy_of_error(error)
                if isinstance(broken, BackendConnectionError):
                    broken.in_flight = True
                fail(request.future, broken)
        if self._on_lost is not None:
            self._on_lost(error)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def abandon(self) -> None:
        """Drop the socket without using the event loop, which has ended or belongs to the parent process."""
        self._on_lost = None
        self._stop_timer()
        self.closed = True
        silence(self._transport)

    async def close(self) -> None:
        """Close the socket. Requests in flight raise `BackendConnectionError`."""
        self._on_lost = None
        self._stop_timer()
        if not self.closed:
            self.drop(BackendConnectionError(f"the connection to {self._where} was closed"))
        await self._link.disconnect(nowait=True)


def take_over(link: AbstractConnection, protocol: asyncio.Protocol) -> asyncio.Transport:
    """Return the transport of a connected redis-py connection, and put ``protocol`` in place of redis-py's reader.

    This is the only use of a private attribute of redis-py: the stream writer, which has the transport. It was checked
    with redis-py 5.0.1 to 8.1; its name has not changed since the asyncio client was added in redis-py 4.2. All replies
    of the handshake have arrived, so nothing is left in a buffer. The caller must keep ``link``: it owns the writer,
    which closes the transport when it is garbage-collected.
    """
    writer = getattr(link, "_writer", None)
    if not isinstance(writer, asyncio.StreamWriter):
        raise BackendRefusedError(
            "this version of redis-py is not supported: its asyncio connection has no stream writer; "
            "install a redis from 5.0.1 to 8.1, or report this"
        )
    transport = cast("asyncio.Transport", writer.transport)
    transport.set_protocol(protocol)
    return transport
