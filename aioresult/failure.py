"""Exceptions as data, and back, without ever letting data choose what code runs.

The stored form is Celery's (``Backend.prepare_exception``, 5.7)::

    {"exc_type": "CardDeclined", "exc_message": ["4242"], "exc_module": "shop.payments"}

Going in, nothing about an exception can make storing it fail: arguments that cannot be serialized become text. Coming
back, a class is used only if it is already imported, is reached without running any code (no ``getattr``, which would
let a module's ``__getattr__`` import something), and is an ordinary `Exception`: `SystemExit`, `KeyboardInterrupt`
or `asyncio.CancelledError` out of a database must not stop the reader. Everything else becomes a `RemoteError`.
See CVE-2021-23727 for what happens otherwise.
"""

from __future__ import annotations

import sys
import traceback as tracebacks
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, cast

from .exceptions import (
    AioResultError,
    ChordError,
    RemoteError,
    RemoteTraceback,
    TaskError,
    TaskRevokedError,
    UsageError,
)
from .states import REVOKED

__all__ = ["dump_exception", "load_exception", "safe_repr", "safe_text", "traceback_of"]

_CELERY = "celery.exceptions"
#: Our own classes that Celery has too: stored under Celery's name, so that its readers raise theirs.
_TWINS: Mapping[str, type[Exception]] = {"TaskRevokedError": TaskRevokedError, "ChordError": ChordError}
#: Raised inside a coroutine, these two turn into a `RuntimeError`; a task that failed with one must not confuse us.
_CONTROL_FLOW = (StopIteration, StopAsyncIteration)
_MAX_NAME = 500
#: What a Celery worker stores for an exception that pickle cannot copy. Its arguments are the module, the class name
#: and the arguments of that exception, and its text (``celery/utils/serialization.py``, 5.7).
_WRAPPER = ("celery.utils.serialization", "UnpickleableExceptionWrapper")
#: The names in a module, in a class. Not `vars`: a lazy module or proxy computes its ``__dict__``, and even the
#: ``__class__`` that `isinstance` looks at, and imports or connects to something on the way.
_MODULE_NAMESPACE: Callable[[object], Mapping[str, object]] = vars(ModuleType)["__dict__"].__get__
_CLASS_NAMESPACE: Callable[[object], Mapping[str, object]] = vars(type)["__dict__"].__get__
#: What `BaseException` itself keeps; a class may hide it behind an ``args`` of its own.
_args_of: Callable[[BaseException], tuple[Any, ...]] = vars(BaseException)["args"].__get__
#: The same for the cause: a class may refuse every attribute (a frozen dataclass does).
_set_cause: Callable[[BaseException, BaseException], None] = vars(BaseException)["__cause__"].__set__


def dump_exception(exc: BaseException, check: Callable[[Any], object]) -> dict[str, Any]:
    """``exc`` as plain data. ``check`` serializes one argument and raises if it cannot: that one becomes its repr."""
    cls = type(exc)
    module = _CELERY if _TWINS.get(cls.__name__) is cls else cls.__module__
    message = [_safe(arg, check) for arg in _args_of(exc)]
    return {"exc_type": cls.__qualname__, "exc_message": message, "exc_module": module}


def _safe(arg: Any, check: Callable[[Any], object]) -> Any:
    try:
        check(arg)
    except BaseException:  # a __json__ or __reduce__ of the user's own
        return safe_repr(arg)
    return arg


def safe_repr(value: object) -> str:
    """``repr(value)``, or a text in its place if that raises."""
    try:
        return repr(value)
    except BaseException:  # a __repr__ of the user's own
        return f"<unprintable {type(value).__qualname__} object>"


def safe_text(exc: BaseException) -> str:
    """``str(exc)``, or a text in its place if that raises."""
    try:
        return str(exc)
    except BaseException:  # a __str__ of the user's own
        return "an error without a text"


def load_exception(stored: Any, state: str, traceback: str | None) -> Exception:
    """The exception that ``stored`` describes, ready to be raised; the worker's traceback is its ``__cause__``."""
    exc = _build(stored, state)
    if traceback:
        _set_cause(exc, RemoteTraceback(traceback))
    return exc


def _build(stored: Any, state: str) -> Exception:
    if isinstance(stored, Exception) and not isinstance(stored, _CONTROL_FLOW):  # out of a pickle
        its = type(stored)
        wrapped = _unwrapped(its.__module__, its.__qualname__, _args_of(stored))
        if wrapped is not None:
            return _of_class(*wrapped)
        return _stand_in(its.__module__, its.__qualname__)(*_args_of(stored)) if _is_readers_own(its) else stored
    if isinstance(stored, Mapping):
        module, name, message = stored.get("exc_module"), stored.get("exc_type"), stored.get("exc_message", ())
        args = tuple(message) if isinstance(message, (list, tuple)) else (message,)
        module, name, args = _unwrapped(module, name, args) or (module, name, args)
        if isinstance(name, str) and name:
            return _of_class(module, name, args)
    if not stored:
        return TaskRevokedError() if state == REVOKED else RemoteError("the task failed and stored no exception")
    text = stored if isinstance(stored, str) else safe_repr(stored)
    return TaskRevokedError(text) if state == REVOKED else RemoteError(text)


