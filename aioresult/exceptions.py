"""All errors that this library raises itself, in one tree.

::

    AioResultError
    ├── ImproperlyConfigured        a URL, an option or a missing package; nothing was sent          (ValueError)
    ├── UsageError                  the call itself is wrong                                         (RuntimeError)
    │   ├── BackendNotOpenError     the backend was used before ``open()`` or ``async with``
    │   └── WrongEventLoopError     the backend was used from another event loop than it was opened in
    ├── BackendError                the server or the connection failed
    │   ├── BackendClosedError      the backend was closed before or during the call
    │   ├── BackendConnectionError  the server cannot be reached; the same call may succeed later    (ConnectionError)
    │   ├── BackendRefusedError     the server refuses, and a retry will not help: password, permission, setup
    │   ├── BackendStoreError       this result was not stored
    │   └── BackendGetMetaError     this result could not be read
    ├── SerializationError          a value could not be turned into bytes, or bytes into a value
    │   ├── EncodeError             the value cannot be stored                                       (TypeError)
    │   ├── DecodeError             what is stored cannot be read                                    (ValueError)
    │   │   └── ContentDisallowed   … because its serializer is not in ``accept``
    │   └── ResultTooLargeError     the result is larger than ``max_result_size``
    ├── TimeoutError                the caller's own deadline passed                                 (TimeoutError)
    ├── OutputError                 the output of a running task; ``cursor`` says where to go on
    │   ├── OutputRestarted         another attempt writes the output from the beginning
    │   ├── OutputGap               chunks are gone: trimmed, evicted, or lost with the server
    │   ├── OutputSuperseded        the producer must stop: another attempt writes the output
    │   ├── OutputFull              the buffer of unsent chunks, or the log of the output, is full
    │   └── InvalidCursor           the cursor is not one of this library                            (ValueError)
    ├── TaskNotFoundError           nothing is stored under the id, and ``must_exist`` was set           (LookupError)
    ├── WorkerLostError             the process that ran the task has died; another one may run it
    ├── Retry                       a task raises it to run again
    ├── ChordClaimLost              the claim to a chord ran out before its callback was dispatched
    ├── IncompleteStream            a tree of results was walked before all of it had finished
    ├── CyclicResultError           stored results refer to each other in a circle, or nest too deep (ValueError)
    └── TaskError                   what happened to the task, as opposed to the call
        ├── RemoteError             stands in for the task's exception if its class cannot be used here
        ├── TaskRevokedError        the task was revoked
        └── ChordError              a part of a chord failed; ``__cause__`` is that part's exception

Awaiting a failed task raises the exception of the task itself, if its class is already imported. Otherwise it raises a
`RemoteError` with the name of that class. `RemoteTraceback` is not part of the tree: it occurs only as the
``__cause__`` of such an exception.
"""

from __future__ import annotations

import builtins
from typing import Any

__all__ = [
    "AioResultError",
    "BackendClosedError",
    "BackendConnectionError",
    "BackendError",
    "BackendGetMetaError",
    "BackendNotOpenError",
    "BackendRefusedError",
    "BackendStoreError",
    "ChordClaimLost",
    "ChordError",
    "ContentDisallowed",
    "CyclicResultError",
    "DecodeError",
    "EncodeError",
    "ImproperlyConfigured",
    "IncompleteStream",
    "InvalidCursor",
    "OutputError",
    "OutputFull",
    "OutputGap",
    "OutputRestarted",
    "OutputSuperseded",
    "RemoteError",
    "RemoteTraceback",
    "ResultTooLargeError",
    "Retry",
    "SerializationError",
    "TaskError",
    "TaskNotFoundError",
    "TaskRevokedError",
    "TimeoutError",
    "UsageError",
    "WorkerLostError",
    "WrongEventLoopError",
]


class AioResultError(Exception):
    """The base class: ``except aioresult.AioResultError`` catches every error that this library raises itself."""


class ImproperlyConfigured(AioResultError, ValueError):
    """A URL or an option makes no sense, or needs a package that is not installed. The message says what to change."""


class UsageError(AioResultError, RuntimeError):
    """The call is a mistake: it has a wrong argument, or was made in the wrong place or at the wrong time."""


class BackendNotOpenError(UsageError):
    """The backend was used before it was opened. Use it inside ``async with``, or call ``await backend.open()``."""


class WrongEventLoopError(UsageError):
    """The backend was used in another event loop, thread or process than the one that opened it.

    A backend belongs to the event loop that opened it, because loops cannot share sockets and futures. Open one backend
    for each event loop, for instance with `aioresult.per_loop`.
    """


class BackendError(AioResultError):
    """The server or the connection to it failed."""

    #: Whether the error concerns the server, and not the single request. Then splitting a batch does not help.
    of_server: bool = False


class BackendClosedError(BackendError):
    """The backend was closed with `aclose`. All waiters get this error, so that none waits for ever."""

    of_server = True


class BackendConnectionError(BackendError, ConnectionError):
    """The server cannot be reached, or the connection was lost and not restored within ``retry_for`` seconds.

    The same call may succeed later. A store that raised this error may have been stored; it is safe to repeat it.
    """

    of_server = True
    #: Whether the connection was lost during the call. If that happens twice, the call itself may be the cause.
    in_flight: bool = False


