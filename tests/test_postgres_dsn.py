"""What becomes of the options in the URL of a PostgreSQL backend: libpq's, psycopg's, SQLAlchemy's and the server's."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import psycopg.pq
import pytest
import trustme

import aioresult
from aioresult import BackendRefusedError, ImproperlyConfigured
from aioresult.backends.postgres import PostgresBackend
from aioresult.backends.postgres.dsn import Dsn, parse_dsn, with_connect_args
from aioresult.celery import backend_from_app

from .celery_worker import GUARD, app_with
from .servers import PostgresServer, TcpProxy

BASE = "postgresql://bob:s3cr3t@h:7/db"


def settings(**given: str) -> dict[str, Any]:
    return {"server_settings": given}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where libpq looks for certificates of the user's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PGSSLROOTCERT", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("query", "text", "arguments"),
    [
        ("", BASE, {}),
        ("connect_timeout=3", BASE, {"timeout": 3.0}),
        ("connect_timeout=0", BASE, {}),
        ("connect_timeout=-1", BASE, {}),
        ("application_name=web", BASE, settings(application_name="web")),
        ("fallback_application_name=x&application_name=web", BASE, settings(application_name="web")),
        ("fallback_application_name=x", BASE, settings(application_name="x")),
        ("options=-csearch_path%3Dfoo%20-c%20jit%3Doff", BASE, settings(options="-csearch_path=foo -c jit=off")),
        ("search_path=foo,bar&TimeZone=UTC", BASE, settings(search_path="foo,bar", TimeZone="UTC")),
        ("shop.tenant=7", BASE, settings(**{"shop.tenant": "7"})),
        ("host=other", BASE, {"host": ["other"], "port": [7]}),
        ("host=other&port=8", BASE, {"host": ["other"], "port": [8]}),
        ("host=a,b&port=8,9", BASE, {"host": ["a", "b"], "port": [8, 9]}),
        ("host=a:8&host=b", BASE, {"host": ["a", "b"], "port": [8, 5432]}),  # so SQLAlchemy writes several
        ("host=%2Frun%2Fpostgresql", BASE, {"host": ["/run/postgresql"], "port": [7]}),
        ("host=::1", BASE, {"host": ["::1"], "port": [7]}),
        ("host=[::1]:8", BASE, {"host": ["::1"], "port": [8]}),
        ("user=ann&password=p%40w&dbname=other", BASE, {"user": "ann", "password": "p@w", "database": "other"}),
        ("sslmode=require&sslcert=%2Fc&passfile=%2Fp", f"{BASE}?sslmode=require&sslcert=%2Fc&passfile=%2Fp", {}),
        ("ssl=require", f"{BASE}?sslmode=require", {}),
        ("sslrootcert=system&sslmode=verify-full", f"{BASE}?sslmode=verify-full", {"ssl": True}),
        ("target_session_attrs=read-write&service=s", f"{BASE}?target_session_attrs=read-write&service=s", {}),
        ("keepalives=1&keepalives_idle=30&tcp_user_timeout=1000&gssencmode=prefer", BASE, {}),
        ("client_encoding=UTF8&sslcompression=0&channel_binding=prefer&prepare_threshold=5", BASE, {}),
        ("sslmode=require&channel_binding=require", f"{BASE}?sslmode=verify-full", {"ssl": True}),
        ("sslmode=verify-full&channel_binding=require", f"{BASE}?sslmode=verify-full", {}),
        ("sslmode=verify-ca&channel_binding=require", f"{BASE}?sslmode=verify-full", {}),
        ("channel_binding=require&sslrootcert=%2Fca", f"{BASE}?sslrootcert=%2Fca&sslmode=verify-full", {}),
    ],
)
def test_an_option_is_translated_left_to_asyncpg_or_passed_over(
    query: str, text: str, arguments: dict[str, Any]
) -> None:
    for scheme in ("postgresql", "db+postgresql+psycopg"):
        url = f"{BASE}?{query}".replace("postgresql", scheme, 1)
        assert parse_dsn(url.removeprefix("db+")) == Dsn(text, arguments)


def test_channel_binding_keeps_to_the_authorities_that_libpq_would_find(home: Path) -> None:
    (home / ".postgresql").mkdir()
    (home / ".postgresql" / "root.crt").touch()
    url = f"{BASE}?sslmode=require&channel_binding=require"
    assert parse_dsn(url) == Dsn(f"{BASE}?sslmode=verify-full", {})


def test_several_hosts_stay_as_they_are() -> None:
    url = "postgresql://bob@a:1,b:2/db"
    assert parse_dsn(f"{url}?target_session_attrs=primary") == Dsn(f"{url}?target_session_attrs=primary", {})


@pytest.mark.parametrize(
    ("query", "told"),
    [
        (
            "no_such=1",
            "unknown parameter 'no_such' in the URL; remove it, or pass arguments",
        ),
        ("statement_timeuot=1", "unknown parameter 'statement_timeuot' in the URL; did you mean 'statement_timeout'"),
        ("command_timeout=1", "unknown parameter 'command_timeout'"),
        ("gssencmode=require", "asyncpg cannot do gssencmode=require"),
        ("client_encoding=latin1", "asyncpg cannot do client_encoding=latin1"),
        ("replication=database", "asyncpg cannot do replication=database"),
        ("require_auth=scram-sha-256", "asyncpg has no require_auth"),
        ("scram_client_key=s3cr3t", "asyncpg has no scram_client_key"),
        ("hostaddr=127.0.0.1", "only libpq has hostaddr; write the address in place of the host"),
        ("sslmode=no", "sslmode must be one of allow, disable"),
        ("sslmode=disable&channel_binding=require", "channel_binding=require needs TLS"),
        ("sslrootcert=system&sslcert=c", "sslcert needs an sslrootcert that is a file"),
        ("sslmode=require&channel_binding=require&sslcrl=c", "sslcrl needs an sslrootcert that is a file"),
        ("connect_timeout=soon", "connect_timeout must be a number of seconds"),
        ("port=x", "port= must be a number"),
        ("host=a,,b", "an empty host"),
        ("s3cr3t-without-a-value", "needs a name and a value"),
    ],
)
@pytest.mark.parametrize("option", ["url", "listen_dsn"])
def test_any_other_is_refused_by_name_when_the_backend_is_made(query: str, told: str, option: str) -> None:
    url = f"{BASE}?{query}"
    with pytest.raises(ImproperlyConfigured, match=told) as caught:
        aioresult.connect(url) if option == "url" else aioresult.connect("postgresql://h", listen_dsn=url)
    assert "s3cr3t" not in f"{caught.value!r} {caught.value.__cause__!r}".replace(query.partition("=")[0], "")


@pytest.mark.parametrize("option", [each.keyword.decode() for each in psycopg.pq.Conninfo.get_defaults()])
def test_no_option_of_libpqs_is_unknown(option: str) -> None:
    with pytest.raises(ImproperlyConfigured) as caught:
        parse_dsn(f"{BASE}?{option}=1&no_such=1")  # what is refused is the other, or it has a message of its own
    assert f"unknown parameter {option!r}" not in str(caught.value)


def test_connect_options_take_precedence_setting_by_setting() -> None:
    dsn = parse_dsn(f"{BASE}?connect_timeout=3&search_path=url&timezone=UTC")
    merged = dsn.with_options({"timeout": 5, "ssl": False, "server_settings": {"search_path": "mine"}})
    expected = {"timeout": 5, "ssl": False, "server_settings": {"search_path": "mine", "timezone": "UTC"}}
    assert merged == Dsn(BASE, expected)


def test_connect_args_take_precedence_over_the_url() -> None:
    given = {"host": "other", "password": "p@w/", "connect_timeout": 3, "options": "-c jit=off", "autocommit": True}
    url = with_connect_args(f"db+{BASE}?connect_timeout=9&sslmode=disable", {**given, "row_factory": object()})
    expected = {"host": ["other"], "port": [7], "password": "p@w/", "timeout": 3.0, **settings(options="-c jit=off")}
    assert parse_dsn(url.removeprefix("db+")) == Dsn(f"{BASE}?sslmode=disable", expected)


# -- on a server ----------------------------------------------------------------------------------------------------


async def ask(url: str, *questions: str) -> list[Any]:
    text, arguments = parse_dsn(url)
    connection = await asyncpg.connect(text, **arguments)
    try:
        return [await connection.fetchval(question) for question in questions]
    finally:
        await connection.close()


async def test_every_setting_that_a_session_may_change_may_stand_in_the_url(postgres_url: str) -> None:
    (names,) = await ask(
        postgres_url,
        """SELECT array_agg(name) FROM pg_settings
        WHERE context IN ('user', 'superuser', 'backend', 'superuser-backend') AND name NOT LIKE 'client_encoding'""",
    )
    for name in set(names) - {"tcp_user_timeout"}:  # of that name libpq has an option
        assert parse_dsn(f"{BASE}?{name}=1").arguments == settings(**{name: "1"})


async def test_the_server_gets_what_the_options_say(postgres_url: str) -> None:
    query = "?options=-csearch_path%3Da%5C%20%5C%5Cb%20-c%20statement_timeout%3D7s&application_name=web&lock_timeout=5s"
    asked = ("SHOW application_name", "SHOW statement_timeout", "SHOW lock_timeout")
    assert await ask(postgres_url + query.replace("a%5C%20%5C%5Cb", "foo"), *asked) == ["web", "7s", "5s"]
    # libpq's escapes: a backslash before a blank, and before a backslash
    assert await ask(f"{postgres_url}?options=-capp.x%3Da%5C%20%5C%5Cb", "SHOW app.x") == ["a \\b"]


NEVER_MINDED = (
    "connect_timeout=3&keepalives=1&keepalives_idle=30&tcp_user_timeout=1000&gssencmode=disable&channel_binding=prefer"
    "&client_encoding=utf8&target_session_attrs=read-write&sslmode=prefer&application_name=web"
)
SCHEMA: Mapping[str, Any] = {"database_engine_options": {"connect_args": {"options": "-csearch_path=foo"}}}


@pytest.mark.parametrize(
    ("query", "conf"),
    [(NEVER_MINDED, {}), ("options=-csearch_path%3Dfoo", {}), ("sslmode=disable", SCHEMA)],
    ids=["libpq", "options", "connect_args"],
)
@pytest.mark.timeout(60)
async def test_what_celery_stores_is_found(postgres_url: str, query: str, conf: Mapping[str, Any]) -> None:
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute("CREATE SCHEMA foo")
        theirs = postgres_url.replace("postgresql:", "db+postgresql+psycopg:")
        with app_with(f"{theirs}?{query}", **conf) as app:
            await asyncio.to_thread(app.backend.mark_as_done, task_id := str(uuid4()), "theirs")
            async with backend_from_app(app, create=True) as backend:
                assert await backend.result(task_id).get(timeout=GUARD) == "theirs"
        tables = await connection.fetch("SELECT schemaname FROM pg_tables WHERE tablename = 'celery_taskmeta'")
        assert len(tables) == 1
    finally:
        await connection.execute("DROP SCHEMA foo CASCADE")
        await connection.close()


async def test_a_name_that_may_be_a_password_is_shown_in_no_error_of_the_server(own_postgres: PostgresServer) -> None:
    with pytest.raises(BackendRefusedError, match=r'role "\*\*" does not exist') as caught:
        await PostgresBackend(f"postgresql://s3cr3t@127.0.0.1:{own_postgres.port}/postgres?sslmode=disable").open()
    assert "s3cr3t" not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.fixture
async def tls_front(own_postgres: PostgresServer, tmp_path: Path) -> AsyncIterator[tuple[str, Path]]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["postgresql"])
    authority.issue_cert("localhost").configure_cert(context)
    async with TcpProxy(own_postgres.port, context) as front:
        yield f"postgresql://postgres@localhost:{front.port}/postgres?sslnegotiation=direct", tmp_path / "ca.pem"


async def test_channel_binding_is_made_up_for_by_verifying_the_server(tls_front: tuple[str, Path]) -> None:
    url, authority = tls_front
    demanding = f"{url}&sslmode=require&channel_binding=require"
    with pytest.raises(BackendRefusedError, match="certificate verify failed"):
        await PostgresBackend(demanding).open()
    with pytest.raises(BackendRefusedError, match="certificate verify failed"):
        await PostgresBackend(f"{url}&sslrootcert=system").open()
    for query in (f"{url}&sslmode=require", f"{demanding}&sslrootcert={authority}"):
        assert await ask(query, "SELECT 1") == [1]
