"""The works: what is measured, of any `Subject`. Each returns figures by name; a list of numbers is of samples."""

from __future__ import annotations

import asyncio
import gc
import random
import sys
import tracemalloc
from collections.abc import Awaitable, Callable
from statistics import median, quantiles
from time import monotonic_ns, perf_counter, process_time
from typing import Any

from .channel import Channel
from .resident import resident_bytes
from .storer import LocalStorer, RemoteStorer, Storer, store_all
from .subject import Subject, new_ids, text

__all__ = ["WORKS", "Bench", "Figures"]

Figures = dict[str, Any]

#: How many stores are in flight where the storing is not what is measured.
_STORING = 1000
_VALUE = text(100)
#: Every path is run so many times before it is timed: imports, connections, the interpreter's specialised code.
_WARM_UP = 300


class Bench:
    """What a work has at hand: the subject, a storer, and counters of the server."""

    def __init__(self, subject: Subject, spec: dict[str, Any], channel: Channel) -> None:
        self.subject = subject
        self._spec = spec
        self._channel = channel
        self._storer: Storer | None = None

    async def storer(self) -> Storer:
        """A process that stores; where the spec says so, with a subject of another kind."""
        if self._storer is None:
            if self._spec.get("local"):
                self._storer = LocalStorer(self.subject)
            else:
                spec = {name: self._spec[name] for name in ("subject", "url", "options")}
                self._storer = await RemoteStorer.start({**spec, **self._spec.get("stored_by", {})})
            await self._storer.store_many(new_ids(_WARM_UP), _VALUE, 100)
        return self._storer

    async def counters(self) -> dict[str, int]:
        """Connections and commands so far, without those of this object."""
        answer = await self._channel.ask({"ask": "counters"})
        assert isinstance(answer, dict)
        return answer

    async def wake(self, count: int) -> float:
        """Have ``count`` waiters woken, for practice; the seconds it took."""
        task_ids = new_ids(count)
        waiters = [asyncio.create_task(self.subject.wait(task_id)) for task_id in task_ids]
        await settle()
        began = await (await self.storer()).store_many(task_ids, _VALUE, _STORING)
        await asyncio.gather(*waiters)
        return (monotonic_ns() - began) / 1e9

    async def close(self) -> None:
        if self._storer is not None:
            await self._storer.close()
            self._storer = None


async def settle(limit: float = 30.0) -> None:
    """Return once this process has nothing to do. A process that polls is never idle, hence ``limit``."""
    quiet, deadline = 0, perf_counter() + limit
    while quiet < 3 and perf_counter() < deadline:
        before = process_time()
        await asyncio.sleep(0.05)
        quiet = quiet + 1 if process_time() - before < 0.005 else 0


async def latency(bench: Bench, samples: int, idle: int) -> Figures:
    """From the moment before another process stores to the moment at which the waiter runs, ``idle`` others waiting."""
    storer = await bench.storer()
    others = [asyncio.create_task(bench.subject.wait(task_id)) for task_id in new_ids(idle)]
    await settle()
    took = []
    for number, task_id in enumerate(new_ids(samples + 20)):
        waiter = asyncio.create_task(_awake_at(bench.subject, task_id))
        await asyncio.sleep(random.uniform(0.01, 0.03))  # it is waiting by then; and no rhythm meets one of polling
        began = await storer.store_one(task_id, _VALUE)
        if number >= 20:
            took.append((await waiter - began) / 1e6)
        await waiter
    await _cancel(others)
    return {"p50": median(took), "p99": quantiles(took, n=100)[98], "samples": took}


async def _awake_at(subject: Subject, task_id: str) -> int:
    await subject.wait(task_id)
    return monotonic_ns()


async def stores(bench: Bench, count: int, concurrency: int, size: int) -> Figures:
    """Stores per second, ``concurrency`` at a time."""
    value = text(size)
    await store_all(bench.subject, new_ids(min(count, 10 * _WARM_UP)), value, concurrency)
    began = perf_counter()
    await store_all(bench.subject, new_ids(count), value, concurrency)
    return {"rate": count / (perf_counter() - began)}


