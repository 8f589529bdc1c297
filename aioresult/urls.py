"""Hides the passwords in URLs for errors and logs, even if the URL is malformed."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

__all__ = ["ENCODE", "authority_fault", "hide_lone_user", "hide_password", "parts_of", "show_malformed"]

#: The remedy if an unescaped character may have cut a password in two.
ENCODE: Final = "percent-encode the name and the password: urllib.parse.quote(password, safe='')"

#: Matches the scheme, also after a class as in ``package.module:Class+scheme``. One slash is enough: a URL may be
#: mistyped.
_HEAD = re.compile(r"(?:(?:[\w.]+:\w+\+)?[\w.+-]*:/{1,2})?")
_QUERY = re.compile(r"(?i)([?&][^=&]*(?:pass|pwd|auth|secret|token|scram)[^=&]*=)[^&]*")
_HOST = re.compile(r"(?:\[[^\[\]]*\]|[^:\[\]]*)(?::([0-9]*))?")
_MAX_PORT = 65535

#: Matches the beginning of each part of Celery's URL for Sentinel: ``sentinel://host1;sentinel://host2``.
_SENTINEL = re.compile(r"(?i)(?:[\w.]+:\w+\+)?sentinel(?:\+ssl)?://")
#: Matches a part of that URL if no unescaped character can have cut its password in two.
_WHOLE = re.compile(r"[^@/?#]*(?:@[^@/?#]*)?(?:/[0-9]*)?(?:\?[^@#]*)?")


def hide_password(url: str) -> str:
    """Return ``url`` without its password, for logs and errors.

    The name of the user is shown if a colon and a password follow it. If the colon is missing, or an unescaped ``/``,
    ``?`` or ``#`` comes before it, everything before the last ``@`` is hidden: it may be the password. In Celery's
    ``sentinel://…;sentinel://…`` this holds for each part.

    >>> hide_password("redis://bob:s3cr3t@host:6379/0")
    'redis://bob:**@host:6379/0'
    >>> hide_password("redis://s3cr3t@host:6379/0")
    'redis://**@host:6379/0'
    >>> hide_password("sentinel://:s3cr3t@host1:26379/0;sentinel://:s3cr3t@host2:26379/0")
    'sentinel://:**@host1:26379/0;sentinel://:**@host2:26379/0'
    """
    parts = parts_of(url)
    if len(parts) > 1 and all(_WHOLE.fullmatch(_split(part)[1]) and _fault(part) is None for part in parts):
        return ";".join(_hidden(part) for part in parts)
    return _hidden(url)  # a password with an unescaped ; may reach from one part into the next


def parts_of(url: str) -> list[str]:
    """Return the parts of Celery's URL for several sentinels, ``sentinel://…;sentinel://…``. Others are one part."""
    parts = url.split(";")
    return parts if all(_SENTINEL.match(part) for part in parts) else [url]


def _hidden(url: str) -> str:
    head, rest = _split(url)
    userinfo, at, place = rest.rpartition("@")
    if not at:
        return head + _QUERY.sub(r"\1**", rest)
    user, colon, _ = userinfo.partition(":")
    # In user@host1:1,user@host2 that colon is not the one after the user.
    listed = "@" in user and re.search("[,;]", userinfo)
    shown = f"{user}:**" if colon and not listed and not re.search("[/?#]", user) else "**"
    if _QUERY.search(userinfo):  # a password in the query has an unescaped @: what follows is the rest of the password
        return head + shown
    return f"{head}{shown}@" + _QUERY.sub(r"\1**", place)


def show_malformed(url: str) -> str:
    """Return ``url`` without its password, even if its hosts or ports are malformed.

    What looks like a port may be a password without its ``@``. Otherwise the same as `hide_password`.
    """
    head, rest = _split(url)
    if "@" in rest or authority_fault(url) is None:
        return hide_password(url)
    host, colon, _ = rest.partition(":")
    return f"{head}{host}:**" if colon and not re.search(r"[\[\]/?#]", host) else f"{head}**"


def authority_fault(url: str) -> str | None:
    """Return what is wrong with the hosts and ports in ``url``; ``None`` if they are right. Quotes no part of it."""
    return next((fault for part in parts_of(url) if (fault := _fault(part))), None)


def _fault(url: str) -> str | None:
    _, rest = _split(url)
    hosts = re.split("[/?#]", rest, maxsplit=1)[0].rpartition("@")[2]
    for host in hosts.split(","):
        found = _HOST.fullmatch(host)
        port = "x" if found is None else found[1] or "0"
        if not port.isdecimal() or len(port) > len(str(_MAX_PORT)) or int(port) > _MAX_PORT:
            return (
                f"the port must be a number from 0 to {_MAX_PORT}, an IPv6 address stands in brackets, and a password "
                f"ends with @, as in scheme://:password@[::1]:6379/0; {ENCODE}"
            )
    return None


def hide_lone_user(text: str, url: str) -> str:
    """Return ``text`` without the user name in ``url`` if no colon follows that name: the name may be the password.

    ``text`` is the message of a driver or a server.
    """
    userinfo = re.split("[/?#]", _split(url)[1], maxsplit=1)[0].rpartition("@")[0]
    if not userinfo or ":" in userinfo:
        return text
    return re.sub(rf"(?<!\w){re.escape(unquote(userinfo))}(?!\w)", "**", text)


def _split(url: str) -> tuple[str, str]:
    found = _HEAD.match(url)
    head = found[0] if found else ""
    return head, url[len(head) :]
