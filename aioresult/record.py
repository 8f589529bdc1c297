"""`Record`: one result that is about to be stored."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Record"]


class Record(NamedTuple):
    """One state of a task to store, as `Backend._store` gets it."""

    task_id: str
    #: The encoded meta (the state and the result of the task), as `Backend._encode` has returned it.
    payload: Any
    #: Seconds that the record lives; 0 for ever.
    expires: float
    #: True to store the record only if nothing is stored under the id.
    only_new: bool = False
    #: The id of the saved group that must live at least as long as the record.
    group_id: str | None = None
    #: True if the task defines the state itself, such as PROGRESS. Such a state must not replace a final state.
    custom: bool = False
    #: For a final state of a member of the group: its index in the group, and whether it failed. `GroupProgress` counts
    #: them.
    group_index: int | None = None
    failed: bool = False
