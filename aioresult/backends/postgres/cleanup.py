"""Removes expired rows, a bounded number in each transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from .connections import Connections
from .statements import CLEANUP_BATCH, ORPHANS

__all__ = ["Cleaner", "CleanupStatements"]


class CleanupStatements(Protocol):
    """The SQL statements of cleanup; see `aioresult.backends.postgres.statements.Statements`."""

    cleanup: list[str]
    by_default: list[str]
    orphans: list[str]


class Cleaner:
    """Cleans up one set of tables. ``beside`` are further statements, for chords and running tasks.

    ``name`` must be the same in every process that cleans up the same tables.
    """

    def __init__(
        self, connections: Connections, statements: CleanupStatements, beside: Sequence[str], name: str
    ) -> None:
        self._connections = connections
        self._statements = statements
        self._beside = beside
        self._lock = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
        #: Statement → the id at which its last run ended.
        self._orphans_after: dict[str, str] = {}

    async def run(self, alone: bool = False) -> int:
        """Remove what has expired. Returns the number of removed results, groups, chords, outputs and notes of runs.

        With ``alone`` the call does nothing while another process cleans up.
        """
        total = 0
        step = partial(self._step, alone)
        for statement in (*self._statements.cleanup, *self._beside):
            while (row := await step(statement))["forgotten"]:
                total += row["removed"]
        for statement in self._statements.by_default:
            date_done, key, looked = "-infinity", "", CLEANUP_BATCH
            while looked >= CLEANUP_BATCH:
                row = await step(statement, date_done, key)
                date_done, key, looked = row["date_done"], row["key"], row["looked"]
                total += row["removed"]
        for statement in self._statements.orphans:
            row = await step(statement, self._orphans_after.get(statement, ""))
            self._orphans_after[statement] = row["last"] if row["looked"] >= ORPHANS else ""
        return total

    async def _step(self, alone: bool, statement: str, *args: Any) -> Any:
        return await self._connections.run(partial(self._step_on, alone, statement, args))

    async def _step_on(self, alone: bool, statement: str, args: Sequence[Any], connection: Any) -> Any:
        # The lock belongs to the transaction, not to the session: a pooler may take the session away.
        async with connection.transaction():
            if alone and not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", self._lock):
                return {"forgotten": 0, "removed": 0, "looked": 0, "last": "", "date_done": "", "key": ""}
            return await connection.fetchrow(statement, *args)
