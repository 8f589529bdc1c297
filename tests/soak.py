"""Three processes store, run, wait, read, cancel, revoke, forget and die at random, while network and server fail.

``python -m tests.soak --minutes 60 [--seconds 10] [--backend redis|postgres|cluster|sentinel] [--seed 1]`` prints a
table, and ends with an exit code other than 0 if anything that docs/guarantees.md promises did not hold:

- every result that was reported as stored is there, with its value, until it is forgotten or expires
- every waiter got the value, however often it was cancelled or its process killed and started again, and got it soon
- every reader of an output got each chunk once and in order, however often it left, its worker died, or it was killed
- every task that was revoked, and none other, is REVOKED, unless it had ended before
- nothing is kept without an expiry; no subscription and no connection outlives the processes
- the memory of the process that was never killed is flat once it has warmed up
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil

import aioresult
from aioresult import (
    Backend,
    BackendConnectionError,
    OutputGap,
    OutputRestarted,
    OutputSuperseded,
    TaskRevokedError,
    WorkerLostError,
)

from .cluster_places import ClusterPlace, SentinelPlace
from .fault_proxy import Behaviour, FaultProxy, cut_anywhere, late_subscriptions, trickle
from .sites import Place, PostgresSite, RedisSite, eventually

T = TypeVar("T")

SITES: dict[str, Callable[[], Place]] = {
    "redis": RedisSite,
    "postgres": PostgresSite,
    "cluster": ClusterPlace,
    "sentinel": SentinelPlace,
}
PROCESSES = 3
#: How many ids are under way at once.
UNDER_WAY = 300
EXPIRES = 7200.0
LEASE = 2.0
#: Of runs shorter than so many seconds the memory is reported, and not judged.
WARMED_UP = 120.0
#: So many seconds after a result was stored its waiters have been told, whatever goes wrong, unless their process was
#: killed. It is less than the longest time for which they wait: then they would look again, and find what was stored.
SOON = 30.0
MEGABYTE = 2**20


def value_of(task_id: str) -> list[Any]:
    return [task_id, "x" * (hash_of(task_id) % 3000)]


def hash_of(task_id: str) -> int:
    """The same in every process."""
    return sum(ord(character) * 31**index for index, character in enumerate(task_id[-6:]))


def chunks_of(task_id: str) -> list[Any]:
    """What a task sends when it runs; few send much."""
    return [[number, "x" * (number % 50)] for number in range(hash_of(task_id) % (500 if hash_of(task_id) % 20 else 3))]


def is_revoked(task_id: str) -> bool:
    """Whether somebody revokes the task, at some time."""
    return task_id.startswith("run") and hash_of(task_id) % 3 == 0


async def persistently(call: Callable[[], Awaitable[None]]) -> None:
    """Until it has been done, should the server be away for longer than ``retry_for``."""
    while True:
        with contextlib.suppress(BackendConnectionError):
            await call()
            return
        await asyncio.sleep(0)


# -- a process: does what it is told on stdin, and says on stdout when it is done ------------------------------------


class Worker:
    def __init__(self, backend: Backend, may_lose: bool) -> None:
        self._backend = backend
        #: Whether a server that crashes may lose what it has confirmed of an output.
        self._may_lose = may_lose
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            task = asyncio.create_task(self._do(*line.decode().split()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _do(self, what: str, task_id: str) -> None:
        call = {
            "store": self._store,
            "wait": self._wait,
            "forget": self._forget,
            "run": self._run,
            "read": self._read,
            "follow": self._follow,
            "revoke": self._revoke,
        }[what]
        while True:
            try:
                await call(task_id)
            except BackendConnectionError:
                continue  # it was away for longer than retry_for
            except Exception as exc:
                print("failed", what, task_id, repr(exc), flush=True)
            else:
                print("done", what, task_id, flush=True)
            return

    async def _store(self, task_id: str) -> None:
        await asyncio.sleep(random.uniform(0, 0.3))
        await self._backend.mark_as_done(task_id, value_of(task_id))

    async def _forget(self, task_id: str) -> None:
        await self._backend.forget(task_id)

    async def _wait(self, task_id: str) -> None:
        while True:
            patience = random.choice([0.01, 0.1, 1.0, 60.0])
            with contextlib.suppress(TimeoutError):
                if random.random() < 0.5:
                    value = await self._backend.result(task_id).get(timeout=patience)
                else:
                    async with asyncio.timeout(patience):
                        value = await self._backend.result(task_id)
                assert value == value_of(task_id), f"a wrong value: {value!r}"
                return

    async def _run(self, task_id: str) -> None:
        async def body() -> list[Any]:
            task = aioresult.current_task()
            assert task is not None
            for chunk in chunks_of(task_id):
                await persistently(partial(task.output.send, chunk))
                task.progress(chunk[0])
                await asyncio.sleep(random.choice([0, 0, 0, 0.01]))
            await persistently(task.output.flush)
            return value_of(task_id)

        try:
            # Its process may have been killed between the end of the task and its last word.
            await self._backend.run(task_id, body, if_done="skip")
        except TaskRevokedError:
            assert is_revoked(task_id), "it was revoked by nobody"
        except OutputSuperseded:
            await self._run(task_id)  # by the last words of a process that was killed

    async def _read(self, task_id: str) -> None:
        chunks: list[Any] = []
        expected, cursor = chunks_of(task_id), None
        while True:
            stream = self._backend.result(task_id).stream(cursor)
            try:
                async with asyncio.timeout(random.choice([0.01, 0.1, 1.0, 60.0])), stream:
                    async for chunk in stream:
                        chunks.append(chunk)  # noqa: PERF401 - it may be cancelled in the middle
                assert chunks == expected, f"{len(chunks)} of {len(expected)} chunks, the last are {chunks[-3:]}"
                return
            except (TimeoutError, WorkerLostError):
                cursor = stream.cursor
            except OutputRestarted as restarted:
                chunks, cursor = [], restarted.cursor
            except OutputGap as gap:
                if not self._may_lose:
                    raise
                chunks, cursor = expected[: len(chunks) + gap.missed], gap.cursor
            except TaskRevokedError:
                assert is_revoked(task_id), "it was revoked by nobody"
                assert chunks == expected[: len(chunks)], f"the last of {len(chunks)} chunks are {chunks[-3:]}"
                return

    async def _follow(self, task_id: str) -> None:
        while True:
            with contextlib.suppress(TimeoutError, WorkerLostError):
                async with asyncio.timeout(random.choice([0.01, 0.1, 1.0, 60.0])):
                    metas = [meta async for meta in self._backend.result(task_id).updates()]
                assert [meta.ready for meta in metas] == [False] * (len(metas) - 1) + [True]
                assert metas[-1].result == value_of(task_id) or is_revoked(task_id), f"a wrong end: {metas[-1]!r}"
                return

    async def _revoke(self, task_id: str) -> None:
        await asyncio.sleep(random.uniform(0, 1))
        await self._backend.result(task_id).revoke("soak")


async def work(url: str, further: str, may_lose: str) -> None:
    options = {"heartbeat": 0.3, "expires": EXPIRES, "retry_for": 5.0, "lease": LEASE, **json.loads(further)}
    while True:
        with contextlib.suppress(BackendConnectionError):  # until it can be reached
            async with aioresult.connect(url, **options) as backend:
                await Worker(backend, bool(may_lose)).run()
                return


# -- the one who tells them ------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What became of it all on one kind of server."""

    name: str
    ids: int = 0
    kills: int = 0
    faults: int = 0
    cuts: int = 0
    connections: int = 0
    seconds: float = 0.0
    memory: list[int] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def row(self) -> tuple[str, ...]:
        early, late = self.early_and_late()
        return (
            self.name,
            f"{self.ids:,}",
            f"{self.ids / self.seconds:,.0f}",
            str(self.kills),
            str(self.faults),
            str(self.cuts),
            str(self.connections),
            f"{early / MEGABYTE:.1f} → {late / MEGABYTE:.1f}",
            str(len(self.violations)),
        )

    def early_and_late(self) -> tuple[float, float]:
        """The median of its memory in the second quarter of the time, and in the last."""
        quarter = max(len(self.memory) // 4, 1)
        return statistics.median(self.memory[quarter : 2 * quarter] or self.memory), statistics.median(
            self.memory[-quarter:]
        )


HEADER = ("server", "ids", "per s", "kills", "faults", "cuts", "connections", "MB", "violations")


class Soak:
    """One place, three processes; `run` for so many seconds, then let all that was begun come to its end."""

    def __init__(self, site: Place, seconds: float, seed: int) -> None:
        self._site, self._seconds = site, seconds
        self._chance = random.Random(seed)
        self.report = Report(site.name)
        self._processes: list[asyncio.subprocess.Process] = []
        self._readers: list[asyncio.Task[None]] = []
        #: By process, what it was told and has not done.
        self._told: list[dict[tuple[str, str], None]] = [{} for _ in range(PROCESSES)]
        #: By id, how many things are left to be done before it is over, or may be forgotten.
        self._left: dict[str, int] = {}
        #: By process, when it was started, for the last time.
        self._started = [0.0] * PROCESSES
        #: By id, when it was stored.
        self._stored: dict[str, float] = {}
        self._kept: set[str] = set()
        self._forgotten: list[str] = []
        self._progress = asyncio.Event()
        self._steps: set[asyncio.Future[Any]] = set()

    async def run(self) -> Report:
        try:
            await asyncio.to_thread(self._site.start)
            async with self._site.backend() as backend:  # which makes the tables, where there are any
                assert await backend.get_many(["a"])
            async with contextlib.AsyncExitStack() as stack:
                ports = self._site.ports()
                proxies = [await stack.enter_async_context(FaultProxy(port)) for port in ports]
                self._place = self._site.through(dict(zip(ports, (proxy.port for proxy in proxies), strict=True)))
                await self._soak(proxies)
                self.report.cuts = sum(proxy.cuts for proxy in proxies)
                self.report.connections = sum(proxy.accepted for proxy in proxies)
            await self._look_at_what_is_left()
        finally:
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            try:
                await self._mend()
            finally:
                self._site.remove()
        return self.report

    async def _soak(self, proxies: Sequence[FaultProxy]) -> None:
        for index in range(PROCESSES):
            await self._start(index)
        started = time.monotonic()
        disturbers = (self._fail(proxies), self._kill(), self._rearrange(), self._measure())
        disturbing = [asyncio.create_task(each) for each in disturbers]
        try:
            async with asyncio.timeout(self._seconds):
                await self._feed()
        except TimeoutError:
            pass
        self.report.seconds = time.monotonic() - started
        for task in disturbing:
            task.cancel()
        for outcome in await asyncio.gather(*disturbing, return_exceptions=True):
            if isinstance(outcome, Exception):
                self.report.violations.append(f"the soak itself failed: {outcome!r}")
        for proxy in proxies:
            proxy.behaviour = None
        await self._mend()
        try:
            async with asyncio.timeout(60):
                while self._left:
                    self._progress.clear()
                    await self._progress.wait()
        except TimeoutError:
            self.report.violations += [f"{task_id} never came to its end" for task_id in list(self._left)[:20]]
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        codes = await asyncio.gather(*(process.wait() for process in self._processes))
        await asyncio.gather(*self._readers)
        if set(codes) != {0}:
            self.report.violations.append(f"processes ended with {codes}")

    # -- the processes ------------------------------------------------------------------------------------------------

    async def _start(self, index: int) -> None:
        url, options = self._place
        words = (url, json.dumps(options), "may lose" if self._site.may_lose else "")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.soak", "--worker", *words),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=Path(__file__).parent.parent,
        )
        self._processes[index : index + 1] = [process]
        self._started[index] = time.monotonic()
        self._readers.append(asyncio.create_task(self._listen_to(index, process)))
        self._send(index, *self._told[index])

    def _send(self, index: int, *commands: tuple[str, str]) -> None:
        process = self._processes[index]
        assert process.stdin is not None
        if process.returncode is None and not process.stdin.is_closing():  # else its successor is told
            process.stdin.write("".join(f"{what} {task_id}\n" for what, task_id in commands).encode())

    def _tell(self, what: str, task_id: str, index: int) -> None:
        self._told[index][what, task_id] = None
        self._send(index, (what, task_id))

    async def _listen_to(self, index: int, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            if not line.endswith(b"\n"):
                break  # it was killed in the middle of a word, and its successor is told the same
            status, what, task_id, *error = line.decode().rstrip("\n").split(" ", 3)
            if (what, task_id) not in self._told[index]:
                continue  # the last word of one that was killed, and that has been told again
            del self._told[index][what, task_id]
            if status == "failed":
                self.report.violations.append(f"{what} {task_id}: {''.join(error)}")
            self._done(what, task_id, index)

    def _done(self, what: str, task_id: str, index: int) -> None:
        if what in ("store", "run"):
            self._stored[task_id] = time.monotonic()
        elif what not in ("revoke", "forget"):
            late = time.monotonic() - max(self._stored.get(task_id, math.inf), self._started[index])
            if late > SOON:
                self.report.violations.append(f"{what} {task_id} ended {late:.0f} s after it was stored")
        self._left[task_id] -= 1
        if not self._left[task_id]:
            if what != "forget" and self._chance.random() < 0.95:
                self._left[task_id] = 1
                self._tell("forget", task_id, self._chance.randrange(PROCESSES))
                return
            del self._left[task_id]
            self._stored.pop(task_id, None)
            self.report.ids += 1
            if what == "forget":
                self._forgotten = [*self._forgotten[-1000:], task_id]
            else:
                self._kept.add(task_id)
        self._progress.set()

    def _next(self, number: int) -> tuple[str, list[str]]:
        """An id, and what is to be done with it."""
        others = self._chance.randrange(1, 4)
        if self._chance.random() < 0.5:
            return f"id-{number}", ["store", *["wait"] * others]
        task_id = f"run-{number}"
        return task_id, ["run", *["read"] * others, "follow", *["revoke"] * is_revoked(task_id)]

    async def _feed(self) -> None:
        number = 0
        while True:
            while len(self._left) < UNDER_WAY:
                number += 1
                task_id, things = self._next(number)
                self._left[task_id] = len(things)
                for what in self._chance.sample(things, len(things)):
                    # No process can be told the same thing twice.
                    free = [index for index in range(PROCESSES) if (what, task_id) not in self._told[index]]
                    self._tell(what, task_id, self._chance.choice(free))
            self._progress.clear()
            await self._progress.wait()

    # -- what goes wrong ----------------------------------------------------------------------------------------------

    async def _kill(self) -> None:
        """All but the first, whose memory is watched."""
        while True:
            await asyncio.sleep(self._chance.uniform(1, 4))
            index = self._chance.randrange(1, PROCESSES)
            self._processes[index].kill()
            self.report.kills += 1
            await self._whole(self._replace(index))

    async def _replace(self, index: int) -> None:
        await self._processes[index].wait()
        await self._start(index)

    async def _fail(self, proxies: Sequence[FaultProxy]) -> None:
        behaviours: list[Behaviour] = [cut_anywhere(self._chance), trickle(self._chance, 50), late_subscriptions(0.1)]
        troubles = self._site.troubles(self._chance)
        while True:
            await asyncio.sleep(self._chance.uniform(0.1, 1))
            self.report.faults += 1
            some = self._chance.sample(proxies, self._chance.randint(1, len(proxies)))
            match self._chance.choice([*["behaviour"] * 4, "cut", "swallow", *troubles]):
                case "behaviour":
                    behaviour = self._chance.choice(behaviours)
                    for proxy in some:
                        proxy.behaviour = behaviour
                    await asyncio.sleep(self._chance.uniform(0.1, 1))
                    for proxy in some:
                        proxy.behaviour = None
                case "cut":
                    for proxy in some:
                        proxy.cut()
                case "swallow":
                    for proxy in some:
                        proxy.swallow()
                case trouble:
                    assert callable(trouble)
                    await self._whole(trouble())

    async def _rearrange(self) -> None:
        rearrangements = self._site.rearrangements(self._chance, lambda: list(self._left))
        while rearrangements:
            await asyncio.sleep(self._chance.uniform(0, 3))  # for what has been held up
            self.report.faults += 1
            await self._whole(self._chance.choice(rearrangements)())

    async def _whole(self, step: Awaitable[T]) -> T:
        """Do what must not be left half done: to cancel this is to go on, and `_mend` awaits the end of it."""
        task = asyncio.ensure_future(step)
        self._steps.add(task)
        task.add_done_callback(self._steps.discard)
        return await asyncio.shield(task)

    async def _mend(self) -> None:
        """Whatever `_fail`, `_kill` and `_rearrange` were in the middle of."""
        await asyncio.gather(*self._steps)

    async def _measure(self) -> None:
        process = psutil.Process(self._processes[0].pid)
        while True:
            self.report.memory.append(process.memory_info().rss)
            await asyncio.sleep(min(self._seconds / 40, 5.0))

    # -- afterwards ---------------------------------------------------------------------------------------------------

    async def _look_at_what_is_left(self) -> None:
        report = self.report
        async with self._site.backend() as reader:
            for meta in await reader.get_many(sorted(self._kept)):
                if meta.result != value_of(meta.task_id) and not (
                    meta.status == "REVOKED" and is_revoked(meta.task_id)
                ):
                    report.violations.append(f"{meta.task_id} was stored, and is {meta!r}")
            there = [meta.task_id for meta in await reader.get_many(self._forgotten) if meta.ready]
            if len(there) > 5:  # a store on a connection that was given up may be carried out late; see guarantees.md
                report.violations.append(f"{there} were forgotten, and are there")
        if endless := await self._site.without_expiry():
            report.violations.append(f"{endless} results have no expiry")
        try:
            await eventually(self._nobody_is_connected)
        except TimeoutError:
            report.violations.append(f"{await self._site.connections()} connections are left")
        early, late = report.early_and_late()
        # A process that has just started still grows; for how long depends on how busy the machine is.
        if self._seconds >= WARMED_UP and late > early * 1.1 + 8 * MEGABYTE:
            report.violations.append(f"memory grew from {early / MEGABYTE:.1f} to {late / MEGABYTE:.1f} MB")

    async def _nobody_is_connected(self) -> bool:
        return await self._site.connections() == 0


async def soak(names: Iterable[str], seconds: float, seed: int) -> list[Report]:
    async with asyncio.TaskGroup() as group:
        soaks = [group.create_task(Soak(SITES[name](), seconds, seed).run()) for name in names]
    return [each.result() for each in soaks]


def show(reports: list[Report]) -> None:
    rows = [HEADER, *(report.row() for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    for report in reports:
        for violation in report.violations[:20]:
            print(f"{report.name}: {violation}")


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        asyncio.run(work(*sys.argv[2:]))
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--backend", choices=SITES, action="append")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    given = parser.parse_args()
    seconds = given.minutes * 60 + given.seconds or 60.0
    print(f"{seconds:g} s, --seed {given.seed}", flush=True)
    reports = asyncio.run(soak(given.backend or list(SITES), seconds, given.seed))
    show(reports)
    return 1 if any(report.violations for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
