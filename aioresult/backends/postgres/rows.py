"""Converts between rows of Celery's table and `TaskMeta`."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from ...exceptions import DecodeError
from ...meta import META_FIELD, TaskMeta
from ...serialization import Codec

__all__ = ["CeleryRows", "moment"]

#: The width, in characters, of the columns of Celery's table that describe the task, such as its name.
_MAX_NOTE_LENGTH: Final = 155

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
#: A limit in seconds, just below 15 minutes, the smallest difference between two time zones. If two dates differ by
#: more, a session with another time zone stored one of them. Clocks that disagree cause smaller differences.
_A_ZONE: Final = 14 * 60


class CeleryRows:
    """Reads and writes rows of Celery's table.

    ``optional`` names the optional columns that this table has. ``encoding`` is PostgreSQL's name of the database's
    encoding.
    """

    def __init__(self, codec: Codec, optional: Sequence[str], encoding: str) -> None:
        self._codec = codec
        self._optional = optional
        self._write = _text_writer(encoding)

    def encode(self, meta: TaskMeta) -> tuple[Any, ...]:
        """Return the columns from ``status`` on, and the metadata; only `PLAIN_COLUMNS` if the rest is null."""
        done = None if meta.date_done is None else (meta.date_done - _EPOCH) // _MICROSECOND
        plain = (meta.status, self._codec.dumps_result(meta), done)
        if meta.traceback is None and not meta.children and not meta.extra:
            return plain
        others = (self.text(meta.traceback), *(self._encode(column, meta) for column in (*self._optional, META_FIELD)))
        return plain if others.count(None) == len(others) else (*plain, *others)

    def _encode(self, column: str, meta: TaskMeta) -> Any:
        if column == "children":
            children = meta.children
            return self._codec.dumps(children, f"the children of task {meta.task_id}") if children else None
        extra = meta.extra or {}
        if column == "stamps":
            if not (headers := extra.get("stamped_headers")):
                return None
            stamps = {name: extra[name] for name in headers if name in extra}
            return self._codec.dumps({"stamped_headers": headers, "stamps": stamps}, "the stamps")
        if column in ("args", "kwargs", META_FIELD):
            what = f"the {column} of task {meta.task_id}"
            return self._codec.dumps(extra[column], what, column) if column in extra else None
        value = extra.get(column)
        return value if column == "retries" else self.text(value, _MAX_NOTE_LENGTH)

    def text(self, value: object, limit: int | None = None) -> str | None:
        """Return ``value`` as text that the database can hold. It is only a note, so it must not fail a store."""
        return None if value is None else self._write(str(value)).replace("\x00", "\\x00")[:limit]

    def decode(self, task_id: str, row: Mapping[str, Any]) -> TaskMeta:
        """Return the meta in a row of `Statements.fetch`. Raises the errors of `Codec.decode`."""
        fields = dict(row)
        for name in ("result", "children", "args", "kwargs", META_FIELD):
            if (data := fields.get(name)) is not None:
                fields[name] = self._codec.loads(data, f"the {name} of task {task_id}")
        if stamps := fields.pop("stamps", None):
            fields.update(_stamps(self._codec.loads(stamps, f"the stamps of task {task_id}")))
        done, stored_at = fields.pop("date_done"), fields.pop("stored_at")
        if stored_at is not None and not abs(stored_at - done) < _A_ZONE:  # a session with another time zone stored it
            done = stored_at
        fields["date_done"] = moment(task_id, done)
        optional = {name: value for name, value in fields.items() if value is not None}
        return self._codec.build(task_id, {"status": None, "result": None, **optional})

    def group(self, group_id: str, row: Mapping[str, Any]) -> bytes | None:
        """Return the stored bytes of a group, as the serializer wrote them."""
        data: bytes | None = row["result"]
        return data


def moment(task_id: str, seconds: float | None) -> datetime | None:
    """Return the moment ``seconds`` after the start of 1970, in UTC; raise `DecodeError` if Python has no such date."""
    if seconds is None:
        return None
    try:
        return _EPOCH + timedelta(microseconds=round(seconds * 1e6))
    except (OverflowError, ValueError) as exc:
        raise DecodeError(f"the date_done of task {task_id} cannot be read: {exc}") from exc


def _text_writer(encoding: str) -> Callable[[str], str]:
    """Return a function that escapes the characters of a text that a database with this encoding cannot hold."""
    try:
        python = codecs.lookup(re.sub("^WIN", "cp", encoding).replace("KOI8", "KOI8_")).name
    except LookupError:
        python = "ascii"  # the part that all of PostgreSQL's encodings have in common
    return lambda text: text.encode(python, "backslashreplace").decode(python)


def _stamps(packed: Any) -> dict[str, Any]:
    """Return Celery's ``stamps`` column as the fields that its other backends store."""
    if not isinstance(packed, dict):
        return {}
    stamps = packed.get("stamps")
    return {"stamped_headers": packed.get("stamped_headers"), **(stamps if isinstance(stamps, dict) else {})}
