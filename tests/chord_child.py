"""A process of the race: brings parts of many chords, each twice, and dispatches what it claims.

``python -m tests.chord_child URL share of-processes chords parts`` or, to die between claim and dispatch,
``python -m tests.chord_child URL die GROUP``.
"""

from __future__ import annotations

import asyncio
import random
import sys

import aioresult
from aioresult import Backend, ReadyChord


async def dispatch(backend: Backend, ready: ReadyChord) -> None:
    """The callback's result is stored as a task; every dispatch, also a second one, leaves a task of its own."""
    async with ready:
        assert ready.results == list(range(len(ready.results)))
        number = 0
        while not await backend.mark_as_pending(f"dispatched-{ready.id}-{number}"):
            number += 1


async def bring(url: str, share: int, processes: int, chords: int, parts: int) -> None:
    async with aioresult.connect(url) as backend:
        # Every part comes from two of the processes, in an order of chance.
        mine = [
            (chord, part)
            for chord in range(chords)
            for part in range(parts)
            if (chord + part) % processes == share or (chord + part + 1) % processes == share
        ]
        random.shuffle(mine)

        async def part_returns(chord: int, part: int) -> None:
            ready = await backend.on_chord_part_return(f"g{chord}", f"g{chord}-{part}", "SUCCESS", part, index=part)
            if ready is not None:
                await dispatch(backend, ready)

        for first in range(0, len(mine), 200):
            await asyncio.gather(*(part_returns(*each) for each in mine[first : first + 200]))


async def die(url: str, group: str) -> None:
    """Claim, say so, and wait for the end."""
    async with aioresult.connect(url, chord_lease=0.5) as backend:
        ready = await backend.on_chord_part_return(group, "last", "SUCCESS", 0, index=0)
        assert ready is not None
        async with ready:
            print("claimed", flush=True)
            await asyncio.Event().wait()


if __name__ == "__main__":
    if sys.argv[2] == "die":
        asyncio.run(die(sys.argv[1], sys.argv[3]))
    else:
        asyncio.run(bring(sys.argv[1], *map(int, sys.argv[2:])))
