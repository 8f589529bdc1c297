"""No test can keep a run from ending."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_OPTIONS = ["-p", "no:xdist", "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "tests.guard", "-o", "timeout=1"]

_HEAD = """
from threading import Event

import pytest
from tests import guard

guard.MARGIN = 1
"""

_SWALLOWED = """
def stands_still():
    while True:
        try:
            Event().wait()
        except BaseException:
            pass

def test_hangs():
    stands_still()
"""

_AFTER_FAILURE = """
@pytest.fixture
def stands_still():
    yield
    Event().wait()

def test_hangs(stands_still):
    assert False
"""


@pytest.mark.parametrize("body", [_SWALLOWED, _AFTER_FAILURE], ids=["swallowed", "after a failure"])
def test_a_test_that_nothing_else_ends_is_ended_and_named(tmp_path: Path, body: str) -> None:
    file = tmp_path / "test_hanging.py"
    file.write_text(_HEAD + body + "\n\ndef test_passes():\n    pass\n")
    root = str(Path(__file__).parent.parent)
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", f"--rootdir={tmp_path}", *_OPTIONS, str(file)],
        env=environment | {"PYTHONPATH": root},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "in stands_still" in run.stderr
