"""What running tasks cost, beside a bare limit: ``python -m benchmarks running``. See docs/benchmarks.md.

Each figure is the median of some repetitions, in which the limit and the library take turns; the ratio is the median of
those of neighbours. Producers and readers are processes of their own (`benchmarks.running_roles`), except on the memory
backend.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, Protocol

from aioresult import TaskRequest
from aioresult.backends.keyvalue import sibling

from .channel import Channel, spawn
from .running_roles import ROLES, SETTLE, Figures, backend_for
from .servers import Server
from .subject import new_ids

__all__ = ["Row", "measure", "table"]

_ROOT = Path(__file__).resolve().parent.parent
_TIME_LIMIT = 120.0
_RATE = 500.0


class Row(NamedTuple):
    """A line of the table: medians, and the median of the ratios."""

    work: str
    goal: str
    unit: str
    bare: float | None
    ours: float
    ratio: float | None = None
    lowest: float | None = None
    highest: float | None = None


# -- processes in step ------------------------------------------------------------------------------------------------


class _Player(Protocol):
    async def begin(self) -> None: ...
    async def figures(self) -> Figures: ...
    async def end(self) -> None: ...


class _Remote:
    """A role in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, channel: Channel) -> None:
        self._process = process
        self._channel = channel

    @classmethod
    async def start(cls, url: str, role: str, **params: Any) -> _Remote:
        spec = json.dumps({"role": role, "url": url, "params": params})
        environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
        player = cls(*await spawn([sys.executable, "-m", "benchmarks.running_roles", spec], env=environment))
        try:
            answer = await player._channel.receive()
            assert answer == "ready", answer
        except BaseException:
            await player.end()
            raise
        return player

    async def begin(self) -> None:
        await self._channel.send("begin")

    async def figures(self) -> Figures:
        figures: Figures = await self._channel.receive()
        if "error" in figures:
            raise RuntimeError(figures["error"])
        return figures

    async def end(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


class _Local:
    """A role in this process."""

    def __init__(self) -> None:
        self._ready = asyncio.Event()
        self._begun = asyncio.Event()

    @classmethod
    async def start(cls, url: str, role: str, **params: Any) -> _Local:
        player = cls()
        player._task = asyncio.create_task(player._play(url, role, params))
        await player._ready.wait()
        return player

    async def _play(self, url: str, role: str, params: dict[str, Any]) -> Figures:
        try:
            return await ROLES[role](url, self, **params)
        finally:
            self._ready.set()

    async def ready(self) -> None:
        self._ready.set()
        await self._begun.wait()

    async def begin(self) -> None:
        self._begun.set()

    async def figures(self) -> Figures:
        return await self._task

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    _task: asyncio.Task[Figures]


class _Part(NamedTuple):
    role: str
    params: dict[str, Any]


class _Stage:
    """Where the roles play: one server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def play(self, *parts: _Part, before: Callable[[], None] = lambda: None) -> list[Figures]:
        """The figures of each. They begin when all are ready, the first one last; then ``before`` is called."""
        kind = _Local if self.server.url.startswith("memory:") else _Remote
        players: list[_Player] = []
        try:
            async with asyncio.timeout(_TIME_LIMIT):
                for role, params in parts:
                    players.append(await kind.start(self.server.url, role, **params))
                before()
                for player in reversed(players):
                    await player.begin()
                return [await player.figures() for player in players]
        finally:
            for player in players:
                await player.end()


Measure = Callable[[], Awaitable[float]]


async def _row(
    work: str, goal: str, unit: str, repetitions: int, bare: Measure | None, ours: Measure, scale: float = 1.0
) -> Row:
    """``bare`` and ``ours`` in turn."""
    pairs = []
    for _ in range(repetitions):
        limit = None if bare is None else await bare()
        pairs.append((limit, await ours()))
    own = median(value for _, value in pairs) * scale
    limits = [limit for limit, _ in pairs if limit is not None]
    if not limits:
        return Row(work, goal, unit, None, own)
    ratios = [value / limit for limit, value in pairs if limit]
    return Row(work, goal, unit, median(limits) * scale, own, median(ratios), min(ratios), max(ratios))


# -- the figures ------------------------------------------------------------------------------------------------------


def _key(task_id: str) -> str:
    return f"celery-task-meta-{task_id}"


async def _next(progress: AsyncIterator[object]) -> object:
    return await anext(progress)


class _Figures:
    """Measures one figure after the other. ``quick`` has fewer repetitions."""

    def __init__(self, server: Server, quick: bool) -> None:
        self._server = server
        self._stage = _Stage(server)
        self._times = 3 if quick else 7
        self._messages = 500 if quick else 2000

    # A flush.

    async def _server_cpu(self, parts: Sequence[_Part], chunks: int) -> float:
        """Seconds of the server's main thread for each chunk."""
        began = 0.0

        def begin() -> None:
            nonlocal began
            began = self._server.cpu()

        await self._stage.play(*parts, before=begin)
        return (self._server.cpu() - began) / chunks

    async def flushes(self) -> list[Row]:
        rows = []
        for at_once, burst, goal in ((500, 1, "≤ 6"), (500, 10, "≤ 1.2"), (1, 1, "")):
            count = max(self._messages // 10, 50) if at_once > 1 else self._messages * 5

            async def bare(at_once: int = at_once, burst: int = burst, count: int = count) -> float:
                names = [_key(name) for name in new_ids(at_once)]
                sent = count * at_once * burst
                hear = _Part("bare_hear", {"names": names, "count": sent, "parse": False})
                return await self._server_cpu(
                    [_Part("bare_send", {"names": names, "count": count, "burst": burst}), hear], sent
                )

            async def ours(at_once: int = at_once, burst: int = burst, count: int = count) -> float:
                names = new_ids(at_once)
                channels = [sibling(_key(name), ".out") for name in names]
                hear = _Part("bare_hear", {"names": channels, "count": count * at_once, "parse": False})
                send = _Part("send", {"names": names, "count": count, "burst": burst})
                return await self._server_cpu([send, hear], count * at_once * burst)

            what = "server, a chunk, " + ("one at a time" if at_once == 1 else f"{burst} a flush, {at_once} tasks")
            rows.append(await _row(what, goal, "µs", self._times, bare, ours, 1e6))
        return rows

    # Latencies.

    async def _latency(self, key: str, sender: str, hearer: str, **params: Any) -> float:
        (name,) = new_ids(1)
        readers = params.pop("readers", 1)
        send = {"names": [name], "count": self._messages, "rate": params.pop("rate", _RATE)}
        hear = {"names": [name], "count": self._messages}
        if readers > 1:
            hear["readers"] = readers
        _, figures = await self._stage.play(_Part(sender, send), _Part(hearer, hear))
        return float(figures[key])

    async def latency(self) -> list[Row]:
        def ours(readers: int = 1, key: str = "p50", rate: float = _RATE) -> Measure:
            return lambda: self._latency(key, "send", "hear", readers=readers, rate=rate)

        def bare(readers: int = 1, key: str = "p50", rate: float = _RATE) -> Measure:
            return lambda: self._latency(key, "bare_send", "bare_hear", readers=readers, rate=rate)

        rows = []
        if self._server.url.startswith("redis:"):
            rows.append(await _row("send → reader, p50, 500/s", "≤ 1.3", "ms", self._times, bare(), ours()))
            rows.append(
                await _row("send → reader, p99, 500/s", "", "ms", self._times, bare(key="p99"), ours(key="p99"))
            )
            many = await _row(
                "100 readers, p50, 100/s", "", "ms", self._times, bare(readers=100, rate=100), ours(100, rate=100)
            )
            rows.append(many)
        one = ours(rate=100)
        rows.append(await _row("100 readers : one, p50, 100/s", "≤ 1.5", "ms", self._times, one, ours(100, rate=100)))
        return rows

    async def commit(self) -> list[Row]:
        async def bare() -> float:
            part = _Part("bare_commit", {"names": new_ids(1), "count": self._messages, "rate": 100.0})
            (figures,) = await self._stage.play(part)
            return float(figures["p50"])

        async def ours() -> float:
            return await self._latency("p50", "send", "hear", rate=100.0)

        return [await _row("send → reader, p50, 100/s : a commit", "≤ 2", "ms", self._times, bare, ours)]

    # Many streams.

    async def many(self, tasks: int, goal: str, bursts: Sequence[int] = (1, 10)) -> list[Row]:
        rows = []
        count = max(self._messages // 50, 20)
        connections: list[float] = []
        per_chunk: list[float] = []
        for burst in bursts:
            total = tasks * burst * count

            async def bare(burst: int = burst, total: int = total) -> float:
                names = new_ids(tasks)
                if self._server.url.startswith("memory:"):
                    (told,) = await self._stage.play(_Part("bare_queues", {"names": names, "count": count * burst}))
                    return float(total / (told["last"] - told["began"]) * 1e9)
                send = _Part("bare_send", {"names": names, "count": count, "burst": burst})
                sent, heard = await self._stage.play(send, _Part("bare_hear", {"names": names, "count": total}))
                return float(total / (heard["last"] - sent["began"]) * 1e9)

            async def ours(burst: int = burst, total: int = total) -> float:
                names = new_ids(tasks)
                send = _Part("send", {"names": names, "count": count, "burst": burst})
                hear = _Part("hear", {"names": names, "count": count * burst})

                def begin() -> None:
                    connections.append(self._server.counters()["connections"] - opened)

                opened = self._server.counters()["connections"] + 1  # the producer has one
                sent, heard = await self._stage.play(send, hear, before=begin)
                per_chunk.append(heard["cpu"] / total)
                return float(total / (heard["last"] - sent["began"]) * 1e9)

            limit = None if self._server.url.startswith("postgres") else bare
            what = f"{tasks:,} tasks at once, {burst} a flush"
            rows.append(await _row(what, goal, "/s", self._times, limit, ours))
            rows.append(Row("… the reader's CPU for a chunk", "", "µs", None, median(per_chunk) * 1e6))
            per_chunk.clear()
        if not self._server.url.startswith("memory:"):
            goal = "2" if self._server.url.startswith("redis:") else ""
            rows.append(Row("… connections of the reader", goal, "", None, median(connections)))
        return rows

    # Revoke.

    async def revoke(self) -> list[Row]:
        count = min(self._messages, 500)

        async def bare() -> float:
            (name,) = new_ids(1)
            send = _Part("bare_send", {"names": [name], "count": count, "rate": 100.0})
            _, heard = await self._stage.play(send, _Part("bare_hear", {"names": [name], "count": count}))
            return float(heard["p50"])

        async def ours() -> float:
            names = new_ids(count)
            revoke = _Part("revoke", {"names": names, "count": count, "rate": 100.0})
            began, ended = await self._stage.play(revoke, _Part("run", {"names": names, "count": count}))
            pairs = zip(began["began"], ended["at"], strict=True)
            return float(median(at - asked for asked, at in pairs) / 1e6)

        limit = bare if self._server.url.startswith("redis:") else None
        goal = "≤ 2.5" if limit else ""
        return [await _row("revoke → CancelledError, p50, 100/s", goal, "ms", self._times, limit, ours)]

    # In this process.

    async def progress(self) -> list[Row]:
        stores: list[float] = []

        async def bare() -> float:
            def nothing(current: float, total: float | None = None, message: str | None = None) -> None:
                pass

            return await self._calls(nothing)

        async def ours() -> float:
            async with backend_for(self._server.url) as backend, backend.running(new_ids(1)[0]) as task:
                await asyncio.sleep(SETTLE)
                before, began = self._server.steps(), perf_counter()
                calls = await self._calls(task.progress)
                stored = self._server.steps() - before
                # The first comes at once, the next after each interval.
                stores.append((stored - 1) / (perf_counter() - began))
            return calls

        rows = [await _row("progress, calls : an empty function", "≥ 200,000", "/s", self._times, bare, ours)]
        if not self._server.url.startswith("memory:"):
            rows.append(Row("… its stores, behind the first", "≤ 10", "/s", None, median(stores)))
        return rows

    async def _calls(self, progress: Callable[..., None]) -> float:
        """Calls a second, for two seconds, with a turn of the event loop after each thousand."""
        count = 0
        began = perf_counter()
        while perf_counter() - began < 2.0:
            for number in range(count, count + 1000):
                progress(number, 10**9, "loading")
            count += 1000
            await asyncio.sleep(0)
        return count / (perf_counter() - began)

    async def beats(self) -> list[Row]:
        lease = 0.6

        async def commands(tasks: int) -> float:
            """For each beat, of a process that runs so many tasks."""
            async with backend_for(self._server.url, lease=lease) as backend:
                runs = [backend.running(name) for name in new_ids(tasks)]
                for each in runs:
                    await each.__aenter__()
                before, began = self._server.steps(), perf_counter()
                await asyncio.sleep(lease * 5)
                found = self._server.steps() - before
                for each in runs:
                    await each.__aexit__(None, None, None)
                return found / ((perf_counter() - began) / (lease / 3))

        return [
            await _row("commands a beat, 100 tasks : one", "1", "", 1, lambda: commands(1), lambda: commands(100)),
        ]

    async def group(self, members: int = 10_000) -> list[Row]:
        self._server.reset()
        async with backend_for(self._server.url) as waiting, backend_for(self._server.url) as storing:
            names = new_ids(members)
            group = waiting.group(names)
            await group.save()

            async def store(index: int) -> None:
                request = TaskRequest(id=names[index], group=group.id, group_index=index)
                await storing.mark_as_done(names[index], 1, request)

            await store(members - 1)
            begin = self._server.traffic()
            progress = group.progress(interval=0.0)
            await anext(progress)
            first = self._server.traffic()
            following = asyncio.create_task(_next(progress))
            await asyncio.sleep(SETTLE)
            followed = self._server.traffic()
            changes = 100
            for index in range(changes):
                await store(index)
                await following
                following = asyncio.create_task(_next(progress))
            shown = self._server.traffic()
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await progress.aclose()
            await asyncio.sleep(SETTLE)
            unfollowed = self._server.traffic()
            for index in range(changes, 2 * changes):  # the same without a follower: the looks are what is left
                await store(index)
            alone = self._server.traffic()
            looks = (shown[0] - followed[0]) - (alone[0] - unfollowed[0])
            return [
                Row(f"progress of {members:,}, first: commands", "", "", None, first[0] - begin[0]),
                Row("… bytes, both ways", "", "", None, first[1] - begin[1]),
                Row("… commands to follow it", "", "", None, followed[0] - first[0]),
                Row("… commands a change, beside the store", "2", "", None, looks / changes),
                Row("… held by the server for it", "≤ 2", "kB", None, self._server.held(group.id or "") / 1000),
            ]


async def measure(server: Server, quick: bool) -> list[Row]:
    """All figures that ``server`` has."""
    figures = _Figures(server, quick)
    works: list[Callable[[], Awaitable[list[Row]]]] = [figures.latency]
    if server.url.startswith("redis:"):
        works.insert(0, figures.flushes)
        works += [lambda: figures.many(1000, "≥ 20,000"), figures.revoke, figures.progress, figures.beats]
        works.append(figures.group)
    elif server.url.startswith("postgres"):
        works += [figures.commit, lambda: figures.many(100, "≥ 10,000"), figures.revoke, figures.progress]
        works.append(figures.beats)
    else:
        works += [lambda: figures.many(1000, "≥ 20,000"), figures.revoke, figures.progress]
    rows: list[Row] = []
    for work in works:
        rows += await work()
    return rows


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [f"{'work':<44}{'goal':>10}{'bare':>12}{'ours':>12}  ratio"]
    for row in rows:
        ratio = ""
        if row.ratio is not None:
            ratio = f"  {row.ratio:.2f} ({row.lowest:.2f}–{row.highest:.2f})"
        lines.append(
            f"{row.work:<44}{row.goal:>10}{_shown(row.bare, row.unit):>12}{_shown(row.ours, row.unit):>12}{ratio}"
        )
    return "\n".join(lines)


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}" + (f" {unit}" if unit and not unit.startswith("/") else unit)
