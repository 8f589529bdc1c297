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
    │   ├── BackendRefusedError     the server refuses the call, and a retry will not help: password, permission, setup
    │   ├── BackendStoreError       this result was not stored
    │   └── BackendGetMetaError     this result could not be read
    ├── SerializationError          a value could not be turned into bytes, or bytes into a value
    │   ├── EncodeError             the value cannot be stored                                       (TypeError)
    │   ├── DecodeError             what is stored cannot be read                                    (ValueError)
    │   │   └── ContentDisallowed   what is stored has a serializer that is not in ``accept``
    │   └── ResultTooLargeError     the result is larger than ``max_result_size``
    ├── TimeoutError                the caller's own deadline passed                                 (TimeoutError)
    ├── OutputError                 the output (chunks that a running task sends) cannot be read or written
    │   ├── OutputRestarted         the task runs again, and that attempt writes the output from the beginning
    │   ├── OutputGap               chunks of the output are gone: trimmed, evicted, or lost with the server
    │   ├── OutputSuperseded        the producer must stop: another attempt of the task writes the output
    │   ├── OutputFull              too many chunks are not sent yet, or the stored output is full
    │   └── InvalidCursor           a text is not a cursor (a position in the output)                (ValueError)
    ├── TaskNotFoundError           nothing is stored under the id, and ``must_exist`` was set           (LookupError)
    ├── WorkerLostError             the process that ran the task has died; another process may run the task again
    ├── Retry                       a task raises it to run again
    ├── ChordClaimLost              the claim to a chord ran out before its callback was dispatched
    ├── IncompleteStream            a tree of results was walked before all of it had finished
    ├── CyclicResultError           stored results refer to each other in a circle, or nest too deep (ValueError)
    └── TaskError                   the task failed or was revoked; all other errors concern the call
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
    """The base class of the errors that this library raises itself: ``except AioResultError`` catches all of them."""


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

    #: True if the error concerns the server, and not a single request. Then splitting a batch does not help.
    of_server: bool = False


class BackendClosedError(BackendError):
    """The backend was closed with `aclose`. All waiters get this error, so that no waiter waits for ever."""

    of_server = True


class BackendConnectionError(BackendError, ConnectionError):
    """The server cannot be reached, or the connection was lost and not restored within ``retry_for`` seconds.

    The same call may succeed later. If storing a result raised this error, the server may hold the result nevertheless.
    It is safe to repeat the call.
    """

    of_server = True
    #: True if the connection was lost during the call. If that happens twice, the call itself may be the cause.
    in_flight: bool = False
    #: True if the server answers, and only cannot serve these ids now. The calls for other ids are not affected.
    partial: bool = False


class BackendRefusedError(BackendError):
    """The server refuses the call, and a retry will not help: wrong password, no permission, wrong setup."""

    of_server = True


class BackendStoreError(BackendError):
    """The server refused to store this result, which is not stored. It may be out of memory or a read-only replica."""


class BackendGetMetaError(BackendError):
    """The server refused to read this result."""


class SerializationError(AioResultError):
    """A value could not be turned into bytes to store, or stored bytes could not be turned into a value."""


class EncodeError(SerializationError, TypeError):
    """The serializer cannot write a value. Only the caller that stores this value gets the error.

    The message names the task, the path to the part that cannot be written, its type, and the remedy. See
    docs/values.md.
    """


class DecodeError(SerializationError, ValueError):
    """The stored bytes of a result cannot be read. Only callers that read this result or wait for it get the error."""


class ContentDisallowed(DecodeError):
    """The stored bytes were written by a serializer that this reader does not list in ``accept``."""


class ResultTooLargeError(SerializationError):
    """The result has more than ``max_result_size`` bytes, counted after decompression."""


class TimeoutError(AioResultError, builtins.TimeoutError):
    """The caller's deadline has passed. The task goes on, and you can wait for it again at any time."""


class OutputError(AioResultError):
    """Reading or writing the output of a running task failed."""


class OutputRestarted(OutputError):
    """The task runs again, and this attempt writes the output from the beginning. Discard all chunks read so far.
    ``cursor`` is the position before the first chunk of the new output.
    """

    def __init__(self, message: str, cursor: str = "") -> None:
        super().__init__(message, cursor)
        self.cursor = cursor

    def __str__(self) -> str:
        return str(self.args[0])


