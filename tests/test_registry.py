"""Backends by name and by URL."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ForwardRef

import pytest
from celery.app.backends import BACKEND_ALIASES as CELERY_ALIASES

import aioresult
from aioresult import Backend, ConnectOptions, ImproperlyConfigured, by_name, by_url
from aioresult.backends.memory import MemoryBackend
from aioresult.backends.postgres import PostgresBackend
from aioresult.backends.redis import ClusterBackend, RedisBackend, SentinelBackend
from aioresult.options import option_names
from aioresult.registry import _SCHEMES, BACKEND_ALIASES

MEMORY_PATH = "aioresult.backends.memory"


@pytest.mark.parametrize("name", sorted(BACKEND_ALIASES))
def test_every_alias_leads_to_a_backend(name: str) -> None:
    found = by_name(name)
    module, _, class_name = BACKEND_ALIASES[name].partition(":")
    assert found is getattr(importlib.import_module(module), class_name)
    assert not found.__abstractmethods__


@pytest.mark.parametrize(
    ("url", "found", "passed"),
    [
        ("memory", MemoryBackend, "memory://"),
        ("memory://", MemoryBackend, "memory://"),
        ("cache+memory://", MemoryBackend, "memory://"),
        ("redis", RedisBackend, "redis://"),
        ("redis://bob:pw@host:6379/1?protocol=2", RedisBackend, "redis://bob:pw@host:6379/1?protocol=2"),
        ("rediss://host/1", RedisBackend, "rediss://host/1"),
        ("unix:///run/redis.sock", RedisBackend, "unix:///run/redis.sock"),
        ("socket:///run/redis.sock", RedisBackend, "socket:///run/redis.sock"),
        (
            "redis+socket:///run/redis.sock?virtual_host=1",
            RedisBackend,
            "redis+socket:///run/redis.sock?virtual_host=1",
        ),
        (f"{MEMORY_PATH}.MemoryBackend", MemoryBackend, ""),
        (f"{MEMORY_PATH}:MemoryBackend", MemoryBackend, ""),
        (f"{MEMORY_PATH}.MemoryBackend+own://a+b://c", MemoryBackend, "own://a+b://c"),
        (f"{MEMORY_PATH}:MemoryBackend+own://host:1/x", MemoryBackend, "own://host:1/x"),
        (f"{MEMORY_PATH}:MemoryBackend+redis+cluster://a,b", MemoryBackend, "redis+cluster://a,b"),
        (f"{MEMORY_PATH}.MemoryBackend+sentinel://a;sentinel://b", MemoryBackend, "sentinel://a;sentinel://b"),
        ("redis+cluster", ClusterBackend, "redis+cluster://"),
        *(
            (f"{scheme}+cluster://bob:pw@a:1,[::1]/0", ClusterBackend, f"{scheme}+cluster://bob:pw@a:1,[::1]/0")
            for scheme in ("redis", "rediss", "valkey", "valkeys")
        ),
        *(
            (f"{scheme}+sentinel://a,b/m/0", SentinelBackend, f"{scheme}+sentinel://a,b/m/0")
            for scheme in ("redis", "rediss", "valkey", "valkeys")
        ),
        ("sentinel://a/3;sentinel://b:1/3", SentinelBackend, "sentinel://a/3;sentinel://b:1/3"),
        ("sentinel+ssl://a", SentinelBackend, "sentinel+ssl://a"),  # which refuses it
    ],
)
def test_every_form_of_url_that_celery_knows(url: str, found: type[Backend], passed: str) -> None:
    assert by_url(url) == (found, passed)


@pytest.mark.parametrize("name", sorted(CELERY_ALIASES.keys() - BACKEND_ALIASES.keys()))
def test_of_a_backend_that_celery_alone_has_the_error_says_so(name: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=f"'{name}'.*Celery has a backend of that name; aioresult has none"):
        by_name(name)


@pytest.mark.parametrize("name", ["nope", "", " ", "+", "..B", ".x.Backend", "a..B", "nope:"])
def test_an_unknown_name_is_told_what_there_is_and_how_to_add_more(name: str) -> None:
    known = ", ".join(sorted(BACKEND_ALIASES))
    with pytest.raises(ImproperlyConfigured) as caught:
        by_name(name)
    for part in (repr(name), f"known here are {known};", "'aioresult.backends'", "'package.module:Class'"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package.Backend", "cannot be imported: No module named 'no_such_package'"),
        ("aioresult.no_such_module:Backend", "cannot be imported: No module named 'aioresult.no_such_module'"),
        ("aioresult.backends.memory:NoSuchClass", "cannot be imported: .* has no attribute 'NoSuchClass'"),
        ("aioresult.backends.memory.MemoryStore", "is not a subclass of Backend"),
        ("aioresult:states", "is not a subclass of Backend"),
    ],
)
def test_a_path_that_leads_nowhere(path: str, message: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=message):
        by_name(path)


@pytest.mark.parametrize("url", ["nope://bob:PW@host", "redis:/bob:PW@host", "nope:/bob:PW@host", "://bob:PW@host"])
def test_an_error_about_a_url_does_not_show_the_password(url: str) -> None:
    for look in (by_url, by_name):
        with pytest.raises(ImproperlyConfigured) as caught:
            look(url)
        assert "PW" not in str(caught.value)


# -- options --------------------------------------------------------------------------------------------------------

BUILT_IN: list[type[Backend]] = [MemoryBackend, RedisBackend, ClusterBackend, SentinelBackend, PostgresBackend]


def test_connect_takes_the_options_of_every_backend_with_their_types() -> None:
    taken: dict[str, str] = {}
    for cls in BUILT_IN:
        for each in cls.__mro__:
            if "__init__" in vars(each) and each is not object:
                for one in inspect.signature(vars(each)["__init__"]).parameters.values():
                    if one.kind is one.KEYWORD_ONLY:
                        assert taken.setdefault(one.name, one.annotation) == one.annotation, one.name
    hints: dict[str, ForwardRef] = ConnectOptions.__annotations__
    assert {name: hint.__forward_arg__ for name, hint in hints.items()} == taken


def test_of_every_option_it_is_known_whose_it_is() -> None:
    for kind, schemes in _SCHEMES.items():
        owners = {cls for cls in BUILT_IN if kind.__annotations__.keys() <= option_names(cls)}
        assert owners == {by_url(scheme)[0] for scheme in re.split(", | and ", schemes)}
        for cls in owners ^ set(BUILT_IN):
            assert option_names(cls).isdisjoint(kind.__annotations__)


@pytest.mark.parametrize("url", ["memory://", "redis://", "postgresql://h", f"{MEMORY_PATH}:MemoryBackend"])
def test_unknown_options_are_all_named_with_what_the_class_takes(url: str) -> None:
    cls = by_url(url)[0]
    told = f"unknown option 'expire'; did you mean 'expires'? Unknown option 'shards'. {cls.__name__} takes: accept, "
    options: dict[str, Any] = {"expire": 5, "shards": 2}
    for make in (aioresult.connect, cls):
        with pytest.raises(ImproperlyConfigured) as caught:
            make(url, **options)
        assert str(caught.value).startswith(told)
        assert set(str(caught.value).partition("takes: ")[2].split(", ")) == option_names(cls)


class _Open(MemoryBackend):
    """Takes an option that its signature does not name."""

    def __init__(self, url: str = "", **options: Any) -> None:
        if options.pop("hosts", None) == "another":
            _no_options(hots=1)  # type: ignore[call-arg]
        super().__init__(url, **options)


def _no_options() -> None: ...


def test_options_that_a_signature_does_not_name_are_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_backend", SimpleNamespace(Open=_Open))
    connect: Any = aioresult.connect
    connect("open_backend:Open+x://", hosts=1)
    with pytest.raises(ImproperlyConfigured, match=r"^unknown option 'shards'\. _Open takes"):
        connect("open_backend:Open+x://", hosts=1, shards=2)
    with pytest.raises(TypeError, match="hots"):
        connect("open_backend:Open+x://", hosts="another")


def test_a_class_refuses_an_unknown_option_with_a_type_error_like_any_other() -> None:
    with pytest.raises(TypeError, match="unknown option 'expire'"):
        MemoryBackend(expire=5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("url", "option", "told"),
    [
        ("redis://h", "master_name", "the option 'master_name' belongs to sentinel://, not to redis://. RedisBackend"),
        (
            "Redis+Cluster://h",
            "sentinel_kwargs",
            "belongs to sentinel://, not to redis+cluster://. ClusterBackend takes",
        ),
        ("sentinel://h?master_name=m", "topology_refresh", "belongs to redis+cluster://, not to sentinel://."),
        ("memory://", "address_remap", "belongs to redis+cluster:// and sentinel://, not to memory://."),
        ("redis://h", "table", "the option 'table' belongs to postgresql://, not to redis://. RedisBackend takes: "),
        ("VALKEY+socket:///run/s", "store", "the option 'store' belongs to memory://, not to valkey://."),
        ("postgresql://h", "global_keyprefix", "redis+cluster://, sentinel:// and memory://, not to postgresql://."),
        ("memory", "connect_options", "sentinel:// and postgresql://, not to memory://."),
        (f"{MEMORY_PATH}:MemoryBackend", "chord_ordered", "and sentinel://, not to MemoryBackend."),
    ],
)
def test_an_option_of_another_backend_is_named_as_such(url: str, option: str, told: str) -> None:
    options: dict[str, Any] = {option: None}
    with pytest.raises(ImproperlyConfigured, match=re.escape(told)):
        aioresult.connect(url, **options)


# -- schemes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "found", "passed"),
    [
        ("REDIS://Host/1", RedisBackend, "redis://Host/1"),
        ("Cache+Memory://", MemoryBackend, "memory://"),
        ("DB+PostgreSQL+psycopg://h/DB", PostgresBackend, "postgresql+psycopg://h/DB"),
        ("Redis+Socket:///run/S", RedisBackend, "redis+socket:///run/S"),
        ("Redis+CLUSTER://H", ClusterBackend, "redis+cluster://H"),
        ("SENTINEL://A;SENTINEL://B", SentinelBackend, "sentinel://A;SENTINEL://B"),
        (f"{MEMORY_PATH}:MemoryBackend+OWN://h", MemoryBackend, "OWN://h"),
    ],
)
def test_the_case_of_a_scheme_does_not_matter(url: str, found: type[Backend], passed: str) -> None:
    assert by_url(url) == (found, passed)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("redis://:PW@h:7/2", "valkey://h:7/2"),
        ("redis://h", "VALKEY://h:6379/0?client_name=a"),
        ("rediss://h/1", "valkeys://h/1"),
        ("redis+socket:///run/s?virtual_host=1", "valkey+socket:///run/s?db=1"),
    ],
)
def test_valkey_is_the_same_place_as_redis(one: str, other: str) -> None:
    assert aioresult.connect(one).store_id == aioresult.connect(other).store_id


def test_another_database_is_another_place_whatever_is_hidden_of_the_url() -> None:
    first, second = (aioresult.connect(f"redis://h/{number}?client_name=me@home") for number in (1, 2))
    assert first.store_id != second.store_id


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("redis-cluster://h", "redis+cluster"),
        ("redissentinel://h", "redis+sentinel"),
        ("sentinal://h", "sentinel"),
        ("redsi://h", "redis"),
        ("reddis://h", "redis"),
        ("posgresql+psycopg://h", "postgresql"),
        ("valky://h", "valkey"),
    ],
)
def test_a_misspelt_scheme_is_told_which_is_meant(url: str, meant: str) -> None:
    with pytest.raises(
        ImproperlyConfigured, match=f"did you mean '{re.escape(meant)}'.? Known here are memory, "
    ) as caught:
        by_url(url)
    assert "entry point" not in str(caught.value)


@pytest.mark.parametrize("url", ["cluster://h", "redis+cluster+tls://h", "socket+cluster://h", "CLUSTER://h"])
def test_an_odd_scheme_for_a_cluster_is_told_the_right_one(url: str) -> None:
    with pytest.raises(
        ImproperlyConfigured, match=r": write redis\+cluster://host1:6379,host2:6379, or rediss\+cluster"
    ):
        by_url(url)


@pytest.mark.parametrize("url", ["redis+sentinel+ssl://h", "unix+sentinel:///run/s", "cached+sentinel://h"])
def test_an_odd_scheme_for_sentinels_is_told_the_right_one(url: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=r": write redis\+sentinel://host1:26379,host2:26379/name-of-the-m"):
        by_name(url.partition("://")[0]) if url.startswith("cached") else by_url(url)


# -- backends of other distributions --------------------------------------------------------------------------------

THIRD_PARTY = """
from aioresult.backends.memory import MemoryBackend

