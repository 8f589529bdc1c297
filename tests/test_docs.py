"""The reference pages say what the code has, and every page is in the navigation of the site.

`.ci/docs` builds the site; `test_readme` runs the blocks of Python and follows the links.
"""

from __future__ import annotations

import ast
import inspect
import logging
import re
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import aioresult
from aioresult import Backend, ImproperlyConfigured, exceptions
from aioresult.backends import memory, postgres, redis
from aioresult.backends.memory import MemoryBackend
from aioresult.backends.postgres import PostgresBackend
from aioresult.backends.redis import ClusterBackend, RedisBackend, SentinelBackend
from aioresult.registry import BACKEND_ALIASES

_ROOT = Path(__file__).parent.parent
_DOCS = _ROOT / "docs"
_REFERENCE = _DOCS / "reference"
_BACKENDS: dict[str, type[Backend]] = {
    "memory": MemoryBackend,
    "Redis": RedisBackend,
    "Redis Cluster": ClusterBackend,
    "Sentinel": SentinelBackend,
    "PostgreSQL": PostgresBackend,
}
#: asyncio's own, which have no docstring to show.
_CONSTANTS = {"ALL_COMPLETED", "FIRST_COMPLETED", "FIRST_EXCEPTION"}


def page(name: str) -> str:
    return (_REFERENCE / f"{name}.md").read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of the rows of all tables, without the heads."""
    lines = text.splitlines()
    found = [line for before, line in pairwise(lines) if line.startswith("| ") and before.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


def code(cell: str) -> str:
    """What a cell says, without the backticks around it."""
    return cell.strip("`")


# -- navigation -----------------------------------------------------------------------------------------------------


def in_navigation(entries: list[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        for where in entry.values():
            yield from in_navigation(where) if isinstance(where, list) else [where]


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    with (_ROOT / "zensical.toml").open("rb") as file:
        named = [where for where in in_navigation(tomllib.load(file)["project"]["nav"]) if "://" not in where]
    assert len(named) == len(set(named))
    assert set(named) == {path.relative_to(_DOCS).as_posix() for path in _DOCS.rglob("*.md")}


def test_the_tools_of_the_site_are_pinned() -> None:
    with (_ROOT / "pyproject.toml").open("rb") as file:
        needed = tomllib.load(file)["project"]["optional-dependencies"]["docs"]
    assert {each.partition("==")[0] for each in needed} == {"mkdocstrings", "mkdocstrings-python", "zensical"}
    assert all("==" in each for each in needed)


# -- the API --------------------------------------------------------------------------------------------------------


def test_each_public_name_is_in_the_reference() -> None:
    text = page("api")
    shown = re.findall(r"^::: aioresult\.(.+)$", text, re.M)
    assert len(shown) == len(set(shown))
    assert {name for name in shown if "." not in name} == set(aioresult.__all__) - _CONSTANTS
    assert all(f"`{name}`" in text for name in _CONSTANTS)
    modules = {module.__name__.removeprefix("aioresult."): set(module.__all__) for module in (memory, postgres, redis)}
    for name in ("celery", "sse"):  # without importing Celery into this process
        tree = ast.parse((_ROOT / "aioresult" / f"{name}.py").read_text(encoding="utf-8"))
        listed = next(n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
        modules[name] = set(ast.literal_eval(listed.value))
    deeper = {f"{module}.{name}" for module, names in modules.items() for name in names}
    assert {name for name in shown if "." in name} == deeper


def test_what_the_reference_hides_is_there() -> None:
    """Otherwise a method that got another name would be shown."""
    directives = re.findall(r"^::: aioresult\.(\w+)\n((?:    .*\n)+)", page("api"), re.M)
    hidden = [(name, word) for name, text in directives for word in hidden_names(text)]
    assert hidden
    # What `__init__` sets is in the source only.
    assert [
        (name, word)
        for name, word in hidden
        if not (hasattr(cls := getattr(aioresult, name), word) or f"self.{word}" in inspect.getsource(cls))
    ] == []


def hidden_names(options: str) -> list[str]:
    """The names in filters such as ``"!^(alive|beat)$"``."""
    return [name for each in re.findall(r'- "!\^\(?(.*?)\)?\$"', options) for name in each.split("|")]


# -- options --------------------------------------------------------------------------------------------------------


def options_of(cls: type[Backend]) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for base in reversed(cls.__mro__)
        if "__init__" in vars(base)
        for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def test_the_table_has_every_option_of_every_backend() -> None:
    described = {code(row[0]): row[1:] for row in rows(page("options"))}
    taken = {title: options_of(cls) for title, cls in _BACKENDS.items()}
    assert described.keys() == set().union(*taken.values())
    for name, (kind, default, unit, meaning, backends) in described.items():
        having = {title: options[name] for title, options in taken.items() if name in options}
        assert backends == ("all" if len(having) == len(_BACKENDS) else ", ".join(having)), name
        assert meaning
        for parameter in having.values():
            assert kind == " or ".join(f"`{part}`" for part in str(parameter.annotation).split(" | ")), name
            assert eval(code(default), {}) == parameter.default, name
            assert (unit == "seconds") == bool(re.search("Seconds|Timeout|float", kind)), name


# -- errors ---------------------------------------------------------------------------------------------------------


def test_the_tree_of_errors_has_every_class_under_its_base() -> None:
    found = re.findall(r"^( *)- `(\w+)`(?: \(`(\w+)`\))?: ", page("errors"), re.M)
    tree: dict[str, set[str]] = {}
    above: list[str] = []
    for indent, name, builtin in found:
        del above[len(indent) // 4 :]
        assert len(above) == len(indent) // 4, name
        assert name not in tree
        tree[name] = {*above[-1:], *filter(None, [builtin])}
        above.append(name)
    assert tree == {
        name: {base.__name__ for base in getattr(exceptions, name).__bases__ if base is not Exception}
        for name in exceptions.__all__
        if name != "RemoteTraceback"  # it is never raised
    }


# -- log messages ---------------------------------------------------------------------------------------------------


def logged() -> Iterator[tuple[str, str]]:
    """The level and the text of each message in the source."""
    for path in sorted((_ROOT / "aioresult").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner, level = ast.unparse(node.func.value), node.func.attr
                if owner.endswith("logger") and level not in ("isEnabledFor", "getEffectiveLevel"):
                    assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: a text with placeholders"
                    yield {"exception": "ERROR"}.get(level, level.upper()), str(node.args[0].value)


def test_every_log_message_is_described() -> None:
    described = [(row[0], code(row[1])) for row in rows(page("logging"))]
    assert len(described) == len(set(described))
    assert set(described) == set(logged())
    assert {level for level, _ in described} <= logging.getLevelNamesMapping().keys()


def test_there_is_one_logger() -> None:
    calls = [
        found
        for path in (_ROOT / "aioresult").rglob("*.py")
        for found in re.findall(r"getLogger\((.*)\)", path.read_text(encoding="utf-8"))
    ]
    assert set(calls) == {'"aioresult"'}


# -- URLs -----------------------------------------------------------------------------------------------------------

_TAKEN, _, _REFUSED = page("urls").partition("\n## Refused\n")


@pytest.mark.parametrize("url", [code(row[0]) for row in rows(_TAKEN)])
def test_each_url_is_taken(url: str) -> None:
    section = _TAKEN[: _TAKEN.index(f"| `{url}`")].rpartition("\n## ")[2].partition("\n")[0]
    backend = aioresult.connect(url)
    expected = _BACKENDS.get({"Memory": "memory", "Redis and Valkey": "Redis"}.get(section, section), Backend)
    assert isinstance(backend, expected)
    assert "secret" not in f"{backend!r} {backend.as_uri()}"


@pytest.mark.parametrize("url", [code(row[0]) for row in rows(_REFUSED)])
def test_each_refused_url_is_refused(url: str) -> None:
    with pytest.raises(ImproperlyConfigured):
        aioresult.connect(url)


def test_every_scheme_is_shown() -> None:
    schemes = {code(row[0]).partition("://")[0] for row in rows(_TAKEN)}
    assert schemes >= BACKEND_ALIASES.keys()
