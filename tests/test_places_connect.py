"""`connect` and `backend_from_app` with the URLs of a cluster and of sentinels. No server is reached."""

from __future__ import annotations

from typing import Any

import pytest

import aioresult
from aioresult import ImproperlyConfigured
from aioresult.backends.redis import ClusterBackend, SentinelBackend
from aioresult.celery import backend_from_app

from .celery_app import make_app


@pytest.mark.parametrize(
    ("url", "options", "kind", "shown"),
    [
        ("redis+cluster://bob:PW@h1,h2:7", {}, ClusterBackend, "redis+cluster://bob:**@h1,h2:7"),
        ("valkeys+cluster://:PW@[::1]/0", {"topology_refresh": 0}, ClusterBackend, "valkeys+cluster://:**@[::1]/0"),
        ("rediss+cluster://h", {"address_remap": {"10.0.0.1:1": "h:2"}}, ClusterBackend, "rediss+cluster://h"),
        (
            "sentinel://:PW@h1:1/3;sentinel://:PW@h2:1/3",
            {"master_name": "m", "sentinel_kwargs": {"password": "PW2"}, "min_other_sentinels": 1},
            SentinelBackend,
            "sentinel://:**@h1:1/3;sentinel://:**@h2:1/3",
        ),
        (
            "redis+sentinel://h1,h2/m/0?sentinel_password=PW",
            {"address_remap": lambda address: address},
            SentinelBackend,
            "redis+sentinel://h1,h2/m/0?sentinel_password=**",
        ),
    ],
)
def test_a_backend_is_made_without_a_server_and_shows_its_hosts(
    url: str, options: dict[str, Any], kind: type[aioresult.Backend], shown: str
) -> None:
    backend = aioresult.connect(url, connect_options={"client_name": "web"}, global_keyprefix="shop", **options)
    assert type(backend) is kind
    assert backend.as_uri() == shown
    assert "PW" not in f"{backend!r} {backend.store_id}"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("redis+cluster://u:PW@h1,h2", "valkey+cluster://H2:6379,h1/0", True),
        ("redis+cluster://h1", "redis+cluster://h2", False),
        ("redis+cluster://h1", "redis://h1", False),
        ("redis+sentinel://h1,h2/m/1", "sentinel://h2/1;sentinel://h1?master_name=m", True),
        ("redis+sentinel://h/m/1", "redis+sentinel://h/m/2", False),
        ("redis+sentinel://h/m", "redis+sentinel://h/n", False),
    ],
)
def test_places_are_told_apart(one: str, other: str, same: bool) -> None:
    assert (aioresult.connect(one).store_id == aioresult.connect(other).store_id) is same


def test_the_database_in_connect_options_is_another_place() -> None:
    one, other = (aioresult.connect("redis+sentinel://h/m/1", connect_options=given) for given in ({}, {"db": 2}))
    assert one.store_id != other.store_id


def test_the_name_of_the_master_is_asked_for_when_the_backend_is_made() -> None:
    with pytest.raises(ImproperlyConfigured, match="pass master_name='mymaster'"):
        aioresult.connect("sentinel://h1;sentinel://h2")
    with pytest.raises(ImproperlyConfigured, match=r"result_backend_transport_options={'master_name': 'mymaster'}"):
        backend_from_app(make_app(None, "sentinel://h1:1;sentinel://h2:1"))


def test_the_app_of_celery_names_its_sentinels() -> None:
    transport = {"master_name": "m", "sentinel_kwargs": {"password": "PW2"}, "min_other_sentinels": 1}
    app = make_app(None, "sentinel://:PW@h1:1/3;sentinel://h2:1/3", result_backend_transport_options=transport)
    backend = backend_from_app(app, address_remap={"10.0.0.1:1": "h:2"})
    same = aioresult.connect("redis+sentinel://h1:1,h2:1/m/3")
    assert type(backend) is SentinelBackend
    assert (backend.as_uri(), backend.store_id) == ("sentinel://:**@h1:1/3;sentinel://h2:1/3", same.store_id)
    assert backend_from_app(app, master_name="n").store_id != same.store_id
