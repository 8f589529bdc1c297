"""The tables of django-celery-results. aioresult reads them and waits for their results, but never writes them.

Celery stores there with ``result_backend = "django-db"``. The tables are those of django-celery-results 2.4 to 2.6
(``django_celery_results/models.py``). A result is text, in base64 if the serializer makes bytes
(``backends/database.py``, ``encode_content``). Dates have a time zone. Reading does not check the expiry of a result:
Django removes old results.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Mapping
from typing import Any, Final

from ...exceptions import AioResultError, BackendRefusedError, DecodeError
from ...meta import TaskMeta
from ...serialization import Codec
from .rows import moment
from .schema import Tables
from .statements import delete_sql, epoch_sql, versions_sql

__all__ = ["GROUP_TABLE", "MAX_ID_LENGTH", "TABLE", "DjangoRows", "DjangoStatements"]

TABLE: Final = "django_celery_results_taskresult"
GROUP_TABLE: Final = "django_celery_results_groupresult"
MAX_ID_LENGTH: Final = 255

#: The optional fields of `TaskMeta` → the columns that have them.
_FIELDS: Final = {"name": "task_name", "args": "task_args", "kwargs": "task_kwargs", "worker": "worker"}


class DjangoStatements:
    """The SQL statements for these tables; see `aioresult.backends.postgres.statements.Statements`.

    ``columns`` are the columns of the table of results.
    """

    def __init__(self, names: Tables, columns: Collection[str]) -> None:
        fields = "".join(f", t.{column} AS {name}" for name, column in _FIELDS.items() if column in columns)
        self.fetch: str = f"""
            SELECT t.task_id, t.status, t.result, t.content_encoding, {epoch_sql("t.date_done")} AS date_done,
                   t.traceback, t.meta{fields}
            FROM unnest($1::varchar[]) AS wanted(id)
            CROSS JOIN LATERAL (SELECT * FROM {names.tasks} WHERE task_id = wanted.id LIMIT 1) t"""
        self.versions: str = versions_sql(names.tasks)
        self.delete: str = delete_sql(names.tasks, "SELECT FROM deleted")
        self.fetch_group: str = f"SELECT result, content_encoding FROM {names.groups} WHERE group_id = $1 LIMIT 1"
        self.delete_group: str = f"DELETE FROM {names.groups} WHERE group_id = $1"
        self.cleanup: list[str] = []
        self.by_default: list[str] = []
        self.orphans: list[str] = []


class DjangoRows:
    """Reads the rows of the table of results. ``where`` names the database in errors."""

    def __init__(self, codec: Codec, where: str) -> None:
        self._codec = codec
        self._where = where

    def refusal(self) -> BackendRefusedError:
        """Return the error for an attempt to store a result."""
        return BackendRefusedError(
            f"{self._where} holds the tables of django-celery-results, which aioresult only reads: let Celery's "
            f"workers store there, or name a table of Celery's own format with table="
        )

    def encode(self, meta: TaskMeta) -> tuple[Any, ...]:
        raise self.refusal()

    def decode(self, task_id: str, row: Mapping[str, Any]) -> TaskMeta:
        """Return the meta in a row of `DjangoStatements.fetch`. Raises the errors of `Codec.decode`."""
        fields = dict(row)
        encoding, meta = fields.pop("content_encoding"), fields.pop("meta")
        for name, text in (("result", fields["result"]), ("children", meta)):
            fields[name] = None if text is None else self._codec.loads(content(text, encoding, name, task_id), name)
        fields["children"] = fields["children"].get("children") if isinstance(fields["children"], dict) else None
        for name in ("args", "kwargs"):
            if fields.get(name) is not None:
                fields[name] = self._arguments(fields[name], encoding, task_id)
        fields["date_done"] = moment(task_id, fields["date_done"])
        optional = {name: value for name, value in fields.items() if value is not None}
        return self._codec.build(task_id, {"status": None, "result": None, **optional})

    def _arguments(self, text: str, encoding: str, task_id: str) -> Any:
        """Return the arguments of the task, or their text if they cannot be decoded: the result must stay readable."""
        try:
            return self._codec.loads(content(text, encoding, "arguments", task_id), "the arguments")
        except AioResultError:
            return text

    def group(self, group_id: str, row: Mapping[str, Any]) -> bytes | None:
        """Return the stored bytes of a group, as the serializer wrote them."""
        return None if row["result"] is None else content(row["result"], row["content_encoding"], "group", group_id)


def content(text: str, encoding: str | None, what: str, id: str) -> bytes:
    """Return the bytes that the serializer wrote. Raises `DecodeError` for malformed base64."""
    try:
        return base64.b64decode(text, validate=True) if encoding == "binary" else text.encode()
    except (binascii.Error, ValueError) as exc:
        raise DecodeError(f"the {what} of {id} cannot be read: {exc}") from exc
