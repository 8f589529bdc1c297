"""What the URLs of a Redis Cluster and of Sentinel mean, and which of them are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio.connection import Connection, SSLConnection

from aioresult import ImproperlyConfigured
from aioresult.backends.redis.places import (
    checked_remap,
    checked_sentinels,
    cluster_place,
    place_url,
    sentinel_place,
    with_celerys_defaults,
)
from aioresult.urls import hide_password

PROVIDER = "redis.credentials.UsernamePasswordCredentialProvider"

# -- a cluster ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "start", "options"),
    [
        ("redis+cluster://", [("localhost", 6379)], {}),
        ("redis+cluster://h", [("h", 6379)], {}),
        ("redis+cluster://H1:7,h2/", [("h1", 7), ("h2", 6379)], {}),
        ("REDIS+cluster://h1, h2:,h1/0", [("h1", 6379), ("h2", 6379)], {}),
        ("redis+cluster://s1,[::1]:26379,[fe80::1%25eth0]", [("s1", 6379), ("::1", 26379), ("fe80::1%eth0", 6379)], {}),
        ("valkey+cluster://:p%40w@h1,h2?protocol=2", [("h1", 6379), ("h2", 6379)], {"password": "p@w", "protocol": 2}),
        ("redis+cluster://bob:p,w@h?client_name=a@b", [("h", 6379)], {"password": "p,w", "client_name": "a@b"}),
    ],
)
def test_the_start_nodes_keep_the_order_of_the_url(url: str, start: list[Any], options: dict[str, Any]) -> None:
    place = cluster_place(url, {})
    assert (place.start, place.connection_class) == (tuple(start), Connection)
    assert options.items() <= place.options.items()
    assert place.options.keys().isdisjoint({"host", "port", "db"})
    Connection(host="h", port=1, **place.options)


@pytest.mark.parametrize("scheme", ["rediss+cluster", "valkeys+cluster"])
def test_tls_to_a_cluster_verifies_each_node(scheme: str) -> None:
    place = cluster_place(f"{scheme}://h1,h2?ssl_ca_certs=/ca", {"password": "pw"})
    assert place.connection_class is SSLConnection
    assert place.options == {"ssl_ca_certs": "/ca", "ssl_check_hostname": True, "password": "pw"}


def test_the_order_of_the_hosts_and_the_credentials_do_not_tell_places_apart() -> None:
    one, other = cluster_place("redis+cluster://u:p@h1,h2", {}), cluster_place("valkey+cluster://H2:6379,h1/0", {})
    assert one.url == other.url == "redis+cluster://h1:6379,h2:6379"
    first = sentinel_place("sentinel://u:p@h1/2;sentinel://h2", {}, "m", None)
    second = sentinel_place("redis+sentinel://[::1],h2,h1/m/2", {}, None, None)
    assert first.url == "redis+sentinel://h1:26379,h2:26379/m/2"
    assert second.url == "redis+sentinel://[::1]:26379,h1:26379,h2:26379/m/2"


# -- sentinels ------------------------------------------------------------------------------------------------------

BOB = {"username": "bob", "password": "p@w"}


@pytest.mark.parametrize(
    ("url", "sentinels", "name", "options", "sentinel_options"),
    [
        ("sentinel://?master_name=m", [("localhost", 26379)], "m", {}, {}),
        (
            "sentinel://bob:p%40w@h1:1/3;SENTINEL://ann:other@h2/4?master_name=m;sentinel://[::1]:2",
            [("h1", 1), ("h2", 26379), ("::1", 2)],
            "m",
            {**BOB, "db": 3},
            {},
        ),
        (
            "sentinel://h1?protocol=2&client_name=a;sentinel://h2?client_name=b&master_name=m",
            [("h1", 26379), ("h2", 26379)],
            "m",
            {"protocol": 2, "client_name": "a"},
            {},
        ),
        # In Celery's spelling, sentinel_kwargs alone says how to reach the sentinels.
        ("sentinel://h?master_name=m&socket_timeout=3", [("h", 26379)], "m", {"socket_timeout": 3.0}, {}),
        ("redis+sentinel://h/m", [("h", 26379)], "m", {}, {}),
        ("redis+sentinel://h1,[::1]:5/my%2Fm/", [("h1", 26379), ("::1", 5)], "my/m", {}, {}),
        ("valkey+sentinel://bob:p%40w@h/0/2", [("h", 26379)], "0", {**BOB, "db": 2}, {}),
        ("redis+sentinel://h/2?master_name=m", [("h", 26379)], "m", {"db": 2}, {}),
        (
            "redis+sentinel://bob:p%40w@h/m?sentinel_username=ann&sentinel_password=o%40&protocol=2&client_name=web",
            [("h", 26379)],
            "m",
            {**BOB, "protocol": 2, "client_name": "web"},
            {"username": "ann", "password": "o@", "protocol": 2},
        ),
        (
            "redis+sentinel://h/m?socket_connect_timeout=3",
            [("h", 26379)],
            "m",
            {"socket_connect_timeout": 3.0},
            {"socket_connect_timeout": 3.0},
        ),
    ],
)
def test_the_url_of_sentinels_says_where_they_are_and_how_to_reach_the_master(
    url: str, sentinels: list[Any], name: str, options: dict[str, Any], sentinel_options: dict[str, Any]
) -> None:
    place = sentinel_place(url, {}, None, None)
    assert (place.sentinels, place.master_name) == (tuple(sentinels), name)
    assert (place.connection_class, place.options) == (Connection, options)
    assert (place.sentinel_class, place.sentinel_options) == (Connection, sentinel_options)


def test_options_take_precedence_over_the_url() -> None:
    kwargs = {"password": "own", "max_connections": 3, "db": 0, "username": None}
    place = sentinel_place(
        "redis+sentinel://:pw@h/m/1?sentinel_password=x&socket_timeout=3", {"password": "given", "db": 2}, "n", kwargs
    )
    assert (place.master_name, place.options) == ("n", {"password": "given", "db": 2, "socket_timeout": 3.0})
    assert place.sentinel_options == {"password": "own", "socket_timeout": 3.0}
    provided = sentinel_place(f"redis+sentinel://bob:pw@h/m?credential_provider={PROVIDER}", {}, None, None)
    assert provided.options.keys() == {"credential_provider"}
    assert provided.sentinel_options == {}


TLS = {"ssl_ca_certs": "/ca", "ssl_check_hostname": True}


@pytest.mark.parametrize(
    ("url", "kwargs", "options", "sentinel_options"),
    [
        ("rediss+sentinel://h/m?ssl_ca_certs=/ca", None, TLS, TLS),
        ("valkeys+sentinel://h/m?ssl_ca_certs=/ca", {"ssl_ca_certs": "/own"}, TLS, {**TLS, "ssl_ca_certs": "/own"}),
        ("rediss+sentinel://h/m?ssl_ca_certs=/ca&sentinel_ssl=no", None, TLS, None),
        ("rediss+sentinel://h/m?ssl_ca_certs=/ca", {"ssl": False, "ssl_ca_certs": "/own"}, TLS, None),
        ("sentinel://h?master_name=m", {"ssl": True, "ssl_ca_certs": "/ca"}, None, TLS),
        ("sentinel://h?master_name=m", {"ssl_ca_certs": "/ca"}, None, None),
        ("redis+sentinel://h/m?sentinel_ssl=yes", {"ssl_ca_certs": "/ca"}, None, TLS),
    ],
)
def test_tls_to_the_master_and_to_the_sentinels(
    url: str, kwargs: Mapping[str, Any] | None, options: dict[str, Any] | None, sentinel_options: dict[str, Any] | None
) -> None:
    place = sentinel_place(url, {}, None, kwargs)
    classes = {True: SSLConnection, False: Connection}
    assert (place.connection_class, place.options) == (classes[bool(options)], options or {})
    assert (place.sentinel_class, place.sentinel_options) == (classes[bool(sentinel_options)], sentinel_options or {})


# -- what is refused ------------------------------------------------------------------------------------------------

ENCODE = "percent-encode the name and the password"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis+cluster://h/1", "a cluster has one database, number 0; leave the number out"),
        ("redis+cluster://h?db=1", "a cluster has one database"),
        ("redis+cluster://h/shop", "the database must be a number"),
        ("redis+cluster://h1,,h2", "one of its hosts is empty"),
        ("redis+cluster://h1,", "one of its hosts is empty"),
        ("redis+cluster://h1,::1", "an IPv6 address stands in brackets"),
        ("redis+cluster://h1:6379,h2:x", "the port must be a number from 0 to 65535"),
        ("redis+cluster://h1;h2", "commas separate its hosts: redis+cluster://host1,host2"),
        ("redis+cluster://h1:1/0;redis+cluster://h2:1/0", "commas separate its hosts: redis+cluster://host1,host2"),
        ("redis+cluster://u:secret@h1,u:secret@h2", "write the user name and the password once, before the first host"),
        ("redis+cluster://u:sec/ret@h1,h2", ENCODE),
        ("redis+cluster:///secret@h1,h2", ENCODE),
        ("redis+cluster://h?host=h2", "its query cannot have 'host': the URL names the nodes; remove it"),
        ("redis+cluster://h?socket_timeot=3", "unknown parameter 'socket_timeot' in the URL; did you mean"),
        ("redis+cluster://h?expires=3", "'expires' does not belong in the URL: it is an option"),
        ("redis+cluster://h?topology_refresh=3", "'topology_refresh' does not belong in the URL: it is an option"),
        ("redis+cluster://:99?secret=1@h:6379/0", ENCODE),
    ],
)
def test_the_url_of_a_cluster_that_is_refused(url: str, told: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=re.escape(told)) as caught:
        cluster_place(url, {})
    assert not re.search("sec|ret|99", str(caught.value))


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (
            "sentinel://h1;sentinel://h2",
            "pass master_name='mymaster', or write it in the URL: sentinel://host:26379/0?",
        ),
        ("redis+sentinel://h", "write it in the URL: redis+sentinel://host1,host2/mymaster/0."),
        ("redis+sentinel://h/0", "it lacks the name of the master"),
        ("redis+sentinel://h/m/x", "its path is the name of the master, and the number of the database"),
        ("redis+sentinel://h/m/0/x", "its path is the name of the master, and the number of the database"),
        ("sentinel://h/m", "its path is the number of the database, as in sentinel://host:26379/0"),
        ("sentinel+ssl://h/0", "write rediss+sentinel://host1,host2/name/0 for TLS to the sentinels and the master"),
        ("sentinel://h1;sentinel+ssl://h2", "write rediss+sentinel://host1,host2/name/0"),
        ("sentinel://h1;h2", "each of its parts is a URL: sentinel://host1:26379/0;sentinel://host2:26379/0"),
        ("sentinel://h1:1;h2:1", "each of its parts is a URL"),
        ("sentinel://h1/0;h2/0", "each of its parts is a URL"),
        ("sentinel://h1;", "each of its parts is a URL"),
        ("sentinel://h1;sentinel://", "one of its hosts is empty"),
        ("sentinel://h1;sentinel://h2:secret", "the port must be a number"),
        ("sentinel://bob:sec;ret@h1;sentinel://h2", "each of its parts is a URL"),
        ("sentinel://bob:sec/ret@h1;sentinel://h2", ENCODE),
        ("sentinel://h1;sentinel://bob:sec?ret@h2", ENCODE),
        ("redis+sentinel://h1;redis+sentinel://h2/m", "commas separate its hosts: redis+sentinel://host1,host2"),
        ("redis+sentinel:///secret@h/m", ENCODE),
        ("redis+sentinel://h/m?port=3", "its query cannot have 'port': the URL names the sentinels"),
        ("redis+sentinel://h/m?sentinel_kwargs=3", "'sentinel_kwargs' does not belong in the URL: it is an option"),
    ],
)
def test_the_url_of_sentinels_that_is_refused(url: str, told: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=re.escape(told)) as caught:
        sentinel_place(url, {}, None, None)
    assert not re.search("sec|ret", str(caught.value))


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ("password=secret", "sentinel_kwargs must be a mapping or None, not str"),
        ({"pasword": "secret"}, "wrong sentinel_kwargs: unknown parameter 'pasword'; did you mean 'password'?"),
        ({"host": "h"}, "sentinel_kwargs cannot have 'host': the URL names the sentinels; remove it"),
        ({"db": 3}, "wrong sentinel_kwargs: a sentinel has no databases; remove 'db'"),
        ({"ssl": True, "ssl_cert_reqs": "often"}, "wrong sentinel_kwargs: Invalid SSL Certificate Requirements"),
        ({"credential_provider": PROVIDER, "password": "secret"}, "a credential provider replaces the user name"),
    ],
)
def test_wrong_arguments_for_the_sentinels_are_named(kwargs: Any, told: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=f"(?i){re.escape(told)}") as caught:
        sentinel_place("sentinel://h", {}, "m", kwargs)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"host": "h"}, "connect_options cannot have 'host': the URL names the "),
        ({"pasword": "secret"}, "unknown parameter 'pasword' in connect_options; did you mean 'password'?"),
        ({"credential_provider": "no.such.Provider"}, "cannot be imported"),
    ],
)
def test_wrong_connect_options_are_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=re.escape(told)) as caught:
        sentinel_place("sentinel://h", options, "m", None)
    assert "secret" not in str(caught.value)
    with pytest.raises(ImproperlyConfigured, match=re.escape(told)):
        cluster_place("redis+cluster://h", options)


# -- addresses ------------------------------------------------------------------------------------------------------


def test_an_address_is_shown_with_brackets_where_it_needs_them() -> None:
    assert place_url("redis", ("10.0.0.1", 7000)) == "redis://10.0.0.1:7000"
    assert place_url("rediss", ("::1", 7000)) == "rediss://[::1]:7000"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, ("10.0.0.1", 1)),
        ({"10.0.0.1:1": "h:2"}, ("h", 2)),
        ({("10.0.0.1", 1): ("h", 2)}, ("h", 2)),
        ({"10.0.0.1:1": "[::1]:2"}, ("::1", 2)),
        ({"10.0.0.1:2": "h:2", "[::1]:1": "h:3"}, ("10.0.0.1", 1)),
        ({}, ("10.0.0.1", 1)),
        (lambda address: (f"h-{address[0]}", address[1] + 1), ("h-10.0.0.1", 2)),
    ],
)
def test_addresses_are_replaced(given: Any, found: tuple[str, int]) -> None:
    assert checked_remap(given)(("10.0.0.1", 1)) == found


def test_a_table_knows_names_whatever_their_case_and_brackets() -> None:
    remap = checked_remap({"Redis.Example:1": "h:2", "[::1]:1": "h:3"})
    assert remap(("redis.example", 1)) == remap(("REDIS.example", 1)) == ("h", 2)
    assert remap(("::1", 1)) == ("h", 3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("h:1", "address_remap must be a mapping such as {'10.0.0.1:6379': 'redis.example:7000'}, a function"),
        (3, "or None, not int"),
        ({"h": "g:1"}, "an address in address_remap must be 'host:port' or (host, port), not 'h'"),
        ({"h:1": "g"}, "must be 'host:port' or (host, port), not 'g'"),
        ({"h:1": ("g", "1")}, "must be 'host:port' or (host, port), not ('g', '1')"),
        ({"h:99999": "g:1"}, "must be 'host:port' or (host, port), not "),
        ({"::1:7": "g:1"}, "must be 'host:port' or (host, port), not '::1:7'"),
    ],
)
def test_what_is_no_table_of_addresses_is_refused(given: Any, told: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=re.escape(told)):
        checked_remap(given)


@pytest.mark.parametrize("returned", [None, "h:1", ("h",), ("h", "1"), ("", 1), ("h", 0), ("h", True), (b"h", 1)])
def test_what_a_function_returns_is_checked(returned: Any) -> None:
    remap = checked_remap(lambda address: returned)
    told = f"address_remap must return (host, port), a str and an int, but returned {returned!r} for ('h', 1)"
    with pytest.raises(ImproperlyConfigured, match=re.escape(told)):
        remap(("h", 1))


def test_what_a_function_raises_is_named() -> None:
    with pytest.raises(ImproperlyConfigured, match=r"address_remap raised KeyError\('h'\) for \('h', 1\)") as caught:
        checked_remap(lambda address: {}[address[0]])(("h", 1))
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_number_of_other_sentinels() -> None:
    assert (checked_sentinels(0), checked_sentinels(2)) == (0, 2)
    for wrong in (-1, "2", None, 1.5):
        with pytest.raises(ImproperlyConfigured, match="min_other_sentinels must be a whole number from 0, not "):
            checked_sentinels(wrong)


@pytest.mark.parametrize(
    ("url", "completed"),
    [
        ("sentinel://", "sentinel://d:7"),
        ("sentinel://u:p@h/3;sentinel://:8/3?x=1", "sentinel://u:p@h:7/3;sentinel://d:8/3?x=1"),
        ("sentinel://[::1];sentinel://h:1", "sentinel://[::1]:7;sentinel://h:1"),
        ("sentinel://h:x", "sentinel://h:x"),
        ("sentinel://u:p/w@h", "sentinel://u:p/w@h"),
        ("redis+sentinel://h/m", "redis+sentinel://h/m"),
    ],
)
def test_where_celerys_url_lacks_a_host_or_a_port_its_settings_fill_it_in(url: str, completed: str) -> None:
    assert with_celerys_defaults(url, "d", 7) == completed


# -- what of them is shown ------------------------------------------------------------------------------------------

HOSTS = st.lists(st.sampled_from(["h1", "h2:26379", "[::1]:7", "10.0.0.1", "a.example:1"]), min_size=1, max_size=4)
SECRETS = st.text("QXZ@/:#?&=%[] ;,", min_size=1, max_size=8).map(lambda text: f"Q{text}X")


@settings(deadline=None, max_examples=60)
@given(HOSTS, st.sampled_from(["", "bob"]), SECRETS)
def test_every_host_is_shown_and_no_password(hosts: list[str], user: str, secret: str) -> None:
    encoded = quote(secret, safe="")
    several = ";".join(f"sentinel://{user}:{encoded}@{host}/3" for host in hosts)
    assert hide_password(several) == ";".join(f"sentinel://{user}:**@{host}/3" for host in hosts)
    assert sentinel_place(several, {}, "m", None).options["password"] == secret
    for scheme in ("redis+cluster", "rediss+sentinel"):
        place, end = ",".join(hosts), "/0" if scheme == "redis+cluster" else "/m/0?sentinel_password="
        kept = "" if scheme == "redis+cluster" else encoded
        shown = "" if scheme == "redis+cluster" else "**"
        url = f"{scheme}://{user}:{encoded}@{place}{end}"
        assert hide_password(f"{url}{kept}") == f"{scheme}://{user}:**@{place}{end}{shown}"
