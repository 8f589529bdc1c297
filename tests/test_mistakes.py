"""What users get wrong, and what they are told: at once, and in words that say what to do instead."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

import aioresult
from aioresult import Backend, ConnectOptions, ImproperlyConfigured, UsageError, by_url
from aioresult.options import option_names


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (None, "must be a str, not NoneType"),
        (b"redis://:secret@localhost", "must be a str, not bytes"),
        ("redis:localhost", "'redis:**' is not a URL: write redis://…"),
        ("redis:/:secret@localhost", "'redis:/:**@localhost' is not a URL: write redis://…"),
        ("memory:", "'memory:' is not a URL: write memory://…"),
        ("REDIS:localhost", "'REDIS:**' is not a URL: write redis://…"),
        ("reddis://localhost", "unknown result backend 'reddis'; did you mean 'redis'? Known here are memory, "),
        ("nope://localhost", "unknown result backend 'nope'; known here are memory, "),
        ("localhost", "'localhost' is not a URL: write redis://localhost"),
        ("rediss//h", "'rediss//h' is not a URL: write rediss://"),
        ("redis://h?expires=3", "'expires' does not belong in the URL: it is an option, connect(url, expires=…)"),
        (
            "postgresql://h?retry_for=3",
            "'retry_for' does not belong in the URL: it is an option, connect(url, retry_for=…)",
        ),
        ("localhost:6379", "'localhost:6379' is not a URL: write redis://localhost:6379"),
        ("localhost:6379/0", "'localhost:6379/0' is not a URL: write redis://localhost:6379/0"),
        ("127.0.0.1", "'127.0.0.1' is not a URL: write redis://127.0.0.1"),
        ("[::1]:6379", "'[::1]:6379' is not a URL: write redis://[::1]:6379"),
        ("cache.example.com:6379", "write redis://cache.example.com:6379"),
        ("db:5432/app", "'db:5432/app' is not a URL: write postgresql://db:5432/app"),
        ("bob:secret@cache:6379", "'bob:**@cache:6379' is not a URL: write redis://bob:**@cache:6379"),
        ("redis://host/x", "the database must be a number, as in redis://localhost:6379/0"),
        ("redis://host:x", "the port must be a number from 0 to 65535"),
        ("redis://::1:6379", "an IPv6 address stands in brackets"),
        ("redis://host:99999", "the port must be a number from 0 to 65535"),
        (
            "redis://host?socket_timeot=3",
            "unknown parameter 'socket_timeot' in the URL; did you mean 'socket_timeout'?",
        ),
        (
            "rediss://host?ssl_ca_cert=x&nope=1",
            "'nope' in the URL; unknown parameter 'ssl_ca_cert' in the URL; did you mean 'ssl_ca_certs'?",
        ),
        (
            "rediss://host?ssl_ca_certs=x&nope=1",
            "is not a URL for the Redis backend: unknown parameter 'nope' in the URL",
        ),
        ("postgresql://host?statement_timeuot=3", "in the URL; did you mean 'statement_timeout'?"),
        ("redis+foo://h", "is not a URL for the Redis backend: "),
        ("redis+cluster:h", "'redis+cluster:**' is not a URL: write redis+cluster://…"),
        ("redis+cluster://h1,h2/1", "a cluster has one database, number 0"),
        ("sentinel://h1:26379;sentinel://h2:26379", "it lacks the name of the master"),
        ("redis+sentinel://h1,h2", "it lacks the name of the master"),
        ("redis+sentinel+ssl://h1", "write redis+sentinel://host1:26379,host2:26379/name-of-the-master/0"),
        ("amqp://localhost", "Celery has a backend of that name; aioresult has none"),
    ],
)
def test_a_wrong_url_is_told_what_is_right(url: Any, told: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=re.escape(told)):
        aioresult.connect(url)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"expire": 60}, "unknown option 'expire'; did you mean 'expires'? MemoryBackend takes: accept, "),
        ({"shards": 2}, "unknown option 'shards'. MemoryBackend takes: accept, "),
        ({"heartbeat": 0}, "heartbeat must be more than 0"),
    ],
)
def test_a_wrong_option_is_told_what_is_right(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=re.escape(told)):
        aioresult.connect("memory://", **options)


#: For each option something that it is not, and what the error says that it must be.
WRONG: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(
        [
            "expires",
            "failure_expires",
            "chord_expires",
            "retry_for",
            "heartbeat",
            "recheck",
            "chord_lease",
            "lease",
            "default_timeout",
            "wait_for_server",
            "topology_refresh",
        ],
        ("a day", "must be a number of seconds from 0 to 10,000,000,000, or a timedelta, not 'a day'"),
    ),
    **dict.fromkeys(["max_result_size", "max_pending_bytes"], ("1 MB", "must be a number of bytes, not '1 MB'")),
    **dict.fromkeys(
        ["extended", "count_requests", "chord_ordered", "create", "durable_output"],
        ("no", "must be True or False, not 'no'"),
    ),
    **dict.fromkeys(["schema", "table", "group_table"], (3, "must be a str or None, not int")),
    **dict.fromkeys(["on_chord_ready", "connect"], ("f", "must be a coroutine function or None, not str")),
    **dict.fromkeys(["global_keyprefix", "listen_dsn"], (3, "must be a str, not int")),
    "cleanup_interval": ("daily", "must be a number of seconds"),
    "serializer": (3, "unknown serializer 3; known are json, msgpack, pickle"),
    "accept": (3, "must be the names of serializers, not 3"),
    "compression": (3, "unknown compression 3; known are bz2"),
    "json_default": ("str", "must be a function of one argument, as for json.dumps, not 'str'"),
    "types": (3, "must be a list of StoredType, not 3"),
    "address_remap": (
        3,
        "must be a mapping such as {'10.0.0.1:6379': 'redis.example:7000'}, a function of (host, port)",
    ),
    "master_name": (3, "must be a str or None, not int"),
    "sentinel_kwargs": ("password=secret", "must be a mapping or None, not str"),
    "min_other_sentinels": ("two", "must be a whole number from 0, not 'two'"),
    "store": ("memory", "must be a MemoryStore or None, not str"),
    "pool": ("postgresql://:secret@h", "must be an asyncpg.Pool or None, not str"),
    "connect_options": ("redis://:secret@h", "must be a mapping or None, not str"),
}


URLS = ("memory://", "redis://h", "redis+cluster://h", "sentinel://h?master_name=m", "postgresql://h")


@pytest.mark.parametrize("option", sorted(ConnectOptions.__annotations__))
def test_an_option_of_a_wrong_type_is_named_with_the_type_that_is_right(option: str) -> None:
    value, told = WRONG[option]
    options: dict[str, Any] = {option: value}
    takers = [url for url in URLS if option in option_names(by_url(url)[0])]
    assert takers
    for url in takers:
        with pytest.raises(ImproperlyConfigured, match=re.escape(told)) as caught:
            aioresult.connect(url, **options)
        assert option in str(caught.value)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["redis://h", "postgresql://h"])
def test_an_unknown_argument_for_the_driver_is_named_with_the_one_that_is_meant(url: str) -> None:
    name, meant = (
        ("clinet_name", "client_name") if url == "redis://h" else ("statement_cache_sze", "statement_cache_size")
    )
    with pytest.raises(ImproperlyConfigured, match=f"'{name}' .*connect_options; did you mean '{meant}'"):
        aioresult.connect(url, connect_options={name: 3})


@pytest.mark.parametrize("timeout", ["3", float("nan"), b"3", True])
async def test_a_timeout_that_is_no_number_is_told_what_it_must_be(timeout: Any) -> None:
    async with aioresult.connect("memory://") as backend:
        for call in (backend.result("a").get, backend.group(["a"]).get):
            with pytest.raises(UsageError, match="timeout must be a number of seconds, a timedelta or None, not "):
                await call(timeout=timeout)


SLIPS = {
    "SUCCESS": "Success success succes SUCESS SUCCSES SUCCESSS SUCXESS UCCESS SUCCESS_ ' SUCCESS'",
    "FAILURE": "Failure failure FALIURE FAILUR FAILURES FAILLURE",
    "REVOKED": "revoked REVOKE REVOEKD REVOKEDD",
    "STARTED": "started",
    "PENDING": "Pending",
    "IGNORED": "ignored",
}


@pytest.mark.parametrize(("state", "meant"), [(slip, meant) for meant in SLIPS for slip in shlex.split(SLIPS[meant])])
async def test_a_misspelt_state_is_refused_with_the_one_that_is_meant(state: str, meant: str) -> None:
    async with aioresult.connect("memory://") as backend:
        with pytest.raises(UsageError, match=f"unknown state '{state}'; did you mean '{meant}'"):
            await backend.store_result("a", 1, state)
        with pytest.raises(UsageError, match=f"did you mean '{meant}'"):
            await backend.on_chord_part_return("g", "a", state, 1)
        assert not await backend.exists("a")


@pytest.mark.parametrize(
    "state",
    [
        *(
            "PROGRESS",
            "UPLOADING",
            "STARTING",
            "START",
            "STARTUP",
            "RESTARTED",
            "SENDING",
            "PENDING_REVIEW",
            "RETRYING",
        ),
        *("RETRIED", "RECEIVE", "REJECT", "IGNORE", "SUCCESSFUL", "SUCCEEDED", "FAILED", "FAILING", "ERROR", "DONE"),
        *("ACCESS", "INVOKED", "REVOKING", "S", "F", "50%", "PARTIAL_SUCCESS", "success:1/2", "ACCÈS"),
    ],
)
async def test_a_state_of_ones_own_is_taken(state: str) -> None:
    async with aioresult.connect("memory://") as backend:
        assert await backend.store_result("a", 1, state)
        assert await backend.result("a").state() == state


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda backend: backend.result(7), "an id must be a str or a UUID, not int"),
        (lambda backend: backend.group([7]), "an id must be a str or a UUID, not int"),
        (lambda backend: backend.group("saved"), "pass several results or ids, not 'saved'"),
    ],
)
def test_a_handle_on_nothing_sensible_is_refused_when_it_is_made(make: Callable[[Backend], object], told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        make(aioresult.connect("memory://"))


async def test_ids_may_be_uuids() -> None:
    ids: list[Any] = [uuid4(), uuid4()]
    async with aioresult.connect("memory://") as backend:
        for task_id in ids:
            await backend.mark_as_done(task_id, str(task_id))
        group = backend.group([backend.result(ids[0]), ids[1]])
        assert await group.get(timeout=10) == [str(task_id) for task_id in ids]


@pytest.mark.parametrize("wrong", ["declined", ValueError])
async def test_a_failure_needs_an_exception(wrong: Any) -> None:
    async with aioresult.connect("memory://") as backend:
        for mark in (backend.mark_as_failure, backend.mark_as_retry):
            with pytest.raises(UsageError, match="a task fails with an exception, not with"):
                await mark("task", wrong)
        assert not await backend.exists("task")
