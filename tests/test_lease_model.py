"""Leases in simulated time, by the rules themselves: `aioresult.liveness.Beats`, and what the memory backend does.

Twelve workers live through 15 minutes in which the server is away now and then, for 3 to 90 seconds, and in which some
of them are killed. They come back within 7 seconds of the server, each in its own time. However long an outage lasts,
no worker that lives is taken for dead, and each one that was killed is found.
"""

from __future__ import annotations

import asyncio
import random
from heapq import heapify, heapreplace
from typing import NamedTuple

import pytest

from aioresult.backends import memory
from aioresult.backends.memory import MemoryBackend
from aioresult.liveness import Beats

from .conformance.test_running_store import NO_GAP

LEASE = 30.0
BEAT = LEASE / 3
WORKERS = 12
END = 900.0
RUNS = 300


class Clock:
    """Seconds, as they are simulated."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("aioresult.backends.memory.monotonic", clock)
    return clock


class Worker:
    """A process as `aioresult.liveness.Liveness` has it: what it beats with, and when."""

    def __init__(self, name: str, chance: random.Random, beats: type[Beats]) -> None:
        self.name = name
        self.beats = beats(LEASE)
        self.due = chance.uniform(0, BEAT)
        self.killed_at = chance.uniform(100, END - 200) if chance.random() < 0.3 else END
        #: While the server is there: when this worker has reached it again.
        self.connected_at = 0.0

    @property
    def next_at(self) -> float:
        """When it beats next."""
        at = max(self.connected_at, self.due)
        return at if at < self.killed_at else END


class Outcome(NamedTuple):
    #: Of workers that live.
    deaths: int
    #: Of workers that were killed, long enough ago.
    missed: int
    #: Seconds until each of the others was found.
    delays: list[float]


class Simulation:
    """One run of 15 minutes."""

    def __init__(self, seed: int, clock: Clock, beats: type[Beats], backend: type[MemoryBackend]) -> None:
        self._chance = random.Random(seed)
        self._clock = clock
        self._backend = backend()
        self._workers = [Worker(f"w{number}", self._chance, beats) for number in range(WORKERS)]
        self._up, self._flips_at = True, self._chance.uniform(20, 200)
        self._up_since = 0.0
        self._outcome = Outcome(0, 0, [])

    def run(self) -> Outcome:
        self._clock.now = 0.0
        for worker in self._workers:
            self._beat(worker, None)
        while self._flips_at < END:
            self._beat_until(self._flips_at)
            self._clock.now = self._flips_at
            self._flip()
        self._beat_until(END)
        return self._outcome._replace(missed=self._missed())

    def _beat_until(self, end: float) -> None:
        """All that happens until then, if the server is there."""
        due = [(worker.next_at, index) for index, worker in enumerate(self._workers)] if self._up else []
        heapify(due)
        while due and due[0][0] < end:
            self._clock.now, index = due[0]
            self._turn(self._workers[index])
            heapreplace(due, (self._workers[index].next_at, index))

    def _flip(self) -> None:
        chance, now = self._chance, self._clock.now
        self._up = not self._up
        self._flips_at = now + (chance.uniform(60, 250) if self._up else chance.choice([3, 20, 45, 90]))
        self._up_since = now
        for worker in self._workers:
            if self._up:
                worker.connected_at = now + chance.uniform(0.1, 7.0)
                worker.due = max(worker.due, worker.connected_at)
            elif worker.due < now + LEASE:  # it tries, and fails, and goes on trying
                worker.due = now
                worker.beats.failed()

    def _turn(self, worker: Worker) -> None:
        now = self._clock.now
        leases = self._backend.store.workers
        before = tuple(leases)
        worker.beats.went_through(self._beat(worker, worker.beats.last))
        worker.due = now + BEAT
        for gone in before if len(leases) < len(before) else ():
            if gone in leases:
                continue
            killed_at = self._workers[int(gone[1:])].killed_at
            if now < killed_at:
                self._outcome = self._outcome._replace(deaths=self._outcome.deaths + 1)
            else:
                self._outcome.delays.append(now - killed_at)

    def _beat(self, worker: Worker, last: float | None) -> float:
        """The primitive itself; in the memory backend it waits for nothing."""
        try:
            self._backend._beat(worker.name, LEASE, last).send(None)
        except StopIteration as done:
            return float(done.value)
        raise AssertionError("it waits")

    def _missed(self) -> int:
        settled = self._up and END - self._up_since > 3 * LEASE
        late = END - 3 * LEASE
        return sum(
            worker.killed_at < late and worker.name in self._backend.store.workers and settled
            for worker in self._workers
        )


def simulate(
    clock: Clock, beats: type[Beats] = Beats, backend: type[MemoryBackend] = MemoryBackend, runs: int = RUNS
) -> Outcome:
    outcomes = [Simulation(seed, clock, beats, backend).run() for seed in range(runs)]
    delays = [delay for outcome in outcomes for delay in outcome.delays]
    return Outcome(sum(each.deaths for each in outcomes), sum(each.missed for each in outcomes), delays)


def test_no_outage_is_a_death_and_no_death_is_missed(clock: Clock) -> None:
    outcome = simulate(clock)
    assert outcome.deaths == 0
    assert outcome.missed == 0
    assert len(outcome.delays) > 3 * RUNS
    assert min(outcome.delays) > LEASE - BEAT
    assert sorted(outcome.delays)[len(outcome.delays) // 2] < LEASE + BEAT


def test_without_outages_a_death_is_found_within_a_lease_and_a_beat(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Simulation, "_flip", lambda self: setattr(self, "_flips_at", END + 1))
    outcome = simulate(clock, runs=50)
    assert outcome.deaths == outcome.missed == 0
    assert max(outcome.delays) <= LEASE + BEAT


# -- mistakes ---------------------------------------------------------------------------------------------------------


class AtOnce(Beats):
    """Removes others with its first beat after an outage."""

    @property
    def last(self) -> float | None:
        return NO_GAP


class ForgetsNoOutage(Beats):
    """Takes its beats before an outage for a whole lease without a gap."""

    def failed(self) -> None:
        pass

    @property
    def last(self) -> float | None:
        long_enough = self._since is not None and self._last is not None and self._last - self._since >= self._lease
        return NO_GAP if long_enough else None

    def went_through(self, now: float) -> float:
        self._since = now if self._since is None else self._since
        self._last = now
        return 0.0


class Never(Beats):
    @property
    def last(self) -> float | None:
        return None


class NoGrace(MemoryBackend):
    """Removes also those whose lease has been over for long: when perhaps nobody could beat."""

    async def _beat(self, worker: str, lease: float, last: float | None = None) -> float:
        now: float = vars(memory)["monotonic"]()
        workers = self.store.workers
        workers[worker] = now + lease
        for other, until in tuple(workers.items()):
            if last is not None and until <= now:
                del workers[other]
        return now


@pytest.mark.parametrize("mistake", [AtOnce, ForgetsNoOutage])
def test_who_removes_others_too_early_is_found(clock: Clock, mistake: type[Beats]) -> None:
    assert simulate(clock, mistake, runs=30).deaths > 10
    assert simulate(clock, mistake, NoGrace, runs=30).deaths > 100


def test_who_removes_nobody_is_found(clock: Clock) -> None:
    assert simulate(clock, Never, runs=30).missed > 10


def test_the_server_alone_saves_those_that_were_away_for_long(clock: Clock) -> None:
    """A single process that came back early, by a rule that is wrong, removes nobody at once."""
    for backend, deaths in ((MemoryBackend, 0), (NoGrace, 1)):
        clock.now = 0.0
        store = backend()
        asyncio.run(store._beat("a", LEASE))
        clock.now = 3 * LEASE
        asyncio.run(store._beat("b", LEASE, NO_GAP))
        assert len(store.store.workers) == 2 - deaths
