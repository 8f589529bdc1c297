"""Groups on Redis: their life time, and the counts of their members that are over. Each member has a bit."""

from __future__ import annotations

from functools import lru_cache

from ..keyvalue import sibling
from .connection import Command
from .scripts import Scripts

__all__ = ["count_keys", "extend_command", "milliseconds"]


def count_keys(group: str) -> tuple[str, str, str]:
    """Return the keys that belong to a group: the bits of succeeded members, those of failed members, and the size."""
    return sibling(group, ".ok"), sibling(group, ".bad"), sibling(group, ".n")


def extend_command(
    scripts: Scripts, group: str, expires: float, index: int | None = None, failed: bool = False
) -> Command:
    """Return the command that keeps a group for at least ``expires`` seconds, and counts a member that is over."""
    member = ("", 0) if index is None else (index, int(failed))
    return ("EVALSHA", scripts.extend, 1, group, milliseconds(expires), *member, *count_keys(group))


@lru_cache(maxsize=64)  # the argument is nearly always the same
def milliseconds(seconds: float) -> int:
    """Return ``seconds`` in milliseconds, for Redis; at least 1. 0 stays 0, which means "for ever"."""
    return max(1, round(seconds * 1000)) if seconds else 0
