"""Exceptions as data and back. Nothing about one can make storing it fail, and none of its data chooses what runs."""

from __future__ import annotations

import asyncio
import asyncio.exceptions
import builtins
import concurrent.futures
import gc
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import threading
import traceback
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import celery.exceptions
import pytest
from celery.utils.serialization import UnpickleableExceptionWrapper

from aioresult import ChordError, RemoteError, TaskMeta, TaskRevokedError
from aioresult.restore import load_exception
from aioresult.serialization import Codec
from aioresult.states import EXCEPTION_STATES, FAILURE, RETRY, REVOKED

HERE = __name__


def stored(exc: BaseException, status: str = FAILURE) -> Any:
    """What a server would hold of ``exc``."""
    codec = Codec()
    return codec.loads(codec.dumps_result(TaskMeta("t", status, exc)), "it")


def load(type_name: Any, module: Any = HERE, message: Any = (), status: str = FAILURE) -> Exception:
    return load_exception({"exc_type": type_name, "exc_message": message, "exc_module": module}, status, None)


def there_and_back(exc: BaseException, status: str = FAILURE) -> Exception:
    return load_exception(stored(exc, status), status, None)


class Plain(Exception):
    pass


class Outer:
    class Inner(Exception):
        pass

    class Middle:
        class Innermost(Exception):
            pass


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


