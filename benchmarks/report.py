"""Tables for people, and all numbers for programs."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from .runner import Measured, Outcome, Spread
from .suite import LIMIT, OURS, Benchmark, Figure

__all__ = ["as_data", "table"]

_NAME = 34


def table(benchmark: Benchmark, outcomes: list[Outcome]) -> str:
    """One row for each participant and figure."""
    head = f"{benchmark.title}\n{'':{_NAME}}{'median':>12}  {'lowest – highest':>21}  {'of the limit':>18}  goal"
    lines = [head]
    for outcome in outcomes:
        lines.append(f" {outcome.case.title}")
        for figure in outcome.case.figures:
            if len(outcome.case.figures) > 1:
                lines.append(f"   {figure.label}")
            lines.extend(_row(outcome, measured, figure) for measured in outcome.measured if measured.runs)
        lines.extend(f"     {each.entry.name}: {each.failure}" for each in outcome.measured if each.failure)
        notes = {each.entry.note: each.entry.name for each in outcome.measured if each.entry.note}
        lines.extend(f"     {name}: {note}" for note, name in notes.items())
    lines.extend(_growth(benchmark, outcomes))
    return "\n".join(lines) + "\n"


def _row(outcome: Outcome, measured: Measured, figure: Figure) -> str:
    spread = Spread.of(measured.values(figure.key))
    row = f"     {measured.entry.name:{_NAME - 5}}{_shown(spread.median, figure.unit):>12}  "
    ends = f"{_shown(spread.low, '')} – {_shown(spread.high, '')}" if len(measured.runs) > 1 else ""
    row += f"{ends:>21}  "
    ratio = outcome.ratio(measured, figure.key)
    if measured.entry.name == LIMIT or ratio is None or not figure.relative:
        return row.rstrip()
    span = f" ({ratio.low:.2f}–{ratio.high:.2f})" if len(measured.runs) > 1 else ""
    row += f"{ratio.median:.2f}{span}".rjust(18)
    if measured.entry.name == OURS and figure.goal is not None:
        row += f"  {figure.goal} {'✓' if figure.goal.met(ratio.median) else '✗'}"
    return row


def _growth(benchmark: Benchmark, outcomes: list[Outcome]) -> Iterator[str]:
    """The first case and the last compared."""
    if len(outcomes) < 2:
        return
    first, last = outcomes[0], outcomes[-1]
    for figure in benchmark.growth:
        for name in (OURS, LIMIT):
            small, large = first.of(name), last.of(name)
            if small is None or large is None or not small.runs or not large.runs:
                continue
            ratio = median(large.values(figure.key)) / median(small.values(figure.key))
            row = f"   {figure.label}, {last.case.title} : {first.case.title}, {name}: {ratio:.2f}"
            if name == OURS and figure.goal is not None:
                row += f"  {figure.goal} {'✓' if figure.goal.met(ratio) else '✗'}"
            yield row


def _shown(value: float, unit: str) -> str:
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}" + (f" {unit}" if unit and not unit.startswith("/") else unit)


def as_data(benchmark: Benchmark, outcomes: list[Outcome]) -> dict[str, Any]:
    """Every number of every run."""
    return {
        "name": benchmark.name,
        "title": benchmark.title,
        "cases": [
            {
                "title": outcome.case.title,
                "params": outcome.case.params,
                "size": outcome.case.size,
                "entries": [
                    {
                        "name": each.entry.name,
                        "failure": each.failure,
                        "note": each.entry.note,
                        "runs": each.runs,
                        "ratios": {
                            figure.key: ratio.median
                            for figure in outcome.case.figures
                            if figure.relative and (ratio := outcome.ratio(each, figure.key)) is not None
                        },
                    }
                    for each in outcome.measured
                ],
            }
            for outcome in outcomes
        ],
    }
