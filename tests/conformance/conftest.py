"""What the tests of running tasks share."""

from __future__ import annotations

import pytest

from ..harness import Harness

#: The stores that have no running tasks yet.
WITHOUT: tuple[str, ...] = ()


@pytest.fixture
def live(harness: Harness) -> Harness:
    """A store that keeps running tasks."""
    if harness.name in WITHOUT:
        pytest.skip(f"{harness.name} has no running tasks")
    return harness
