"""URLs as they may be shown: without the password."""

from __future__ import annotations

import re

__all__ = ["hide_password"]

#: From the first colon after the user's name to the *last* ``@``: an unescaped ``/`` or ``@`` in a name or a password
#: must not leave any of it standing. One slash will do: an error may show a URL that is mistyped.
_USERINFO = re.compile(r"(?<=:/)([^:]*):.*@", re.DOTALL)
_QUERY = re.compile(r"(?i)([?&][^=&]*(?:pass|secret|token|scram)[^=&]*=)[^&]*")


def hide_password(url: str) -> str:
    """``url`` fit for logs and errors.

    >>> hide_password("redis://bob:s3cr3t@host:6379/0")
    'redis://bob:**@host:6379/0'
    """
    return _QUERY.sub(r"\1**", _USERINFO.sub(r"\1:**@", url))
