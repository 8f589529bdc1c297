"""Defines `KeyValueStoreBackend`, the base of backends on a store that has keys, values and channels.

The keys are Celery's (``celery/backends/base.py``: ``BaseKeyValueStoreBackend``). Each key is also the name of a
channel: every result that is stored under the key is published there. An author implements six methods; `Write`
describes the changes that they make.
"""

from __future__ import annotations

import enum
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

from ..chord import CHORD_TOPIC, READY_TOPIC
from ..exceptions import DecodeError, InvalidCursor
from ..log import OUTPUT_TOPIC, Place
from ..meta import ResultTuple
from ..options import checked_text
from ..progress import GROUP_TOPIC
from ..record import Record
from ..run import WORKER_TOPIC, WORKERS_TOPIC
from .base import Backend, BackendOptions

__all__ = ["KeyValueStoreBackend", "Op", "Write", "output_message", "sibling"]


class Op(enum.Enum):
    """The operation that a `Write` does. Each operation is atomic and idempotent."""

    #: Store and publish, unless the stored value is a success (`Codec.is_success`).
    PUT_UNLESS_SUCCESS = enum.auto()
    #: Store and publish, unless the stored value is a final state (`Codec.is_final`).
    PUT_UNLESS_FINAL = enum.auto()
    #: Store and publish, unless anything is stored.
    PUT_IF_ABSENT = enum.auto()
    #: Store, and publish nothing.
    PUT = enum.auto()
    #: Keep the stored value for at least ``expires`` more seconds. If the store counts the members of groups, it also
    #: counts the member with the index ``member`` as over.
    EXTEND = enum.auto()
    #: Remove. With a ``value``, remove only if the stored value still has that version (`Backend._versions`).
    DELETE = enum.auto()


class Write(NamedTuple):
    """One change of one key."""

    key: str
    op: Op
    value: bytes = b""
    #: Seconds to live from now; 0 for ever.
    expires: float = 0.0
    #: For `Op.EXTEND`: the index of the group's member that is over, ``None`` to count nothing.
    member: int | None = None
    #: For `Op.EXTEND`: true if that member has failed.
    failed: bool = False


