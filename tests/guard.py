"""Ends the process of a test that pytest-timeout cannot end, so that no run waits forever.

pytest-timeout raises an error where the test runs, once. A callback or another task may catch it, and after a failure
it no longer guards what the fixtures undo. This guard is a thread of the interpreter's own: it writes where every
thread is, and ends the process; the run then fails and names the test.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Generator

import pytest

#: Seconds that pytest-timeout has for a test and its fixtures before this guard ends the process.
MARGIN = 60.0

_output = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_output] = os.dup(2)  # while tests run, their output is captured, and would be lost with the process
    config.add_cleanup(lambda: os.close(config.stash[_output]))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    _watch(item)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """Watch on: for the sake of a debugger, pytest and pytest-timeout end what they watch by at a failure."""
    if isinstance(node, pytest.Item):
        _watch(node)


def _watch(item: pytest.Item) -> None:
    mark, given = item.get_closest_marker("timeout"), item.config.getoption("timeout")
    seconds = float(mark.args[0] if mark is not None else item.config.getini("timeout") if given is None else given)
    faulthandler.dump_traceback_later(seconds + MARGIN, exit=True, file=item.config.stash[_output])