class ParchmentBackend(MemoryBackend):
    pass

class HijackedBackend(MemoryBackend):
    pass

class ClosedBackend(MemoryBackend):
    def __init__(self, url, *, table=""):
        super().__init__(url)
        self.table = table

class PickyBackend(MemoryBackend):
    def __init__(self, url, **options):
        raise TypeError("a bug of its own")
"""

ENTRY_POINTS = """
[aioresult.backends]
parchment = aioresult_parchment:ParchmentBackend
picky = aioresult_parchment:PickyBackend
closed = aioresult_parchment:ClosedBackend
redis = aioresult_parchment:HijackedBackend
lost = aioresult_parchment:LostBackend
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed distribution that announces backends."""
    info = tmp_path / "aioresult_parchment-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aioresult-parchment\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "aioresult_parchment.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("aioresult_parchment", None)


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize(
    ("url", "passed"),
    [
        ("parchment", ""),
        ("parchment://attic/3", "parchment://attic/3"),
        ("parchment+scroll://attic", "parchment+scroll://attic"),
    ],
)
def test_another_distribution_adds_one_by_an_entry_point(url: str, passed: str) -> None:
    found, given = by_url(url)
    assert (found.__module__, found.__qualname__, given) == ("aioresult_parchment", "ParchmentBackend", passed)
    assert type(aioresult.connect(url)) is found


@pytest.mark.usefixtures("third_party")
def test_its_module_is_imported_only_when_it_is_named() -> None:
    by_url("memory://")
    with pytest.raises(ImproperlyConfigured):
        by_name("nope")
    assert "aioresult_parchment" not in sys.modules


@pytest.mark.usefixtures("third_party")
def test_it_is_among_those_that_an_unknown_name_is_told_of() -> None:
    with pytest.raises(ImproperlyConfigured, match=r"known here are .*\bparchment, picky, postgres\b.*"):
        by_name("nope")


@pytest.mark.usefixtures("third_party")
def test_it_cannot_take_the_place_of_one_of_ours() -> None:
    assert by_name("redis") is RedisBackend


@pytest.mark.usefixtures("third_party")
def test_a_broken_one_says_what_is_broken() -> None:
    with pytest.raises(ImproperlyConfigured, match=r"'lost' cannot be imported: .* has no attribute 'LostBackend'"):
        by_name("lost")
    with pytest.raises(TypeError, match="a bug of its own"):
        aioresult.connect("picky://")


@pytest.mark.usefixtures("third_party")
def test_it_may_take_options_of_its_own() -> None:
    assert vars(aioresult.connect("closed://", table="ours"))["table"] == "ours"
    with pytest.raises(ImproperlyConfigured) as caught:
        aioresult.connect("closed://", expires=5, schema="s")
    told = "unknown option 'expires'. The option 'schema' belongs to postgresql://, not to closed://. "
    assert str(caught.value) == f"{told}ClosedBackend takes: table"