class KeyValueStoreBackend(Backend):
    """The base of backends on a key-value store.

    It has one further option, ``global_keyprefix``: a text before every key and channel. Use it if several
    applications share the store.

    For authors: implement six methods, `_open`, `_close`, `_get`, `_write`, `_listen` and `_unlisten`, under the rules
    of `Backend`. Call `_published` with each message that arrives.

    A store that can do a `ChordStep` atomically can count chords. Implement `_chord_steps` and `_active_chords`.
    Publish on the channel of the group's key whenever a chord completes or fails. Publish the id of the chord on
    ``_ready_channel`` whenever there may be a callback to dispatch.

    For running tasks implement `_append`, `_pages`, `_run_steps`, `_beat` and `_alive`, and publish

    - with each flush (some output of a task), the bytes of `output_message`, on the channel ``sibling(key, ".out")``;
    - when a run (one attempt of a task) must stop, the id of the run, on the channel of its worker;
    - when a worker has died or shut down, the worker's id, on ``_workers_channel``.
    """

    def __init__(self, url: str = "", *, global_keyprefix: str = "", **options: Unpack[BackendOptions]) -> None:
        super().__init__(url, **options)
        checked_text("global_keyprefix", global_keyprefix)
        if global_keyprefix and global_keyprefix[-1] not in ":_-.":
            global_keyprefix += "_"
        self._task_prefix = f"{global_keyprefix}celery-task-meta-"
        self._group_prefix = f"{global_keyprefix}celery-taskset-meta-"
        self._task_channel = self._task_prefix.encode()
        self._group_channel = self._group_prefix.encode()
        #: One name for two things. The channel announces completed chords. The key holds the set of the chords that may
        #: be complete.
        self._ready_channel = f"{global_keyprefix}aioresult-chords"
        self._announcements = self._ready_channel.encode()
        #: One name for two things. The key holds the leases of the workers, which say until when each counts as alive.
        #: The channel announces the workers that have died or shut down.
        self._workers_channel = f"{global_keyprefix}aioresult-workers"
        self._worker_prefix = f"{global_keyprefix}aioresult-worker-"
        #: Channel → topic, for the subscribed channels that carry neither results nor chords. A topic is the hub's name
        #: for what its waiters wait for: the id of a task, or a prefix that begins with NUL and an id. Such a channel
        #: may look like that of a result: the output of task "{a}" has the channel "celery-task-meta-{a}.out".
        self._routes: dict[bytes, str] = {}

    @property
    def store_id(self) -> Hashable:
        """Return what identifies the store: the class, the URL and the prefix."""
        return type(self), self.as_uri(), self._task_prefix

    @abstractmethod
    async def _get(self, keys: Sequence[str]) -> Sequence[bytes | BaseException | None]:
        """Return the value of each key, ``None`` if there is none, or the error that concerns this key alone."""

    @abstractmethod
    async def _write(self, writes: Sequence[Write]) -> Sequence[bool | BaseException]:
        """Do the writes in order. Storing a value and publishing it is one atomic step.

        For each write, returns whether it changed anything, or the error that concerns this write alone.
        """

    @abstractmethod
    async def _listen(self, channels: Sequence[str]) -> Mapping[str, Exception] | None:
        """Subscribe to channels, by the same rules as `Backend._subscribe`."""

    @abstractmethod
    async def _unlisten(self, channels: Sequence[str]) -> None:
        """Unsubscribe from channels, by the same rules as `Backend._unsubscribe`."""

    def _published(self, channel: bytes, value: bytes) -> None:
        """Pass a message on to its waiters. A backend calls this with each message that arrives."""
        if self._routes and (topic := self._routes.get(channel)) is not None and self._routed(topic, value):
            return
        if channel.startswith(self._task_channel):
            self._received(_text(channel[len(self._task_channel) :]), value)
        elif channel.startswith(self._group_channel):
            self._chord_news(_text(channel[len(self._group_channel) :]), ready=False)
        elif channel == self._announcements:
            self._chord_news(_text(value), ready=True)

    def _routed(self, topic: str, value: bytes) -> bool:
        """Pass on a message about a running task or a group, and return true. Return false for any other message.

        Other messages arrive here, too: any client may publish on the channel. And the output of task "{a}" has the
        same channel as the result of task "{a}.out".
        """
        if topic.startswith(OUTPUT_TOPIC):
            cursor, _, data = value.partition(b" ")
            try:
                epoch, last = Place.parse(_text(cursor))
            except InvalidCursor:
                return False
            self._output_news(topic.removeprefix(OUTPUT_TOPIC), epoch, last, data or None)
        elif topic == WORKERS_TOPIC:
            self._worker_news(_text(value))
        elif topic.startswith(GROUP_TOPIC):
            self._group_news(topic.removeprefix(GROUP_TOPIC))
        else:
            self._revoke_news(topic.removeprefix(WORKER_TOPIC), _text(value))
        return True

    def _channel(self, topic: str) -> str:
        if not topic.startswith("\x00"):
            return self._task_key(topic)
        if topic.startswith(CHORD_TOPIC):
            return self._group_key(topic.removeprefix(CHORD_TOPIC))
        if topic.startswith(OUTPUT_TOPIC):
            return sibling(self._task_key(topic.removeprefix(OUTPUT_TOPIC)), ".out")
        if topic.startswith(WORKER_TOPIC):
            return self._worker_prefix + topic.removeprefix(WORKER_TOPIC)
        if topic.startswith(GROUP_TOPIC):
            return sibling(self._group_key(topic.removeprefix(GROUP_TOPIC)), ".n")
        return self._ready_channel if topic == READY_TOPIC else self._workers_channel

    def _task_key(self, task_id: str) -> str:
        return self._task_prefix + task_id

    def _group_key(self, group_id: str) -> str:
        return self._group_prefix + group_id

    async def _fetch(self, task_ids: Sequence[str]) -> Sequence[bytes | BaseException | None]:
        return await self._get([self._task_prefix + task_id for task_id in task_ids])

    async def _store(self, records: Sequence[Record]) -> Sequence[bool | BaseException]:
        writes = list(map(self._put, records))
        if not self.groups_apart:
            writes += self._extensions(records)
        return (await self._write(writes))[: len(records)]

    def _extensions(self, records: Sequence[Record]) -> list[Write]:
        """Return the writes by which groups live at least as long as their members."""
        return [
            Write(self._group_key(record.group_id), Op.EXTEND, b"", record.expires, record.group_index, record.failed)
            for record in records
            if record.group_id
        ]

    async def _extend_groups(self, records: Sequence[Record]) -> Sequence[bool | BaseException]:
        return await self._write(self._extensions(records))

    def _put(self, record: Record) -> Write:
        op = Op.PUT_IF_ABSENT if record.only_new else Op.PUT_UNLESS_FINAL if record.custom else Op.PUT_UNLESS_SUCCESS
        return Write(self._task_prefix + record.task_id, op, record.payload, record.expires)

    async def _delete(self, task_ids: Sequence[str], versions: Sequence[bytes]) -> Sequence[BaseException | None]:
        keys = map(self._task_key, task_ids)
        outcomes = await self._write(
            [Write(key, Op.DELETE, version) for key, version in zip(keys, versions, strict=True)]
        )
        return [outcome if isinstance(outcome, BaseException) else None for outcome in outcomes]

    async def _subscribe(self, task_ids: Sequence[str]) -> Mapping[str, Exception] | None:
        self._note_routes(task_ids)
        refused = await self._listen([self._channel(task_id) for task_id in task_ids])
        if not refused:
            return None
        return {task_id: error for task_id in task_ids if (error := refused.get(self._channel(task_id))) is not None}

    def _note_routes(self, topics: Iterable[str]) -> None:
        for topic in topics:
            if topic.startswith(_ROUTED):
                self._routes[self._channel(topic).encode("utf-8", "surrogateescape")] = topic

    async def _unsubscribe(self, task_ids: Sequence[str]) -> None:
        await self._unlisten([self._channel(task_id) for task_id in task_ids])
        for topic in task_ids:
            if topic.startswith(_ROUTED):
                self._routes.pop(self._channel(topic).encode("utf-8", "surrogateescape"), None)

    async def _fetch_group(self, group_id: str) -> bytes | None:
        (value,) = await self._get([self._group_key(group_id)])
        if isinstance(value, BaseException):
            raise value
        return value

    async def _store_group(self, group_id: str, payload: bytes, expires: float) -> None:
        await self._change([Write(self._group_key(group_id), Op.PUT, payload, expires)])

    async def _delete_group(self, group_id: str) -> None:
        await self._change([Write(self._group_key(group_id), Op.DELETE)])

    async def _change(self, writes: Sequence[Write]) -> None:
        for outcome in await self._write(writes):
            if isinstance(outcome, BaseException):
                raise outcome

    def _encode_group(self, group_id: str, group: ResultTuple) -> bytes:
        return self.codec.dumps({"result": group}, f"group {group_id}")

    def _decode_group(self, group_id: str, payload: bytes) -> Any:
        value = super()._decode_group(group_id, payload)
        if not isinstance(value, dict) or "result" not in value:
            raise DecodeError(
                f"the value stored as group {group_id} is not a group; another program may have stored it"
            )
        return value["result"]


