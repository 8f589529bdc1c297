"""The step of a chord as a command of Redis, and its reply. The backend for Celery's workers uses them, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...chord import ChordState, ChordStep
from .connection import Command
from .groups import milliseconds
from .scripts import Scripts

__all__ = ["CHORD_SUFFIXES", "chord_command", "chord_state", "parts_key"]

#: The further keys of a chord, after the group's key, in the order in which chord.lua takes them.
CHORD_SUFFIXES = (".j", ".s", ".t", ".d", ".c", ".a", ".r")


def chord_command(scripts: Scripts, keys: Sequence[str], channel: str, step: ChordStep, ordered: bool) -> Command:
    """Return the command that does ``step``.

    :param keys: the key of the group, then those of `CHORD_SUFFIXES`.
    :param channel: the channel on which completed chords are announced.
    :param ordered: whether the parts are kept in the order of the header.
    """
    size = "" if step.size is None else step.size
    index = "+inf" if step.index is None else step.index
    times = (milliseconds(step.lease), milliseconds(step.expires), milliseconds(step.group_expires))
    terms = (step.token, *times, size, step.body or b"", step.body_id, step.run)
    part = (step.task_id, index, step.part, int(step.failed), int(ordered))
    return ("EVALSHA", scripts.chord, len(keys), *keys, step.op.value, step.group_id, channel, *terms, *part)


def parts_key(reply: Sequence[Any]) -> tuple[str, bool]:
    """Return the suffix of the key that holds the parts, empty if there is none, and whether it is a list."""
    *_, is_list, where, _, _ = reply
    return where.decode(), bool(is_list)


def chord_state(reply: Sequence[Any], parts: Sequence[bytes] = ()) -> ChordState:
    """Return the state of a chord from the reply to the command of `chord_command`."""
    count, size, claimed, done, body, failure, left, _, _, ours, body_id = reply
    return ChordState(
        count,
        None if size < 0 else size,
        bool(claimed),
        bool(done),
        body,
        failure,
        left / 1000 if left >= 0 else None,
        tuple(parts),
        bool(ours),
        (body_id or b"").decode("utf-8", "surrogateescape"),
    )
