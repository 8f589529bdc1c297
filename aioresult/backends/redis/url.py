"""Turns a URL and ``connect_options`` into the arguments of redis-py's connection. Celery's spellings are known, too.

Celery reads the same URLs in ``celery/backends/redis.py`` (5.7): ``RedisBackend._params_from_url``.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
import ssl
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from redis import CredentialProvider
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.exceptions import RedisError

from ...exceptions import ImproperlyConfigured
from ...options import did_you_mean, unknown_in_url
from ...urls import ENCODE, authority_fault, show_malformed
from ..worker import BackendOptions

__all__ = [
    "MalformedUrl",
    "argument_names",
    "checked_connection",
    "connection_options",
    "cut_password",
    "halves",
    "is_false",
    "leads_elsewhere",
    "refused_url",
    "resolved_url",
    "shown_reason",
    "url_options",
]

#: Arguments that only redis-py's blocking TLS connection has. They are ignored if they are switched off.
_OCSP: Final = ("ssl_validate_ocsp", "ssl_validate_ocsp_stapled", "ssl_ocsp_context", "ssl_ocsp_expected_cert")
#: Scheme → redis-py's name for it.
_SCHEMES: Final = {"socket": "unix", "valkey": "redis", "valkeys": "rediss"}
_FALSE: Final = frozenset({"", "0", "f", "false", "n", "no"})
#: Arguments that select the server or the database.
_PLACE: Final = frozenset({"host", "port", "path", "db"})


class MalformedUrl(ValueError):
    """The URL is malformed. The message quotes no part of it."""


def connection_options(
    url: str, given: Mapping[str, Any], written: str = ""
) -> tuple[type[AbstractConnection], dict[str, Any]]:
    """Return the class and the arguments of redis-py's connection for ``url``. ``given`` takes precedence.

    ``written`` is the URL that the user wrote, if ``url`` is made from it. The error shows it instead of ``url``.

    :raises ImproperlyConfigured: redis-py does not take an argument; the message names it.
    """
    try:
        return checked_connection({**url_options(url), **given})
    except ImproperlyConfigured:
        raise
    except (TypeError, ValueError, RedisError) as exc:
        raise refused_url(written or url, _reason(exc, url, given), given) from None


def checked_connection(options: dict[str, Any]) -> tuple[type[AbstractConnection], dict[str, Any]]:
    """Return the class in ``options`` and the arguments for it, in the form that redis-py's asyncio connection takes.

    :raises TypeError, ValueError, RedisError: redis-py does not take an argument.
    """
    connection_class: type[AbstractConnection] = options.pop("connection_class", Connection)
    if provider := options.get("credential_provider"):
        options["credential_provider"] = _provider(provider)
        if options.get("username") or options.get("password"):
            raise ValueError("a credential provider replaces the user name and the password; pass only one of them")
    _checked_tls(options)
    if issubclass(connection_class, SSLConnection) and options.get("ssl_cert_reqs", "required") != "none":
        options.setdefault("ssl_check_hostname", True)  # before version 6, redis-py accepts any host's certificate
    for name in ("protocol", "db"):
        if name in options:
            options[name] = int(options[name])
    connection_class(**options)
    return connection_class, options


def refused_url(url: str, reason: str, given: Mapping[str, Any] = MappingProxyType({})) -> ImproperlyConfigured:
    """Return the error for ``url``. It shows the URL without its password."""
    return ImproperlyConfigured(
        f"{show_malformed(url)} is not a URL for the Redis backend"
        f"{', with the connect_options given' if given else ''}: {reason}"
    )


def url_options(url: str) -> dict[str, Any]:
    """Return the arguments that ``url`` gives. ``connection_class`` is among them unless it is the plain class.

    :raises ValueError: the URL is malformed. The message quotes nothing that may be a password.
    """
    if fault := ENCODE if cut_password(url) else authority_fault(url):
        raise MalformedUrl(fault)
    try:
        parts = urlsplit(url)
    except ValueError:
        raise MalformedUrl(f"it cannot be read; {ENCODE}") from None
    query = dict(parse_qsl(parts.query))
    scheme = parts.scheme.rpartition("+")[2]
    scheme = _SCHEMES.get(scheme, scheme)
    virtual_host = query.pop("virtual_host", None)
    if virtual_host is not None and scheme == "unix":  # over TCP Celery takes the database from the path alone
        query["db"] = virtual_host.strip("/")
    query.pop("max_connections", None)  # an option of a pool
    options: dict[str, Any] = dict(parse_url(parts._replace(scheme=scheme, query=urlencode(query)).geturl()))
    if scheme in ("redis", "rediss") and "db" not in query and (database := unquote(parts.path).strip("/")):
        if not database.isdecimal():  # redis-py would ignore such a path
            raise MalformedUrl(f"the database must be a number, as in redis://localhost:6379/0; {ENCODE}")
        options["db"] = int(database)
    if "credential_provider" in options:
        options.pop("username", None)
        options.pop("password", None)
    return options


def cut_password(url: str) -> bool:
    """True if an unescaped character has cut the user name or the password in two.

    An ``@`` is allowed in the value of an option, and in the path of a unix socket.
    """
    authority, beyond = halves(url)
    path, _, more = beyond.partition("?")
    query, _, fragment = more.partition("#")
    names = [each.partition("=")[0] for each in query.split("&")]
    return "@" in fragment or (authority != "" and "@" in path) or any("@" in name for name in names)


def halves(url: str) -> tuple[str, str]:
    """Return the part of the URL before the path, which has the user name and the password; and the rest."""
    rest = url.partition("://")[2]
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    return authority, rest[len(authority) :]


def _reason(exc: Exception, url: str, given: Mapping[str, Any]) -> str:
    """Say what is wrong, in a text that quotes no part of a password."""
    if isinstance(exc, MalformedUrl):
        return str(exc)
    if "@" in halves(url)[1]:
        return ENCODE
    if "unexpected keyword argument" in str(exc):
        options = {**url_options(url), **given}
        known = argument_names(options.pop("connection_class", Connection))
        return "; ".join(
            f"unknown parameter {name!r} in connect_options{did_you_mean(name, known)}"
            if name in given
            else unknown_in_url(name, known, BackendOptions.__annotations__)
            for name in sorted(options.keys() - known)
        )
    return shown_reason(exc)


def shown_reason(exc: Exception) -> str:
    """Return the message of redis-py's error, or the name of the error if the message may quote a password."""
    return str(exc) if "password" not in str(exc) or "provider" in str(exc) else type(exc).__name__


