"""For services that have a Celery app: its results, awaited.

::

    backend = aioresult.celery.backend_from_app(app)          # in the lifespan: async with backend
    value = await backend.result(add.delay(2, 2).id)
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, cast
from urllib.parse import parse_qsl, urlencode

from celery import Celery, maybe_signature
from celery.exceptions import ChordError as CeleryChordError
from celery.result import EagerResult as CeleryEagerResult
from celery.result import ResultBase as CeleryResultBase
from celery.result import ResultSet as CeleryResultSet

from .backends.base import Backend
from .backends.keyvalue import KeyValueStoreBackend
from .chord import ReadyChord
from .eager import EagerResult
from .exceptions import ImproperlyConfigured, UsageError
from .registry import by_url, connect
from .result import AsyncResult, GroupResult, ResultBase, ResultSet

__all__ = ["backend_from_app", "dispatch", "result_from_celery"]

#: Celery allows content types where it allows names.
_CONTENT_TYPES = {
    "application/json": "json",
    "application/x-python-serialize": "pickle",
    "application/x-msgpack": "msgpack",
}
_SERIALIZERS = frozenset(_CONTENT_TYPES.values())


def backend_from_app(app: Celery, **options: Any) -> Backend:
    """A backend, not yet open, that reads and writes what the app's own result backend does.

    Taken over are ``result_backend``, ``result_expires``, ``result_serializer``, ``result_accept_content`` (or
    ``accept_content``), ``result_extended``; for Redis ``result_compression``, ``result_failure_expires``,
    ``redis_backend_use_ssl`` and the ``global_keyprefix`` among the transport options, for PostgreSQL
    ``database_table_schemas`` and ``database_table_names``. ``options`` are those of `aioresult.connect` and take
    precedence.

    :raises ImproperlyConfigured: the app has no result backend, or one that this library has not.
    """
    conf = app.conf
    url = app.backend_cls or conf.result_backend
    if not isinstance(url, str) or url.startswith("disabled"):
        raise ImproperlyConfigured(f"the Celery app {app.main!r} has no result backend; set result_backend to a URL")
    expires, accept = conf.result_expires, conf.result_accept_content
    taken: dict[str, Any] = {
        "expires": expires.total_seconds() if isinstance(expires, timedelta) else expires,
        "serializer": conf.result_serializer,
        "accept": _known(conf.accept_content if accept is None else accept),
        "extended": bool(conf.result_extended),
    }
    url = _with_tls(url, conf.redis_backend_use_ssl)
    backend_class, _ = by_url(url)
    if issubclass(backend_class, KeyValueStoreBackend):
        taken["compression"] = conf.result_compression  # these two Celery ignores in a database
        taken["failure_expires"] = conf.get("result_failure_expires")  # since 5.7
        if prefix := (conf.result_backend_transport_options or {}).get("global_keyprefix"):
            taken["global_keyprefix"] = prefix
    else:
        taken.update(_tables(conf.database_table_schemas or {}, conf.database_table_names or {}))
    return connect(url, **{**taken, **options})


def result_from_celery(result: Any, backend: Backend) -> ResultBase:
    """A handle of ours for one of Celery's: what ``delay``, ``apply_async`` or a canvas returned.

    Parents, members, eager results and ``ignore_result`` are kept. No I/O.

    :raises UsageError: it is no result of Celery's.
    """
    if not isinstance(result, CeleryResultBase):
        raise UsageError(f"{result!r} is not a result of Celery's")
    chain = [result]
    while chain[-1].parent is not None:
        chain.append(chain[-1].parent)
    ours: ResultBase | None = None
    for each in reversed(chain):  # not by recursion: a chain may be longer than the stack
        ours = _handle(each, ours, backend)
    return cast("ResultBase", ours)


def _handle(result: Any, parent: ResultBase | None, backend: Backend) -> ResultBase:
    if isinstance(result, CeleryResultSet):
        members = [result_from_celery(member, backend) for member in result.results]
        group_id = getattr(result, "id", None)
        return ResultSet(members) if group_id is None else GroupResult(group_id, members, parent, backend)
    if isinstance(result, CeleryEagerResult):
        eager = EagerResult[Any](result.id, result.result, result.state, result.traceback)
        eager.parent = parent
        return eager
    return AsyncResult[Any](result.id, backend, parent, ignored=bool(result.ignored))


async def dispatch(ready: ReadyChord, app: Celery) -> None:
    """Publish the body of a Celery chord with its results; if a part failed, fail the body as a worker would.

    To be called inside ``async with ready``, or given to `aioresult.connect` (with the app bound by
    `functools.partial`) as ``on_chord_ready``. Celery's publishing blocks, so it is done in a thread.
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


def _tables(schemas: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """Celery's settings for the names of its tables, as options of the PostgreSQL backend."""
    if len({schemas.get("task"), schemas.get("group")}) > 1:
        raise ImproperlyConfigured("database_table_schemas names two schemas; both tables must be in one")
    found = {"schema": schemas.get("task"), "table": names.get("task"), "group_table": names.get("group")}
    return {option: name for option, name in found.items() if name is not None}


def _known(accept: Iterable[str]) -> list[str]:
    """The names of those of Celery's serializers that this library has; a result in another raises when it is read."""
    names = (_CONTENT_TYPES.get(name, name) for name in accept)
    return [name for name in names if name in _SERIALIZERS]


def _with_tls(url: str, settings: Mapping[str, Any] | None) -> str:
    """``redis_backend_use_ssl``, which Celery has beside the URL, as a part of it. The URL's own query goes before."""
    scheme, _, rest = url.partition("://")
    if not settings or scheme not in ("redis", "rediss"):
        return url
    base, _, query = rest.partition("?")
    tls = {name: value for name, value in settings.items() if value is not None}
    if isinstance(requirement := tls.get("ssl_cert_reqs"), int):
        tls["ssl_cert_reqs"] = ssl.VerifyMode(requirement).name
    return f"rediss://{base}?{urlencode({**tls, **dict(parse_qsl(query))})}"
