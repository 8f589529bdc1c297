"""aioresult: the results of a task queue, awaited.

>>> import asyncio, aioresult
>>> async def main():
...     async with aioresult.connect("memory://") as backend:
...         await backend.mark_as_done("task-1", 42)
...         return await backend.result("task-1")
>>> asyncio.run(main())
42
"""

from __future__ import annotations

from asyncio import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION

from . import states
from .backends.base import Backend
from .chord import Chord, ReadyChord
from .dialect import StoredType
from .eager import EagerResult
from .exceptions import (
    AioResultError,
    BackendClosedError,
    BackendConnectionError,
    BackendError,
    BackendGetMetaError,
    BackendNotOpenError,
    BackendRefusedError,
    BackendStoreError,
    ChordClaimLost,
    ChordError,
    ContentDisallowed,
    CyclicResultError,
    DecodeError,
    EncodeError,
    ImproperlyConfigured,
    IncompleteStream,
    RemoteError,
    ResultTooLargeError,
    SerializationError,
    TaskError,
    TaskRevokedError,
    TimeoutError,
    UsageError,
    WrongEventLoopError,
)
from .joins import as_completed, gather, wait
from .meta import TaskMeta, TaskRequest
from .registry import by_name, by_url, connect
from .result import AsyncResult, GroupResult, ResultBase, ResultSet, result_from_tuple

__version__ = "0.1.0"

__all__ = [
    "ALL_COMPLETED",
    "FIRST_COMPLETED",
    "FIRST_EXCEPTION",
    "AioResultError",
    "AsyncResult",
    "Backend",
    "BackendClosedError",
    "BackendConnectionError",
    "BackendError",
    "BackendGetMetaError",
    "BackendNotOpenError",
    "BackendRefusedError",
    "BackendStoreError",
    "Chord",
    "ChordClaimLost",
    "ChordError",
    "ContentDisallowed",
    "CyclicResultError",
    "DecodeError",
    "EagerResult",
    "EncodeError",
    "GroupResult",
    "ImproperlyConfigured",
    "IncompleteStream",
    "ReadyChord",
    "RemoteError",
    "ResultBase",
    "ResultSet",
    "ResultTooLargeError",
    "SerializationError",
    "StoredType",
    "TaskError",
    "TaskMeta",
    "TaskRequest",
    "TaskRevokedError",
    "TimeoutError",
    "UsageError",
    "WrongEventLoopError",
    "as_completed",
    "by_name",
    "by_url",
    "connect",
    "gather",
    "result_from_tuple",
    "states",
    "wait",
]
