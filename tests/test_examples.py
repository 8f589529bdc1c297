"""Every example runs as a user would run it, and tells its story."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

_EXAMPLES = Path(__file__).parent.parent / "examples"

#: What must be among the lines that an example prints, in this order.
_STORIES = {
    "quickstart.py": [
        "  the browser got: receipt for 42",
        "  the ledger got: receipt for 42",
        "  the mailer got: receipt for 42",
        "  CardDeclined: 4200 is over the limit",
        "  small: 200 pixels",
        "  medium: 1000 pixels",
        "  large: 2000 pixels",
        "And joined, in the order of the group: [2000, 1000, 200]",
    ],
    "two_processes.py": [
        "42 / 6 = 7",
        "1 / 0 failed: division by zero; the worker's traceback:",
        "    value = dividend / divisor",
        "9 / 2 = 4.5",
    ],
    "chord.py": [
        "  add_up([3, 4, 3])",
        "  and anybody may await the counts: [3, 4, 3]",
        "  part gaps-1 of chord gaps failed: ValueError('nothing to count')",
        "  add_up([7])",
    ],
    "celery_from_async.py": [
        "receipt for 42",
        "CardDeclined: 4200 is over the limit",
        "in the order of the group: [2000, 1000, 200]",
    ],
    "celery_to_browser.py": [
        'data: "Shall"',
        'data: "thee"',
        "event: end",
        """after the second word: ['data: "compare"', 'data: "thee"']""",
    ],
    "worker.py": [
        "hello",
        "SUCCESS sent to ann@example.org",
        "TaskRevokedError('a thousand letters are too many') 3",
    ],
    "web_handler.py": [
        '200 {"value": {"receipt": 42}}',
        '500 {"error": "ValueError: the card was declined"}',
        '202 {"state": "still running"}',
        '404 {"error": "no such task"}',
    ],
}


#: It serves until it is stopped: tests/test_browser.py asks it.
_SERVERS = {"stream_to_browser.py"}


@pytest.mark.parametrize("name", sorted(_STORIES))
def test_example_tells_its_story_and_cleans_up(name: str) -> None:
    environ = {key: value for key, value in os.environ.items() if key not in ("REDIS_URL", "RESULT_BACKEND")}
    command = [sys.executable, "-W", "error", str(_EXAMPLES / name)]
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path: too long for the name of a socket
        environ["TMPDIR"] = folder
        run = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=100)
        assert run.returncode == 0, run.stderr
        told = iter(run.stdout.splitlines())
        missing = [line for line in _STORIES[name] if line not in told]
        assert not missing, f"expected {missing} in\n{run.stdout}"
        assert os.listdir(folder) == []


def test_every_story_has_its_example() -> None:
    assert _STORIES.keys() == {path.name for path in _EXAMPLES.glob("*.py")} - _SERVERS
