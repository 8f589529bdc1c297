"""Turns exceptions into data that can be stored. `aioresult.restore` turns the data into exceptions again.

The stored form is Celery's (``Backend.prepare_exception``, 5.7)::

    {"exc_type": "CardDeclined", "exc_message": ["4242"], "exc_module": "shop.payments"}

Storing an exception never fails because of the exception: an argument that cannot be serialized becomes text. Celery's
form does not hold everything. The rest is stored under the following keys, which Celery's readers ignore. A key is
omitted if there is nothing to store under it. The constants of this module limit what is stored under these keys:

``exc_members``
    the members of an exception group, each in this form; if a member is a group, its ``exc_message`` is only its text
``exc_notes``
    the notes of the exception (PEP 678)
``exc_state``
    the public attributes of the exception whose values are plain: text, numbers, dates
``exc_text``
    ``str(exc)``, if the exception has no arguments and its text is not empty
"""

from __future__ import annotations

import builtins
import os
import traceback as tracebacks
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime
from decimal import Decimal
from itertools import islice
from types import NoneType
from typing import Any, cast
from uuid import UUID

from .exceptions import ChordError, RemoteError, TaskRevokedError, UsageError

__all__ = [
    "CELERY",
    "MAX_ATTRIBUTES",
    "MAX_DEPTH",
    "MAX_MEMBERS",
    "MAX_NOTE",
    "MAX_NOTES",
    "MAX_TEXT",
    "STAND_IN",
    "TWINS",
    "args_of",
    "as_celery",
    "attributes_of",
    "complete_args",
    "dump_exception",
    "is_a",
    "is_attribute",
    "members_of",
    "message_of",
    "namespace_of",
    "nearest_builtin",
    "safe_repr",
    "safe_text",
    "traceback_of",
]

CELERY = "celery.exceptions"
#: The classes of this library that Celery has, too. They are stored under Celery's module, so that Celery's readers
#: raise Celery's classes.
TWINS: Mapping[str, type[Exception]] = {"TaskRevokedError": TaskRevokedError, "ChordError": ChordError}
#: The beginning of the note that `aioresult.restore` adds to a stand-in. A stand-in is an exception that replaces an
#: exception whose class cannot be used. Such a note applies to one reader only, so it is never stored.
STAND_IN = "aioresult: this is a stand-in for "

#: The most members of an exception group that are stored, including the members of groups in it.
MAX_MEMBERS = 1000
#: The deepest nesting of exception groups that is stored.
MAX_DEPTH = 20
#: The most notes of one exception that are stored.
MAX_NOTES = 50
#: The most characters of a note that are stored.
MAX_NOTE = 4000
#: The most characters of ``exc_text``.
MAX_TEXT = 10_000
#: The most attributes of one exception that are stored.
MAX_ATTRIBUTES = 32
#: An attribute with a longer name, in characters, is not stored.
_MAX_NAME = 100
#: An attribute whose value is a longer text, in characters, is not stored.
_MAX_VALUE = 1000

#: The types whose values every serializer returns unchanged. Comparing or copying them runs no code of the user.
_PLAIN = frozenset({NoneType, bool, int, float, str, Decimal, UUID, datetime, date})
_BUILTIN = frozenset(cls for cls in vars(builtins).values() if isinstance(cls, type))

# These functions read an attribute of an exception directly from Python's own class. `exc.args` would not be safe: the
# exception's class may override `args` with a property that runs any code.
args_of: Callable[[BaseException], tuple[Any, ...]] = vars(BaseException)["args"].__get__
attributes_of: Callable[[BaseException], dict[str, Any]] = vars(BaseException)["__dict__"].__get__
message_of: Callable[[BaseException], Any] = vars(BaseExceptionGroup)["message"].__get__
members_of: Callable[[BaseException], tuple[BaseException, ...]] = vars(BaseExceptionGroup)["exceptions"].__get__
#: Returns the namespace of a class without running code of its metaclass.
namespace_of: Callable[[object], Mapping[str, object]] = vars(type)["__dict__"].__get__
_filename_of: Callable[[BaseException], Any] = vars(OSError)["filename"].__get__
_filename2_of: Callable[[BaseException], Any] = vars(OSError)["filename2"].__get__