class OutputGap(OutputError):
    """Chunks of the output are gone: trimmed, evicted, or lost with the server.

    ``missed`` is their number. ``cursor`` is the position after them; pass it as ``after`` to continue there.
    """

    def __init__(self, message: str, missed: int = 0, cursor: str = "") -> None:
        super().__init__(message, missed, cursor)
        self.missed = missed
        self.cursor = cursor

    def __str__(self) -> str:
        return str(self.args[0])


class OutputSuperseded(OutputError):
    """Another attempt of the task has opened the output. The worker that gets this error must stop writing."""


class OutputFull(OutputError):
    """The output takes no more chunks.

    Either `Output.send_nowait` was called while too many chunks were not sent yet; or, with ``on_full="fail"``, the
    stored output has reached its maximum size.
    """


class InvalidCursor(OutputError, ValueError):
    """A text is not a cursor. A cursor is a position in the output of a task; this library returns it as a text.

    Programs often get cursors back from browsers, so the text may be anything.
    """


class TaskNotFoundError(AioResultError, LookupError):
    """Nothing is stored under the id, and the caller has passed ``must_exist=True``.

    Submitting a task stores nothing under its id, unless the submitter calls `aioresult.Backend.mark_as_pending`.
    """


class WorkerLostError(AioResultError):
    """The worker that ran the task has given no sign of life for the length of its lease.

    The error is not stored, and the task has not ended: the queue may run the task again. To wait for the next attempt,
    await the result again.
    """


class Retry(AioResultError):
    """Raise it inside ``async with backend.running(…)`` if the task is to run again. The state RETRY is then stored.

    ``exc`` is the reason. It is stored with the state; without ``exc`` the `Retry` itself is stored. ``delay`` is the
    number of seconds to wait before the task runs again. The library itself does not wait: the worker catches the
    `Retry`, and passes ``delay`` to its queue. ``celery.exceptions.Retry`` has the same effect inside ``async with
    backend.running(…)``.
    """

    def __init__(self, message: str = "", exc: BaseException | None = None, delay: float | None = None) -> None:
        super().__init__(message)
        self.exc = exc
        self.delay = delay


class ChordClaimLost(AioResultError):
    """This process's claim to dispatch a chord's callback ran out, and another process holds the claim now.

    Do not dispatch the callback.
    """


class IncompleteStream(AioResultError):
    """A tree (a result and its children) was walked before all its results had finished.

    Pass ``intermediate=True`` to allow that.
    """


class CyclicResultError(AioResultError, ValueError):
    """Stored results refer to each other in a circle, or nest deeper than any real workflow."""


class TaskError(AioResultError):
    """The task itself failed or was revoked. All other errors of this library concern the call that raises them."""


class RemoteError(TaskError):
    """Stands in for the exception of a task if the exception's class is not imported, or cannot be used, in the reader.

    Each such class gets its own subclass of `RemoteError`, with the name and the module of the original. The exception
    has a note (PEP 678) with the reason and the remedy; every traceback shows it. The usual remedy is to import the
    module that defines the class before you await the result. Then the original class is raised. The stand-in for an
    exception group is an `ExceptionGroup`, too.

    A task may have stored something else instead of an exception, such as a dict passed to Celery's
    ``update_state("FAILURE", meta={…})``. Then ``args[0]`` is that value.
    """

    #: What is stored for the exception: a dict such as ``{"exc_type": …, "exc_message": …, "exc_module": …}``, or any
    #: other value. ``None`` if nothing is stored, or if a pickled exception is stored. Several readers may share the
    #: value, so do not change it.
    stored: Any = None
    #: The text of the original exception, if that exception has no arguments.
    _text: str = ""

    def __str__(self) -> str:
        return super().__str__() if self.args else self._text


class TaskRevokedError(TaskError):
    """The task was revoked, before it ran or while it ran."""


class ChordError(TaskError):
    """A part of a chord failed; ``__cause__`` is the exception of that part."""


class RemoteTraceback(Exception):
    """Shows the worker's traceback in the reader: it is the ``__cause__`` of the exception that the reader gets."""

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else ""
        return f"\n{text.rstrip()}"
