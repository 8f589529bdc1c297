"""What of a URL may be shown."""

from __future__ import annotations

import asyncio
import re
import traceback

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import aioresult
from aioresult import ImproperlyConfigured
from aioresult.backends.redis.places import cluster_place, sentinel_place
from aioresult.urls import hide_password

URLS = [
    ("redis://", "redis://"),
    ("redis://host:6379/0", "redis://host:6379/0"),
    ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
    ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
    ("redis://PW@host", "redis://**@host"),
    ("redis://bob:PW@host:6379/0", "redis://bob:**@host:6379/0"),
    ("redis://:PW@host", "redis://:**@host"),
    ("redis://bob:@host", "redis://bob:**@host"),
    ("redis://bob:P@W@host", "redis://bob:**@host"),
    ("redis://bob:P/W@host", "redis://bob:**@host"),
    ("redis://bob:P:W@host", "redis://bob:**@host"),
    ("redis://bob:P#W@host", "redis://bob:**@host"),
    ("redis://bob:P?W@host", "redis://bob:**@host"),
    ("redis://bob:P://W@host", "redis://bob:**@host"),
    ("redis://bob:P\nW@host", "redis://bob:**@host"),
    ("redis://bob:P%40W@host", "redis://bob:**@host"),
    ("redis://bob@corp:PW@host", "redis://bob@corp:**@host"),
    ("redis://corp/bob:PW@host", "redis://**@host"),
    ("redis://P/W@host:6379/0", "redis://**@host:6379/0"),
    ("redis:///PW@host", "redis://**@host"),
    ("redis://host/0?password=P@W", "redis://**"),
    ("redis://host:1/0?client_name=a@b", "redis://host:**@b"),
    ("redis://bob:PW@host/0?password=P@W", "redis://bob:**"),
    ("bob:PW@host:6379", "bob:**@host:6379"),
    (":P://W@host", ":**@host"),
    ("PW@host", "**@host"),
    ("redis:/bob:PW@host", "redis:/bob:**@host"),
    ("redis+socket://bob:PW@/run/redis.sock", "redis+socket://bob:**@/run/redis.sock"),
    ("shop.backends:Own+own://bob:PW@host", "shop.backends:Own+own://bob:**@host"),
    ("unix:///run/redis.sock?password=PW&db=1", "unix:///run/redis.sock?password=**&db=1"),
    ("unix:///run/redis.sock?db=1&PASSWORD=P=W", "unix:///run/redis.sock?db=1&PASSWORD=**"),
    ("redis://host?password=P#W/?&db=1", "redis://host?password=**&db=1"),
    (
        "rediss://host?ssl_password=PW&token=PW&client_secret=PW&pwd=PW&auth=PW",
        "rediss://host?ssl_password=**&token=**&client_secret=**&pwd=**&auth=**",
    ),
    ("redis://bob:PW@host?password=PW", "redis://bob:**@host?password=**"),
    ("redis+cluster://bob:PW@h1:1,[::1],h2/0", "redis+cluster://bob:**@h1:1,[::1],h2/0"),
    ("redis+cluster://PW@h1,h2", "redis+cluster://**@h1,h2"),
    ("redis+cluster://bob:P,W@h1,h2", "redis+cluster://bob:**@h1,h2"),
    ("redis+cluster://PW@h1:1,PW@h2", "redis+cluster://**@h2"),
    ("redis+cluster://PW@h1:1/0;redis+cluster://PW@h2", "redis+cluster://**@h2"),
    (
        "redis+sentinel://bob:PW@h1,h2/m/0?sentinel_username=ann&sentinel_password=PW",
        "redis+sentinel://bob:**@h1,h2/m/0?sentinel_username=ann&sentinel_password=**",
    ),
    (
        "sentinel://:PW@h1:1/3;SENTINEL://bob:PW@[::1]:2/3;sentinel://PW@h2",
        "sentinel://:**@h1:1/3;SENTINEL://bob:**@[::1]:2/3;sentinel://**@h2",
    ),
    (
        "shop.backends:Own+sentinel://h1?password=PW;sentinel+ssl://h2",
        "shop.backends:Own+sentinel://h1?password=**;sentinel+ssl://h2",
    ),
    # what may be a password with a semicolon in it
    ("sentinel://bob:P;W@h1;sentinel://bob:P;W@h2", "sentinel://bob:**@h2"),
    ("sentinel://bob:P;sentinel://W@h", "sentinel://bob:**@h"),
    ("sentinel://bob:9/P;sentinel://W@h", "sentinel://bob:**@h"),
    ("sentinel://bob:9?P;sentinel://W@@h", "sentinel://bob:**@h"),
    ("redis://bob:9;x://W@h", "redis://bob:**@h"),
]


@pytest.mark.parametrize(("url", "shown"), URLS)
def test_a_password_is_hidden_and_the_rest_is_not(url: str, shown: str) -> None:
    assert hide_password(url) == shown


