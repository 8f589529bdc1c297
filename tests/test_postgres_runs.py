"""Running tasks on PostgreSQL: what concerns its tables, locks, notifications and plans alone."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import asyncpg
import pytest

from aioresult import BackendRefusedError, TaskMeta
from aioresult.backends.postgres import PostgresBackend
from aioresult.backends.postgres.runs import _page_arguments
from aioresult.backends.postgres.schema import EXTENDED_COLUMNS
from aioresult.exceptions import OutputSuperseded
from aioresult.log import CLOSED, OUTPUT_TOPIC, START, Entry, Flush, OutputNews, Page, PageRequest, Place
from aioresult.record import Record
from aioresult.run import WORKER_TOPIC, RunOp, RunState, RunStep, Verdict
from aioresult.states import FAILURE, PENDING, RETRY, REVOKED, STARTED, SUCCESS

from .conformance.test_running_store import NO_GAP
from .harness import until

RUNNING = ("celery_taskmeta_output", "celery_taskmeta_log", "celery_taskmeta_run", "celery_taskmeta_worker")


@pytest.fixture
async def backend(postgres_url: str) -> AsyncIterator[PostgresBackend]:
    async with PostgresBackend(postgres_url) as backend:
        yield backend


def record(backend: PostgresBackend, task_id: str, state: str, result: Any = None, **terms: Any) -> Record:
    failed = state in (FAILURE, RETRY, REVOKED)
    meta = TaskMeta(task_id, state, KeyError(state) if failed else result, date_done=datetime.now(UTC))
    return Record(task_id, backend._encode(meta), **{"expires": backend.expires, **terms})


def start(backend: PostgresBackend, run: str, task_id: str, **terms: Any) -> RunStep:
    return RunStep(RunOp.START, task_id, run, "w", 600.0, record=record(backend, task_id, STARTED), **terms)


def finish(backend: PostgresBackend, run: str, task_id: str, state: str, **terms: Any) -> RunStep:
    return RunStep(RunOp.FINISH, task_id, run, state=state, record=record(backend, task_id, state), **terms)


def revoke(backend: PostgresBackend, task_id: str) -> RunStep:
    return RunStep(RunOp.REVOKE, task_id, record=record(backend, task_id, REVOKED), reason="why", lives=600.0)


async def take(backend: PostgresBackend, *steps: RunStep) -> list[Verdict]:
    states = await backend._run_steps(steps)
    return [state if isinstance(state, BaseException) else state.verdict for state in states]  # type: ignore[misc]


async def flush(
    backend: PostgresBackend, task_id: str = "t", epoch: int = 0, last: int = 1, writer: str = "p", **terms: Any
) -> int:
    terms = {"data": b'["%d"]' % last, "expires": 600.0, **terms}
    (outcome,) = await backend._append([Flush(task_id, writer, epoch, last, **terms)])
    return given(outcome)


def given(outcome: int | BaseException) -> int:
    """The epoch that came of a flush."""
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


async def page(backend: PostgresBackend, task_id: str = "t", after: Place = START, limit: int = 100) -> Page:
    (found,) = await backend._pages([PageRequest(task_id, after, limit)])
    assert isinstance(found, Page), found
    return found


class Hearing:
    """Collects what is told of a topic."""

    def __init__(self, backend: PostgresBackend, topic: str) -> None:
        self.news: list[Any] = []
        self._connected = asyncio.Event()
        backend._shards[0].hub.watch(topic, self, read_first=False)

    def receive(self, topic: str, outcome: Any) -> None:
        if self._connected.is_set() and isinstance(outcome, TaskMeta):  # and not the end of the backend
            self.news.append(outcome.result)
        self._connected.set()

    async def connected(self) -> Hearing:
        await self._connected.wait()
        return self


# -- many at once -----------------------------------------------------------------------------------------------------


async def test_whatever_happens_at_once_no_two_wait_for_each_other(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    chance = random.Random(7)
    ids = [f"t{number}" for number in range(12)]
    async with PostgresBackend(postgres_url) as one, PostgresBackend(postgres_url) as two:
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        await take(one, *(start(one, "r", task_id) for task_id in ids[::2]))
        await one.save_group("g", one.group(ids))

        async def some(backend: PostgresBackend, kind: int) -> None:
            for _ in range(12):
                few = chance.sample(ids, 8)
                run = chance.choice(["r", "s"])
                match kind:
                    case 0:
                        await backend._append([Flush(task_id, run, 0, 1, b"[1]", expires=9.0) for task_id in few])
                    case 1:
                        place = chance.randrange(9)
                        flushes = [Flush(task_id, run, 7, place, b"[1]", expires=float(place)) for task_id in few]
                        await backend._append([*flushes, Flush("new", run, 0, 1, b"[1]", run=run)])
                    case 2:
                        await take(backend, *(start(backend, run, task_id) for task_id in few))
                    case 3:
                        terms = {"output": Place(7, 9)}
                        await take(backend, *(finish(backend, run, task_id, FAILURE, **terms) for task_id in few))
                    case 4:
                        await take(backend, *(revoke(backend, task_id) for task_id in few))
                    case 5:
                        await backend._store(
                            [record(backend, task_id, FAILURE, group_id="g", expires=9.0) for task_id in few]
                        )
                    case 6:
                        versions = await backend._versions(few)
                        there = {task_id: version for task_id, version in zip(few, versions, strict=True) if version}
                        await backend._delete(list(there), list(there.values()))
                    case 7:
                        given = {"group_id": "g", "expires": 9.0}
                        steps = [finish(backend, "r", task_id, FAILURE) for task_id in few]
                        steps = [
                            step._replace(record=record(backend, step.task_id, FAILURE, **given)) for step in steps
                        ]
                        await take(backend, *steps)

        # The primitives themselves: a deadlock would be repeated above them.
        await asyncio.gather(*(some(backend, kind) for kind in range(8) for backend in (one, two)))
        assert await admin.fetchval(deadlocks) == 0


async def test_a_start_and_a_revoke_at_once_have_one_order(postgres_url: str) -> None:
    ids = [f"t{number}" for number in range(30)]
    async with PostgresBackend(postgres_url) as worker, PostgresBackend(postgres_url) as web:
        for task_id in ids:
            found = await asyncio.gather(take(worker, start(worker, "r", task_id)), take(web, revoke(web, task_id)))
            status = (await web.get_task_meta(task_id)).status
            assert [*found, status] in (
                [[Verdict.STARTED], [Verdict.ASKED], STARTED],
                [[Verdict.REVOKED], [Verdict.REVOKED], REVOKED],
            )


async def test_a_success_that_is_stored_at_once_with_any_step_stays(postgres_url: str) -> None:
    ids = [f"t{number}" for number in range(40)]
    async with PostgresBackend(postgres_url) as worker, PostgresBackend(postgres_url) as web:
        steps: list[Callable[[str], RunStep]] = [
            lambda task_id: finish(worker, "r", task_id, FAILURE),
            lambda task_id: start(worker, "r", task_id),
            lambda task_id: revoke(worker, task_id),
        ]
        for number, task_id in enumerate(ids):
            success = record(web, task_id, SUCCESS, 1)
            (verdict,), (stored,) = await asyncio.gather(
                take(worker, steps[number % 3](task_id)), web._store([success])
            )
            assert stored is True
            assert verdict not in (Verdict.ASKED, Verdict.NOTED, Verdict.SUPERSEDED)
            assert (await web.get_task_meta(task_id)).status == SUCCESS


async def waits_for_a_lock(connection: asyncpg.Connection[Any]) -> bool:
    return bool(await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))


async def test_a_flush_that_waited_for_an_opening_is_refused(
    backend: PostgresBackend, admin: asyncpg.Connection[Any]
) -> None:
    epoch = await flush(backend)
    async with admin.transaction():
        await backend._run_table.append([Flush("t", "q", 0, 1, b'["new"]')], admin)
        late = asyncio.create_task(flush(backend, "t", epoch, 2))
        await until(partial(waits_for_a_lock, admin))
    with pytest.raises(OutputSuperseded):
        await late
    assert [entry.data for entry in (await page(backend)).entries] == [b'["new"]']


async def test_of_two_openings_at_once_the_second_has_the_output(
    backend: PostgresBackend, admin: asyncpg.Connection[Any]
) -> None:
    await flush(backend)
    await admin.execute("UPDATE celery_taskmeta_log SET epoch = $1", 10**15)  # as if the clock had been set back
    async with admin.transaction():
        (first,) = await backend._run_table.append([Flush("t", "q", 0, 1, b'["first"]')], admin)
        second = asyncio.create_task(flush(backend, writer="s", data=b'["second"]'))
        await until(partial(waits_for_a_lock, admin))
    assert (first, await second) == (10**15 + 1, 10**15 + 2)
    assert (await page(backend)).entries == (Entry(10**15 + 2, 1, b'["second"]'),)


async def test_a_run_starts_behind_an_opening_of_the_one_before(
    backend: PostgresBackend, admin: asyncpg.Connection[Any]
) -> None:
    await take(backend, start(backend, "r1", "t"))
    async with admin.transaction():
        await backend._run_table.append([Flush("t", "p", 0, 1, b"[1]", run="r1")], admin)
        starting = asyncio.create_task(take(backend, start(backend, "r2", "t")))
        await until(partial(waits_for_a_lock, admin))
    assert await starting == [Verdict.STARTED]


async def test_a_step_sees_what_the_one_before_has_noted(
    backend: PostgresBackend, admin: asyncpg.Connection[Any]
) -> None:
    await take(backend, start(backend, "r", "t")._replace(record=None))
    async with admin.transaction():
        await backend._run_table.take([revoke(backend, "t")], admin)
        ending = asyncio.create_task(take(backend, finish(backend, "r", "t", RETRY)))
        await until(partial(waits_for_a_lock, admin))
    assert await ending == [Verdict.REVOKED]


@pytest.mark.parametrize("present", [False, True])
async def test_a_step_is_decided_by_the_result_that_came_first(
    backend: PostgresBackend, admin: asyncpg.Connection[Any], present: bool
) -> None:
    if present:
        await take(backend, start(backend, "r", "t"))
    async with admin.transaction():
        await backend._storing.store([record(backend, "t", SUCCESS, 1)], admin)
        ending = asyncio.create_task(take(backend, finish(backend, "r", "t", FAILURE)))
        await until(partial(waits_for_a_lock, admin))
    assert await ending == [Verdict.KEPT]
    assert (await backend.get_task_meta("t")).status == SUCCESS


# -- notifications ----------------------------------------------------------------------------------------------------


async def test_the_flushes_of_a_call_are_one_commit_and_each_is_told_once(
    backend: PostgresBackend, admin: asyncpg.Connection[Any]
) -> None:
    ids = [f"t{number}" for number in range(50)]
    epochs = await backend._append([Flush(task_id, "p", 0, 1, b"[1]") for task_id in ids])
    told: list[str] = []
    for channel in {backend._channel(OUTPUT_TOPIC + task_id) for task_id in ids}:
        await admin.add_listener(channel, lambda *news: told.append(str(news[-1])))
    pairs = zip(ids, map(given, epochs), strict=True)
    flushes = [Flush(task_id, "p", epoch, 2, b"x" * 9_000) for task_id, epoch in pairs]
    for _ in range(2):  # the second time it is a repetition
        assert await backend._append(flushes) == epochs
    await admin.fetchval("SELECT 1")
    assert sorted(told) == sorted(f"output {epoch}-2 {task_id}" for task_id, epoch in zip(ids, epochs, strict=True))
    wrote = await admin.fetch("SELECT DISTINCT xmin::text FROM celery_taskmeta_output WHERE seq = 2")
    assert len(wrote) == 1


@pytest.mark.parametrize("size", [1, 7_999, 8_001, 3_000_000])
async def test_chunks_of_any_size(backend: PostgresBackend, size: int) -> None:
    hearing = await Hearing(backend, OUTPUT_TOPIC + "t").connected()
    data = random.Random(size).randbytes(size)
    epoch = await flush(backend, data=data)
    await until(lambda: bool(hearing.news))
    assert hearing.news == [OutputNews(epoch, 1, None)]
    assert (await page(backend)).entries == (Entry(epoch, 1, data),)


@pytest.mark.parametrize("character", ["a", "é", "\N{GRINNING FACE}", " "])
async def test_ids_of_every_length(backend: PostgresBackend, character: str) -> None:
    ids = [character * length for length in (1, 2, 9, 10, 99, 100, 127, 154, 155)]
    outputs = [await Hearing(backend, OUTPUT_TOPIC + task_id).connected() for task_id in ids]
    revokes = [await Hearing(backend, WORKER_TOPIC + worker).connected() for worker in ids]
    epochs = await backend._append([Flush(task_id, "p", 0, 1, b"[1]") for task_id in ids])
    steps = [start(backend, f"run of {task_id}", task_id)._replace(worker=task_id) for task_id in ids]
    assert await take(backend, *steps) == [Verdict.STARTED] * len(ids)
    assert await take(backend, *(revoke(backend, task_id) for task_id in ids)) == [Verdict.ASKED] * len(ids)
    await until(lambda: all(hearing.news for hearing in (*outputs, *revokes)))
    assert [hearing.news for hearing in outputs] == [[OutputNews(given(epoch), 1, None)] for epoch in epochs]
    assert [hearing.news for hearing in revokes] == [[f"run of {task_id}"] for task_id in ids]
    for task_id in ids:
        assert len((await page(backend, task_id)).entries) == 1
        await backend.forget(task_id)
        assert (await page(backend, task_id)).entries == ()


@pytest.mark.parametrize(
    "payload", ["output", "output 1-2", "output x t", "output 1-2-3 t", "revoke", "revoke x y", "revoke 9 r", "gone"]
)
async def test_what_anybody_notifies_of_harms_nobody(
    backend: PostgresBackend, admin: asyncpg.Connection[Any], payload: str
) -> None:
    hearing = await Hearing(backend, OUTPUT_TOPIC + "t").connected()
    await admin.execute("SELECT pg_notify($1, $2)", backend._channel(OUTPUT_TOPIC + "t"), payload)
    await flush(backend)
    await until(lambda: bool(hearing.news))
    assert len(hearing.news) == 1


# -- what is stored ---------------------------------------------------------------------------------------------------


EXTRA = {
    "name": "task",
    "args": [1],
    "kwargs": {"a": 2},
    "worker": "host",
    "retries": 3,
    "queue": "high",
    "stamped_headers": ["stamp"],
    "stamp": "x",
}
#: Seconds to live, and whether there is a group.
LIVES: list[tuple[float, bool]] = [(86400.0, False), (50.0, False), (0.0, False), (1e6, True)]


ROW = """
    SELECT t.*, EXISTS (SELECT FROM celery_taskmeta_expiry WHERE id = task_id) AS noted,
           e.stored_at IS NOT NULL AS dated,
           CASE WHEN isfinite(e.expires_at) THEN round(extract(epoch FROM e.expires_at - now()) / 10)
                ELSE extract(epoch FROM e.expires_at) END AS left
    FROM celery_taskmeta t LEFT JOIN celery_taskmeta_expiry e ON e.id = task_id AND e.date_done = t.date_done
    WHERE task_id = $1"""
GROUP = "SELECT round(extract(epoch FROM expires_at - now()) / 1000) FROM celery_tasksetmeta_expiry WHERE id = 'g'"


@pytest.mark.parametrize("columns", ["all", "Celery's oldest"])
@pytest.mark.parametrize("by", ["finish", "wish"])
async def test_a_step_stores_the_row_that_a_store_does(
    postgres_url: str, admin: asyncpg.Connection[Any], columns: str, by: str
) -> None:
    await PostgresBackend(postgres_url).create_schema()
    if columns != "all":
        for column in ("children", *EXTENDED_COLUMNS):
            await admin.execute(f"ALTER TABLE celery_taskmeta DROP COLUMN {column}")
    async with PostgresBackend(postgres_url, extended=columns == "all") as backend:
        for number, (expires, in_group) in enumerate(LIVES):
            for full in (False, True):
                rows, groups = [], []
                extra = EXTRA if full else None
                now = datetime.now(UTC)
                payload = backend._encode(
                    TaskMeta("t", REVOKED, KeyError("é"), "traceback", date_done=now, extra=extra)
                )
                for how in ("store", by):
                    await backend.save_group("g", backend.group(["x"]))
                    task_id = f"{number} {full} {how}"
                    last = Record(task_id, payload, expires, group_id="g" if in_group else None)
                    before = record(backend, task_id, STARTED, expires=77.0)
                    if how == "store":
                        await backend._store([before])
                    else:
                        await take(backend, start(backend, "r", task_id)._replace(record=before))
                    match how:
                        case "store":
                            assert await backend._store([last]) == [True]
                        case "finish":
                            step = finish(backend, "r", task_id, REVOKED)._replace(record=last)
                            assert await take(backend, step) == [Verdict.STORED]
                        case "wish":
                            assert await take(backend, revoke(backend, task_id)._replace(record=last)) == [
                                Verdict.ASKED
                            ]
                            assert await take(backend, RunStep(RunOp.RELEASE, task_id, "r")) == [Verdict.REVOKED]
                    (row,) = await admin.fetch(ROW, task_id)
                    rows.append({name: value for name, value in row.items() if name not in ("id", "task_id")})
                    groups.append(await admin.fetchval(GROUP))
                    await backend.delete_group("g")
                assert rows[0] == rows[1]
                assert groups[0] == groups[1]
                assert (groups[0] is not None) == in_group


async def test_a_result_that_has_expired_is_as_none_for_a_step(
    backend: PostgresBackend, admin: asyncpg.Connection[Any]
) -> None:
    await backend._store([record(backend, "t", SUCCESS, 1), record(backend, "u", SUCCESS, 1, expires=60.0)])
    skipping = [start(backend, "r", task_id, skip_done=True) for task_id in ("t", "u")]
    assert await take(backend, *skipping) == [Verdict.DONE] * 2
    assert (await page(backend, "t")).final
    await admin.execute("SET session_replication_role = replica")
    await admin.execute("UPDATE celery_taskmeta_expiry SET expires_at = now()")
    await admin.execute("UPDATE celery_taskmeta SET date_done = date_done - interval '2 days' WHERE task_id = 't'")
    assert [(await page(backend, task_id)).final for task_id in ("t", "u")] == [False, False]
    assert await take(backend, *skipping) == [Verdict.STARTED] * 2
    metas = [await backend.get_task_meta(task_id) for task_id in ("t", "u")]
    assert [meta.status for meta in metas] == [STARTED, STARTED]


async def test_a_step_that_cannot_be_taken_harms_no_other(backend: PostgresBackend) -> None:
    """The batcher halves the batch; taking a step twice changes nothing."""
    steps = [start(backend, "r", f"t{number}") for number in range(9)]
    steps[4] = steps[4]._replace(worker="\x00")
    outcomes = await asyncio.gather(*map(backend._shards[0].runs.submit, steps), return_exceptions=True)
    assert [isinstance(outcome, BaseException) for outcome in outcomes] == [n == 4 for n in range(9)]
    assert (await backend.get_task_meta("t4")).status == PENDING


@pytest.mark.parametrize("reason", ["", "a\x00b", "\ud800", "x" * 20_000])
async def test_a_reason_of_any_text_is_kept(backend: PostgresBackend, reason: str) -> None:
    await take(backend, start(backend, "r", "t"))
    assert await take(backend, revoke(backend, "t")._replace(reason=reason)) == [Verdict.ASKED]
    (state,) = await backend._run_steps([RunStep(RunOp.READ, "t")])
    assert isinstance(state, RunState)
    assert state.wish == reason.replace("\x00", "\\x00").replace("\ud800", "\\ud800")


# -- expiry and removal -----------------------------------------------------------------------------------------------


async def counts(admin: asyncpg.Connection[Any]) -> list[int]:
    return [await admin.fetchval(f"SELECT count(*) FROM {table}") for table in RUNNING[:3]]


async def test_cleanup_removes_outputs_and_notes_that_have_expired(
    backend: PostgresBackend, admin: asyncpg.Connection[Any]
) -> None:
    for task_id in ("old", "new", "kept"):
        epoch = await flush(backend, task_id, expires=0.0 if task_id == "kept" else 600.0)
        await flush(backend, task_id, epoch, 2, expires=None)
        await take(backend, start(backend, "r", task_id))
    for table in RUNNING[1:3]:
        await admin.execute(f"UPDATE {table} SET expires_at = now() WHERE task_id = 'old'")
    assert (await page(backend, "old")).entries == ()
    assert await take(backend, RunStep(RunOp.RELEASE, "old", "another")) == [Verdict.NOTED]
    await admin.execute("UPDATE celery_taskmeta_run SET expires_at = now() WHERE task_id = 'old'")
    assert await counts(admin) == [6, 3, 3]
    assert await backend.cleanup() == 2
    assert await counts(admin) == [4, 2, 2]
    assert await backend.cleanup() == 0


async def test_an_expired_output_begins_anew(backend: PostgresBackend, admin: asyncpg.Connection[Any]) -> None:
    epoch = await flush(backend)
    await admin.execute("UPDATE celery_taskmeta_log SET expires_at = now()")
    assert await flush(backend, "t", epoch, 1) == epoch  # the number that is left over from before
    assert (await page(backend)).entries == (Entry(epoch, 1, b'["1"]'),)


async def test_forget_leaves_nothing_and_spares_what_began_after_it(
    backend: PostgresBackend, admin: asyncpg.Connection[Any]
) -> None:
    await flush(backend)
    await take(backend, start(backend, "r1", "t"))
    (before,) = await backend._versions(["t"])
    await take(backend, start(backend, "r2", "t"))
    await flush(backend, data=b"[2]", last=1)
    (epoch,) = await backend._append([Flush("t", "q", 0, 1, b'["again"]')])
    assert before is not None
    await backend._delete(["t"], [before])
    assert (await page(backend)).entries == (Entry(given(epoch), 1, b'["again"]'),)
    assert await take(backend, RunStep(RunOp.STORE, "t", "r1")) == [Verdict.SUPERSEDED]
    await backend.forget("t")
    assert await counts(admin) == [0, 0, 0]
    assert await admin.fetchval("SELECT count(*) FROM celery_taskmeta") == 0


# -- the schema -------------------------------------------------------------------------------------------------------


async def test_a_database_of_an_older_version_does_all_but_running_tasks(
    postgres_url: str, admin: asyncpg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    await PostgresBackend(postgres_url).create_schema()
    for table in RUNNING:
        await admin.execute(f"DROP TABLE {table}")
    for function in ("celery_taskmeta_append", "celery_taskmeta_steps"):
        await admin.execute(f"DROP FUNCTION {function}")
    async with PostgresBackend(postgres_url) as backend:
        waiting = asyncio.create_task(backend.wait_for("t"))
        await backend.mark_as_done("t", 1)
        assert (await waiting).result == 1
        await backend.forget_many(["t", "u"])
        assert (await backend.get_task_meta("t")).status == PENDING
        assert await backend.cleanup() == 0
        calls: Sequence[Any] = [
            backend._append([Flush("t", "p", 0, 1, b"[1]")]),
            backend._pages([PageRequest("t", START, 1)]),
            backend._run_steps([RunStep(RunOp.READ, "t")]),
            backend._beat("w", 1.0, NO_GAP),
            backend._alive(["w"]),
        ]
        for call in calls:
            with pytest.raises(BackendRefusedError, match=r"running tasks.*create_schema"):
                await call
    assert not caplog.records
    async with PostgresBackend(postgres_url, create=True) as backend:
        assert await flush(backend)


async def test_a_function_that_took_other_arguments_is_replaced(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    await PostgresBackend(postgres_url).create_schema()
    await admin.execute(
        "DROP FUNCTION celery_taskmeta_steps; "
        "CREATE FUNCTION celery_taskmeta_steps(prefix text) RETURNS text LANGUAGE sql AS 'SELECT prefix'; "
        "COMMENT ON FUNCTION celery_taskmeta_steps IS 'aioresult 0123456789abcdef'"
    )
    async with PostgresBackend(postgres_url, create=True) as backend:
        async with backend.running("t"):
            pass
        assert (await backend.get_task_meta("t")).status == SUCCESS
    assert await admin.fetchval("SELECT count(*) FROM pg_proc WHERE proname = 'celery_taskmeta_steps'") == 1


@pytest.mark.parametrize("durable", [False, True])
async def test_output_is_on_disk_only_where_that_is_asked_for(
    postgres_url: str, admin: asyncpg.Connection[Any], durable: bool
) -> None:
    await admin.execute("SET synchronous_commit = on")
    async with PostgresBackend(postgres_url, durable_output=durable) as backend:
        table, epoch = backend._run_table, 0
        for last in (1, 2):
            async with admin.transaction():
                (outcome,) = await table.append([Flush("t", "p", epoch, last, b"[1]")], admin)
                epoch = given(outcome)
                assert await admin.fetchval("SHOW synchronous_commit") == ("on" if durable else "off")
        async with admin.transaction():  # a result is, and with it what was sent before
            await table.take([finish(backend, "r", "t", SUCCESS, output=Place(epoch, 2))], admin)
            assert await admin.fetchval("SHOW synchronous_commit") == "on"
        assert (await page(backend)).entries[-1] == Entry(epoch, 3, b"", SUCCESS)


async def test_a_page_costs_the_same_wherever_it_is_in_a_long_output(
    backend: PostgresBackend, admin: asyncpg.Connection[Any]
) -> None:
    await admin.execute("SET enable_seqscan = off")
    epoch = await flush(backend)
    await admin.execute(
        "INSERT INTO celery_taskmeta_output SELECT 't', $1, i, '[1]', '' FROM generate_series(2, 20000) i", epoch
    )
    for after in (Place(epoch, 0), Place(epoch, 10_000), Place(epoch, 19_990), Place(epoch - 1, 5), None):
        look = _page_arguments(PageRequest("t", after, 5))
        rows = await admin.fetch(f"EXPLAIN (ANALYZE, BUFFERS) {backend._run_table._pages}", *zip(look, strict=True))
        plan = "\n".join(row[0] for row in rows)
        hits = re.search(r"shared hit=(\d+)", plan)
        assert hits is not None
        assert int(hits[1]) < 30, plan


async def test_an_end_mark_has_no_chunks(backend: PostgresBackend) -> None:
    epoch = await flush(backend)
    await flush(backend, "t", epoch, 2, data=b"", state=CLOSED)
    assert (await page(backend)).entries[-1] == Entry(epoch, 2, b"", CLOSED)