#: The topics in `KeyValueStoreBackend._routes` begin with these prefixes. Without its last space, the prefix of one
#: worker's topic is also the prefix of the topic of all workers.
_ROUTED = (OUTPUT_TOPIC, WORKER_TOPIC.rstrip(), GROUP_TOPIC)


def output_message(epoch: int, last: int, data: bytes) -> bytes:
    """Return the message about a flush: its place in the log, and the chunks if they are short.

    Readers fetch longer chunks themselves.
    """
    return b"%d-%d %s" % (epoch, last, data if len(data) <= _MESSAGE_BYTES else b"")


#: The most bytes of chunks that a message carries.
_MESSAGE_BYTES = 16 * 2**10


def sibling(key: str, suffix: str) -> str:
    """Return the name of a further key that belongs to ``key``. A Redis Cluster keeps both in the same hash slot.

    Redis Cluster takes the slot from the text between the first "{" and the next "}". If there is no such text, or it
    is empty, it takes the whole key (Redis Cluster specification, "Hash tags"). The id and the prefix may contain
    braces. Only for a key such as "a}b" there is no other name in its slot, so the two keys may be in two slots.
    """
    start = key.find("{")
    end = key.find("}", start + 1) if start >= 0 else -1
    if end > start + 1 or "}" in key:
        return key + suffix
    return "{" + key + "}" + suffix


def _text(channel: bytes) -> str:
    return channel.decode("utf-8", "surrogateescape")
