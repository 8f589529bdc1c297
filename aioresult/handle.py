"""The protocols between handles (results of tasks) and backends.

`ResultStore` lists what a handle uses of a backend. `Leaf` lists what a join, such as `gather`, uses of a handle.
"""

from __future__ import annotations

from collections.abc import Coroutine, Hashable, Iterable
from typing import Any, Protocol, TypeVar

from .meta import ResultTuple, SupportsAsTuple, TaskMeta
from .seconds import Timeout
from .waiter import Outcome, Waiter

__all__ = ["Leaf", "ResultStore", "is_over", "refresh"]

T = TypeVar("T")


class ResultStore(Protocol):
    """The attributes and methods of a backend that handles use. `aioresult.backends.base.Backend` implements them."""

    #: The maximum number of ids in one round trip.
    fetch_chunk: int

    @property
    def default_timeout(self) -> float | None:
        """The timeout, in seconds, of a wait for which the caller passes no timeout. ``None`` waits for ever."""

    @property
    def store_id(self) -> Hashable:
        """A value that is equal for two backends if they keep their results in the same place."""

    def check(self) -> None: ...
    def result(self, task_id: str) -> Any: ...
    def handle_on(self, item: object) -> Any: ...
    def watch(self, task_id: str, waiter: Waiter, read_first: bool = True) -> None: ...
    def unwatch(self, task_id: str, waiter: Waiter) -> None: ...
    async def get_outcomes(self, task_ids: Iterable[str]) -> list[Outcome]: ...
    async def read_reachable(self, task_ids: Iterable[str]) -> list[Outcome | None]: ...
    def spans_shards(self, task_ids: Iterable[str]) -> bool: ...
    async def get_task_meta(self, task_id: str) -> TaskMeta: ...
    async def wait_for(self, task_id: str, timeout: Timeout = None, must_exist: bool = False) -> TaskMeta: ...
    async def unless_lost(self, task_id: str, waiting: Coroutine[Any, Any, T]) -> T: ...
    def updates(self, task_id: str, on_lost: str) -> Any: ...
    def stream(self, task_id: str, after: str | None, on_lost: str, on_restart: str, on_gap: str) -> Any: ...
    async def read_output(self, task_id: str, after: str | None, limit: int, wait: float) -> Any: ...
    async def revoke(self, task_id: str, reason: str) -> bool: ...
    async def exists(self, task_id: str) -> bool: ...
    async def forget_many(self, task_ids: Iterable[str]) -> None: ...
    async def save_group(self, group_id: str, group: SupportsAsTuple | ResultTuple) -> None: ...
    async def restore_group(self, group_id: str) -> Any: ...
    async def delete_group(self, group_id: str) -> None: ...
    async def group_size(self, group_id: str) -> int | None: ...
    async def group_counts(self, group_id: str) -> Any: ...
    def watch_topic(self, topic: str, waiter: Waiter, read_first: bool = True) -> None: ...


class Leaf(Protocol):
    """A handle on one task; `aioresult.result.AsyncResult` implements it.

    Two handles are equal if they have the same task id and the same store (backend).
    """

    #: True if the task stores no result. Such a task has no waiters, and never counts as failed.
    ignored: bool

    @property
    def id(self) -> str: ...
    @property
    def store(self) -> ResultStore | None:
        """The backend of the result; ``None`` if the handle was made with its outcome, and nothing is stored."""

    @property
    def meta(self) -> TaskMeta | None:
        """The last known meta of the task itself, as it is stored; ``None`` if it was never read."""

    @property
    def failure(self) -> TaskMeta | None:
        """The failure that was last passed to `set_failure`; ``None`` if there was none."""

    @property
    def outcome(self) -> Outcome | None:
        """The last known outcome of the task. If a parent failed, it is the failure of that parent."""

    def set_outcome(self, outcome: Outcome) -> None:
        """Record the last known outcome of the task itself."""

    def set_failure(self, failure: TaskMeta) -> None:
        """Record the failure that awaiting the handle raises: the task's own failure, or that of a parent.

        If the task later turns out to have succeeded, that success replaces the failure.
        """


def is_over(leaf: Leaf) -> bool:
    """True if the task itself is known to be over. Failures of its parents do not matter here."""
    meta = leaf.meta
    return meta is not None and meta.ready


async def refresh(leaves: Iterable[Leaf]) -> None:
    """Read the result of every leaf (single handle) that is not known to be ready, in one call per backend.

    The leaves then know their outcomes. Raises the same errors as `aioresult.backends.base.Backend.get_task_meta`.
    """
    by_store: dict[ResultStore, list[Leaf]] = {}
    for leaf in leaves:
        if leaf.store is not None and not is_over(leaf):
            by_store.setdefault(leaf.store, []).append(leaf)
    for store, unknown in by_store.items():
        outcomes = await store.get_outcomes([leaf.id for leaf in unknown])
        for leaf, outcome in zip(unknown, outcomes, strict=True):
            leaf.set_outcome(outcome)
            if isinstance(outcome, Exception):
                raise outcome
