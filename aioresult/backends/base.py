"""`Backend`: the coroutines that readers and dispatchers call, on top of those of the worker's side (`worker`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar, Unpack, cast, overload
from uuid import UUID

from ..chord import (
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
    """Where results are kept, and the way to be woken when one arrives.

    Use it as ``async with aioresult.connect(url) as backend``, or call `open` and `aclose`. A backend belongs to the
    event loop that opened it. Every coroutine may be cancelled at any time; none may be called from another thread.

    Options, the same for every backend:

    - ``expires``: seconds that a result is kept; 0 or ``None`` for ever. A call's own ``expires`` goes before it.
    - ``failure_expires``: the same for results in the state FAILURE; ``None``, the default, for as long as all others.
    - ``serializer``, ``accept``: what results are written with, and what is read: ``json``, ``pickle``, ``msgpack``.
    - ``compression``: ``gzip``, ``bzip2``, ``lzma`` or ``zstd`` for what is written; reading needs no setting.
    - ``types``: a list of `StoredType`: classes of your own whose instances JSON and msgpack are to hold. Writers and
      readers need the same list. The order of precedence is this list, what kombu knows, the built-in types.
    - ``json_default``: a function as for ``json.dumps(default=)``: it gets each value that nothing else knows, and
      returns one that can be stored. JSON and msgpack call it; pickle does not. See docs/values.md.
    - ``extended``: also store the task's name, arguments, worker, retries and queue.
    - ``max_result_size``: bytes, checked when storing and when reading (after decompression).
    - ``retry_for``: seconds that an unreachable server may be away before a call fails; waiting calls wait on.
    - ``heartbeat``: seconds between signs of life; a dead connection is noticed within three of them.
    - ``recheck``: seconds after which whatever is still waited for is read again, in batches; 0, the default, never.
      Needed only where a message may vanish and leave the connection whole: see docs/guarantees.md.
    - ``chord_lease``: seconds that a claim to dispatch a chord's callback lasts without a sign of life.
    - ``chord_expires``: seconds that what belongs to a chord is kept, counted from its last part; 0 for ever, ``None``,
      the default, for as long as results.
    - ``max_pending_bytes``: bytes of stores that may be queued or on their way; a further store waits until there are
      fewer (default 64 MiB).
    - ``lease``: seconds without a sign of life after which a worker that runs tasks under `running` counts as dead.
    - ``default_timeout``: seconds for every wait that has no ``timeout`` of its own: for results, groups, joins and
      chords, but not for streams and updates. ``None``, the default, is for ever. With several backends, that of the
      first result counts. A wait with ``timeout=float("inf")`` has no limit.
    - ``wait_for_server``: seconds that `open` keeps trying while the server cannot be reached; 0, the default: it fails
      at once. For services that start together with their server. A server that refuses ends the attempt at once.
    - ``on_chord_ready``: a coroutine function that dispatches the callback of a `ReadyChord`; called by `mark_as_done`
      and its like for a request that belongs to a chord. Without it, `ready_chords` gets those chords.
    - ``count_requests``: whether `mark_as_done` and its like count the part of a request that belongs to a chord. With
      ``False`` they leave chords alone: pass it where Celery counts by other means, as it does in a database.
    """

    def __init__(self, url: str = "", **options: Unpack[BackendOptions]) -> None:
        super().__init__(url, **options)
        self._chords = Chords(self)

    # -- groups -----------------------------------------------------------------------------------------------------

    async def save_group(
        self, group_id: str | UUID, group: SupportsAsTuple | ResultTuple, expires: Seconds | None = None
    ) -> None:
        """Remember the members of a group, so that `restore_group` can find them in another process.

        ``group`` is a `GroupResult`, ours or Celery's, or its tuple. It is kept for ``expires`` seconds, and longer
        if a result of one of its members, stored with a request that names the group, is kept longer.
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
        await self._call(partial(self._keep_group, group_id, payload, seconds, size), group_id)

    async def _keep_group(self, group_id: str, payload: bytes, expires: float, size: int | None) -> None:
        await self._store_group(group_id, payload, expires)
        if size is not None:
            await self._count_group(group_id, size, expires)

    async def restore_group(self, group_id: str | UUID) -> GroupResult | None:
        """The group saved under this id, or ``None``. Raises `DecodeError` if what is stored is no group."""
        self.check()
        group_id = self._valid_id(group_id)
        payload = await self._call(partial(self._fetch_group, group_id), group_id)
        if payload is None:
            return None
        with reading(f"group {group_id}"):
            members = self._decode_group(group_id, payload)
            # Up to 5.6, Celery's database backend pickled the group itself.
            result = result_from_tuple(members.as_tuple() if isinstance(members, SupportsAsTuple) else members, self)
        if not isinstance(result, GroupResult):
            raise DecodeError(f"what is stored as group {group_id} is a single result")
        return result

    async def delete_group(self, group_id: str | UUID) -> None:
        """Forget the group; its members' results stay."""
        self.check()
        group_id = self._valid_id(group_id)
        await self._call(partial(self._delete_group, group_id), group_id)

    # -- chords -----------------------------------------------------------------------------------------------------

    async def create_chord(
        self, group: GroupResult | SupportsAsTuple | str | UUID, body: Any = None, size: int | None = None
    ) -> Chord:
        """Begin a chord: when all parts of the group have come, whoever brings the last may dispatch the callback.

        :param group: the header; it is saved, for the shape of nested groups. An id alone if the members are not
            known yet: then the size is ``size``, or set later with `set_chord_size`.
        :param body: any value that can be stored; handed back to who dispatches.
        :returns: a handle; awaiting it gives the header's results. For a chord of size 0, complete at once, see
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
        """Say how many parts there are, where `create_chord` could not; a `ReadyChord` if all of them have come."""
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
        """A part of a chord has come. Exactly one caller, of all in all processes, gets the `ReadyChord` to dispatch.

        :param state: ``SUCCESS``, or ``FAILURE`` or ``REVOKED`` with the exception as ``value``: then the chord fails.
        :param index: the part's place in the list of results; those without one come last, in order of arrival. A part
            is known by its task id and its index: the same one again changes nothing.
        :param body: what Celery sends along with every part; not needed for a chord made with `create_chord`.
        :param lease: seconds that the claim lasts, instead of ``chord_lease``; 0 leaves the claim to `ready_chords`.
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
        """A handle on a chord, from any process; no I/O. Awaiting it gives the header's results."""
        return self._chords.chord(self._valid_id(group_id))

    async def ready_chords(self) -> AsyncGenerator[ReadyChord, None]:
        """Claim, one after the other and without end, the chords that are complete and that nobody else dispatches.

        For a dispatcher: also those whose claimant died, once its lease has run out. Any number may run at once. An
        outage is waited out, however long. A chord that cannot be read here is logged once as an error, and left until
        it changes. Leaving the loop ends the subscription when the iterator is closed: wrap it
        in `contextlib.aclosing` to have that happen at once.
        """
        self.check()
        async with aclosing(ready_chords(self._chords, self)) as chords:
            async for ready in chords:
                yield ready

    async def chord_step(self, step: ChordStep) -> ChordState:
        """One atomic step; for `aioresult.chord`."""
        self.check()
        if self._steps.full:
            await self._steps.wait_for_room()
        return await self._steps.submit(step, size=len(step.part) + len(step.body or b""))

    async def chord_steps(self, steps: Sequence[ChordStep]) -> list[ChordState | BaseException]:
        """Many steps in few round trips, with errors in their places; for `aioresult.chord`."""
        self.check()
        if self._steps.full:
            await self._steps.wait_for_room()
        return await asyncio.gather(*map(self._steps.submit, steps), return_exceptions=True)

    async def active_chords(self) -> Sequence[str]:
        """The chords that may be complete; for `aioresult.chord`."""
        self.check()
        return [group_id for group_id in await self._call(self._active_chords) if self._is_id(group_id)]

    def read_again(self, topic: str) -> None:
        """Have what is waited for under ``topic`` read once more, with all that is due; for `aioresult.chord`."""
        if self._loop is not None:
            self._hub.mark_stale(topic)

    # -- handles: no I/O --------------------------------------------------------------------------------------------

    @overload
    def result(self, task_id: str | UUID | SupportsAsTuple, parent: ResultBase | None = None) -> AsyncResult[Any]: ...
    @overload
    def result(
        self, task_id: str | UUID | SupportsAsTuple, parent: ResultBase | None = None, *, type: type[T]
    ) -> AsyncResult[T]: ...
    @overload  # for a type that no checker takes for a class, such as ``int | None``
    def result(
        self, task_id: str | UUID | SupportsAsTuple, parent: ResultBase | None = None, *, type: object
    ) -> AsyncResult[Any]: ...
    def result(
        self, task_id: str | UUID | SupportsAsTuple, parent: ResultBase | None = None, *, type: Any = None
    ) -> AsyncResult[Any]:
        """A handle on the result of ``task_id``; awaiting it gives the value.

        :param task_id: the id, or what Celery's ``delay`` or ``apply_async`` returned. Then the handle also has the
            parents, and what Celery knows already: the value of a task that it has run on the spot
            (``task_always_eager``), and that a task stores no result (``ignore_result``). A handle of this backend is
            returned as it is.
        :param parent: the result that this one follows in a chain.
        :param type: what the value is converted to: a pydantic model, by pydantic; a msgspec Struct, a dataclass, a
            TypedDict or an annotation such as ``list[int]``, by msgspec if it is installed, otherwise by pydantic.
            A value that does not fit raises `DecodeError`. See docs/values.md.
        :raises UsageError: ``task_id`` is none of these, or the package cannot convert to that type. A group of
            Celery's belongs into `group`.
        :raises ImproperlyConfigured: neither package is installed; says how to install one.
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
        """A handle on several results. ``id`` is made up if the group has none.

        :param results: handles, ids, and results of Celery's; or a group of Celery's, whose id is kept.
        """
        return group_of(results, self, id)

    def handle_on(self, item: object) -> ResultBase:
        """The handle for a member of a group that is not a handle: an id, a result or a group of Celery's."""
        return from_celery(item, self) if is_celerys(item) else self.result(self._valid_id(cast("str", item)))


def _size(size: int) -> int:
    return checked_count("the size of a chord", size)
