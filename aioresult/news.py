"""`News`: what a handle (an `aioresult.AsyncResult`) knows of its task, and which failure awaiting it raises."""

from __future__ import annotations

from typing import Any, NamedTuple

from .meta import TaskMeta
from .states import IGNORED, SUCCESS
from .tasks import copy_of_error
from .tree import ResultBase
from .waiter import Outcome

__all__ = ["News", "value_of"]


class _Failed(NamedTuple):
    """The state of a handle on a failed result, once a wait has also checked the parents of the result."""

    #: The outcome of the task itself.
    own: Outcome | None
    #: The failure that awaiting the result raises: that of the task itself, or that of a parent. A task never runs if a
    #: parent has failed.
    failure: TaskMeta


class News(ResultBase):
    """The part of `aioresult.AsyncResult` that remembers the outcome of the task. No I/O."""

    __slots__ = ("_outcome", "id", "ignored")
    id: str

    def __init__(self, id: str, ignored: bool) -> None:
        self.id = id
        #: True if the task stores no result (Celery: ``ignore_result``). Awaiting it then returns ``None`` at once.
        self.ignored: bool = ignored
        # One attribute in place of two saves memory: there may be a hundred thousand handles, most without parents.
        self._outcome: Outcome | _Failed | None = None

    @property
    def meta(self) -> TaskMeta | None:
        """The last known meta, a stored state of the task; ``None`` until the result was read or awaited. No I/O."""
        own = self._own()
        return own if isinstance(own, TaskMeta) else None

    def _own(self) -> Outcome | None:
        return self._outcome.own if isinstance(self._outcome, _Failed) else self._outcome

    def _known(self) -> bool:
        own = self._own()
        return isinstance(own, TaskMeta) and own.ready

    @property
    def outcome(self) -> Outcome | None:
        """The last known outcome: a meta, or the error that reading the result raised.

        If a wait found that a parent had failed, the outcome is the parent's meta, until this task itself succeeds. If
        the task stores no result (`ignored`), the outcome is a meta without a value.
        """
        if isinstance(self._outcome, _Failed):
            return self._outcome.failure
        return TaskMeta(self.id, IGNORED) if self.ignored and not self._known() else self._outcome

    @property
    def failure(self) -> TaskMeta | None:
        """The failure that awaiting the result raises; ``None`` until a wait that checks the parents has found it."""
        return self._outcome.failure if isinstance(self._outcome, _Failed) else None

    def set_outcome(self, outcome: Outcome) -> None:
        """Note the outcome of the task itself. Waits and joins call this.

        A read may return an older state than a message that arrived meanwhile. So nothing replaces a final state.
        """
        kept = self._outcome
        if isinstance(kept, _Failed):
            if not self._known():
                succeeded = isinstance(outcome, TaskMeta) and outcome.status == SUCCESS
                self._outcome = outcome if succeeded else _Failed(outcome, kept.failure)
        elif kept is None or not self._known():
            self._outcome = outcome

    def set_failure(self, failure: TaskMeta) -> None:
        """Note the failure that awaiting the result raises. Waits and joins that check the parents call this."""
        self._outcome = _Failed(self._own(), failure)

    def value(self) -> Any:
        return value_of(self._outcome.failure if isinstance(self._outcome, _Failed) else self._outcome)


def value_of(outcome: Outcome | None) -> Any:
    """Return the value or the exception in the meta ``outcome``. Raises ``outcome`` if it is an error of reading."""
    if isinstance(outcome, Exception):
        raise copy_of_error(outcome)
    return None if outcome is None else outcome.with_new_exception().result
