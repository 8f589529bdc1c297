"""The Lua scripts that run in the server: they decide whether a result may be stored, and do steps of chords and runs.

Each script is a file in this directory. The comment at its top says what it takes and returns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Final

__all__ = ["PLAIN", "SHARDED", "Scripts"]

#: The line at the top of a script that publishes. It names the command that publishes on the channels of the script's
#: own keys.
_TELL: Final = "local TELL = 'PUBLISH'"


class Scripts:
    """The scripts, and their digests. In their texts, ``tell`` is the command that publishes.

    A Redis Cluster sends each message of PUBLISH to all nodes. It keeps a message of SPUBLISH on the node, and on the
    replicas of the node, to which the slot of the channel belongs. A channel has the slot of the key with its name.
    """

    def __init__(self, tell: str) -> None:
        #: The command that publishes on the channel of a key in the same slot.
        self.tell: str = tell
        #: Digest → text.
        self.texts: dict[str, str] = {}
        self.put: str = self._add("put")
        self.extend: str = self._add("extend")
        self.chord: str = self._add("chord")
        self.register: str = self._add("register")
        self.forget: str = self._add("forget")
        self.open: str = self._add("open")
        self.append: str = self._add("append")
        self.run: str = self._add("run")
        self.beat: str = self._add("beat")

    def channels(self, command: Sequence[str | bytes | int]) -> Sequence[str | bytes | int]:
        """Return the channels of results, outputs, groups and chords on which ``command`` may publish."""
        if len(command) < 2:  # MULTI, EXEC
            return []
        name, what, *terms = command
        if name == "EVALSHA" and what not in (self.register, self.forget, self.beat):
            keys = terms[1 : 1 + int(terms[0])]
            return [*keys, terms[-1]] if what == self.extend else keys
        return [what] if name == self.tell else []

    def _add(self, name: str) -> str:
        text = files(__package__).joinpath(f"{name}.lua").read_text("utf-8")
        text = text.replace(_TELL, f"local TELL = '{self.tell}'")
        digest = hashlib.sha1(text.encode()).hexdigest()  # noqa: S324 - EVALSHA needs SHA-1
        self.texts[digest] = text
        return digest


#: For a single server, also behind sentinels. Celery's readers wait on the same channels, with SUBSCRIBE.
PLAIN: Final = Scripts("PUBLISH")
#: For a Redis Cluster.
SHARDED: Final = Scripts("SPUBLISH")
