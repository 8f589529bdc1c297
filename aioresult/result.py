"""Handles on results: `AsyncResult`, `ResultSet`, `GroupResult`. Creating one does no I/O.

The names are Celery's (``celery/result.py``). Everything that does I/O is a coroutine here, and never a property.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterable, Iterator
from functools import partial
from typing import Any, Generic, Self, TypeVar, cast
from uuid import UUID, uuid4

from .completion import Completions
from .exceptions import CyclicResultError, DecodeError, UsageError
from .existence import when_stored
from .handle import ResultStore, refresh
from .lineage import Lineage
from .live import LiveResult, OnLost
from .meta import ResultTuple, SupportsAsTuple, TaskMeta
from .news import value_of
from .progress import GroupProgress, progress_of
from .seconds import Seconds, Timeout, checked_timeout
from .states import FAILURE, SUCCESS
from .tree import (
    ResultBase,
    check_nesting,
    checked_id,
    forget_all,
    parents_of,
    raise_or_return,
    same_store,
    unpack,
)
from .waiter import Outcome

__all__ = ["AsyncResult", "GroupResult", "ResultBase", "ResultSet", "result_from_tuple"]

T = TypeVar("T")

#: Limits on result tuples (results as plain data), which come from outside. Real chains and groups are much smaller.
_MAX_PARENTS = 10_000
_MAX_NODES = 1_000_000


class AsyncResult(LiveResult, Generic[T]):
    """A handle on the result of one task. Awaiting it returns the value, or raises the exception of the task.

    Two handles are equal if they have the same id in the same store; a handle also equals its id. After the task is
    over, the handle remembers the result and does not ask the server again.
    """

    __slots__ = ("__weakref__", "_backend", "parent")
    _single = True

    def __init__(
        self,
        id: str | UUID,
        backend: ResultStore | None,
        parent: ResultBase | None = None,
        *,
        ignored: bool = False,
    ) -> None:
        super().__init__(checked_id(id), ignored)
        self._backend = backend
        self.parent: ResultBase | None = parent

    @property
    def backend(self) -> ResultStore:
        """The backend that keeps the result."""
        if self._backend is None:
            raise UsageError(f"{self!r} has no backend; make a handle with backend.result(id)")
        return self._backend

    def __await__(self) -> Generator[Any, None, T]:
        return self.get().__await__()

    async def get(
        self,
        timeout: Timeout = None,
        propagate: bool = True,
        follow_parents: bool = True,
        on_lost: OnLost = "wait",
        must_exist: bool = False,
    ) -> T:
        """Wait until the task is over and return its value.

        :param timeout: seconds; ``None`` for the backend's ``default_timeout``, infinity for ever. 0 reads one time.
        :param propagate: with ``False``, return the task's exception instead of raising it.
        :param follow_parents: raise the exception of a parent that failed or was revoked: then this task never runs. If
            this task has failed, too, as the callback of a chord does, the parent's exception takes precedence. If
            several parents failed, the first one's exception is raised. A success of this task is never affected.
        :param on_lost: what to do if the process that runs the task dies (see `aioresult.Backend.running`): ``"wait"``,
            the default, waits for the next attempt; ``"raise"`` raises `WorkerLostError`.
        :param must_exist: raise `TaskNotFoundError` at once if nothing is stored under the id.
        :raises TimeoutError: the task was not over in time. The task itself goes on.
        :raises Exception: the task's exception, if its class is imported here, otherwise a `RemoteError`. Its
            ``__cause__`` is the worker's traceback. Each call raises a new instance.
        :raises TaskRevokedError: the task was revoked.
        :raises BackendError, SerializationError: the result could not be fetched or read.
        """
        if must_exist and not self.ignored and not self._known():
            wait = partial(self.get, propagate=propagate, follow_parents=follow_parents, on_lost=on_lost)
            return await when_stored(self.backend, self.id, timeout, wait)
        if on_lost != "wait":
            if on_lost != "raise":
                raise UsageError(f"on_lost is 'raise' or 'wait', not {on_lost!r}")
            return await self.backend.unless_lost(self.id, self.get(timeout, propagate, follow_parents))
        checked_timeout(timeout)
        if self.ignored:
            return cast("T", None)
        if follow_parents and (self.parent is not None or self.failure is not None):
            return self._value_or_raise(await self._followed(timeout), propagate)
        if not self._known():
            self.set_outcome(await self.backend.wait_for(self.id, timeout))
        return self._value_or_raise(self._own(), propagate)

    def _value_or_raise(self, outcome: Outcome | None, propagate: bool) -> T:
        return cast("T", raise_or_return(outcome) if propagate else value_of(outcome))

    async def _followed(self, timeout: Timeout) -> Outcome | None:
        """Wait for the outcome of this task, or of a parent that failed."""
        meta, outcome = self.meta, self.outcome
        if meta is None or not meta.ready or (meta.propagates and self.failure is None):
            with Completions(Lineage[AsyncResult[Any]]([self]), timeout) as completions:
                async for finished in completions:
                    ((_, outcome),) = finished
        return outcome

    # -- what `Completions` needs -----------------------------------------------------------------------------------

    @property
    def store(self) -> ResultStore | None:
        """The backend that a wait uses; ``None`` if there is nothing to wait for."""
        return self._backend

    # -- looking, without waiting -----------------------------------------------------------------------------------

    async def fetch(self) -> TaskMeta:
        """Read and return the stored state. Raises the errors of `aioresult.backends.base.Backend.get_task_meta`."""
        meta = await self.backend.get_task_meta(self.id)
        self.set_outcome(meta)
        return meta

    async def _current(self) -> TaskMeta:
        meta = self.meta
        return meta if meta is not None and meta.ready else await self.fetch()

    async def state(self) -> str:
        """Return the task's state. It is ``"PENDING"`` if nothing is stored under the id."""
        return (await self._current()).status

    async def ready(self) -> bool:
        """True if the task is over: it succeeded, failed or was revoked."""
        return (await self._current()).ready

    async def successful(self) -> bool:
        """True if the task has succeeded."""
        return (await self._current()).status == SUCCESS

    async def failed(self) -> bool:
        """True if the task has failed."""
        return (await self._current()).status == FAILURE

    async def traceback(self) -> str | None:
        """Return the worker's traceback as text; ``None`` if none is stored."""
        return (await self._current()).traceback

    async def children(self) -> list[ResultBase]:
        """Return the results of the tasks that this task started."""
        return [result_from_tuple(child, self.store) for child in (await self._current()).children]

    async def exists(self) -> bool:
        """True if anything is stored under the id."""
        return await self.backend.exists(self.id)

    async def forget(self) -> None:
        """Remove the stored result of this task, and the stored results of its parents."""
        await forget_all([self])

    def leaves(self) -> Iterator[AsyncResult[Any]]:
        yield self

    def as_list(self) -> list[str]:
        """Return the ids of this result and of its parents, in that order."""
        return [self.id, *(parent.id for parent in parents_of(self) if parent.id is not None)]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, AsyncResult):
            return self.id == other.id and same_store(self._backend, other._backend)
        return self.id == other if isinstance(other, str) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.id}>"


