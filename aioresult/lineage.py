"""`Lineage`: finds the ancestors of the results that a join waits for. `gather`, for instance, is a join.

The ancestors of a result are its parents (the earlier tasks of its chain), and the parents of the groups that contain
it. A task whose parent failed or was revoked never runs. So a join must know which results depend on a result that
failed. It must also know which failure came first if several results failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Generic, TypeVar, cast

from .handle import Leaf
from .meta import TaskMeta
from .tree import ResultBase, check_nesting, parents_of

__all__ = ["Ancestor", "Lineage"]

L = TypeVar("L", bound=Leaf)

_LAST = datetime.max.replace(tzinfo=UTC)


class Ancestor(Generic[L]):
    """A single result that other results depend on. Equal handles share one ancestor."""

    __slots__ = ("above", "handle", "opens")

    def __init__(self, handle: L) -> None:
        self.handle: L = handle
        #: Its own parents, the topmost first. A dict serves as an ordered set, here and below.
        self.above: dict[_Gate[L], None] = {}
        #: The gates (parents of other results) that it is part of: it is that parent itself, or a member of that group.
        self.opens: dict[_Gate[L], None] = {}

    def set_outcome(self, outcome: TaskMeta | Exception) -> None:
        self.handle.set_outcome(outcome)

    @property
    def failure(self) -> TaskMeta | None:
        """The meta of the result, if the result is known to have failed. Otherwise ``None``.

        A result that cannot be read does not count as failed.
        """
        known = None if self.handle.ignored else self.handle.outcome
        return known if isinstance(known, TaskMeta) and known.propagates else None


class _Gate(Generic[L]):
    """A parent of other results: a single result or a group. Those results' tasks run only if all of it succeeds."""

    __slots__ = ("below", "of", "shut")

    def __init__(self) -> None:
        #: The single results of the parent: itself, or the members of the group.
        self.of: dict[Ancestor[L], None] = {}
        #: The results that have this parent.
        self.below: list[L | Ancestor[L]] = []
        #: True if a result of the parent has failed, and `Lineage.below` has yielded the leaves that depend on it.
        self.shut = False


