"""Backends by name and by URL."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.app.backends import BACKEND_ALIASES as CELERY_ALIASES

import aioresult
from aioresult import Backend, ImproperlyConfigured, by_name, by_url
from aioresult.backends.memory import MemoryBackend
from aioresult.backends.redis import RedisBackend
from aioresult.registry import BACKEND_ALIASES

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
    ],
)
def test_every_form_of_url_that_celery_knows(url: str, found: type[Backend], passed: str) -> None:
    assert by_url(url) == (found, passed)


@pytest.mark.parametrize("name", sorted(CELERY_ALIASES.keys() - BACKEND_ALIASES.keys()))
def test_of_a_backend_that_celery_alone_has_the_error_says_so(name: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=f"'{name}'.*Celery has a backend of that name; aioresult has none"):
        by_name(name)


@pytest.mark.parametrize("name", ["nope", "", " ", "+", "redis,memory", "..redis", ".redis.Backend", "a..B", "redis:"])
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
        ("aioresult.backends.memory.MemoryStore", "is not a Backend class"),
        ("aioresult:states", "is not a Backend class"),
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


@pytest.mark.parametrize("url", ["memory://", "redis://", f"{MEMORY_PATH}:MemoryBackend"])
def test_an_unknown_option_is_named_with_the_class_that_refuses_it(url: str) -> None:
    with pytest.raises(
        ImproperlyConfigured, match=rf"'expire', did you mean 'expires'\?; see help\({by_url(url)[0].__name__}\)"
    ):
        aioresult.connect(url, expire=5)


# -- backends of other distributions --------------------------------------------------------------------------------

THIRD_PARTY = """
from aioresult.backends.memory import MemoryBackend

class ParchmentBackend(MemoryBackend):
    pass

class HijackedBackend(MemoryBackend):
    pass

class PickyBackend(MemoryBackend):
    def __init__(self, url, **options):
        raise TypeError("a bug of its own")
"""

ENTRY_POINTS = """
[aioresult.backends]
parchment = aioresult_parchment:ParchmentBackend
picky = aioresult_parchment:PickyBackend
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
    with pytest.raises(ImproperlyConfigured, match=r"known here are .*\bparchment, picky\b.*"):
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
