"""Await the results of a Celery app's tasks, in services that have the app.

::

    backend = aioresult.celery.backend_from_app(app)          # in the lifespan: async with backend
    value = await backend.result(add.delay(2, 2))
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack, cast
from uuid import uuid4

from celery import Celery, maybe_signature
from celery.exceptions import ChordError as CeleryChordError
from celery.utils.imports import load_extension_class_names

from .backends.base import Backend
from .chord import ReadyChord
from .exceptions import ImproperlyConfigured, UsageError
from .foreign import from_celery, is_celerys, not_a_handle
from .log import CLOSED, Flush
from .output import Keep, Kept, joined
from .registry import BACKEND_ALIASES, ConnectOptions, connect
from .remedies import kind_of
from .result import AsyncResult, ResultBase
from .serialization import Codec
from .settings import backend_options, backend_url, stand_in

if TYPE_CHECKING:
    from .celery_cluster import ClusterBackend

__all__ = ["ClusterBackend", "TaskOutput", "backend_from_app", "dispatch", "output", "result_from_celery", "revoke"]


def __getattr__(name: str) -> Any:
    if name == "ClusterBackend":  # needs redis-py, which other users of this module may not have
        from .celery_cluster import ClusterBackend

        return ClusterBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def backend_from_app(app: Celery, **options: Unpack[ConnectOptions]) -> Backend:
    """Make a backend that reads and writes the same results as the app's own result backend. It is not open yet.

    The backend takes over Celery's settings. docs/celery.md lists for each setting whether it is taken over, has no
    meaning here, or is refused.

    If this library does not have the app's ``result_serializer``, the backend only reads: it can read results that were
    stored with another serializer, and every call that stores raises `ImproperlyConfigured`.

    :param options: the same as for `aioresult.connect`. They take precedence over Celery's settings. For Redis, each
        entry of ``connect_options`` replaces only the setting for the same argument.
    :raises ImproperlyConfigured: the app has no result backend, or one that this library does not have, or a setting
        that cannot be taken over. The message names it, and the remedy.
    """
    name = app.backend_cls or app.conf.result_backend
    if isinstance(name, type):
        raise ImproperlyConfigured(
            f"the Celery app {app.main!r} has a result backend class of its own, {name.__qualname__}; if it stores "
            f"results in the same way as Celery's, make the backend with aioresult.connect(url)"
        )
    if not isinstance(name, str) or name.startswith("disabled"):
        raise ImproperlyConfigured(f"the Celery app {app.main!r} has no result backend; set result_backend to a URL")
    _refuse_replaced(app, name)
    scheme = name.partition("://")[0].lower()
    if scheme.endswith("+cluster") and scheme.partition("+")[0] in BACKEND_ALIASES:
        raise ImproperlyConfigured(
            f"Celery reads {scheme}:// in the result_backend of the app {app.main!r} as the URL of a single Redis; "
            f"write aioresult.celery:ClusterBackend+ before it, and the workers keep their results in the cluster"
        )
    url, taken = backend_options(app.conf, backend_url(app.conf, name), options)
    missing = None if "serializer" in options else stand_in(taken)
    backend = connect(url, **cast("ConnectOptions", taken))
    if missing is not None:
        backend.codec.write_nothing(
            f"aioresult does not support result_serializer={missing!r}, so this backend only reads; to store, "
            f"pass serializer= to backend_from_app, and add that serializer to the app's accept_content"
        )
    return backend


def _refuse_replaced(app: Celery, name: str) -> None:
    """Raise if the app or an installed package has replaced Celery's backend class of this name by another class."""
    alias = name.partition("://")[0].partition("+")[0]
    replaced = {**app.loader.override_backends, **dict(load_extension_class_names("celery.result_backends"))}
    if alias in BACKEND_ALIASES and alias in replaced:
        raise ImproperlyConfigured(
            f"result_backend {alias!r} of the Celery app {app.main!r} is {replaced[alias]!r}, not Celery's own; if it "
            f"stores results in the same way, make the backend with aioresult.connect(url)"
        )


def result_from_celery(result: Any, backend: Backend) -> ResultBase:
    """Make a handle of this library from a result of Celery's: what ``delay``, ``apply_async`` or a canvas returned.

    The handle keeps parents, members, eager results and ``ignore_result``. No I/O. For a single result,
    ``backend.result(result)`` does the same; for a group, ``backend.group(result)`` does.

    :raises UsageError: ``result`` is not a result of Celery's.
    """
    if is_celerys(result):
        return from_celery(result, backend)
    if isinstance(result, ResultBase):
        raise UsageError(f"{kind_of(result)} is a handle of aioresult already; use it as it is")
    raise UsageError(f"{kind_of(result)} is not a result of Celery's; for an id use backend.result(id)")


