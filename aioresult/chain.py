"""The rest of a chain: the tasks that come after a failed task, and therefore fail with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from .exceptions import UsageError

__all__ = ["links_of"]


def links_of(chain: Any) -> list[SimpleNamespace]:
    """Make a request for each link of ``chain``, as ``celery.backends.base.Backend._fail_chain`` does.

    ``chain`` is the attribute of Celery's requests: signatures in any order, or ``None``. A waiter of a chord waits for
    the id of the chord's body, so the body is a link, too. A link without an id has no result, and is skipped.

    :raises UsageError: a link is not a signature, so that the id of its result is unknown.
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
            # The queue of a request is the one that the task was taken from, and this task was never sent.
            named = {"retries": 0, "id": task_id, "group": options.get("group_id"), "queue": None}
            links.append(SimpleNamespace(**{**_texts(signature), **_texts(options), **named}))
        kwargs = signature.get("kwargs")
        if signature.get("subtask_type") == "chord" and isinstance(kwargs, Mapping) and kwargs.get("body") is not None:
            left.append(kwargs["body"])
    return links


def _texts(fields: Mapping[Any, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if isinstance(name, str)}
