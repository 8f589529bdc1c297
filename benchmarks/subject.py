"""`Subject`: one way to store results and to wait for them. The library is one; the bare loops and the peers are, too.

This module, like everything else that runs inside a measurement (`child`, `storer`, `work`), needs the standard library
only: the peers import it in environments of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any
from uuid import uuid4

__all__ = ["Subject", "Unsupported", "chunks", "load", "new_ids", "text"]

#: How many ids every subject fetches or subscribes to in one go: the library's own default.
CHUNK = 500


class Unsupported(Exception):
    """The subject has no such operation; says why."""


class Subject:
    """Whatever a subject does not override, it does not have. ``options`` vary the subject, such as a pool's size."""

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        self.options = options

    async def open(self) -> None:
        """Connect."""

    async def close(self) -> None:
        """The opposite."""

    async def store(self, task_id: str, value: Any) -> None:
        """Store ``value`` as the result of a task that went well, and return when it is stored."""
        raise Unsupported("has no operation that stores a result outside of its worker")

    async def wait(self, task_id: str) -> Any:
        """Return the value once it is stored."""
        raise Unsupported("has no operation that waits for a result")

    async def join(self, task_ids: Sequence[str]) -> Sequence[Any]:
        """The values of all, in order."""
        raise Unsupported("has no operation that waits for several results at once")

    def as_completed(self, task_ids: Sequence[str]) -> AsyncIterator[Any]:
        """One item per result, as they finish."""
        raise Unsupported("has no operation that hands results over as they finish")

    async def chord(self, task_ids: Sequence[str], value: Any) -> None:
        """Store ``value`` for every part; return when the callback was dispatched with the values of all."""
        raise Unsupported("has no chords outside of its worker")


def load(reference: str, url: str, options: dict[str, Any]) -> Subject:
    """The subject named by ``module:class``."""
    module, _, name = reference.partition(":")
    subject = getattr(importlib.import_module(module), name)(url, **options)
    assert isinstance(subject, Subject)
    return subject


def new_ids(count: int) -> list[str]:
    """Ids as long as those of Celery, which nobody has used before."""
    prefix = str(uuid4())[:-8]
    return [f"{prefix}{index:08x}" for index in range(count)]


def text(size: int) -> str:
    """A value of so many bytes."""
    return "x" * size


def chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """``items`` in pieces of `CHUNK`."""
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]
