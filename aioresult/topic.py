"""`Topic`: what the hub knows of one id that has waiters."""

from __future__ import annotations

from collections.abc import Hashable

from .waiter import Outcome, Waiter

__all__ = ["Topic"]


class Topic:
    """The waiters of one id, and the state that they received. 100,000 topics may exist, most with a single waiter."""

    __slots__ = ("_more", "heard", "known", "looks", "mark", "newcomers", "queued", "sole", "subscribed")

    def __init__(self, waiter: Waiter) -> None:
        #: The waiter, as long as the topic has had only one.
        self.sole: Waiter | None = waiter
        #: All waiters, if the topic has had several: ``{id(waiter): waiter}``, so that removing one is fast.
        self._more: dict[int, Waiter] | None = None
        #: True if the hub has asked for a subscription. The hub must end it when the last waiter leaves.
        self.subscribed: bool = False
        #: The last state that the waiters received, and its mark.
        self.known: Outcome | None = None
        self.mark: Hashable = None
        #: Waiters that joined after that state was delivered, and have not received it yet.
        self.newcomers: list[Waiter] | None = None
        #: The number of messages for this topic. If one arrives during a read, the read may find an older state.
        self.heard: int = 0
        #: The number of news items in delivery. A topic with many waiters delivers to some of them at a time.
        self.queued: int = 0
        #: How many times a check of `Unheard` has found that nothing is stored under the id.
        self.looks: int = 0

    def __len__(self) -> int:
        return len(self._more) if self._more is not None else int(self.sole is not None)

    def __contains__(self, waiter: Waiter) -> bool:
        return self.sole is waiter if self._more is None else id(waiter) in self._more

    def add(self, waiter: Waiter) -> None:
        """Add a waiter. A waiter that is present already keeps its place."""
        if self._more is None:
            self._more = {} if self.sole is None else {id(self.sole): self.sole}
            self.sole = None
        self._more[id(waiter)] = waiter

    def discard(self, waiter: Waiter) -> bool:
        """Remove a waiter. Returns true if it was present."""
        if self._more is not None:
            return self._more.pop(id(waiter), None) is not None
        found = self.sole is waiter
        if found:
            self.sole = None
        return found

    def waiters(self) -> tuple[Waiter, ...]:
        """Return a copy of the present waiters, in order of arrival."""
        if self._more is not None:
            return tuple(self._more.values())
        return () if self.sole is None else (self.sole,)
