"""The Lua scripts that run in the server: they decide whether a result may be stored, and do steps of chords and runs.

Each script is a file in this directory. The comment at its top says what it takes and returns.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final

__all__ = ["BEAT", "CHORD", "EXTEND", "FORGET", "OPEN", "PUT", "REGISTER", "RUN", "SCRIPTS"]

_NAMES = ("put", "extend", "chord", "register", "forget", "open", "run", "beat")
_TEXTS = [files(__package__).joinpath(f"{name}.lua").read_text("utf-8") for name in _NAMES]

#: Digest → script.
SCRIPTS: Final = {hashlib.sha1(text.encode()).hexdigest(): text for text in _TEXTS}  # noqa: S324 - EVALSHA needs SHA-1
PUT, EXTEND, CHORD, REGISTER, FORGET, OPEN, RUN, BEAT = SCRIPTS
