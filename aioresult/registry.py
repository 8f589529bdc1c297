"""Finds backends by name and by URL. A backend's module and its driver are imported only when the backend is used."""

from __future__ import annotations

import importlib
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypedDict, Unpack, cast

from .backends.base import Backend, BackendOptions
from .exceptions import ImproperlyConfigured
from .options import UnknownOption, did_you_mean, option_names, unknown_options
from .seconds import Seconds
from .urls import show_malformed

if TYPE_CHECKING:
    import asyncpg

    from .backends.memory import MemoryStore

__all__ = ["BACKEND_ALIASES", "ConnectOptions", "by_name", "by_url", "connect"]

#: The entry-point group in which other packages announce their backends: ``name = "module:Class"``.
ENTRY_POINTS: Final = "aioresult.backends"

BACKEND_ALIASES: Final = {
    "memory": "aioresult.backends.memory:MemoryBackend",
    "redis": "aioresult.backends.redis:RedisBackend",
    "rediss": "aioresult.backends.redis:RedisBackend",
    "valkey": "aioresult.backends.redis:RedisBackend",
    "valkeys": "aioresult.backends.redis:RedisBackend",
    "unix": "aioresult.backends.redis:RedisBackend",
    "socket": "aioresult.backends.redis:RedisBackend",
    "redis+cluster": "aioresult.backends.redis:ClusterBackend",
    "rediss+cluster": "aioresult.backends.redis:ClusterBackend",
    "valkey+cluster": "aioresult.backends.redis:ClusterBackend",
    "valkeys+cluster": "aioresult.backends.redis:ClusterBackend",
    "sentinel": "aioresult.backends.redis:SentinelBackend",
    "redis+sentinel": "aioresult.backends.redis:SentinelBackend",
    "rediss+sentinel": "aioresult.backends.redis:SentinelBackend",
    "valkey+sentinel": "aioresult.backends.redis:SentinelBackend",
    "valkeys+sentinel": "aioresult.backends.redis:SentinelBackend",
    "postgresql": "aioresult.backends.postgres:PostgresBackend",
    "postgres": "aioresult.backends.postgres:PostgresBackend",
}

#: The package of a driver → the extra of this library that installs the package.
_EXTRAS: Final = {"redis": "redis", "hiredis": "redis", "asyncpg": "postgres"}
#: The names of backends that Celery has and this library lacks. The error for such a name says so.
_CELERY_ONLY: Final = frozenset(
    [
        "rpc",
        "amqp",
        "mongodb",
        "elasticsearch",
        "cache",
        "cassandra",
        "couchbase",
        "couchdb",
        "cosmosdbsql",
        "riak",
        "disabled",
        "file",
        "filesystem",
        "consul",
        "dynamodb",
        "azureblockblob",
        "arangodb",
        "s3",
        "gs",
        "memcache",
        "memcached",
        "dummy",
        "django-db",
        "django-cache",
        "pymemcache",
        "pylibmc",
        "db",
        "database",
        "sqlite",
        "mysql",
        "mariadb",
        "mssql",
        "oracle",
    ]
)
#: The name of a backend that this library lacks → what to do instead.
_INSTEAD: Final = {
    "django-db": "if that database is PostgreSQL, pass its own URL with table='django_celery_results_taskresult'",
}
#: A word in a scheme that is unknown → what to write.
_WRITE: Final = {
    "cluster": "write redis+cluster://host1:6379,host2:6379, or rediss+cluster:// for TLS",
    "sentinel": "write redis+sentinel://host1:26379,host2:26379/name-of-the-master/0, or rediss+sentinel:// for TLS",
}
_NOT_HERE: Final = _CELERY_ONLY | _WRITE.keys()

#: Matches a URL without its scheme: a host, perhaps with a port and a path.
_HOST: Final = re.compile(r"(?:localhost|\d[\d.]*|\[[0-9a-fA-F:.]+\]|[\w.-]+(?=:\d))(?::\d+)?(?:/\w*)?")


class _MemoryOptions(TypedDict, total=False):
    store: MemoryStore | None


class _KeyValueOptions(TypedDict, total=False):
    global_keyprefix: str


