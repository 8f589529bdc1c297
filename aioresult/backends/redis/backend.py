"""The Redis backend: it uses Celery's keys and Celery's messages, and two connections for any number of waiters.

One connection carries commands, the other one subscriptions. They are separate because the server disconnects a
subscriber that falls behind (``client-output-buffer-limit pubsub``), and the commands must not suffer from that. The
first wait opens the connection for subscriptions, so a worker that only stores has one connection.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import NoneType
from typing import Any, TypeVar, Unpack

import hiredis
from redis.asyncio.connection import AbstractConnection

from ...chord import ChordOp, ChordState, ChordStep
from ...exceptions import (
    BackendConnectionError,
    BackendError,
    BackendGetMetaError,
    BackendRefusedError,
    BackendStoreError,
    SerializationError,
)
from ...options import checked_flag, checked_option
from ...progress import GroupCounts
from ...record import Record
from ...tasks import SingleFlight
from ..base import BackendOptions
from ..keyvalue import Op, Write, sibling
from .connection import WAITERS_FIRST, Command, RedisConnection, code_of, translate
from .groups import count_keys, extend_command, milliseconds
from .runs import NOT_TOLD, RunningTasks
from .scripts import CHORD, FORGET, PUT, REGISTER, SCRIPTS
from .url import connection_options, leads_elsewhere, resolved_url

__all__ = ["RedisBackend"]

T = TypeVar("T")


class RedisBackend(RunningTasks):
    """Keeps results in Redis 6.2 or later, or in Valkey.

    The URL is ``redis://[user:password@]host[:port][/database]``, ``rediss://`` for TLS, ``unix://`` or
    ``redis+socket://``. ``valkey://`` and ``valkeys://`` mean the same as ``redis://`` and ``rediss://``. The query of
    the URL takes redis-py's connection options: ``?protocol=2``, ``?client_name=web``, ``?socket_connect_timeout=3``,
    ``?ssl_ca_certs=/etc/ca.pem``. Certificates are verified unless the query has ``?ssl_cert_reqs=none``.
    ``?credential_provider=package.module.Class`` names a `redis.CredentialProvider`, which provides the user name and
    the password.

    Further options:

    - ``connect_options``: arguments for redis-py's asyncio connection, as objects instead of text: ``password``,
      ``credential_provider``, ``ssl_ca_data``, ``socket_connect_timeout`` (seconds), ``host``, ``port``, ``db``, … They
      take precedence over the URL. The scheme of the URL alone decides whether the connection uses TLS.
    - ``chord_ordered``: Celery's ``result_chord_ordered``. With ``False`` the parts of a chord, which are the outcomes
      of its header's tasks, are kept in the order in which they arrive. Celery's workers need the same setting.
    """

    # Use small batches, and many in flight at once. The connection is pipelined: a batch need not wait for the batch
    # before it. The callers in the first batch continue while the server works on the others.
    store_chunk = 50
    store_parallel = 20
    chunk_bytes = 2**20

    # The last part of a chord may come from a Celery worker, and Celery's script publishes nothing on the group's key.
    chords_beside = True

    def __init__(
        self,
        url: str = "redis://",
        *,
        global_keyprefix: str = "",
        connect_options: Mapping[str, Any] | None = None,
        chord_ordered: bool = True,
        **options: Unpack[BackendOptions],
    ) -> None:
        given = checked_option("connect_options", connect_options, (Mapping, NoneType), "a mapping or None") or {}
        self._connection_class, self._connection_options = connection_options(url, given)
        if leads_elsewhere(given):
            url = resolved_url(self._connection_class, self._connection_options)
        super().__init__(url, global_keyprefix=global_keyprefix, **options)
        self._chord_ordered = checked_flag("chord_ordered", chord_ordered)
        self._commands: RedisConnection | None = None
        self._listener: RedisConnection | None = None
        self._connected: SingleFlight[RedisConnection] = SingleFlight(self._connect)

    @property
    def store_id(self) -> Hashable:
        """Return what identifies the store: the class, the server, the database and the prefix.

        The returned value is the same for ``redis://`` and ``valkey://``.
        """
        place = resolved_url(self._connection_class, self._connection_options)
        return type(self), place, self._task_prefix

    async def _open(self) -> None:
        self._connected = SingleFlight(self._connect)
        await self._connected()

    async def _close(self) -> None:
        await self._connected.stop()
        for connection in (self._commands, self._listener):
            if connection is not None:
                await connection.close()
        self._commands = self._listener = None

    def _abandon(self, forked: bool) -> None:
        for connection in (self._commands, self._listener):
            if connection is not None:
                connection.abandon()
        self._commands = self._listener = None

    async def _connect(self) -> RedisConnection:
        """Return the connection for commands, or a new one if it is lost. Concurrent callers share one attempt."""
        if self._commands is None or self._commands.closed:
            if self._commands is not None:
                await self._commands.close()
            self._commands = None
            connection = RedisConnection(self.as_uri(), self.heartbeat)
            await connection.connect(self._new_link())
            try:
                await self._load_scripts(connection)
            except BaseException:
                await connection.close()
                raise
            self._commands = connection
        return self._commands

    def _new_link(self) -> AbstractConnection:
        return self._connection_class(**self._connection_options)

    async def _load_scripts(self, connection: RedisConnection) -> None:
        for reply in await connection.request([("SCRIPT", "LOAD", script) for script in SCRIPTS.values()]):
            if isinstance(reply, hiredis.ReplyError):
                raise translate(reply, self.as_uri())

    async def _execute(self, commands: Sequence[Command]) -> list[Any]:
        """Send the commands, and return the reply to each.

        Raises if any reply says that the server is not ready. Then the caller must repeat all of the commands.
        """
        connection = self._commands
        if connection is None or connection.closed:
            connection = await self._connected()
        replies = await connection.request(commands)
        if refused := [index for index, reply in enumerate(replies) if isinstance(reply, hiredis.ReplyError)]:
            await self._retry_refused(connection, commands, replies, refused)
        return replies

    async def _ping(self) -> None:
        (reply,) = await self._execute([("PING",)])
        if isinstance(reply, hiredis.ReplyError):
            raise translate(reply, self.as_uri())

    async def _retry_refused(
        self, connection: RedisConnection, commands: Sequence[Command], replies: list[Any], refused: Sequence[int]
    ) -> None:
        """Load missing scripts and repeat their commands, and put the new replies in place of the errors.

        Raises if the server is not ready.
        """
        missing = [index for index in refused if code_of(replies[index]) == "NOSCRIPT"]
        if missing:  # after SCRIPT FLUSH, or after a restart of the server behind a proxy that kept the connection
            await self._load_scripts(connection)
            again = await connection.request([commands[index] for index in missing])
            for index, reply in zip(missing, again, strict=True):
                replies[index] = reply
        for reply in [replies[index] for index in refused]:
            if isinstance(reply, hiredis.ReplyError):
                await self._raise_if_not_ready(reply, connection)

    async def _raise_if_not_ready(self, reply: hiredis.ReplyError, connection: RedisConnection | None = None) -> None:
        error = translate(reply, self.as_uri())
        if isinstance(error, BackendConnectionError):
            connection = connection or self._commands
            if code_of(reply) == "READONLY" and connection is not None:
                await connection.close()  # after a failover the host name may lead to the new master: reconnect
            raise error

    async def _get(self, keys: Sequence[str]) -> list[bytes | BaseException | None]:
        # Do not use MGET: it needs all keys in one slot, and would block the server while it copies all the values.
        replies = await self._execute([("GET", key) for key in keys])
        return [
            self._refusal(reply, BackendGetMetaError, f"read {key}") if isinstance(reply, hiredis.ReplyError) else reply
            for key, reply in zip(keys, replies, strict=True)
        ]

    async def _write(self, writes: Sequence[Write]) -> list[bool | BaseException]:
        _, *replies = await self._execute([WAITERS_FIRST, *map(_command, writes)])
        outcomes: list[bool | BaseException] = []
        judged: set[str] = set()
        for write, reply in zip(writes, replies, strict=True):
            if isinstance(reply, int) and write.key not in judged:
                outcomes.append(reply == 1)
                continue
            if write.key in judged:  # an earlier write of this batch has replaced the value that the script saw
                reply = await self._replace(write, b"")
            judged.add(write.key)
            outcomes.append(await self._judged(write, reply))
        return outcomes

    def _store_at_once(self, record: Record, done: Callable[[bool | BaseException | None], None]) -> bool:
        if not self.codec.plain or record.group_id:
            return False

        def outcome(replies: list[Any]) -> bool | None:
            return replies[1] == 1 if isinstance(replies[1], int) else None

        return self._at_once([WAITERS_FIRST, _command(self._put(record))], outcome, done)

    def _at_once(
        self,
        commands: Sequence[Command],
        outcome: Callable[[list[Any]], T | None],
        done: Callable[[T | BaseException | None], None],
    ) -> bool:
        connection = self._commands
        if connection is None or not connection.ready:
            return False

        def replied(replies: asyncio.Future[list[Any]]) -> None:
            error = replies.exception()
            done(outcome(replies.result()) if error is None else error)

        connection.begin(commands).add_done_callback(replied)
        return True

    async def _judged(self, write: Write, reply: Any) -> bool | BaseException:
        """Return the outcome of ``write``. ``reply`` may be an error, or a value that only the codec can read."""
        try:
            while isinstance(reply, bytes) and write.op in _JUDGED:
                stays = self.codec.is_final if write.op is Op.PUT_UNLESS_FINAL else self.codec.is_success
                reply = 0 if stays(reply) else await self._replace(write, reply)
        except SerializationError as exc:
            return exc
        if isinstance(reply, hiredis.ReplyError):
            return self._refusal(reply, BackendStoreError, f"store {write.key}")
        return bool(reply)

    async def _replace(self, write: Write, current: bytes) -> Any:
        """Replace ``current``, a value that the script could not read. The server first compares its digest."""
        digest = hashlib.sha1(current).hexdigest()  # noqa: S324 - Redis has only SHA-1; it is not used for security
        (reply,) = await self._execute([_command(write, digest)])
        return reply

    def _refusal(self, reply: hiredis.ReplyError, kind: type[BackendError], what: str) -> BackendError:
        error = translate(reply, self.as_uri())
        if code_of(reply) == NOT_TOLD:
            return BackendRefusedError(
                f"cannot {what}: {self.as_uri()} does not let this user publish, and nothing is stored without its "
                f"message; grant the right with ACL SETUSER <user> '&{self._task_prefix}*' '&{self._group_prefix}*' "
                f"'&{self._ready_channel}' '&{{{self._task_prefix}*' '&{self._worker_prefix.removesuffix('-')}*'"
            )
        if code_of(reply) in ("NOPERM", "NOAUTH", "MOVED", "ASK", "CROSSSLOT"):
            return error
        return kind(f"cannot {what}: {error}")

    async def _versions(self, task_ids: Sequence[str]) -> list[bytes | BaseException | None]:
        replies = await self._execute([_forget(self._task_key(task_id)) for task_id in task_ids])
        return [
            self._refusal(reply, BackendStoreError, f"forget {task_id}")
            if isinstance(reply, hiredis.ReplyError)
            else reply
            for task_id, reply in zip(task_ids, replies, strict=True)
        ]

    # -- groups -----------------------------------------------------------------------------------------------------

    async def _count_group(self, group_id: str, size: int, expires: float) -> None:
        *_, total = count_keys(self._group_key(group_id))
        (outcome,) = await self._write([Write(total, Op.PUT, str(size).encode(), expires)])
        # The user may have rights to results and groups, but not to the counts. Then waiters count the results.
        if isinstance(outcome, BaseException) and not isinstance(outcome, BackendRefusedError):
            raise outcome

    async def _group_size(self, group_id: str) -> int | None:
        *_, total = count_keys(self._group_key(group_id))
        (size,) = await self._get([total])
        if isinstance(size, BaseException) and not isinstance(size, BackendRefusedError):
            raise size
        return int(size) if isinstance(size, bytes) and size.isdigit() else None

    async def _group_counts(self, group_id: str) -> GroupCounts:
        succeeded, failed, _ = count_keys(self._group_key(group_id))
        counts = await self._execute([("BITCOUNT", succeeded), ("BITCOUNT", failed)])
        for count in counts:
            if isinstance(count, hiredis.ReplyError):
                raise self._refusal(count, BackendGetMetaError, f"count the members of group {group_id}")
        return GroupCounts(*counts)

    async def _delete_group(self, group_id: str) -> None:
        key = self._group_key(group_id)
        outcome, *_ = await self._write([Write(each, Op.DELETE) for each in (key, *count_keys(key))])
        if isinstance(outcome, BaseException):
            raise outcome

    # -- chords -----------------------------------------------------------------------------------------------------

    async def _chord_steps(self, steps: Sequence[ChordStep]) -> list[ChordState | BaseException]:
        commands: list[Command] = []
        noted: set[tuple[str, int, str]] = set()
        for step in steps:
            # The set of chords that may be complete is another key, perhaps on another node, so it cannot be part of
            # the atomic step. Its entry is added before the step and removed after it: a spare entry does no harm.
            if step.op in (ChordOp.CREATE, ChordOp.SIZE, ChordOp.PART, ChordOp.CLAIM, ChordOp.RENEW):
                only_known = "XX" if step.op in (ChordOp.CLAIM, ChordOp.RENEW) else ""
                entry = (step.group_id, milliseconds(step.expires), only_known)
                if entry not in noted:
                    noted.add(entry)
                    commands.append(("EVALSHA", REGISTER, 1, self._ready_channel, *entry))
            commands.append(self._chord_command(step))
        replies = await self._execute(commands)
        taken = [reply for command, reply in zip(commands, replies, strict=True) if command[:2] == ("EVALSHA", CHORD)]
        outcomes = [await self._chord_outcome(step, reply) for step, reply in zip(steps, taken, strict=True)]
        over: set[str] = set()
        for step, outcome in zip(steps, outcomes, strict=True):
            if isinstance(outcome, ChordState) and step.op not in (ChordOp.READ, ChordOp.PARTS):
                if outcome.done or outcome == ChordState():
                    over.add(step.group_id)
                else:
                    over.discard(step.group_id)
        if over:
            await self._execute([("ZREM", self._ready_channel, *over)])
        return outcomes

    def _chord_command(self, step: ChordStep) -> Command:
        key = self._group_key(step.group_id)
        keys = [key, *(f"{key}.{suffix}" for suffix in "jstdcar")]
        size = "" if step.size is None else step.size
        index = "+inf" if step.index is None else step.index
        times = (milliseconds(step.lease), milliseconds(step.expires), milliseconds(step.group_expires))
        terms = (step.token, *times, size, step.body or b"", step.body_id, step.run)
        part = (step.task_id, index, step.part, int(step.failed), int(self._chord_ordered))
        return ("EVALSHA", CHORD, len(keys), *keys, step.op.value, step.group_id, self._ready_channel, *terms, *part)

    async def _chord_outcome(self, step: ChordStep, reply: Any) -> ChordState | BaseException:
        if isinstance(reply, hiredis.ReplyError):
            return self._refusal(reply, BackendStoreError, f"do a step of chord {step.group_id}")
        count, size, claimed, done, body, failure, left, is_list, where, ours, body_id = reply
        parts: tuple[bytes, ...] = ()
        if step.op is ChordOp.PARTS and where:
            parts = await self._chord_parts(self._group_key(step.group_id) + where.decode(), bool(is_list))
            if len(parts) < count:  # the chord was finished meanwhile, and its parts were moved to the other key
                return (await self._chord_steps([step]))[0]
        return ChordState(
            count,
            None if size < 0 else size,
            bool(claimed),
            bool(done),
            body,
            failure,
            left / 1000 if left >= 0 else None,
            parts,
            bool(ours),
            (body_id or b"").decode("utf-8", "surrogateescape"),
        )

    async def _chord_parts(self, key: str, is_list: bool) -> tuple[bytes, ...]:
        """Read the parts of a chord in pieces: one reply with a hundred thousand parts would block the server."""
        parts: list[bytes] = []
        while len(parts) % self.fetch_chunk == 0:
            first, last = len(parts), len(parts) + self.fetch_chunk - 1
            (piece,) = await self._execute([("LRANGE" if is_list else "ZRANGE", key, first, last)])
            if isinstance(piece, hiredis.ReplyError):
                raise self._refusal(piece, BackendGetMetaError, "read the parts of a chord")
            if not piece:
                break
            parts.extend(piece)
        return tuple(parts)

    async def _active_chords(self) -> list[str]:
        (members,) = await self._execute([("ZRANGE", self._ready_channel, 0, -1)])
        if isinstance(members, hiredis.ReplyError):
            raise self._refusal(members, BackendGetMetaError, "list chords")
        return [member.decode("utf-8", "surrogateescape") for member in members]

    # -- subscriptions ----------------------------------------------------------------------------------------------

    async def _listen(self, channels: Sequence[str]) -> Mapping[str, Exception] | None:
        if self._listener is None or self._listener.closed:
            if self._listener is not None:
                await self._listener.close()
            self._listener = None
            connection = RedisConnection(self.as_uri(), self.heartbeat, self._published, self._listener_lost)
            await connection.connect(self._new_link())
            self._listener = connection
        return await self._confirm(self._listener, "SUBSCRIBE", channels)

    async def _unlisten(self, channels: Sequence[str]) -> None:
        if self._listener is not None and not self._listener.closed:
            await self._confirm(self._listener, "UNSUBSCRIBE", channels)

    async def _confirm(
        self, listener: RedisConnection, command: str, channels: Sequence[str]
    ) -> Mapping[str, Exception] | None:
        """Do ``command`` for all channels. Returns the error of each channel that the server refuses, if any."""
        error = _refused(await listener.request_many((command, *channels), len(channels)), self.as_uri())
        if error is None:
            return None
        if isinstance(error, BackendConnectionError):
            raise error
        if len(channels) == 1:
            return {channels[0]: error}
        # The server refuses the whole command if it refuses one channel. So ask for each channel separately.
        replies = await asyncio.gather(*(listener.request_many((command, channel), 1) for channel in channels))
        errors = {channel: _refused(reply, self.as_uri()) for channel, reply in zip(channels, replies, strict=True)}
        return {channel: refusal for channel, refusal in errors.items() if refusal is not None}


#: The writes to which the script may reply with the stored value, because only the codec can read that value.
_JUDGED = (Op.PUT_UNLESS_SUCCESS, Op.PUT_UNLESS_FINAL)


def _refused(replies: Sequence[Any], where: str) -> BackendError | None:
    return translate(replies[-1], where) if isinstance(replies[-1], hiredis.ReplyError) else None


def _command(write: Write, digest: str = "") -> Command:
    ttl = milliseconds(write.expires)
    match write.op:
        case Op.PUT_UNLESS_SUCCESS:
            more = ("", digest) if digest else ()
            return "EVALSHA", PUT, 1, write.key, write.value, ttl, *more
        case Op.PUT_UNLESS_FINAL:
            return "EVALSHA", PUT, 1, write.key, write.value, ttl, "unfinished", digest
        case Op.PUT_IF_ABSENT:
            return "EVALSHA", PUT, 1, write.key, write.value, ttl, "absent"
        case Op.PUT:
            return ("SET", write.key, write.value, "PX", ttl) if ttl else ("SET", write.key, write.value)
        case Op.EXTEND:
            return extend_command(write.key, write.expires, write.member, write.failed)
        case Op.DELETE:
            return (*_forget(write.key), write.value) if write.value else ("UNLINK", write.key)


def _forget(key: str) -> Command:
    return "EVALSHA", FORGET, 1, key, sibling(key, ".run"), sibling(key, ".out")
