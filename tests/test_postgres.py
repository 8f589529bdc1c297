"""What is specific to the PostgreSQL backend: its tables, its statements, its listener, and how it bears their loss."""

from __future__ import annotations

import asyncio
import json
import pickle
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Self
from urllib.parse import quote

import asyncpg
import pytest
import sqlalchemy
import trustme
from celery.backends.database.session import ResultModelBase

import aioresult
from aioresult import (
    BackendConnectionError,
    BackendError,
    BackendGetMetaError,
    BackendRefusedError,
    BackendStoreError,
    ContentDisallowed,
    EncodeError,
    ImproperlyConfigured,
    TaskRequest,
    UsageError,
)
from aioresult.backends.postgres import PostgresBackend, schema_sql
from aioresult.backends.postgres.listener import Listener
from aioresult.backends.postgres.schema import EXTENDED_COLUMNS

from .harness import until
from .postgres_harness import pass_time
from .servers import PostgresServer, TcpProxy, free_port, postgres_server


class Recorder:
    """A connection factory that keeps what is sent over its connections."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.sent: list[Any] = []

    async def connect(self) -> asyncpg.Connection[Any]:
        connection: asyncpg.Connection[Any] = await asyncpg.connect(self._url)
        connection.add_query_logger(self.sent.append)
        return connection

    def with_text(self, text: str) -> list[Any]:
        return [record for record in self.sent if text in record.query]

    @property
    def stores(self) -> list[Any]:
        return self.with_text("AS input")


class TransactionPooler:
    """What a pooler in transaction mode does: the next transaction may run on another connection to the server.

    Here it always does if there is another, and what the server sends unasked, notifications above all, is dropped.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._servers: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self.opened: list[asyncio.StreamWriter] = []
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        for writer in self.opened:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        server = await asyncio.open_connection("127.0.0.1", self._target_port)
        self.opened.append(server[1])
        length = await reader.readexactly(4)
        server[1].write(length + await reader.readexactly(int.from_bytes(length) - 4))  # who it is, to which database
        await self._answer(server, writer, asyncio.Queue())
        self._servers.put_nowait(server)
        try:
            await self._relay(reader, writer)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            kind, message = await _message(reader)
            if kind == b"X":
                return
            server = await self._servers.get()  # the one that has rested longest
            states: asyncio.Queue[bytes] = asyncio.Queue()
            answering = asyncio.create_task(self._answer(server, writer, states))
            server[1].write(message)
            while kind not in b"SQ" or await states.get() != b"I":
                kind, message = await _message(reader)
                server[1].write(message)
            await answering
            self._servers.put_nowait(server)

    async def _answer(
        self,
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        writer: asyncio.StreamWriter,
        states: asyncio.Queue[bytes],
    ) -> None:
        """Pass on everything until no transaction is open any more, and the state after each request."""
        state = b""
        while state != b"I":
            kind, message = await _message(server[0])
            if kind != b"A":
                writer.write(message)
            if kind == b"Z":
                state = message[-1:]
                states.put_nowait(state)


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The type and the whole of the next message of PostgreSQL's protocol."""
    head = await reader.readexactly(5)
    return head[:1], head + await reader.readexactly(int.from_bytes(head[1:]) - 4)


@pytest.fixture
async def backend(postgres_url: str) -> AsyncIterator[PostgresBackend]:
    async with PostgresBackend(postgres_url) as backend:
        yield backend


@pytest.fixture
def recorder(postgres_url: str) -> Recorder:
    return Recorder(postgres_url)


@pytest.fixture
async def recorded(recorder: Recorder) -> AsyncIterator[PostgresBackend]:
    """A backend whose statements are on the recorder."""
    async with PostgresBackend(connect=recorder.connect) as backend:
        yield backend


@pytest.fixture
async def proxy(own_postgres: PostgresServer, postgres_url: str) -> AsyncIterator[TcpProxy]:
    async with TcpProxy(own_postgres.port) as proxy:
        yield proxy


@asynccontextmanager
async def through(port: int, **options: Any) -> AsyncIterator[PostgresBackend]:
    """A backend behind a proxy."""
    url = f"postgresql://postgres@127.0.0.1:{port}/postgres?sslmode=disable"
    async with PostgresBackend(url, **options) as backend:
        yield backend


def waited_for(backend: PostgresBackend, count: int) -> bool:
    """Whether so many ids are waited for, and the server has confirmed their channels."""
    listener = backend._listener
    confirmed = set() if listener is None or listener.lost else listener._channels
    return confirmed == set(backend._waiting) and sum(map(len, backend._waiting.values())) == count


async def settled(backend: PostgresBackend, count: int) -> None:
    """Return once so many ids are waited for and everything due has been read: from here on only a push can help."""
    await until(
        lambda: (
            waited_for(backend, count)
            and not (backend._shards[0].hub._to_subscribe or backend._shards[0].hub._to_read_first)
        )
    )
    await backend.get_outcomes(["done when everything before it is"])


async def connections(admin: asyncpg.Connection[Any]) -> int:
    """How many there are beside the one that asks."""
    count: int = await admin.fetchval(
        "SELECT count(*)::int FROM pg_stat_activity "
        "WHERE backend_type = 'client backend' AND datname = current_database() AND pid <> pg_backend_pid()"
    )
    return count


async def terminate(admin: asyncpg.Connection[Any], condition: str = "true") -> None:
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        f"WHERE datname = current_database() AND pid <> pg_backend_pid() AND {condition}"
    )


async def as_celery_does(connection: asyncpg.Connection[Any], task_id: str, result: bytes = b"42") -> None:
    """Store a result as Celery's SQLAlchemy backend does it."""
    async with connection.transaction():
        await connection.execute(
            "INSERT INTO celery_taskmeta (id, task_id, status, date_done) "
            "VALUES (nextval('task_id_sequence'), $1, 'PENDING', now()) ON CONFLICT DO NOTHING",
            task_id,
        )
        await connection.execute(
            "UPDATE celery_taskmeta SET status = 'SUCCESS', result = $2, date_done = now() WHERE task_id = $1",
            task_id,
            result,
        )


async def on_each_row(admin: asyncpg.Connection[Any], statement: str) -> None:
    """Have the server do that for each result that is stored."""
    await admin.execute(
        f"CREATE FUNCTION hurdle() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {statement}; RETURN NEW; END$$;"
        "CREATE TRIGGER hurdle BEFORE INSERT OR UPDATE ON celery_taskmeta FOR EACH ROW EXECUTE FUNCTION hurdle()"
    )


# -- URLs and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", ["postgresql", "postgres", "postgresql+asyncpg", "db+postgresql", "db+postgresql+psycopg"]
)
async def test_urls_as_others_write_them(postgres_url: str, scheme: str) -> None:
    async with aioresult.connect(postgres_url.replace("postgresql", scheme)) as backend:
        waiter = asyncio.ensure_future(backend.wait_for("a"))
        await backend.mark_as_done("a", 1)
        assert (await waiter).result == 1