def argument_names(connection_class: type) -> set[str]:
    """Return the names of the arguments of redis-py's connection. Those of TLS may be positional, too."""
    return {
        name
        for each in connection_class.__mro__
        if "__init__" in vars(each) and each is not object
        for name, one in list(inspect.signature(vars(each)["__init__"]).parameters.items())[1:]
        if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)
    }


def resolved_url(connection_class: type[AbstractConnection], options: Mapping[str, Any]) -> str:
    """Return the URL of the server and database of ``options``, without credentials; for errors and equality."""
    database = options.get("db", 0)
    if issubclass(connection_class, UnixDomainSocketConnection):
        return f"unix://{options.get('path', '')}?db={database}"
    scheme = "rediss" if issubclass(connection_class, SSLConnection) else "redis"
    host = options.get("host", "localhost")
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{options.get('port', 6379)}/{database}"


def is_false(value: object) -> bool:
    """True if ``value`` switches an argument off. It may be the text of a URL or of the environment."""
    return value.lower() in _FALSE if isinstance(value, str) else not value


def leads_elsewhere(given: Mapping[str, Any]) -> bool:
    """True if ``connect_options`` name another server or database than the URL."""
    return not _PLACE.isdisjoint(given)


def _provider(given: Any) -> CredentialProvider:
    """Make a credential provider from an instance, a class, or the path of a class: ``package.module.Class``."""
    if isinstance(given, str):
        try:
            given = pkgutil.resolve_name(given)
        except (ImportError, AttributeError, ValueError) as exc:
            raise ImproperlyConfigured(f"credential_provider {given!r} cannot be imported: {exc}") from exc
    provider = given() if isinstance(given, type) else given
    if not isinstance(provider, CredentialProvider):
        raise ImproperlyConfigured(
            f"credential_provider must be a redis.CredentialProvider, its class, or the path of one, not {given!r}"
        )
    return provider


def _checked_tls(options: dict[str, Any]) -> None:
    """Put the TLS arguments into the form that redis-py's asyncio connection takes, or raise `ValueError`."""
    if "ssl_cert_reqs" in options:
        requirement = options["ssl_cert_reqs"]
        if isinstance(requirement, int):
            requirement = ssl.VerifyMode(requirement).name
        # redis-py's asyncio connection before version 6 takes only the words "none", "optional" and "required".
        options["ssl_cert_reqs"] = str(requirement).lower().removeprefix("cert_")
    for name in _OCSP:
        value = options.pop(name, None)
        if not is_false(value):
            raise ValueError(f"{name} needs redis-py's blocking connection; remove it: asyncio connections lack OCSP")
