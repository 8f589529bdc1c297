"""Hints for errors: what to use for an attribute that only Celery's results have, and what to pass for a wrong id."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import NoReturn

__all__ = ["INSTEAD", "Missing", "kind_of", "not_an_id"]

_FETCHED = ("args", "date_done", "kwargs", "name", "queue", "retries", "worker")

#: An attribute that our handles lack → what to write instead, for a ``result`` or a ``group``. The attributes are those
#: of Celery's results, and one of `asyncio.Task` that `asyncio.wait` needs. docs/migrating.md has the same table.
INSTEAD: Mapping[str, str] = {
    **{name: f"(await result.fetch()).{name}" for name in _FETCHED},
    "TimeoutError": "aioresult.TimeoutError",
    "add_done_callback": "aioresult.wait(results), or asyncio.create_task(result.get())",
    "app": "result.backend",
    "build_graph": "await result.graph()",
    "info": "(await result.fetch()).result",
    "iter_native": "group.as_completed()",
    "join_native": "await group.join()",
    "maybe_reraise": "await result.get(timeout=0)",
    "maybe_throw": "await result.get(timeout=0)",
    "on_ready": "asyncio.create_task(result.get()).add_done_callback(callback)",
    "result": "await result, or (await result.fetch()).result",
    "revoke": "for each in group.leaves(): await each.revoke()",
    "revoke_by_stamped_headers": "await asyncio.to_thread(app.control.revoke_by_stamped_headers, headers)",
    "status": "await result.state()",
    "supports_native_join": "await group",
    "task_id": "result.id",
    "then": (
        "asyncio.create_task(result.get()).add_done_callback(callback). Functions of Celery's that call `then` need "
        "Celery's result"
    ),
    "throw": "await result.get(timeout=0)",
    "wait": "await result.get(timeout)",
}


class Missing:
    """A descriptor for an attribute that a class lacks. Reading it raises an `AttributeError` that names the remedy.

    A ``__getattr__`` could do the same, but would make each attribute of a handle slower to read. An instance or a
    subclass may have an attribute of the same name.
    """

    def __init__(self, name: str, remedy: str) -> None:
        self.__name__ = name
        self.__doc__ = f"This attribute does not exist; write ``{remedy}``."
        self._remedy = remedy

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(
            f"{owner.__name__!r} object has no attribute {self.__name__!r}; write {self._remedy} "
            f"(docs/migrating.md says what to write for the others)"
        )


def kind_of(value: object) -> str:
    """Return the name of the class of ``value`` with its module, because two classes have the name ``AsyncResult``."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def not_an_id(value: object) -> str:
    """Return the text of the error for a ``value`` that is not an id."""
    told = f"an id must be a str or a UUID, not {kind_of(value)}"
    for attribute in ("id", "task_id"):
        with suppress(Exception):  # the attribute may be a property that raises, as in a detached row of an ORM
            if isinstance(getattr(value, attribute, None), str):
                return f"{told}; pass its {attribute}"
    return f"{told}; await it first" if isinstance(value, (Coroutine, asyncio.Future)) else told
