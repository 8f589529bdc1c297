"""Which peers there are, and a virtual environment for each, made when it is first needed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..suite import Entry

__all__ = ["peers_for"]

_POLLS = "polls, by default every {} s"


@dataclass(frozen=True)
class _Peer:
    name: str
    subject: str
    requirements: tuple[str, ...]
    backend: str = "redis"
    note: str = ""
    #: Options of a second row with a larger pool, and what to call it.
    larger: dict[str, Any] = field(default_factory=dict)
    #: It has no operation that stores outside of its worker, but reads Celery's format.
    reads_celery: bool = False


_PEERS = (
    _Peer(
        "Celery 5.7",
        "benchmarks.peers.celery:CeleryRedis",
        ("celery[redis]==5.7.0",),
        note="a thread per waiter",
    ),
    _Peer(
        "Celery 5.7",
        "benchmarks.peers.celery:CeleryDatabase",
        ("celery[sqlalchemy]==5.7.0", "psycopg[binary]==3.3.2"),
        backend="postgres",
        note="a thread per waiter, which " + _POLLS.format(0.5),
    ),
    _Peer(
        "taskiq-redis 1.2",
        "benchmarks.peers.taskiq:Taskiq",
        ("taskiq-redis==1.2.4",),
        note=_POLLS.format(0.2),
        larger={"pool": 1000},
    ),
    _Peer("arq 0.28", "benchmarks.peers.arq:Arq", ("arq==0.28.0",), note=_POLLS.format(0.5), larger={"pool": 1000}),
    _Peer(
        "saq 0.26",
        "benchmarks.peers.saq:Saq",
        ("saq[redis]==0.26.4", "typing-extensions"),
        note="every waiter enqueues its job first",
    ),
    _Peer(
        "aio-celery 0.22",
        "benchmarks.peers.aio_celery:AioCelery",
        ("aio-celery[redis]==0.22.0",),
        note=_POLLS.format(0.5) + "; stored by the bare loop",
        larger={"pool": 1000},
        reads_celery=True,
    ),
    _Peer(
        "streaq 7.2",
        "benchmarks.peers.streaq:Streaq",
        ("streaq==7.2.0", "coredis==6.9.0"),
        note="a connection per waiter, by default of 64, and hangs when none is left",
        larger={"pool": 2000},  # with 1,000, just as many waiters hang
    ),
    _Peer(
        "docket 0.27",
        "benchmarks.peers.docket:DocketResults",
        ("pydocket==0.27.0", "redis==8.1.0"),
        note="a connection per waiter, by default of 100, and raises when none is left",
        larger={"pool": 1000},
    ),
)


def peers_for(backend: str) -> tuple[Entry, ...]:
    """The peers that keep results there. One whose environment cannot be made says so, and is left out."""
    return tuple(entry for peer in _PEERS if peer.backend == backend for entry in _entries(peer))


def _entries(peer: _Peer) -> Iterator[Entry]:
    try:
        python = str(_environment(peer))
    except subprocess.CalledProcessError as exc:
        print(f"{peer.name} could not be installed: {exc.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return
    by_us = {"subject": "benchmarks.bare_redis:BareRedis", "options": {}, "python": sys.executable}
    stored_by = by_us if peer.reads_celery else {}
    yield Entry(peer.name, peer.subject, {}, stored_by, python, peer.note)
    if peer.larger:
        name = f"{peer.name}, pool of {peer.larger['pool']:,}"
        yield Entry(name, peer.subject, peer.larger, stored_by, python, peer.note)


def _environment(peer: _Peer) -> Path:
    """The interpreter of an environment with just this peer; kept in the temporary folder for the next time."""
    pins = " ".join((sys.version, *peer.requirements))
    folder = Path(tempfile.gettempdir()) / f"aioresult-peer-{hashlib.sha256(pins.encode()).hexdigest()[:16]}"
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        print(f"installing {peer.name} in {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        command = [str(python), "-m", "pip", "install", "-q", *peer.requirements]
        subprocess.run(command, check=True, capture_output=True, text=True)
        done.touch()
    return python
