"""What a team has configured in Celery: taken over as Celery does it, or refused by name."""

from __future__ import annotations

import asyncio
import operator
import re
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import celery.backends
import pytest
import redis
from celery.app.defaults import NAMESPACES
from redis.asyncio import Redis as Client

import aioresult
from aioresult import Backend, ImproperlyConfigured, by_url
from aioresult.backends.postgres import PostgresBackend
from aioresult.backends.redis import RedisBackend
from aioresult.backends.redis.places import cluster_place, sentinel_place
from aioresult.celery import backend_from_app
from aioresult.settings import backend_options

from .celery_app import make_app
from .celery_worker import GUARD, app_with
from .servers import RedisServer

DOCUMENT = Path(__file__).parent.parent / "docs" / "celery.md"
ROWS = dict(re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", DOCUMENT.read_text(encoding="utf-8"), re.M))

PROVIDER = "redis.credentials.UsernamePasswordCredentialProvider"
POSTGRES = "db+postgresql+psycopg://bob:s3cr3t@there/results"


class Provider(redis.CredentialProvider):
    def get_credentials(self) -> tuple[str]:
        return ("pw",)


def made(url: str | None, conf: Mapping[str, Any], **options: Any) -> Backend:
    return backend_from_app(make_app(None, url, **conf), **options)


def connection_of(backend: Backend) -> Any:
    """The connection that redis-py would make."""
    assert isinstance(backend, RedisBackend)
    return backend._connection_class(**backend._connection_options)


def arguments_of(backend: Backend) -> tuple[str, dict[str, Any]]:
    """What asyncpg is called with."""
    assert isinstance(backend, PostgresBackend)
    connections = backend._connections
    text, arguments = connections._dsn.with_options(connections._options)
    return text, dict(arguments)


# -- the document ---------------------------------------------------------------------------------------------------


def celerys_settings() -> Iterator[str]:
    """Those in Celery's list, and those that its code asks for beside it."""
    yield from ("accept_content", "result_accept_content")
    for namespace in ("result", "redis", "database"):
        yield from (f"{namespace}_{name}" for name in NAMESPACES[namespace])
    folder = Path(celery.backends.__path__[0])
    for name in ("base.py", "redis.py", "asynchronous.py", "database/__init__.py"):
        source = (folder / name).read_text(encoding="utf-8")
        yield from re.findall(r"""(?:_get|conf\.get)\(\s*['"]((?:result|redis|database)_\w+)""", source)
        yield from re.findall(r"""\bconf\.((?:result|redis|database)_\w+)""", source)
        yield from re.findall(r"""transport_options\.get\(\s*['"](\w+)""", source)


def test_the_document_has_a_row_for_every_setting_of_celerys() -> None:
    assert set(celerys_settings()) <= ROWS.keys()
    assert set(ROWS.values()) <= {"taken over", "no meaning", "refused", "not yet"}


HOUR = timedelta(hours=1)
#: A URL, settings beside it, an attribute of the backend, and its value.
Case: TypeAlias = tuple[str, Mapping[str, Any], str, Any]


def durations(url: str, setting: str, values: Mapping[Any, float]) -> list[Case]:
    return [(url, {setting: value}, setting.removeprefix("result_"), seconds) for value, seconds in values.items()]


#: Setting → cases that show it.
TAKEN_OVER: dict[str, list[Case]] = {
    "result_backend": [("redis://there/2", {}, "as_uri", "redis://there/2")],
    "result_expires": [
        *durations("redis://", "result_expires", {"3600": 3600, HOUR: 3600, 60: 60, 0: 0, None: 0, 1.9: 1}),
        *durations(POSTGRES, "result_expires", {"3600": 3600, HOUR: 3600, 60: 60, 0: 0, None: 0, 1.5: 1.5}),
    ],
    "result_failure_expires": durations(
        "redis://", "result_failure_expires", {"60": 60, HOUR: 3600, 60: 60, 0: 0, None: 86400}
    ),
    "result_chord_expires": durations(
        "redis://", "result_chord_expires", {"60": 60, HOUR: 3600, 60: 60, 0: 0, None: 86400}
    ),
    "result_chord_ordered": [
        ("redis://", {"result_backend_transport_options": {"result_chord_ordered": ordered}}, "_chord_ordered", ordered)
        for ordered in (True, False)
    ],
    "result_serializer": [
        ("redis://", {"result_serializer": "pickle", "accept_content": ["pickle"]}, "codec.serializer", "pickle")
    ],
    "result_accept_content": [
        ("redis://", {"result_accept_content": ["json", "pickle"]}, "codec.accept", {"json", "pickle"})
    ],
    "accept_content": [
        ("redis://", {"accept_content": ["json", "application/x-msgpack"]}, "codec.accept", {"json", "msgpack"})
    ],
    "result_compression": [("redis://", {"result_compression": "gzip"}, "codec.compression", "application/x-gzip")],
    "result_extended": [("redis://", {"result_extended": True}, "extended", True)],
    "result_backend_transport_options": [
        (
            "redis://",
            {"result_backend_transport_options": {"global_keyprefix": "shop"}},
            "_task_prefix",
            "shop_celery-task-meta-",
        )
    ],
    "global_keyprefix": [
        (
            "redis://",
            {"result_backend_transport_options": {"global_keyprefix": "shop."}},
            "_task_prefix",
            "shop.celery-task-meta-",
        )
    ],
    "database_url": [
        ("db", {"database_url": "postgresql+psycopg://there/results"}, "as_uri", "postgresql+psycopg://there/results"),
        ("database", {"database_url": "postgresql://there/results"}, "as_uri", "postgresql://there/results"),
        ("database+postgresql://there/results", {}, "as_uri", "postgresql://there/results"),
    ],
    "database_table_names": [
        (
            POSTGRES,
            {"database_table_names": {"task": "t", "group": "g"}},
            "store_id",
            aioresult.connect(POSTGRES, table="t", group_table="g").store_id,
        )
    ],
    "database_table_schemas": [
        (
            POSTGRES,
            {"database_table_schemas": {"task": "s", "group": "s"}},
            "store_id",
            aioresult.connect(POSTGRES, schema="s").store_id,
        )
    ],
}


@pytest.mark.parametrize(
    ("url", "conf", "attribute", "value"),
    [pytest.param(*case, id=f"{setting}-{case[1]}") for setting, cases in TAKEN_OVER.items() for case in cases],
)
def test_a_setting_is_taken_over(url: str, conf: Mapping[str, Any], attribute: str, value: Any) -> None:
    found = operator.attrgetter(attribute)(made(url, conf))
    assert (found() if callable(found) else found) == value


#: Settings for Redis, to be compared with what Celery itself makes of them.
REDIS: dict[str, list[tuple[str, Mapping[str, Any]]]] = {
    "redis_host": [
        ("redis", {"redis_host": "h"}),
        ("redis://", {"redis_host": "h"}),
        ("redis://u/1", {"redis_host": "h"}),
    ],
    "redis_port": [
        ("redis", {"redis_port": 7}),
        ("redis://u", {"redis_port": "7"}),
        ("redis://u:8", {"redis_port": 7}),
    ],
    "redis_db": [
        ("redis", {"redis_db": 4}),
        ("redis", {"redis_db": "4"}),
        ("redis://h", {"redis_db": 4}),
        ("redis://h/", {"redis_db": 4}),
        ("redis://h/2", {"redis_db": 4}),
        ("redis://h/2?db=3", {}),
        ("redis://h/2?virtual_host=3", {}),
        ("redis://h?virtual_host=3", {}),
        ("redis+socket:///run/r", {"redis_db": 4, "redis_host": "h", "redis_port": 7, "redis_socket_keepalive": False}),
        ("redis+socket:///run/r?virtual_host=3", {"redis_db": 4}),
        ("redis+socket:///run/r?db=3", {"redis_db": 4}),
    ],
    "redis_username": [
        ("redis://h", {"redis_username": "bob", "redis_password": "pw"}),
        ("redis://ann:other@h", {"redis_username": "bob", "redis_password": "pw"}),
        ("redis://:other@h", {"redis_username": "bob", "redis_password": "pw"}),
    ],
    "redis_password": [("redis", {"redis_password": "p@/?#%"}), ("redis+socket:///run/r", {"redis_password": "pw"})],
    "redis_client_name": [
        ("redis", {"redis_client_name": "web"}),
        ("redis://h?client_name=url", {"redis_client_name": "web"}),
    ],
    "redis_socket_connect_timeout": [("redis://h", {"redis_socket_connect_timeout": "3"})],
    "redis_socket_keepalive": [("redis://h", {"redis_socket_keepalive": True})],
    "redis_backend_credential_provider": [
        ("redis://h", {"redis_backend_credential_provider": PROVIDER, "redis_password": "pw"}),
        ("redis://h", {"redis_backend_credential_provider": Provider(), "redis_username": "bob"}),
        (f"redis://bob:pw@h?credential_provider={PROVIDER}", {"redis_password": "pw"}),
    ],
    "redis_backend_use_ssl": [
        ("redis://h", {"redis_backend_use_ssl": {"ssl_cert_reqs": requirement}})
        for requirement in (ssl.CERT_REQUIRED, ssl.CERT_NONE, "CERT_OPTIONAL", "required", "none")
    ]
    + [
        (
            "rediss://h?ssl_cert_reqs=none",
            {"redis_backend_use_ssl": {"ssl_cert_reqs": "required", "ssl_ca_certs": "/ca+%2F&x"}},
        ),
        (
            "redis://h",
            {
                "redis_backend_use_ssl": {
                    "ssl_cert_reqs": "required",
                    "ssl_certfile": "/c",
                    "ssl_keyfile": "/k",
                    "ssl_check_hostname": False,
                    "ssl_validate_ocsp": False,
                    "ssl_include_verify_flags": [ssl.VerifyFlags.VERIFY_X509_STRICT],
                }
            },
        ),
    ],
}
#: With what redis-py fills in.
DEFAULTS = {"host": "localhost", "port": 6379, "db": 0}
IGNORED = {"max_connections", "socket_timeout", "retry_on_timeout", "driver_info", "ssl_validate_ocsp", "virtual_host"}


def essence(connection_class: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What of the arguments of a connection says where it leads, as whom, and how it is protected."""
    defaults = {} if "path" in arguments else DEFAULTS
    found = {name: value for name, value in arguments.items() if value not in (None, "") and name not in IGNORED}
    found = {**defaults, "db": 0, **found, "class": connection_class.__name__}
    for name in ("port", "db"):
        if name in found:
            found[name] = int(found[name])
    requirements = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
    if isinstance(found.get("ssl_cert_reqs"), str):
        found["ssl_cert_reqs"] = requirements[found["ssl_cert_reqs"]]
    if "SSL" in found["class"]:
        found.setdefault("ssl_check_hostname", found.get("ssl_cert_reqs") != ssl.CERT_NONE)
    if provider := found.get("credential_provider"):
        found["credential_provider"] = type(provider)
    return found


@pytest.mark.parametrize(
    ("url", "conf"),
    [pytest.param(*case, id=f"{name} {number}") for name, cases in REDIS.items() for number, case in enumerate(cases)],
)
def test_redis_is_reached_as_celery_reaches_it(url: str, conf: Mapping[str, Any]) -> None:
    app = make_app(None, url, **conf)
    celerys = dict(app.backend.connparams)
    backend = backend_from_app(app)
    assert isinstance(backend, RedisBackend)
    expected = essence(celerys.pop("connection_class", redis.Connection), celerys)
    assert essence(backend._connection_class, backend._connection_options) == expected
    shown = f"{backend!r}"
    for part in ("pw", "p@", "other@"):
        assert part not in shown


#: Settings for Sentinel, to be compared with what Celery itself makes of them. The transport options are merged.
SENTINEL: dict[str, list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]] = {
    "master_name": [("sentinel://u:pw@h1:1/3;sentinel://ann:other@h2:2/4", {"redis_db": 7}, {"master_name": "m"})],
    "min_other_sentinels": [("sentinel://h1:1", {}, {"min_other_sentinels": 2})],
    "sentinel_kwargs": [
        ("sentinel://:pw@h1:1;sentinel://h2:1", {}, {"sentinel_kwargs": {"password": "pw2", "socket_timeout": 0.5}}),
        (
            "sentinel://h1:1",
            {"redis_backend_use_ssl": {"ssl_cert_reqs": "none"}},
            {"sentinel_kwargs": {"ssl": True, "ssl_cert_reqs": "required", "ssl_ca_certs": "/ca"}},
        ),
        ("sentinel://h1:1", {"redis_backend_use_ssl": {"ssl_cert_reqs": "required", "ssl_ca_certs": "/ca"}}, {}),
    ],
    "other settings": [
        ("sentinel://", {"redis_host": "h", "redis_port": "7"}, {}),
        ("sentinel://h1/2;sentinel://[::1]:26379/2", {}, {}),
        ("sentinel://h1:1/", {"redis_username": "bob", "redis_password": "pw", "redis_client_name": "web"}, {}),
        ("sentinel://:other@h1:1/", {"redis_password": "pw", "redis_socket_connect_timeout": "3"}, {}),
        ("sentinel://h1:1", {"redis_socket_keepalive": True}, {"global_keyprefix": "shop"}),
    ],
}


@pytest.mark.parametrize(
    ("url", "conf", "transport"),
    [
        pytest.param(*case, id=f"{name} {number}")
        for name, cases in SENTINEL.items()
        for number, case in enumerate(cases)
    ],
)
def test_sentinels_and_their_master_are_reached_as_celery_reaches_them(
    url: str, conf: Mapping[str, Any], transport: Mapping[str, Any]
) -> None:
    transport = {"master_name": "m", **transport}
    app = make_app(None, url, result_backend_transport_options=transport, **conf)
    celerys = dict(app.backend.connparams)
    theirs = app.backend._get_sentinel_instance(**celerys)
    found, options = backend_options(app.conf, url, {})
    place = sentinel_place(
        found, options.get("connect_options") or {}, options["master_name"], options.get("sentinel_kwargs")
    )
    assert place.master_name == "m"
    assert options.get("min_other_sentinels", 0) == theirs.min_other_sentinels
    assert options.get("global_keyprefix") == transport.get("global_keyprefix")
    asked = [(pool.connection_class, pool.connection_kwargs) for pool in (s.connection_pool for s in theirs.sentinels)]
    assert place.sentinels == tuple((arguments["host"], int(arguments["port"])) for _, arguments in asked)
    for (host, port), (kind, arguments) in zip(place.sentinels, asked, strict=True):
        ours = {"host": host, "port": port, **place.sentinel_options}
        assert judged(essence(place.sentinel_class, ours), set()) == judged(essence(kind, arguments), set())
    del celerys["hosts"]
    kind = celerys.pop("connection_class", redis.Connection)
    mine = essence(place.connection_class, place.options)
    assert judged(mine, OF_THE_SOCKET) == judged(essence(kind, celerys), OF_THE_SOCKET)


#: redis-py's client sets these for the sentinels by itself.
OF_THE_SOCKET = {"socket_connect_timeout", "socket_keepalive"}
OF_TLS = {"ssl_cert_reqs", "ssl_ca_certs", "ssl_check_hostname"}
OF_ALL = {"host", "port", "db", "username", "password", "client_name"}


def judged(found: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return ``names`` of what `essence` returns. redis-py has several classes of connections with TLS."""
    tls = "SSL" in found["class"]
    return {"tls": tls} | {name: found.get(name) for name in (OF_ALL | OF_TLS if tls else OF_ALL) | names}


def test_tls_without_arguments_is_for_the_master_alone_and_verifies_its_certificate() -> None:
    app = make_app(None, "sentinel://h", redis_backend_use_ssl=True)
    url, options = backend_options(app.conf, "sentinel://h", {"connect_options": {"client_name": "mine"}})
    place = sentinel_place(url, options["connect_options"], "m", None)
    assert (place.connection_class.__name__, place.sentinel_class.__name__) == ("SSLConnection", "Connection")
    assert place.options == {"client_name": "mine", "ssl_check_hostname": True}


def test_settings_of_redis_are_for_every_node_of_a_cluster() -> None:
    conf = {"redis_password": "pw", "redis_host": "h", "redis_port": 7, "redis_db": 3, "redis_client_name": "web"}
    tls = {"ssl_ca_certs": "/ca", "ssl_check_hostname": False}
    app = make_app(None, "redis://", redis_backend_use_ssl=tls, **conf)
    path = "aioresult.backends.redis:ClusterBackend+redis+cluster://h1,h2?client_name=url"
    for url in (path, path.partition("+")[2]):
        found, options = backend_options(app.conf, url, {})
        assert found == url
        place = cluster_place(by_url(found)[1], options["connect_options"])
        assert place.url == "rediss+cluster://h1:6379,h2:6379"
        assert place.options == {"password": "pw", "client_name": "url", **tls}


def test_every_row_that_is_taken_over_is_shown() -> None:
    shown = TAKEN_OVER.keys() | REDIS.keys() | {"database_engine_options"} | (SENTINEL.keys() - {"other settings"})
    assert {name for name, verdict in ROWS.items() if verdict == "taken over"} == shown


# -- Redis ----------------------------------------------------------------------------------------------------------


def test_what_has_no_meaning_changes_nothing() -> None:
    conf = {
        "redis_socket_timeout": 0.001,
        "redis_max_connections": 1,
        "redis_retry_on_timeout": True,
        "redis_backend_health_check_interval": 1,
        "result_cache_max": 1,
        "result_backend_max_retries": 0,
        "database_url": "postgresql://elsewhere",
    }
    backend, plain = made("redis://h", conf), made("redis://h?max_connections=10", {})
    assert isinstance(backend, RedisBackend)
    assert isinstance(plain, RedisBackend)
    assert backend._connection_options == plain._connection_options == {"host": "h"}


def test_tls_without_further_arguments_verifies_certificates() -> None:
    connection = connection_of(made("redis://h", {"redis_backend_use_ssl": True}))
    assert (connection.cert_reqs, connection.check_hostname) == (ssl.CERT_REQUIRED, True)


def test_the_callers_connect_options_are_put_over_the_settings_one_by_one() -> None:
    conf = {"redis_password": "pw", "redis_client_name": "web"}
    connection = connection_of(made("redis://h:7/2", conf, connect_options={"client_name": "mine", "db": 3}))
    assert (connection.host, connection.port, connection.db) == ("h", 7, 3)
    assert (connection.password, connection.client_name) == ("pw", "mine")


@pytest.mark.parametrize(
    ("url", "given", "shown"),
    [
        ("redis://", {"host": "h", "port": 7, "db": 2}, "redis://h:7/2"),
        ("rediss://bob:s3cr3t@h/1", {"db": 2}, "rediss://h:6379/2"),
        ("redis://h/1", {"host": "::1"}, "redis://[::1]:6379/1"),
        ("unix:///run/r", {"db": 2}, "unix:///run/r?db=2"),
        ("redis://bob:s3cr3t@h/1", {"password": "other"}, "redis://bob:**@h/1"),
    ],
)
def test_connect_options_say_where_a_backend_is(url: str, given: dict[str, Any], shown: str) -> None:
    backend = aioresult.connect(url, connect_options=given)
    assert backend.as_uri() == shown
    assert backend.store_id == aioresult.connect(url, connect_options=given).store_id


@pytest.mark.parametrize(
    ("url", "given", "told"),
    [
        ("redis://h", {"no_such": 1}, "no_such"),
        ("redis://h", {"credential_provider": "no.such.Provider"}, "cannot be imported: No module named 'no'"),
        ("redis://h", {"credential_provider": dict}, "must be a redis.CredentialProvider"),
        ("redis://h?credential_provider=os.getcwd", {}, "must be a redis.CredentialProvider"),
        (
            "redis://bob:s3cr3t@h",
            {"credential_provider": Provider},
            "replaces the user name and the password",
        ),
        ("rediss://h", {"ssl_validate_ocsp": True}, "ssl_validate_ocsp .* lack OCSP"),
        ("rediss://h?ssl_validate_ocsp=true", {}, "ssl_validate_ocsp .* lack OCSP"),
        ("rediss://h", {"ssl_cert_reqs": 7}, "7 is not a valid VerifyMode"),
        ("rediss://h", {"ssl_cert_reqs": "often"}, "[Ii]nvalid SSL Certificate Requirements"),
        # a password that is not percent-encoded, a part of which would be taken for a port
        ("redis://bob:s3cr3t/x@h", {}, "percent-encode the name and the password"),
        ("redis://bob:s3cr3t?x@h", {}, "percent-encode the name and the password"),
    ],
)
def test_what_redis_py_would_not_take_is_told_without_the_password(url: str, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=told) as caught:
        aioresult.connect(url, connect_options=given)
    assert "s3cr3t" not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize(
    ("url", "conf", "told"),
    [
        ("redis://", {"result_expires": "soon"}, "result_expires must be a number of seconds or a timedelta"),
        ("redis://", {"redis_port": "x"}, "redis_port must be a number"),
        ("redis+socket:///run/r", {"redis_backend_use_ssl": True}, "redis_backend_use_ssl .* unix socket"),
        ("db", {}, "result_backend='db' needs database_url"),
        ("sentinel://h", {}, "set result_backend_transport_options={'master_name': 'mymaster'}"),
        ("sentinel+ssl://h", {}, "Celery reads sentinel\\+ssl:// as sentinel://, without TLS"),
        ("aioresult.celery:ClusterBackend+redis+cluster://h/1", {}, "a cluster has one database"),
        ("rediss+cluster://h", {}, "write aioresult.celery:ClusterBackend\\+ before it"),
        ("cluster://h", {}, "unknown result backend 'cluster': write redis\\+cluster://"),
        ("redis+mongodb://h", {}, "Celery has a backend of that name; aioresult has none"),
        ("django-db", {}, "Celery has .* pass its own URL with table='django_celery_results_taskresult'"),
        ("django-cache", {}, "Celery has a backend of that name; aioresult has none"),
        ("cache+memcached://h", {}, "Celery has a backend of that name; aioresult has none"),
        ("db+oracle://h", {}, "Celery has a backend of that name; aioresult has none"),
        (
            POSTGRES,
            {"database_engine_callback": print},
            "database_engine_callback cannot be taken over.* pass connect=",
        ),
        (
            POSTGRES,
            {"database_engine_options": {"creator": print}},
            r"\['creator'\] cannot be taken over.* pass connect=",
        ),
        (
            POSTGRES,
            {"database_engine_options": {"execution_options": {"schema_translate_map": {}}}},
            "schema_translate_map.* cannot be taken over",
        ),
        (POSTGRES, {"database_engine_options": {"connect_args": {"no_such": 1}}}, "unknown parameter 'no_such'"),
        (
            POSTGRES,
            {"database_engine_options": {"connect_args": {"ssl_context": object()}}},
            "'ssl_context' in the connect_args",
        ),
        (POSTGRES, {"database_table_schemas": {"task": "a", "group": "b"}}, "ALTER TABLE … SET SCHEMA"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_by_name(url: str, conf: Mapping[str, Any], told: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=told) as caught:
        made(url, conf)
    assert "s3cr3t" not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_a_name_of_ours_for_which_the_app_has_a_class_of_its_own_is_refused() -> None:
    app = make_app(None, "redis://h")
    app.loader.override_backends = {"redis": "shop.results:Backend"}
    with pytest.raises(ImproperlyConfigured, match=r"'redis' of the Celery app 'tests' is 'shop.results:Backend'"):
        backend_from_app(app)


def test_a_class_of_the_apps_own_is_refused() -> None:
    app = make_app(None, None)
    app.backend_cls = RedisBackend
    with pytest.raises(ImproperlyConfigured, match="a result backend class of its own, RedisBackend"):
        backend_from_app(app)


@pytest.fixture
async def user(own_redis: RedisServer, redis_client: Client) -> AsyncIterator[RedisServer]:
    """A server to which only ``shopper`` with a password is let in."""
    await redis_client.acl_setuser(
        "shopper", enabled=True, passwords=["+p@/?#%"], keys=["*"], channels=["*"], commands=["+@all"]
    )
    yield own_redis
    await redis_client.acl_deluser("shopper")


class Shopper(redis.CredentialProvider):
    def get_credentials(self) -> tuple[str, str]:
        return "shopper", "p@/?#%"


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # Celery 5.7 on redis-py 8
@pytest.mark.parametrize(
    ("url", "conf"),
    [
        ("redis://127.0.0.1:{}/1", {"redis_username": "shopper", "redis_password": "p@/?#%"}),
        ("redis", {"redis_username": "shopper", "redis_password": "p@/?#%", "redis_db": 1}),
        (
            "redis://127.0.0.1:{}/1",
            {"redis_backend_credential_provider": f"{__name__}.Shopper", "redis_password": "no"},
        ),
        (f"redis://127.0.0.1:{{}}/1?credential_provider={__name__}.Shopper", {}),
    ],
)
async def test_a_server_that_asks_for_a_password(user: RedisServer, url: str, conf: Mapping[str, Any]) -> None:
    places = {"redis_host": "127.0.0.1", "redis_port": user.port}
    with app_with(url.format(user.port), **places, **conf) as app:
        await asyncio.to_thread(app.backend.mark_as_done, task_id := str(uuid4()), "theirs")
        async with backend_from_app(app) as backend:
            assert await backend.result(task_id).get(timeout=GUARD) == "theirs"


# -- a serializer that is missing here ------------------------------------------------------------------------------


async def test_what_only_storing_needs_keeps_nobody_from_reading() -> None:
    store = aioresult.connect("memory://")
    backend = made("cache+memory://", {"result_serializer": "yaml", "accept_content": ["yaml", "json"]})
    async with store, backend:
        for call in (
            backend.mark_as_done("a", 1),
            backend.mark_as_failure("b", ValueError("x")),
            backend.group([]).save(),
        ):
            with pytest.raises(ImproperlyConfigured, match="aioresult does not support result_serializer='yaml'"):
                await call
        assert backend.codec.decode("a", store.codec.encode(aioresult.TaskMeta("a", "SUCCESS", 1))).result == 1