class OtherArity(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")


class CannotBeMadeAgain(Exception):
    made = False

    def __init__(self, text: str) -> None:
        if CannotBeMadeAgain.made:
            raise ZeroDivisionError("not twice")
        super().__init__(text)


class Exits(CannotBeMadeAgain):
    def __init__(self, text: str) -> None:
        if CannotBeMadeAgain.made:
            sys.exit(text)
        super().__init__(text)


class NoSpace(OSError):
    """An `OSError` takes its arguments in ``__init__`` if a subclass has one, otherwise before."""

    def __init__(self, *, path: str) -> None:
        super().__init__(28, f"no space for {path}")


class HidesItsArgs(Exception):
    @property
    def args(self) -> Any:  # type: ignore[override]
        raise ZeroDivisionError("no args here")


class NeverMade(Exception):
    def __new__(cls, *args: object) -> Self:
        raise ZeroDivisionError("not even once")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError("no text either")


class Stops(StopIteration):
    pass


class Unrepresentable:
    def __repr__(self) -> str:
        raise ZeroDivisionError("no repr")


# -- the task's own class -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", sorted(EXCEPTION_STATES))
@pytest.mark.parametrize(
    "exc",
    [
        Plain(),
        Plain("text", 1, None, 2.5, ["list"], {"key": "value"}, b"\xff"),
        ValueError("text"),
        KeyError("key"),
        FileNotFoundError(2, "no such file"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        Outer.Inner("text"),
        Outer.Middle.Innermost(1),
        concurrent.futures.TimeoutError("text"),
        json.JSONDecodeError("bad", "document", 3),
    ],
    ids=repr,
)
def test_an_imported_class_comes_back_as_itself(exc: Exception, status: str) -> None:
    read = there_and_back(exc, status)
    assert type(read) is type(exc)
    assert read.args == exc.args
    assert str(read) == str(exc)


def test_it_is_stored_as_celery_stores_it() -> None:
    assert stored(Outer.Inner("text", 1)) == {"exc_type": "Outer.Inner", "exc_message": ["text", 1], "exc_module": HERE}


@pytest.mark.parametrize("exc", [KeywordOnly(code=5), OtherArity(5, "text"), NoSpace(path="/")], ids=repr)
def test_a_constructor_that_does_not_take_the_args_costs_nothing(exc: Exception) -> None:
    read = there_and_back(exc)
    assert (type(read), read.args) == (type(exc), exc.args)


@pytest.mark.parametrize("cls", [CannotBeMadeAgain, Exits])
def test_a_constructor_that_raises_costs_nothing(cls: type[CannotBeMadeAgain], monkeypatch: pytest.MonkeyPatch) -> None:
    data = stored(cls("text"))
    monkeypatch.setattr(CannotBeMadeAgain, "made", True)
    read = load_exception(data, FAILURE, None)
    assert (type(read), read.args) == (cls, ("text",))


@pytest.mark.parametrize("cls", [NeverMade, Unprintable])
def test_a_class_that_cannot_be_used_gives_its_name_to_another(cls: type[Exception]) -> None:
    read = load(cls.__name__, message=["text"])
    assert isinstance(read, RemoteError)
    assert (type(read).__name__, str(read)) == (cls.__name__, "text")


@pytest.mark.parametrize(
    ("exc", "message"),
    [
        (Plain({1}), ["{1}"]),
        (Plain("kept", object, "kept"), ["kept", "<class 'object'>", "kept"]),
        (Plain(["kept", {1}]), ["['kept', {1}]"]),
        (Plain(Unrepresentable()), ["<unprintable Unrepresentable object>"]),
        (Plain(10**5000), ["<unprintable int object>"]),
        (Unprintable("text"), ["text"]),
        (HidesItsArgs("text"), ["text"]),
        (ExceptionGroup("several", [ValueError(1)]), ["several", "[ValueError(1)]"]),
        (SystemExit(3), [3]),
    ],
    ids=lambda item: type(item).__name__,
)
def test_storing_never_fails(exc: BaseException, message: list[Any]) -> None:
    assert stored(exc)["exc_message"] == message


@pytest.mark.parametrize(("message", "args"), [("text", ("text",)), ({"a": 1}, ({"a": 1},)), (None, (None,)), ([], ())])
def test_a_message_that_is_no_list_is_the_only_argument(message: Any, args: tuple[Any, ...]) -> None:
    assert load("Plain", message=message).args == args


def test_a_missing_message_is_no_argument() -> None:
    assert load_exception({"exc_type": "Plain", "exc_module": HERE}, FAILURE, None).args == ()


def test_the_workers_traceback_is_the_cause_and_is_shown() -> None:
    exc = load_exception(stored(Plain("text")), FAILURE, "Traceback (most recent call last):\n  in the worker\n")
    with pytest.raises(Plain) as caught:
        raise exc
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.index("\n  in the worker\n") < shown.index("the direct cause of") < shown.index("Plain: text")


def test_without_a_traceback_there_is_no_cause() -> None:
    assert load("Plain").__cause__ is None


def test_a_pickled_exception_has_the_cause_too() -> None:
    assert "in the worker" in str(load_exception(Plain(), FAILURE, "in the worker").__cause__)


# -- where the class is not at hand ---------------------------------------------------------------------------------


def test_a_class_that_is_not_imported_gets_one_of_its_name() -> None:
    exc = load("Outer.CardDeclined", "shop.payments", ["4242", 1])
    cls = type(exc)
    assert isinstance(exc, RemoteError)
    assert (cls.__name__, cls.__qualname__, cls.__module__) == ("CardDeclined", "Outer.CardDeclined", "shop.payments")
    assert exc.args == ("4242", 1)
    assert "shop.payments.Outer.CardDeclined: ('4242', 1)" in "".join(traceback.format_exception(exc))


def test_it_is_the_same_class_each_time() -> None:
    classes = {type(load(name, module)) for name in ("A", "B") for module in ("one", "two") for _ in range(3)}
    assert len(classes) == 4


def test_stored_again_it_keeps_the_name_it_came_with() -> None:
    data = {"exc_type": "Outer.CardDeclined", "exc_message": ["4242"], "exc_module": "shop.payments"}
    assert stored(load_exception(data, FAILURE, None)) == data


def test_a_class_of_a_function_keeps_its_name() -> None:
    class Local(Exception):
        pass

    cls = type(there_and_back(Local("text")))
    assert issubclass(cls, RemoteError)
    assert (cls.__name__, cls.__qualname__) == ("Local", Local.__qualname__)
    assert "<locals>" in cls.__qualname__


@pytest.mark.parametrize("module", [None, "", 5, ["builtins"], {}])
@pytest.mark.parametrize("name", ["ValueError", "Outer.ValueError"])
def test_without_a_module_no_class_is_looked_for(name: str, module: Any) -> None:
    exc = load(name, module, ["text"])
    assert isinstance(exc, RemoteError)
    assert (type(exc).__name__, type(exc).__module__, str(exc)) == ("ValueError", "aioresult.exceptions", "text")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("it failed", "it failed"),
        (5, "5"),
        (["ValueError", "text"], "['ValueError', 'text']"),
        ({"error": "text"}, "{'error': 'text'}"),
        ({"exc_type": 5, "exc_module": "builtins"}, "{'exc_type': 5, 'exc_module': 'builtins'}"),
        ({"exc_type": "", "exc_module": "builtins"}, "{'exc_type': '', 'exc_module': 'builtins'}"),
        (None, "the task failed and stored no exception"),
        ({}, "the task failed and stored no exception"),
    ],
)
def test_what_describes_no_exception_is_told_as_text(data: Any, text: str) -> None:
    exc = load_exception(data, FAILURE, "in the worker")
    assert (type(exc), str(exc)) == (RemoteError, text)
    assert exc.__cause__ is not None


@pytest.mark.parametrize("name", ["x" * 10**6, "a\nb\x1b[2J", "\ud800", ".", "..", "a.", ".a", " ", "\x00"])
def test_a_name_out_of_a_store_is_made_fit_to_be_shown(name: str) -> None:
    cls = type(load(name, name))
    assert issubclass(cls, RemoteError)
    for shown in (cls.__name__, cls.__qualname__, cls.__module__):
        assert shown.isprintable()
        assert 0 < len(shown) <= 500