class Lineage(Generic[L]):
    """The `leaves` (single results) of some results, in order, and the `ancestors` of those leaves.

    A leaf without parents costs nothing here. Each other handle is visited only once. Each ancestor is stored only
    once, even if very many leaves depend on it. Raises `CyclicResultError` if a result is its own parent.
    """

    def __init__(self, results: Iterable[ResultBase] = ()) -> None:
        self.leaves: list[L] = []
        self.ancestors: dict[L, Ancestor[L]] = {}
        #: ``id(leaf)`` → the leaf's parents, if it has any. Equal leaves may have different parents, so the key is not
        #: the leaf.
        self._above: dict[int, tuple[_Gate[L], ...]] = {}
        self._gates: dict[object, _Gate[L]] = {}
        #: The parents that were visited: ``{id(parent): parent}``.
        self._met: dict[int, ResultBase] = {}
        #: The visited parents whose own members are not visited yet.
        self._fresh: list[tuple[_Gate[L], ResultBase]] = []
        #: The return values of `_line`, by its argument.
        self._lines: dict[tuple[_Gate[L], ...], list[Ancestor[L]]] = {}
        self.add(results)

    def add(self, results: Iterable[ResultBase]) -> list[L]:
        """Add results, and return their leaves (single results)."""
        before = len(self.leaves)
        self._descend(results, (), self._add_leaf, 0)
        while self._fresh:
            gate, parent = self._fresh.pop()

            def add_ancestor(leaf: L, above: tuple[_Gate[L], ...], gate: _Gate[L] = gate) -> None:
                self._add_ancestor(leaf, above, gate)

            self._descend((parent,), (), add_ancestor, 0)
        return self.leaves[before:]

    def _descend(
        self,
        results: Iterable[ResultBase],
        above: tuple[_Gate[L], ...],
        take: Callable[[L, tuple[_Gate[L], ...]], None],
        nesting: int,
    ) -> None:
        check_nesting(nesting)
        for result in results:
            here = above if result.parent is None else (*above, self._gate_above(result))
            if result._single:
                take(cast("L", result), here)
            elif (members := result._members()) is not None:
                self._descend(members, here, take, nesting + 1)
            else:
                for leaf in result.leaves():
                    take(leaf, here)

    def _add_leaf(self, leaf: L, above: tuple[_Gate[L], ...]) -> None:
        self.leaves.append(leaf)
        if above:
            known = self._above.get(id(leaf), ())
            self._above[id(leaf)] = known + tuple(gate for gate in above if gate not in known)
            for gate in above:
                gate.below.append(leaf)

    def _add_ancestor(self, leaf: L, above: tuple[_Gate[L], ...], gate: _Gate[L]) -> None:
        ancestor = self.ancestors.get(leaf)
        if ancestor is None:
            ancestor = self.ancestors[leaf] = Ancestor(leaf)
        ancestor.opens[gate] = None
        gate.of[ancestor] = None
        for upper in above:
            if upper not in ancestor.above:
                ancestor.above[upper] = None
                upper.below.append(ancestor)

    def _gate_above(self, result: ResultBase) -> _Gate[L]:
        for parent in parents_of(result):
            if id(parent) in self._met:
                break
            self._met[id(parent)] = parent
            self._fresh.append((self._gate(parent), parent))
        return self._gate(cast("ResultBase", result.parent))

    def _gate(self, parent: ResultBase) -> _Gate[L]:
        # If a group was read from the backend, each member has its own copy of its parent. Equal copies are one parent.
        key: object = id(parent) if parent.id is None else parent
        gate = self._gates.get(key)
        if gate is None:
            gate = self._gates[key] = _Gate()
        return gate

    def has_parents(self, leaf: L) -> bool:
        """True if the leaf has ancestors."""
        return id(leaf) in self._above

    def above(self, leaves: Iterable[L]) -> Iterable[Ancestor[L]]:
        """Return the ancestors of these leaves, without repetition."""
        if not self._above:
            return ()
        lines = dict.fromkeys(self._above[id(leaf)] for leaf in leaves if id(leaf) in self._above)
        return dict.fromkeys(ancestor for gates in lines for ancestor in self._line(gates))

    def below(self, ancestor: Ancestor[L]) -> Iterator[L]:
        """Yield the leaves that depend on ``ancestor``, except those that an earlier call has yielded.

        A call may yield the same leaf several times.
        """
        stack: list[L | Ancestor[L]] = [ancestor]
        while stack:
            each = stack.pop()
            if not isinstance(each, Ancestor):
                yield each
                continue
            for gate in each.opens:
                if not gate.shut:
                    gate.shut = True
                    stack += gate.below

    def causes(self, leaves: Iterable[L]) -> Iterator[TaskMeta | None]:
        """Yield, for each leaf, the first known failure among its ancestors, or ``None``.

        The first failure has the earliest `TaskMeta.date_done`. If dates are equal or missing, the order in which
        Celery looks for failures decides: from the first task of a chain on, and in the order of a group's members.
        """
        found: dict[tuple[_Gate[L], ...], TaskMeta | None] = {(): None}
        for leaf in leaves:
            gates = self._above.get(id(leaf), ())
            if gates not in found:
                failures = (ancestor.failure for ancestor in self._line(gates))
                found[gates] = min((each for each in failures if each is not None), key=_moment, default=None)
            yield found[gates]

    def _line(self, gates: tuple[_Gate[L], ...]) -> list[Ancestor[L]]:
        """Return all ancestors in these gates (parents) and above them, in the order in which Celery looks at them."""
        if (known := self._lines.get(gates)) is not None:
            return known
        line: dict[Ancestor[L], None] = {}
        entered: set[Ancestor[L]] = set()
        stack = _reversed(gates)
        while stack:
            ancestor = stack[-1]
            if ancestor in entered:
                line.setdefault(stack.pop())
            else:
                entered.add(ancestor)
                stack += (each for each in _reversed(ancestor.above) if each not in entered)
        self._lines[gates] = list(line)
        return self._lines[gates]


def _reversed(gates: Iterable[_Gate[L]]) -> list[Ancestor[L]]:
    return [ancestor for gate in gates for ancestor in gate.of][::-1]


def _moment(failure: TaskMeta) -> datetime:
    done = failure.date_done or _LAST
    return done if done.tzinfo is not None else done.replace(tzinfo=UTC)
