"""What there is to measure: the benchmarks, their cases, who takes part in each, and the figures to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .stalls import STALLS

__all__ = ["BENCHMARK_NAMES", "LIMIT", "OURS", "Benchmark", "Case", "Entry", "Figure", "Goal", "suite"]

OURS = "aioresult"
LIMIT = "limit"


@dataclass(frozen=True)
class Entry:
    """One who takes part: a `benchmarks.subject.Subject`, by ``module:class``."""

    name: str
    subject: str
    options: dict[str, Any] = field(default_factory=dict)
    #: Fields of the spec in which its storer differs from it.
    stored_by: dict[str, Any] = field(default_factory=dict)
    #: The interpreter that runs it, if not this one.
    python: str | None = None
    #: Why it takes part in another way than one would think.
    note: str = ""


@dataclass(frozen=True)
class Goal:
    """A bound on the ratio to the limit, or to another case."""

    ratio: float
    at_least: bool

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.ratio:g}"

    def met(self, ratio: float) -> bool:
        return ratio >= self.ratio if self.at_least else ratio <= self.ratio


@dataclass(frozen=True)
class Figure:
    """One of those that a work returns."""

    key: str
    label: str
    unit: str
    goal: Goal | None = None
    #: Whether its ratio to the limit means anything.
    relative: bool = True


@dataclass(frozen=True)
class Case:
    """One work with its parameters, and who does it: first the library, then the limit, then others."""

    title: str
    work: str
    params: dict[str, Any]
    entries: tuple[Entry, ...]
    figures: tuple[Figure, ...]
    repetitions: int
    #: For how many waiters, where cases differ in that; see `Benchmark.growth`.
    size: int = 0


@dataclass(frozen=True)
class Benchmark:
    """Cases that belong together."""

    name: str
    title: str
    cases: tuple[Case, ...]
    #: Figures that should be the same, per waiter, in the first case and the last.
    growth: tuple[Figure, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """What the benchmarks are made for."""

    backend: str
    quick: bool
    #: The peers that serve this backend.
    peers: tuple[Entry, ...]
    #: For how many the stalls are measured, if not for the usual numbers.
    counts: tuple[int, ...] = ()

    @property
    def ours(self) -> Entry:
        return Entry(OURS, "benchmarks.ours:Ours")

    @property
    def limit(self) -> Entry:
        return Entry(LIMIT, f"benchmarks.bare_{self.backend}:Bare{self.backend.capitalize()}")

    @property
    def both(self) -> tuple[Entry, ...]:
        return self.ours, self.limit

    @property
    def repetitions(self) -> int:
        return 3 if self.quick else 5

    def goal(self, at_least: bool = True, **by_backend: float) -> Goal | None:
        ratio = by_backend.get(self.backend)
        return None if ratio is None else Goal(ratio, at_least)

    def sizes(self) -> Iterator[int]:
        yield from (1_000, 10_000) if self.quick else (1_000, 10_000, 100_000)


def _latency(plan: _Plan) -> Benchmark:
    figures = (
        Figure("p50", "p50", "ms", plan.goal(at_least=False, redis=1.5)),
        Figure("p99", "p99", "ms"),
    )
    samples = 100 if plan.quick else 200
    cases = tuple(
        Case(title, "latency", {"samples": samples, "idle": idle}, entries, figures, plan.repetitions, idle)
        for title, idle, entries in (
            ("one waiter", 0, (*plan.both, *plan.peers)),
            ("beside 10,000 idle waiters", 10_000, plan.both),
        )
    )
    return Benchmark("latency", "Wake latency: store in another process → waiter awake", cases)


def _stores(plan: _Plan) -> Benchmark:
    counts = {1: 1_000, 10: 5_000, 100: 20_000, 1_000: 30_000}
    pooled = Entry("one by one, pool of 10", "benchmarks.bare_postgres:OneByOne")
    others = (pooled,) if plan.backend == "postgres" else ()
    cases = []
    for size, shown in ((100, "100 B"), (10_000, "10 kB")):
        for concurrency, count in counts.items():
            count = count // 3 if plan.quick or size > 100 else count
            goal = plan.goal(redis=0.6, postgres=0.7) if concurrency == 1_000 and size == 100 else None
            peers = plan.peers if size == 100 else ()
            case = Case(
                f"{concurrency:,} at once, {shown}",
                "stores",
                {"count": count, "concurrency": concurrency, "size": size},
                (*plan.both, *others, *peers),
                (Figure("rate", "stores", "/s", goal),),
                plan.repetitions,
                concurrency,
            )
            cases.append(case)
    return Benchmark("stores", "Stores per second", tuple(cases))


def _wake(plan: _Plan) -> Benchmark:
    limit, cases = plan.limit, []
    # The same process stores for both, so that the waiting is what differs.
    waiting = Entry(OURS, plan.ours.subject, stored_by={"subject": limit.subject})
    whole = Entry("aioresult, storing too", plan.ours.subject)
    for count in plan.sizes():
        figures = (
            Figure("rate", "woken", "/s", plan.goal(redis=0.6, postgres=0.6) if count == 10_000 else None),
            Figure("each", "per waiter", "µs"),
            Figure("cpu_to_wait", "CPU to begin waiting", "µs"),
            Figure("cpu_to_wake", "CPU to wake", "µs"),
        )
        entries = (waiting, limit, whole, *(plan.peers if count < 100_000 else ()))
        repetitions = plan.repetitions if count < 100_000 else 3
        cases.append(Case(f"{count:,} waiters", "wake", {"count": count}, entries, figures, repetitions, count))
    growth = (Figure("each", "time per waiter", "µs", Goal(1.2, False)),)
    return Benchmark("wake", "Mass wake: all stored by another process as fast as it can", tuple(cases), growth)


def _join(plan: _Plan) -> Benchmark:
    cases = []
    for count in (1_000, 10_000):
        goal = plan.goal(at_least=False, redis=2.0) if count == 10_000 else None
        joined = (Figure("ms", "await group", "ms", goal),)
        streamed = (Figure("first", "as_completed, first", "ms"), Figure("last", "as_completed, last", "ms"))
        everyone = (*plan.both, *plan.peers)
        cases.append(Case(f"{count:,} finished", "join", {"count": count}, everyone, joined, plan.repetitions))
        title = f"{count:,} finished, one after the other"
        cases.append(Case(title, "completed", {"count": count}, plan.both, streamed, plan.repetitions))
    return Benchmark("join", "A group whose members have all finished", tuple(cases))


def _waiting(plan: _Plan) -> Benchmark:
    figures = (
        Figure("connections", "connections", "", relative=False),
        Figure("commands", "commands per waiter, to begin", "", relative=False),
        Figure("idle", "commands/s while idle", "/s", relative=False),
        Figure("heartbeats", "heartbeats/s while idle", "/s", relative=False),
        Figure("resident", "resident memory per waiter", "B"),
    )
    params = {"count": 10_000, "seconds": 5.0 if plan.quick else 15.0}
    cases = [Case("10,000 waiters", "waiting", params, plan.both, figures, 1)]
    if plan.peers:
        params = {**params, "count": 1_000}
        cases.append(Case("1,000 waiters", "waiting", params, (*plan.both, *plan.peers), figures, 1))
    return Benchmark("waiting", "What waiting costs while nothing happens", tuple(cases))


def _memory(plan: _Plan) -> Benchmark:
    goal = plan.goal(at_least=False, redis=2.0, postgres=2.0)
    cases = tuple(
        Case(
            f"{count:,} waiters",
            "memory",
            {"count": count},
            plan.both,
            (Figure("allocated", "allocated per waiter", "B", goal),),
            1,
            count,
        )
        for count in plan.sizes()
    )
    growth = (Figure("allocated", "memory per waiter", "B", Goal(1.2, False)),)
    return Benchmark("memory", "Memory per waiter: a task, its handle, and all that is kept for it", cases, growth)


def _chord(plan: _Plan) -> Benchmark:
    figures = (Figure("ms", "until the callback", "ms"),)
    case = Case("1,000 parts", "chord", {"parts": 1_000}, plan.both, figures, plan.repetitions)
    return Benchmark("chord", "A chord: all parts stored at once, until the callback has their values", (case,))


def _importing(plan: _Plan) -> Benchmark:
    figures = (Figure("ms", "time", "ms"), Figure("mb", "memory", "MB"), Figure("modules", "modules loaded", ""))
    driver = {"memory": "aioresult.backends.memory", "redis": "redis.asyncio", "postgres": "asyncpg"}[plan.backend]
    cases = tuple(
        Case(f"import {modules[-1]}", "importing", {"modules": modules}, (entry,), figures, plan.repetitions)
        for modules, entry in (
            (["aioresult"], plan.ours),
            (["aioresult", f"aioresult.backends.{plan.backend}"], plan.ours),
            (["asyncio"], plan.limit),
            ([driver], plan.limit),
        )
    )
    return Benchmark("import", "Import, in a fresh interpreter", cases)


def _stalls(plan: _Plan) -> Benchmark:
    counts = plan.counts or ((10_000,) if plan.quick else (10_000, 100_000))
    figures = (Figure("turn", "longest turn", "ms"), Figure("bare", "bare gather", "ms"))
    numbers = [(what, stalled, count) for count in counts for what, stalled in STALLS.items() if stalled.count is None]
    numbers += [(what, stalled, stalled.count) for what, stalled in STALLS.items() if stalled.count is not None]
    cases = tuple(
        Case(
            stalled.title,
            "stall",
            {"what": what, "count": count},
            (plan.ours,),
            figures,
            1 if plan.quick or count > 10_000 else 3,
            count,
        )
        for what, stalled, count in numbers
    )
    return Benchmark("stalls", "Stalls: the longest turn of the event loop", cases)


_MAKERS: dict[str, Callable[[_Plan], Benchmark]] = {
    "latency": _latency,
    "stores": _stores,
    "wake": _wake,
    "join": _join,
    "waiting": _waiting,
    "memory": _memory,
    "chord": _chord,
    "import": _importing,
    "stalls": _stalls,
}
BENCHMARK_NAMES = tuple(_MAKERS)


def suite(
    backend: str, names: tuple[str, ...], quick: bool, peers: tuple[Entry, ...], counts: tuple[int, ...] = ()
) -> list[Benchmark]:
    """The benchmarks of these names, all if there are none, for ``backend``; the stalls for ``counts``."""
    plan = _Plan(backend, quick, peers, counts)
    return [_MAKERS[name](plan) for name in names or BENCHMARK_NAMES]
