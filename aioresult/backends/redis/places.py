"""Turns a URL and ``connect_options`` into the places of a Redis Cluster, or of sentinels and their master.

Celery reads ``sentinel://…;sentinel://…`` in ``celery/backends/redis.py`` (5.7): ``SentinelBackend``. The other URL for
Sentinel, ``redis+sentinel://host1,host2/service/db``, has the grammar of the package ``Redis-Sentinel-Url``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import NoneType
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias
from urllib.parse import parse_qsl, unquote, urlencode

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection
from redis.exceptions import RedisError

from ...exceptions import ImproperlyConfigured
from ...options import checked_option, did_you_mean, unknown_in_url
from ...urls import ENCODE, authority_fault, parts_of
from .url import (
    argument_names,
    checked_connection,
    connection_options,
    cut_password,
    halves,
    is_false,
    refused_url,
    shown_reason,
    url_options,
)

__all__ = [
    "Address",
    "ClusterPlace",
    "SentinelPlace",
    "checked_remap",
    "checked_sentinels",
    "cluster_place",
    "options_in",
    "place_url",
    "sentinel_place",
    "with_celerys_defaults",
]

#: The host and the port of a server.
Address: TypeAlias = tuple[str, int]

CLUSTER_PORT: Final = 6379
SENTINEL_PORT: Final = 26379

_ADDRESS: Final = re.compile(r"(\[[^\[\]]+\]|[^:\[\]]+):([0-9]{1,5})")
#: Options of the backends, which the query of a URL cannot have.
_NOT_IN_URL: Final = ("address_remap", "topology_refresh", "sentinel_kwargs", "min_other_sentinels")
#: What the query of a URL for sentinels may have beside the arguments of the connection to the master.
_OF_SENTINELS: Final = ("sentinel_username", "sentinel_password", "sentinel_ssl", "master_name")
#: Arguments that redis-py's client takes, and its connection does not.
_OF_THE_CLIENT: Final = ("max_connections", "single_connection_client", "auto_close_connection_pool")
_ONCE: Final = f"write the user name and the password once, before the first host; {ENCODE}"


class ClusterPlace(NamedTuple):
    """A Redis Cluster, as a URL names it."""

    #: The nodes to ask for the others, in the order of the URL.
    start: tuple[Address, ...]
    connection_class: type[AbstractConnection]
    #: The arguments of ``connection_class`` without host, port and database.
    options: dict[str, Any]

    @property
    def url(self) -> str:
        """The URL without credentials and options. The order of the nodes in the given URL does not matter."""
        return f"{_scheme(self.connection_class)}+cluster://{_listed(self.start)}"


class SentinelPlace(NamedTuple):
    """Sentinels, and the master that they watch, as a URL names them."""

    sentinels: tuple[Address, ...]
    master_name: str
    #: The class of the connections to the master.
    connection_class: type[AbstractConnection]
    #: The arguments of ``connection_class`` without host and port: ``db``, ``username``, ``password``, …
    options: dict[str, Any]
    #: The class of the connections to the sentinels.
    sentinel_class: type[AbstractConnection]
    #: The arguments of ``sentinel_class`` without host and port.
    sentinel_options: dict[str, Any]

    @property
    def url(self) -> str:
        """The URL without credentials and options. The order of the sentinels in the given URL does not matter."""
        scheme, database = _scheme(self.connection_class), self.options.get("db", 0)
        return f"{scheme}+sentinel://{_listed(self.sentinels)}/{self.master_name}/{database}"


class _Parts(NamedTuple):
    """A URL with several hosts, in pieces."""

    tls: bool
    userinfo: str  # with the @
    addresses: tuple[Address, ...]
    path: str
    query: dict[str, str]


def cluster_place(url: str, given: Mapping[str, Any]) -> ClusterPlace:
    """Return the nodes in ``url`` and the arguments of redis-py's connection. ``given`` takes precedence.

    :raises ImproperlyConfigured: the URL is malformed, or redis-py does not take an argument. The message names it.
    """
    parts = _parts(url, CLUSTER_PORT)
    _refuse_places(url, parts.query, given, "nodes")
    connection_class, options = connection_options(_plain(parts, parts.path), given, url)
    if options.pop("db", 0):
        raise refused_url(url, "a cluster has one database, number 0; leave the number out", given)
    return ClusterPlace(parts.addresses, connection_class, options)


def sentinel_place(
    url: str, given: Mapping[str, Any], master_name: str | None, sentinel_kwargs: Mapping[str, Any] | None
) -> SentinelPlace:
    """Return the sentinels and the master in ``url``, and the arguments of redis-py's connections to both.

    ``given`` takes precedence for the master, ``sentinel_kwargs`` for the sentinels.

    :param sentinel_kwargs: arguments as for ``redis.sentinel.Sentinel(sentinel_kwargs=…)``. ``ssl`` selects TLS.
    :raises ImproperlyConfigured: the URL is malformed, the name of the master is missing, or redis-py does not take an
        argument. The message names it.
    """
    checked_option("master_name", master_name, (str, NoneType), "a str or None")
    checked_option("sentinel_kwargs", sentinel_kwargs, (Mapping, NoneType), "a mapping or None")
    celerys = _is_celerys(url)
    parts = _parts(url, SENTINEL_PORT)
    _refuse_places(url, parts.query, given, "sentinels")
    username, password, tls, queried = (parts.query.pop(name, None) for name in _OF_SENTINELS)
    service, path = ("", parts.path) if celerys else _service(url, parts.path)
    if celerys and not path.isdecimal() and path:
        raise refused_url(url, f"its path is the number of the database, as in sentinel://host:26379/0; {ENCODE}")
    connection_class, options = connection_options(_plain(parts, path), given, url)
    name = master_name or queried or service or _nameless(url, celerys)
    defaults: dict[str, Any] = {"ssl": parts.tls if tls is None else not is_false(tls)}
    if not celerys:
        defaults |= {name: options[name] for name in options if name.startswith(("ssl_", "socket_", "protocol"))}
    defaults |= {name: value for name, value in (("username", username), ("password", password)) if value}
    return SentinelPlace(
        parts.addresses, name, connection_class, options, *_sentinel_connection({**defaults, **(sentinel_kwargs or {})})
    )


def options_in(url: str) -> dict[str, Any]:
    """Return the arguments of redis-py's connections to the nodes or to the master that ``url`` itself gives.

    :raises ImproperlyConfigured, ValueError: the URL is malformed.
    """
    parts = _parts(url, 0)
    for name in _OF_SENTINELS:
        parts.query.pop(name, None)
    served = url.partition("://")[0].lower().endswith("+sentinel")
    return url_options(_plain(parts, _service(url, parts.path)[1] if served else parts.path))


def with_celerys_defaults(url: str, host: str, port: int) -> str:
    """Return a URL of Celery's for Sentinel with the host and the port of Celery's settings wherever it lacks them."""
    parts = parts_of(url)
    if not _is_celerys(url) or authority_fault(url) is not None or any(map(cut_password, parts)):
        return url
    completed = []
    for part in parts:
        authority, beyond = halves(part)
        userinfo, at, place = authority.rpartition("@")
        found = _host_and_port(place, host, port)
        completed.append(f"{part.partition('://')[0]}://{userinfo}{at}{_joined(found)}{beyond}")
    return ";".join(completed)


# -- URLs -----------------------------------------------------------------------------------------------------------


def _is_celerys(url: str) -> bool:
    return re.match("(?i)sentinel(?:://|[+])", url) is not None


def _parts(url: str, port: int) -> _Parts:
    """Take ``url`` apart. ``port`` is used where it has none.

    :raises ImproperlyConfigured: the URL is malformed. The message quotes nothing that may be a password.
    """
    several = parts_of(url)
    scheme = url.partition("://")[0].lower()
    if any(each.lower().startswith("sentinel+") for each in several):
        raise refused_url(
            url,
            "Celery reads sentinel+ssl:// as sentinel://, without TLS; write rediss+sentinel://host1,host2/name/0 for "
            "TLS to the sentinels and the master. A Celery app needs sentinel://, redis_backend_use_ssl for TLS to the "
            "master, and sentinel_kwargs={'ssl': True} for TLS to the sentinels",
        )
    if fault := ENCODE if any(map(cut_password, several)) else authority_fault(url):
        raise refused_url(url, f"{_separators(scheme)}; {fault}" if ";" in url and len(several) == 1 else fault)
    addresses: dict[Address, None] = {}
    query: dict[str, str] = {}
    for part in several:
        authority, beyond = halves(part)
        userinfo, _, hosts = authority.rpartition("@")
        path = re.split("[?#]", beyond, maxsplit=1)[0]
        if "@" in userinfo and "," in userinfo:
            raise refused_url(url, _ONCE)
        if "@" in path:  # a slash before the user name
            raise refused_url(url, ENCODE)
        if ";" in hosts + path:
            raise refused_url(url, _separators(scheme))
        each = hosts.split(",")
        if len(each) + len(several) > 2 and not all(host.strip() for host in each):
            raise refused_url(url, "one of its hosts is empty")
        addresses.update((_host_and_port(host.strip(), "localhost", port), None) for host in each)
        query = {**dict(parse_qsl(beyond.partition("#")[0].partition("?")[2])), **query}
    # The credentials and the path of the first part count, as in Celery. An option may be in any part.
    authority, beyond = halves(several[0])
    userinfo, at, _ = authority.rpartition("@")
    path = re.split("[?#]", beyond, maxsplit=1)[0].strip("/")
    return _Parts(scheme.startswith(("rediss", "valkeys")), userinfo + at, tuple(addresses), path, query)


def _separators(scheme: str) -> str:
    if scheme == "sentinel":
        return "each of its parts is a URL: sentinel://host1:26379/0;sentinel://host2:26379/0"
    return f"commas separate its hosts: {scheme}://host1,host2"


def _host_and_port(text: str, host: str, port: int) -> Address:
    found, _, number = (
        text.rpartition(":") if re.search(r":[0-9]*$", text) and not text.endswith("]") else (text, "", "")
    )
    return unquote(found.strip("[]")).lower() or host, int(number or 0) or port


def _service(url: str, path: str) -> tuple[str, str]:
    """Return the name of the master, and the number of the database, from a path such as ``service/0``."""
    service, _, database = path.partition("/")
    if service.isdecimal() and not database:
        return "", service
    if database and not database.isdecimal():
        raise refused_url(
            url, f"its path is the name of the master, and the number of the database, as in /mymaster/0; {ENCODE}"
        )
    return unquote(service), database


def _nameless(url: str, celerys: bool) -> NoReturn:
    where = "sentinel://host:26379/0?master_name=mymaster" if celerys else "redis+sentinel://host1,host2/mymaster/0"
    raise refused_url(
        url,
        f"it lacks the name of the master, as in the sentinels' configuration: sentinel monitor mymaster …; pass "
        f"master_name='mymaster', or write it in the URL: {where}. For a Celery app, set "
        f"result_backend_transport_options={{'master_name': 'mymaster'}}",
    )


def _plain(parts: _Parts, path: str) -> str:
    """Return a URL for redis-py with all of ``parts`` but the hosts."""
    query = urlencode(parts.query, safe="@")  # an @ may show that a password was cut in two
    return f"redis{'s' if parts.tls else ''}://{parts.userinfo}/{path}{'?' if query else ''}{query}"


def _refuse_places(url: str, query: Iterable[str], given: Iterable[str], servers: str) -> None:
    for name in ("host", "port", "path"):
        if name in query or name in given:
            where = "connect_options" if name in given else "its query"
            raise refused_url(url, f"{where} cannot have {name!r}: the URL names the {servers}; remove it")
    for name in _NOT_IN_URL:
        if name in query:
            raise refused_url(url, unknown_in_url(name, (), _NOT_IN_URL))


def _sentinel_connection(options: dict[str, Any]) -> tuple[type[AbstractConnection], dict[str, Any]]:
    """Return the class and the arguments of redis-py's connection for the sentinels."""
    tls = not is_false(options.pop("ssl"))
    kept = {name: value for name, value in options.items() if name not in _OF_THE_CLIENT and value is not None}
    kept = {name: value for name, value in kept.items() if tls or not name.startswith("ssl_")}
    for name in ("host", "port", "unix_socket_path", "connection_pool", "connection_class"):
        if name in kept:
            raise ImproperlyConfigured(f"sentinel_kwargs cannot have {name!r}: the URL names the sentinels; remove it")
    kind = SSLConnection if tls else Connection
    try:
        if int(kept.pop("db", 0)):
            raise ValueError("a sentinel has no databases; remove 'db'")
        return checked_connection({"connection_class": kind, **kept})
    except ImproperlyConfigured:
        raise
    except (TypeError, ValueError, RedisError) as exc:
        known = {*argument_names(kind), "ssl"}
        unknown = [f"unknown parameter {name!r}{did_you_mean(name, known)}" for name in sorted(kept.keys() - known)]
        raise ImproperlyConfigured(f"wrong sentinel_kwargs: {'; '.join(unknown) or shown_reason(exc)}") from None