async def wake(bench: Bench, count: int) -> Figures:
    """``count`` waiters, all stored by another process as fast as it can: until the last one is awake."""
    await bench.wake(_WARM_UP)
    task_ids = new_ids(count)
    storer = await bench.storer()
    gc.collect()
    cpu = process_time()
    waiters = [asyncio.create_task(bench.subject.wait(task_id)) for task_id in task_ids]
    await settle()
    registered = process_time()
    began = await storer.store_many(task_ids, _VALUE, _STORING)
    await asyncio.gather(*waiters)
    seconds = (monotonic_ns() - began) / 1e9
    return {
        "rate": count / seconds,
        "each": seconds / count * 1e6,
        "cpu_to_wait": (registered - cpu) / count * 1e6,
        "cpu_to_wake": (process_time() - registered) / count * 1e6,
    }


async def join(bench: Bench, count: int) -> Figures:
    """A group whose members have all finished."""
    practice, task_ids = new_ids(_WARM_UP), new_ids(count)
    storer = await bench.storer()
    await storer.store_many(practice, _VALUE, 100)
    await storer.store_many(task_ids, _VALUE, _STORING)
    await bench.subject.join(practice)
    gc.collect()
    began = perf_counter()
    values = await bench.subject.join(task_ids)
    seconds = perf_counter() - began
    assert list(values) == [_VALUE] * count
    return {"ms": seconds * 1e3}


async def completed(bench: Bench, count: int) -> Figures:
    """The first and the last item of `as_completed`, of a group that has finished."""
    practice, task_ids = new_ids(_WARM_UP), new_ids(count)
    storer = await bench.storer()
    await storer.store_many(practice, _VALUE, 100)
    await storer.store_many(task_ids, _VALUE, _STORING)
    async for _ in bench.subject.as_completed(practice):
        pass
    gc.collect()
    seen, began, first = 0, perf_counter(), 0.0
    async for _ in bench.subject.as_completed(task_ids):
        seen += 1
        first = first or perf_counter()
    last = perf_counter()
    assert seen == count
    return {"first": (first - began) * 1e3, "last": (last - began) * 1e3}


async def waiting(bench: Bench, count: int, seconds: float) -> Figures:
    """What ``count`` waiters cost while nothing happens: for the server, and in resident memory here."""
    await bench.wake(_WARM_UP)
    await bench.close()  # the storer's connections are not to be counted
    task_ids = new_ids(count)
    gc.collect()
    counted, resident = await bench.counters(), resident_bytes()
    waiters = [asyncio.create_task(bench.subject.wait(task_id)) for task_id in task_ids]
    await settle()
    begun, memory = await bench.counters(), resident_bytes() - resident
    await asyncio.sleep(seconds)
    ended = await bench.counters()
    await _cancel(waiters)
    return {
        "connections": begun["connections"],
        "commands": (begun["commands"] - counted["commands"]) / count,
        "idle": (ended["commands"] - begun["commands"]) / seconds,
        "heartbeats": (ended["heartbeats"] - begun["heartbeats"]) / seconds,
        "resident": memory / count,
    }


async def memory(bench: Bench, count: int) -> Figures:
    """Bytes that are allocated for each of ``count`` waiters, their ids apart."""
    await bench.wake(_WARM_UP)
    task_ids = new_ids(count)
    gc.collect()
    tracemalloc.start()
    waiters = [asyncio.create_task(bench.subject.wait(task_id)) for task_id in task_ids]
    await settle()
    gc.collect()
    allocated, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    await _cancel(waiters)
    return {"allocated": allocated / count}


async def chord(bench: Bench, parts: int) -> Figures:
    """From the first part to the callback with the values of all."""
    await bench.subject.chord(new_ids(_WARM_UP), _VALUE)
    began = perf_counter()
    await bench.subject.chord(new_ids(parts), _VALUE)
    return {"ms": (perf_counter() - began) * 1e3}


async def importing(bench: Bench, modules: list[str]) -> Figures:
    """A fresh interpreter that imports ``modules``: what it takes beyond one that imports nothing."""
    code = f"""
import sys, time
from benchmarks.resident import resident_bytes
before, began = resident_bytes(), time.perf_counter()
import {", ".join(modules)}
print((time.perf_counter() - began) * 1e3, (resident_bytes() - before) / 2**20, len(sys.modules))
"""
    await _output(sys.executable, "-c", code)  # compiles, and fills the file cache
    said = await _output(sys.executable, "-c", code)
    return dict(zip(("ms", "mb", "modules"), map(float, said.split()), strict=True))


async def _output(*command: str) -> bytes:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    return output


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


WORKS: dict[str, Callable[..., Awaitable[Figures]]] = {
    work.__name__: work for work in (latency, stores, wake, join, completed, waiting, memory, chord, importing)
}
