"""`TaskMeta`, a task's state as stored, published and awaited; and `TaskRequest`, what a worker knows of its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol, TypeAlias, TypeVar, cast, dataclass_transform, runtime_checkable
from uuid import UUID

from .states import PENDING, PROPAGATE_STATES, READY_STATES

__all__ = ["META_FIELD", "ResultTuple", "SupportsAsTuple", "TaskMeta", "TaskRequest"]

#: Celery's serializable form of a result: ``((id, parent's tuple or None), None or the members' tuples)``.
ResultTuple: TypeAlias = Sequence[Any]

#: The name of the stored field with a caller's own metadata. Celery has no such field, and Celery's readers ignore it.
META_FIELD = "meta"

T = TypeVar("T")


@runtime_checkable
class SupportsAsTuple(Protocol):
    """A handle on a result, of this library or of Celery."""

    def as_tuple(self) -> ResultTuple: ...


@dataclass_transform(frozen_default=True)
def _frozen_to_checkers(cls: type[T]) -> type[T]:
    """Make ``cls`` a dataclass that is frozen for type checkers only.

    A dataclass that is really frozen would make every store a tenth slower.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)


@_frozen_to_checkers
class TaskMeta:
    """The state of a task at one moment, and its result. Read-only.

    In the states that carry an exception (`aioresult.states.EXCEPTION_STATES`) ``result`` is the exception. Waiters
    that were registered with `aioresult.Backend.watch` share one meta object. To raise the exception in it, raise
    ``meta.with_new_exception().result``.
    """

    task_id: str
    status: str
    #: The return value of the task, or its exception. In a state of your own, the value that was stored with the state.
    result: Any = None
    #: The worker's traceback, as text.
    traceback: str | None = None
    #: The tasks that this task started, as result tuples; `AsyncResult.children()` makes handles of them.
    children: Sequence[ResultTuple] = ()
    #: When the task reached a ready state, in UTC.
    date_done: datetime | None = None
    #: The optional fields, by Celery's names for them. Read them through the properties below. One mapping holds them
    #: all, because a meta is built for every message that arrives, and most metas have none of these fields.
    extra: Mapping[str, Any] | None = None
    #: A function that decodes the same meta again; ``None`` if the meta carries no stored exception.
    _again: Callable[[], TaskMeta] | None = field(default=None, repr=False, compare=False)

    def with_new_exception(self) -> TaskMeta:
        """Return the same meta with a new instance of its exception, or this meta if it carries no stored exception.

        Each caller should raise an instance of its own. An instance that two callers raise collects the traceback, the
        context, the cause and the notes of both.
        """
        if self._again is None:
            return self
        try:
            return replace(self._again(), _again=self._again)
        except Exception:  # the constructor of a user's exception may raise the second time
            return self

    @classmethod
    def pending(cls, task_id: str) -> TaskMeta:
        """Return the meta of an id under which nothing is stored: its state is PENDING."""
        return cls(task_id, PENDING)

    @property
    def ready(self) -> bool:
        """True if the task is over: it has succeeded or failed, or was revoked."""
        return self.status in READY_STATES

    @property
    def propagates(self) -> bool:
        """True if awaiting the result raises its exception: the task has failed or was revoked."""
        return self.status in PROPAGATE_STATES

    def _optional(self, name: str) -> Any:
        return None if self.extra is None else self.extra.get(name)

    @property
    def group_id(self) -> str | None:
        """The id of the group that the task belongs to."""
        return cast("str | None", self._optional("group_id"))

    @property
    def parent_id(self) -> str | None:
        """The id of the task that started this task."""
        return cast("str | None", self._optional("parent_id"))

    @property
    def meta(self) -> Mapping[str, Any] | None:
        """The metadata that was stored beside this state: ``meta=`` of `aioresult.Backend.store_result`."""
        return cast("Mapping[str, Any] | None", self._optional(META_FIELD))

    # The properties below have a value only if the result was stored with ``extended=True`` (Celery: result_extended).

    @property
    def name(self) -> str | None:
        """The name of the task's function."""
        return cast("str | None", self._optional("name"))

    @property
    def args(self) -> Any:
        """The positional arguments that the task was called with."""
        return self._optional("args")

    @property
    def kwargs(self) -> Any:
        """The keyword arguments that the task was called with."""
        return self._optional("kwargs")

    @property
    def worker(self) -> str | None:
        """The host name of the worker."""
        return cast("str | None", self._optional("worker"))

    @property
    def retries(self) -> int | None:
        """How many times the task had been retried before this state was stored."""
        return cast("int | None", self._optional("retries"))

    @property
    def queue(self) -> str | None:
        """The queue that the worker took the task from."""
        return cast("str | None", self._optional("queue"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """What a worker knows of the task that it runs.

    Every field is optional: the caller passes the id with the request. An id may be a `UUID`. Every method that takes a
    request also takes Celery's ``task.request``. The method reads the attributes by name, and treats a missing
    attribute as unknown.
    """

    id: str = ""
    task: str | None = None
    args: Sequence[Any] | None = None
    kwargs: Mapping[str, Any] | None = None
    hostname: str | None = None
    retries: int | None = None
    group: str | None = None
    group_index: int | None = None
    chord: Any = None
    #: The signatures of the tasks that follow in the chain, as in Celery. If this task fails, they fail with it.
    chain: Sequence[Any] | None = None
    parent_id: str | None = None
    children: Sequence[SupportsAsTuple | ResultTuple] = ()
    queue: str | None = None

    def __post_init__(self) -> None:
        for name in ("id", "group", "parent_id"):
            if isinstance(value := getattr(self, name), UUID):
                object.__setattr__(self, name, str(value))
