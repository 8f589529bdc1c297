"""`Record`: one result on its way into a store."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Record"]


class Record(NamedTuple):
    """One store, as `Backend._store` gets it."""

    task_id: str
    #: What `Backend._encode` made of its meta.
    payload: Any
    #: Seconds to live; 0 for ever.
    expires: float
    #: Store only if nothing is stored under the id.
    only_new: bool = False
    #: The group that must live at least as long.
    group_id: str | None = None
    #: The state is one of the task's own making, such as PROGRESS: it must not take the place of a final one.
    custom: bool = False
    #: Of a final state: the place of the task in that group, and whether it failed; for `GroupProgress`.
    group_index: int | None = None
    failed: bool = False
