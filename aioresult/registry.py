"""Backends by name and by URL. A backend's module, and the driver it needs, is imported when it is named."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, Final

from .backends.base import Backend, BackendOptions
from .exceptions import ImproperlyConfigured
from .urls import hide_password

__all__ = ["BACKEND_ALIASES", "by_name", "by_url", "connect"]

#: The entry-point group in which other distributions announce theirs: ``name = "module:Class"``.
ENTRY_POINTS: Final = "aioresult.backends"

BACKEND_ALIASES: Final = {
    "memory": "aioresult.backends.memory:MemoryBackend",
    "redis": "aioresult.backends.redis:RedisBackend",
    "rediss": "aioresult.backends.redis:RedisBackend",
    "unix": "aioresult.backends.redis:RedisBackend",
    "socket": "aioresult.backends.redis:RedisBackend",
    "postgresql": "aioresult.backends.postgres:PostgresBackend",
    "postgres": "aioresult.backends.postgres:PostgresBackend",
}

#: Driver → the extra that installs it.
_EXTRAS: Final = {"redis": "redis", "hiredis": "redis", "asyncpg": "postgres"}
#: What Celery has and this library has not, so that the error can say so.
_CELERY_ONLY: Final = frozenset(
    [
        "rpc",
        "amqp",
        "sentinel",
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
#: … and what to do instead.
_INSTEAD: Final = {
    "django-db": "if that database is PostgreSQL, pass its own URL with table='django_celery_results_taskresult'",
    "sentinel": "pass the URL of the master, or of a proxy that follows it",
    "cluster": "pass the URL of a Redis that is not part of a cluster",  # nor has Celery one for that
}
_NOT_HERE: Final = _CELERY_ONLY | _INSTEAD.keys()


def by_name(name: str) -> type[Backend]:
    """The backend class for an alias (``"redis"``), an entry point, or a path (``"package.module:Class"``).

    :raises ImproperlyConfigured: there is none, or its driver is not installed; says what there is and how to get it.
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
        raise ImproperlyConfigured(f"{path} is not a Backend class")
    return found


def by_url(url: str) -> tuple[type[Backend], str]:
    """The backend class for ``url``, and the URL that it takes.

    Beside ``scheme://…`` this knows Celery's ``cache+memory://``, ``redis+socket://…`` and ``db+postgresql+driver://…``
    (``database+…``, too); for any class ``package.module:Class+scheme://…``; without ``://`` the whole is a name for
    `by_name`.
    """
    if not isinstance(url, str):
        raise ImproperlyConfigured(f"the URL of a backend must be a str, not {type(url).__qualname__}")
    if "://" not in url:
        name, colon, _ = url.partition(":")
        if colon and name in BACKEND_ALIASES:
            raise ImproperlyConfigured(f"{hide_password(url)!r} is not a URL: write {name}://…")
        return by_name(url), f"{url}://" if url in BACKEND_ALIASES else ""
    scheme, _, rest = url.partition("://")
    prefix, _, last = scheme.rpartition("+")
    if ":" in prefix or "." in prefix:
        return by_name(prefix), f"{last}://{rest}"
    words = scheme.split("+")
    if len(words) > 1 and words[0] in ("cache", "db", "database"):  # Celery's name for the family of backends
        words = words[1:]
    if words[0] in BACKEND_ALIASES and not _NOT_HERE.isdisjoint(words):  # as in redis+sentinel://
        raise ImproperlyConfigured(_unknown(scheme, sorted({*BACKEND_ALIASES, *_announced()})))
    return by_name(words[0]), f"{'+'.join(words)}://{rest}"


def connect(url: str, **options: Any) -> Backend:
    """The backend for ``url``, not yet open: ``async with aioresult.connect("redis://localhost/0") as backend:``.

    ``options`` are those of the backend's class: `aioresult.backends.base.Backend` lists what all take. No I/O.

    :raises ImproperlyConfigured: the URL, an option or the installation is wrong; says what to change.
    """
    backend_class, backend_url = by_url(url)
    try:
        return backend_class(backend_url, **options)
    except TypeError as exc:
        known = _options_of(backend_class)
        unknown = [name for name in options if name not in known]
        if "unexpected keyword argument" not in str(exc) or not unknown:
            raise
        raise ImproperlyConfigured(
            "; ".join(_no_option(name, known) for name in unknown)
            + f"; see help({backend_class.__name__}) for the options it takes"
        ) from None


def _options_of(backend_class: type[Backend]) -> set[str]:
    """The names that the constructors of the class and of its bases take, and those of the options that all take."""
    known = set(BackendOptions.__annotations__)
    for cls in backend_class.__mro__:
        if "__init__" in vars(cls):
            parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
            known.update(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)
    return known


def _no_option(name: str, known: set[str]) -> str:
    from difflib import get_close_matches  # seldom needed

    similar = get_close_matches(name, known, 1)
    return f"unknown option {name!r}" + (f", did you mean {similar[0]!r}?" if similar else "")


def _announced() -> dict[str, str]:
    """The backends of other distributions: name → path."""
    from importlib.metadata import entry_points  # slow to import, and seldom needed

    return {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}


def _unknown(name: str, known: list[str]) -> str:
    shown = hide_password(name)
    message = f"unknown result backend {shown!r}; known here are {', '.join(known)}"
    if found := _NOT_HERE.intersection(name.split("+")):
        instead = "".join(f"; {_INSTEAD[word]}" for word in sorted(found & _INSTEAD.keys()))
        whose = "Celery has a backend of that name; " if found & _CELERY_ONLY else ""
        return f"{message}. {whose}aioresult has none{instead}"
    return (
        f"{message}; another package can add one by an entry point in the group {ENTRY_POINTS!r}, "
        f"and a class of your own is named as 'package.module:Class'"
    )
