"""Turns the settings of a Celery app into the URL and the options of a backend that shares the app's results.

docs/celery.md lists every Celery setting for result backends, and what this library does with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Final, Protocol

from .backends.keyvalue import KeyValueStoreBackend
from .exceptions import ImproperlyConfigured
from .registry import by_url

__all__ = ["Settings", "backend_options", "backend_url", "stand_in"]

#: Content type → serializer. Celery accepts content types in place of the names of serializers.
_CONTENT_TYPES: Final = {
    "application/json": "json",
    "application/x-python-serialize": "pickle",
    "application/x-msgpack": "msgpack",
}
#: The serializers that this library has.
_SERIALIZERS: Final = frozenset(_CONTENT_TYPES.values())

#: Setting → the argument of redis-py's connection that it sets, unless the URL sets it.
_OF_REDIS: Final = {
    "redis_host": "host",
    "redis_port": "port",
    "redis_username": "username",
    "redis_password": "password",
    "redis_client_name": "client_name",
    "redis_socket_connect_timeout": "socket_connect_timeout",
    "redis_socket_keepalive": "socket_keepalive",
    "redis_backend_credential_provider": "credential_provider",
}
#: The class that keeps the results of Celery's workers in a cluster, before the URL of the cluster.
_FOR_WORKERS: Final = re.compile(r"aioresult\.celery(?:_cluster)?[.:]ClusterBackend\+")
#: Keys of ``result_backend_transport_options`` that are options of the backend for Sentinel.
_OF_SENTINEL: Final = ("master_name", "sentinel_kwargs", "min_other_sentinels")
#: The arguments that a connection through a unix socket does not take.
_OF_TCP: Final = frozenset({"host", "port", "socket_connect_timeout", "socket_keepalive"})


class Settings(Protocol):
    """What this module needs of ``app.conf``."""

    def get(self, name: str, default: Any = None, /) -> Any: ...


def backend_url(conf: Settings, name: str) -> str:
    """Return the URL of the result backend ``name``, which is a URL or an alias of Celery's.

    The class for Celery's workers on a cluster is left out.
    """
    if found := _FOR_WORKERS.match(name):
        return name[found.end() :]
    if name in ("db", "database"):
        url = conf.get("database_url")
        if not isinstance(url, str) or "://" not in url:
            raise ImproperlyConfigured(f"result_backend={name!r} needs database_url; set it to the URL of the database")
        return f"db+{url}"
    return name


def backend_options(conf: Settings, url: str, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Complete ``url`` with the settings that belong in it, and make the options for `aioresult.connect`.

    The options in ``given`` take precedence over the settings.

    :raises ImproperlyConfigured: a setting cannot be taken over. The error names it and says what to do.
    """
    backend_class, _ = by_url(url)
    modules = {each.__module__ for each in backend_class.__mro__}
    key_value = issubclass(backend_class, KeyValueStoreBackend)
    accept = conf.get("result_accept_content")
    transport = conf.get("result_backend_transport_options") or {}
    taken: dict[str, Any] = {
        "expires": _seconds(conf, "result_expires", key_value),
        "serializer": conf.get("result_serializer"),
        "accept": _known(conf.get("accept_content") if accept is None else accept),
        "extended": bool(conf.get("result_extended")),
    }
    if key_value:  # Celery ignores these settings if the backend is a database
        taken["compression"] = conf.get("result_compression")
        taken["failure_expires"] = _seconds(conf, "result_failure_expires", key_value)  # since Celery 5.7
        taken["chord_expires"] = _seconds(conf, "result_chord_expires", key_value)  # since Celery 5.7
        if prefix := transport.get("global_keyprefix"):
            taken["global_keyprefix"] = prefix
    if "aioresult.backends.redis.backend" in modules:
        kinds = by_url(url)[1].partition("://")[0].split("+")
        if "sentinel" in kinds or "cluster" in kinds:
            url, connecting = _several_hosts(conf, url)
        else:
            url, connecting = _redis(conf, url)
        if "sentinel" in kinds:
            taken |= {name: value for name in _OF_SENTINEL if (value := transport.get(name)) is not None}
        if "cluster" in kinds and transport.get("address_remap") is not None:
            taken["address_remap"] = transport["address_remap"]
        if not transport.get("result_chord_ordered", True):
            taken["chord_ordered"] = False
        if connecting or "connect_options" in given:
            taken["connect_options"] = {**connecting, **(given.get("connect_options") or {})}
            given = {name: value for name, value in given.items() if name != "connect_options"}
    elif "aioresult.backends.postgres.backend" in modules:
        url = _postgres(conf, url, given)
        taken["count_requests"] = False  # Celery counts the parts of a chord with its task ``celery.chord_unlock``
        taken["table"] = "celery_taskmeta"  # even if only Django's table exists now, and Celery creates its own later
        taken |= _tables(conf.get("database_table_schemas") or {}, conf.get("database_table_names") or {})
    return url, {**taken, **given}


