"""`ResultBase`: what a single result and a group of them have in common, and the walk through the tree of results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator
from typing import Any, ClassVar
from uuid import UUID

from .exceptions import CyclicResultError, DecodeError, IncompleteStream, RemoteError, UsageError
from .handle import ResultStore
from .meta import ResultTuple
from .seconds import Timeout
from .tasks import twin
from .waiter import Outcome

__all__ = [
    "ResultBase",
    "check_nesting",
    "checked_id",
    "parents_of",
    "raise_or_return",
    "same_store",
    "unpack",
]

#: Deeper than anybody nests groups.
_MAX_NESTING = 100


class ResultBase(ABC):
    """What a single result and a group of them have in common."""

    __slots__ = ()
    #: Whether it is its own only leaf. Large joins ask this of every member.
    _single: ClassVar[bool] = False

    id: str | None
    #: The result that this one follows in a chain.
    parent: ResultBase | None

    @abstractmethod
    def leaves(self) -> Iterator[Any]:
        """The single results in it (`aioresult.AsyncResult`), in order."""

    @abstractmethod
    def value(self) -> Any:
        """The value, or the exception, as last seen: in the shape of the group. No I/O."""

    @abstractmethod
    def __await__(self) -> Generator[Any, None, Any]:
        """The same as `get` without arguments."""

    @abstractmethod
    async def get(self, timeout: Timeout = None, propagate: bool = True) -> Any:
        """Wait for it; see `AsyncResult.get` and `ResultSet.get`."""

    @abstractmethod
    async def ready(self) -> bool:
        """Whether all of it is over, well or not."""

    @abstractmethod
    async def children(self) -> list[ResultBase]:
        """The results of the tasks that this one started; the members of a group."""

    def as_tuple(self) -> ResultTuple:
        """As plain data, in Celery's form, its parents included; `result_from_tuple` is the way back.

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
        """The members of a group; ``None`` of what is none."""
        return None

    def _members_as_tuples(self, nesting: int) -> list[ResultTuple] | None:
        return None

    async def iterdeps(self, intermediate: bool = False) -> AsyncGenerator[tuple[ResultBase | None, ResultBase], None]:
        """Walk the tree of results below this one, breadth first, as ``(parent, node)``.

        :param intermediate: walk past nodes that are not ready, instead of raising `IncompleteStream`.
        :raises CyclicResultError: a task is among its own descendants.
        """
        async for step in self._walk(intermediate, {}):
            yield step

    async def _walk(
        self, intermediate: bool, graph: dict[ResultBase, list[ResultBase]]
    ) -> AsyncGenerator[tuple[ResultBase | None, ResultBase], None]:
        """`iterdeps`, which notes the children of each node in ``graph`` as it finds them."""
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
        """``(result, value)`` of this result and of all below it, each awaited in turn.

        ``timeout`` and ``propagate`` go to each `get`; for the rest see `iterdeps`.
        """
        async for _, node in self.iterdeps(intermediate):
            yield node, await node.get(timeout=timeout, propagate=propagate)

    async def get_leaf(self, timeout: Timeout = None) -> Any:
        """The value of the last result that `collect` finds: what a chain of tasks started by tasks came to."""
        value = None
        async for _, found in self.collect(timeout=timeout):
            value = found
        return value

    async def graph(self, intermediate: bool = False) -> dict[ResultBase, list[ResultBase]]:
        """The tree as a mapping of each result to its children; see `iterdeps`."""
        graph: dict[ResultBase, list[ResultBase]] = {}
        async for _ in self._walk(intermediate, graph):
            pass
        return graph


def check_nesting(nesting: int) -> None:
    if nesting > _MAX_NESTING:
        raise CyclicResultError(f"groups are nested more than {_MAX_NESTING} deep, or in a circle")


def parents_of(result: ResultBase) -> Iterator[ResultBase]:
    """The chain of parents, nearest first. Raises `CyclicResultError` if it closes into a circle."""
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
    """``(id, parent's tuple or None, members' tuples or None)``; Celery also writes a bare id for ``[id, None]``."""
    match data:
        case [[UUID() as task_id, parent], members]:
            return unpack([[str(task_id), parent], members])
        case [UUID() as task_id, members]:
            return unpack([str(task_id), members])
        case [[str(task_id), parent], None | list() | tuple() as members] if task_id:
            return task_id, parent or None, members
        case [str(task_id), None | list() | tuple() as members] if task_id:
            return task_id, None, members
    raise DecodeError("what is stored is not a result tuple [[id, parent], members]")


def checked_id(id: object) -> str:
    if isinstance(id, UUID):
        return str(id)
    if not isinstance(id, str):
        raise UsageError(f"an id must be a str or a UUID, not {type(id).__qualname__}")
    return id


def same_store(one: ResultStore | None, other: ResultStore | None) -> bool:
    return one is other or (one is not None and other is not None and one.store_id == other.store_id)


def raise_or_return(outcome: Outcome | None) -> Any:
    if isinstance(outcome, Exception):
        raise twin(outcome)
    if outcome is None:
        return None
    if outcome.propagates:
        error = outcome.with_new_exception().result
        if not isinstance(error, BaseException):  # only ever of an `EagerResult`
            raise RemoteError(error)
        # Of an `EagerResult` there is one instance; each raise starts with a traceback of its own.
        raise BaseException.with_traceback(error, None)
    return outcome.result
