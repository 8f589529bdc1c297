"""Groups on Redis: how long one lives, and how many of its members are over, a bit for each."""

from __future__ import annotations

from functools import lru_cache

from ..keyvalue import sibling
from .connection import Command
from .scripts import EXTEND

__all__ = ["count_keys", "extend_command", "milliseconds"]


def count_keys(group: str) -> tuple[str, str, str]:
    """The keys beside that of a group: which members have succeeded, which have failed, and how many there are."""
    return sibling(group, ".ok"), sibling(group, ".bad"), sibling(group, ".n")


def extend_command(group: str, expires: float, index: int | None = None, failed: bool = False) -> Command:
    """Let a group live for at least so many seconds, and note that a member is over."""
    member = ("", 0) if index is None else (index, int(failed))
    return ("EVALSHA", EXTEND, 1, group, milliseconds(expires), *member, *count_keys(group))


@lru_cache(maxsize=64)  # nearly always the same
def milliseconds(seconds: float) -> int:
    """As Redis takes them; 0 stays 0, which is "for ever"."""
    return max(1, round(seconds * 1000)) if seconds else 0
