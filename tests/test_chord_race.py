"""Chords across real processes: who comes last, who dispatches, and who dies at it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from .harness import Harness

#: Fewer where only the topology is another.
CHORDS = {"redis": 100, "postgres": 100, "cluster": 10, "sentinel": 10}
PARTS, PROCESSES = 50, 4
ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.parametrize("store_name", CHORDS, indirect=True)


async def child(harness: Harness, *words: object) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "tests.chord_child", harness.url, *map(str, words)]
    return await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)


async def test_every_callback_is_dispatched_once_however_often_and_from_wherever_parts_come(harness: Harness) -> None:
    backend, chords = await harness.connect(), CHORDS[harness.name]
    await asyncio.gather(*(backend.create_chord(f"g{chord}", body=chord, size=PARTS) for chord in range(chords)))
    processes = [await child(harness, share, PROCESSES, chords, PARTS) for share in range(PROCESSES)]
    waiting = [asyncio.ensure_future(backend.chord(f"g{chord}").get()) for chord in range(chords)]
    assert [await process.wait() for process in processes] == [0] * PROCESSES
    assert await asyncio.gather(*waiting) == [list(range(PARTS))] * chords
    for chord in range(chords):
        assert await backend.exists(f"dispatched-g{chord}-0"), f"chord {chord} was not dispatched"
        assert not await backend.exists(f"dispatched-g{chord}-1"), f"chord {chord} was dispatched twice"


async def test_a_claimant_that_is_killed_is_stood_in_for(harness: Harness) -> None:
    backend = await harness.connect()
    await backend.create_chord("g", body="call me", size=1)
    claimant = await child(harness, "die", "g")
    assert claimant.stdout is not None
    assert await claimant.stdout.readline() == b"claimed\n"
    claimant.kill()
    await claimant.wait()
    assert await backend.chord("g").claim() is None  # the lease stands until it runs out
    async for ready in backend.ready_chords():
        async with ready:
            assert (ready.body, ready.results) == ("call me", [0])
        break
    assert await backend.chord("g") == [0]