@pytest.fixture(scope="module")
def guarded() -> Iterator[PostgresServer]:
    """A PostgreSQL that asks everybody but postgres for a password."""
    server = PostgresServer()
    try:
        rules = server.folder / "hba.conf"
        rules.write_text("host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
        server.start(f"hba_file={rules}")
        yield server
    finally:
        server.remove()


ODD_NAME, ODD_PASSWORD = "b@b:/ ", "p@ss:/?#w ord%é'\"\\"


@pytest.fixture
async def guard(guarded: PostgresServer) -> AsyncIterator[asyncpg.Connection[Any]]:
    """The administrator's connection to the guarded server, where an account has a name and a password to escape."""
    connection = await asyncpg.connect(guarded.url)
    password = ODD_PASSWORD.replace("'", "''")
    await connection.execute(f"""CREATE ROLE "{ODD_NAME}" LOGIN PASSWORD '{password}'""")
    yield connection
    await terminate(connection)
    await connection.execute(f"""
        DROP OWNED BY "{ODD_NAME}"; DROP ROLE "{ODD_NAME}";
        DROP SCHEMA public CASCADE; CREATE SCHEMA public; GRANT USAGE ON SCHEMA public TO PUBLIC""")
    await connection.close()


def as_odd(server: PostgresServer, password: str = ODD_PASSWORD, database: str = "postgres") -> str:
    return f"postgresql://{quote(ODD_NAME, '')}:{quote(password, '')}@127.0.0.1:{server.port}/{database}"


async def test_an_odd_name_and_password(guarded: PostgresServer, guard: asyncpg.Connection[Any]) -> None:
    await guard.execute(f"""GRANT CREATE ON SCHEMA public TO "{ODD_NAME}" """)
    async with PostgresBackend(as_odd(guarded)) as backend:
        waiter = asyncio.ensure_future(backend.wait_for("a"))
        await backend.mark_as_done("a", 1)
        assert (await waiter).result == 1
        assert "ord" not in repr(backend)


@pytest.mark.parametrize(
    ("password", "database", "says"),
    [
        ("s3cr3t/@", "postgres", "password authentication failed"),
        (ODD_PASSWORD, "no_such_database", '"no_such_database" does not exist'),
        (ODD_PASSWORD, "postgres", "permission denied for schema public"),
    ],
)
async def test_a_refusal_is_told_at_once_and_shows_no_password(
    guarded: PostgresServer, guard: asyncpg.Connection[Any], password: str, database: str, says: str
) -> None:
    with pytest.raises(BackendRefusedError, match=says) as caught:
        await PostgresBackend(as_odd(guarded, password, database)).open()
    shown = f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"
    assert "s3cr3t" not in shown
    assert "ord%" not in shown


async def test_a_permission_missing_on_the_table_is_told_to_whoever_calls(
    guarded: PostgresServer, guard: asyncpg.Connection[Any]
) -> None:
    await PostgresBackend(guarded.url).create_schema()
    async with PostgresBackend(as_odd(guarded)) as backend:
        for call in (backend.mark_as_done("a", 1), backend.get_task_meta("a"), backend.wait_for("a")):
            with pytest.raises(BackendRefusedError, match="permission denied for table"):
                await call


async def test_a_server_that_is_down_is_told_at_once() -> None:
    port = free_port()
    with pytest.raises(BackendConnectionError, match=f"127.0.0.1:{port}"):
        await PostgresBackend(f"postgresql://bob:s3cr3t@127.0.0.1:{port}/db").open()


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("postgresql://bob:s3cr3t@h:port/db", {}),
        ("postgresql://bob:s3cr3t@h/db?sslmode=no", {}),
        ("postgresql://bob:s3cr3t@h/db?no-value", {}),
        ("postgresql://bob:s3cr3t@[::1/db", {}),
        ("postgresql://bob:s3cr3t@h/db", {"connect_options": {"no_such": 1}}),
        # not percent-encoded, so that a part of it would be taken for a host, a port, a database or an option
        ("postgresql://bob:a@s3cr3t:s3cr3t@h/db", {}),
        ("postgresql://bob:12/s3cr3t@h/db", {}),
        ("postgresql://bob:12?s3cr3t@h/db", {}),
        ("postgresql://bob:12#s3cr3t@h/db", {}),
        ("postgresql://h/db", {"listen_dsn": "postgresql://bob:a@s3cr3t@h/db"}),
    ],
)
async def test_what_makes_no_sense_is_told_without_the_password(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(ImproperlyConfigured, match="postgresql://") as caught:
        await aioresult.connect(url, **options).open()
    assert "s3cr3t" not in f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"


# -- TLS: a proxy that ends it in front of the plain server, which need not have been built with it -----------------


@pytest.fixture
async def tls_front(own_postgres: PostgresServer, postgres_url: str) -> AsyncIterator[tuple[TcpProxy, trustme.CA]]:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["postgresql"])
    authority.issue_cert("localhost").configure_cert(context)
    async with TcpProxy(own_postgres.port, context) as front:
        yield front, authority


async def test_tls_with_a_certificate_that_is_right(tls_front: tuple[TcpProxy, trustme.CA]) -> None:
    front, authority = tls_front
    context = ssl.create_default_context()
    authority.configure_trust(context)
    url = f"postgresql://postgres@localhost:{front.port}/postgres"
    async with PostgresBackend(url, connect_options={"ssl": context, "direct_tls": True}) as backend:
        waiter = asyncio.ensure_future(backend.wait_for("a"))
        await settled(backend, 1)
        await backend.mark_as_done("a", "x" * 1_000_000)
        assert len((await waiter).result) == 1_000_000


async def test_tls_with_a_certificate_of_nobody_is_refused(tls_front: tuple[TcpProxy, trustme.CA]) -> None:
    url = f"postgresql://postgres@localhost:{tls_front[0].port}/postgres?sslnegotiation=direct"
    with pytest.raises(BackendRefusedError, match="certificate verify failed"):
        await PostgresBackend(url, connect_options={"ssl": ssl.create_default_context()}).open()


# -- names ----------------------------------------------------------------------------------------------------------

ODD_NAMES = ["UPPER", 'quo"te', "it's", "a.b", "; DROP TABLE x; --", "$1 %s {0}", "ünïcode", "select"]


@pytest.mark.parametrize("name", ODD_NAMES)
async def test_schemas_and_tables_of_any_name(postgres_url: str, admin: asyncpg.Connection[Any], name: str) -> None:
    schema = f"s{name}"
    options: dict[str, Any] = {"schema": schema, "table": f"t{name}", "group_table": f"g{name}"}
    try:
        async with PostgresBackend(postgres_url, **options) as backend:
            waiter = asyncio.ensure_future(backend.wait_for("a"))
            await settled(backend, 1)
            await backend.mark_as_done("a", 1)
            assert (await waiter).result == 1
            await backend.group(["a"], "g").save()
            assert await (await backend.restore_group("g") or pytest.fail("it is gone")) == [1]
            await backend.delete_group("g")
            await backend.mark_as_done("b", 1, expires=0.001)
            await until(lambda: _false(backend.exists("b")))
            assert await backend.cleanup() == 1
            await backend.forget("a")
            assert not await backend.exists("a")
        tables = await admin.fetch("SELECT tablename FROM pg_tables WHERE schemaname = $1", schema)
        assert {f"t{name}", f"g{name}"} < {row[0] for row in tables}
    finally:
        await admin.execute(f'DROP SCHEMA IF EXISTS "{schema.replace(chr(34), 2 * chr(34))}" CASCADE')


async def _false(answer: Any) -> bool:
    return not await answer


@pytest.mark.parametrize("name", ["", "a\x00b", "x" * 64, "é" * 32, "$aioresult$"])
@pytest.mark.parametrize("option", ["schema", "table", "group_table"])
def test_a_name_that_postgresql_cannot_have(option: str, name: str) -> None:
    options: dict[str, Any] = {option: name}
    with pytest.raises(ImproperlyConfigured, match="cannot name a table or schema"):
        aioresult.connect("postgresql://h/db", **options)


async def test_the_search_path_keeps_two_applications_apart(postgres_url: str, admin: asyncpg.Connection[Any]) -> None:
    await admin.execute("CREATE SCHEMA one; CREATE SCHEMA two")
    try:
        settings = {"server_settings": {"search_path": "two"}}
        async with (
            PostgresBackend(f"{postgres_url}?search_path=one") as one,
            PostgresBackend(postgres_url, connect_options=settings) as two,
        ):
            waiters = [asyncio.ensure_future(each.wait_for("a")) for each in (one, two)]
            await settled(one, 1)
            await settled(two, 1)
            assert set(one._waiting) & set(two._waiting) == set()  # nor do they hear of each other
            await one.mark_as_done("a", 1)
            await two.mark_as_done("a", 2)
            assert [(await waiter).result for waiter in waiters] == [1, 2]
        assert await admin.fetchval("SELECT count(*) FROM one.celery_taskmeta") == 1
    finally:
        await admin.execute("DROP SCHEMA one CASCADE; DROP SCHEMA two CASCADE")