def stand_in(options: dict[str, Any]) -> str | None:
    """Replace the serializer in ``options`` with an accepted one if this library lacks it, so that reading works.

    Returns the name of the missing serializer, or ``None`` if none is missing.
    """
    name, accept = options["serializer"], options["accept"]
    options["accept"] = accept = [accept] if isinstance(accept, str) else list(accept)
    if name in _SERIALIZERS or not accept:
        return None
    options["serializer"] = "json" if "json" in accept else accept[0]
    return str(name)


def _seconds(conf: Settings, setting: str, whole: bool) -> float | None:
    """Return the duration ``setting`` in seconds; ``None`` if it is not set.

    If ``whole`` is true, it is cut to whole seconds, as Celery does.
    """
    value = conf.get(setting)
    if isinstance(value, timedelta):
        value = value.total_seconds()
    try:
        return None if value is None else int(value) if whole else float(value)
    except (TypeError, ValueError, OverflowError):
        raise ImproperlyConfigured(f"{setting} must be a number of seconds or a timedelta, not {value!r}") from None


def _known(accept: Iterable[str]) -> list[str]:
    """Return those accepted serializers that this library has. Reading a result of any other one raises an error."""
    names = (_CONTENT_TYPES.get(name, name) for name in accept)
    return [name for name in names if name in _SERIALIZERS]


# -- Redis ----------------------------------------------------------------------------------------------------------


def _redis(conf: Settings, url: str) -> tuple[str, dict[str, Any]]:
    """Return the URL, and the connection arguments that the URL lacks.

    If the settings ask for TLS, the URL gets the scheme for TLS. This follows ``RedisBackend.__init__`` in
    ``celery/backends/redis.py`` (5.7). docs/celery.md lists all settings of that backend.
    """
    from .backends.redis.url import url_options  # needs redis-py, which `by_url` has imported already

    named_only = "://" not in url
    scheme, _, rest = (f"{url}://" if named_only else url).partition("://")
    prefix, plus, last = scheme.rpartition("+")
    last = last.lower()
    socket = last in ("socket", "unix")
    wanted = _wanted(conf, _OF_TCP if socket else frozenset())
    if named_only or socket:  # otherwise Celery takes the number only from the URL's path; without a path it is 0
        wanted["db"] = conf.get("redis_db") or 0
        wanted = _typed(wanted)
    if tls := conf.get("redis_backend_use_ssl"):
        if socket:
            raise ImproperlyConfigured("redis_backend_use_ssl is set, but a unix socket has no TLS; remove the setting")
        last = "rediss"
        if isinstance(tls, Mapping):
            wanted |= {name: value for name, value in tls.items() if value is not None}
    url = f"{prefix}{plus}{last}://{rest}"
    try:
        present = url_options(by_url(url)[1])
    except ValueError:
        return url, {}  # the backend itself raises the error about the URL
    return url, _lacking(wanted, present)


