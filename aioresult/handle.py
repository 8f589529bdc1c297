"""Between handles and backends: what a handle needs of a backend, and what joins need of a handle."""

from __future__ import annotations

from collections.abc import Coroutine, Hashable, Iterable
from typing import Any, Protocol, TypeVar

from .meta import ResultTuple, SupportsAsTuple, TaskMeta
from .seconds import Timeout
from .waiter import Outcome, Waiter

__all__ = ["Leaf", "ResultStore", "is_over", "refresh"]

T = TypeVar("T")


class ResultStore(Protocol):
    """What result handles need of a backend (`aioresult.backends.base.Backend` is one)."""

    #: How many ids go into one round trip.
    fetch_chunk: int

    @property
    def store_id(self) -> Hashable:
        """Equal for objects that keep their results in the same place."""

    def check(self) -> None: ...
    def result(self, task_id: str) -> Any: ...
    def watch(self, task_id: str, waiter: Waiter, read_first: bool = True) -> None: ...
    def unwatch(self, task_id: str, waiter: Waiter) -> None: ...
    async def get_outcomes(self, task_ids: Iterable[str]) -> list[Outcome]: ...
    async def get_task_meta(self, task_id: str) -> TaskMeta: ...
    async def wait_for(self, task_id: str, timeout: Timeout = None) -> TaskMeta: ...
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
    """A handle on one task: `aioresult.result.AsyncResult`. Equal handles are of the same id in the same store."""

    #: The task stores no result: it is never waited for, and never fails.
    ignored: bool

    @property
    def id(self) -> str: ...
    @property
    def store(self) -> ResultStore | None:
        """Where it is kept; ``None`` if its meta is all there ever was."""

    @property
    def meta(self) -> TaskMeta | None:
        """The last meta of it, as it is stored."""

    @property
    def failure(self) -> TaskMeta | None:
        """The failure that `set_failure` was given."""

    @property
    def outcome(self) -> Outcome | None:
        """The last news of it: its own, unless a parent's failure stands in the place of that."""

    def set_outcome(self, outcome: Outcome) -> None:
        """Note the news."""

    def set_failure(self, failure: TaskMeta) -> None:
        """Note which failure awaiting it raises: its own, or a parent's. Only a success of its own changes that."""


def is_over(leaf: Leaf) -> bool:
    """Whether the leaf itself is known to be over, whatever became of its parents."""
    meta = leaf.meta
    return meta is not None and meta.ready


async def refresh(leaves: Iterable[Leaf]) -> None:
    """Have every leaf that is not known to be ready learn what is stored of it now, in one go per store.

    Raises what cannot be read, as `aioresult.backends.base.Backend.get_task_meta` does.
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
