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
    BackendError,
    BackendGetMetaError,
    BackendRefusedError,
    BackendStoreError,
    SerializationError,
)
from ...options import checked_flag, checked_option
from ...progress import GroupCounts
from ...record import Record
from ..base import BackendOptions
from ..keyvalue import Op, Write, sibling
from .chords import CHORD_SUFFIXES, chord_command, chord_state, parts_key
from .connection import WAITERS_FIRST, Command, code_of, translate
from .groups import count_keys, extend_command, milliseconds
from .node import Node, NodeEvents
from .runs import NOT_TOLD, RunningTasks
from .scripts import PLAIN, Scripts
from .topology import Single, Topology
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

    _scripts: Scripts = PLAIN

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
        super().__init__(self._read_url(url, given), global_keyprefix=global_keyprefix, **options)
        self._chord_ordered = checked_flag("chord_ordered", chord_ordered)
        self._topology: Topology = self._new_topology()

    @property
    def store_id(self) -> Hashable:
        """Return what identifies the store: the class, the server, the database and the prefix.

        The returned value is the same for ``redis://`` and ``valkey://``.
        """
        place = resolved_url(self._connection_class, self._connection_options)
        return type(self), place, self._task_prefix

    def _read_url(self, url: str, given: Mapping[str, Any]) -> str:
        """Read ``url`` and ``connect_options``. Returns the URL by which the backend is known in errors."""
        self._connection_class, self._connection_options = connection_options(url, given)
        return resolved_url(self._connection_class, self._connection_options) if leads_elsewhere(given) else url

    def _new_topology(self) -> Topology:
        """Return what knows the servers. It is made anew each time the backend is opened."""

        async def link() -> AbstractConnection:
            return self._connection_class(**self._connection_options)

        events = NodeEvents(self._published, self._lost_by_node)  # no other server knows whether this one is away
        return Single(Node(self.as_uri(), link, self.heartbeat, self._scripts, events))

    async def _open(self) -> None:
        self._topology = self._new_topology()
        await self._topology.open()

    async def _close(self) -> None:
        await self._topology.close()

    def _abandon(self, forked: bool) -> None:
        self._topology.abandon()

    def _lost_by_node(self, node: Node, reason: BackendError, channels: Sequence[bytes]) -> None:
        self._listener_lost(reason)

    # -- commands ---------------------------------------------------------------------------------------------------

    async def _execute(self, commands: Sequence[Command]) -> list[Any]:
        return await self._topology.execute(commands)

    async def _ping(self) -> None:
        (reply,) = await self._execute([("PING",)])
        if isinstance(reply, hiredis.ReplyError):
            raise translate(reply, self.as_uri())

    def _raise_if_not_ready(self, reply: hiredis.ReplyError) -> None:
        self._topology.raise_if_not_ready(reply)

    async def _get(self, keys: Sequence[str]) -> list[bytes | BaseException | None]:
        # Do not use MGET: it needs all keys in one slot, and would block the server while it copies all the values.
        replies = await self._execute([("GET", key) for key in keys])
        return [
            self._refusal(reply, BackendGetMetaError, f"read {key}") if isinstance(reply, hiredis.ReplyError) else reply
            for key, reply in zip(keys, replies, strict=True)
        ]

    async def _write(self, writes: Sequence[Write]) -> list[bool | BaseException]:
        _, *replies = await self._execute([WAITERS_FIRST, *map(self._command, writes)])
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

        put = self._put(record)
        return self._at_once(put.key, [WAITERS_FIRST, self._command(put)], outcome, done)

    def _at_once(
        self,
        key: str,
        commands: Sequence[Command],
        outcome: Callable[[list[Any]], T | None],
        done: Callable[[T | BaseException | None], None],
    ) -> bool:
        connection = self._topology.connection_for(key)
        if connection is None:
            return False

        def replied(replies: asyncio.Future[list[Any]]) -> None:
            error = replies.exception()
            done(outcome(replies.result()) if error is None else error)

        connection.begin(commands).add_done_callback(replied)
        return True

    def _command(self, write: Write, digest: str = "") -> Command:
        ttl = milliseconds(write.expires)
        match write.op:
            case Op.PUT_UNLESS_SUCCESS:
                more = ("", digest) if digest else ()
                return "EVALSHA", self._scripts.put, 1, write.key, write.value, ttl, *more
            case Op.PUT_UNLESS_FINAL:
                return "EVALSHA", self._scripts.put, 1, write.key, write.value, ttl, "unfinished", digest
            case Op.PUT_IF_ABSENT:
                return "EVALSHA", self._scripts.put, 1, write.key, write.value, ttl, "absent"
            case Op.PUT:
                return ("SET", write.key, write.value, "PX", ttl) if ttl else ("SET", write.key, write.value)
            case Op.EXTEND:
                return extend_command(self._scripts, write.key, write.expires, write.member, write.failed)
            case Op.DELETE:
                return (*self._forget_command(write.key), write.value) if write.value else ("UNLINK", write.key)

    def _forget_command(self, key: str) -> Command:
        return "EVALSHA", self._scripts.forget, 1, key, sibling(key, ".run"), sibling(key, ".out")

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
        (reply,) = await self._execute([self._command(write, digest)])
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
        replies = await self._execute([self._forget_command(self._task_key(task_id)) for task_id in task_ids])
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
        # The set of chords that may be complete is another key, perhaps on another node, so it cannot be part of the
        # atomic step. Its entry is added before the step and removed after it: a spare entry does no harm.
        entries: dict[Command, None] = {}
        for step in steps:
            if step.op in (ChordOp.CREATE, ChordOp.SIZE, ChordOp.PART, ChordOp.CLAIM, ChordOp.RENEW):
                only_known = "XX" if step.op in (ChordOp.CLAIM, ChordOp.RENEW) else ""
                entries[(step.group_id, milliseconds(step.expires), only_known)] = None
        register: list[Command] = [
            ("EVALSHA", self._scripts.register, 1, self._ready_channel, *entry) for entry in entries
        ]
        replies = await self._execute_in_turn(register, [self._chord_command(step) for step in steps])
        outcomes = [await self._chord_outcome(step, reply) for step, reply in zip(steps, replies, strict=True)]
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

    async def _execute_in_turn(self, first: Sequence[Command], then: Sequence[Command]) -> list[Any]:
        """Execute ``first`` before ``then``. Returns the replies to ``then``."""
        return (await self._execute([*first, *then]))[len(first) :]

    def _chord_key(self, group_key: str, suffix: str) -> str:
        """Return the name of a further key of a chord: Celery's name."""
        return group_key + suffix

    def _chord_command(self, step: ChordStep) -> Command:
        key = self._group_key(step.group_id)
        keys = [key, *(self._chord_key(key, suffix) for suffix in CHORD_SUFFIXES)]
        return chord_command(self._scripts, keys, self._ready_channel, step, self._chord_ordered)

    async def _chord_outcome(self, step: ChordStep, reply: Any) -> ChordState | BaseException:
        if isinstance(reply, hiredis.ReplyError):
            return self._refusal(reply, BackendStoreError, f"do a step of chord {step.group_id}")
        parts: tuple[bytes, ...] = ()
        where, is_list = parts_key(reply)
        if step.op is ChordOp.PARTS and where:
            parts = await self._chord_parts(self._chord_key(self._group_key(step.group_id), where), is_list)
            if len(parts) < reply[0]:  # the chord was finished meanwhile, and its parts were moved to the other key
                return (await self._chord_steps([step]))[0]
        return chord_state(reply, parts)

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
        return await self._topology.subscribe(channels)

    async def _unlisten(self, channels: Sequence[str]) -> None:
        await self._topology.unsubscribe(channels)


#: The writes to which the script may reply with the stored value, because only the codec can read that value.
_JUDGED = (Op.PUT_UNLESS_SUCCESS, Op.PUT_UNLESS_FINAL)
