"""The rest of a chain: what comes after a task that has failed, and so fails with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from .exceptions import UsageError

__all__ = ["links_of"]


def links_of(chain: Any) -> list[SimpleNamespace]:
    """A request for each link of ``chain``, as ``celery.backends.base.Backend._fail_chain`` makes one.

    ``chain`` is what Celery's requests carry: signatures in any order, or ``None``. A chord among them is waited for by
    the id of its body, which is a link, too. A link without an id has no result, and is passed over.

    :raises UsageError: a link is no signature, so that it cannot be told which result would never come.
    """
    links: list[SimpleNamespace] = []
    left: deque[Any] = deque(chain if isinstance(chain, Iterable) else ())
    while left:
        signature = left.popleft()
        options = signature.get("options") if isinstance(signature, Mapping) else None
        if not isinstance(signature, Mapping) or not isinstance(options or {}, Mapping):
            raise UsageError(
                f"the chain of a request holds signatures, which are dicts with options; not {signature!r}"
            )
        options = options or {}
        if (task_id := options.get("task_id")) is not None:
            # Where it was to be sent is no request's queue, which is where the task came from.
            named = {"retries": 0, "id": task_id, "group": options.get("group_id"), "queue": None}
            links.append(SimpleNamespace(**{**_texts(signature), **_texts(options), **named}))
        kwargs = signature.get("kwargs")
        if signature.get("subtask_type") == "chord" and isinstance(kwargs, Mapping) and kwargs.get("body") is not None:
            left.append(kwargs["body"])
    return links


def _texts(fields: Mapping[Any, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if isinstance(name, str)}
