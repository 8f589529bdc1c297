"""`Backend`: the coroutines that workers, readers and dispatchers call. What authors write is in `core`."""

from __future__ import annotations

import asyncio
import traceback as tracebacks
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from functools import partial
from typing import Any, Unpack

from ..chord import (
    Chord,
    Chords,
    ChordState,
    ChordStep,
    ReadyChord,
)
from ..exceptions import (
    AioResultError,
    ChordError,
    DecodeError,
    TaskRevokedError,
    UsageError,
)
from ..hub import Outcome, SingleWaiter, Waiter, chunked, timed_out
from ..meta import ResultTuple, SupportsAsTuple, TaskMeta
from ..result import AsyncResult, GroupResult, ResultBase, result_from_tuple
from ..serialization import CORE_FIELDS
from ..states import FAILURE, PENDING, READY_STATES, RETRY, REVOKED, STARTED, SUCCESS
from .core import BackendCore, CoreOptions, Record, checked_seconds

__all__ = ["Backend", "BackendOptions", "Record"]

#: More than anybody can count to, and few enough for Redis' scores, which are floats.
_MAX_PARTS = 10**15


class BackendOptions(CoreOptions, total=False):
    """The options that every backend takes; see `Backend`."""

    on_chord_ready: Callable[[ReadyChord], Awaitable[object]] | None