async def dispatch(ready: ReadyChord, app: Celery) -> None:
    """Send the callback of a Celery chord to the queue, with the results of the header.

    If a task of the header failed, this fails the callback, as a worker of Celery does. Call it inside
    ``async with ready``. Or pass it to `aioresult.connect` as ``on_chord_ready``, with the app bound by
    `functools.partial`. Publishing blocks in Celery, so it runs in a thread.
    """
    await asyncio.to_thread(_publish, ready, app)


def _publish(ready: ReadyChord, app: Celery) -> None:
    callback = maybe_signature(ready.body, app=app)
    if ready.error is None:
        callback.delay(ready.results)
        return
    try:
        raise CeleryChordError(str(ready.error)) from ready.error.__cause__
    except CeleryChordError as exc:
        app.backend.chord_error_from_stack(callback, exc)


async def revoke(
    result: AsyncResult[Any], app: Celery, reason: str = "", *, terminate: bool = False, signal: str = "SIGTERM"
) -> bool:
    """Revoke a task with `AsyncResult.revoke`, and ask Celery's workers to drop the task, too.

    Celery's workers do not see the revocations of this library, so this also sends Celery's own broadcast. A worker
    drops a task that still waits in the queue when its turn comes. A running task goes on, unless ``terminate`` is set:
    then the worker ends the pool process that runs it with ``signal``. The broadcast blocks, so it is sent from a
    thread. A worker that is not connected does not receive it.

    :returns: false if the task had succeeded or failed before. Then Celery's workers are not asked.
    """
    if not isinstance(result, AsyncResult):
        raise UsageError(not_a_handle(result))
    asked = await result.revoke(reason)
    if asked:
        await asyncio.to_thread(app.control.revoke, result.id, terminate=terminate, signal=signal)
    return asked


def output(task: Any, *, keep: Keep | None = None) -> TaskOutput:
    """Open the output of a Celery task from within the task. Readers get it with `AsyncResult.stream`.

    ::

        @app.task(bind=True)
        def answer(self, prompt):
            with aioresult.celery.output(self) as out:
                for token in model(prompt):
                    out.send(token)

    It uses the Redis client of the app's own result backend, and the keys of `aioresult.backends.redis`. The worker has
    no lease, so this library does not notice its death: if it is killed, readers wait for the next attempt.

    :param task: the bound task.
    :param keep: how much of the output is kept; see `aioresult.Backend.output`.
    :raises ImproperlyConfigured: the app does not keep its results in Redis, or in a cluster with `ClusterBackend`.
    """
    backend = task.app.backend
    known = ("celery.backends.redis", "aioresult.celery_cluster")
    if not hasattr(backend, "client") or not type(backend).__module__.startswith(known):
        raise ImproperlyConfigured(
            f"the output of a Celery task needs Celery's Redis result backend, or {__name__}.ClusterBackend, but the "
            f"app {task.app.main!r} has {type(backend).__name__}; an asyncio worker can use backend.output(task_id) "
            f"with any backend"
        )
    return TaskOutput(backend, task.request.id, keep)


class TaskOutput:
    """The output of one Celery task; see `output`. Each `send` is one round trip, after which readers are notified."""

    def __init__(self, backend: Any, task_id: str, keep: Keep | None = None) -> None:
        from .backends.redis.sync import flush_now  # needs the driver that the app's own backend has imported

        self.task_id: str = task_id
        self._flush_now = flush_now
        self._client = backend if hasattr(backend, "run") else backend.client  # `ClusterBackend` executes by itself
        self._key: str = backend.get_key_for_task(task_id).decode("utf-8", "surrogateescape")
        self._expires = float(backend.expires or 0)
        self._codec = Codec()
        self._kept = Kept(keep)
        self._writer = uuid4().hex
        self._epoch = self._sent = 0
        self._closed = False

    def send(self, *chunks: Any) -> None:
        """Send one chunk or several. A chunk is any value that JSON can hold.

        When this returns, the chunks are stored, and the readers have been notified.

        :raises EncodeError: JSON cannot hold a chunk.
        :raises OutputSuperseded: another attempt of the task writes the output. Stop this attempt.
        :raises Exception: any error of redis-py. The chunks may have been stored.
        """
        if self._closed:
            raise UsageError(f"the output of task {self.task_id} was closed")
        data = [self._codec.dumps_chunk(chunk, f"a chunk of the output of task {self.task_id}") for chunk in chunks]
        if data:
            last = self._sent + len(data)
            keep_from = self._kept.note(last, len(data), sum(map(len, data)))
            self._flush(last, joined(data), "", keep_from)
            self._sent = last

    def close(self) -> None:
        """End the output: its readers stop. You may call this again."""
        if not self._closed:
            self._flush(self._sent + 1, b"", CLOSED, 0)
            self._closed = True

    def _flush(self, last: int, data: bytes, state: str, keep_from: int) -> None:
        flush = Flush(self.task_id, self._writer, self._epoch, last, data, state, keep_from, self._expires)
        self._epoch = self._flush_now(self._client, self._key, flush)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc is None:
            self.close()  # after an exception, the end of the task ends the output, or its next attempt writes it again
