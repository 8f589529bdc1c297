"""The Lua that decides in the server: whether a result may be stored, and what a step does to a chord or a run.

Each script is a file of its own beside this one; its head says what it takes and returns.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final

__all__ = ["BEAT", "CHORD", "EXTEND", "FORGET", "OPEN", "PUT", "REGISTER", "RUN", "SCRIPTS"]

_NAMES = ("put", "extend", "chord", "register", "forget", "open", "run", "beat")
_TEXTS = [files(__package__).joinpath(f"{name}.lua").read_text("utf-8") for name in _NAMES]

#: Digest → script.
SCRIPTS: Final = {hashlib.sha1(text.encode()).hexdigest(): text for text in _TEXTS}  # noqa: S324 - it is Redis' name
PUT, EXTEND, CHORD, REGISTER, FORGET, OPEN, RUN, BEAT = SCRIPTS
