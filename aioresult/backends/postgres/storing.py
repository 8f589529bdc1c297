"""Storing results in PostgreSQL: the rows of records, in statements that lock them in one order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ...exceptions import BackendConnectionError, BackendError, BackendStoreError
from ...record import Record
from ...retry import concerns_everyone
from .connections import Connections
from .statements import PLAIN_COLUMNS, Statements

__all__ = ["Storing", "rounds"]


class Storing:
    """Stores into one set of tables, whose reader's default is ``expires`` seconds."""

    def __init__(self, statements: Statements, expires: float, connections: Connections) -> None:
        self.statements = statements
        self._expires = expires
        self._connections = connections

    async def store(self, records: Sequence[Record], connection: Any) -> list[bool | BaseException]:
        """As `Backend._store`."""
        outcomes: list[bool | BaseException] = [False] * len(records)
        # Not in one transaction: each statement takes its rows in order, but holding those of one while the next takes
        # others, two batches could wait for each other.
        every = list(rounds([(record.task_id, record.only_new) for record in records]))
        if len(every) == 1:
            await self._store_round(connection, records, every[0], outcomes)
            return outcomes
        parts = every[::-1]
        while parts:
            indexes = parts.pop()
            try:
                await self._connections.translated(
                    self._store_round(connection, records, indexes, outcomes), BackendStoreError
                )
            except BackendError as exc:
                # What is committed stays stored and is not to be repeated: a registration would find itself.
                if isinstance(exc, BackendConnectionError) or concerns_everyone(exc):
                    raise
                if len(indexes) == 1:
                    outcomes[indexes[0]] = exc
                else:
                    middle = len(indexes) // 2
                    parts += [indexes[middle:], indexes[:middle]]
        return outcomes

    async def _store_round(
        self, connection: Any, records: Sequence[Record], indexes: list[int], outcomes: list[bool | BaseException]
    ) -> None:
        # By id, so that two batches in flight lock their common rows in the same order.
        indexes.sort(key=lambda index: records[index].task_id)
        batch = [records[index] for index in indexes]
        plain = all(map(self._is_plain, batch))
        rows = [(record.task_id, *record.payload) if plain else self.row(record) for record in batch]
        statements = self.statements.store_plain if plain else self.statements.store
        sql = statements[batch[0].only_new]
        stored = {row[0] for row in await connection.fetch(sql, *zip(*rows, strict=True))}
        for index in indexes:
            outcomes[index] = records[index].task_id in stored

    def _is_plain(self, record: Record) -> bool:
        return len(record.payload) == len(PLAIN_COLUMNS) and not record.group_id and self._expires_by_default(record)

    def _expires_by_default(self, record: Record) -> bool:
        """Celery's rule, date_done plus the reader's default, is enough for most; others get a row in our table.

        A result with metadata has a row there in any case, which keeps the metadata.
        """
        _, _, date_done, *others = record.payload
        return record.expires == self._expires and date_done is not None and not (others and others[-1] is not None)

    def row(self, record: Record) -> tuple[Any, ...]:
        """What `Statements.store` takes of ``record``."""
        seconds = record.expires or math.inf
        missing = (None,) * (len(self.statements.columns) + 1 - len(record.payload))
        expiry = None if self._expires_by_default(record) else seconds
        return (record.task_id, *record.payload, *missing, expiry, record.group_id, seconds)


def rounds(keys: Sequence[tuple[str, bool]]) -> Iterator[list[int]]:
    """The indexes of ``keys``, an id and a kind each, split so that no id occurs twice in one list, nor two kinds.

    The order of each id is kept.
    """
    waiting = list(range(len(keys)))
    while waiting:
        seen: set[str] = set()
        now: dict[bool, list[int]] = {False: [], True: []}
        later: list[int] = []
        for index in waiting:
            task_id, kind = keys[index]
            if task_id in seen:
                later.append(index)
            else:
                seen.add(task_id)
                now[kind].append(index)
        yield from filter(None, now.values())
        waiting = later
