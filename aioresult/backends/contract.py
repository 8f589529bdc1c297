"""What the author of a backend writes: the primitives, their promises, and the options that all backends take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypedDict
from uuid import UUID, uuid4

from ..chord import ChordState, ChordStep
from ..dialect import StoredType
from ..exceptions import ImproperlyConfigured, UsageError
from ..log import Flush, Page, PageRequest
from ..meta import ResultTuple, TaskMeta
from ..options import UnknownOption, checked_flag, unknown_options
from ..progress import GroupCounts
from ..record import Record
from ..remedies import not_an_id
from ..run import RunState, RunStep
from ..seconds import Limit, Seconds, checked_seconds
from ..serialization import Codec
from ..urls import hide_password

__all__ = ["BackendContract", "CoreOptions", "Record", "Removal"]

#: Longer than any sane id, shorter than what would hurt as a key or a channel name.
_MAX_ID_LENGTH = 1024


class CoreOptions(TypedDict, total=False):
    """The options of `BackendCore`; see `aioresult.backends.base.Backend`."""

    expires: Seconds | None
    failure_expires: Seconds | None
    serializer: str
    accept: Iterable[str]
    compression: str | None
    types: Iterable[StoredType[Any]]
    json_default: Callable[[Any], Any] | None
    extended: bool
    max_result_size: int
    retry_for: float
    heartbeat: float
    recheck: float
    chord_lease: float
    chord_expires: Seconds | None
    max_pending_bytes: int
    lease: float
    default_timeout: Seconds | None
    wait_for_server: Seconds


class Removal:
    """One `forget`. It remembers which version of the result it is to remove, should it have to be repeated."""

    __slots__ = ("task_id", "version")

    def __init__(self, task_id: str) -> None:
        self.task_id: str = task_id
        #: As from `Backend._versions`; ``None`` until that was asked.
        self.version: Any = None


class BackendContract(ABC):
    """What the author of a backend implements: the abstract methods, and of the others what the store can do.

    They get input that was checked and gathered into batches, and run in tasks of the backend's own, so that no
    caller's cancellation reaches them. Each coroutine may raise

    - `BackendConnectionError` when trying again may help: the call is repeated for up to ``retry_for`` seconds, so
      every primitive must bear being done twice;
    - any other `BackendError` when it will not. A batch is then halved until the culprit stands alone, unless the error
      has ``of_server`` set.
    """

    #: How many ids go into one fetch or subscription, or steps of chords into one call.
    fetch_chunk = 500
    #: How many records go into one store, and how many stores may be in flight at once.
    store_chunk = 500
    store_parallel = 2
    #: How many bytes of values go into one store, fetch or call of steps, unless a single value is larger.
    chunk_bytes = 16 * 2**20
    #: Whether others than this library may finish a chord that it did not create, and say nothing of it.
    chords_beside = False

    def __init__(
        self,
        url: str = "",
        *,
        expires: Seconds | None = 86400.0,
        failure_expires: Seconds | None = None,
        serializer: str = "json",
        accept: Iterable[str] = ("json",),
        compression: str | None = None,
        types: Iterable[StoredType[Any]] = (),
        json_default: Callable[[Any], Any] | None = None,
        extended: bool = False,
        max_result_size: int = 128 * 2**20,
        retry_for: float = 30.0,
        heartbeat: float = 5.0,
        recheck: float = 0.0,
        chord_lease: float = 30.0,
        chord_expires: Seconds | None = None,
        max_pending_bytes: int = 64 * 2**20,
        lease: float = 30.0,
        default_timeout: Seconds | None = None,
        wait_for_server: Seconds = 0.0,
        **unknown: object,
    ) -> None:
        if unknown:
            raise UnknownOption(unknown_options(type(self), unknown))
        self._url = url
        self.expires: float = checked_seconds("expires", expires or 0.0)
        self.failure_expires: float = (
            self.expires if failure_expires is None else checked_seconds("failure_expires", failure_expires)
        )
        self.chord_expires: float = (
            self.expires if chord_expires is None else checked_seconds("chord_expires", chord_expires)
        )
        self.extended: bool = checked_flag("extended", extended)
        self.retry_for: float = checked_seconds("retry_for", retry_for)
        self.heartbeat: float = checked_seconds("heartbeat", heartbeat)
        if not self.heartbeat:
            raise ImproperlyConfigured("heartbeat must be more than 0 seconds: a dead connection would go unnoticed")
        self.recheck: float = checked_seconds("recheck", recheck)
        self.chord_lease: float = checked_seconds("chord_lease", chord_lease)
        if not self.chord_lease:
            raise ImproperlyConfigured("chord_lease must be more than 0 seconds: no claim could be held")
        if isinstance(max_pending_bytes, bool) or not isinstance(max_pending_bytes, int) or max_pending_bytes < 1:
            raise ImproperlyConfigured(f"max_pending_bytes must be a number of bytes, not {max_pending_bytes!r}")
        self.max_pending_bytes: int = max_pending_bytes
        self.lease: float = checked_seconds("lease", lease)
        if not self.lease:
            raise ImproperlyConfigured("lease must be more than 0 seconds: every worker would seem dead")
        self.default_timeout: float | None = None
        if default_timeout is not None:
            seconds = checked_seconds("default_timeout", default_timeout)
            if not seconds:
                raise ImproperlyConfigured("default_timeout must be more than 0 seconds; pass None to wait for ever")
            self.default_timeout = Limit(seconds, f"default_timeout={seconds:g}")
        self.wait_for_server: float = checked_seconds("wait_for_server", wait_for_server)
        self.codec: Codec = Codec(serializer, accept, compression, max_result_size, types, json_default)

    def as_uri(self) -> str:
        """The URL, without the password."""
        return hide_password(self._url)

    @property
    def store_id(self) -> Hashable:
        """Equal for backends that keep their results in the same place, as far as that can be told."""
        return self

    @abstractmethod
    async def _open(self) -> None:
        """Reach the server, once: no retry. Raises `BackendConnectionError` or `BackendRefusedError`."""

    @abstractmethod
    async def _close(self) -> None:
        """Close what `_open` and `_subscribe` opened, also if they failed. Must not raise, and must not take long."""

    def _abandon(self, forked: bool) -> None:  # noqa: B027 - optional
        """Forget what `_open` and `_subscribe` opened, without a word to the server and without the event loop.

        Called instead of `_close` when the event loop that opened it has ended, or, with ``forked``, in a child
        process: there the sockets are the parent's, and so is what its event loop watches them with.
        """

    async def _ping(self) -> None:
        """One round trip to the server, without a retry. Raises `BackendConnectionError` if the server is away.

        Optional: by default the backend fetches an id that does not exist.
        """
        await self._fetch([str(uuid4())])

    @abstractmethod
    async def _fetch(self, task_ids: Sequence[str]) -> Sequence[Any]:
        """What is stored under each id, as `_decode` takes it; ``None`` for nothing, or the error that is its alone."""

    @abstractmethod
    async def _store(self, records: Sequence[Record]) -> Sequence[bool | BaseException]:
        """Store each record and notify its subscribers, in one atomic step: both happen or neither.

        The same id may occur twice; the outcome is as if they came one after the other. An id whose stored state is
        SUCCESS is left alone, decided in the server; so is one that is final where ``custom`` is set, and one that
        exists where ``only_new`` is set. For each record: whether it was stored, or the error that concerns it alone.
        """

    def _store_at_once(self, record: Record, done: Callable[[bool | None], None]) -> bool:
        """Begin to store ``record`` in this very call and return true; or do nothing and return false.

        Optional, for stores where a task costs as much as all the rest: tried when nothing else is being stored. Once,
        and not before this has returned, call ``done``: with whether it was stored, after `_reached`; or after any
        trouble with ``None``, and then `_store` gets the record. Who overrides `_store` overrides this, too.
        """
        return False

    def _append_at_once(self, flush: Flush, done: Callable[[int | None], None]) -> bool:
        """As `_store_at_once`, of a flush: ``done`` gets the epoch, or ``None``, and then `_append` gets the flush."""
        return False

    async def _versions(self, task_ids: Sequence[str]) -> Sequence[Any]:
        """What tells the result that is stored under each id from any later one; ``None`` where nothing is stored.

        An error stands in the place of an id that the server refuses alone.

        Optional, for stores where a reply may be lost: a removal that is repeated must not take what was stored after
        its first attempt. An empty value stands for whatever is there.
        """
        return [b""] * len(task_ids)

    @abstractmethod
    async def _delete(self, task_ids: Sequence[str], versions: Sequence[Any]) -> Sequence[BaseException | None] | None:
        """Remove these results, each if it still is of its version, as `_versions` told it.

        Returns the error of each id that the server refuses alone, or ``None`` if there is none.
        """

    @abstractmethod
    async def _subscribe(self, task_ids: Sequence[str]) -> Mapping[str, Exception] | None:
        """Have `_received` called for every later store of these ids; return once the server has confirmed it.

        Connect the listener if it is not connected, and call `_listener_lost` whenever it breaks. Ids that are
        subscribed already are confirmed again. Returns the error of each id that the server refuses alone, if there
        are any. Never called concurrently with itself or `_unsubscribe`.
        """

    @abstractmethod
    async def _unsubscribe(self, task_ids: Sequence[str]) -> None:
        """The opposite; ids that are not subscribed are ignored."""

    @abstractmethod
    async def _fetch_group(self, group_id: str) -> bytes | None:
        """What `_store_group` stored."""

    @abstractmethod
    async def _store_group(self, group_id: str, payload: bytes, expires: float) -> None:
        """Keep ``payload`` for ``expires`` seconds (0: for ever), in place of what was there."""

    @abstractmethod
    async def _delete_group(self, group_id: str) -> None:
        """Remove it; a missing one does not matter."""

    async def _count_group(self, group_id: str, size: int, expires: float) -> None:  # noqa: B027 - optional
        """From now on count the members of a saved group that are over, by their index; there are ``size``.

        Optional, with `_group_size` and `_group_counts`; without them the progress of a group is counted by its
        results. Keep the counts for ``expires`` seconds (0: for ever), and call `_group_news` when they change.
        """

    async def _group_size(self, group_id: str) -> int | None:
        """How many members the group has; ``None`` where they are not counted."""
        return None

    async def _group_counts(self, group_id: str) -> GroupCounts:
        """How many members of a group are over."""
        return GroupCounts(0, 0)

    async def _chord_steps(self, steps: Sequence[ChordStep]) -> Sequence[ChordState | BaseException]:
        """Take each step atomically, and call `_chord_news` wherever somebody waits for what it brings about.

        Optional, with `_active_chords`: a store without them keeps results and groups, but counts no chords.
        """
        raise UsageError(f"{type(self).__name__} does not count chords")

    async def _active_chords(self) -> Sequence[str]:
        """The chords that may be complete and not finished; others among them do no harm."""
        raise UsageError(f"{type(self).__name__} does not count chords")

    # -- optional: running tasks ------------------------------------------------------------------------------------

    async def _append(self, flushes: Sequence[Flush]) -> Sequence[int | BaseException]:
        """Put each flush into the log of its task, and call `_output_news` in every process that subscribed to it.

        Optional, with `_pages`, `_run_steps`, `_beat` and `_alive`: a store without them has results and no running
        tasks. `aioresult.backends.runs.Log` is the reference of what a flush does, `Note` of a run step.

        For each: the epoch of the log; `OutputSuperseded` if a newer one has it, or another run; or the error that is
        its alone. No two flushes of a call are of one task.
        """
        raise UsageError(f"{type(self).__name__} keeps no output of running tasks")

    async def _pages(self, requests: Sequence[PageRequest]) -> Sequence[Page | BaseException]:
        """What each look finds: *first* whether the task is over, *then* the log, or both in one snapshot."""
        raise UsageError(f"{type(self).__name__} keeps no output of running tasks")

    async def _run_steps(self, steps: Sequence[RunStep]) -> Sequence[RunState | BaseException]:
        """Take each step atomically, in order. What it stores is published as by `_store`.

        A REVOKE that has the verdict ASKED calls `_revoke_news` in the process of that worker.
        """
        raise UsageError(f"{type(self).__name__} does not run tasks")

    async def _beat(self, worker: str, lease: float, last: float | None = None) -> float:
        """Note that ``worker`` lives for ``lease`` more seconds by the server's clock; with a lease of 0, that it ends.

        ``worker`` is empty in a process that runs no tasks. Returns the server's clock, in seconds. With ``last``, what
        the beat before has returned, the workers whose lease is over are removed, and `_worker_news` is called with
        each in every process that subscribed to that; two things are no death, but an outage:

        - ``last`` is more than half a lease ago. Then nobody is removed.
        - A worker's lease has been over for longer than ``lease``. Then it has half a lease more.
        """
        raise UsageError(f"{type(self).__name__} does not run tasks")

    async def _alive(self, workers: Sequence[str]) -> Sequence[bool]:
        """Whether the lease of each worker stands."""
        raise UsageError(f"{type(self).__name__} does not run tasks")

    async def _cleanup(self) -> int:
        """Remove what has expired, where the server does not do so by itself; return how many."""
        return 0

    def _valid_id(self, task_id: str | UUID) -> str:
        """``task_id`` as text, of tasks and groups.

        Raises `UsageError` for what the store could not keep, or not apart from others.
        """
        if not isinstance(task_id, str):
            if isinstance(task_id, UUID):
                return str(task_id)
            raise UsageError(not_an_id(task_id))
        if not task_id:
            raise UsageError("an id must not be empty")
        if task_id[0] == "\x00":
            raise UsageError("an id must not begin with NUL")
        if len(task_id) > _MAX_ID_LENGTH:
            raise UsageError(f"an id of {len(task_id):,} characters is too long; at most {_MAX_ID_LENGTH:,} are kept")
        if not task_id.isascii():
            try:
                task_id.encode()
            except UnicodeEncodeError as exc:
                raise UsageError(f"the id {task_id!r} cannot be written as UTF-8: {exc.reason}") from None
        return task_id

    def _is_id(self, text: str) -> bool:
        """Whether ``text``, which comes from the server, where others write too, can be an id at all."""
        try:
            self._valid_id(text)
        except UsageError:
            return False
        return True

    def _encode(self, meta: TaskMeta) -> Any:
        """What is stored of ``meta``: where an error is the storer's alone."""
        return self.codec.encode(meta)

    def _decode(self, task_id: str, stored: Any) -> TaskMeta:
        return self.codec.decode(task_id, stored)

    def _encode_group(self, group_id: str, group: ResultTuple) -> bytes:
        return self.codec.dumps(group, f"group {group_id}")

    def _decode_group(self, group_id: str, payload: bytes) -> Any:
        return self.codec.loads(payload, f"group {group_id}")

    def _payload_size(self, payload: Any) -> int:
        """Bytes of what `_encode` made."""
        return len(payload) if isinstance(payload, bytes) else 0

    def _stored_size(self, stored: Any) -> int:
        """Bytes of what `_fetch` brought for an id."""
        return len(stored) if isinstance(stored, bytes) else 0
