"""What imports what, what is not imported until it is named, and what happens when it is not installed."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import aioresult
from aioresult.registry import BACKEND_ALIASES

PACKAGE = Path(aioresult.__file__).parent

#: Each module imports only from those above it, inside functions and under TYPE_CHECKING, too.
ORDER = [
    "states",
    "exceptions",
    "remedies",
    "record",
    "log",
    "run",
    "reading",
    "interruption",
    "meta",
    "failure",
    "classes",
    "restore",
    "compression",
    "culprit",
    "dialect",
    "serialization",
    "urls",
    "options",
    "sockets",
    "seconds",
    "tasks",
    "health",
    "retry",
    "batch",
    "waiter",
    "topic",
    "unheard",
    "source",
    "hub",
    "liveness",
    "handle",
    "existence",
    "tree",
    "lineage",
    "completion",
    "progress",
    "news",
    "following",
    "stream",
    "updates",
    "sse",
    "live",
    "result",
    "typed",
    "eager",
    "foreign",
    "joins",
    "lookout",
    "chain",
    "chord",
    "dispatch",
    "output",
    "running",
    "backends",
    "backends.contract",
    "backends.opening",
    "backends.shard",
    "backends.core",
    "backends.worker",
    "backends.reader",
    "backends.live",
    "backends.operations",
    "backends.base",
    "backends.runs",
    "backends.keyvalue",
    "backends.memory",
    "backends.redis.connection",
    "backends.redis.listener",
    "backends.redis.scripts",
    "backends.redis.node",
    "backends.redis.topology",
    "backends.redis.groups",
    "backends.redis.chords",
    "backends.redis.runs",
    "backends.redis.url",
    "backends.redis.places",
    "backends.redis.slots",
    "backends.redis.asking",
    "backends.redis.cluster",
    "backends.redis.blocking",
    "backends.redis.backend",
    "backends.redis.clustered",
    "backends.redis.sentinel",
    "backends.redis.sync",
    "backends.redis",
    "backends.postgres.schema",
    "backends.postgres.statements",
    "backends.postgres.rows",
    "backends.postgres.django",
    "backends.postgres.inspection",
    "backends.postgres.chords",
    "backends.postgres.listener",
    "backends.postgres.dsn",
    "backends.postgres.connections",
    "backends.postgres.storing",
    "backends.postgres.runs",
    "backends.postgres.cleanup",
    "backends.postgres.backend",
    "backends.postgres",
    "registry",
    "per_loop",
    "settings",
    "celery_cluster",
    "celery",
    "__init__",
]

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

OPTIONAL = ["redis", "hiredis", "asyncpg", "celery", "kombu", "msgspec", "pydantic", "backports.zstd"]


def imported(module: str) -> Iterator[str]:
    """The modules of the package that ``module`` imports, wherever in its source."""
    path = MODULES[module]
    package = ".".join(["aioresult", *path.relative_to(PACKAGE).parent.parts])
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # What is imported from a package may be one of its modules.
            within = [f"{source}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("aioresult.") in MODULES else source for name in within]
        for name in names:
            if name.partition(".")[0] == "aioresult":
                yield name.removeprefix("aioresult.") if name != "aioresult" else "__init__"


def run_without(missing: list[str], code: str) -> str:
    """What ``code`` prints in a Python of its own, in which ``missing`` cannot be imported."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\n"
    command = [sys.executable, "-W", "error", "-c", blocked + code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_order_names_every_module() -> None:
    assert sorted(ORDER) == sorted(MODULES)


def test_imports_are_found_in_every_form() -> None:
    assert {"states", "backends.base", "registry"} <= set(imported("__init__"))
    assert {"exceptions", "backends.keyvalue"} <= set(imported("backends.redis.backend"))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_those_above_it(module: str) -> None:
    assert set(imported(module)) <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("path", sorted(set(BACKEND_ALIASES.values())))
def test_the_registry_stands_below_every_backend_that_it_names(path: str) -> None:
    module = path.partition(":")[0].removeprefix("aioresult.")
    assert ORDER.index(module) < ORDER.index("registry")


MEMORY = """
import asyncio
import aioresult

async def main():
    async with aioresult.connect("memory://") as backend:
        result = backend.result("a")
        await backend.mark_as_done("a", [1, b"two"])
        await backend.mark_as_revoked("b", "no longer wanted")
        await backend.mark_as_failure("c", KeyError("key"))
        print(await result, *[await backend.result(id).get(propagate=False) for id in "bc"])

asyncio.run(main())
"""


@pytest.mark.parametrize("code", ["import aioresult", MEMORY], ids=["import", "memory"])
def test_nothing_optional_is_imported_before_it_is_named(code: str) -> None:
    printed = run_without([], f"{code}\nprint([name for name in {OPTIONAL!r} if name in sys.modules])")
    assert printed.splitlines()[-1] == "[]"


def test_memory_works_where_nothing_optional_is_installed() -> None:
    assert run_without(OPTIONAL, MEMORY) == "[1, b'two'] no longer wanted 'key'"


@pytest.mark.parametrize(
    ("missing", "call", "extra"),
    [
        ("redis", "aioresult.connect('redis://localhost')", "redis"),
        ("hiredis", "aioresult.connect('redis://localhost')", "redis"),
        ("redis", "aioresult.by_name('rediss')", "redis"),
        ("asyncpg", "aioresult.connect('postgresql://localhost/db')", "postgres"),
        ("msgspec", "aioresult.connect('memory://', accept=('json', 'msgpack'))", "msgpack"),
        ("backports.zstd", "aioresult.connect('memory://', compression='zstd')", "zstd"),
    ],
)
def test_a_missing_package_is_an_error_that_says_how_to_install_it(missing: str, call: str, extra: str) -> None:
    code = f"import aioresult\ntry:\n    {call}\nexcept aioresult.ImproperlyConfigured as exc:\n    print(exc)"
    printed = run_without([missing, "compression.zstd"], code)  # the latter is in the library of Python 3.14
    assert missing in printed
    assert f"pip install 'aioresult-tasks[{extra}]'" in printed


def test_a_release_that_is_too_old_is_an_error_that_says_how_to_get_another() -> None:
    code = "import aioresult, hiredis\ndel hiredis.PushNotification\ntry:\n    aioresult.connect('redis://')\n"
    printed = run_without([], code + "except aioresult.ImproperlyConfigured as exc:\n    print(exc)")
    assert "a newer release of the package 'hiredis'" in printed
    assert "pip install 'aioresult-tasks[redis]'" in printed


def test_without_celery_a_revoked_task_raises_our_error_and_with_it_both() -> None:
    code = """
import aioresult
from aioresult.restore import load_exception

def revoked():
    stored = {"exc_type": "TaskRevokedError", "exc_message": ["why"], "exc_module": "celery.exceptions"}
    return load_exception(stored, "REVOKED", None)

print(type(revoked()) is aioresult.TaskRevokedError, revoked(), "celery" in sys.modules)
import celery.exceptions
print(isinstance(revoked(), aioresult.TaskRevokedError), isinstance(revoked(), celery.exceptions.TaskRevokedError))
"""
    assert run_without([], code).splitlines() == ["True why False", "True True"]
