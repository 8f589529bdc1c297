"""Does it matter whose table it is? ``python -m benchmarks.postgres_tables`` starts a PostgreSQL and prints the answer.

A row is stored as Celery stores it, in Celery's own table and in that of django-celery-results in turn. The time goes
from before the INSERT until the waiter has the value. See docs/postgres.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from pathlib import Path
from statistics import quantiles
from time import perf_counter

import asyncpg

from aioresult.backends.postgres import PostgresBackend
from tests.servers import postgres_server

DJANGO = "django_celery_results_taskresult"
STORES = {
    "celery_taskmeta": """
        INSERT INTO celery_taskmeta (id, task_id, status, result, date_done)
        VALUES (nextval('task_id_sequence'), $1, 'SUCCESS', '7', now())""",
    DJANGO: f"""
        INSERT INTO {DJANGO} (task_id, status, content_type, content_encoding, result, date_created, date_done, meta)
        VALUES ($1, 'SUCCESS', 'application/json', 'utf-8', '7', now(), now(), '{{"children": []}}')""",
}


async def measure(url: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds from the store to the waiter, for each table."""
    taken: dict[str, list[float]] = {table: [] for table in STORES}
    storer = await asyncpg.connect(url)
    try:
        async with (
            PostgresBackend(url, create=True, table="celery_taskmeta") as celerys,
            PostgresBackend(url, create=True, table=DJANGO) as djangos,
        ):
            for number in range(rounds):
                for backend, (table, store) in zip((celerys, djangos), STORES.items(), strict=True):
                    task_id = f"task-{number}"
                    waiter = asyncio.ensure_future(backend.wait_for(task_id))
                    hub = backend._shards[0].hub
                    while not backend._waiting or hub._to_subscribe or hub._to_read_first:  # noqa: ASYNC110
                        await asyncio.sleep(0.001)
                    await backend.get_outcomes(["done when everything before it is"])
                    began = perf_counter()
                    await storer.execute(store, task_id)
                    await waiter
                    taken[table].append((perf_counter() - began) * 1e3)
    finally:
        await storer.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2_000)
    rounds = parser.parse_args().rounds
    with postgres_server() as server:
        environ = os.environ | {"AIORESULT_TEST_DJANGO": server.url}
        root = Path(__file__).parent.parent
        subprocess.run([sys.executable, "-m", "tests.django_app"], cwd=root, env=environ, check=True)
        taken = asyncio.run(measure(server.url, rounds))
    print("store → waiter, ms             p50     p99")
    for table, times in taken.items():
        percentiles = quantiles(times, n=100)
        print(f"{table:<34}{percentiles[49]:.2f}  {percentiles[98]:6.2f}")


if __name__ == "__main__":
    main()
