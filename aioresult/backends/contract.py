"""What the author of a backend implements, the primitives and their guarantees; and the options of all backends.

docs/writing_a_backend.md is the guide. The primitives are the methods with a leading underscore: small operations of
the store. `core` and the modules above it build the public methods from them.
"""

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

#: The longest id. No real id is longer, and a much longer id would be costly as a key or as the name of a channel.
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
    """One call of `forget`. It keeps the version of the result, so that a repeated attempt removes no later result."""

    __slots__ = ("task_id", "version")

    def __init__(self, task_id: str) -> None:
        self.task_id: str = task_id
        #: The version of the result that `_versions` has returned; ``None`` until it has returned one.
        self.version: Any = None


class BackendContract(ABC):
    """Declares what the author of a backend implements: all abstract methods, and the optional ones that fit the store.

    The input of a primitive has been checked and gathered into a batch. Primitives run in asyncio tasks of the backend,
    so the cancellation of a caller does not reach them. Each coroutine may raise

    - `BackendConnectionError` if a retry may help. The call is repeated for up to ``retry_for`` seconds, so every
      primitive must be idempotent;
    - any other `BackendError` if a retry will not help. Then the backend halves the batch until the item that causes
      the error is alone. If the error has ``of_server`` set, the whole batch fails instead.

    Many primitives return a sequence with one entry for each item, in order. If an error concerns one item alone, the
    error takes the place of its entry, and the other items are not affected.
    """

    #: The most ids in one fetch or subscription, and the most chord steps in one call.
    fetch_chunk = 500
    #: ``store_chunk``: the most records in one store. ``store_parallel``: the most stores that are in flight at once.
    store_chunk = 500
    store_parallel = 2
    #: The most bytes of values in one store, fetch or call of steps, unless a single value is larger.
    chunk_bytes = 16 * 2**20
    #: True if a group and its members may be in different shards, which are parts of the store that fail separately.
    #: Then `_store` and `_run_steps` leave groups alone, and the backend calls `_extend_groups` after them.
    groups_apart = False
    #: True if another program, such as Celery, may finish a chord that it created and send this library no message.
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
            raise ImproperlyConfigured(
                "heartbeat must be more than 0 seconds: otherwise a dead connection would go unnoticed"
            )
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
        """Return the URL without the password."""
        return hide_password(self._url)

    @property
    def store_id(self) -> Hashable:
        """Return a key. It is equal for two backends that are known to keep their results in the same place."""
        return self

    @abstractmethod
    async def _open(self) -> None:
        """Connect to the server. Try once, without a retry.

        Raises `BackendConnectionError` if the server cannot be reached, `BackendRefusedError` if it refuses.
        """

    @abstractmethod
    async def _close(self) -> None:
        """Close what `_open` and `_subscribe` have opened, even if they failed. Be quick, and do not raise."""

    def _abandon(self, forked: bool) -> None:  # noqa: B027 - optional
        """Drop what `_open` and `_subscribe` have opened. Send nothing to the server, and do not use the event loop.

        The backend calls it instead of `_close` if the event loop that opened the backend has ended. ``forked`` is true
        in a child process. There the sockets belong to the parent, and so does the selector of its event loop.
        """

    async def _ping(self) -> None:
        """Make one round trip to the server, without a retry. Raises `BackendConnectionError` if the server is away.

        Optional. By default the backend fetches an id that does not exist.
        """
        await self._fetch([str(uuid4())])

    @abstractmethod
    async def _fetch(self, task_ids: Sequence[str]) -> Sequence[Any]:
        """Read what is stored under each id, in the form that `_decode` takes; ``None`` where nothing is stored."""

    @abstractmethod
    async def _store(self, records: Sequence[Record]) -> Sequence[bool | BaseException]:
        """Store each record and notify its subscribers in one atomic step: both happen, or neither does.

        The server itself must decide whether to store a record. It does not store a record in three cases:

        - the stored state is SUCCESS;
        - the record has ``custom`` set (its state is the caller's own, such as PROGRESS), and the stored state is final
          (SUCCESS, FAILURE or REVOKED);
        - the record has ``only_new`` set, and anything is stored under the id.

        If an id occurs twice, the records must take effect one after the other. Returns for each record whether it was
        stored.
        """

    def _store_at_once(self, record: Record, done: Callable[[bool | BaseException | None], None]) -> bool:
        """Send ``record`` to the server within this call and return true; or do nothing and return false.

        Optional, for stores where starting an asyncio task costs as much as everything else. The backend tries it when
        no other store is in flight. If the method returns true, it must call ``done`` later, exactly one time. The
        argument is true if the record was stored, and false if it was not. If the connection has failed, it is that
        error; after any other failure it is ``None``. In both cases `_store` gets the record. A subclass that overrides
        `_store` must override this method, too.
        """
        return False

    def _append_at_once(self, flush: Flush, done: Callable[[int | BaseException | None], None]) -> bool:
        """Do the same as `_store_at_once` for a flush, which is some output of a running task.

        Call ``done`` with what `_append` would return for the flush; after a failure, as `_store_at_once` does.
        """
        return False

    async def _versions(self, task_ids: Sequence[str]) -> Sequence[Any]:
        """Return a version of the result under each id, which differs from the version of any later result.

        ``None`` means that nothing is stored. An empty version, ``b""``, matches any result.

        Optional, for stores where a reply may get lost. Then `_delete` is repeated with the same version, and must not
        remove a result that was stored after its first attempt.
        """
        return [b""] * len(task_ids)

    @abstractmethod
    async def _delete(self, task_ids: Sequence[str], versions: Sequence[Any]) -> Sequence[BaseException | None] | None:
        """Remove each of these results if it still has its version, which `_versions` has returned.

        Returns for each id ``None`` or the error that concerns it alone; or just ``None`` if there is no such error.
        """

    @abstractmethod
    async def _subscribe(self, task_ids: Sequence[str]) -> Mapping[str, Exception] | None:
        """Subscribe to these ids: call `_received` with every result that is stored under them from now on.

        Return only after the server has confirmed the subscription. Connect the listener, the connection that carries
        messages, if it is not connected. Call `_listener_lost` whenever it breaks. If an id is subscribed already, have
        the server confirm it again. Returns the errors that concern one id alone, if there are any. The backend never
        calls this concurrently with itself or with `_unsubscribe`.
        """

    @abstractmethod
    async def _unsubscribe(self, task_ids: Sequence[str]) -> None:
        """End the subscriptions to these ids. Ignore ids that are not subscribed."""

    @abstractmethod
    async def _fetch_group(self, group_id: str) -> bytes | None:
        """Read what `_store_group` has stored; ``None`` if there is nothing."""

    @abstractmethod
    async def _store_group(self, group_id: str, payload: bytes, expires: float) -> None:
        """Store ``payload`` under this id for ``expires`` seconds (0: for ever), and replace what was there."""

    @abstractmethod
    async def _delete_group(self, group_id: str) -> None:
        """Remove the group. Do nothing if there is none."""

    async def _extend_groups(self, records: Sequence[Record]) -> Sequence[bool | BaseException]:
        """Keep the group of each record at least as long as the record, and count a member that is over.

        Called only if `groups_apart` is true.
        """
        return [True] * len(records)

    async def _count_group(self, group_id: str, size: int, expires: float) -> None:  # noqa: B027 - optional
        """Begin to count how many of the ``size`` members of a saved group are over. An index identifies a member.

        Keep the counts for ``expires`` seconds (0: for ever), and call `_group_news` when they change.

        Optional, together with `_group_size` and `_group_counts`. Without them, the progress of a group is counted from
        the results of its members.
        """

    async def _group_size(self, group_id: str) -> int | None:
        """Return how many members the group has; ``None`` if its members are not counted."""
        return None

    async def _group_counts(self, group_id: str) -> GroupCounts:
        """Return how many members of a group are over, that is, have a final state."""
        return GroupCounts(0, 0)

    async def _chord_steps(self, steps: Sequence[ChordStep]) -> Sequence[ChordState | BaseException]:
        """Do each step atomically, and notify the processes that wait for what it has changed.

        Call `_chord_news` in every process that subscribed to the chord if the step completes or finishes the chord,
        gives back the claim to its callback, or adds the first part that failed. The chords of
        `aioresult.backends.memory` are the reference.

        Optional, together with `_active_chords`. A store without them keeps results and groups, but counts no chords.
        """
        raise UsageError(f"{type(self).__name__} does not count chords")

    async def _active_chords(self) -> Sequence[str]:
        """Return the ids of all chords that are complete and not finished. The ids of other chords do no harm."""
        raise UsageError(f"{type(self).__name__} does not count chords")

    # -- optional: running tasks ------------------------------------------------------------------------------------

    async def _append(self, flushes: Sequence[Flush]) -> Sequence[int | BaseException]:
        """Append each flush to the log of its task, and call `_output_news` in every process that subscribed to it.

        A *log* holds the output of one task, a *flush* is some of that output, and an *epoch* is the number of the
        attempt that wrote it: see `aioresult.log`. `aioresult.backends.runs` has the reference implementations: `Log`
        for a flush, `Note` for a run step.

        Optional, together with `_pages`, `_run_steps`, `_beat` and `_alive`. A store without them keeps results, but
        does not support running tasks.

        Returns for each flush the epoch of the log; or `OutputSuperseded` if a later epoch, or another run of the task,
        owns the log. No two flushes of one call belong to the same task.
        """
        raise UsageError(f"{type(self).__name__} keeps no output of running tasks")

    async def _pages(self, requests: Sequence[PageRequest]) -> Sequence[Page | BaseException]:
        """Read a page of the log for each request.

        Read *first* whether the task is over, and *then* the log; or read both in one snapshot.
        """
        raise UsageError(f"{type(self).__name__} keeps no output of running tasks")

    async def _run_steps(self, steps: Sequence[RunStep]) -> Sequence[RunState | BaseException]:
        """Do each step atomically, in order. Notify the subscribers of what it stores, as `_store` does.

        If a step REVOKE gets the verdict ASKED, call `_revoke_news` in the process of the worker that runs the task.
        """
        raise UsageError(f"{type(self).__name__} does not run tasks")

    async def _beat(self, worker: str, lease: float, last: float | None = None) -> float:
        """Renew the lease of ``worker``: it counts as alive for ``lease`` more seconds by the server's clock.

        A lease of 0 ends the worker. ``worker`` is empty in a process that runs no tasks. Returns the server's clock,
        in seconds.

        ``last`` is what the previous call returned. If it is given, remove the workers whose lease has run out. Call
        `_worker_news` with each of them in every process that subscribed to it. In two cases the reason is probably an
        outage of the server, and not the death of a worker:

        - If ``last`` is more than half a lease ago, remove no worker.
        - If the lease of a worker ran out longer than ``lease`` seconds ago, extend it by half a lease instead.
        """
        raise UsageError(f"{type(self).__name__} does not run tasks")

    async def _alive(self, workers: Sequence[str]) -> Sequence[bool]:
        """Return for each worker whether it is alive, that is, whether its lease has not run out."""
        raise UsageError(f"{type(self).__name__} does not run tasks")

    async def _cleanup(self) -> int:
        """Remove what has expired, if the server does not do so by itself. Returns how many results were removed."""
        return 0

    def _valid_id(self, task_id: str | UUID) -> str:
        """Check the id of a task or a group, and return it as text.

        Raises `UsageError` for an id that the store could not keep, or could not distinguish from another id.
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
        """True if ``text`` is a valid id. The text comes from the server, where other programs may write, too."""
        try:
            self._valid_id(text)
        except UsageError:
            return False
        return True

    def _encode(self, meta: TaskMeta) -> Any:
        """Convert ``meta`` to the form that is stored.

        The backend calls this for each store alone, so an error reaches only the caller of that store.
        """
        return self.codec.encode(meta)

    def _decode(self, task_id: str, stored: Any) -> TaskMeta:
        return self.codec.decode(task_id, stored)

    def _encode_group(self, group_id: str, group: ResultTuple) -> bytes:
        return self.codec.dumps(group, f"group {group_id}")

    def _decode_group(self, group_id: str, payload: bytes) -> Any:
        return self.codec.loads(payload, f"group {group_id}")

    def _payload_size(self, payload: Any) -> int:
        """Return the size in bytes of what `_encode` has returned."""
        return len(payload) if isinstance(payload, bytes) else 0

    def _stored_size(self, stored: Any) -> int:
        """Return the size in bytes of what `_fetch` has returned for one id."""
        return len(stored) if isinstance(stored, bytes) else 0