# -- schema ---------------------------------------------------------------------------------------------------------


async def relations(admin: asyncpg.Connection[Any]) -> dict[str, list[Any]]:
    """Tables, their columns, indexes, constraints and sequences: name → everything that defines it."""
    rows = await admin.fetch("""
        SELECT c.relname, c.oid, c.relkind, pg_get_indexdef(c.oid), a.attname, a.attnum, a.atttypid, a.atttypmod,
               a.attnotnull, pg_get_expr(d.adbin, d.adrelid)
        FROM pg_class c LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relnamespace = 'public'::regnamespace ORDER BY c.oid, a.attnum""")
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row["relname"], []).append(tuple(row))
    return found


OURS = {
    "celery_taskmeta_expiry",
    "celery_tasksetmeta_expiry",
    "celery_tasksetmeta_chord",
    "celery_tasksetmeta_chord_part",
    "celery_taskmeta_output",
    "celery_taskmeta_log",
    "celery_taskmeta_run",
    "celery_taskmeta_worker",
}


def celerys_tables(url: str) -> None:
    engine = sqlalchemy.create_engine(url.replace("postgresql", "postgresql+psycopg"))
    ResultModelBase.metadata.create_all(engine)
    engine.dispose()


@pytest.fixture(params=[True, False], ids=["extended", "plain"])
async def celerys(request: pytest.FixtureRequest, postgres_url: str, admin: asyncpg.Connection[Any]) -> bool:
    """A database as Celery makes it; whether it has the columns of ``result_extended``, which older ones lack."""
    await asyncio.to_thread(celerys_tables, postgres_url)
    if not request.param:
        for column in EXTENDED_COLUMNS:
            await admin.execute(f"ALTER TABLE celery_taskmeta DROP COLUMN {column}")
    return bool(request.param)