class Backend(BackendCore):
    """Where results are kept, and the way to be woken when one arrives.

    Use it as ``async with aioresult.connect(url) as backend``, or call `open` and `aclose`. A backend belongs to the
    event loop that opened it. Every coroutine may be cancelled at any time; none may be called from another thread.

    Options, the same for every backend:

    - ``expires``: seconds that a result is kept; 0 or ``None`` for ever. A call's own ``expires`` goes before it.
    - ``serializer``, ``accept``: what results are written with, and what is read: ``json``, ``pickle``, ``msgpack``.
    - ``compression``: ``gzip``, ``bzip2``, ``lzma`` or ``zstd`` for what is written; reading needs no setting.
    - ``extended``: also store the task's name, arguments, worker, retries and queue.
    - ``max_result_size``: bytes, checked when storing and when reading (after decompression).
    - ``retry_for``: seconds that an unreachable server may be away before a call fails; waiting calls wait on.
    - ``heartbeat``: seconds between signs of life; a dead connection is noticed within three of them.
    - ``recheck``: seconds after which whatever is still waited for is read again, in batches; 0, the default, never.
      Needed only where a message may vanish and leave the connection whole: see docs/guarantees.md.
    - ``chord_lease``: seconds that a claim to dispatch a chord's callback lasts without a sign of life.
    - ``on_chord_ready``: a coroutine function that dispatches the callback of a `ReadyChord`; called by `mark_as_done`
      and its like for a request that belongs to a chord. Without it, `ready_chords` gets those chords.
    """

    def __init__(
        self,
        url: str = "",
        *,
        on_chord_ready: Callable[[ReadyChord], Awaitable[object]] | None = None,
        **options: Unpack[CoreOptions],
    ) -> None:
        super().__init__(url, **options)
        self._on_chord_ready = on_chord_ready
        self._chords = Chords(self)

    # -- the worker's side ------------------------------------------------------------------------------------------

    async def store_result(
        self,
        task_id: str,
        value: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        expires: float | None = None,
    ) -> bool:
        """Store ``value`` and ``state`` and wake whoever waits, in one step.

        :param traceback: the worker's traceback as text, for states that carry an exception.
        :param request: what is known of the task, a `TaskRequest` or an object of Celery's with such attributes.
        :param expires: seconds to keep it, instead of the backend's default; 0 for ever.
        :returns: whether it was stored; not if the task has been stored as SUCCESS before.
        :raises EncodeError: the serializer cannot hold the value; names the type and the task.
        :raises ResultTooLargeError: it is larger than ``max_result_size``.
        :raises BackendStoreError: the server refused it.
        :raises BackendConnectionError: the server was away for longer than ``retry_for``. It may have been stored.
        """
        return await self._submit(task_id, value, state, traceback, request, expires)

    def _submit(
        self,
        task_id: str,
        value: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        expires: float | None = None,
        only_new: bool = False,
    ) -> asyncio.Future[bool]:
        self.check()
        done = datetime.now(UTC) if state in READY_STATES else None
        children: Sequence[ResultTuple] = ()
        extra: dict[str, Any] | None = None
        group_id: str | None = None
        if request is not None:
            children = [_as_tuple(child) for child in getattr(request, "children", None) or ()]
            extra = self._extra_fields(request)
            group_id = extra.get("group_id")
        task_id = self._valid_id(task_id)
        payload = self._encode(TaskMeta(task_id, state, value, traceback, children, done, extra))
        seconds = self.expires if expires is None else checked_seconds("expires", expires)
        return self._stores.submit(Record(task_id, payload, seconds, only_new, group_id))

    def _extra_fields(self, request: Any) -> dict[str, Any]:
        """The optional fields, in Celery's order (``Backend._get_result_meta``)."""
        extra = {}
        for field, attribute in (("group_id", "group"), ("parent_id", "parent_id")):
            if value := getattr(request, attribute, None):
                extra[field] = value
        if self.extended:
            for field, attribute in _EXTENDED_FIELDS:
                extra[field] = getattr(request, attribute, None)
            delivery = getattr(request, "delivery_info", None)
            extra["queue"] = getattr(request, "queue", None) or (delivery or {}).get("routing_key")
            for field in ("args", "kwargs"):
                try:
                    self.codec.dumps(extra[field], field)
                except AioResultError:  # the arguments are a note beside the result; they must not cost it
                    extra[field] = repr(extra[field])
            if headers := getattr(request, "stamped_headers", None):
                stamps = getattr(request, "stamps", None) or {}
                extra["stamped_headers"] = list(headers)
                # Celery lets a stamp of such a name take the place of the result itself.
                extra.update({name: stamps[name] for name in headers if name in stamps and name not in CORE_FIELDS})
        return extra

    async def mark_as_pending(self, task_id: str, expires: float | None = None) -> bool:
        """Register an id at submission, so that `exists` can tell a task that waits from one that never was.

        Changes nothing, and returns false, if anything is stored under the id: the worker may have been quicker.
        """
        return await self._submit(task_id, None, PENDING, expires=expires, only_new=True)

    async def mark_as_started(self, task_id: str, /, **info: Any) -> bool:
        """The task runs. ``info`` (Celery stores ``pid`` and ``hostname``) becomes the result for the time being."""
        return await self._submit(task_id, info, STARTED)

    async def mark_as_done(self, task_id: str, value: Any, request: Any = None, expires: float | None = None) -> bool:
        """The task returned ``value``. Nothing is stored for a request that says ``ignore_result``."""
        if getattr(request, "ignore_result", False):
            self.check()
            kept = False
        else:
            kept = await self._submit(task_id, value, SUCCESS, None, request, expires)
        if request is not None:
            await self._return_part(request, task_id, SUCCESS, value)
        return kept

    async def mark_as_failure(
        self,
        task_id: str,
        exc: BaseException,
        traceback: str | None = None,
        request: Any = None,
        expires: float | None = None,
    ) -> bool:
        """The task raised ``exc``. Without ``traceback`` the exception's own is stored, if it has one."""
        kept = await self._submit(task_id, exc, FAILURE, _traceback_of(exc, traceback), request, expires)
        await self._return_part(request, task_id, FAILURE, exc)
        return kept

    async def mark_as_retry(
        self,
        task_id: str,
        exc: BaseException,
        traceback: str | None = None,
        request: Any = None,
        expires: float | None = None,
    ) -> bool:
        """The task raised ``exc`` and will run again."""
        return await self._submit(task_id, exc, RETRY, _traceback_of(exc, traceback), request, expires)

    async def mark_as_revoked(
        self, task_id: str, reason: str = "", request: Any = None, expires: float | None = None
    ) -> bool:
        """The task was revoked: awaiting it raises `TaskRevokedError`."""
        exc = TaskRevokedError(reason)
        kept = await self._submit(task_id, exc, REVOKED, None, request, expires)
        await self._return_part(request, task_id, REVOKED, exc)
        return kept

    async def _return_part(self, request: Any, task_id: str, state: str, value: Any) -> None:
        """Count the part for the chord that the request names, and dispatch the callback if this was the last."""
        group_id, chord = getattr(request, "group", None), getattr(request, "chord", None)
        if not group_id or not chord:
            return
        handler = self._on_chord_ready
        index = getattr(request, "group_index", None)
        body = None if chord is True else chord
        lease = None if handler is not None else 0.0  # nobody here to dispatch: leave the claim to `ready_chords`
        ready = await self.on_chord_part_return(group_id, task_id, state, value, index, body, lease)
        if ready is not None and handler is not None:
            try:
                async with ready:
                    await handler(ready)
            except ChordError as exc:
                if exc is not ready.error:  # which is another part's failure, and none of this task's storing
                    raise

    # -- the reader's side ------------------------------------------------------------------------------------------

    async def get_task_meta(self, task_id: str) -> TaskMeta:
        """What is stored of ``task_id`` now; an unknown id reads as PENDING, as in Celery.

        :raises DecodeError: what is stored cannot be read. `ContentDisallowed`: its serializer is not in ``accept``.
        :raises BackendConnectionError: the server was away for longer than ``retry_for``.
        """
        self.check()
        task_id = self._valid_id(task_id)
        return await self._fetches.submit(task_id) or TaskMeta.pending(task_id)

    async def get_many(self, task_ids: Iterable[str]) -> list[TaskMeta]:
        """What is stored of each id, in order: one round trip per `fetch_chunk` ids. Raises as `get_task_meta`."""
        metas: list[TaskMeta] = []
        for outcome in await self.look_up(task_ids):
            if isinstance(outcome, Exception):
                raise outcome
            metas.append(outcome)
        return metas

    async def look_up(self, task_ids: Iterable[str]) -> list[Outcome]:
        """As `get_many`, but a result that cannot be read is an exception in its place and spoils no other."""
        self.check()
        outcomes: list[Outcome] = []
        for ids in chunked(map(self._valid_id, task_ids), self.fetch_chunk):
            found = await self._calls.submit(partial(self._read, ids))
            outcomes += [
                TaskMeta.pending(task_id) if outcome is None else outcome
                for task_id, outcome in zip(ids, found, strict=True)
            ]
        return outcomes

    async def exists(self, task_id: str) -> bool:
        """Whether anything is stored under ``task_id``: also if it is only pending, or cannot be read."""
        self.check()
        try:
            return await self._fetches.submit(self._valid_id(task_id)) is not None
        except DecodeError:
            return True

    async def wait_for(self, task_id: str, timeout: float | None = None) -> TaskMeta:
        """The meta of ``task_id`` once the task is over, well or not: this does not raise the task's exception.

        :param timeout: seconds; ``None`` waits for ever, 0 looks once.
        :raises TimeoutError: the time is up. A result that is there beats a deadline that has passed.
        :raises BackendClosedError: the backend was closed meanwhile. Otherwise raises as `get_task_meta`.
        """
        self.check()
        task_id = self._valid_id(task_id)
        if timeout is not None and timeout <= 0:
            meta = await self.get_task_meta(task_id)
            if meta.ready:
                return meta
            raise timed_out(f"task {task_id}", timeout)
        # As `wait_for_topic`, but not through it: with ten thousand who wait, a frame less is two megabytes.
        waiter = SingleWaiter(f"task {task_id}", timeout)
        self._hub.watch(task_id, waiter)
        try:
            return await waiter.future
        finally:
            self._hub.unwatch(task_id, waiter)
            waiter.stop()

    async def wait_for_topic(self, topic: str, waiter: SingleWaiter) -> TaskMeta:
        """Wait for a chord by its topic; for handles."""
        self.check()
        self._hub.watch(topic, waiter)
        try:
            return await waiter.future
        finally:
            self._hub.unwatch(topic, waiter)
            waiter.stop()

    def watch(self, task_id: str, waiter: Waiter, look: bool = True) -> None:
        """Have ``waiter`` told of every meta of ``task_id``: the layer below `wait_for`. Pair it with `unwatch`.

        Without ``look`` nothing is read before the subscription stands: for who has just done so.
        """
        self.check()
        self._hub.watch(self._valid_id(task_id), waiter, look)

    def unwatch(self, task_id: str, waiter: Waiter) -> None:
        """End what `watch` began; harmless if it has ended."""
        if self._loop is not None:
            self._hub.unwatch(str(task_id), waiter)

    # -- forgetting -------------------------------------------------------------------------------------------------

    async def forget(self, task_id: str) -> None:
        """Remove the result. Does not wake those who wait for it: the task may yet be run again."""
        self.check()
        await self._deletes.submit(self._valid_id(task_id))

    async def cleanup(self) -> int:
        """Remove what has expired and return how many; 0 where the server expires by itself."""
        self.check()
        return await self._call(self._cleanup)

    # -- groups -----------------------------------------------------------------------------------------------------

    async def save_group(
        self, group_id: str, group: SupportsAsTuple | ResultTuple, expires: float | None = None
    ) -> None:
        """Remember the members of a group, so that `restore_group` can find them in another process.

        ``group`` is a `GroupResult`, ours or Celery's, or its tuple. It is kept for ``expires`` seconds, and longer
        if a result of one of its members, stored with a request that names the group, is kept longer.
        """
        self.check()
        group_id = self._valid_id(group_id)
        payload = self._encode_group(group_id, _as_tuple(group))
        seconds = self.expires if expires is None else checked_seconds("expires", expires)
        await self._call(lambda: self._store_group(group_id, payload, seconds))

    async def restore_group(self, group_id: str) -> GroupResult | None:
        """The group saved under this id, or ``None``. Raises `DecodeError` if what is stored is no group."""
        self.check()
        group_id = self._valid_id(group_id)
        payload = await self._call(lambda: self._fetch_group(group_id))
        if payload is None:
            return None
        result = result_from_tuple(self._decode_group(group_id, payload), self)
        if not isinstance(result, GroupResult):
            raise DecodeError(f"what is stored as group {group_id} is a single result")
        return result

    async def delete_group(self, group_id: str) -> None:
        """Forget the group; its members' results stay."""
        self.check()
        group_id = self._valid_id(group_id)
        await self._call(lambda: self._delete_group(group_id))

    # -- chords -----------------------------------------------------------------------------------------------------

    async def create_chord(
        self, group: GroupResult | SupportsAsTuple | str, body: Any = None, size: int | None = None
    ) -> Chord:
        """Begin a chord: when all parts of the group have come, whoever brings the last may dispatch the callback.

        :param group: the header; it is saved, for the shape of nested groups. An id alone if the members are not
            known yet: then the size is ``size``, or set later with `set_chord_size`.
        :param body: any value that can be stored; handed back to who dispatches.
        :returns: a handle; awaiting it gives the header's results. For a chord of size 0, complete at once, see
            `Chord.claim`.
        """
        self.check()
        group_id = self._valid_id(group if isinstance(group, str) else str(getattr(group, "id", "") or ""))
        if not isinstance(group, str):
            await self.save_group(group_id, group)
            if size is None:
                members = group if isinstance(group, GroupResult) else result_from_tuple(_as_tuple(group), self)
                size = sum(1 for _ in members.leaves())
        return await self._chords.create(group_id, None if size is None else _size(size), body)

    async def set_chord_size(self, group_id: str, size: int) -> ReadyChord | None:
        """Say how many parts there are, where `create_chord` could not; a `ReadyChord` if all of them have come."""
        self.check()
        return await self._chords.set_size(self._valid_id(group_id), _size(size))

    async def on_chord_part_return(
        self,
        group_id: str,
        task_id: str,
        state: str,
        value: Any,
        index: int | None = None,
        body: Any = None,
        lease: float | None = None,
    ) -> ReadyChord | None:
        """A part of a chord has come. Exactly one caller, of all in all processes, gets the `ReadyChord` to dispatch.

        :param state: ``SUCCESS``, or ``FAILURE`` or ``REVOKED`` with the exception as ``value``: then the chord fails.
        :param index: the part's place in the list of results; those without one come last, in order of arrival. A part
            is known by its task id and its index: the same one again changes nothing.
        :param body: what Celery sends along with every part; not needed for a chord made with `create_chord`.
        :param lease: seconds that the claim lasts, instead of ``chord_lease``; 0 leaves the claim to `ready_chords`.
        """
        self.check()
        if index is not None:
            _count("the index of a part", index)
        seconds = self.chord_lease if lease is None else checked_seconds("lease", lease)
        return await self._chords.add_part(
            self._valid_id(group_id), self._valid_id(task_id), state, value, index, body, seconds
        )

    def chord(self, group_id: str) -> Chord:
        """A handle on a chord, from any process; no I/O. Awaiting it gives the header's results."""
        return self._chords.chord(self._valid_id(group_id))

    async def ready_chords(self) -> AsyncGenerator[ReadyChord, None]:
        """Claim, one after the other and without end, the chords that are complete and that nobody else dispatches.

        For a dispatcher: also those whose claimant died, once its lease has run out. Any number may run at once. An
        outage is waited out, however long. Leaving the loop ends the subscription when the iterator is closed: wrap it
        in `contextlib.aclosing` to have that happen at once.
        """
        self.check()
        async with aclosing(self._chords.ready()) as chords:
            async for ready in chords:
                yield ready

    async def chord_step(self, step: ChordStep) -> ChordState:
        """One atomic step; for `aioresult.chord`."""
        self.check()
        return await self._steps.submit(step)

    async def active_chords(self) -> Sequence[str]:
        """The chords that may be complete; for `aioresult.chord`."""
        self.check()
        return [group_id for group_id in await self._call(self._active_chords) if self._is_id(group_id)]

    def watch_topic(self, topic: str, waiter: Waiter) -> None:
        """As `watch`, of what is no task; for `aioresult.chord`."""
        self.check()
        self._hub.watch(topic, waiter)

    # -- handles: no I/O --------------------------------------------------------------------------------------------

    def result(self, task_id: str, parent: ResultBase | None = None) -> AsyncResult[Any]:
        """A handle on the result of ``task_id``; awaiting it gives the value."""
        return AsyncResult(self._valid_id(task_id), self, parent)

    def group(self, results: Iterable[ResultBase | str], id: str | None = None) -> GroupResult:
        """A handle on several results, given as handles or ids; ``id`` is made up if the group has none."""
        return GroupResult.of(results, self, id)


_EXTENDED_FIELDS = (
    ("name", "task"),
    ("args", "args"),
    ("kwargs", "kwargs"),
    ("worker", "hostname"),
    ("retries", "retries"),
)


def _size(size: int) -> int:
    return _count("the size of a chord", size)


def _count(what: str, number: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < _MAX_PARTS:
        raise UsageError(f"{what} is a whole number from 0 to {_MAX_PARTS - 1:,}, not {number!r}")
    return number


def _as_tuple(result: SupportsAsTuple | ResultTuple) -> ResultTuple:
    return result if isinstance(result, (list, tuple)) else result.as_tuple()  # type: ignore[union-attr]


def _traceback_of(exc: BaseException, given: str | None) -> str | None:
    """The traceback to store with ``exc``. Raises `UsageError` for what was never raised."""
    if not isinstance(exc, BaseException):
        raise UsageError(f"a task fails with an exception, not with {exc!r}; store_result takes any value")
    if given or exc.__traceback__ is None:
        return given
    return "".join(tracebacks.format_exception(exc))
