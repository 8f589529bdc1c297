"""`Record`: one result that is about to be stored."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Record"]


class Record(NamedTuple):
    """One state of a task to store, as `Backend._store` gets it."""

    task_id: str
    #: The encoded meta, which `Backend._encode` has returned.
    payload: Any
    #: Seconds that the record lives; 0 for ever.
    expires: float
    #: Store it only if nothing is stored under the id.
    only_new: bool = False
    #: The saved group that must live at least as long as the record.
    group_id: str | None = None
    #: Whether the state is one that the task defines, such as PROGRESS. It must not replace a final state.
    custom: bool = False
    #: For a final state: the index of the task in that group, and whether the task failed; for `GroupProgress`.
    group_index: int | None = None
    failed: bool = False
