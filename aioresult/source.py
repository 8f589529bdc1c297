"""`Source`: what the hub needs of a backend."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol, TypeAlias

from .waiter import Outcome

__all__ = ["Finding", "Source"]

#: What a read finds: ``(outcome, mark)``. Two outcomes with equal marks are the same state. A mark of ``None`` is
#: unknown, and never counts as equal.
Finding: TypeAlias = tuple[Outcome, Hashable]


class Source(Protocol):
    """The methods of a backend that the hub calls. Each method raises `BackendConnectionError` if a retry may help."""

    async def subscribe(self, task_ids: Sequence[str]) -> Mapping[str, Exception] | None:
        """Pass all later news of these ids to `Hub.receive`. Return when the server has confirmed the subscriptions.

        Connects the listener (the connection that carries messages), if it is not connected. Ids that are subscribed
        already are confirmed again. If the server refuses single ids, returns a mapping of these ids to their errors.
        The hub tries again later for an id whose error is a `BackendConnectionError`.
        """

    async def unsubscribe(self, task_ids: Sequence[str]) -> None:
        """End the subscriptions to these ids. Ids that are not subscribed are ignored."""

    async def read(self, task_ids: Sequence[str]) -> Sequence[Finding | None]:
        """Return the state of each id, in order. ``None``: nothing is stored. An error: the state cannot be read."""
