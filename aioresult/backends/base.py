"""Defines `Backend`, which adds groups, chords and handles to its base classes.

The base classes have the other coroutines: `worker` has those that store results, and `reader` has those that read and
wait. `live` has those for running tasks, and `operations` has those for operators.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar, Unpack, cast, overload
from uuid import UUID

from ..chord import (
    CHORD_TOPIC,
    READY_TOPIC,
    Chord,
    Chords,
    ChordState,
    ChordStep,
    ReadyChord,
)
from ..dispatch import ready_chords
from ..exceptions import (
    DecodeError,
    UsageError,
)
from ..foreign import from_celery, group_of, is_celerys, single
from ..meta import ResultTuple, SupportsAsTuple
from ..result import AsyncResult, GroupResult, ResultBase, result_from_tuple
from ..seconds import Seconds, checked_seconds
from ..serialization import reading
from ..states import ALL_STATES
from ..typed import TypedResult
from .operations import OperationsSide
from .worker import BackendOptions, as_tuple, check_state, checked_count, checked_index

__all__ = ["Backend", "BackendOptions"]

T = TypeVar("T")


class Backend(OperationsSide):
    """Stores the results of tasks on a server or in memory, and wakes the coroutines that wait for them.

    `aioresult.connect` makes a backend from a URL. Open it with ``async with``, which also closes it, or call `open`
    and `aclose`::

        async with aioresult.connect("redis://localhost:6379/0", expires=3600) as backend:
            await backend.mark_as_done("task-1", 42)  # the worker stores the result
            value = await backend.result("task-1")  # the waiter gets it, or the exception of the task

    A backend belongs to the event loop that opened it. Do not call its coroutines from another thread or event loop:
    they raise `WrongEventLoopError`. Any coroutine may be cancelled at any time.

    Pass options as keyword arguments to `aioresult.connect`. Every backend has the options below. The number in
    brackets is the default. docs/reference/options.md also lists the options that only some backends have.

    Storing:

    - ``expires``: how many seconds a result is kept (86400); 0 or ``None`` keeps it for ever. The argument ``expires``
      of a call takes precedence.
    - ``failure_expires``: the same for results in the state FAILURE. ``None``, the default, keeps them as long as all
      other results.
    - ``serializer``: the format that results are written in: ``json``, the default, ``msgpack`` or ``pickle``.
    - ``accept``: the formats that are read, by default only ``json``. It must contain the ``serializer``. Reading
      ``pickle`` runs code that the stored bytes name: accept it only if you trust every program that writes there.
    - ``compression``: ``gzip``, ``bzip2``, ``lzma`` or ``zstd`` for what is written. Reading needs no setting.
    - ``types``: a list of `StoredType`, for instances of your own classes in JSON and msgpack. Writers and readers need
      the same list. These types take precedence over kombu's types, which take precedence over the built-in types.
    - ``json_default``: a function as for ``json.dumps(default=)``. The JSON and msgpack serializers call it with each
      value that fits none of these types, and store what it returns. pickle does not call it. See docs/values.md.
    - ``extended``: also store the task's name, arguments, worker, retries and queue.
    - ``max_result_size``: the largest size of a result in bytes (128 MiB). The size is checked when the result is
      stored and, after decompression, when it is read. A larger result raises `ResultTooLargeError`.
    - ``max_pending_bytes``: the most bytes that stores may have queued or in flight (64 MiB). A further store waits
      until there is room.

    Connection:

    - ``retry_for``: how many seconds a call retries while the server cannot be reached (30). Then it raises
      `BackendConnectionError`. Calls that wait for a result go on waiting.
    - ``heartbeat``: seconds between two signs of life of a connection (5). A dead connection is noticed within three
      heartbeats.
    - ``recheck``: seconds after which the results that still have waiters are read again, in batches. With 0, the
      default, they never are. You need it only where a message can get lost although the connection stands: see
      docs/guarantees.md.
    - ``wait_for_server``: how many seconds `open` keeps trying while the server cannot be reached; with 0, the default,
      it fails at once. Use it for services that start together with their server. If the server answers and refuses,
      `open` fails at once.

    Waiting:

    - ``default_timeout``: seconds for every wait that has no ``timeout`` of its own: for results, groups, joins and
      chords, not for streams and updates. ``None``, the default, waits for ever. ``timeout=float("inf")`` waits for
      ever in spite of it. In a wait on several backends, the backend of the first result decides.

    Running tasks:

    - ``lease``: seconds without a sign of life after which a worker that runs tasks under `running` counts as dead
      (30). Give all processes the same value.

    Chords. A chord is a group of tasks, its header, and a callback that runs with their results. Each result is a part
    of the chord. The process that stores the last part claims the callback, and dispatches it.

    - ``chord_lease``: how many seconds a claim lasts without a sign of life of the process that holds it (30). Then
      another process may claim the callback.
    - ``chord_expires``: how many seconds the parts of a chord are kept after the last part has come; 0 keeps them for
      ever. ``None``, the default, keeps them as long as results.
    - ``on_chord_ready``: a coroutine function that dispatches the callback of a `ReadyChord`. `mark_as_done`,
      `mark_as_failure`, `mark_as_revoked` and `running` await it if their ``request`` belongs to a chord, and the task
      is its last part. Without it, `ready_chords` gets these chords.
    - ``count_requests``: whether these methods count a task whose request belongs to a chord as a part of it. By
      default they do. Pass ``False`` where Celery counts by other means, as it does in a database.
    """

    def __init__(self, url: str = "", **options: Unpack[BackendOptions]) -> None:
        super().__init__(url, **options)
        self._chords = Chords(self)

    # -- groups -----------------------------------------------------------------------------------------------------

    async def save_group(
        self, group_id: str | UUID, group: SupportsAsTuple | ResultTuple, expires: Seconds | None = None
    ) -> None:
        """Store the members of a group, so that any process can get them with `restore_group`.

        :param group: a `GroupResult`, a group of Celery's, or what ``as_tuple()`` returns for either.
        :param expires: how many seconds the group is kept, instead of the backend's ``expires``; 0 for ever. If the
            result of a member was stored with a request that names the group, the group is kept at least as
            long as that result.
        :raises UsageError: ``group`` is no group, or holds something that is no result.
        """
        self.check()
        group_id = self._valid_id(group_id)
        members = as_tuple(group)
        if not isinstance(group, GroupResult):
            try:
                members = result_from_tuple(members, None).as_tuple()
            except DecodeError as exc:
                raise UsageError(f"{group!r} cannot be saved as a group: {exc}") from None
        payload = self._encode_group(group_id, members)
        seconds = self.expires if expires is None else checked_seconds("expires", expires)
        _, tuples = members
        flat = tuples is not None and not any(nested for _, nested in tuples)
        size = len(tuples) if tuples is not None and flat else None
        await self._call(
            partial(self._keep_group, group_id, payload, seconds, size), CHORD_TOPIC + group_id, in_order=True
        )

    async def _keep_group(self, group_id: str, payload: bytes, expires: float, size: int | None) -> None:
        await self._store_group(group_id, payload, expires)
        if size is not None:
            await self._count_group(group_id, size, expires)

    async def restore_group(self, group_id: str | UUID) -> GroupResult | None:
        """Read the group that `save_group` stored under this id; ``None`` if there is none.

        :raises DecodeError: what is stored is no group, or cannot be read.
        """
        self.check()
        group_id = self._valid_id(group_id)
        payload = await self._call(partial(self._fetch_group, group_id), CHORD_TOPIC + group_id, in_order=True)
        if payload is None:
            return None
        with reading(f"group {group_id}"):
            members = self._decode_group(group_id, payload)
            # Celery's database backend pickled the group object itself, up to Celery 5.6.
            result = result_from_tuple(members.as_tuple() if isinstance(members, SupportsAsTuple) else members, self)
        if not isinstance(result, GroupResult):
            raise DecodeError(f"what is stored as group {group_id} is a single result")
        return result

    async def delete_group(self, group_id: str | UUID) -> None:
        """Remove the saved group. The results of its members stay."""
        self.check()
        group_id = self._valid_id(group_id)
        await self._call(partial(self._delete_group, group_id), CHORD_TOPIC + group_id, in_order=True)

    # -- chords -----------------------------------------------------------------------------------------------------

    async def create_chord(
        self, group: GroupResult | SupportsAsTuple | str | UUID, body: Any = None, size: int | None = None
    ) -> Chord:
        """Begin a chord: when all tasks of a group are over, one process dispatches the callback with their results.

        :param group: the header, a group of tasks. It is saved, so that results of nested groups keep their shape. Pass
            an id alone if you do not know the members yet.
        :param body: what is needed to dispatch the callback: any value that can be stored. The process that dispatches
            the callback gets it as `ReadyChord.body`.
        :param size: the number of parts, if it is not the number of members. If you pass an id alone, give the size
            here, or later with `set_chord_size`.
        :returns: a handle. Awaiting it gives the results of the header. A chord of size 0 is complete at once: see
            `Chord.claim`.
        """
        self.check()
        if size is not None:
            _size(size)
        if isinstance(group, (str, UUID)):
            group_id = self._valid_id(group)
        else:
            group_id = self._valid_id(str(getattr(group, "id", "") or ""))
            await self.save_group(group_id, group, self._chords.group_expires)
            if size is None:
                members = group if isinstance(group, GroupResult) else result_from_tuple(as_tuple(group), self)
                size = sum(1 for _ in members.leaves())
        return await self._chords.create(group_id, None if size is None else _size(size), body)

    async def set_chord_size(self, group_id: str | UUID, size: int) -> ReadyChord | None:
        """Set how many parts a chord has, if `create_chord` did not know it.

        :returns: if all parts have come already, the `ReadyChord` to dispatch; otherwise ``None``.
        """
        self.check()
        return await self._chords.set_size(self._valid_id(group_id), _size(size))

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
        """Add a part to a chord: the result of one task of its header.

        The task id and the index identify a part, so it is safe to repeat the call: a part counts only one time.

        :param state: ``SUCCESS``; or ``FAILURE`` or ``REVOKED``, which make the chord fail. Then ``value`` is the
            exception.
        :param index: the part's place in the list of results. Parts without an index come last, in order of arrival.
        :param body: the callback, which Celery sends along with every part. A chord that `create_chord` made has it.
        :param lease: how many seconds the claim lasts, instead of ``chord_lease``. With 0 this call claims nothing, and
            `ready_chords` gets the chord.
        :returns: the `ReadyChord` to dispatch, if this was the last part; otherwise ``None``. Of all callers in all
            processes, exactly one gets it.
        """
        self.check()
        if not isinstance(state, str) or state not in ALL_STATES:
            check_state(state)
        checked_index(index)
        seconds = self.chord_lease if lease is None else checked_seconds("lease", lease)
        return await self._chords.add_part(
            self._valid_id(group_id), self._valid_id(task_id), state, value, index, body, seconds
        )

    def chord(self, group_id: str | UUID) -> Chord:
        """Return a handle on a chord, in any process. No I/O. Awaiting it gives the results of the chord's tasks."""
        return self._chords.chord(self._valid_id(group_id))

    async def ready_chords(self) -> AsyncGenerator[ReadyChord, None]:
        """Claim complete chords one after the other, for a process that dispatches callbacks. Never ends by itself.

        ::

            async with aclosing(backend.ready_chords()) as chords:
                async for ready in chords:
                    async with ready:
                        if ready.error is None:  # no part failed
                            await publish(ready.body, ready.results)

        It claims each complete chord that no other process has claimed. That includes a chord whose claim has run out
        because the process that held it died. Any number of dispatchers may run at once. The iterator waits while the
        server is away, however long that lasts. If a chord cannot be read here, the iterator logs one error and skips
        the chord until it changes.

        Closing the iterator ends the subscription. `contextlib.aclosing` closes it as soon as you leave the loop.
        """
        self.check()
        async with aclosing(ready_chords(self._chords, self)) as chords:
            async for ready in chords:
                yield ready

    async def chord_step(self, step: ChordStep) -> ChordState:
        """Do one atomic step on a chord. Used by `aioresult.chord`."""
        self.check()
        (state,) = await self.chord_steps([step])
        if isinstance(state, BaseException):
            raise state
        return state

    async def chord_steps(self, steps: Sequence[ChordStep]) -> list[ChordState | BaseException]:
        """Do many steps in few round trips. Return a state for each step, or its error. Used by `aioresult.chord`."""
        self.check()
        states: list[asyncio.Future[ChordState]] = []
        for step in steps:
            batcher = self._shard_of(CHORD_TOPIC + step.group_id).steps
            if batcher.full:
                await batcher.wait_for_room()
            states.append(batcher.submit(step, size=len(step.part) + len(step.body or b"")))
        return await asyncio.gather(*states, return_exceptions=True)

    async def active_chords(self) -> Sequence[str]:
        """Return the ids of the chords that may be complete. Used by `aioresult.chord`."""
        self.check()
        return [group_id for group_id in await self._call(self._active_chords, READY_TOPIC) if self._is_id(group_id)]

    # -- handles: no I/O --------------------------------------------------------------------------------------------

    @overload
    def result(self, task_id: str | UUID | SupportsAsTuple, parent: ResultBase | None = None) -> AsyncResult[Any]: ...
    @overload
    def result(
        self, task_id: str | UUID | SupportsAsTuple, parent: ResultBase | None = None, *, type: type[T]
    ) -> AsyncResult[T]: ...
    @overload  # for a type that type checkers do not accept as a class, such as ``int | None``
    def result(
        self, task_id: str | UUID | SupportsAsTuple, parent: ResultBase | None = None, *, type: object
    ) -> AsyncResult[Any]: ...
    def result(
        self, task_id: str | UUID | SupportsAsTuple, parent: ResultBase | None = None, *, type: Any = None
    ) -> AsyncResult[Any]:
        """Return a handle on the result of ``task_id``. No I/O. Awaiting the handle gives the value of the task.

        :param task_id: the id, or what Celery's ``delay`` or ``apply_async`` returned. A handle made from Celery's
            result keeps its parents. It also keeps what Celery knows already: the value of a task that Celery has run
            eagerly (``task_always_eager``), or that the task stores no result (``ignore_result``). A handle of this
            backend is returned as it is.
        :param parent: the result of the task before this task in a chain.
        :param type: the type to convert the value to. pydantic converts to a pydantic model. msgspec converts to a
            msgspec Struct, a dataclass, a TypedDict or an annotation such as ``list[int]``; without msgspec, pydantic
            does so. If the value does not fit, awaiting the handle raises `DecodeError`. See docs/values.md.
        :raises UsageError: ``task_id`` is none of these, or the package cannot convert to that type. Pass a group of
            Celery's to `group`.
        :raises ImproperlyConfigured: neither pydantic nor msgspec is installed. The message says how to install one.
        """
        if isinstance(task_id, (str, UUID)):
            handle: AsyncResult[Any] = AsyncResult(self._valid_id(task_id), self, parent)
        else:
            handle = single(task_id, self, parent)
        return handle if type is None else TypedResult(handle, type)

    def group(
        self,
        results: Iterable[SupportsAsTuple | str | UUID] | SupportsAsTuple,
        id: str | UUID | None = None,
    ) -> GroupResult:
        """Return a handle on several results. No I/O. Awaiting the handle gives the list of their values.

        :param results: handles, ids and results of Celery's; or a group of Celery's.
        :param id: the id of the group. The default is the id of Celery's group, or a new id for any other group.
        """
        return group_of(results, self, id)

    def handle_on(self, item: object) -> ResultBase:
        """Make a handle from a member of a group: from an id, or from a result or a group of Celery's."""
        return from_celery(item, self) if is_celerys(item) else self.result(self._valid_id(cast("str", item)))


def _size(size: int) -> int:
    return checked_count("the size of a chord", size)