def _unwrapped(module: object, name: object, args: tuple[Any, ...]) -> tuple[object, str, tuple[Any, ...]] | None:
    """The module, the class name and the arguments of the exception in Celery's wrapper, if it is one and names one."""
    if (module, name) != _WRAPPER or len(args) < 3 or not isinstance(args[2], (list, tuple)):
        return None
    return (args[0], args[1], tuple(args[2])) if isinstance(args[1], str) and args[1] else None


def _of_class(module: object, name: str, args: tuple[Any, ...]) -> Exception:
    """An instance of that class if it may be used, otherwise of a stand-in by its name."""
    cls = _find_class(module, name)
    built = None if cls is None else _instantiate(cls, args)
    return _stand_in(module, name)(*args) if built is None else built


def _find_class(module_name: object, qualname: str) -> type[Exception] | None:
    if not isinstance(module_name, str):
        return None
    found = _look_up(module_name, qualname)
    if found is not None and _is_readers_own(found):
        return None
    if module_name == _CELERY and qualname in _TWINS:
        return _twin(qualname, found)  # type: ignore[arg-type] # mypy takes a class object for unhashable
    return found


def _is_readers_own(cls: type) -> bool:
    """Whether this library raises ``cls`` to say what became of the reader's own call.

    A task that waited for another one may have failed with our `TimeoutError`. Raised here as that, it would tell the
    reader that the reader's deadline has passed.
    """
    return issubclass(cls, AioResultError) and not issubclass(cls, TaskError)


def _look_up(module_name: str, qualname: str) -> type[Exception] | None:
    found: object = sys.modules.get(module_name)
    if not issubclass(type(found), ModuleType):
        return None
    namespace = _MODULE_NAMESPACE(found)
    for part in qualname.split("."):
        found = None if part.startswith("__") else namespace.get(part)
        if not issubclass(type(found), type):
            return None
        namespace = _CLASS_NAMESPACE(found)
    cls = cast("type", found)
    return cls if issubclass(cls, Exception) and not issubclass(cls, _CONTROL_FLOW) else None


@cache
def _twin(name: str, theirs: type[Exception] | None) -> type[Exception]:
    """Our class; and where Celery is imported, one that ``except celery.exceptions.…`` catches too."""
    ours = _TWINS[name]
    if theirs is None:
        return ours
    return type(name, (ours, theirs), {"__module__": _CELERY})


def _instantiate(cls: type[Exception], args: tuple[Any, ...]) -> Exception | None:
    """An instance of ``cls`` with these arguments, by its constructor if that takes them, else around it."""
    for make in (_construct, _bypass):
        try:
            exc = make(cls, args)
            str(exc)  # half-built instances fail here rather than in somebody's log handler
        except BaseException:  # noqa: S112 - the constructor is not ours: even SystemExit must not get out of it
            continue
        if isinstance(exc, Exception):
            return exc
    return None


def _construct(cls: type[Exception], args: tuple[Any, ...]) -> Exception:
    return cls(*args)


def _bypass(cls: type[Exception], args: tuple[Any, ...]) -> Exception:
    """For constructors with a signature of their own (keyword-only, say): the type survives, and the arguments."""
    exc = cls.__new__(cls, *args)
    exc.args = args
    return exc


@lru_cache(maxsize=256)  # bounded, for the names come from outside
def _make_class(module: str, name: str) -> type[RemoteError]:
    short = name.rpartition(".")[2] or name
    return type(short, (RemoteError,), {"__module__": module, "__qualname__": name})


def _stand_in(module: object, name: str) -> type[RemoteError]:
    home = module if isinstance(module, str) and module else RemoteError.__module__
    return _make_class(_printable(home), _printable(name))


def _printable(name: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in name[:_MAX_NAME])


def traceback_of(exc: BaseException, given: str | None = None) -> str | None:
    """The traceback to store with ``exc``. Raises `UsageError` for what was never raised."""
    if not isinstance(exc, BaseException):
        raise UsageError(f"a task fails with an exception, not with {exc!r}; store_result takes any value")
    if given is not None:
        return given
    try:
        # Past an attribute of the class's own: nothing about an exception may keep it from being stored.
        raised = vars(BaseException)["__traceback__"].__get__(exc) is not None
        return "".join(tracebacks.format_exception(exc)) if raised else None
    except Exception:
        return None
