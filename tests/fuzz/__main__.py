"""``python -m tests.fuzz (codec|redis|postgres) [-max_total_time=60]``, with atheris: ``pip install atheris``."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["aioresult"]):
    from . import targets

_loop = asyncio.new_event_loop()


def _redis(data: bytes) -> None:
    for listening in (False, True):
        _loop.run_until_complete(targets.redis_replies(data, listening))


_TARGETS = {
    "codec": targets.stored_result,
    "redis": _redis,
    "postgres": lambda data: targets.notification(data.decode("utf-8", "replace")),
}

if __name__ == "__main__":
    name = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(targets.SEEDS[name]):
            (Path(corpus) / str(number)).write_bytes(seed)
        atheris.Setup([*sys.argv, corpus], _TARGETS[name])
        atheris.Fuzz()
