"""The worker's side of a backend: it checks, encodes, queues and stores the results of tasks."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, Unpack
from uuid import UUID

from ..batch import Batcher
from ..chain import links_of
from ..chord import ReadyChord
from ..exceptions import AioResultError, ChordError, TaskRevokedError, UsageError
from ..failure import safe_repr, traceback_of
from ..meta import META_FIELD, ResultTuple, SupportsAsTuple, TaskMeta
from ..options import checked_flag, checked_function
from ..record import Record
from ..seconds import Seconds, checked_seconds
from ..serialization import CORE_FIELDS
from ..states import (
    ALL_STATES,
    FAILURE,
    PENDING,
    PROPAGATE_STATES,
    READY_STATES,
    RETRY,
    REVOKED,
    STARTED,
    SUCCESS,
    state_meant,
)
from ..tasks import fail
from .core import BackendCore, CoreOptions

__all__ = ["BackendOptions", "WorkerSide", "as_tuple", "check_state", "checked_count", "checked_index"]

#: The most parts of a chord: far beyond any real chord, and small enough for the scores of Redis, which are floats.
_MAX_PARTS = 10**15
#: The width of the column ``status`` in Celery's table.
_MAX_STATE_LENGTH = 50


class BackendOptions(CoreOptions, total=False):
    """The options of every backend; see `aioresult.backends.base.Backend`."""

    on_chord_ready: Callable[[ReadyChord], Awaitable[object]] | None
    count_requests: bool


class WorkerSide(BackendCore):
    """The methods for workers; see `aioresult.backends.base.Backend`."""

    def __init__(
        self,
        url: str = "",
        *,
        on_chord_ready: Callable[[ReadyChord], Awaitable[object]] | None = None,
        count_requests: bool = True,
        **options: Unpack[CoreOptions],
    ) -> None:
        super().__init__(url, **options)
        checked_function("on_chord_ready", on_chord_ready)
        self._on_chord_ready = on_chord_ready
        self._count_requests = checked_flag("count_requests", count_requests)

    @abstractmethod
    async def on_chord_part_return(
        self,
        group_id: str | UUID,
        task_id: str | UUID,
        state: str,
        value: Any,
        index: int | None = None,
        body: Any = None,
        lease: Seconds | None = None,
    ) -> ReadyChord | None:
        """See `aioresult.backends.base.Backend.on_chord_part_return`."""

    async def store_result(
        self,
        task_id: str | UUID,
        value: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        expires: Seconds | None = None,
        *,
        meta: Mapping[str, Any] | None = None,
    ) -> bool:
        """Store the value and the state of a task, and wake its waiters, in one atomic step.

        If one backend stores under the same id several times, the calls take effect in order.

        :param value: any value that the serializer can hold; for a state that carries an exception, the exception.
        :param state: a state of `aioresult.states`, or one of your own such as ``"PROGRESS"``.
        :param traceback: the worker's traceback as text, for states that carry an exception.
        :param request: what is known about the task: a `TaskRequest`, or an object of Celery's with these attributes.
        :param expires: how many seconds the result is kept, instead of the backend's default; 0 for ever.
        :param meta: metadata of your own, any dict that can be stored. It is stored beside the value, belongs to this
            state alone, and is read as `TaskMeta.meta`. Celery's readers ignore it.
        :returns: whether it was stored. A stored SUCCESS is never overwritten. A state of your own does not overwrite
            FAILURE or REVOKED either; it can be stored again after the task has been stored as STARTED or RETRY.
        :raises UsageError: an argument makes no sense.
        :raises EncodeError: the serializer cannot hold the value. The message names the task, the path to the part that
            cannot be stored, its type, and the remedy.
        :raises ResultTooLargeError: the result is larger than ``max_result_size``.
        :raises DecodeError: what is stored already cannot be read here. It may be a success, so it is not overwritten.
        :raises BackendStoreError: the server refused the result.
        :raises BackendConnectionError: the server was away for longer than ``retry_for``. The result may have been
            stored. It is safe to repeat the call.
        """
        if full := self._full(task_id):
            await full.wait_for_room()
        return await self._submit(self.record(task_id, value, state, traceback, request, expires, meta=meta))

    def _full(self, task_id: str | UUID) -> Batcher[Any, Any] | None:
        """Return the queue for this task's changes if it is full; then the caller must wait. Raises as `check` does."""
        self.check()
        writes = self._shard_of(str(task_id)).writes
        return writes if writes.full else None

    def _submit(self, record: Record) -> asyncio.Future[bool]:
        writes = self._shard_of(record.task_id).writes
        return self._extending(writes.submit(record, record.task_id, self._payload_size(record.payload)), record)

    def record(
        self,
        task_id: str | UUID,
        value: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        expires: Seconds | None = None,
        only_new: bool = False,
        meta: Mapping[str, Any] | None = None,
    ) -> Record:
        """Check and encode what `store_result` stores. Raises the same errors.

        The check happens before the record is queued, so that a mistake in one call does not affect the other calls.
        """
        task_id = self._valid_id(task_id)
        custom = state not in ALL_STATES if isinstance(state, str) else True
        if custom:
            check_state(state)
        if traceback is not None and not isinstance(traceback, str):
            raise UsageError(f"a traceback must be a text, not {traceback!r}")
        done = datetime.now(UTC) if state in READY_STATES else None
        children: Sequence[ResultTuple] = ()
        extra: dict[str, Any] | None = None
        group_id: str | None = None
        index: int | None = None
        if request is not None:
            children = [as_tuple(child) for child in getattr(request, "children", None) or ()]
            extra = self._extra_fields(request)
            group_id = extra.get("group_id")
            place = getattr(request, "group_index", None)
            if group_id is not None and done is not None and type(place) is int:
                index = place
        if meta is not None:
            extra = {**(extra or {}), META_FIELD: _checked_meta(meta)}
        payload = self._encode(TaskMeta(task_id, state, value, traceback, children, done, extra))
        default = self.failure_expires if state == FAILURE else self.expires
        seconds = default if expires is None else checked_seconds("expires", expires)
        return Record(task_id, payload, seconds, only_new, group_id, custom, index, state in PROPAGATE_STATES)

    def _extra_fields(self, request: Any) -> dict[str, Any]:
        """Return the optional fields, in Celery's order (``Backend._get_result_meta``)."""
        extra: dict[str, Any] = {}
        for field, attribute in (("group_id", "group"), ("parent_id", "parent_id")):
            if value := getattr(request, attribute, None):
                extra[field] = self._valid_id(value)
        if self.extended:
            for field, attribute in _EXTENDED_FIELDS:
                extra[field] = getattr(request, attribute, None)
            delivery = getattr(request, "delivery_info", None)
            extra["queue"] = getattr(request, "queue", None) or (delivery or {}).get("routing_key")
            for field in ("args", "kwargs"):
                if not self.codec.can_hold(extra[field]):
                    # The arguments only accompany the result. They must not prevent it from being stored.
                    extra[field] = safe_repr(extra[field])
            if headers := getattr(request, "stamped_headers", None):
                stamps = getattr(request, "stamps", None) or {}
                extra["stamped_headers"] = list(headers)
                # In Celery, a stamp named like a core field would replace that field, even the result itself.
                extra.update({name: stamps[name] for name in headers if name in stamps and name not in CORE_FIELDS})
        return extra

    async def mark_as_pending(self, task_id: str | UUID, expires: Seconds | None = None) -> bool:
        """Register an id when you submit its task, so that `exists` and ``must_exist`` can tell it from an unknown id.

        :param expires: how many seconds the registration is kept, instead of the backend's default; 0 for ever.
        :returns: whether it was stored. If anything is stored under the id already, for instance because the worker was
            faster, nothing changes.
        """
        if full := self._full(task_id):
            await full.wait_for_room()
        return await self._submit(self.record(task_id, None, PENDING, expires=expires, only_new=True))

    async def mark_as_started(self, task_id: str | UUID, /, **info: Any) -> bool:
        """Store that a worker has started the task.

        :param info: any keyword arguments. They are the result until the next state is stored. Celery stores ``pid``
            and ``hostname``.
        :returns: whether it was stored; see `store_result`.
        """
        if full := self._full(task_id):
            await full.wait_for_room()
        return await self._submit(self.record(task_id, info, STARTED))

    async def mark_as_done(
        self,
        task_id: str | UUID,
        value: Any,
        request: Any = None,
        expires: Seconds | None = None,
        *,
        meta: Mapping[str, Any] | None = None,
    ) -> bool:
        """Store that the task has succeeded and returned ``value``.

        If ``request.ignore_result`` is true, the result is not stored. If the request belongs to a chord, the task also
        counts as a part of it. The other parameters, the errors and the returned value are those of `store_result`.
        """
        part = None if request is None else self._part_of(request, task_id)
        if full := self._full(task_id):
            await full.wait_for_room()
        if getattr(request, "ignore_result", False):
            kept = False
        else:
            kept = await self._submit(self.record(task_id, value, SUCCESS, None, request, expires, meta=meta))
        if part is not None:
            await self._return_part(part, SUCCESS, value)
        return kept

    async def mark_as_failure(
        self,
        task_id: str | UUID,
        exc: BaseException,
        traceback: str | None = None,
        request: Any = None,
        expires: Seconds | None = None,
        *,
        meta: Mapping[str, Any] | None = None,
    ) -> bool:
        """Store that the task has failed with ``exc``.

        Without ``traceback``, the traceback of the exception is stored, if it has one. If the request belongs to a
        chord, the failure also counts as a part of it.

        If the request has a ``chain``, the tasks that come after this one fail with it, as in Celery. The failure is
        stored for each link of the chain. If a link belongs to a chord, the failure counts as its part.

        The other parameters, the errors and the returned value are those of `store_result`.

        :raises UsageError: also if a link of the chain is not a signature, or ``exc`` is not an exception.
        """
        traceback = traceback_of(exc, traceback)
        part = None if request is None else self._part_of(request, task_id)
        links = () if request is None else links_of(getattr(request, "chain", None))
        parts = self._parts_of(part, links)
        if full := self._full(task_id):
            await full.wait_for_room()
        if links:
            own = self._submit(self.record(task_id, exc, FAILURE, traceback, request, expires, meta=meta))
            return await self._fail_with_links(own, exc, traceback, expires, parts, links)
        kept = await self._submit(self.record(task_id, exc, FAILURE, traceback, request, expires, meta=meta))
        if part is not None:
            await self._return_part(part, FAILURE, exc)
        return kept

    async def _fail_with_links(
        self,
        own: asyncio.Future[bool],
        exc: BaseException,
        traceback: str | None,
        expires: Seconds | None,
        parts: Sequence[_Part | None],
        links: Sequence[Any],
    ) -> bool:
        """Store a failure for the links of a chain, in one batch with the failure of the task itself, ``own``.

        An error in one store does not prevent the others. The first error is raised at the end.
        """
        stores = [self._submit_link(link, exc, traceback, expires) for link in links]
        kept, *stored = await asyncio.gather(own, *stores, return_exceptions=True)
        if isinstance(kept, BaseException):
            raise kept
        counts = [self._return_part(each, FAILURE, exc) for each in parts if each is not None]
        counted = await asyncio.gather(*counts, return_exceptions=True)
        for outcome in (*stored, *counted):
            if isinstance(outcome, BaseException):
                raise outcome
        return kept

    async def follow_up(self, task_id: str, state: str, value: Any, request: Any, expires: Seconds | None) -> None:
        """Count an ended task as a part of its chord, and fail the rest of its chain. Used by `aioresult.running`."""
        if request is None:
            return
        part = self._part_of(request, task_id)
        links = links_of(getattr(request, "chain", None)) if state == FAILURE else ()
        if links:
            stored: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            stored.set_result(True)
            parts = self._parts_of(part, links)
            await self._fail_with_links(stored, value, traceback_of(value), expires, parts, links)
        elif part is not None:
            await self._return_part(part, state, value)

    def _submit_link(
        self, link: Any, exc: BaseException, traceback: str | None, expires: Seconds | None
    ) -> asyncio.Future[bool]:
        try:
            return self._submit(self.record(link.id, exc, FAILURE, traceback, link, expires))
        except AioResultError as error:  # for instance because its arguments are too large
            refused: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            fail(refused, error)
            return refused

    async def mark_as_retry(
        self,
        task_id: str | UUID,
        exc: BaseException,
        traceback: str | None = None,
        request: Any = None,
        expires: Seconds | None = None,
        *,
        meta: Mapping[str, Any] | None = None,
    ) -> bool:
        """Store that the task has raised ``exc`` and will run again.

        Without ``traceback``, the traceback of the exception is stored, if it has one. The other parameters, the errors
        and the returned value are those of `store_result`.
        """
        if full := self._full(task_id):
            await full.wait_for_room()
        traceback = traceback_of(exc, traceback)
        return await self._submit(self.record(task_id, exc, RETRY, traceback, request, expires, meta=meta))

    async def mark_as_revoked(
        self,
        task_id: str | UUID,
        reason: str = "",
        request: Any = None,
        expires: Seconds | None = None,
        *,
        meta: Mapping[str, Any] | None = None,
    ) -> bool:
        """Store that the task was revoked. Awaiting it raises ``TaskRevokedError(reason)``.

        As in Celery, nothing is stored for the tasks that come after it in a chain. A handle that knows its parents
        raises the error of the revoked parent. If the request belongs to a chord, the task also counts as a failed part
        of it. The other parameters, the errors and the returned value are those of `store_result`.
        """
        part = None if request is None else self._part_of(request, task_id)
        exc = TaskRevokedError(reason)
        if full := self._full(task_id):
            await full.wait_for_room()
        kept = await self._submit(self.record(task_id, exc, REVOKED, None, request, expires, meta=meta))
        if part is not None:
            await self._return_part(part, REVOKED, exc)
        return kept

    def _part_of(self, request: Any, task_id: str | UUID) -> _Part | None:
        """Return the part of a chord that the request describes; ``None`` if it describes none.

        Call this before anything is stored, because it raises `UsageError` for a request that makes no sense.
        """
        if not self._count_requests:
            return None
        group_id, chord = getattr(request, "group", None), getattr(request, "chord", None)
        if not group_id or not chord:
            return None
        index = getattr(request, "group_index", None)
        body = None if chord is True else chord
        return _Part(self._valid_id(group_id), self._valid_id(task_id), checked_index(index), body)

    def _parts_of(self, own: _Part | None, links: Sequence[Any]) -> list[_Part | None]:
        """Return the chord parts of a task and of each link of its chain; ``None`` for a task that is in no chord."""
        return [own, *(self._part_of(link, self._valid_id(link.id)) for link in links)]

    async def _return_part(self, part: _Part, state: str, value: Any) -> None:
        """Add the part to its chord. If it was the last part, dispatch the callback with ``on_chord_ready``."""
        handler = self._on_chord_ready
        lease = None if handler is not None else 0.0  # no handler to dispatch: leave the claim to `ready_chords`
        ready = await self.on_chord_part_return(part.group_id, part.task_id, state, value, part.place, part.body, lease)
        if ready is not None and handler is not None:
            try:
                async with ready:
                    await handler(ready)
            except ChordError as exc:
                if exc is not ready.error:  # that error reports a failed part; this task was stored all the same
                    raise