def test_the_classes_made_for_names_do_not_pile_up() -> None:
    for number in range(2000):
        load(f"Error{number}", "elsewhere")
    gc.collect()
    assert len(RemoteError.__subclasses__()) < 1000


# -- Celery's own ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [TaskRevokedError, ChordError])
def test_an_error_that_celery_has_too_is_caught_as_either(ours: type[Exception]) -> None:
    data = stored(ours("text"))
    assert data == {"exc_type": ours.__name__, "exc_message": ["text"], "exc_module": "celery.exceptions"}
    read = load_exception(data, FAILURE, None)
    assert isinstance(read, ours)
    assert isinstance(read, getattr(celery.exceptions, ours.__name__))
    assert read.args == ("text",)
    assert type(read) is type(load_exception(data, FAILURE, None))
    assert stored(read) == data


def test_a_subclass_of_such_an_error_is_the_users_own() -> None:
    class TaskRevokedError(ChordError):
        pass

    assert stored(TaskRevokedError())["exc_module"] == HERE


@pytest.mark.parametrize("module", [None, ModuleType("celery.exceptions")])
def test_a_celery_that_cannot_be_imported_does_not_matter(
    module: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "celery.exceptions", module)
    assert type(there_and_back(TaskRevokedError("text"))) is TaskRevokedError


def test_other_errors_of_celerys_are_celerys() -> None:
    assert type(there_and_back(celery.exceptions.Reject("why", True))) is celery.exceptions.Reject


@pytest.mark.parametrize("data", [None, {}, ""])
def test_a_revoked_task_that_stored_nothing_was_revoked_nonetheless(data: Any) -> None:
    assert type(load_exception(data, REVOKED, None)) is TaskRevokedError
    assert type(load_exception(data, RETRY, None)) is RemoteError


def test_an_exception_that_a_worker_could_not_pickle_comes_out_of_its_wrapper() -> None:
    wrapped = stored(UnpickleableExceptionWrapper.from_exception(KeywordOnly(code=5)))
    assert wrapped["exc_type"] == "UnpickleableExceptionWrapper"
    read = load_exception(wrapped, FAILURE, "in the worker")
    assert (type(read), str(read)) == (KeywordOnly, "code 5")
    assert read.__cause__ is not None


@pytest.mark.parametrize("cls", ["KeywordOnly", "NowhereToBeFound"])
def test_it_comes_out_of_its_wrapper_in_a_pickle_too(cls: str) -> None:
    wrapper = UnpickleableExceptionWrapper(HERE, cls, ["code 5"], "its repr")
    data = pickle.dumps({"status": FAILURE, "result": wrapper, "traceback": "in the worker"})
    read = Codec(accept=("json", "pickle")).decode("t", data).result
    assert (type(read).__module__, type(read).__qualname__, read.args) == (HERE, cls, ("code 5",))
    assert isinstance(read, KeywordOnly if cls == "KeywordOnly" else RemoteError)
    assert read.__cause__ is not None


@pytest.mark.parametrize(
    "message", [[], [HERE], [HERE, "Plain"], [HERE, "Plain", "text"], [HERE, "Plain", None], "text"]
)
def test_an_odd_wrapper_is_an_exception_nonetheless(message: Any) -> None:
    assert isinstance(load("UnpickleableExceptionWrapper", "celery.utils.serialization", message), Exception)


# -- attacks: see CVE-2021-23727 ------------------------------------------------------------------------------------


class Holder:
    """Not an exception; calling it leaves a trace."""

    called = False

    def __init__(self, *args: object) -> None:
        Holder.called = True


class Abort(Holder, BaseException):
    """Not an exception that a task may fail with."""


setattr(Holder, "__hidden__", ValueError)  # noqa: B010 - to be found by a walk that does not stop at such names


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """A file that must not come to be."""
    path = tmp_path / "trace"
    yield path
    assert not path.exists()
    assert not Holder.called


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("os", "system", ["touch PATH"]),
        ("os", "mkdir", ["PATH"]),
        ("builtins", "eval", ["open('PATH', 'w')"]),
        ("builtins", "exec", ["open('PATH', 'w')"]),
        ("builtins", "open", ["PATH", "w"]),
        ("builtins", "__import__", ["antigravity"]),
        ("builtins", "type", ["X", [], {}]),
        ("builtins", "object", []),
        ("subprocess", "Popen", [["touch", "PATH"]]),
        ("subprocess", "run", [["touch", "PATH"]]),
        ("pathlib", "Path.touch", ["PATH"]),
        ("zipfile", "ZipFile", ["PATH", "w"]),
        ("importlib", "import_module", ["antigravity"]),
        (HERE, "Holder", []),
        (HERE, "Abort", []),
        (HERE, "Holder.__init__", [[]]),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_but_an_exception_class_is_called(
    trace: Path, module: str, name: str, message: Any, wrapped: bool
) -> None:
    assert module in sys.modules
    message = json.loads(json.dumps(message).replace("PATH", str(trace)))
    if wrapped:
        exc = load("UnpickleableExceptionWrapper", "celery.utils.serialization", [module, name, [*message], "text"])
    else:
        exc = load(name, module, message)
    assert isinstance(exc, RemoteError)
    assert (type(exc).__module__, type(exc).__qualname__) == (module, name)
    assert "antigravity" not in sys.modules


