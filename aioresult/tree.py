"""`ResultBase`: the base of single results and of groups of results, and the walk through the tree of results."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator
from inspect import getattr_static
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID

from .exceptions import CyclicResultError, DecodeError, IncompleteStream, RemoteError, UsageError
from .handle import ResultStore
from .hub import chunked
from .meta import ResultTuple
from .remedies import INSTEAD, Missing, not_an_id
from .seconds import Timeout
from .tasks import copy_of_error
from .waiter import Outcome

__all__ = [
    "ResultBase",
    "check_nesting",
    "checked_id",
    "forget_all",
    "parents_of",
    "raise_or_return",
    "same_store",
    "unpack",
]

#: The deepest nesting of groups that is accepted. Real groups are never nested as deep as that.
_MAX_NESTING = 100
#: How many results are removed from the store together, before the event loop gets a turn.
_FORGOTTEN_TOGETHER = 2_000


class ResultBase(ABC):
    """The base of single results and of groups of results."""

    __slots__ = ()
    #: True if this is a single result, and not a set of results. A class attribute, because joins read it for every
    #: member, and a method would be slower.
    _single: ClassVar[bool] = False

    id: str | None
    #: The result of the task before this one in a chain; ``None`` if there is none.
    parent: ResultBase | None

    def __dir__(self) -> Iterable[str]:
        return [name for name in super().__dir__() if not isinstance(getattr_static(self, name, None), Missing)]

    @abstractmethod
    def leaves(self) -> Iterator[Any]:
        """Iterate over the leaves of this result, in order. A leaf is a single result, an `aioresult.AsyncResult`."""

    @abstractmethod
    def value(self) -> Any:
        """Return the last known value or exception; for a group, a list in the shape of the group. No I/O."""

    @abstractmethod
    def __await__(self) -> Generator[Any, None, Any]:
        """Do the same as `get` without arguments."""

    @abstractmethod
    async def get(self, timeout: Timeout = None, propagate: bool = True) -> Any:
        """Wait for the result and return its value; see `AsyncResult.get` and `ResultSet.get`."""

    @abstractmethod
    async def ready(self) -> bool:
        """True if all tasks in this result are over: they succeeded, failed or were revoked."""

    @abstractmethod
    async def children(self) -> list[ResultBase]:
        """Return the results of the tasks that this task started; for a group, its members."""

    def as_tuple(self) -> ResultTuple:
        """Return the result and its parents as plain data, in Celery's form. `result_from_tuple` reads it back.

        :raises CyclicResultError: a result is its own parent, or a group is among its own members.
        """
        return self._as_tuple(0)

    def _as_tuple(self, nesting: int) -> ResultTuple:
        check_nesting(nesting)
        above: ResultTuple | None = None
        for node in reversed(list(parents_of(self))):
            above = (node.id, above), node._members_as_tuples(nesting)
        return (self.id, above), self._members_as_tuples(nesting)

    def _members(self) -> Iterable[ResultBase] | None:
        """Return the members if this is a group, otherwise ``None``."""
        return None

    def _members_as_tuples(self, nesting: int) -> list[ResultTuple] | None:
        return None

    async def iterdeps(self, intermediate: bool = False) -> AsyncGenerator[tuple[ResultBase | None, ResultBase], None]:
        """Walk the tree of results below this one, breadth first, as ``(parent, node)``.

        Below a result are the results of the tasks that it started, and the members of a group.

        :param intermediate: walk past nodes that are not ready, instead of raising `IncompleteStream`.
        :raises CyclicResultError: a task is among its own descendants.
        """
        async for step in self._walk(intermediate, {}):
            yield step

    async def _walk(
        self, intermediate: bool, graph: dict[ResultBase, list[ResultBase]]
    ) -> AsyncGenerator[tuple[ResultBase | None, ResultBase], None]:
        """Yield the steps of `iterdeps`. Adds the children of each node to ``graph`` when it finds them."""
        came_from: dict[ResultBase, ResultBase | None] = {self: None}
        layer: list[tuple[ResultBase | None, ResultBase]] = [(None, self)]
        while layer:
            below: list[tuple[ResultBase | None, ResultBase]] = []
            for parent, node in layer:
                yield parent, node
                graph[node] = []
                if not await node.ready():
                    if intermediate:
                        continue
                    raise IncompleteStream(f"{node!r} is not ready; pass intermediate=True to walk past it")
                graph[node] = await node.children()
                for child in graph[node]:
                    if child not in came_from:
                        came_from[child] = node
                        below.append((node, child))
                    elif child in _lineage(node, came_from):
                        raise CyclicResultError(f"{child!r} is among its own descendants")
            layer = below

    async def collect(
        self, timeout: Timeout = None, propagate: bool = True, intermediate: bool = False
    ) -> AsyncGenerator[tuple[ResultBase, Any], None]:
        """Await this result and, in turn, all results below it, and yield each as ``(result, value)``.

        ``timeout`` (in seconds) and ``propagate`` are passed to each `get`. For ``intermediate`` and the errors see
        `iterdeps`.
        """
        async for _, node in self.iterdeps(intermediate):
            yield node, await node.get(timeout=timeout, propagate=propagate)

    async def get_leaf(self, timeout: Timeout = None) -> Any:
        """Return the value of the last result that `collect` finds: the final value, if each task starts the next one.

        ``timeout`` is in seconds, and applies to each result separately.
        """
        value = None
        async for _, found in self.collect(timeout=timeout):
            value = found
        return value

    async def graph(self, intermediate: bool = False) -> dict[ResultBase, list[ResultBase]]:
        """Return the tree of results, as a mapping of each result to its children; see `iterdeps`."""
        graph: dict[ResultBase, list[ResultBase]] = {}
        async for _ in self._walk(intermediate, graph):
            pass
        return graph


if not TYPE_CHECKING:  # type checkers must still report these attributes as missing
    for _name, _remedy in INSTEAD.items():
        setattr(ResultBase, _name, Missing(_name, _remedy))


def check_nesting(nesting: int) -> None:
    if nesting > _MAX_NESTING:
        raise CyclicResultError(f"groups are nested more than {_MAX_NESTING} deep, or a group contains itself")


def parents_of(result: ResultBase) -> Iterator[ResultBase]:
    """Yield the parents of ``result``, nearest first. Raises `CyclicResultError` if a result is its own parent."""
    seen = {id(result)}
    node = result.parent
    while node is not None:
        if id(node) in seen:
            raise CyclicResultError(f"{node!r} is its own parent")
        seen.add(id(node))
        yield node
        node = node.parent


def _lineage(node: ResultBase, came_from: dict[ResultBase, ResultBase | None]) -> Iterator[ResultBase]:
    ancestor: ResultBase | None = node
    while ancestor is not None:
        yield ancestor
        ancestor = came_from[ancestor]


def unpack(data: Any) -> tuple[str, Any, Any]:
    """Split the result tuple ``data`` into ``(id, parent, members)``.

    A result tuple is ``[[id, parent], members]``. Here ``parent`` is the result tuple of the parent, or ``None``.
    ``members`` is a list of result tuples if the result is a group, otherwise ``None``. For a result without a parent,
    Celery also writes ``[id, members]``.
    """
    match data:
        case [[UUID() as task_id, parent], members]:
            return unpack([[str(task_id), parent], members])
        case [UUID() as task_id, members]:
            return unpack([str(task_id), members])
        case [[str(task_id), parent], None | list() | tuple() as members] if task_id:
            return task_id, parent or None, members
        case [str(task_id), None | list() | tuple() as members] if task_id:
            return task_id, None, members
    raise DecodeError("the stored data is not a result tuple [[id, parent], members]")


def checked_id(id: object) -> str:
    if isinstance(id, UUID):
        return str(id)
    if not isinstance(id, str):
        raise UsageError(not_an_id(id))
    return id


async def forget_all(leaves: Iterable[Any]) -> None:
    """Remove the stored results of ``leaves`` and of their parents, and clear what the handles remember."""
    for some in chunked(leaves, _FORGOTTEN_TOGETHER):
        by_store: dict[ResultStore, dict[str, None]] = {}
        for leaf in some:
            for each in (leaf, *(above for parent in parents_of(leaf) for above in parent.leaves())):
                if each.store is not None:
                    each._outcome = None
                    by_store.setdefault(each.store, {})[each.id] = None
        await asyncio.gather(*(store.forget_many(ids) for store, ids in by_store.items()))


def same_store(one: ResultStore | None, other: ResultStore | None) -> bool:
    return one is other or (one is not None and other is not None and one.store_id == other.store_id)


def raise_or_return(outcome: Outcome | None) -> Any:
    if isinstance(outcome, Exception):
        raise copy_of_error(outcome)
    if outcome is None:
        return None
    if outcome.propagates:
        error = outcome.with_new_exception().result
        if not isinstance(error, BaseException):  # only an `EagerResult` can hold such a value
            raise RemoteError(error)
        # An `EagerResult` raises the same instance every time; each raise must start without the old traceback.
        raise BaseException.with_traceback(error, None)
    return outcome.result
