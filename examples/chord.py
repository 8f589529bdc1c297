"""Chords, in one process and without a server. A chord is a group of tasks, its parts, with one callback.

Three workers count the words of a text each. The worker that finishes last calls the callback with all counts. In a
second chord a part fails. In a third one the worker dies before it calls the callback, and a dispatcher takes over.
Install and run it in a checkout::

    pip install .
    python examples/chord.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import aioresult
from aioresult import Backend, ReadyChord

TEXTS = ["one for all", "and all for one", "said the four"]


async def dispatch(ready: ReadyChord) -> None:
    """Call the callback, which the body names, with the results. A real program sends it to a queue."""
    print(f"  {ready.body}({ready.results})")


async def worker(backend: Backend, group_id: str, index: int, text: str) -> None:
    """Run one part. Only the worker whose part is the last gets the chord."""
    task_id = f"{group_id}-{index}"
    try:
        value: int | Exception = count(text)
        state = aioresult.states.SUCCESS
    except ValueError as exc:
        value, state = exc, aioresult.states.FAILURE
    ready = await backend.on_chord_part_return(group_id, task_id, state, value, index=index)
    if ready is not None:
        async with ready:  # leaving normally: dispatched; an exception gives the claim back
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
        print(f"  and any process may await the counts: {await backend.chord('words')}")

        print("A part fails, and with it the chord:")
        await run(backend, "gaps", ["one", ""])
        try:
            await backend.chord("gaps")
        except aioresult.ChordError as exc:
            print(f"  {exc}")

        print("A worker crashes before it dispatches; a dispatcher takes over when the lease of the worker has ended:")
        await backend.create_chord("lost", body="add_up", size=1)
        await backend.on_chord_part_return(
            "lost", "lost-0", "SUCCESS", 7, index=0
        )  # this caller gets the claim, and never dispatches
        async with aclosing(backend.ready_chords()) as chords:
            async for ready in chords:
                async with ready:
                    await dispatch(ready)
                break


asyncio.run(main())
