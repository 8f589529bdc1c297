"""The Lua that decides in the server: whether a result may be stored, and what a step does to a chord.

Each script is a file of its own beside this one; its head says what it takes and returns.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final

__all__ = ["CHORD", "EXTEND", "FORGET", "PUT", "REGISTER", "SCRIPTS"]

_FILES = ("put.lua", "extend.lua", "chord.lua", "register.lua", "forget.lua")
_TEXTS = [files(__package__).joinpath(name).read_text("utf-8") for name in _FILES]

#: Digest → script.
SCRIPTS: Final = {hashlib.sha1(text.encode()).hexdigest(): text for text in _TEXTS}  # noqa: S324 - it is Redis' name
PUT, EXTEND, CHORD, REGISTER, FORGET = SCRIPTS
