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
    "RemoteError",
    "RemoteTraceback",
    "ResultTooLargeError",
    "SerializationError",
    "TaskError",
    "TaskRevokedError",
    "TimeoutError",
    "UsageError",
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
    """The value cannot be stored. Raised to whoever stores it; names the type and the task."""


class DecodeError(SerializationError, ValueError):
    """The stored bytes cannot be read. Raised to those who wait for that id, and to nobody else."""


class ContentDisallowed(DecodeError):
    """The stored bytes are of a serializer that this reader did not list in ``accept``."""


class ResultTooLargeError(SerializationError):
    """The result, as bytes and after decompression, is larger than ``max_result_size``."""


class TimeoutError(AioResultError, builtins.TimeoutError):
    """The caller's deadline passed. The task goes on; wait for it again at any time."""


class ChordClaimLost(AioResultError):
    """The claim to dispatch a chord's callback ran out, and another process has it now: do not dispatch."""


class IncompleteStream(AioResultError):
    """A tree of results was walked while part of it had not finished; pass ``intermediate=True`` to allow that."""


class CyclicResultError(AioResultError, ValueError):
    """Stored results refer to each other in a circle, or nest deeper than any real workflow."""


class TaskError(AioResultError):
    """What became of a task, as opposed to what became of the attempt to read it."""


class RemoteError(TaskError):
    """The exception of a task whose class is not imported here.

    Each such class gets a subclass of its own, which carries the original's name and module. Import the module that
    defines the class before awaiting, and the original class is raised instead.
    """


class TaskRevokedError(TaskError):
    """The task was revoked before or while it ran."""


class ChordError(TaskError):
    """A part of a chord failed; ``__cause__`` is the exception of that part."""


class RemoteTraceback(Exception):
    """Carries the worker's traceback, as text, to where the exception is raised again."""

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else ""
        return f"\n{text.rstrip()}"
