"""Finds the class of a stored exception. The stored data must never choose which code runs.

A class is used only under three conditions. CVE-2021-23727, a vulnerability of Celery, shows what happens otherwise.

- The module of the class is already imported.
- Finding the class runs no code. So this module does not use ``getattr``: the ``__getattr__`` of a module could import
  something.
- The class is an ordinary `Exception`. A `SystemExit`, `KeyboardInterrupt` or `asyncio.CancelledError` from a database
  must not stop the process that reads the result.
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

#: If a coroutine raises one of these, Python turns it into a `RuntimeError`. So a reader never raises them.
_CONTROL_FLOW = (StopIteration, StopAsyncIteration)
#: Returns the namespace of a module without running code of the module. `vars` and `isinstance` could run such code: a
#: lazy module or a proxy computes its ``__dict__``, and even its ``__class__``. It may import something or connect to a
#: server while doing so.
_names_in: Callable[[object], Mapping[str, object]] = vars(ModuleType)["__dict__"].__get__


def find_class(module: object, qualname: str) -> type[Exception] | str:
    """Find a class by its module and name. Returns the class, or the reason why no class can be used.

    The reason is a clause, such as ``"its module was not stored"``.
    """
    if not isinstance(module, str) or not module:
        return "its module was not stored"
    found = _look_up(module, qualname)
    if module == CELERY and qualname in TWINS:
        theirs = None if type(found) is str or not issubclass(cast("type", found), Exception) else found
        return _twin(qualname, theirs)
    if type(found) is str:
        return found
    return why_unusable(cast("type", found)) or cast("type[Exception]", found)


def why_unusable(cls: type) -> str:
    """Return the reason why the reader must not raise an instance of ``cls``; or an empty text if it may.

    The reason is a clause, such as ``"that is not an exception class"``. The reader must not raise most classes of this
    library, because they say what happened to the reader's own call. For instance, a task that waited for another task
    may have failed with our `TimeoutError`. If the reader raised this error, it would mean that the reader's own
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
        return "__main__ is another program in this process; define the class in a module that both programs import"
    return f"the module {module} does not define it in this process; run the same version here and in the worker"


@cache
def _twin(name: str, theirs: type[Exception] | None) -> type[Exception]:
    """Return our class with this name, such as `TaskRevokedError`.

    ``theirs`` is Celery's class with the same name, or ``None`` if Celery is not imported. With ``theirs``, return a
    subclass of both classes, so that ``except celery.exceptions.TaskRevokedError`` catches it, too.
    """
    ours = TWINS[name]
    if theirs is None:
        return ours
    return type(name, (ours, theirs), {"__module__": CELERY})