STEERING = [
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    asyncio.CancelledError,
    StopIteration,
    StopAsyncIteration,
    Stops,
]


@pytest.mark.parametrize("cls", [BaseException, BaseExceptionGroup, *STEERING])
def test_what_would_steer_the_reader_is_only_told(cls: type[BaseException]) -> None:
    read = load(cls.__qualname__, cls.__module__, ["text"])
    assert isinstance(read, RemoteError)
    assert not isinstance(read, (StopIteration, StopAsyncIteration))
    assert (type(read).__name__, str(read)) == (cls.__name__, "text")


@pytest.mark.parametrize("cls", STEERING)
def test_out_of_a_pickle_too(cls: type[BaseException]) -> None:
    data = pickle.dumps({"status": FAILURE, "result": cls("text")})
    read = Codec(accept=("json", "pickle")).decode("t", data).result
    assert isinstance(read, RemoteError)
    assert (type(read).__qualname__, type(read).__module__) == (cls.__qualname__, cls.__module__)
    assert str(read) == "text"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "Exception.__subclasses__"),
        ("builtins", "Exception.__class__"),
        ("builtins", "Exception.mro"),
        ("builtins", "__class__"),
        ("builtins", "__build_class__"),
        ("builtins", "ValueError."),
        ("builtins", ".ValueError"),
        ("builtins", "__dict__.ValueError"),
        (HERE, "Holder.__hidden__"),
        (HERE, "Holder.called"),
        (HERE, "HERE.join"),
        (HERE, "asyncio.TimeoutError"),
        (HERE, "asyncio.exceptions.TimeoutError"),
        ("xml", "os.path.error"),
        ("os", "path.os.error"),
        ("os.error", "OSError"),
    ],
)
def test_a_walk_ends_at_modules_and_at_names_with_underscores(module: str, name: str) -> None:
    assert isinstance(load(name, module), RemoteError)


def test_no_module_is_imported() -> None:
    assert "this" not in sys.modules
    assert isinstance(load("Error", "this"), RemoteError)
    assert "this" not in sys.modules


def test_a_module_that_makes_its_names_on_demand_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    module = ModuleType("lazy_names")
    module.__getattr__ = asked.append  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy_names", module)
    assert isinstance(load("Error", "lazy_names"), RemoteError)
    assert asked == []


def test_a_module_that_is_loaded_on_demand_stays_unloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy_module.py").write_text("class Error(Exception): pass\nloaded = True\n")
    spec = importlib.util.spec_from_file_location("lazy_module", tmp_path / "lazy_module.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lazy_module", module)
    spec.loader.exec_module(module)
    assert isinstance(load("Error", "lazy_module"), RemoteError)
    assert "loaded" not in object.__getattribute__(module, "__dict__")


class LazyProxy:
    """As Celery's ``current_app``: even a look at its class makes it do something."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise ZeroDivisionError("asked")


@pytest.mark.parametrize("name", ["proxy", "proxy.Error"])
def test_a_proxy_is_not_asked_what_it_stands_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[HERE], "proxy", LazyProxy(), raising=False)
    assert isinstance(load(name), RemoteError)


@pytest.mark.parametrize("make", [lambda: None, LazyProxy, lambda: ValueError])
def test_something_else_in_the_place_of_a_module_is_passed_over(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "no_module", make())
    assert isinstance(load("Error", "no_module"), RemoteError)


@pytest.mark.parametrize(
    "module", [builtins, os, subprocess, asyncio.exceptions, concurrent.futures, threading, zipfile]
)
def test_of_all_names_in_a_module_only_its_ordinary_exceptions_are_used(module: ModuleType) -> None:
    for name, value in vars(module).items():
        exc = load(name, module.__name__, ["text"])
        if isinstance(value, type) and issubclass(value, Exception) and not name.startswith("Stop"):
            assert isinstance(exc, (value, RemoteError))
        else:
            assert isinstance(exc, RemoteError)