class _RedisOptions(TypedDict, total=False):
    chord_ordered: bool


class _RemapOptions(TypedDict, total=False):
    address_remap: Mapping[Any, Any] | Callable[[tuple[str, int]], tuple[str, int]] | None


class _ClusterOptions(TypedDict, total=False):
    topology_refresh: Seconds


class _SentinelOptions(TypedDict, total=False):
    master_name: str | None
    sentinel_kwargs: Mapping[str, Any] | None
    min_other_sentinels: int


class _ServerOptions(TypedDict, total=False):
    connect_options: Mapping[str, Any] | None


class _PostgresOptions(TypedDict, total=False):
    schema: str | None
    table: str | None
    group_table: str | None
    create: bool | None
    listen_dsn: str | None
    pool: asyncpg.Pool[Any] | None
    connect: Callable[[], Awaitable[asyncpg.Connection[Any]]] | None
    durable_output: bool
    cleanup_interval: float


class ConnectOptions(
    BackendOptions,
    _MemoryOptions,
    _KeyValueOptions,
    _RedisOptions,
    _RemapOptions,
    _ClusterOptions,
    _SentinelOptions,
    _ServerOptions,
    _PostgresOptions,
    total=False,
):
    """The options of `connect`: those of every backend, and those of any backend of this library.

    Use it as the type of options that your own function passes on: ``**options: Unpack[aioresult.ConnectOptions]``.
    """


#: A class with options → the schemes whose backends take them.
_SCHEMES: Final[Mapping[type, str]] = {
    _MemoryOptions: "memory://",
    _KeyValueOptions: "redis://, redis+cluster://, sentinel:// and memory://",
    _RedisOptions: "redis://, redis+cluster:// and sentinel://",
    _RemapOptions: "redis+cluster:// and sentinel://",
    _ClusterOptions: "redis+cluster://",
    _SentinelOptions: "sentinel://",
    _ServerOptions: "redis://, redis+cluster://, sentinel:// and postgresql://",
    _PostgresOptions: "postgresql://",
}


def by_name(name: str) -> type[Backend]:
    """Return the backend class for an alias (``"redis"``), an entry point, or a path (``"package.module:Class"``).

    :raises ImproperlyConfigured: there is no such backend, or its driver is not installed. The message lists the
        backends, or says how to install the driver.
    """
    path = BACKEND_ALIASES.get(name) or _announced().get(name) or name
    module_name, _, class_name = path.partition(":") if ":" in path else path.rpartition(".")[::1]
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        raise ImproperlyConfigured(_unknown(name, sorted({*BACKEND_ALIASES, *_announced()})))
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ImportError as exc:
        package = (exc.name or "").partition(".")[0]
        if package in _EXTRAS:
            which = "the package" if isinstance(exc, ModuleNotFoundError) else "a newer release of the package"
            raise ImproperlyConfigured(
                f"the backend {name!r} needs {which} {package!r}; "
                f"install it with: pip install 'aioresult-tasks[{_EXTRAS[package]}]'"
            ) from exc
        raise ImproperlyConfigured(f"the backend {name!r} cannot be imported: {exc}") from exc
    except AttributeError as exc:
        raise ImproperlyConfigured(f"the backend {name!r} cannot be imported: {exc}") from exc
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise ImproperlyConfigured(f"{path} is not a subclass of Backend")
    return found