async def test_an_existing_database_gets_the_trigger_and_our_tables_and_nothing_else(
    celerys: bool, postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    before = await relations(admin)
    backend = PostgresBackend(postgres_url)
    for _ in range(2):
        await backend.create_schema()
        after = await relations(admin)
        assert {name: after[name] for name in before} == before
        assert {name for name in set(after) - set(before) if after[name][0][2] == b"r"} == OURS
    triggers = await admin.fetch("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal")
    assert sorted(row[0] for row in triggers) == ["aioresult_notify", "aioresult_stored", "aioresult_stored"]
    async with backend:
        waiter = asyncio.ensure_future(backend.wait_for("a"))
        await settled(backend, 1)
        await backend.mark_as_done("a", 1)
        assert (await waiter).result == 1


async def test_extended_needs_the_columns(celerys: bool, postgres_url: str) -> None:
    backend = PostgresBackend(postgres_url, extended=True, create=True)
    if not celerys:
        with pytest.raises(BackendRefusedError, match="result_extended"):
            await backend.open()
        return
    async with backend:
        await backend.mark_as_done("a", 1, request=TaskRequest(id="a", task="add", args=[1, 2], queue="high"))
        meta = await backend.get_task_meta("a")
        assert (meta.name, meta.args, meta.queue) == ("add", [1, 2], "high")


async def test_our_own_tables_have_celerys_columns(postgres_url: str, admin: asyncpg.Connection[Any]) -> None:
    columns = """SELECT table_name, column_name, data_type, character_maximum_length, is_nullable
                 FROM information_schema.columns WHERE table_name = ANY($1) AND column_name <> 'id'"""
    tables = ["celery_taskmeta", "celery_tasksetmeta"]
    await PostgresBackend(postgres_url).create_schema()
    ours = {tuple(row) for row in await admin.fetch(columns, tables)}
    await admin.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await asyncio.to_thread(celerys_tables, postgres_url)
    assert ours == {tuple(row) for row in await admin.fetch(columns, tables)}


@pytest.mark.parametrize("missing", ["trigger", "enabled trigger", "table"])
async def test_a_database_that_would_wake_nobody_is_refused_with_the_remedy(
    postgres_url: str, admin: asyncpg.Connection[Any], missing: str
) -> None:
    await PostgresBackend(postgres_url).create_schema()
    await admin.execute(
        {
            "trigger": "DROP TRIGGER aioresult_notify ON celery_taskmeta",
            "enabled trigger": "ALTER TABLE celery_taskmeta DISABLE TRIGGER aioresult_notify",
            "table": "DROP TABLE celery_taskmeta_expiry",
        }[missing]
    )
    with pytest.raises(BackendRefusedError, match="create_schema"):
        await PostgresBackend(postgres_url).open()
    if missing != "enabled trigger":
        async with PostgresBackend(postgres_url, create=True) as backend:
            assert await backend.mark_as_done("a", 1)


async def test_an_empty_database_gets_its_tables_unless_that_is_unwanted(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    with pytest.raises(BackendRefusedError, match="create_schema"):
        await PostgresBackend(postgres_url, create=False).open()
    assert await relations(admin) == {}
    async with PostgresBackend(postgres_url), PostgresBackend(postgres_url, create=False) as backend:
        assert await backend.mark_as_done("a", 1)


OPEN_AND_STORE = """
import asyncio, sys, asyncpg, aioresult

async def main(url, number):
    connection = await asyncpg.connect(url)
    await connection.execute("SELECT pg_advisory_lock_shared(1)")
    async with aioresult.connect(url) as backend:
        await backend.mark_as_done(number, int(number))
    await connection.close()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_ten_processes_may_start_at_once(postgres_url: str, admin: asyncpg.Connection[Any]) -> None:
    await admin.execute("SELECT pg_advisory_lock(1)")  # the start, for all of them
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-W", "error", "-c", OPEN_AND_STORE, postgres_url, str(number)
        )
        for number in range(10)
    ]

    async def all_there() -> bool:
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        return bool(await admin.fetchval(waiting) == 10)

    await until(all_there)
    await admin.execute("SELECT pg_advisory_unlock(1)")
    assert [await process.wait() for process in processes] == [0] * 10
    async with PostgresBackend(postgres_url) as backend:
        assert await backend.group(map(str, range(10))) == list(range(10))


@pytest.mark.parametrize("names", [{}, {"schema": 'o"dd', "table": "it's", "group_table": "$1"}], ids=["usual", "odd"])
async def test_the_ddl_may_be_run_by_psql_and_again(
    own_postgres: PostgresServer,
    postgres_url: str,
    admin: asyncpg.Connection[Any],
    names: dict[str, Any],
) -> None:
    try:
        for _ in range(2):
            command = own_postgres._command("psql", "-X", "-1", "-v", "ON_ERROR_STOP=1", "-d", postgres_url)
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            said, _ = await process.communicate(schema_sql(**names).encode())
            assert process.returncode == 0, said.decode()
        async with PostgresBackend(postgres_url, create=False, **names) as backend:
            assert await backend.mark_as_done("a", 1)
    finally:
        await admin.execute('DROP SCHEMA IF EXISTS "o""dd" CASCADE')


# -- rows -----------------------------------------------------------------------------------------------------------


async def test_the_stored_bytes_are_celerys(backend: PostgresBackend, admin: asyncpg.Connection[Any]) -> None:
    await backend.mark_as_done("a", {"b": [1, "é"]})
    await backend.mark_as_failure("f", KeyError("k"), "Traceback …")
    done, failed = await admin.fetch("SELECT * FROM celery_taskmeta ORDER BY task_id")
    assert (done["status"], done["result"], done["traceback"]) == ("SUCCESS", b'{"b": [1, "\\u00e9"]}', None)
    assert json.loads(failed["result"]) == {"exc_type": "KeyError", "exc_message": ["k"], "exc_module": "builtins"}
    assert failed["traceback"] == "Traceback …"


async def test_pickled_rows_are_read_only_by_those_who_accept_them(
    backend: PostgresBackend, postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    """Celery before 5.7 stored nothing else."""
    waiter = asyncio.ensure_future(backend.wait_for("old"))
    await settled(backend, 1)
    await as_celery_does(admin, "old", pickle.dumps({"a": 1}, 4))
    with pytest.raises(ContentDisallowed, match="accept"):
        await waiter
    with pytest.raises(ContentDisallowed, match="accept"):
        await backend.get_task_meta("old")
    assert await backend.exists("old")
    async with PostgresBackend(postgres_url, accept=("json", "pickle")) as trusting:
        assert await trusting.result("old") == {"a": 1}


async def test_a_row_written_by_others_wakes_the_waiter(
    backend: PostgresBackend, admin: asyncpg.Connection[Any]
) -> None:
    waiters = [asyncio.ensure_future(backend.wait_for(task_id)) for task_id in ("new", "known", "ünï 'x' 3 SUCCESS")]
    await backend.mark_as_started("known")
    await settled(backend, 3)
    for task_id in ("new", "known", "ünï 'x' 3 SUCCESS"):
        await as_celery_does(admin, task_id)
    assert [(await waiter).result for waiter in waiters] == [42] * 3


async def test_ids_that_the_column_cannot_hold(backend: PostgresBackend) -> None:
    assert await backend.mark_as_done("é" * 155, 1)
    assert await backend.result("é" * 155) == 1
    for task_id in ("x" * 156, "a\x00b"):
        for call in (backend.mark_as_done, lambda task_id, _: backend.result(task_id), backend.wait_for):
            with pytest.raises(UsageError, match="155 characters and no NUL"):
                await call(task_id, None)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kathmandu", "America/St_Johns"])
async def test_dates_and_expiry_in_any_time_zone_of_the_server(
    postgres_url: str, admin: asyncpg.Connection[Any], zone: str
) -> None:
    await admin.execute(f"ALTER ROLE postgres SET timezone = '{zone}'")
    try:
        async with PostgresBackend(postgres_url, expires=100) as backend:
            before = datetime.now(UTC)
            await backend.mark_as_done("a", 1)
            await backend.save_group("g", backend.group(["a"]))
            done = (await backend.get_task_meta("a")).date_done
            assert done is not None
            assert before <= done <= datetime.now(UTC)
            for seconds, there in ((90, True), (20, False)):
                for table in ("celery_taskmeta", "celery_tasksetmeta"):
                    await pass_time(admin, seconds, table=table)
                assert await backend.exists("a") is there
                assert (await backend.restore_group("g") is not None) is there
                assert await backend.cleanup() == (0 if there else 2)
    finally:
        await admin.execute("ALTER ROLE postgres RESET timezone")


async def test_text_that_the_columns_cannot_hold_costs_no_result(postgres_url: str) -> None:
    async with PostgresBackend(postgres_url, extended=True) as backend:
        request = TaskRequest(id="a", task="n" * 200, hostname="w\x00", queue="q\udc80")
        assert await backend.mark_as_failure("a", ValueError("a\x00b\udc80"), "line\x00 \udc80", request=request)
        meta = await backend.get_task_meta("a")
        assert meta.result.args == ("a\x00b\udc80",)
        assert (meta.traceback, meta.name, meta.worker) == (r"line\x00 \udc80", "n" * 155, r"w\x00")


async def test_children_that_cannot_be_stored_harm_only_their_parent(backend: PostgresBackend) -> None:
    bad = TaskRequest(id="bad", children=[((object(), None), None)])
    outcomes = await asyncio.gather(
        backend.mark_as_done("a", 1), backend.mark_as_done("bad", 1, request=bad), return_exceptions=True
    )
    assert outcomes[0] is True
    assert isinstance(outcomes[1], EncodeError)


async def test_a_database_in_another_encoding(postgres_url: str, admin: asyncpg.Connection[Any]) -> None:
    """The channel must be the same on both sides, whatever the bytes of an id are in the server."""
    await admin.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        async with PostgresBackend(f"{postgres_url.rpartition('/')[0]}/latin") as backend:
            waiter = asyncio.ensure_future(backend.wait_for("é"))
            await settled(backend, 1)
            await backend.mark_as_done("é", 1)
            assert (await waiter).result == 1
            with pytest.raises(BackendStoreError, match="no equivalent"):
                await backend.mark_as_done("日", 1)
            with pytest.raises(BackendGetMetaError, match="no equivalent"):
                await backend.get_task_meta("日")
    finally:
        await admin.execute("DROP DATABASE latin WITH (FORCE)")


async def test_only_the_first_to_register_an_id_did_so(backend: PostgresBackend) -> None:
    assert [await backend.mark_as_pending("a") for _ in range(2)] == [True, False]


# -- coalescing -----------------------------------------------------------------------------------------------------


async def test_concurrent_stores_share_statements(recorded: PostgresBackend, recorder: Recorder) -> None:
    recorder.sent.clear()
    assert all(await asyncio.gather(*(recorded.mark_as_done(f"id-{number}", number) for number in range(1_000))))
    assert sum(len(record.args[0]) for record in recorder.stores) == 1_000
    assert len(recorder.stores) <= 3
    assert recorder.with_text("BEGIN") == []  # each is a transaction of its own


async def test_an_id_that_occurs_several_times_in_a_batch(recorded: PostgresBackend, recorder: Recorder) -> None:
    recorder.sent.clear()
    marks = [
        recorded.mark_as_pending("a"),
        recorded.mark_as_pending("a"),
        recorded.mark_as_started("a"),
        recorded.mark_as_done("a", 1),
        recorded.mark_as_done("a", 2),
        recorded.mark_as_done("b", 3),
    ]
    assert await asyncio.gather(*marks) == [True, False, True, True, False, True]
    assert await recorded.group(["a", "b"]) == [1, 3]
    assert recorder.with_text("BEGIN") == []  # or two batches could wait for each other's rows


async def test_two_that_store_the_same_ids_in_opposite_order_at_once(postgres_url: str) -> None:
    """A deadlock would fail one of them, for nothing is retried here; and each id has one winner."""
    async with PostgresBackend(postgres_url, retry_for=0) as one, PostgresBackend(postgres_url, retry_for=0) as two:
        for attempt in range(10):
            ids = [f"{attempt}-{number}" for number in range(500)]
            kept = await asyncio.gather(
                *(one.mark_as_done(task_id, 1) for task_id in ids),
                *(two.mark_as_done(task_id, 2) for task_id in reversed(ids)),
            )
            won_by_one, won_by_two = kept[:500], kept[:499:-1]
            assert all(first is not second for first, second in zip(won_by_one, won_by_two, strict=True))
            assert await two.group(ids) == [1 if first else 2 for first in won_by_one]


async def test_reads_go_in_chunks(recorded: PostgresBackend, recorder: Recorder) -> None:
    """The first is of a hundred: how large the values are is not known then."""
    await recorded.get_many(f"id-{number}" for number in range(1_201))
    assert [len(record.args[0]) for record in recorder.with_text("wanted(id)")] == [100, 400, 500, 201]


@pytest.fixture
def small_statements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PostgresBackend, "chunk_bytes", 10_000)


async def test_large_results_do_not_share_a_statement(
    small_statements: None, recorded: PostgresBackend, recorder: Recorder
) -> None:
    values = {f"id-{number}": "x" * (50_000 if number == 5 else 3_000) for number in range(20)}
    assert all(await asyncio.gather(*(recorded.mark_as_done(*item) for item in values.items())))
    sizes = [sum(map(len, record.args[2])) for record in recorder.stores]
    assert [size for size in sizes if size > 10_000] == [50_002]
    assert len(sizes) < 20
    assert await recorded.group(values) == list(values.values())


# -- a server that says no ------------------------------------------------------------------------------------------


async def test_one_result_that_is_refused_harms_no_other(
    recorded: PostgresBackend, recorder: Recorder, admin: asyncpg.Connection[Any]
) -> None:
    await admin.execute("ALTER TABLE celery_taskmeta ADD CHECK (task_id <> 'id-77')")
    recorder.sent.clear()
    stores = (recorded.mark_as_done(f"id-{number}", number) for number in range(300))
    outcomes: list[Any] = await asyncio.gather(*stores, return_exceptions=True)
    error = outcomes.pop(77)
    assert isinstance(error, BackendStoreError)
    assert "23514" in str(error)
    assert "Failing row" not in str(error)  # which would quote it
    assert outcomes == [True] * 299
    assert await admin.fetchval("SELECT count(*) FROM celery_taskmeta") == 299
    assert len(recorder.stores) <= 1 + 2 * 9  # halves, not one by one


@pytest.mark.parametrize("code", ["53100", "54000"], ids=["disk full", "queue of notifications full"])
async def test_what_no_result_is_to_blame_for_fails_them_all_and_stores_none(
    recorded: PostgresBackend, recorder: Recorder, admin: asyncpg.Connection[Any], code: str
) -> None:
    await on_each_row(admin, f"IF NEW.task_id = 'id-77' THEN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END IF")
    recorder.sent.clear()
    stores = (recorded.mark_as_done(f"id-{number}", number) for number in range(300))
    outcomes = await asyncio.gather(*stores, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {BackendStoreError}
    assert await admin.fetchval("SELECT count(*) FROM celery_taskmeta") == 0
    assert len(recorder.stores) == 1


@pytest.mark.parametrize("code", ["08006", "25006", "25P04", "40001", "40P01", "53300", "55P03", "57014", "57P01"])
async def test_what_may_pass_is_tried_again(
    postgres_url: str, backend: PostgresBackend, admin: asyncpg.Connection[Any], code: str
) -> None:
    await admin.execute("CREATE SEQUENCE attempts")
    await on_each_row(admin, f"IF nextval('attempts') <= 2 THEN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END IF")
    assert await backend.mark_as_done("a", 1)
    assert await admin.fetchval("SELECT last_value FROM attempts") == 3
    await admin.execute("ALTER SEQUENCE attempts RESTART MINVALUE -1000000 START -1000000")
    async with PostgresBackend(postgres_url, retry_for=0.1) as impatient:
        with pytest.raises(BackendConnectionError, match=code):
            await impatient.mark_as_done("b", 1)
    assert not await backend.exists("b")


async def test_other_errors_of_the_server_are_ours_too(
    backend: PostgresBackend, admin: asyncpg.Connection[Any]
) -> None:
    """For each call there is the most fitting error, and none of asyncpg's gets out."""
    await admin.execute("""
        CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'no'; END$$;
        CREATE TRIGGER no BEFORE DELETE OR TRUNCATE ON celery_taskmeta EXECUTE FUNCTION no();
        CREATE TRIGGER no BEFORE INSERT OR DELETE ON celery_tasksetmeta EXECUTE FUNCTION no()""")
    with pytest.raises(BackendStoreError, match="P0001"):
        await backend.save_group("g", backend.group(["a"]))
    await backend.mark_as_done("a", 1)
    for call in (backend.forget("a"), backend.cleanup(), backend.delete_group("g")):
        with pytest.raises(BackendError, match="P0001"):
            await call


async def test_a_read_only_session_reads_and_waits_and_stores_nothing(
    postgres_url: str, backend: PostgresBackend
) -> None:
    async with PostgresBackend(f"{postgres_url}?default_transaction_read_only=on", retry_for=0.1) as web:
        waiter = asyncio.ensure_future(web.wait_for("a"))
        await settled(web, 1)
        with pytest.raises(BackendConnectionError, match="25006"):
            await web.mark_as_done("a", 1)
        assert not await backend.exists("a")
        await backend.mark_as_done("a", 2)
        assert (await waiter).result == 2


# -- the listener ---------------------------------------------------------------------------------------------------


async def test_ten_thousand_waiters_share_a_connection_and_256_channels_and_ask_for_nothing(
    recorder: Recorder, admin: asyncpg.Connection[Any]
) -> None:
    async with PostgresBackend(connect=recorder.connect, heartbeat=1) as backend:
        waiters = [asyncio.ensure_future(backend.wait_for(f"id-{number}")) for number in range(10_000)]
        await settled(backend, 10_000)
        assert backend._listener is not None
        assert len(backend._listener._channels) == 256
        assert await connections(admin) <= 3
        recorder.sent.clear()
        await until(lambda: len(recorder.sent) >= 2)
        assert {record.query for record in recorder.sent} == {"SELECT pg_backend_pid()"}  # the heartbeat
        for waiter in waiters:
            waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
        await until(lambda: waited_for(backend, 0))
        assert len(backend._shards[0].hub) == 0


async def test_only_the_shards_in_which_somebody_waits_are_heard(postgres_url: str, backend: PostgresBackend) -> None:
    heard: list[str] = []
    web = PostgresBackend(postgres_url)
    notified = web._notified

    def note(payload: str) -> None:
        heard.append(payload)
        notified(payload)

    web._notified = note  # type: ignore[method-assign]
    async with web:
        waiter = asyncio.ensure_future(web.wait_for("a"))
        await settled(web, 1)
        heard.clear()
        ids = [f"id-{number}" for number in range(2_000)]
        await asyncio.gather(*(backend.mark_as_done(task_id, 1) for task_id in ids))
        await backend.mark_as_done("a", 1)
        await waiter
        near = {task_id for task_id in [*ids, "a"] if web._channel(task_id) == web._channel("a")}
        assert sorted(heard) == sorted(f"7 SUCCESS{task_id}" for task_id in near)
        assert len(near) < 50


async def test_a_dead_peer_is_noticed_and_replaced(
    proxy: TcpProxy, backend: PostgresBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant 9: nothing is closed, nothing is reset, bytes just vanish."""
    async with through(proxy.port, heartbeat=0.3) as web:
        waiter = asyncio.ensure_future(web.wait_for("a"))
        await settled(web, 1)
        proxy.stall()
        await backend.mark_as_done("a", 42)
        await until(lambda: "has not answered" in caplog.text)
        proxy.resume()
        assert (await waiter).result == 42


async def test_a_dead_peer_holds_up_no_call_for_ever(proxy: TcpProxy, backend: PostgresBackend) -> None:
    async with through(proxy.port, retry_for=0, heartbeat=0.3) as web:
        proxy.stall()
        for call in (web.mark_as_done("a", 1), web.get_task_meta("a"), web.cleanup()):
            with pytest.raises(BackendConnectionError):
                await call
        proxy.resume()
        web.retry_for = 30
        assert await web.mark_as_done("a", 1)


async def test_a_server_is_not_taken_for_dead_by_a_loop_that_was_busy(postgres_url: str) -> None:
    await PostgresBackend(postgres_url).create_schema()
    async with PostgresBackend(postgres_url, heartbeat=0.3, retry_for=0) as backend:
        waiter = asyncio.ensure_future(backend.wait_for("a"))
        await settled(backend, 1)
        listener = backend._listener
        storing = asyncio.ensure_future(backend.mark_as_done("b", 1))
        for _ in range(10):
            await asyncio.sleep(0)  # until it is under way
        time.sleep(1)  # noqa: ASYNC251 - more than three heartbeats
        assert await storing
        await backend.mark_as_done("a", 1)
        await waiter
        assert backend._listener is listener


async def test_a_result_stored_while_the_listener_is_away_is_found_when_it_returns(
    proxy: TcpProxy, backend: PostgresBackend
) -> None:
    async with through(proxy.port) as web:
        waiter = asyncio.ensure_future(web.wait_for("a"))
        await settled(web, 1)
        proxy.refuse()
        proxy.cut()
        await until(lambda: web._listener is None or web._listener.lost)
        await backend.mark_as_done("a", 42)
        proxy.refuse(False)
        assert (await waiter).result == 42


async def test_a_listener_killed_over_and_over_misses_no_result(
    postgres_url: str, backend: PostgresBackend, admin: asyncpg.Connection[Any]
) -> None:
    async with PostgresBackend(postgres_url) as web:
        waiters = [asyncio.ensure_future(web.wait_for(f"id-{number}")) for number in range(200)]
        await settled(web, 200)
        for number in range(200):
            if number % 20 == 0:
                await until(lambda: web._listener is not None and not web._listener.lost)
                assert web._listener is not None
                pid = web._listener._connection.get_server_pid()
                await admin.execute("SELECT pg_terminate_backend($1)", pid)
            await backend.mark_as_done(f"id-{number}", number)  # before, while and after it is made anew
        assert [(await waiter).result for waiter in waiters] == list(range(200))


async def test_a_table_that_was_made_anew_is_listened_to_after_a_reconnect(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    """As after a move to another server by logical replication: the name leads to tables with other numbers."""
    async with PostgresBackend(postgres_url) as web:
        waiter = asyncio.ensure_future(web.wait_for("a"))
        await settled(web, 1)
        before = web._listener
        await admin.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        await PostgresBackend(postgres_url).create_schema()
        await terminate(admin)
        await until(lambda: web._listener is not before and waited_for(web, 1))
        await settled(web, 1)
        await as_celery_does(admin, "a")
        assert (await waiter).result == 42


# -- loss of connections and servers --------------------------------------------------------------------------------


async def test_a_writer_killed_in_the_middle_of_a_batch_stores_it_all_the_same(
    backend: PostgresBackend, admin: asyncpg.Connection[Any]
) -> None:
    await on_each_row(admin, "PERFORM pg_advisory_xact_lock_shared(7)")
    await admin.execute("SELECT pg_advisory_lock(7)")
    storing = asyncio.gather(*(backend.mark_as_done(f"id-{number}", number) for number in range(100)))
    killed: set[int] = set()

    async def another_is_in_it() -> bool:
        pid = await admin.fetchval("SELECT pid FROM pg_stat_activity WHERE wait_event = 'advisory'")
        if pid is None or pid in killed:
            return False
        killed.add(pid)
        return True

    for _ in range(3):
        await until(another_is_in_it)
        await terminate(admin, "wait_event = 'advisory'")
    await admin.execute("SELECT pg_advisory_unlock(7)")
    assert all(await storing)
    assert await admin.fetchval("SELECT count(*) FROM celery_taskmeta") == 100


async def test_a_store_whose_reply_was_lost_counts_as_stored(proxy: TcpProxy, admin: asyncpg.Connection[Any]) -> None:
    async with through(proxy.port) as backend:
        await backend.mark_as_done("b", 1)  # so that the statement is known, and sent and executed in one
        proxy.filter = lambda data, to_server: data if to_server else b""
        storing = asyncio.ensure_future(backend.mark_as_done("a", 1))

        async def stored() -> bool:
            return "a" in await rows(admin)

        await until(stored)
        proxy.filter = None
        proxy.cut()
        assert await storing is True
        assert await backend.mark_as_done("a", 2) is False
        assert await backend.result("a") == 1


@pytest.fixture(scope="module")
def mortal_server() -> Iterator[PostgresServer]:
    with postgres_server(durable=True) as server:
        yield server


@pytest.fixture
async def mortal(mortal_server: PostgresServer) -> AsyncIterator[PostgresServer]:
    """A PostgreSQL that keeps what it has stored, for tests that stop it; empty."""
    if mortal_server._process is None:
        await asyncio.to_thread(mortal_server.start)
    connection = await asyncpg.connect(mortal_server.url)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await connection.close()
    yield mortal_server
    if mortal_server._process is not None:
        mortal_server.thaw()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "immediate"])
async def test_a_restart_of_the_server_loses_no_result(mortal: PostgresServer, how: signal.Signals) -> None:
    async with PostgresBackend(mortal.url) as web, PostgresBackend(mortal.url) as worker:
        await worker.mark_as_done("before", 1)
        waiter = asyncio.ensure_future(web.wait_for("after"))
        await settled(web, 1)
        await asyncio.to_thread(mortal.stop, how)
        storing = asyncio.ensure_future(worker.mark_as_done("after", 2))  # while it is down
        reading = asyncio.ensure_future(web.wait_for("before"))
        await asyncio.to_thread(mortal.start)
        assert await storing
        assert (await waiter).result == 2
        assert (await reading).result == 1


async def test_a_long_outage_fails_calls_and_not_waiters(mortal: PostgresServer) -> None:
    async with PostgresBackend(mortal.url, retry_for=0.2) as backend:
        waiter = asyncio.ensure_future(backend.wait_for("a"))
        await settled(backend, 1)
        await asyncio.to_thread(mortal.stop)
        for call in (backend.mark_as_done("a", 1), backend.get_task_meta("a")):
            with pytest.raises(BackendConnectionError):
                await call
        assert not waiter.done()
        await asyncio.to_thread(mortal.start)
        backend.retry_for = 30
        await backend.mark_as_done("a", 2)
        assert (await waiter).result == 2


async def test_a_frozen_server_is_noticed_and_waited_for(
    mortal: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    await PostgresBackend(mortal.url).create_schema()
    options: dict[str, Any] = {"heartbeat": 0.3}
    async with PostgresBackend(mortal.url, **options) as web, PostgresBackend(mortal.url, **options) as worker:
        waiter = asyncio.ensure_future(web.wait_for("a"))
        await settled(web, 1)
        mortal.freeze()
        storing = asyncio.ensure_future(worker.mark_as_done("a", 1))
        await until(lambda: "has not answered" in caplog.text and "cannot read or subscribe" in caplog.text)
        mortal.thaw()
        assert await storing
        assert (await waiter).result == 1


async def test_a_server_without_a_free_connection_is_tried_again(
    postgres_url: str, admin: asyncpg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def allow(count: int) -> None:
        await admin.execute(f"ALTER ROLE limited CONNECTION LIMIT {count}")
        await terminate(admin, "usename = 'limited'")

    await admin.execute("CREATE ROLE limited LOGIN CONNECTION LIMIT 1; GRANT CREATE, USAGE ON SCHEMA public TO limited")
    url = postgres_url.replace("postgres@", "limited@")
    try:
        async with PostgresBackend(url) as backend:
            waiter = asyncio.ensure_future(backend.wait_for("a"))
            await until(lambda: "too many connections" in caplog.text)  # it wants one to listen
            await allow(2)
            assert await backend.mark_as_done("a", 1)
            assert (await waiter).result == 1
            await allow(0)
            storing = asyncio.ensure_future(backend.mark_as_done("b", 1))
            with pytest.raises(BackendConnectionError, match="too many connections"):
                await PostgresBackend(url).open()
            await allow(1)
            assert await storing
            await allow(0)
            backend._shards[0].persistence._retry_for = 0.1
            with pytest.raises(BackendConnectionError, match="too many connections"):
                await backend.mark_as_done("c", 1)
    finally:
        await allow(0)
        await admin.execute("DROP OWNED BY limited CASCADE; DROP ROLE limited")


# -- standby --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def standby_of(primary: PostgresServer) -> AsyncIterator[PostgresServer]:
    """A standby that has everything that the primary had when this was called."""
    with postgres_server(primary=primary) as standby:
        yield standby


async def test_a_standby_is_read_from_and_refuses_all_else(mortal: PostgresServer) -> None:
    async with PostgresBackend(mortal.url) as worker:
        await worker.mark_as_done("a", 1)
    async with standby_of(mortal) as standby, PostgresBackend(standby.url, retry_for=0.1) as reader:
        assert await reader.result("a") == 1
        with pytest.raises(BackendRefusedError, match="standby"):
            await reader.wait_for("b")
        with pytest.raises(BackendConnectionError, match="25006"):
            await reader.mark_as_done("b", 1)
        # a notification would come before the standby has what it tells of
        async with PostgresBackend(standby.url, listen_dsn=mortal.url) as mixed:
            with pytest.raises(BackendRefusedError, match="standby"):
                await mixed.wait_for("b")


async def test_waiters_outlive_a_failover(mortal: PostgresServer, caplog: pytest.LogCaptureFixture) -> None:
    await PostgresBackend(mortal.url).create_schema()
    async with standby_of(mortal) as standby, TcpProxy(mortal.port) as name, through(name.port) as web:
        waiter = asyncio.ensure_future(web.wait_for("a"))
        await settled(web, 1)
        await asyncio.to_thread(mortal.stop)
        name._target_port = standby.port
        name.cut()
        await until(lambda: "during recovery" in caplog.text)  # it has asked the standby to listen
        admin = await asyncpg.connect(standby.url)
        await admin.execute("SELECT pg_promote()")
        await as_celery_does(admin, "a")
        await admin.close()
        assert (await waiter).result == 42


# -- poolers --------------------------------------------------------------------------------------------------------


@pytest.fixture
async def pooler(own_postgres: PostgresServer, postgres_url: str) -> AsyncIterator[TransactionPooler]:
    async with TransactionPooler(own_postgres.port) as pooler:
        yield pooler


NO_STATEMENTS = {"connect_options": {"statement_cache_size": 0}}


async def test_a_pooler_that_takes_the_listener_away_is_found_by_the_first_wait(pooler: TransactionPooler) -> None:
    async with through(pooler.port, **NO_STATEMENTS) as backend:
        with pytest.raises(BackendRefusedError, match="listen_dsn"):
            await backend.wait_for("a")
        await backend.mark_as_done("a", 1)
        assert await backend.result("a") == 1


async def test_a_pooler_that_let_the_proof_pass_by_luck_is_found_by_the_next_heartbeat(
    pooler: TransactionPooler, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def by_luck(self: Listener, notify: Any) -> bool:
        monkeypatch.undo()
        await self._ping()
        return True

    monkeypatch.setattr(Listener, "hears", by_luck)
    async with through(pooler.port, heartbeat=0.1, **NO_STATEMENTS) as backend:
        with pytest.raises(BackendRefusedError, match="transaction mode"):
            await backend.wait_for("a")


async def test_everything_works_through_a_pooler_beside_a_direct_listener(
    pooler: TransactionPooler, postgres_url: str
) -> None:
    async with through(pooler.port, listen_dsn=postgres_url, **NO_STATEMENTS) as backend:
        waiters = [asyncio.ensure_future(backend.wait_for(f"id-{number}")) for number in range(200)]
        await settled(backend, 200)
        for numbers in (range(50), range(50, 200)):
            await asyncio.gather(
                *(backend.mark_as_started(f"id-{number}") for number in numbers),
                *(backend.mark_as_done(f"id-{number}", number) for number in numbers),
                backend.get_many(f"id-{number}" for number in numbers),
                backend.group(["id-1"], "g").save(),
                backend.forget("none"),
                backend.cleanup(),
            )
        assert [(await waiter).result for waiter in waiters] == list(range(200))
        assert len(pooler.opened) >= 2


async def test_a_pooler_without_prepared_statements_is_told_with_the_remedy(
    pooler: TransactionPooler, postgres_url: str
) -> None:
    with pytest.raises(BackendRefusedError, match="'statement_cache_size': 0"):
        async with through(pooler.port), through(pooler.port) as second:
            await second.mark_as_done("a", 1)


# -- connections of the caller's ------------------------------------------------------------------------------------


async def test_a_pool_of_the_callers_is_used_and_left_as_it_was(postgres_url: str) -> None:
    """It is all there is: the URL leads nowhere, and two connections have to do."""
    async with asyncpg.create_pool(postgres_url, min_size=2, max_size=2) as pool:
        pids = await pids_of(pool)
        async with PostgresBackend("postgresql://127.0.0.1:1/x", pool=pool, cleanup_interval=0.01) as backend:
            await backend.create_schema()
            waiters = [asyncio.ensure_future(backend.wait_for(f"id-{number}")) for number in range(100)]
            await settled(backend, 100)
            await until(lambda: pool.get_idle_size() == 1)  # the other one listens; this one also cleans now and then
            await asyncio.gather(*(backend.mark_as_done(f"id-{number}", number) for number in range(100)))
            assert [(await waiter).result for waiter in waiters] == list(range(100))
            remaining = asyncio.ensure_future(backend.wait_for("never"))
            await settled(backend, 1)
        with pytest.raises(aioresult.BackendClosedError):
            await remaining
        assert pool.get_idle_size() == 2
        assert await pids_of(pool) == pids
        for _ in range(2):
            async with pool.acquire() as connection:
                assert await connection.fetch("SELECT pg_listening_channels()") == []


async def pids_of(pool: asyncpg.Pool[Any]) -> set[int]:
    async with pool.acquire() as one, pool.acquire() as two:
        return {one.get_server_pid(), two.get_server_pid()}


async def test_a_pool_of_the_callers_survives_the_loss_of_the_listener(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    async with asyncpg.create_pool(postgres_url, min_size=2, max_size=2) as pool:
        async with PostgresBackend(pool=pool) as backend:
            waiter = asyncio.ensure_future(backend.wait_for("a"))
            await settled(backend, 1)
            before = backend._listener
            await terminate(admin)
            await until(lambda: backend._listener is not before and waited_for(backend, 1))
            await settled(backend, 1)
            await as_celery_does(admin, "a")
            assert (await waiter).result == 42
        assert len(await pids_of(pool)) == 2


async def test_a_connection_factory_makes_all_connections_but_a_listener_of_its_own_dsn(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    pids: set[int] = set()

    async def connect() -> asyncpg.Connection[Any]:
        connection = await asyncpg.connect(postgres_url)
        pids.add(connection.get_server_pid())
        return connection

    others = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    for listen_dsn, foreign in ((None, 0), (postgres_url, 1)):
        nowhere = "postgresql://127.0.0.1:1/x"
        async with PostgresBackend(nowhere, connect=connect, listen_dsn=listen_dsn) as backend:
            waiter = asyncio.ensure_future(backend.wait_for("a"))
            await settled(backend, 1)
            now = {row[0] for row in await admin.fetch(others)}
            assert len(now - pids) == foreign
            await backend.mark_as_done("a", 1)
            assert (await waiter).result == 1
            await backend.forget("a")
        await until(lambda: _is_zero(connections(admin)))


async def _is_zero(number: Any) -> bool:
    return bool(await number == 0)


# -- expiry ---------------------------------------------------------------------------------------------------------


async def rows(admin: asyncpg.Connection[Any], table: str = "celery_taskmeta") -> set[str]:
    key = "task_id" if table == "celery_taskmeta" else "id"
    return {row[0] for row in await admin.fetch(f"SELECT {key} FROM {table}")}


async def test_cleanup_removes_what_has_expired_and_nothing_else(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    async with PostgresBackend(postgres_url, expires=100) as backend:
        await backend.mark_as_done("default", 1)
        await backend.mark_as_done("shorter", 1, expires=10)
        await backend.mark_as_done("longer", 1, expires=1000)
        await backend.mark_as_done("for ever", 1, expires=0)
        await backend.mark_as_started("started")
        ids = await rows(admin)
        for seconds, removed in ((9, set()), (2, {"shorter"}), (90, {"default", "started"}), (1000, {"longer"})):
            await pass_time(admin, seconds, *ids)
            ids -= removed
            # what has expired is not seen, even before it is removed
            assert {
                meta.task_id for meta in await backend.get_many(await rows(admin)) if meta.status != "PENDING"
            } == ids
            assert await backend.cleanup() == len(removed)
            assert await rows(admin) == ids
        assert ids == {"for ever"} == await rows(admin, "celery_taskmeta_expiry")


async def test_an_expired_success_may_be_stored_anew(postgres_url: str, admin: asyncpg.Connection[Any]) -> None:
    async with PostgresBackend(postgres_url, expires=100) as backend:
        for task_id, expires in (("default", None), ("own", 10.0)):
            await backend.mark_as_done(task_id, "old", expires=expires)
            assert await backend.mark_as_done(task_id, "new") is False
            await pass_time(admin, 101, task_id)
            assert await backend.mark_as_pending(task_id) is True
            assert await backend.mark_as_done(task_id, "new") is True
            assert await backend.result(task_id) == "new"
        # No expiry of their own: a store that took more than a second, on a busy machine, has a note of when it was.
        assert await admin.fetchval("SELECT count(*) FROM celery_taskmeta_expiry WHERE expires_at IS NOT NULL") == 0


async def test_what_was_said_of_a_registration_does_not_concern_what_celery_stored_since(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    async with PostgresBackend(postgres_url, expires=100) as backend:
        await backend.mark_as_pending("short", expires=10)
        await backend.mark_as_pending("for ever", expires=0)
        await pass_time(admin, 11, "short")
        waiter = asyncio.ensure_future(backend.wait_for("short"))
        await settled(backend, 1)
        for task_id in ("short", "for ever"):
            await as_celery_does(admin, task_id)
        assert (await waiter).result == 42
        assert await backend.cleanup() == 0
        assert await backend.exists("short")
        await pass_time(admin, 101, "short", "for ever")
        assert not await backend.exists("for ever")
        assert await backend.cleanup() == 2
        assert await rows(admin, "celery_taskmeta_expiry") == set()


async def test_a_member_that_expires_sooner_takes_nothing_from_its_group(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    async with PostgresBackend(postgres_url, expires=1000) as backend:
        await backend.group(["a", "b"], "g").save()
        await backend.mark_as_done("a", 1, expires=5, request=TaskRequest(id="a", group="g"))
        left = """SELECT extract(epoch FROM greatest(expires_at, stored_at + interval '1000 s') - now())::int
                  FROM celery_tasksetmeta_expiry WHERE id = 'g'"""
        assert 900 < await admin.fetchval(left) <= 1000
        await backend.mark_as_done("b", 1, expires=5000, request=TaskRequest(id="b", group="g"))
        assert 4900 < await admin.fetchval(left) <= 5000


@pytest.mark.parametrize("expires", [None, 10.0], ids=["default", "own"])
async def test_cleanup_goes_in_bounded_batches(
    recorder: Recorder, admin: asyncpg.Connection[Any], expires: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with PostgresBackend(connect=recorder.connect, expires=100) as backend:
        ids = [f"id-{number}" for number in range(2_500)]
        await asyncio.gather(*(backend.mark_as_done(task_id, 1, expires=expires) for task_id in ids))
        # Of stores that took more than a second, on a busy machine: they would be in batches of their own.
        await admin.execute("DELETE FROM celery_taskmeta_expiry WHERE stored_at IS NOT NULL")
        await pass_time(admin, 101, *ids)
        await admin.execute("CREATE TABLE batches AS SELECT 0 AS size")
        await admin.execute("""
            CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN INSERT INTO batches SELECT count(*) FROM gone; RETURN NULL; END$$;
            CREATE TRIGGER note AFTER DELETE ON celery_taskmeta REFERENCING OLD TABLE AS gone
                EXECUTE FUNCTION note()""")
        assert await backend.cleanup() == 2_500
        sizes = await admin.fetch("SELECT size FROM batches WHERE size > 0 ORDER BY size")
        assert [row[0] for row in sizes] == [500, 1_000, 1_000]


async def test_cleanup_passes_over_what_somebody_is_writing(postgres_url: str, admin: asyncpg.Connection[Any]) -> None:
    async with PostgresBackend(postgres_url, expires=100) as backend:
        for task_id, expires in (("a", None), ("b", None), ("c", 10.0), ("d", 10.0)):
            await backend.mark_as_done(task_id, 1, expires=expires)
        await pass_time(admin, 101, "a", "b", "c", "d")
        async with admin.transaction():
            await admin.execute("UPDATE celery_taskmeta SET status = 'SUCCESS' WHERE task_id IN ('a', 'c')")
            assert await backend.cleanup() == 2
        assert await rows(admin) == {"a", "c"}
        assert await backend.cleanup() == 2
        assert await rows(admin, "celery_taskmeta_expiry") == set()


async def test_cleanup_finds_what_has_expired_by_an_index(
    backend: PostgresBackend, admin: asyncpg.Connection[Any]
) -> None:
    await admin.execute("""
        ALTER TABLE celery_taskmeta DISABLE TRIGGER ALL;
        INSERT INTO celery_taskmeta (id, task_id, status, date_done)
        SELECT n, 'id-' || n, 'SUCCESS', now() FROM generate_series(1, 100000) n;
        INSERT INTO celery_taskmeta_expiry
        SELECT task_id, now() + interval '1 day', date_done FROM celery_taskmeta WHERE id % 2 = 0;
        ALTER TABLE celery_taskmeta ENABLE TRIGGER ALL;
        ANALYZE celery_taskmeta, celery_taskmeta_expiry""")
    for statement in backend._sql.cleanup[:3]:
        plan = "\n".join(row[0] for row in await admin.fetch(f"EXPLAIN (COSTS OFF) {statement}"))
        assert "Seq Scan" not in plan, plan


async def test_background_cleanup_is_done_by_one_at_a_time(
    recorder: Recorder, postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    options: dict[str, Any] = {"connect": recorder.connect, "expires": 100, "cleanup_interval": 0.01}
    async with PostgresBackend(**options) as one, PostgresBackend(**options):
        await admin.execute("SELECT pg_advisory_lock($1)", one._cleaner._lock)  # as one that is at it would hold it
        await one.mark_as_done("a", 1)
        await pass_time(admin, 101, "a")
        recorder.sent.clear()
        await until(lambda: len(recorder.with_text("pg_try_advisory_xact_lock")) >= 20)
        assert await rows(admin) == {"a"}
        await admin.execute("SELECT pg_advisory_unlock($1)", one._cleaner._lock)
        await until(lambda: _is_empty(rows(admin)))


async def _is_empty(found: Any) -> bool:
    return not await found


async def test_background_cleanup_survives_an_outage(
    postgres_url: str, admin: asyncpg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with PostgresBackend(postgres_url, expires=100, cleanup_interval=0.01) as backend:
        await admin.execute("ALTER TABLE celery_taskmeta RENAME TO elsewhere")
        await until(lambda: "background cleanup" in caplog.text)
        await admin.execute("ALTER TABLE elsewhere RENAME TO celery_taskmeta")
        await backend.mark_as_done("a", 1)
        await pass_time(admin, 101, "a")
        await until(lambda: _is_empty(rows(admin)))


# -- the end --------------------------------------------------------------------------------------------------------


async def test_closing_in_the_middle_of_a_request_is_no_loss_to_report(
    proxy: TcpProxy, caplog: pytest.LogCaptureFixture
) -> None:
    async with through(proxy.port) as backend:
        waiter = asyncio.ensure_future(backend.wait_for("a"))
        await settled(backend, 1)
        listener = backend._listener
        proxy.stall()
        waiter.cancel()
        await until(lambda: listener is not None and listener._turn.locked())  # for UNLISTEN
    assert caplog.text == ""
    proxy.resume()


@pytest.mark.parametrize("frozen", [False, True])
async def test_close_leaves_no_connection(proxy: TcpProxy, admin: asyncpg.Connection[Any], frozen: bool) -> None:
    """Nor a task, which is checked after every test."""
    async with through(proxy.port, cleanup_interval=0.01) as backend:
        waiters = [asyncio.ensure_future(backend.wait_for(f"id-{number}")) for number in range(100)]
        await settled(backend, 100)
        await asyncio.gather(*(backend.get_task_meta(f"id-{number}") for number in range(2_000)))
        if frozen:
            proxy.stall()
            waiters.append(asyncio.ensure_future(backend.get_task_meta("a")))
    outcomes = await asyncio.gather(*waiters, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {aioresult.BackendClosedError}
    proxy.resume()
    await until(lambda: _is_zero(connections(admin)))