class ResultSet(ResultBase):
    """Several results to wait for together. Awaiting it returns the list of their values, in order.

    It behaves like a list without duplicates. The value of a member that is a group is a nested list.
    """

    id: str | None = None
    parent: ResultBase | None = None

    def __init__(self, results: Iterable[ResultBase] = ()) -> None:
        self.results: list[ResultBase] = list(results)

    # -- waiting ----------------------------------------------------------------------------------------------------

    def __await__(self) -> Generator[Any, None, list[Any]]:
        return self.get().__await__()

    async def get(self, timeout: Timeout = None, propagate: bool = True) -> list[Any]:
        """Wait until all members are over, and return their values in order. Nested groups keep their shape.

        :param timeout: seconds for all members together; ``None`` for the ``default_timeout`` of the first member's
            backend, infinity for ever. 0 reads one time.
        :param propagate: raise the exception of the first member that fails, as soon as it does. With ``False``, wait
            for all members, and return exceptions in their places. If a parent of a member or of its group has failed,
            the member counts as failed with that parent's exception; see ``follow_parents`` of `AsyncResult.get`.
        :raises TimeoutError: some members were not over in time. For other errors see `AsyncResult.get`.
        """
        members = self._frozen()
        with Completions(Lineage[AsyncResult[Any]]([members]), timeout) as completions:
            async for finished in completions:
                for _, outcome in finished:
                    if propagate or isinstance(outcome, Exception):
                        raise_or_return(outcome)
        return members.value()

    def _frozen(self, nesting: int = 0) -> ResultSet:
        """Return a copy with the present members. A member that is added during a wait belongs to the next wait."""
        check_nesting(nesting)
        frozen = ResultSet(
            member._frozen(nesting + 1) if isinstance(member, ResultSet) else member for member in self.results
        )
        frozen.parent = self.parent
        return frozen

    async def join(self, timeout: Timeout = None, propagate: bool = True) -> list[Any]:
        """Do the same as `get`. Celery has both names."""
        return await self.get(timeout, propagate)

    async def as_completed(self, timeout: Timeout = None) -> AsyncGenerator[AsyncResult[Any], None]:
        """Yield the single results in the order in which they finish. Each one is ready: awaiting it does no I/O.

        It yields failed results, too; awaiting one raises its exception. It also yields a result whose parent failed:
        awaiting that result reads whether it has succeeded after all, and otherwise raises the parent's exception.

        Closing the iterator ends the subscriptions. `contextlib.aclosing` closes it as soon as you leave the loop.

        :raises TimeoutError: some results were not over ``timeout`` seconds after the first step.
        """
        with Completions(Lineage[AsyncResult[Any]]([self]), timeout) as completions:
            async for finished in completions:
                for leaf, _ in finished:
                    yield leaf

    def progress(self, interval: Seconds = 0.1) -> AsyncGenerator[GroupProgress, None]:
        """Yield how many members are over, now and whenever that changes: ``async for progress in group.progress()``.

        The last `GroupProgress` has ``done == total``. The exception of a task is counted, and not raised.

        :param interval: the least number of seconds between two items.
        """
        return progress_of(Lineage[AsyncResult[Any]]([self._frozen()]), interval, self.id)

    # -- looking, without waiting: one round trip per few hundred members -------------------------------------------

    async def _metas(self) -> list[TaskMeta]:
        leaves = list(self.leaves())
        await refresh(leaves)
        return [leaf.meta or TaskMeta.pending(leaf.id) for leaf in leaves]

    async def ready(self) -> bool:
        """True if all members are over: they succeeded, failed or were revoked."""
        return all(meta.ready for meta in await self._metas())

    async def waiting(self) -> bool:
        """True if any member is not over yet."""
        return not await self.ready()

    async def successful(self) -> bool:
        """True if all members have succeeded."""
        return all(meta.status == SUCCESS for meta in await self._metas())

    async def failed(self) -> bool:
        """True if any member has failed."""
        return any(meta.status == FAILURE for meta in await self._metas())

    async def completed_count(self) -> int:
        """Return how many members have succeeded. A nested group counts as one, if all its members have succeeded."""
        await self._metas()
        return sum(
            all(leaf.meta is not None and leaf.meta.status == SUCCESS for leaf in result.leaves())
            for result in self.results
        )

    async def children(self) -> list[ResultBase]:
        """Return the members."""
        return list(self.results)

    async def forget(self) -> None:
        """Remove the results of the members and of their parents, in few round trips."""
        await forget_all(self.leaves())

    def _members(self) -> Iterable[ResultBase] | None:
        return self.results

    def leaves(self) -> Iterator[AsyncResult[Any]]:
        path = [iter(self.results)]
        while path:
            for result in path[-1]:
                if isinstance(result, AsyncResult):
                    yield result
                elif isinstance(result, ResultSet):
                    check_nesting(len(path))
                    path.append(iter(result.results))
                    break
                else:
                    yield from result.leaves()
            else:
                path.pop()

    def value(self) -> list[Any]:
        return [result.value() for result in self.results]

    # -- the list ---------------------------------------------------------------------------------------------------

    def add(self, result: ResultBase) -> None:
        """Append a member. Does nothing if the set has it already."""
        if result not in self.results:
            self.results.append(result)

    def update(self, results: Iterable[ResultBase]) -> None:
        """Append each result that is not a member yet."""
        known = set(self.results)
        for result in results:
            if result not in known:
                known.add(result)
                self.results.append(result)

    def remove(self, result: ResultBase | str) -> None:
        """Remove a member, given as a handle or an id. Raises `KeyError` if it is not a member."""
        for index, member in enumerate(self.results):
            if member == result:
                del self.results[index]
                return
        raise KeyError(result)

    def discard(self, result: ResultBase | str) -> None:
        """Remove a member, given as a handle or an id. Does nothing if it is not a member."""
        if result in self.results:
            self.remove(result)

    def clear(self) -> None:
        """Remove all members from the set. Their stored results stay."""
        self.results.clear()

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[ResultBase]:
        return iter(self.results)

    def __getitem__(self, index: int) -> ResultBase:
        return self.results[index]

    def __eq__(self, other: object) -> bool:
        return self.results == other.results if isinstance(other, ResultSet) else NotImplemented

    def __hash__(self) -> int:
        raise TypeError(
            f"{type(self).__name__} has no id to hash: put its members, or a GroupResult, into sets. To await it "
            f"together with others, use aioresult.gather, or pass its get() to asyncio.gather"
        )

    def __repr__(self) -> str:
        name = type(self).__name__ if self.id is None else f"{type(self).__name__}: {self.id}"
        shown = ", ".join(str(result) for result in self.results[:5])
        return f"<{name} [{shown}{', …' if len(self.results) > 5 else ''}]>"


