"""Chords in PostgreSQL. A function in the database does the steps of chords; one call does many steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...chord import ChordOp, ChordState, ChordStep
from .schema import Tables, prefix_sql
from .statements import CLEANUP_BATCH, Statements

__all__ = ["ChordTable"]

#: What is stored as the index of a part without one. Such parts come after all other parts, in order of arrival.
_NO_INDEX = 2**62


#: The steps that extend the life of the chord's saved group.
_KEEPING = frozenset({ChordOp.CREATE, ChordOp.SIZE, ChordOp.PART, ChordOp.CLAIM, ChordOp.RENEW, ChordOp.FINISH})


class ChordTable:
    """The chords in one set of tables. The caller passes the connection to each method."""

    def __init__(self, names: Tables, statements: Statements) -> None:
        # Keep a saved group as long as its chord, because the group says how the groups in the header are nested.
        self._steps = f"""
            WITH living_on AS ({statements.living_on})
            SELECT * FROM {names.chord_steps}({prefix_sql(names)}, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"""
        self._parts = f"SELECT part FROM {names.chord_parts} WHERE group_id = $1 ORDER BY index, arrived"
        self._active = f"SELECT group_id FROM {names.chords} WHERE NOT done AND count >= size AND expires_at > now()"
        self.cleanup: str = f"""
            WITH old AS (
                SELECT group_id FROM {names.chords} WHERE expires_at <= now()
                LIMIT {CLEANUP_BATCH} FOR UPDATE SKIP LOCKED
            ), parts AS (
                DELETE FROM {names.chord_parts} WHERE group_id = ANY(ARRAY(SELECT group_id FROM old))
            ), deleted AS (
                DELETE FROM {names.chords} WHERE group_id = ANY(ARRAY(SELECT group_id FROM old)) RETURNING 1
            )
            SELECT count(*)::int AS forgotten, count(*)::int AS removed FROM deleted"""

    async def take(self, connection: Any, steps: Sequence[ChordStep]) -> list[ChordState]:
        """Do the steps, all in one transaction."""
        # Sort by group: the function needs that order, and two batches must lock common rows in the same order.
        order = sorted(range(len(steps)), key=lambda index: steps[index].group_id)
        columns = zip(*(_row(steps[index]) for index in order), strict=True)
        rows = await connection.fetch(self._steps, *columns)
        states: list[ChordState] = [ChordState()] * len(steps)
        for index, row in zip(order, rows, strict=True):
            step = steps[index]
            parts: tuple[bytes, ...] = ()
            if step.op is ChordOp.PARTS and row["count"]:
                parts = tuple(record["part"] for record in await connection.fetch(self._parts, step.group_id))
            states[index] = ChordState(**row, parts=parts)
        return states

    async def active(self, connection: Any) -> list[str]:
        """Return the ids of the chords that are complete, and whose callbacks are not dispatched yet."""
        return [row["group_id"] for row in await connection.fetch(self._active)]


def _row(step: ChordStep) -> tuple[Any, ...]:
    return (
        step.op.value,
        step.group_id,
        step.token,
        step.lease,
        step.expires or math.inf,
        step.run,
        step.size,
        step.body,
        step.task_id,
        _NO_INDEX if step.index is None else step.index,
        step.part,
        step.failed,
        (step.group_expires or math.inf) if step.op in _KEEPING else None,
    )
