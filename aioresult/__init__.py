"""aioresult: await the results of a task queue.

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
    InvalidCursor,
    OutputError,
    OutputFull,
    OutputGap,
    OutputRestarted,
    OutputSuperseded,
    RemoteError,
    ResultTooLargeError,
    Retry,
    SerializationError,
    TaskError,
    TaskNotFoundError,
    TaskRevokedError,
    TimeoutError,
    UsageError,
    WorkerLostError,
    WrongEventLoopError,
)
from .health import BackendStats
from .joins import as_completed, gather, wait
from .log import TAIL
from .meta import TaskMeta, TaskRequest
from .output import Keep, Output
from .per_loop import PerLoop, per_loop
from .progress import GroupProgress
from .registry import ConnectOptions, by_name, by_url, connect
from .result import AsyncResult, GroupResult, ResultBase, ResultSet, result_from_tuple
from .running import Running, current_task
from .stream import OutputPage, OutputStream
from .updates import Updates

__version__ = "0.1.0"

__all__ = [
    "ALL_COMPLETED",
    "FIRST_COMPLETED",
    "FIRST_EXCEPTION",
    "TAIL",
    "AioResultError",
    "AsyncResult",
    "Backend",
    "BackendClosedError",
    "BackendConnectionError",
    "BackendError",
    "BackendGetMetaError",
    "BackendNotOpenError",
    "BackendRefusedError",
    "BackendStats",
    "BackendStoreError",
    "Chord",
    "ChordClaimLost",
    "ChordError",
    "ConnectOptions",
    "ContentDisallowed",
    "CyclicResultError",
    "DecodeError",
    "EagerResult",
    "EncodeError",
    "GroupProgress",
    "GroupResult",
    "ImproperlyConfigured",
    "IncompleteStream",
    "InvalidCursor",
    "Keep",
    "Output",
    "OutputError",
    "OutputFull",
    "OutputGap",
    "OutputPage",
    "OutputRestarted",
    "OutputStream",
    "OutputSuperseded",
    "PerLoop",
    "ReadyChord",
    "RemoteError",
    "ResultBase",
    "ResultSet",
    "ResultTooLargeError",
    "Retry",
    "Running",
    "SerializationError",
    "StoredType",
    "TaskError",
    "TaskMeta",
    "TaskNotFoundError",
    "TaskRequest",
    "TaskRevokedError",
    "TimeoutError",
    "Updates",
    "UsageError",
    "WorkerLostError",
    "WrongEventLoopError",
    "as_completed",
    "by_name",
    "by_url",
    "connect",
    "current_task",
    "gather",
    "per_loop",
    "result_from_tuple",
    "states",
    "wait",
]
