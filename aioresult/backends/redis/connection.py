"""One connection to Redis, after its handshake.

redis-py connects: TLS, authentication, unix sockets, the database number and the protocol version stay its work. Then
the transport is taken over and spoken to directly, with hiredis to parse: commands are written as they come, without
waiting for the replies to those before, and one callback reads them all. That is several times as fast as any layer of
redis-py, and leaves no read or write that a cancelled caller could interrupt.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias, cast

from hiredis import PushNotification, Reader, ReplyError, pack_command
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection, SSLConnection

from ...exceptions import BackendConnectionError, BackendError, BackendRefusedError
from ...sockets import silence
from ...tasks import TURN, fail, twin

__all__ = ["WAITERS_FIRST", "Command", "RedisConnection", "code_of", "translate"]

Command: TypeAlias = tuple[str | bytes | int, ...]

#: Goes before every batch of writes. Redis writes to its clients in reverse order of their first pending reply, and a
#: script's reply comes after what it published: the storing process would be woken before the waiting ones, and keep
#: them from the processor. The reply to this wakes the storing process last.
WAITERS_FIRST: Final[Command] = ("PING",)

_NOT_ENOUGH: Final = object()
#: hiredis' own annotation allows for tuples of one element only.
_pack = cast("Callable[[Command], bytes]", pack_command)

#: Replies that mean "not now": the server is starting, busy, on the wrong side of a failover, or has lost a script that
#: was loaded a moment ago.
_TRANSIENT = ("LOADING", "BUSY", "TRYAGAIN", "MASTERDOWN", "CLUSTERDOWN", "READONLY", "NOREPLICAS", "NOSCRIPT")
_REFUSED = ("NOAUTH", "WRONGPASS", "NOPERM", "DENIED", "UNAUTHORIZED")


_OF_A_LONE_USER = "; for a password without a user name write redis://:password@host, with a colon before the password"


#: Before 7, what arises in a script has the place before it: "@user_script: 12: -READONLY You can't write …".
_IN_SCRIPT = re.compile(r"@user_script: ?\d+: -?([A-Z]+) ")


def code_of(error: BaseException) -> str:
    """The word that says of what kind an error reply is."""
    text = str(error)
    found = _IN_SCRIPT.search(text)
    return found[1] if found else text.partition(" ")[0].rstrip(":")


def translate(error: BaseException, where: str) -> BackendError:
    """The one place where a reply or an error of redis-py becomes an error of ours."""
    text = str(error)
    code = code_of(error)
    if isinstance(error, redis_errors.AuthenticationError) or code in _REFUSED:
        remedy = _OF_A_LONE_USER if "://**@" in where and "username-password" in text else ""
        return BackendRefusedError(f"{where} refuses: {text}{remedy}")
    if code in ("MOVED", "ASK", "CROSSSLOT"):
        return BackendRefusedError(f"{where} is a node of a Redis Cluster, which is not supported yet")
    if code in _TRANSIENT or isinstance(error, redis_errors.BusyLoadingError):
        return BackendConnectionError(f"{where} is not ready: {text}")
    if isinstance(error.__context__, ssl.SSLCertVerificationError):
        return BackendRefusedError(f"{where}: {error.__context__}")  # redis-py 5 has only its number in the text
    if isinstance(error, (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError)):
        return BackendConnectionError(f"cannot reach {where}: {text}")
    return BackendRefusedError(f"{where} says: {text}")


def _tls_hint(link: AbstractConnection, error: BaseException) -> str:
    """What to change if one side speaks TLS and the other does not, for an ``error`` that this may bring about."""
    kinds = {type(error), type(error.__context__)}
    cut = ConnectionResetError in kinds or "closed by server" in str(error)
    if not isinstance(link, SSLConnection):
        return "; if the server uses TLS, write rediss://" if cut else ""
    if cut or isinstance(error, (redis_errors.TimeoutError, TimeoutError)) or ssl.SSLError in kinds:
        return "; if the server has no TLS, and so does not answer the TLS handshake, write redis://"
    return ""


class _Request:
    """Commands on their way: how many replies are missing, and those that have come."""

    __slots__ = ("future", "one_command", "replies", "want")

    def __init__(self, future: asyncio.Future[list[Any]], want: int, one_command: bool) -> None:
        self.future = future
        self.want = want
        self.one_command = one_command
        self.replies: list[Any] = []


class RedisConnection(asyncio.Protocol):
    """Commands go out in order and replies come back in order; published messages go to ``on_message``.

    ``heartbeat`` is in seconds: after that much silence the server is pinged, and a server that leaves anything
    unanswered for twice as long is taken for dead. ``on_lost`` is called with the reason, once,
    unless `close` was.
    """

    def __init__(
        self,
        where: str,
        heartbeat: float,
        on_message: Callable[[bytes, bytes], None] | None = None,
        on_lost: Callable[[BackendError], None] | None = None,
    ) -> None:
        #: Until it is connected, and from when it was lost.
        self.closed: bool = True
        self._where = where
        self._heartbeat = heartbeat
        self._on_message = on_message
        self._on_lost = on_lost
        self._reader = Reader(notEnoughData=_NOT_ENOUGH)
        self._requests: deque[_Request] = deque()
        self._loop = asyncio.get_running_loop()
        self._writable = asyncio.Event()
        self._writable.set()
        self._heard_at = self._asked_at = self._loop.time()
        self._unsent = 0
        self._timer: asyncio.TimerHandle | None = None
        #: Whether more has arrived than was looked at in one step: the rest is, in the next.
        self._behind = False

    async def connect(self, link: AbstractConnection) -> None:
        """Have redis-py's ``link`` connect, and take its transport over.

        Raises `BackendConnectionError` or `BackendRefusedError`.
        """
        self._link = link
        task = asyncio.current_task()
        cancelled = 0 if task is None else task.cancelling()
        failure: Exception | None = None
        try:
            await link.connect()  # type: ignore[no-untyped-call]
        except (redis_errors.RedisError, OSError, ValueError) as exc:
            failure = exc
        except BaseException:
            await self.close()
            raise
        # redis-py awaits in `asyncio.wait_for`, which up to Python 3.11 may swallow a cancellation and give the outcome
        # instead; a caller that repeats what failed would go on for ever.
        swallowed = task is not None and task.cancelling() > cancelled
        if swallowed:
            await self.close()
            raise asyncio.CancelledError from failure
        if failure is not None:
            await self.close()
            error = translate(failure, self._where)
            error.args = (f"{error}{_tls_hint(link, failure)}",)
            raise error from failure
        self._transport = take_over(link, self)
        self.closed = False
        self._timer = self._loop.call_later(self._heartbeat, self._beat)

    # -- asyncio.Protocol -------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        try:
            self._reader.feed(data)
        except Exception as exc:
            self._fail(self._nonsense(exc))
        if not self._behind:
            self._look_through()

    def _look_through(self) -> None:
        """What has arrived, for a few milliseconds; until the rest has had its turn, nothing more is read."""
        gets, on_message, time = self._reader.gets, self._on_message, self._loop.time
        pause_at = time() + TURN
        try:
            while not self.closed and (reply := gets()) is not _NOT_ENOUGH:
                if isinstance(reply, list):
                    if on_message is not None and reply[0] == b"message":
                        on_message(reply[1], reply[2])
                        if time() >= pause_at:
                            break
                        continue
                    if on_message is None and isinstance(reply, PushNotification):
                        continue
                if not self._requests:
                    raise ValueError("a reply that nobody asked for")
                request = self._requests[0]
                request.replies.append(reply)
                refused = request.one_command and isinstance(reply, ReplyError)
                if refused or len(request.replies) == request.want:
                    self._requests.popleft()
                    if not request.future.done():
                        request.future.set_result(request.replies)
                    if time() >= pause_at:
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
        except Exception as exc:  # a reply of a form that Redis never sends may break anything that looks into it
            self._fail(self._nonsense(exc))

    def _nonsense(self, exc: Exception) -> BackendConnectionError:
        return BackendConnectionError(f"{self._where} does not speak Redis' protocol: {exc}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(BackendConnectionError(f"the connection to {self._where} was lost: {exc or 'closed by the server'}"))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # -- requests ---------------------------------------------------------------------------------------------------

    async def request(self, commands: Sequence[Command]) -> list[Any]:
        """The reply to each command; an error reply is a `hiredis.ReplyError` in its place.

        All commands go out at once, whatever is in flight. Raises `BackendConnectionError` if the connection breaks
        before the last reply; the commands may have been executed then.
        """
        await self._writing()
        return await self.begin(commands)

    async def request_many(self, command: Command, replies: int) -> list[Any]:
        """As `request`, of one command that is answered by several replies (SUBSCRIBE), or by one error."""
        await self._writing()
        return await self._post(_pack(command), replies, one_command=True)

    async def _writing(self) -> None:
        """Return once the transport takes more: nothing is even packed before that."""
        while not self._writable.is_set():  # another caller may have filled it again
            await self._writable.wait()
        if self.closed:
            raise BackendConnectionError(f"the connection to {self._where} is closed")

    @property
    def ready(self) -> bool:
        """Whether `begin` may be called: it is connected, and not held back by a server that reads too slowly."""
        return not self.closed and self._writable.is_set()

    def begin(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """As `request`, but what is sent is sent when this returns. Not to be cancelled."""
        return self._post(b"".join(map(_pack, commands)), len(commands))

    def _post(self, data: bytes, want: int, one_command: bool = False) -> asyncio.Future[list[Any]]:
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        self._transport.write(data)
        if not self._requests:
            self._asked_at = self._loop.time()
        self._requests.append(_Request(future, want, one_command))
        return future

    # -- life -------------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """A dead peer is noticed within three heartbeats: one of silence, and two without an answer to the ping.

        So the next beat is set for the moment at which either is due; a beat at fixed intervals would be late for both.
        """
        now, unsent = self._loop.time(), self._transport.get_write_buffer_size()
        if unsent < self._unsent:
            self._asked_at = now  # a large value on a slow line is a sign of life
        self._unsent = unsent
        due = self._heard_at + self._heartbeat
        if not self._requests and now >= due:
            self._asked_at = now
            self._requests.append(_Request(self._loop.create_future(), 1, False))
            self._transport.write(_pack(("PING",)))
        if self._requests:
            due = max(self._heard_at, self._asked_at) + 2 * self._heartbeat
            if now >= due:
                self._fail(BackendConnectionError(f"{self._where} has not answered for {2 * self._heartbeat:g} s"))
                return
        self._timer = self._loop.call_at(min(due, now + self._heartbeat), self._beat)

    def _fail(self, error: BackendError) -> None:
        if self.closed:
            return
        self.closed = True
        self._stop_timer()
        self._transport.abort()
        self._writable.set()  # whoever waits to write finds it closed
        requests, self._requests = self._requests, deque()
        for request in requests:
            if not request.future.done():
                broken = twin(error)
                if isinstance(broken, BackendConnectionError):
                    broken.in_flight = True
                fail(request.future, broken)
        if self._on_lost is not None:
            self._on_lost(error)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def abandon(self) -> None:
        """Forget the socket: it belongs to an event loop that has ended, or to the parent process."""
        self._on_lost = None
        self._stop_timer()
        self.closed = True
        silence(self._transport)

    async def close(self) -> None:
        """Close the socket; what is in flight fails."""
        self._on_lost = None
        self._stop_timer()
        if not self.closed:
            self._fail(BackendConnectionError(f"the connection to {self._where} was closed"))
        await self._link.disconnect(nowait=True)


def take_over(link: AbstractConnection, protocol: asyncio.Protocol) -> asyncio.Transport:
    """The transport of a connected redis-py connection, with ``protocol`` in place of redis-py's reader.

    The one place that needs something private of redis-py: the stream writer, for its transport (5.0.1 to 8.1; the
    attribute has had this name since the asyncio client came in 4.2). The handshake has been answered in full, so
    nothing is buffered. ``link`` must be kept: it owns the writer, which closes the transport when it is collected.
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