def _scheme(connection_class: type[AbstractConnection]) -> str:
    return "rediss" if issubclass(connection_class, SSLConnection) else "redis"


# -- addresses ------------------------------------------------------------------------------------------------------


def place_url(scheme: str, address: Address) -> str:
    """Return a URL for errors and logs.

    >>> place_url("redis", ("::1", 7000))
    'redis://[::1]:7000'
    """
    return f"{scheme}://{_joined(address)}"


def _joined(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listed(addresses: Iterable[Address]) -> str:
    return ",".join(map(_joined, sorted(addresses)))


def checked_remap(given: object) -> Callable[[Address], Address]:
    """Return a function that replaces the address that a server names with the address to connect to.

    :param given: the option ``address_remap``: a mapping, a function of ``(host, port)``, or ``None`` for no change.
        A mapping has keys and values of the form ``(host, port)`` or ``"host:port"``, and leaves other addresses alone.
    :raises ImproperlyConfigured: ``given`` is something else. The function raises it if ``given`` returns anything but
        ``(host, port)``, or raises an exception.
    """
    if given is None:
        return lambda address: address
    if isinstance(given, Mapping):
        table = {_entry(key): _entry(value) for key, value in given.items()}
        return lambda address: table.get((address[0].lower(), address[1]), address)
    if not callable(given):
        raise ImproperlyConfigured(
            "address_remap must be a mapping such as {'10.0.0.1:6379': 'redis.example:7000'}, a function of "
            f"(host, port) that returns (host, port), or None, not {type(given).__qualname__}"
        )
    function: Callable[[Address], object] = given

    def remap(address: Address) -> Address:
        try:
            found = function(address)
        except Exception as exc:
            raise ImproperlyConfigured(f"address_remap raised {exc!r} for {address!r}") from exc
        if (checked := _address(found)) is None:
            raise ImproperlyConfigured(
                f"address_remap must return (host, port), a str and an int, but returned {found!r} for {address!r}"
            )
        return checked

    return remap


def _entry(given: object) -> Address:
    if isinstance(given, str) and (found := _ADDRESS.fullmatch(given)):
        given = found[1].strip("[]"), int(found[2])
    if (checked := _address(given)) is None:
        raise ImproperlyConfigured(f"an address in address_remap must be 'host:port' or (host, port), not {given!r}")
    return checked[0].lower(), checked[1]


def _address(given: object) -> Address | None:
    match given:
        case (str(host), int(port)) if host and 0 < port < 2**16 and not isinstance(port, bool):
            return host, port
    return None


def checked_sentinels(given: object) -> int:
    """Return the option ``min_other_sentinels`` if it is a number from 0."""
    if not isinstance(given, int) or given < 0:
        raise ImproperlyConfigured(f"min_other_sentinels must be a whole number from 0, not {given!r}")
    return given