def _several_hosts(conf: Settings, url: str) -> tuple[str, dict[str, Any]]:
    """Return the URL of a cluster or of sentinels, and the connection arguments that the URL lacks.

    This follows ``SentinelBackend`` in ``celery/backends/redis.py`` (5.7): ``redis_host`` and ``redis_port`` complete
    the sentinels' addresses, and all other settings are for the master. ``redis_db`` has no effect.
    """
    from redis.asyncio.connection import SSLConnection

    from .backends.redis.places import options_in, with_celerys_defaults

    wanted = _wanted(conf, frozenset())
    host, port = wanted.pop("host", "localhost"), wanted.pop("port", 6379)
    if tls := conf.get("redis_backend_use_ssl"):
        wanted["connection_class"] = SSLConnection
        if isinstance(tls, Mapping):
            wanted |= {name: value for name, value in tls.items() if value is not None}
    _, passed = by_url(url)
    backend = url.removesuffix(passed) if url.endswith(passed) else ""  # the path of a class
    url = f"{backend}{with_celerys_defaults(passed, host, port)}"
    try:
        present = options_in(by_url(url)[1])
    except (ImproperlyConfigured, ValueError):
        return url, {}  # the backend itself raises the error about the URL
    return url, _lacking(wanted, present)


def _wanted(conf: Settings, without: frozenset[str]) -> dict[str, Any]:
    """Return the connection arguments that the settings give."""
    wanted = {argument: conf.get(setting) for setting, argument in _OF_REDIS.items()}
    return _typed({name: value for name, value in wanted.items() if value and name not in without})


def _lacking(wanted: dict[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of ``wanted`` is not in ``present``. A credential provider replaces the user and the password."""
    if "credential_provider" in {**wanted, **present}:
        wanted = {name: value for name, value in wanted.items() if name not in ("username", "password")}
    return {name: value for name, value in wanted.items() if name not in present}


def _typed(wanted: dict[str, Any]) -> dict[str, Any]:
    """Convert texts to numbers: a setting from the environment may be text."""
    for setting, name, number in (
        ("redis_port", "port", int),
        ("redis_db", "db", int),
        ("redis_socket_connect_timeout", "socket_connect_timeout", float),
    ):
        if name in wanted:
            try:
                wanted[name] = number(wanted[name])
            except (TypeError, ValueError):
                raise ImproperlyConfigured(f"{setting} must be a number, not {wanted[name]!r}") from None
    return wanted


# -- PostgreSQL -----------------------------------------------------------------------------------------------------


def _postgres(conf: Settings, url: str, given: Mapping[str, Any]) -> str:
    """Return the URL with the ``connect_args`` of the app's engine.

    An app may also connect with its own code. Then this raises an error, unless the caller passes ``connect``, ``pool``
    or ``connect_options``.
    """
    from .backends.postgres.dsn import with_connect_args

    engine = conf.get("database_engine_options") or {}
    code = [f"database_engine_options[{name!r}]" for name in ("creator", "pool") if engine.get(name) is not None]
    if "schema_translate_map" in (engine.get("execution_options") or {}):
        code.append("database_engine_options['execution_options']['schema_translate_map']")
    if conf.get("database_engine_callback") is not None:  # since Celery 5.7
        code.append("database_engine_callback")
    if code and not given.keys() & {"connect", "pool", "connect_options"}:
        raise ImproperlyConfigured(
            f"{' and '.join(code)} cannot be taken over, and may change where the app connects, or as which user; pass "
            f"connect= or pool= to do the same here, or connect_options={{}} if the URL alone is enough"
        )
    if given.keys() & {"connect", "pool"}:
        return url  # the caller's connections are used, not the URL
    return with_connect_args(url, engine.get("connect_args") or {})


def _tables(schemas: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """Return Celery's settings for the names of its tables, as options of the PostgreSQL backend."""
    if len({schemas.get("task"), schemas.get("group")}) > 1:
        raise ImproperlyConfigured(
            "database_table_schemas names two schemas, but both tables must be in one; move one of them with "
            "ALTER TABLE … SET SCHEMA, and name the same schema for 'task' and 'group'"
        )
    found = {"schema": schemas.get("task"), "table": names.get("task"), "group_table": names.get("group")}
    return {option: name for option, name in found.items() if name is not None}
