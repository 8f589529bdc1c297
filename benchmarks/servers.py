"""The servers that the benchmarks start, and what can be asked of them from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import redis

import aioresult
from tests.servers import postgres_server, redis_server

__all__ = ["Server", "start"]


class Server:
    """No server at all: for the memory backend."""

    url = "memory://"
    version = ""

    def reset(self) -> None:
        """Remove what a measurement has left."""

    def counters(self) -> dict[str, int]:
        """``connections``, ``commands`` and, apart from these, ``heartbeats``, without those of this object."""
        return {"connections": 1, "commands": 0, "heartbeats": 0}

    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        return 0.0

    def steps(self) -> int:
        """Commands that store or note something, so far, without what they do inside the server."""
        return self.counters()["commands"]

    def traffic(self) -> tuple[int, int]:
        """Commands so far, and bytes so far in both directions."""
        return self.counters()["commands"], 0

    def held(self, group_id: str) -> int:
        """Bytes of memory for the counts of a group."""
        return 0


class _Redis(Server):
    _NOT_COUNTED = frozenset({"info", "client|setinfo", "hello", "flushall"})

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = redis.Redis.from_url(url)
        self.version = f"Redis {self._info('server')['redis_version']}"

    def _info(self, section: str) -> dict[str, Any]:
        info: dict[str, Any] = self._client.info(section)
        return info

    def reset(self) -> None:
        self._client.flushall()

    def counters(self) -> dict[str, int]:
        calls = {
            name.removeprefix("cmdstat_"): fields["calls"]
            for name, fields in self._info("commandstats").items()
            if name.removeprefix("cmdstat_") not in self._NOT_COUNTED
        }
        heartbeats = calls.pop("ping", 0)
        connections = self._info("clients")["connected_clients"] - 1
        return {"connections": connections, "commands": sum(calls.values()), "heartbeats": heartbeats}

    def steps(self) -> int:
        return int(self._info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])

    def cpu(self) -> float:
        used = self._info("cpu")
        return float(used["used_cpu_sys_main_thread"] + used["used_cpu_user_main_thread"])

    def traffic(self) -> tuple[int, int]:
        stats = self._info("stats")
        in_both = stats["total_net_input_bytes"] + stats["total_net_output_bytes"]
        return self.counters()["commands"], in_both

    def held(self, group_id: str) -> int:
        client: Any = self._client
        keys = [key for key in client.keys(f"*{group_id}*") if not key.endswith(group_id.encode())]
        return sum(client.memory_usage(key) for key in keys)


class _Postgres(Server):
    _COUNT = """
        SELECT (SELECT count(*) - 1 FROM pg_stat_activity WHERE backend_type = 'client backend'),
               coalesce(sum(calls) FILTER (WHERE query <> 'SELECT $1'), 0)::int,
               coalesce(sum(calls) FILTER (WHERE query = 'SELECT $1'), 0)::int
        FROM pg_stat_statements WHERE query NOT LIKE '%pg_stat_statements%'"""

    def __init__(self, url: str) -> None:
        self.url = url
        asyncio.run(aioresult.connect(url, create=True).create_schema())  # type: ignore[attr-defined]
        self._connection = psycopg.connect(url, autocommit=True)
        self._connection.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
        self.version = f"PostgreSQL {self._connection.info.server_version // 10000}"

    def reset(self) -> None:
        self._connection.execute(
            "TRUNCATE celery_taskmeta, celery_tasksetmeta, celery_taskmeta_expiry, celery_tasksetmeta_expiry, "
            "celery_tasksetmeta_chord, celery_tasksetmeta_chord_part"
        )

    def counters(self) -> dict[str, int]:
        row = self._connection.execute(self._COUNT).fetchone()
        assert row is not None
        return dict(zip(("connections", "commands", "heartbeats"), row, strict=True))


@contextmanager
def start(backend: str, durable: bool = False) -> Iterator[Server]:
    """``memory``, ``redis`` or ``postgres``, for as long as the block runs. PostgreSQL with fsync if ``durable``."""
    if backend == "redis":
        # More clients than peers with a connection per waiter need; no limit that would cut a subscriber off.
        with redis_server("--maxclients", "20000") as server:
            yield _Redis(server.url)
    elif backend == "postgres":
        with postgres_server(durable, "shared_preload_libraries=pg_stat_statements", "max_connections=200") as database:
            yield _Postgres(database.url)
    else:
        yield Server()
