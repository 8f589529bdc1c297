"""Runs the cases: every measurement in a process of its own, the participants in turn, within a time limit."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .channel import Channel, spawn
from .progress import Progress
from .servers import Server
from .suite import LIMIT, Benchmark, Case, Entry

__all__ = ["Measured", "Outcome", "Spread", "run"]

_ROOT = Path(__file__).resolve().parent.parent
#: Seconds for one measurement.
_TIME_LIMIT = 120.0


@dataclass(frozen=True)
class Spread:
    """The middle and the ends of the repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass
class Measured:
    """What one participant came to in one case."""

    entry: Entry
    runs: list[dict[str, Any]] = field(default_factory=list)
    #: Why there is no more.
    failure: str | None = None

    def values(self, key: str) -> list[float]:
        return [run[key] for run in self.runs]


@dataclass
class Outcome:
    """One case with all who took part."""

    case: Case
    measured: list[Measured]

    def of(self, name: str) -> Measured | None:
        return next((each for each in self.measured if each.entry.name == name), None)

    def ratio(self, measured: Measured, key: str) -> Spread | None:
        """To the limit: of each repetition to that next to it, so that what slows both down cancels out."""
        limit = self.of(LIMIT)
        if limit is None or not limit.runs or not measured.runs:
            return None
        pairs = zip(measured.values(key), limit.values(key), strict=False)
        ratios = [value / bare for value, bare in pairs if bare]
        return Spread.of(ratios) if ratios else None


async def run(benchmark: Benchmark, server: Server, progress: Progress) -> list[Outcome]:
    """All cases of ``benchmark``."""
    outcomes = []
    for case in benchmark.cases:
        measured = [Measured(entry) for entry in case.entries]
        for repetition in range(case.repetitions):
            for each in measured:
                progress.step(
                    f"{benchmark.name}: {case.title}: {each.entry.name} ({repetition + 1}/{case.repetitions})"
                )
                if each.failure is None:
                    server.reset()
                    await _measure(case, each, server)
        outcomes.append(Outcome(case, measured))
    return outcomes


async def _measure(case: Case, measured: Measured, server: Server) -> None:
    entry = measured.entry
    spec = {
        "subject": entry.subject,
        "url": server.url,
        "options": entry.options,
        "stored_by": entry.stored_by,
        "work": case.work,
        "params": case.params,
        "local": server.url.startswith("memory:"),
    }
    command = [entry.python or sys.executable, "-m", "benchmarks.child", json.dumps(spec)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONWARNINGS": "ignore"}
    process, channel = await spawn(command, env=environment, stderr=asyncio.subprocess.DEVNULL, start_new_session=True)
    try:
        async with asyncio.timeout(_TIME_LIMIT):
            answer = await _answer(channel, server)
    except TimeoutError:
        answer = {"error": f"not done within {_TIME_LIMIT:g} s"}
    except EOFError:
        answer = {"error": f"the process ended with {await process.wait()}"}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)  # with the storer that it started
        await process.wait()
    if "figures" in answer:
        measured.runs.append(answer["figures"])
    else:
        measured.failure = answer.get("unsupported") or answer["error"]


async def _answer(channel: Channel, server: Server) -> dict[str, Any]:
    while True:
        message: dict[str, Any] = await channel.receive()
        if "ask" not in message:
            return message
        await channel.send(server.counters())
