"""Stores results in PostgreSQL. Statements lock rows in one order, so that two batches never wait for each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ...exceptions import BackendConnectionError, BackendError, BackendStoreError
from ...record import Record
from ...retry import affects_whole_batch
from .connections import Connections
from .statements import PLAIN_COLUMNS, Statements

__all__ = ["Storing", "rounds"]


class Storing:
    """Stores results in one set of tables. ``expires`` is the backend's default, in seconds."""

    def __init__(self, statements: Statements, expires: float, connections: Connections) -> None:
        self.statements = statements
        self._expires = expires
        self._connections = connections

    async def store(self, records: Sequence[Record], connection: Any) -> list[bool | BaseException]:
        """Do what `BackendContract._store` says."""
        outcomes: list[bool | BaseException] = [False] * len(records)
        # Each round is a transaction of its own. One statement locks its rows in order; but if a transaction held the
        # rows of one round while it locks those of the next, two batches could wait for each other.
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
                # The rounds before are committed and must not be repeated: a record with ``only_new`` would find its
                # own row, and would not count as stored.
                if isinstance(exc, BackendConnectionError) or affects_whole_batch(exc):
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
        # Sort by id, so that two batches in flight lock common rows in the same order.
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
        """True if Celery's rule, ``date_done`` plus the reader's default, is enough, as for most results.

        Any other result gets a row in our table of expiry. A result with metadata always gets such a row, which holds
        the metadata.
        """
        _, _, date_done, *others = record.payload
        return record.expires == self._expires and date_done is not None and not (others and others[-1] is not None)

    def row(self, record: Record) -> tuple[Any, ...]:
        """Return the arguments of `Statements.store` for ``record``."""
        seconds = record.expires or math.inf
        missing = (None,) * (len(self.statements.columns) + 1 - len(record.payload))
        expiry = None if self._expires_by_default(record) else seconds
        return (record.task_id, *record.payload, *missing, expiry, record.group_id, seconds)


def rounds(keys: Sequence[tuple[str, bool]]) -> Iterator[list[int]]:
    """Split the indexes of ``keys`` into lists. Each key is an id and a kind.

    The keys of one list have distinct ids and the same kind. The order of the keys of one id is kept.
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
