"""Every error this library raises of its own accord, in one tree.

::

    AioResultError
    ├── ImproperlyConfigured        a URL, an option or a missing package; nothing was sent          (ValueError)
    ├── UsageError                  the call itself is wrong                                         (RuntimeError)
    │   ├── BackendNotOpenError     used before ``open()`` / ``async with``
    │   └── WrongEventLoopError     used from another event loop than the one that opened it
    ├── BackendError                the server, or the way to it
    │   ├── BackendClosedError      closed while you waited, or before you called
    │   ├── BackendConnectionError  unreachable or lost; the same call may succeed later             (ConnectionError)
    │   ├── BackendRefusedError     the server says no and will again: password, permission, setup
    │   ├── BackendStoreError       this result was not stored
    │   └── BackendGetMetaError     this result could not be read
    ├── SerializationError
    │   ├── EncodeError             the value cannot be stored                                       (TypeError)
    │   ├── DecodeError             what is stored cannot be read                                    (ValueError)
    │   │   └── ContentDisallowed   … because its serializer is not in ``accept``
    │   └── ResultTooLargeError     past ``max_result_size``, on the way in or out
    ├── TimeoutError                the caller's own deadline passed                                 (TimeoutError)
    ├── OutputError                 the output of a running task; ``cursor`` says where to go on
    │   ├── OutputRestarted         another attempt writes it from the beginning
    │   ├── OutputGap               chunks are gone: trimmed, evicted, lost with the server
    │   ├── OutputSuperseded        told to a producer: another attempt has the output
    │   ├── OutputFull              more is unsent, or kept, than may be
    │   └── InvalidCursor           a cursor that is none of ours                                    (ValueError)
    ├── TaskNotFoundError           nothing is stored under the id, and ``must_exist`` was set           (LookupError)
    ├── WorkerLostError             the process that ran the task has died; another one may run it
    ├── Retry                       raised by a task that is to run again
    ├── ChordClaimLost              the lease on a chord ran out before its callback was dispatched
    ├── IncompleteStream            a tree of results was walked before all of it had finished
    ├── CyclicResultError           stored results name each other in a circle, or nest without end  (ValueError)
    └── TaskError                   what the task did, told to whoever awaits it
        ├── RemoteError             the task's exception, when its own class is not at hand here
        ├── TaskRevokedError        the task was revoked
        └── ChordError              a part of a chord failed; ``__cause__`` is that part's exception

A failed task raises *its own* exception where the class is already imported; only otherwise a `RemoteError` that
carries its name. `RemoteTraceback` is not part of the tree: it is only ever the ``__cause__`` of such an exception.
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
    """The root: ``except aioresult.AioResultError`` catches whatever this library itself raises."""


class ImproperlyConfigured(AioResultError, ValueError):
    """A URL or option makes no sense, or names something that is not installed. The message says what to change."""


class UsageError(AioResultError, RuntimeError):
    """The call cannot work where or when it was made."""


class BackendNotOpenError(UsageError):
    """The backend was used outside ``async with`` and without ``await backend.open()``."""


class WrongEventLoopError(UsageError):
    """A backend belongs to the event loop that opened it; sockets and futures cannot be shared between loops."""


class BackendError(AioResultError):
    """Something went wrong between this process and the stored results."""

    #: Whether the error says something of the server, and not of what was asked: a batch is not split for it.
    of_server: bool = False


class BackendClosedError(BackendError):
    """`aclose()` was called. Every waiter gets this error, so that none waits for ever."""

    of_server = True


class BackendConnectionError(BackendError, ConnectionError):
    """The server cannot be reached, or the connection broke and was not mended in time."""

    of_server = True
    #: Whether a connection that stood has broken under the call: twice, and the call itself may be the cause.
    in_flight: bool = False


class BackendRefusedError(BackendError):
    """The server answered, and will give the same answer to a retry: wrong password, no permission, wrong setup."""

    of_server = True


class BackendStoreError(BackendError):
    """The server refused to store this result (out of memory, read-only replica, …). It is not stored."""


class BackendGetMetaError(BackendError):
    """The server refused to read this result."""


class SerializationError(AioResultError):
    """Between a Python value and its stored bytes."""


class EncodeError(SerializationError, TypeError):
    """The value cannot be stored. Raised to the caller that stores it; names the task, the path to the part that the
    serializer cannot write, the type of that part, and what to do. See docs/values.md.
    """


class DecodeError(SerializationError, ValueError):
    """The stored bytes cannot be read. Raised to those who wait for that id, and to nobody else."""


class ContentDisallowed(DecodeError):
    """The stored bytes are of a serializer that this reader did not list in ``accept``."""


class ResultTooLargeError(SerializationError):
    """The result, as bytes and after decompression, is larger than ``max_result_size``."""


class TimeoutError(AioResultError, builtins.TimeoutError):
    """The caller's deadline passed. The task goes on; wait for it again at any time."""