#: A function that serializes one value, and raises if the value cannot be serialized.
Check = Callable[[Any], object]


def dump_exception(exc: BaseException, check: Check) -> dict[str, Any]:
    """Turn ``exc`` into plain data that can be stored.

    ``check`` is a function that serializes one value. If it raises for an argument of ``exc``, the ``repr()`` of the
    argument is stored instead.
    """
    return _dump(exc, check, 0, iter(range(MAX_MEMBERS)))


def as_celery(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of ``data`` that Celery itself would store. Used for results that are too large.

    ``data`` is a return value of `dump_exception`.
    """
    return {key: data[key] for key in ("exc_type", "exc_message", "exc_module")}


def _dump(exc: BaseException, check: Check, depth: int, room: Iterator[int]) -> dict[str, Any]:
    """Turn ``exc`` into plain data; see `dump_exception`.

    ``depth`` is the number of exception groups around ``exc``. ``room`` yields one item for each member of a group that
    may still be stored.
    """
    cls = type(exc)
    module = CELERY if TWINS.get(cls.__name__) is cls else cls.__module__
    args = complete_args(exc)
    is_group = issubclass(cls, BaseExceptionGroup)
    if depth and is_group:
        args = args[:1]  # only the group's text: its members are stored under `exc_members`
    message = [_safe(arg, check) for arg in args]
    data = {"exc_type": cls.__qualname__, "exc_message": message, "exc_module": module}
    if not message or attributes_of(exc) or is_group:  # false for most exceptions, which saves time
        with suppress(BaseException):  # the call may run code of the user; if it raises, `data` is still well-formed
            _add_extras(data, exc, check, depth, room)
    return data


def complete_args(exc: BaseException) -> tuple[Any, ...]:
    """Return all arguments that are needed to build ``exc`` again.

    They are ``exc.args``, and the file names of an `OSError`, which its ``args`` lack (see ``OSError.__reduce__``).
    """
    args = args_of(exc)
    if len(args) == 2 and is_a(exc, OSError) and (name := _filename_of(exc)) is not None:
        second = _filename2_of(exc)
        return (*args, _as_path(name)) if second is None else (*args, _as_path(name), None, _as_path(second))
    return args


def _as_path(name: Any) -> Any:
    try:
        return name if isinstance(name, int) else os.fspath(name)
    except BaseException:  # from the user's __fspath__
        return name


def _add_extras(data: dict[str, Any], exc: BaseException, check: Check, depth: int, room: Iterator[int]) -> None:
    attributes = attributes_of(exc)
    if notes := _notes(attributes.get("__notes__"), check):
        data["exc_notes"] = notes
    if state := _state(exc, attributes, check):
        data["exc_state"] = state
    if is_a(exc, BaseExceptionGroup):
        if depth < MAX_DEPTH:
            _add_members(data, members_of(exc), check, depth, room)
    elif not data["exc_message"] and type(exc).__str__ is not BaseException.__str__:
        text = str(exc)[:MAX_TEXT]
        if text:
            data["exc_text"] = _safe(text, check)


def _add_members(
    data: dict[str, Any], members: Sequence[BaseException], check: Check, depth: int, room: Iterator[int]
) -> None:
    stored = [_dump(member, check, depth + 1, room) for member, _ in zip(members, room, strict=False)]
    if stored:
        data["exc_members"] = stored
    if stored and len(stored) < len(members):
        note = f"aioresult: {len(members) - len(stored)} more members of this group were not stored"
        data.setdefault("exc_notes", []).append(note)


def _notes(notes: object, check: Check) -> list[str]:
    if type(notes) not in (list, tuple):
        return []
    own = (note for note in cast("Sequence[Any]", notes) if type(note) is str and not note.startswith(STAND_IN))
    return [_safe(note[:MAX_NOTE], check) for note in islice(own, MAX_NOTES)]


def _state(exc: BaseException, attributes: Mapping[str, Any], check: Check) -> dict[str, Any]:
    """Return the attributes to store. For a stand-in, these are the stored attributes of the original exception."""
    cls = type(exc)
    if is_a(exc, RemoteError):
        origin = attributes.get("stored")
        kept = origin.get("exc_state") if isinstance(origin, Mapping) else None
        attributes = kept if isinstance(kept, Mapping) else {}
    return {
        name: value
        for name, value in islice(attributes.items(), MAX_ATTRIBUTES)
        if is_attribute(cls, name, value) and _passes(value, check)
    }


def is_attribute(cls: type[BaseException], name: object, value: object) -> bool:
    """True if this attribute may be stored, and later be set in the ``__dict__`` of an instance of ``cls``.

    If the class has an attribute with this name, that must be a plain default value. So stored data never replaces a
    method. No attribute is stored if the class defines its own state with ``__getstate__`` or ``__setstate__``.
    """
    if type(name) is not str or name.startswith("_") or not name.isidentifier() or len(name) > _MAX_NAME:
        return False
    if type(value) not in _PLAIN or (type(value) is str and len(value) > _MAX_VALUE):
        return False
    own = [namespace_of(base) for base in cls.__mro__ if base not in _BUILTIN]
    if any("__getstate__" in namespace or "__setstate__" in namespace for namespace in own):
        return False
    holder = next((namespace for namespace in map(namespace_of, cls.__mro__) if name in namespace), None)
    return holder is None or type(holder[name]) in _PLAIN


def nearest_builtin(cls: type[BaseException]) -> type[BaseException]:
    """Return ``cls`` if it is a builtin class; otherwise the nearest builtin class that it derives from."""
    return next(base for base in cls.__mro__ if base in _BUILTIN)


def _passes(value: Any, check: Check) -> bool:
    try:
        check(value)
    except BaseException:
        return False
    return True


def _safe(arg: Any, check: Check) -> Any:
    try:
        check(arg)
    except BaseException:  # from the user's __json__ or __reduce__
        return safe_repr(arg)
    return arg


def is_a(exc: BaseException, cls: type[BaseException]) -> bool:
    """True if the type of ``exc`` derives from ``cls``. `isinstance` could run code: it also reads ``__class__``."""
    return issubclass(type(exc), cls)


def safe_repr(value: object) -> str:
    """Return ``repr(value)``, or a fixed text if ``repr`` raises."""
    try:
        return repr(value)
    except BaseException:  # from the user's __repr__
        return f"<unprintable {type(value).__qualname__} object>"


def safe_text(exc: BaseException) -> str:
    """Return ``str(exc)``, or a fixed text if ``str`` raises."""
    try:
        return str(exc)
    except BaseException:  # from the user's __str__
        return "an error without a text"


def traceback_of(exc: BaseException, given: str | None = None) -> str | None:
    """Return the traceback to store with ``exc``: the text ``given``, or the formatted traceback of ``exc``.

    Returns ``None`` if nothing is given and ``exc`` was never raised. Raises `UsageError` if ``exc`` is not an
    exception.
    """
    if not isinstance(exc, BaseException):
        raise UsageError(f"a task fails with an exception, not with {exc!r}; to store any value, call store_result")
    if given is not None:
        return given
    try:
        # The class may override `__traceback__`, and reading it could raise. So read it from Python's own class.
        raised = vars(BaseException)["__traceback__"].__get__(exc) is not None
        return "".join(tracebacks.format_exception(exc)) if raised else None
    except Exception:
        return None
