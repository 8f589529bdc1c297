"""The public surface: which names there are, that they are documented, and that the drawn trees are the true ones."""

from __future__ import annotations

import asyncio
import builtins
import importlib
import inspect
import pkgutil
import re
from types import ModuleType
from typing import Any

import pytest

import aioresult
from aioresult import Backend, exceptions
from aioresult.backends.base import BackendOptions
from aioresult.backends.contract import BackendContract
from aioresult.backends.keyvalue import KeyValueStoreBackend, Op, Write
from aioresult.backends.worker import WorkerSide
from aioresult.record import Record
from aioresult.remedies import Missing

CONSTANTS = ["ALL_COMPLETED", "FIRST_COMPLETED", "FIRST_EXCEPTION"]

#: A name that comes or goes is a change that users see: it belongs into the changelog.
PUBLIC = [
    *CONSTANTS,
    "TAIL",
    "AioResultError",
    "AsyncResult",
    "Backend",
    "BackendClosedError",
    "BackendConnectionError",
    "BackendError",
    "BackendGetMetaError",
    "BackendNotOpenError",
    "BackendRefusedError",
    "BackendStats",
    "BackendStoreError",
    "Chord",
    "ChordClaimLost",
    "ChordError",
    "ConnectOptions",
    "ContentDisallowed",
    "CyclicResultError",
    "DecodeError",
    "EagerResult",
    "EncodeError",
    "GroupProgress",
    "GroupResult",
    "ImproperlyConfigured",
    "IncompleteStream",
    "InvalidCursor",
    "Keep",
    "Output",
    "OutputError",
    "OutputFull",
    "OutputGap",
    "OutputPage",
    "OutputRestarted",
    "OutputStream",
    "OutputSuperseded",
    "PerLoop",
    "ReadyChord",
    "RemoteError",
    "ResultBase",
    "ResultSet",
    "ResultTooLargeError",
    "Retry",
    "Running",
    "SerializationError",
    "StoredType",
    "TaskError",
    "TaskMeta",
    "TaskNotFoundError",
    "TaskRequest",
    "TaskRevokedError",
    "TimeoutError",
    "Updates",
    "UsageError",
    "WorkerLostError",
    "WrongEventLoopError",
    "as_completed",
    "by_name",
    "by_url",
    "connect",
    "current_task",
    "gather",
    "per_loop",
    "result_from_tuple",
    "states",
    "wait",
]

#: What the author of a backend writes. One more breaks every backend that exists.
ABSTRACT = {
    Backend: {
        "_open",
        "_close",
        "_fetch",
        "_store",
        "_delete",
        "_subscribe",
        "_unsubscribe",
        "_fetch_group",
        "_store_group",
        "_delete_group",
    },
    KeyValueStoreBackend: {"_open", "_close", "_get", "_write", "_listen", "_unlisten"},
}

MODULES = [
    importlib.import_module(info.name) for info in pkgutil.walk_packages(aioresult.__path__, f"{aioresult.__name__}.")
]


def test_the_public_names_are_these() -> None:
    assert aioresult.__all__ == PUBLIC


def test_no_public_name_is_missing_from_the_list() -> None:
    here = {
        name
        for name, value in vars(aioresult).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("aioresult")
    }
    assert here <= set(aioresult.__all__)
    assert set(exceptions.__all__) - set(aioresult.__all__) == {"RemoteTraceback"}


@pytest.mark.parametrize("module", [aioresult, *MODULES], ids=lambda module: module.__name__)
def test_what_a_module_offers_is_there_and_sorted(module: ModuleType) -> None:
    assert module.__doc__
    names = getattr(module, "__all__", [])
    assert all(hasattr(module, name) for name in names)
    # As ruff sorts: constants, then classes, then the rest.
    assert names == sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))


@pytest.mark.parametrize(
    "thing",
    [*(getattr(aioresult, name) for name in PUBLIC if not name.isupper()), KeyValueStoreBackend, Op, Write, Record],
    ids=lambda thing: thing.__name__,
)
def test_a_public_name_and_its_methods_are_documented(thing: Any) -> None:
    members = vars(thing) if isinstance(thing, type) else {}
    methods = [
        getattr(thing, name)
        for name, member in members.items()
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property))
        if not isinstance(member, Missing)
    ]
    assert [documented for documented in (thing, *methods) if not inspect.getdoc(documented)] == []


def test_the_constants_are_asyncios_own() -> None:
    for name in CONSTANTS:
        assert getattr(aioresult, name) is getattr(asyncio, name)


def drawn_tree() -> dict[str, set[str]]:
    """Each error that `aioresult.exceptions` draws, and its bases: the one it hangs on, and the one in brackets."""
    bases: dict[str, set[str]] = {}
    above: list[str] = []
    for line in (exceptions.__doc__ or "").splitlines():
        if found := re.match(r"    ((?:[│ ] {3})*)((?:[├└]── )?)(\w+)(?:  .*?)?(?:\((\w+)\))?$", line):
            depth = (len(found[1]) + len(found[2])) // 4
            del above[depth:]
            bases[found[3]] = {*above[-1:], *filter(None, [found[4]])}
            above.append(found[3])
    return bases


def test_the_tree_of_errors_is_as_drawn() -> None:
    true_tree = {
        name: {base.__name__ for base in getattr(exceptions, name).__bases__ if base is not Exception}
        for name in exceptions.__all__
        if name != "RemoteTraceback"
    }
    assert drawn_tree() == true_tree


@pytest.mark.parametrize("name", sorted(set(exceptions.__all__) & set(vars(builtins))))
def test_an_error_with_a_builtins_name_is_that_too(name: str) -> None:
    assert issubclass(getattr(exceptions, name), getattr(builtins, name))


@pytest.mark.parametrize(("cls", "at_most"), [(Backend, 10), (KeyValueStoreBackend, 6)])
def test_an_author_writes_these_methods_and_no_more(cls: type[Backend], at_most: int) -> None:
    assert cls.__abstractmethods__ == ABSTRACT[cls]
    assert len(cls.__abstractmethods__) <= at_most


def test_the_options_of_every_backend_are_typed_and_described() -> None:
    taken = {
        name
        for cls in (WorkerSide, BackendContract)
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert BackendOptions.__annotations__.keys() == taken
    assert taken <= set(re.findall(r"``(\w+)``", inspect.getdoc(Backend) or ""))
