"""A chord: three workers count a text's words, and whoever finishes last hands the counts to the callback. In memory.

Then a chord with a part that fails, and one whose claimant crashes before it dispatches: a dispatcher takes over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import aioresult
from aioresult import Backend, ReadyChord

TEXTS = ["one for all", "and all for one", "said the four"]


async def dispatch(ready: ReadyChord) -> None:
    """Stands for sending the callback to a queue: the body says what to call, the results what with."""
    print(f"  {ready.body}({ready.results})")


async def worker(backend: Backend, group_id: str, index: int, text: str) -> None:
    """Runs one part. Exactly one of all the workers, the last, is handed the chord."""
    task_id = f"{group_id}-{index}"
    try:
        value: int | Exception = count(text)
        state = aioresult.states.SUCCESS
    except ValueError as exc:
        value, state = exc, aioresult.states.FAILURE
    ready = await backend.on_chord_part_return(group_id, task_id, state, value, index=index)
    if ready is not None:
        async with ready:  # leaving normally: done with; an exception gives the claim back
            if ready.error is None:
                await dispatch(ready)


def count(text: str) -> int:
    if not text:
        raise ValueError("nothing to count")
    return len(text.split())


async def run(backend: Backend, group_id: str, texts: Sequence[str]) -> None:
    await backend.create_chord(group_id, body="add_up", size=len(texts))
    async with asyncio.TaskGroup() as workers:
        for index, text in enumerate(texts):
            workers.create_task(worker(backend, group_id, index, text))


async def main() -> None:
    async with aioresult.connect("memory://", chord_lease=0.2) as backend:
        print("Three workers; the last one dispatches:")
        await run(backend, "words", TEXTS)
        print(f"  and anybody may await the counts: {await backend.chord('words')}")

        print("A part fails, and with it the chord:")
        await run(backend, "gaps", ["one", ""])
        try:
            await backend.chord("gaps")
        except aioresult.ChordError as exc:
            print(f"  {exc}")

        print("A claimant crashes; a dispatcher takes over when its lease has run out:")
        await backend.create_chord("lost", body="add_up", size=1)
        await backend.on_chord_part_return("lost", "lost-0", "SUCCESS", 7, index=0)  # claimed, and never dispatched
        async with aclosing(backend.ready_chords()) as chords:
            async for ready in chords:
                async with ready:
                    await dispatch(ready)
                break


asyncio.run(main())