def by_url(url: str) -> tuple[type[Backend], str]:
    """Return the backend class for ``url``, and the URL to pass to that class.

    Apart from ``scheme://…`` this function knows ``redis+cluster://…`` and ``redis+sentinel://…``, and Celery's
    ``sentinel://…;sentinel://…``, ``cache+memory://``, ``redis+socket://…``, ``database+…`` and
    ``db+postgresql+driver://…``. For any class write ``package.module:Class+scheme://…``. A text without ``://`` is a
    name for `by_name`. The case of a scheme does not matter.
    """
    if not isinstance(url, str):
        raise ImproperlyConfigured(f"the URL of a backend must be a str, not {type(url).__qualname__}")
    if "://" not in url:
        name = re.split(":|//", url, maxsplit=1)[0]
        if name != url and name.lower() in BACKEND_ALIASES:
            raise ImproperlyConfigured(f"{show_malformed(url)!r} is not a URL: write {name.lower()}://…")
        return by_name(url), f"{url}://" if url in BACKEND_ALIASES else ""
    scheme, _, rest = url.partition("://")
    path, plus, beyond = scheme.partition("+")
    if plus and (":" in path or "." in path):
        return by_name(path), f"{beyond}://{rest}"
    if scheme != scheme.lower() and scheme.partition("+")[0] not in _announced():
        scheme = scheme.lower()
    words = scheme.split("+")
    if len(words) > 1 and words[0] in ("cache", "db", "database"):  # Celery's name for the family of backends
        words = words[1:]
    scheme = "+".join(words)
    if scheme in BACKEND_ALIASES:
        return by_name(scheme), f"{scheme}://{rest}"
    if words[0] in BACKEND_ALIASES and not _NOT_HERE.isdisjoint(words[1:]):  # as in redis+mongodb://
        raise ImproperlyConfigured(_unknown(scheme, sorted({*BACKEND_ALIASES, *_announced()})))
    return by_name(words[0]), f"{scheme}://{rest}"


def connect(url: str, **options: Unpack[ConnectOptions]) -> Backend:
    """Make the backend for ``url``: ``async with aioresult.connect("redis://localhost/0") as backend:``.

    The backend is not open yet: the call does no I/O, and ``async with`` opens the backend.

    `ConnectOptions` has the options of all backends of this library. `aioresult.backends.base.Backend` describes the
    options of every backend, and the class of each backend describes its own. A backend of another package may take
    further options here. A type checker knows them only if you call the class of that backend instead.

    :raises ImproperlyConfigured: the URL, an option or the installation is wrong. The message says what to change.
    """
    backend_class, backend_url = by_url(url)
    make = cast("Callable[..., Backend]", backend_class)
    try:
        return make(backend_url, **options)
    except TypeError as exc:
        # A class of another package may take more options than its signature has, and another call may have raised it.
        unknown = options.keys() - option_names(backend_class)
        named = {name for name in unknown if re.search(rf"(option|unexpected keyword argument) '{name}'", str(exc))}
        if not named:
            raise
        if isinstance(exc, UnknownOption):
            unknown = named
    scheme, separator, _ = backend_url.partition("://")
    alias = scheme if scheme in BACKEND_ALIASES else scheme.partition("+")[0]
    here = f"{alias}://" if separator else backend_class.__name__
    raise ImproperlyConfigured(unknown_options(backend_class, unknown, _owners(unknown, here)))


def _owners(names: Iterable[str], here: str) -> dict[str, str]:
    """Return a sentence for each option in ``names`` that belongs to another backend. It names that backend."""
    return {
        name: f"the option {name!r} belongs to {schemes}, not to {here}."
        for kind, schemes in _SCHEMES.items()
        for name in kind.__annotations__.keys() & set(names)
    }


def _announced() -> dict[str, str]:
    """Return the backends that other packages announce: the name → the path of the class."""
    from importlib.metadata import entry_points  # imported here, because that is slow and seldom needed

    return {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}


def _unknown(name: str, known: list[str]) -> str:
    if _HOST.fullmatch(name) or ("@" in name and ":/" not in name):
        scheme = "postgresql" if ":5432" in name else "redis"
        return f"{show_malformed(name)!r} is not a URL: write {scheme}://{show_malformed(name)}"
    message, listed = f"unknown result backend {show_malformed(name)!r}", ", ".join(known)
    words = set(name.split("+"))
    if found := words & _WRITE.keys():
        return f"{message}: {_WRITE[min(found)]}"
    if found := words & _CELERY_ONLY:
        instead = "".join(f"; {_INSTEAD[word]}" for word in sorted(found & _INSTEAD.keys()))
        return f"{message}; known here are {listed}. Celery has a backend of that name; aioresult has none{instead}"
    if meant := did_you_mean(name, known):
        return f"{message}{meant} Known here are {listed}"
    return (
        f"{message}; known here are {listed}; another package can add one by an entry point in the group "
        f"{ENTRY_POINTS!r}, and a class of your own is named as 'package.module:Class'"
    )