class _Part(NamedTuple):
    """A task of a chord's header, as its request describes it."""

    group_id: str
    task_id: str
    place: int | None
    body: Any


_EXTENDED_FIELDS = (
    ("name", "task"),
    ("args", "args"),
    ("kwargs", "kwargs"),
    ("worker", "hostname"),
    ("retries", "retries"),
)


def checked_index(index: int | None) -> int | None:
    return None if index is None else checked_count("the index of a part", index)


def check_state(state: object) -> None:
    """Raise `UsageError` for a state that a store could not keep, or that is probably a misspelt state of Celery's."""
    if not isinstance(state, str) or not state:
        raise UsageError(f"a state must be a text such as 'PROGRESS', not {state!r}")
    if len(state) > _MAX_STATE_LENGTH or "\x00" in state:
        raise UsageError(f"a state must have at most {_MAX_STATE_LENGTH} characters, and no NUL; not {state!r}")
    try:
        state.encode()
    except UnicodeEncodeError as exc:
        raise UsageError(f"the state {state!r} cannot be written as UTF-8: {exc.reason}") from None
    if state not in ALL_STATES and (meant := state_meant(state)):
        raise UsageError(
            f"unknown state {state!r}; did you mean {meant!r}? Give a state of your own a name that is less similar"
        )


def _checked_meta(meta: object) -> dict[str, Any]:
    if not isinstance(meta, Mapping) or not all(isinstance(name, str) for name in meta):
        raise UsageError(f"meta must be a dict whose keys are texts, not {safe_repr(meta)}")
    return dict(meta)


def checked_count(what: str, number: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < _MAX_PARTS:
        raise UsageError(f"{what} must be a whole number from 0 to {_MAX_PARTS - 1:,}, not {number!r}")
    return number


def as_tuple(result: SupportsAsTuple | ResultTuple) -> ResultTuple:
    if isinstance(result, (list, tuple)):
        return result
    if not isinstance(result, SupportsAsTuple):
        raise UsageError(f"{result!r} is neither a result nor the tuple of a result; pass a result, or its as_tuple()")
    return result.as_tuple()