class GroupResult(ResultSet):
    """A `ResultSet` with an id. It can be saved under this id, and restored in another process."""

    id: str

    def __init__(
        self,
        id: str | UUID,
        results: Iterable[ResultBase] = (),
        parent: ResultBase | None = None,
        backend: ResultStore | None = None,
    ) -> None:
        super().__init__(results)
        self.id = checked_id(id)
        self.parent = parent
        self._backend = backend

    @classmethod
    def of(
        cls, results: Iterable[SupportsAsTuple | str | UUID], backend: ResultStore, id: str | UUID | None = None
    ) -> Self:
        """Make a group of results, given as handles or ids. If ``id`` is ``None``, the group gets a new id."""
        if isinstance(results, str):
            raise UsageError(f"pass several results or ids, not {results!r}; for a saved group, call restore_group")
        # Test for a str first: `isinstance` with an abstract class is slow if the answer is false.
        handles = (
            backend.result(item)
            if isinstance(item, str)
            else item
            if isinstance(item, ResultBase)
            else backend.handle_on(item)
            for item in results
        )
        return cls(id or str(uuid4()), handles, backend=backend)

    @property
    def backend(self) -> ResultStore:
        """The backend that saves the group: the one that it was made with, otherwise its first member's backend."""
        stores = (leaf.store for leaf in self.leaves())
        backend = self._backend or next((store for store in stores if store is not None), None)
        if backend is None:
            raise UsageError(f"{self!r} has no backend; pass one when you make it")
        return backend

    async def save(self) -> None:
        """Store the members of the group, so that any process can get them with `restore`."""
        await self.backend.save_group(self.id, self)

    @classmethod
    async def restore(cls, id: str | UUID, backend: ResultStore) -> GroupResult | None:
        """Read the group that was saved under ``id``; ``None`` if there is none."""
        return cast("GroupResult | None", await backend.restore_group(checked_id(id)))

    async def delete(self) -> None:
        """Remove the saved group. The results of its members stay."""
        await self.backend.delete_group(self.id)

    def _members_as_tuples(self, nesting: int) -> list[ResultTuple] | None:
        return [result._as_tuple(nesting + 1) for result in self.results]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, GroupResult):
            parents = ([parent.id for parent in parents_of(group)] for group in (self, other))
            same = self.id == other.id and same_store(self._backend, other._backend)
            return same and self.results == other.results and next(parents) == next(parents)
        return self.id == other if isinstance(other, str) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __str__(self) -> str:
        return self.id


