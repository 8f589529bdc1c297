"""What of a URL may be shown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aioresult
from aioresult.urls import hide_password

URLS = [
    ("redis://", "redis://"),
    ("redis://host:6379/0", "redis://host:6379/0"),
    ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
    ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
    ("redis://bob@host", "redis://bob@host"),
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
    ("redis://corp/bob:PW@host", "redis://corp/bob:**@host"),
    ("redis:/bob:PW@host", "redis:/bob:**@host"),
    ("redis+socket://bob:PW@/run/redis.sock", "redis+socket://bob:**@/run/redis.sock"),
    ("shop.backends:Own+own://bob:PW@host", "shop.backends:Own+own://bob:**@host"),
    ("unix:///run/redis.sock?password=PW&db=1", "unix:///run/redis.sock?password=**&db=1"),
    ("unix:///run/redis.sock?db=1&PASSWORD=P=W", "unix:///run/redis.sock?db=1&PASSWORD=**"),
    ("redis://host?password=P#W/?&db=1", "redis://host?password=**&db=1"),
    (
        "rediss://host?ssl_password=PW&token=PW&client_secret=PW",
        "rediss://host?ssl_password=**&token=**&client_secret=**",
    ),
    ("redis://bob:PW@host?password=PW", "redis://bob:**@host?password=**"),
]


@pytest.mark.parametrize(("url", "shown"), URLS)
def test_a_password_is_hidden_and_the_rest_is_not(url: str, shown: str) -> None:
    assert hide_password(url) == shown


@settings(deadline=None)
@given(st.text("bob@/#?&=%"), st.text("PASWORD@/:#?&=%", min_size=3))
def test_no_part_of_a_password_is_left(user: str, password: str) -> None:
    assert hide_password(f"redis://{user}:{password}@host/0") == f"redis://{user}:**@host/0"


@pytest.mark.parametrize("url", ["memory://bob:PW@host", "memory://?password=PW"])
def test_a_backend_does_not_show_it(url: str) -> None:
    backend = aioresult.connect(url)
    assert "PW" not in f"{backend!r} {backend.as_uri()}"
