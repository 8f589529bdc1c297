"""Every example runs as a user would run it, and tells its story."""

from __future__ import annotations

import ast
import os
import re
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
        "  and any process may await the counts: [3, 4, 3]",
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


def imported(path: Path) -> set[str]:
    """The packages beyond the standard library that an example imports, itself or by another example."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found: set[str] = set()
    for name in {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"aioresult"}:
        if (other := path.with_name(f"{name}.py")).exists():
            found |= imported(other)
        else:
            found.add(name.replace("_", "-"))  # each of these packages has the name of its module
    return found


@pytest.mark.parametrize("path", sorted(_EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_names_what_to_install_and_the_command_that_runs_it(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    commands = re.findall(r"^    (\S.*)$", ast.get_docstring(tree) or "", re.M)
    assert f"python examples/{path.name}" in commands
    wanted = {word.strip("'") for line in commands if line.startswith("pip install ") for word in line.split()[2:]}
    extras = {word for word in wanted if word.startswith(".")}
    names = {re.sub(r"\[.*", "", word) for word in wanted - extras}
    assert extras, "the library itself is not installed"
    del tree.body[0]  # the docstring
    assert "redis" not in ast.unparse(tree).lower() or ".[redis]" in extras
    assert "celery" not in names or "celery[redis]" in wanted  # kombu's transport for Redis needs what that extra has
    assert imported(path) <= names
    programs = {line.split()[0] for line in commands}
    assert names <= imported(path) | programs, "a package that the example does not need"