@settings(deadline=None)
@given(st.text("bob@&=%"), st.text("PASWORD@/:#?&=%", min_size=3))
def test_no_part_of_a_password_is_left(user: str, password: str) -> None:
    shown = hide_password(f"redis://{user}:{password}@host/0")
    assert shown in (f"redis://{user}:**@host/0", f"redis://{user}:**")


WORDS = st.text("QXZ", min_size=4, max_size=6)


@st.composite
def secrets(draw: st.DrawFn, between: str, around: bool = True) -> str:
    """Words that no message has, with odd characters between them, and around them."""
    odd = st.text(between, max_size=2)
    words = draw(st.lists(WORDS, min_size=1, max_size=3))
    text = words[0] + "".join(draw(st.sampled_from(between)) + word for word in words[1:])
    return f"{draw(odd)}{text}{draw(odd)}" if around else text


PLACES = st.one_of(
    st.builds("{}:{}@127.0.0.1:1/0".format, st.sampled_from(["", "bob"]), secrets("@/:#?&=%[] ;,")),
    st.builds("{}@127.0.0.1:1/0".format, secrets("@/#?&=%[] ;,")),  # the colon is missing
    st.builds("{}:{}".format, st.sampled_from(["", "h"]), secrets("/:#?&=%[] ;,", around=False)),  # the @ is
    st.builds("127.0.0.1:1/0?{}={}".format, st.sampled_from(["password", "passwd_token"]), secrets("@/:?=%[] ;,")),
    st.builds("127.0.0.1:1/0?password={}&ssl_password={}".format, secrets("@/:#?=%;,"), secrets("@/:#?=%;,")),
)


async def shown_of(url: str) -> str:
    """All that is shown while a backend is made and opened: either goes wrong, for there is no server."""
    shown = ""
    try:
        backend = aioresult.connect(url)
        shown = f"{backend!r} {backend.as_uri()} {backend.store_id}"
        await backend.open()
    except aioresult.AioResultError as exc:
        return shown + "".join(traceback.format_exception(exc))
    raise AssertionError(f"{backend!r} could be opened")


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["redis://", "rediss://", "valkey:/", "postgresql://", "db+postgresql+psycopg://", ""]), PLACES)
def test_no_mistake_in_a_url_shows_a_password(scheme: str, rest: str) -> None:
    assume(scheme or "@" in rest)  # "h:secret" may be a class
    shown = asyncio.run(shown_of(scheme + rest))
    assert not re.search("[QXZ]{4}", shown), shown


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["redis+cluster", "rediss+cluster", "sentinel", "redis+sentinel"]), PLACES, st.booleans())
def test_no_mistake_in_a_url_with_several_hosts_shows_a_password(scheme: str, rest: str, twice: bool) -> None:
    url = f"{scheme}://{rest};{scheme}://{rest}" if twice else f"{scheme}://{rest}"
    shown = ""
    for make in (cluster_place, lambda url, given: sentinel_place(url, given, "m", None)):
        try:
            shown += f"{make(url, {}).url} {hide_password(url)}"
        except ImproperlyConfigured as exc:
            shown += "".join(traceback.format_exception(exc))
    assert not re.search("[QXZ]{4}", shown), shown


@pytest.mark.parametrize(
    "url",
    [
        "redis://:dGhpcyBpcyBhIHRlc3Qgc2VjcmV0/A=@cache.example:6379/14",
        "redis://:99/secretpart@h:6379/0",
        "redis://:99#secretpart@h:6379/0",
        "redis://:99?secretpart@h:6379/0",
        "redis://:99?db=1#secretpart@h:6379/0",
        "redis://:99?secretpart=1@h:6379/0",
        "redis://secretpart/A=@host:6379/14",
        "redis://secret?part@host",
        "redis://:secret[part@host",
        "redis://:secret\u2100part@host",
        "redis://host:secretpart",
        "unix://secret/part@/run/redis.sock",
        "postgresql://bob:secret/part@host",
        "postgresql://bob:secret@part@host",
        "postgresql://host:secretpart/db",
        "postgresql://bob:secret\u2100part@host",
    ],
)
def test_a_password_that_is_not_encoded_is_refused_with_the_remedy(url: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="percent-encode the name and the password") as caught:
        aioresult.connect(url)
    assert not re.search("secret|part|dGhp|99", str(caught.value))
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "url",
    [
        "redis://bob:p%2Fw@h/0?client_name=me@home",
        "redis://h:6379/0?client_name=me@home",
        "unix:///run/a@b.sock?db=1",
        "redis://[::1]:6379/0",
        "redis://h:/0",
        "postgresql://[::1]:5432,b:2,c/db",
        "postgresql://bob:p%40w@%2Frun%2Fpg/db",
    ],
)
def test_an_unusual_url_that_is_right_is_taken(url: str) -> None:
    assert aioresult.connect(url).as_uri()


@pytest.mark.parametrize("url", ["memory://bob:PW@host", "memory://?password=PW"])
def test_a_backend_does_not_show_it(url: str) -> None:
    backend = aioresult.connect(url)
    assert "PW" not in f"{backend!r} {backend.as_uri()}"
