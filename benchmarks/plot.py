"""A picture of the figures: how latencies are spread, how the cost per waiter grows, how stores approach the limit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from .suite import LIMIT, OURS

__all__ = ["draw"]

_COLOURS = {OURS: "#0b6e4f", LIMIT: "#888888"}


def draw(data: dict[str, Any], file: Path) -> None:
    """``data`` as it is written by ``--json``."""
    drawn = {benchmark["name"]: benchmark for benchmark in data["benchmarks"]}
    panels = [(name, panel) for name, panel in _PANELS if name in drawn]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (name, panel) in zip(axes[0], panels, strict=True):
        panel(axis, drawn[name])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    machine = data["facts"]
    figure.suptitle(
        f"{data['backend']}: {machine['server']}, {machine['python']}, {machine['cores']} cores", fontsize=10
    )
    figure.savefig(file, dpi=130)


def _latency(axis: Any, benchmark: dict[str, Any]) -> None:
    for case, style in zip(benchmark["cases"], ("-", "--"), strict=False):
        for entry in case["entries"]:
            samples = sorted(sample for run in entry["runs"] for sample in run["samples"])
            if samples:
                shares = [(index + 1) / len(samples) for index in range(len(samples))]
                colour = _COLOURS.get(entry["name"])
                axis.plot(samples, shares, style, color=colour, label=f"{entry['name']}, {case['title']}")
    axis.set(title="wake latency", xlabel="ms", ylabel="share of wake-ups", xscale="log")


def _stores(axis: Any, benchmark: dict[str, Any]) -> None:
    cases = [case for case in benchmark["cases"] if case["params"]["size"] == 100]
    for name, points in _lines(cases, "rate"):
        axis.plot(*zip(*points, strict=True), "o-", color=_COLOURS.get(name), label=name)
    axis.set(title="stores per second, 100 B", xlabel="calls at once", xscale="log", yscale="log")


def _wake(axis: Any, benchmark: dict[str, Any]) -> None:
    for name, points in _lines(benchmark["cases"], "each"):
        axis.plot(*zip(*points, strict=True), "o-", color=_COLOURS.get(name), label=name)
    axis.set(title="time to wake, per waiter", xlabel="waiters", ylabel="µs", xscale="log", ylim=(0, None))


def _memory(axis: Any, benchmark: dict[str, Any]) -> None:
    for name, points in _lines(benchmark["cases"], "allocated"):
        axis.plot(*zip(*points, strict=True), "o-", color=_COLOURS.get(name), label=name)
    axis.set(title="memory per waiter", xlabel="waiters", ylabel="bytes", xscale="log", ylim=(0, None))


def _lines(cases: list[dict[str, Any]], key: str) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """The points ``(size, median)`` of each participant."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for case in cases:
        for entry in case["entries"]:
            if entry["runs"]:
                point = case["size"], median(run[key] for run in entry["runs"])
                lines.setdefault(entry["name"], []).append(point)
    yield from lines.items()


_PANELS = (("latency", _latency), ("stores", _stores), ("wake", _wake), ("memory", _memory))