def result_from_tuple(data: Any, backend: ResultStore | None) -> ResultBase:
    """Make a handle from ``data``, a tuple that comes from `ResultBase.as_tuple` or from Celery.

    :raises DecodeError: ``data`` is not such a tuple.
    :raises CyclicResultError: ``data`` refers to itself, or nests deeper than any real workflow.
    """
    return _Builder(backend).build(data, 0)


class _Builder:
    """Builds handles from result tuples in the store. Limits keep hostile data from making the work endless."""

    def __init__(self, backend: ResultStore | None) -> None:
        self._backend = backend
        self._nodes = 0

    def build(self, data: Any, nesting: int) -> ResultBase:
        check_nesting(nesting)
        chain: list[tuple[str, Any]] = []
        while data is not None:
            task_id, parent, members = unpack(data)
            chain.append((task_id, members))
            self._nodes += 1
            if len(chain) > _MAX_PARENTS or self._nodes > _MAX_NODES:
                raise CyclicResultError("the stored results refer to each other in a circle, or the chain is too long")
            data = parent
        result: ResultBase | None = None
        for task_id, members in reversed(chain):
            if members is None:
                result = AsyncResult[Any](task_id, self._backend, result)
            else:
                nested = [self.build(member, nesting + 1) for member in members]
                result = GroupResult(task_id, nested, result, self._backend)
        if result is None:
            raise DecodeError("the stored result tuple is empty")
        return result
