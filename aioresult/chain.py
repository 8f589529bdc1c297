"""Finds the rest of a Celery chain: the tasks that come after a failed task, and therefore fail with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from .exceptions import UsageError

__all__ = ["links_of"]


def links_of(chain: Any) -> list[SimpleNamespace]:
    """Make a request object for each later task of a chain, as ``celery.backends.base.Backend._fail_chain`` does.

    ``chain`` is the attribute ``chain`` of Celery's request: the signatures of the later tasks in any order, or
    ``None``. If such a task is a chord, its body (the callback) gets a request, too: waiters of the chord wait for the
    id of the body. A signature without a task id is skipped, because its task has no result.

    :raises UsageError: an item is not a signature, so that the id of its result is unknown.
    """
    links: list[SimpleNamespace] = []
    left: deque[Any] = deque(chain if isinstance(chain, Iterable) else ())
    while left:
        signature = left.popleft()
        options = signature.get("options") if isinstance(signature, Mapping) else None
        if not isinstance(signature, Mapping) or not isinstance(options or {}, Mapping):
            raise UsageError(
                f"the chain of a request must hold signatures, which are dicts with 'options', not {signature!r}"
            )
        options = options or {}
        if (task_id := options.get("task_id")) is not None:
            # `queue` names the queue that a worker took the task from. This task was never sent, so it has none.
            named = {"retries": 0, "id": task_id, "group": options.get("group_id"), "queue": None}
            links.append(SimpleNamespace(**{**_texts(signature), **_texts(options), **named}))
        kwargs = signature.get("kwargs")
        if signature.get("subtask_type") == "chord" and isinstance(kwargs, Mapping) and kwargs.get("body") is not None:
            left.append(kwargs["body"])
    return links


def _texts(fields: Mapping[Any, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if isinstance(name, str)}
