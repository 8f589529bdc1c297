"""``python -m benchmarks``: start a server, measure, print tables.

See docs/benchmarks.md; and ``python -m benchmarks stalls`` for the longest turn of the event loop during cancellations,
wake-ups, closing, forgetting and large reads, beside that of a bare `asyncio.gather` (`benchmarks.stalls`); and
``python -m benchmarks running`` for running tasks, by themselves (`benchmarks.running`); and
``python -m benchmarks service`` for a web service beside other ways to wait (`benchmarks.service`); and
``python -m benchmarks cluster`` for a Redis Cluster beside a single server (`benchmarks.cluster`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import cluster, running, service, stalls
from .facts import facts
from .progress import Progress
from .report import as_data, table
from .runner import run
from .servers import start
from .suite import BENCHMARK_NAMES, Entry, suite

#: What is measured by itself, and prints a table of its own.
_ALONE = {"running": running, "service": service, "cluster": cluster}
_NAMES = ", ".join(BENCHMARK_NAMES)
_ALONE_NAMES = " alone, or ".join(_ALONE) + " alone"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="See docs/benchmarks.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these of {_NAMES}; or {_ALONE_NAMES}")
    parser.add_argument("--backend", choices=("redis", "postgres", "memory"), default="redis")
    parser.add_argument("--peers", action="store_true", help="other libraries too, each in an environment of its own")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, and nothing with 100,000 waiters")
    parser.add_argument(
        "--count", type=int, action="append", metavar="N", help="of stalls: with N waiters; may be given several times"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number of every run")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the latencies and the growth; of service an SVG"
    )
    arguments = parser.parse_args()
    if _alone(arguments.names):
        return arguments
    if unknown := set(arguments.names) - set(BENCHMARK_NAMES):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; there are {_NAMES}; or {_ALONE_NAMES}")
    if any(count < 1 for count in arguments.count or ()):
        parser.error("--count must be at least 1")
    if arguments.plot and find_spec("matplotlib") is None:  # said now, and not after minutes of measuring
        parser.error("--plot needs matplotlib: pip install -e '.[bench]'")
    return arguments


def main() -> None:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    if name := _alone(arguments.names):
        _run_alone(name, arguments)
        return
    peers: tuple[Entry, ...] = ()
    if arguments.peers:
        from .peers.environments import peers_for

        peers = peers_for(arguments.backend)
    benchmarks = suite(arguments.backend, tuple(arguments.names), arguments.quick, peers, tuple(arguments.count or ()))
    steps = sum(case.repetitions * len(case.entries) for benchmark in benchmarks for case in benchmark.cases)
    progress = Progress(steps)
    with start(arguments.backend) as server:
        data: dict[str, Any] = {"backend": arguments.backend, "facts": facts(server), "benchmarks": []}
        print(", ".join(f"{name} {value}" for name, value in data["facts"].items() if value), end="\n\n")
        for benchmark in benchmarks:
            outcomes = asyncio.run(run(benchmark, server, progress))
            progress.clear()
            shown = (
                stalls.table(benchmark.title, outcomes) if benchmark.name == "stalls" else table(benchmark, outcomes)
            )
            print(shown, flush=True)
            data["benchmarks"].append(as_data(benchmark, outcomes))
            if arguments.json:
                arguments.json.write_text(json.dumps(data, indent=1))
    if arguments.plot:
        from .plot import draw

        draw(data, arguments.plot)


def _alone(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 and names[0] in _ALONE else None


def _run_alone(name: str, arguments: argparse.Namespace) -> None:
    if name != "running" and arguments.backend != "redis":
        sys.exit(f"{name} runs on Redis: leave --backend out")
    with start(arguments.backend, durable=True) as server:
        data: dict[str, Any] = {"backend": arguments.backend, "facts": facts(server)}
        print(", ".join(f"{name} {value}" for name, value in data["facts"].items() if value), end="\n\n", flush=True)
        rows: list[Any] = asyncio.run(_ALONE[name].measure(server, arguments.quick))
    print(_ALONE[name].table(rows))
    if arguments.plot and name == "service":
        arguments.plot.write_text(service.drawing(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(data | {"rows": [row._asdict() for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
