"""Makes handles of aioresult from Celery's result objects. It does not import Celery.

Where a function takes Celery's results, it also takes handles of aioresult.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any
from uuid import UUID, uuid4

from .eager import EagerResult
from .exceptions import UsageError
from .handle import ResultStore
from .meta import SupportsAsTuple
from .remedies import kind_of, not_an_id
from .result import AsyncResult, GroupResult, ResultBase, ResultSet
from .tree import check_nesting, parents_of

__all__ = ["from_celery", "group_of", "is_celerys", "not_a_handle", "single"]


def is_celerys(value: object, *names: str, module: str = "celery.result") -> bool:
    """True if ``value`` is an instance of one of the classes ``names`` in Celery's ``module``.

    Without ``names``: true if ``value`` is any result object of Celery. Such a value can exist only if the process has
    imported Celery, so there is no need to import Celery here.
    """
    classes = sys.modules.get(module)
    return classes is not None and isinstance(value, tuple(getattr(classes, name) for name in names or ("ResultBase",)))


def not_a_handle(value: object) -> str:
    """Return the text of an error. It says that ``value`` is not a handle, and how to make a handle."""
    make = "group" if is_celerys(value, "ResultSet") else "result"
    given = "it" if is_celerys(value) else "task_id"
    return f"{kind_of(value)} is not a handle of aioresult; make one with backend.{make}({given})"


def single(given: object, backend: ResultStore, parent: ResultBase | None = None) -> AsyncResult[Any]:
    """Return the handle for ``given``, a single result of Celery. A handle of aioresult is returned unchanged.

    ``parent`` must be ``None``, because ``given`` has its own parent.

    :raises UsageError: ``given`` is not a result, or is a group, or is a handle of another backend, or ``parent`` is
        given.
    """
    ours = isinstance(given, ResultBase)
    if not ours and not is_celerys(given):
        raise UsageError(not_an_id(given))
    if isinstance(given, ResultSet) or is_celerys(given, "ResultSet"):
        raise UsageError(f"{kind_of(given)} is a group; pass it to backend.group()")
    if parent is not None:
        raise UsageError(f"{kind_of(given)} has a parent of its own; to set another, pass its id and the parent")
    if not ours:
        given = from_celery(given, backend)
    if not isinstance(given, AsyncResult) or (given.store is not None and given.store is not backend):
        raise UsageError(f"{given!r} is a handle of another backend; pass its id")
    return given


def group_of(
    results: Iterable[SupportsAsTuple | str | UUID] | SupportsAsTuple,
    backend: ResultStore,
    id: str | UUID | None = None,
) -> GroupResult:
    """Return the handle for a group.

    ``results`` are its members: handles, results of Celery, or task ids. Or ``results`` is a group of Celery. ``id`` is
    the id of the new group; by default, it is that of Celery's group or a new one.
    """
    if is_celerys(results):
        group = from_celery(results, backend)
        if isinstance(group, ResultSet):
            return GroupResult(id or group.id or str(uuid4()), group.results, group.parent, backend)
    if not isinstance(results, Iterable):
        raise UsageError(f"pass several results or ids, not {kind_of(results)}: a list, a generator, …")
    return GroupResult.of(results, backend, id)


def from_celery(result: Any, backend: ResultStore, nesting: int = 0) -> ResultBase:
    """Return the handle for ``result``, a result of Celery, with its parents and members.

    ``nesting`` is the number of groups around ``result``.

    :raises UsageError: a parent or a member is not a result of Celery. For instance, a test may use a mock of a result:
        its parent is a mock, too, and so is the parent of that mock, without end.
    """
    check_nesting(nesting)
    above: ResultBase | None = None
    parents = [_checked(each) for each in parents_of(result)]
    for each in reversed(parents):  # a loop, because a chain may be too long for recursion
        above = _handle(each, above, backend, nesting)
    return _handle(_checked(result), above, backend, nesting)


def _checked(result: Any) -> Any:
    if not (is_celerys(result) or isinstance(result, ResultBase)):
        raise UsageError(f"a parent or a member is {kind_of(result)}, and not a result of Celery's; pass the id alone")
    return result


def _handle(result: Any, parent: ResultBase | None, backend: ResultStore, nesting: int) -> ResultBase:
    if is_celerys(result, "ResultSet"):
        members = [from_celery(member, backend, nesting + 1) for member in result.results]
        group_id = getattr(result, "id", None)
        return ResultSet(members) if group_id is None else GroupResult(group_id, members, parent, backend)
    if is_celerys(result, "EagerResult"):
        eager = EagerResult[Any](result.id, result.result, result.state, result.traceback)
        eager.parent = parent
        return eager
    return AsyncResult[Any](result.id, backend, parent, ignored=bool(result.ignored))