class OutputError(AioResultError):
    """Something about the output of a running task."""


class OutputRestarted(OutputError):
    """Another attempt of the task writes the output from the beginning: what was read before is void.

    ``cursor`` is the beginning of the new output.
    """

    def __init__(self, message: str, cursor: str = "") -> None:
        super().__init__(message, cursor)
        self.cursor = cursor

    def __str__(self) -> str:
        return str(self.args[0])


class OutputGap(OutputError):
    """``missed`` chunks are gone: trimmed, evicted, or lost with the server. ``cursor`` goes on behind them."""

    def __init__(self, message: str, missed: int = 0, cursor: str = "") -> None:
        super().__init__(message, missed, cursor)
        self.missed = missed
        self.cursor = cursor

    def __str__(self) -> str:
        return str(self.args[0])


class OutputSuperseded(OutputError):
    """Told to a producer: another attempt of the task has opened the output. Stop."""


class OutputFull(OutputError):
    """`Output.send_nowait`, and more is unsent than may be; or the log is full, with ``on_full="fail"``."""


class InvalidCursor(OutputError, ValueError):
    """A cursor that is none of ours. Cursors come from browsers."""


class TaskNotFoundError(AioResultError, LookupError):
    """Nothing is stored under the id, and the caller has passed ``must_exist=True``.

    A task that is only submitted has nothing stored, unless the submitter calls `aioresult.Backend.mark_as_pending`.
    """


class WorkerLostError(AioResultError):
    """The process that ran the task has not been heard of for its lease.

    That is not stored, and no end: the queue may run the task again. Await it again to wait for that.
    """


class Retry(AioResultError):
    """Raised by the body of `aioresult.Backend.running`: the task is to run again, and is stored as RETRY.

    ``exc`` is why, and is what is stored; without it the `Retry` itself is. Celery's ``celery.exceptions.Retry`` means
    the same there.
    """

    def __init__(self, message: str = "", exc: BaseException | None = None) -> None:
        super().__init__(message)
        self.exc = exc


class ChordClaimLost(AioResultError):
    """The claim to dispatch a chord's callback ran out, and another process has it now: do not dispatch."""


class IncompleteStream(AioResultError):
    """A tree of results was walked while part of it had not finished; pass ``intermediate=True`` to allow that."""


class CyclicResultError(AioResultError, ValueError):
    """Stored results refer to each other in a circle, or nest deeper than any real workflow."""


class TaskError(AioResultError):
    """What became of a task, as opposed to what became of the attempt to read it."""


class RemoteError(TaskError):
    """The exception of a task whose class is not imported here, or cannot be used here.

    Each such class gets a subclass of its own, which carries the original's name and module. A note (PEP 678), which
    every traceback shows, says why it is a stand-in and what to do. Usually that is to import the module that defines
    the class before awaiting: then the original class is raised instead. The stand-in for an exception group is an
    `ExceptionGroup`, too.

    A task may have stored something else in place of an exception, such as a dict passed to Celery's
    ``update_state("FAILURE", meta={…})``. Then that value is ``args[0]``.
    """

    #: What is stored in place of the exception, as data: the mapping that describes it, or any other value. ``None`` if
    #: nothing was stored, or if a pickled exception was. Do not change it: it may belong to several readers.
    stored: Any = None
    #: The text of an exception that has no arguments to make one of.
    _text: str = ""

    def __str__(self) -> str:
        return super().__str__() if self.args else self._text


class TaskRevokedError(TaskError):
    """The task was revoked before or while it ran."""


class ChordError(TaskError):
    """A part of a chord failed; ``__cause__`` is the exception of that part."""


class RemoteTraceback(Exception):
    """Carries the worker's traceback, as text, to where the exception is raised again."""

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else ""
        return f"\n{text.rstrip()}"
