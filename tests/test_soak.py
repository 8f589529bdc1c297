"""The soak, for as long as CI has: `tests.soak` runs it for an hour."""

from __future__ import annotations

import random

from .soak import soak


async def test_nothing_is_lost_or_left_over_in_ten_seconds_of_trouble() -> None:
    for report in await soak(("redis", "postgres"), seconds=8, seed=random.getrandbits(32)):
        assert report.violations == []
        assert report.ids > 100
        assert report.kills > 0
        assert report.faults >= 3
