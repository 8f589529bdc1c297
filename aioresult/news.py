"""`News`: what a handle knows of its task, and which failure stands for it."""

from __future__ import annotations

from typing import Any, NamedTuple

from .meta import TaskMeta
from .states import IGNORED, SUCCESS
from .tasks import twin
from .tree import ResultBase
from .waiter import Outcome

__all__ = ["News", "value_of"]


class _Failed(NamedTuple):
    """What a handle knows of a failed result after its parents were looked at."""

    #: Its own news.
    own: Outcome | None
    #: The failure that awaiting it raises: its own, or that of a parent, for which it never ran.
    failure: TaskMeta


class News(ResultBase):
    """The part of `aioresult.AsyncResult` that remembers. No I/O."""

    __slots__ = ("_outcome", "id", "ignored")
    id: str

    def __init__(self, id: str, ignored: bool) -> None:
        self.id = id
        #: The task stores no result (Celery: ``ignore_result``): awaiting gives ``None`` at once.
        self.ignored: bool = ignored
        # One attribute for all: there may be a hundred thousand handles, nearly all without parents.
        self._outcome: Outcome | _Failed | None = None

    @property
    def meta(self) -> TaskMeta | None:
        """The meta as last seen. No I/O: ``None`` until something looked."""
        own = self._own()
        return own if isinstance(own, TaskMeta) else None

    def _own(self) -> Outcome | None:
        return self._outcome.own if isinstance(self._outcome, _Failed) else self._outcome

    def _known(self) -> bool:
        own = self._own()
        return isinstance(own, TaskMeta) and own.ready

    @property
    def outcome(self) -> Outcome | None:
        """The last news: a meta, or why it could not be had; of an ignored result there is no more than its state.

        If a wait found that a parent had failed, that is the parent's meta, until this task itself succeeds.
        """
        if isinstance(self._outcome, _Failed):
            return self._outcome.failure
        return TaskMeta(self.id, IGNORED) if self.ignored and not self._known() else self._outcome

    @property
    def failure(self) -> TaskMeta | None:
        """The failure that awaiting it raises, once a wait has looked at its parents, too."""
        return self._outcome.failure if isinstance(self._outcome, _Failed) else None

    def set_outcome(self, outcome: Outcome) -> None:
        """Note the news; for a join.

        What a read brings may be older than what a message has brought meanwhile: nothing comes after the end.
        """
        kept = self._outcome
        if isinstance(kept, _Failed):
            if not self._known():
                succeeded = isinstance(outcome, TaskMeta) and outcome.status == SUCCESS
                self._outcome = outcome if succeeded else _Failed(outcome, kept.failure)
        elif kept is None or not self._known():
            self._outcome = outcome

    def set_failure(self, failure: TaskMeta) -> None:
        """Note which failure awaiting it raises; for a join."""
        self._outcome = _Failed(self._own(), failure)

    def value(self) -> Any:
        return value_of(self._outcome.failure if isinstance(self._outcome, _Failed) else self._outcome)


def value_of(outcome: Outcome | None) -> Any:
    """The value or the exception that ``outcome`` carries. Raises it if the result could not be had."""
    if isinstance(outcome, Exception):
        raise twin(outcome)
    return None if outcome is None else outcome.with_new_exception().result
