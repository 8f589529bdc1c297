"""What the documents show is true: every block of Python runs, and prints what the block after it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

_ROOT = Path(__file__).parent.parent
_README = _ROOT / "README.md"
_WRITING_A_BACKEND = _ROOT / "docs" / "writing_a_backend.md"
_GUIDES = _ROOT / "tests" / "test_guides.py"
_DOCUMENTS = [_README, *sorted((_ROOT / "docs").rglob("*.md"))]
#: Where a document in docs/ finds what is not: the site has no such pages, and a relative link would lead nowhere.
_REPOSITORY = "https://github.com/aioresult/aioresult-tasks"
#: What the names of the modules contain that are about what a backend need not have.
_OPTIONAL = ("chord", "running", "revoking", "stream", "liveness")

_PYTHON = re.compile(
    r"^```python\n(?:# (?P<name>\w+\.py)\n)?(?P<source>.*?)^```\n(?:\n?```text\n(?P<prints>.*?)^```)?", re.M | re.S
)


#: Whatever looks as if it began a block of Python, so that one which `_PYTHON` passes over is noticed.
_LOOSE = re.compile(r"^[^\w\n]*(?:`{3,}|~{3,})[^\w\n]*py", re.M | re.I)
#: A fenced block whole, in which nothing is a link.
_FENCED = re.compile(r"^( *)```.*?^\1```", re.M | re.S)
_LINK = re.compile(r"\]\(([^\s)#]*)(?:#([^\s)]+))?\)")
_HEADING = re.compile(r"^#+ (.*)$", re.M)


class Block(NamedTuple):
    source: str
    #: The file that it is shown as; the others are run.
    name: str | None
    prints: str


def blocks(document: Path) -> list[Block]:
    found = _PYTHON.finditer(document.read_text(encoding="utf-8"))
    return [Block(match["source"], match["name"], match["prints"] or "") for match in found]


def run(folder: Path, *words: str, **settings: str) -> str:
    environ = {
        **os.environ,
        **settings,
        "PYTHONPATH": os.pathsep.join([str(folder), str(_ROOT)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environ, capture_output=True, text=True, timeout=220
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lay_out(document: Path, folder: Path) -> list[Block]:
    """Write the files that the document shows; the blocks that are left are to be run beside them."""
    for block in blocks(document):
        if block.name is not None:
            (folder / block.name).write_text(block.source, encoding="utf-8")
    return [block for block in blocks(document) if block.name is None]


@pytest.mark.parametrize(
    "document",
    [document for document in _DOCUMENTS if _LOOSE.search(document.read_text(encoding="utf-8"))],
    ids=lambda document: document.stem,
)
def test_every_block_of_python_runs(document: Path, tmp_path: Path) -> None:
    assert len(blocks(document)) == len(_LOOSE.findall(document.read_text(encoding="utf-8")))
    to_run = lay_out(document, tmp_path)
    # A page of files alone has a test of its own, which runs them as their readers would.
    assert to_run or f'"{document.name}"' in _GUIDES.read_text(encoding="utf-8")
    for block in to_run:
        assert run(tmp_path, "-W", "error", "-c", block.source) == block.prints


def test_the_backend_that_is_written_passes_the_conformance_suite(tmp_path: Path) -> None:
    lay_out(_WRITING_A_BACKEND, tmp_path)
    modules = {path.stem for path in (_ROOT / "tests" / "conformance").glob("test_*.py")}
    suite = {name for name in modules if not any(optional in name for optional in _OPTIONAL)}
    shown = re.findall(r"tests\.conformance\.(\w+)", (tmp_path / "test_conformance.py").read_text(encoding="utf-8"))
    assert set(shown) == suite
    found = re.search(r"^PYTHONPATH=\S+ python (.* test_conformance\.py)$", _WRITING_A_BACKEND.read_text("utf-8"), re.M)
    assert found is not None
    said = run(tmp_path, *shlex.split(found[1].replace("path/to/checkout", str(_ROOT))), "-p", "no:cacheprovider")
    assert re.search(r"\b\d{3,} passed", said, re.M), said


@pytest.mark.parametrize(
    "command",
    [
        "python3 -m venv .venv && .venv/bin/pip install -q . && .venv/bin/python examples/quickstart.py",
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/python -m pytest",
    ],
)
def test_the_two_commands_are_lines_to_copy(command: str) -> None:
    assert f"```sh\n{command}\n```" in _README.read_text(encoding="utf-8")


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda document: document.stem)
def test_links_lead_somewhere(document: Path) -> None:
    found = _LINK.findall(_FENCED.sub("", document.read_text(encoding="utf-8")))
    for target, anchor in found:
        if target.startswith(_REPOSITORY):
            _, _, path = target.removeprefix(f"{_REPOSITORY}/").partition("/main/")
            assert (_ROOT / path).exists(), target
        elif "://" not in target:
            there = (document.parent / target).resolve() if target else document
            assert there.exists(), target
            assert document == _README or there.is_relative_to(_ROOT / "docs"), f"{target}: write {_REPOSITORY}/…"
            assert not anchor or anchor in slugs(there), f"{target}#{anchor}"


def slugs(document: Path) -> set[str]:
    """The anchors of the headings, as a forge and the site make them."""
    headings = _HEADING.findall(_FENCED.sub("", document.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
