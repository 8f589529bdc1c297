"""Finding the class of a stored exception without letting data choose what code runs.

A class is used only if it is already imported, is reached without running any code (no ``getattr``, which would let a
module's ``__getattr__`` import something), and is an ordinary `Exception`: `SystemExit`, `KeyboardInterrupt` or
`asyncio.CancelledError` out of a database must not stop the reader. See CVE-2021-23727 for what happens otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import cast

from .exceptions import AioResultError, TaskError
from .failure import CELERY, TWINS, namespace_of

__all__ = ["find_class", "why_unusable"]

#: Raised inside a coroutine, these two turn into a `RuntimeError`; a task that failed with one must not confuse us.
_CONTROL_FLOW = (StopIteration, StopAsyncIteration)
#: The names in a module. Not `vars`: a lazy module or proxy computes its ``__dict__``, and even the ``__class__`` that
#: `isinstance` looks at, and imports or connects to something on the way.
_names_in: Callable[[object], Mapping[str, object]] = vars(ModuleType)["__dict__"].__get__


def find_class(module: object, qualname: str) -> type[Exception] | str:
    """The class of that name in that module, or why there is none that may be used: the rest of a sentence."""
    if not isinstance(module, str) or not module:
        return "its module was not stored"
    found = _look_up(module, qualname)
    if module == CELERY and qualname in TWINS:
        theirs = found if isinstance(found, type) and issubclass(found, Exception) else None
        return _twin(qualname, theirs)  # type: ignore[arg-type] # mypy takes a class object for unhashable
    if isinstance(found, str):
        return found
    return why_unusable(found) or cast("type[Exception]", found)


def why_unusable(cls: type) -> str:
    """Why no instance of ``cls`` may be raised in the reader: the rest of a sentence, empty if it may.

    The classes by which this library says what became of the reader's own call are among them. A task that waited for
    another one may have failed with our `TimeoutError`. Raised here as that, it would tell the reader that the reader's
    deadline has passed.
    """
    if not issubclass(cls, BaseException):
        return "that is not an exception class"
    if not issubclass(cls, Exception):
        return "it is not an ordinary Exception, and could stop the program that reads the result"
    if issubclass(cls, _CONTROL_FLOW):
        return "raised in a coroutine, it would become a RuntimeError"
    if issubclass(cls, AioResultError) and not issubclass(cls, TaskError):
        return "the class itself would say that your own call failed, and not the task"
    return ""


def _look_up(module: str, qualname: str) -> type | str:
    if module not in sys.modules:
        return f"the module {module} is not imported in this process; import {module} before the result is read"
    found: object = sys.modules[module]
    if not issubclass(type(found), ModuleType):
        return f"{module} is not a module in this process"
    if "<locals>" in qualname:
        return "it is defined inside a function; define it at the top level of a module"
    namespace = _names_in(found)
    for part in qualname.split("."):
        found = None if part.startswith("__") else namespace.get(part)
        if found is None:
            return _missing(module)
        if not issubclass(type(found), type):
            return "that is not an exception class"
        namespace = namespace_of(found)
    return cast("type", found)


def _missing(module: str) -> str:
    if module == "__main__":
        return "__main__ is another program in this process; define the class in a module that both import"
    return f"the module {module} does not define it in this process; run the same version here and in the worker"


@cache
def _twin(name: str, theirs: type[Exception] | None) -> type[Exception]:
    """Our class; and where Celery is imported, one that ``except celery.exceptions.…`` catches too."""
    ours = TWINS[name]
    if theirs is None:
        return ours
    return type(name, (ours, theirs), {"__module__": CELERY})