class BackendRefusedError(BackendError):
    """The server refuses, and a retry will not help: wrong password, no permission, wrong setup."""

    of_server = True


class BackendStoreError(BackendError):
    """The server refused to store this result (out of memory, read-only replica, …). It is not stored."""


class BackendGetMetaError(BackendError):
    """The server refused to read this result."""


class SerializationError(AioResultError):
    """A value could not be turned into stored bytes, or the bytes into a value."""


class EncodeError(SerializationError, TypeError):
    """The serializer cannot write the value. Only the caller that stores it gets this error.

    The message names the task, the path to the part that cannot be written, its type, and the remedy. See
    docs/values.md.
    """


class DecodeError(SerializationError, ValueError):
    """The stored bytes cannot be read. Only the callers that wait for this id or read it get this error."""


class ContentDisallowed(DecodeError):
    """The stored bytes were written by a serializer that this reader does not list in ``accept``."""


class ResultTooLargeError(SerializationError):
    """The result has more than ``max_result_size`` bytes, counted after decompression."""


class TimeoutError(AioResultError, builtins.TimeoutError):
    """The caller's deadline has passed. The task goes on, and you can wait for it again at any time."""


class OutputError(AioResultError):
    """Reading or writing the output of a running task failed."""


class OutputRestarted(OutputError):
    """Another attempt of the task writes the output from the beginning. Discard what you have read.

    ``cursor`` is the beginning of the new output.
    """

    def __init__(self, message: str, cursor: str = "") -> None:
        super().__init__(message, cursor)
        self.cursor = cursor

    def __str__(self) -> str:
        return str(self.args[0])


class OutputGap(OutputError):
    """``missed`` chunks are gone: trimmed, evicted, or lost with the server. ``cursor`` continues after them."""

    def __init__(self, message: str, missed: int = 0, cursor: str = "") -> None:
        super().__init__(message, missed, cursor)
        self.missed = missed
        self.cursor = cursor

    def __str__(self) -> str:
        return str(self.args[0])


class OutputSuperseded(OutputError):
    """The producer gets this error when another attempt of the task has opened the output. It must stop."""


class OutputFull(OutputError):
    """More of the output is unsent than `Output.send_nowait` allows. Or the log is full, with ``on_full="fail"``."""


class InvalidCursor(OutputError, ValueError):
    """The text is not a cursor of this library. Cursors come from browsers, so they may be anything."""


class TaskNotFoundError(AioResultError, LookupError):
    """Nothing is stored under the id, and the caller has passed ``must_exist=True``.

    When a task is submitted, nothing is stored for it, unless the submitter calls `aioresult.Backend.mark_as_pending`.
    """


class WorkerLostError(AioResultError):
    """The process that ran the task has given no sign of life for the length of its lease.

    This is not stored, and the task has not ended: the queue may run it again. To wait for that, await it again.
    """


class Retry(AioResultError):
    """Raise it in the body of `aioresult.Backend.running` if the task is to run again. It is then stored as RETRY.

    ``exc`` is the reason, and is stored; without it the `Retry` itself is stored. ``delay`` is for the worker that
    catches the `Retry`: the seconds after which its queue should run the task again. The library does not wait.
    Celery's ``celery.exceptions.Retry`` has the same effect there.
    """

    def __init__(self, message: str = "", exc: BaseException | None = None, delay: float | None = None) -> None:
        super().__init__(message)
        self.exc = exc
        self.delay = delay


class ChordClaimLost(AioResultError):
    """The claim to dispatch a chord's callback ran out, and another process holds it now. Do not dispatch."""


class IncompleteStream(AioResultError):
    """A tree of results was walked before all of it had finished. Pass ``intermediate=True`` to allow that."""


class CyclicResultError(AioResultError, ValueError):
    """Stored results refer to each other in a circle, or nest deeper than any real workflow."""


class TaskError(AioResultError):
    """The task itself failed or was revoked. All other errors of this library concern the call that raises them."""


class RemoteError(TaskError):
    """Stands in for the exception of a task if its class is not imported here, or cannot be used here.

    Each such class gets its own subclass of `RemoteError`, with the name and the module of the original. A note (PEP
    678), which every traceback shows, gives the reason and the remedy. The usual remedy is to import the module that
    defines the class before you await the result. Then the original class is raised. The stand-in for an exception
    group is an `ExceptionGroup`, too.

    A task may have stored something else instead of an exception, such as a dict passed to Celery's
    ``update_state("FAILURE", meta={…})``. Then ``args[0]`` is that value.
    """

    #: What is stored for the exception: the mapping that describes it, or any other value. ``None`` if nothing is
    #: stored, or a pickled exception. Do not change it, because several readers may share it.
    stored: Any = None
    #: The text of an exception that has no arguments to make a text of.
    _text: str = ""

    def __str__(self) -> str:
        return super().__str__() if self.args else self._text


class TaskRevokedError(TaskError):
    """The task was revoked, before it ran or while it ran."""


class ChordError(TaskError):
    """A part of a chord failed; ``__cause__`` is the exception of that part."""


class RemoteTraceback(Exception):
    """Shows the worker's traceback: it is the ``__cause__`` of an exception that is raised again in the reader."""

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else ""
        return f"\n{text.rstrip()}"
