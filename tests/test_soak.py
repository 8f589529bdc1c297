"""The soak, for as long as CI has: `tests.soak` runs it for an hour."""

from __future__ import annotations

import random

import pytest

from .soak import soak


@pytest.mark.parametrize("names", [("redis", "postgres"), ("cluster",)], ids=" ".join)
async def test_nothing_is_lost_or_left_over_in_ten_seconds_of_trouble(names: tuple[str, ...]) -> None:
    for report in await soak(names, seconds=8 if len(names) > 1 else 5, seed=random.getrandbits(32)):
        assert report.violations == []
        assert report.ids > 100
        assert report.kills > 0
        assert report.faults >= 3
