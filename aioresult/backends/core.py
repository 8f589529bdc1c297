"""What the author of a backend writes, and what becomes of it: batches, retries, one hub, a life from open to close."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from threading import get_ident
from types import TracebackType
from typing import Any, NamedTuple, Self, TypedDict, TypeVar, cast
from uuid import UUID

from ..batch import Batcher, uncancelled
from ..chord import (
    CHORD_TOPIC,
    READY_TOPIC,
    ChordOp,
    ChordState,
    ChordStep,
    chord_meta,
)
from ..exceptions import (
    AioResultError,
    BackendClosedError,
    BackendConnectionError,
    BackendError,
    BackendNotOpenError,
    ImproperlyConfigured,
    UsageError,
    WrongEventLoopError,
)
from ..hub import Backoff, Hub, Outcome
from ..meta import ResultTuple, TaskMeta
from ..serialization import Codec
from ..urls import hide_password

__all__ = ["BackendCore", "CoreOptions", "Record", "checked_seconds"]

logger: logging.Logger = logging.getLogger("aioresult")

T = TypeVar("T")

#: Longer than any sane id, shorter than what would hurt as a key or a channel name.
_MAX_ID_LENGTH = 1024
#: How many calls that go into no batch may be in flight at once.
_PARALLEL_CALLS = 8


class CoreOptions(TypedDict, total=False):
    """The options of `BackendCore`; see `aioresult.backends.base.Backend`."""

    expires: float | None
    serializer: str
    accept: Iterable[str]
    compression: str | None
    extended: bool
    max_result_size: int
    retry_for: float
    heartbeat: float
    recheck: float
    chord_lease: float


class Record(NamedTuple):
    """One store, as `Backend._store` gets it."""

    task_id: str
    #: What `Backend._encode` made of its meta.
    payload: Any
    #: Seconds to live; 0 for ever.
    expires: float
    #: Store only if nothing is stored under the id.
    only_new: bool = False
    #: The group that must live at least as long.
    group_id: str | None = None


class BackendCore(ABC):
    """What a backend is made of, below the coroutines that everybody calls: see `aioresult.backends.base.Backend`.

    Implement the abstract methods. They get input that was checked and gathered into batches, and run in
    tasks of the backend's own, so that no caller's cancellation reaches them. Each coroutine may raise

    - `BackendConnectionError` when trying again may help: the call is repeated for up to ``retry_for`` seconds, so
      every primitive must bear being done twice;
    - any other `BackendError` when it will not: it reaches whoever asked.
    """

    #: How many ids go into one fetch or subscription, or steps of chords into one call.
    fetch_chunk = 500
    #: How many records go into one store, and how many stores may be in flight at once.
    store_chunk = 500
    store_parallel = 2

    def __init__(
        self,
        url: str = "",
        *,
        expires: float | None = 86400.0,
        serializer: str = "json",
        accept: Iterable[str] = ("json",),
        compression: str | None = None,
        extended: bool = False,
        max_result_size: int = 128 * 2**20,
        retry_for: float = 30.0,
        heartbeat: float = 5.0,
        recheck: float = 0.0,
        chord_lease: float = 30.0,
    ) -> None:
        self._url = url
        self.expires: float = checked_seconds("expires", expires or 0.0)
        self.extended = extended
        self.retry_for: float = checked_seconds("retry_for", retry_for)
        self.heartbeat: float = checked_seconds("heartbeat", heartbeat)
        if not self.heartbeat:
            raise ImproperlyConfigured("heartbeat must be more than 0 seconds: a dead connection would go unnoticed")
        self.recheck: float = checked_seconds("recheck", recheck)
        self.chord_lease: float = checked_seconds("chord_lease", chord_lease)
        if not self.chord_lease:
            raise ImproperlyConfigured("chord_lease must be more than 0 seconds: no claim could be held")
        self.codec: Codec = Codec(serializer, accept, compression, max_result_size)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._changing = False
        self._was_closed = False
        self._down_since: float | None = None
        self._down_at = 0.0

    def __repr__(self) -> str:
        state = "closed" if self._loop is None else "open"
        return f"<{type(self).__name__} {self.as_uri()!r} {state}>"

    def as_uri(self) -> str:
        """The URL, without the password."""
        return hide_password(self._url)

    # -- for authors ------------------------------------------------------------------------------------------------

    @abstractmethod
    async def _open(self) -> None:
        """Reach the server, once: no retry. Raises `BackendConnectionError` or `BackendRefusedError`."""

    @abstractmethod
    async def _close(self) -> None:
        """Close what `_open` and `_subscribe` opened, also if they failed. Must not raise, and must not take long."""

    @abstractmethod
    async def _fetch(self, task_ids: Sequence[str]) -> Sequence[Any]:
        """What is stored under each id, as `_decode` takes it; ``None`` for nothing, or the error that is its alone."""

    @abstractmethod
    async def _store(self, records: Sequence[Record]) -> Sequence[bool | BaseException]:
        """Store each record and notify its subscribers, in one atomic step: both happen or neither.

        The same id may occur twice; the outcome is as if they came one after the other. An id whose stored state is
        SUCCESS is left alone, decided in the server; so is one that exists where ``only_new`` is set. For each record:
        whether it was stored, or the error that concerns it alone.
        """

    def _store_at_once(self, record: Record, done: Callable[[bool | None], None]) -> bool:
        """Begin to store ``record`` in this very call and return true; or do nothing and return false.

        Optional, for stores where a task costs as much as all the rest: tried when nothing else is being stored. Once,
        and not before this has returned, call ``done``: with whether it was stored, after `_reached`; or after any
        trouble with ``None``, and then `_store` gets the record. Who overrides `_store` overrides this, too.
        """
        return False

    @abstractmethod
    async def _delete(self, task_ids: Sequence[str]) -> None:
        """Remove these results; missing ones do not matter."""

    @abstractmethod
    async def _subscribe(self, task_ids: Sequence[str]) -> None:
        """Have `_received` called for every later store of these ids; return once the server has confirmed it.

        Connect the listener if it is not connected, and call `_listener_lost` whenever it breaks. Ids that are
        subscribed already are confirmed again. Never called concurrently with itself or `_unsubscribe`.
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

    async def _chord_steps(self, steps: Sequence[ChordStep]) -> Sequence[ChordState | BaseException]:
        """Take each step atomically, and call `_chord_news` wherever somebody waits for what it brings about.

        Optional, with `_active_chords`: a store without them keeps results and groups, but counts no chords.
        """
        raise UsageError(f"{type(self).__name__} does not count chords")

    async def _active_chords(self) -> Sequence[str]:
        """The chords that may be complete and not finished; others among them do no harm."""
        raise UsageError(f"{type(self).__name__} does not count chords")

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
            raise UsageError(f"an id must be a str, not {type(task_id).__qualname__}")
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

    def _received(self, task_id: str, stored: Any) -> None:
        """A backend calls this with each message that arrives; ``stored`` is as from `_fetch`."""
        if self._hub.wants(task_id):
            self._hub.receive(task_id, self._outcome(task_id, stored))

    def _chord_news(self, group_id: str, ready: bool) -> None:
        """A backend calls this with each message about a chord; ``ready`` if there may be a callback to dispatch."""
        self._hub.news(CHORD_TOPIC + group_id)
        if ready and self._is_id(group_id):
            self._hub.receive(READY_TOPIC, TaskMeta(READY_TOPIC, "NEWS", group_id))

    def _listener_lost(self, reason: BaseException) -> None:
        """A backend calls this when the connection that carries its messages has broken."""
        if self._loop is None:  # by `aclose`, which may come in the middle of anything
            return
        logger.warning("the listener of %s was lost, and its subscriptions are made anew: %s", self.as_uri(), reason)
        self._hub.lost()

    # -- life -------------------------------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Connect. Raises `BackendConnectionError` at once if the server cannot be reached.

        A backend that was closed may be opened again, also in another event loop.
        """
        if self._loop is not None:
            raise UsageError(f"{self!r} is open already")
        if self._changing:
            raise UsageError(f"{self!r} is being opened or closed by somebody else")
        self._changing = True
        self._down_since = None
        try:
            await self._open()
        except BaseException:
            await uncancelled(self._close())
            raise
        finally:
            self._changing = False
        self._loop = asyncio.get_running_loop()
        self._thread = get_ident()
        self._hub = Hub(_HubSource(self), chunk=self.fetch_chunk, recheck=self.recheck)
        self._stores = Batcher(
            partial(self._persist, self._store),
            max_items=self.store_chunk,
            parallel=self.store_parallel,
            at_once=self._store_at_once,
        )
        self._fetches = Batcher(self._read, max_items=self.fetch_chunk, parallel=2)
        self._deletes = Batcher(self._perform_delete, max_items=self.fetch_chunk)
        self._calls = Batcher(self._perform_calls, max_items=1, parallel=_PARALLEL_CALLS)
        self._steps = Batcher(self._perform_steps, max_items=self.fetch_chunk, parallel=2)
        self._hub.start()
        return self

    async def aclose(self) -> None:
        """Fail everyone who waits with `BackendClosedError` and close every connection. May be called twice."""
        if self._loop is None:
            return
        self.check()
        self._loop = None
        self._changing = self._was_closed = True
        await uncancelled(self._shut_down(self._closed()))

    async def _shut_down(self, error: Exception) -> None:
        try:
            await self._hub.close(error)
            batchers = (self._stores, self._fetches, self._deletes, self._calls, self._steps)
            await asyncio.gather(*(batcher.close(error) for batcher in batchers))
            await self._close()
        finally:
            self._changing = False

    def _closed(self) -> BackendClosedError:
        return BackendClosedError(f"the backend {self.as_uri()!r} was closed")

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def check(self) -> None:
        """Raise if it is not open, or not in this event loop: misuse fails here, and not deep in a socket."""
        if self._loop is None and self._was_closed:
            raise self._closed()
        if self._loop is None:
            raise BackendNotOpenError(
                f"{self!r} is not open: use it inside 'async with aioresult.connect(…) as backend:' "
                f"or call 'await backend.open()' first"
            )
        # A thread runs one loop at a time; asking asyncio which costs a system call on Python 3.11.
        if get_ident() != self._thread or not self._loop.is_running():
            raise WrongEventLoopError(f"{self!r} was opened in another event loop; open one backend per event loop")

    # -- what the batchers and the hub run --------------------------------------------------------------------------

    async def _call(self, operation: Callable[[], Awaitable[T]]) -> T:
        """`_persist` for what goes into no batch: in a task of the backend's own, which `aclose` ends, all the same."""
        return cast("T", await self._calls.submit(partial(self._persist, operation)))

    async def _perform_calls(self, calls: Sequence[Callable[[], Awaitable[Any]]]) -> Sequence[Any]:
        return [await call() for call in calls]

    async def _persist(self, operation: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Repeat ``operation(*args)`` while the server cannot be reached, until it has been away for ``retry_for``.

        The time counts from the first failure of *any* call: in a long outage each further call fails at once,
        instead of queueing up for the same disappointment. A failure so long ago that nobody knows what was since
        does not count.
        """
        backoff: Backoff | None = None
        first = 0.0
        while True:
            try:
                value = await operation(*args)
            except BackendConnectionError:
                now, down_since = self._not_reached()
                if backoff is None:
                    backoff, first = Backoff(), now
                if now - min(first, down_since) >= self.retry_for:
                    raise
                await asyncio.sleep(backoff.pause())
            else:
                self._reached()
                return value

    def _reached(self) -> None:
        """The server has done something: an outage is over."""
        self._down_since = None

    def _not_reached(self) -> tuple[float, float]:
        """A call has failed with `BackendConnectionError`. The time, and since when the server has been away."""
        now = asyncio.get_running_loop().time()
        if self._down_since is None or now - self._down_at > self.retry_for:
            self._down_since = now
        self._down_at = now
        return now, self._down_since

    async def _perform_delete(self, task_ids: Sequence[str]) -> Sequence[None]:
        await self._persist(self._delete, task_ids)
        return [None] * len(task_ids)

    async def _perform_steps(self, steps: Sequence[ChordStep]) -> Sequence[ChordState | BaseException]:
        return await self._persist(self._chord_steps, steps)

    async def _read(self, task_ids: Sequence[str]) -> Sequence[Outcome | None]:
        """Fetch and decode; a result that cannot be decoded is an error in its place, and harms no other."""
        if min(task_ids) < "\x01":  # the topics of chords begin with NUL, and so sort before every id
            return await self._read_topics(task_ids)
        stored = await self._persist(self._fetch, task_ids)
        return [
            None if value is None else self._outcome(task_id, value)
            for task_id, value in zip(task_ids, stored, strict=True)
        ]

    async def _read_topics(self, topics: Sequence[str]) -> Sequence[Outcome | None]:
        """As `_read`, where chords are among what is waited for."""
        tasks = [topic for topic in topics if not topic.startswith("\x00")]
        chords = [topic for topic in topics if topic.startswith(CHORD_TOPIC)]
        found: dict[str, Outcome | None] = dict(zip(tasks, await self._read(tasks) if tasks else (), strict=True))
        steps = [ChordStep(ChordOp.READ, topic.removeprefix(CHORD_TOPIC)) for topic in chords]
        try:
            states = await self._perform_steps(steps) if steps else ()
        except BackendConnectionError:
            raise
        except AioResultError as exc:  # it concerns the chords, and not who else waits
            states = [exc] * len(steps)
        for topic, state in zip(chords, states, strict=True):
            found[topic] = chord_meta(state) if isinstance(state, ChordState) else _as_error(state)
        # What completed before somebody listened is found by going through all that are active.
        found[READY_TOPIC] = TaskMeta(READY_TOPIC, "NEWS")
        return [found[topic] for topic in topics]

    def _outcome(self, task_id: str, stored: Any) -> Outcome:
        if isinstance(stored, BaseException):
            return _as_error(stored)
        try:
            return self._decode(task_id, stored)
        except AioResultError as exc:
            return exc


class _HubSource:
    """What the hub may do with a backend."""

    def __init__(self, backend: BackendCore) -> None:
        self.subscribe = backend._subscribe
        self.unsubscribe = backend._unsubscribe
        self.read = backend._read


def checked_seconds(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ImproperlyConfigured(f"{name} must be a number of seconds, 0 or more, not {value!r}")
    return float(value)


def _as_error(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else BackendError(str(error))
