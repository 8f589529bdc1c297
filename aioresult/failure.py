"""Exceptions as data. `aioresult.restore` makes exceptions of the data again.

The stored form is Celery's (``Backend.prepare_exception``, 5.7)::

    {"exc_type": "CardDeclined", "exc_message": ["4242"], "exc_module": "shop.payments"}

Nothing about an exception can make storing it fail: an argument that cannot be serialized becomes text. What Celery's
form has no place for is stored under further keys, which Celery's readers ignore. A key is left out if there is nothing
to store under it, and everything under these keys is bounded (see the constants):

``exc_members``
    the members of an exception group, each in this form; in a member that is a group, ``exc_message`` is only its text
``exc_notes``
    its notes (PEP 678)
``exc_state``
    its public attributes whose values are plain: text, numbers, dates
``exc_text``
    ``str(exc)``, if the exception has no arguments and makes a text nonetheless
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
#: Our own classes that Celery has too: stored under Celery's name, so that its readers raise theirs.
TWINS: Mapping[str, type[Exception]] = {"TaskRevokedError": TaskRevokedError, "ChordError": ChordError}
#: How the note begins that `aioresult.restore` adds to a stand-in. It is true of that reader only, and is not stored.
STAND_IN = "aioresult: this is a stand-in for "

#: The members of a group and of the groups in it, together; and how deep the groups nest.
MAX_MEMBERS = 1000
MAX_DEPTH = 20
#: The notes of one exception, and the characters of each.
MAX_NOTES = 50
MAX_NOTE = 4000
#: The characters of ``exc_text``.
MAX_TEXT = 10_000
#: The attributes of one exception, the characters of a name, and those of a value.
MAX_ATTRIBUTES = 32
_MAX_NAME = 100
_MAX_VALUE = 1000

#: What comes back from every serializer as it was, and runs no code of anybody's when it is compared or copied.
_PLAIN = frozenset({NoneType, bool, int, float, str, Decimal, UUID, datetime, date})
_BUILTIN = frozenset(cls for cls in vars(builtins).values() if isinstance(cls, type))

# What Python itself keeps. A class may hide each behind an attribute of its own, which may run any code.
args_of: Callable[[BaseException], tuple[Any, ...]] = vars(BaseException)["args"].__get__
attributes_of: Callable[[BaseException], dict[str, Any]] = vars(BaseException)["__dict__"].__get__
message_of: Callable[[BaseException], Any] = vars(BaseExceptionGroup)["message"].__get__
members_of: Callable[[BaseException], tuple[BaseException, ...]] = vars(BaseExceptionGroup)["exceptions"].__get__
#: The names in a class, without asking its metaclass.
namespace_of: Callable[[object], Mapping[str, object]] = vars(type)["__dict__"].__get__
_filename_of: Callable[[BaseException], Any] = vars(OSError)["filename"].__get__
_filename2_of: Callable[[BaseException], Any] = vars(OSError)["filename2"].__get__

#: Serializes one value, and raises if it cannot.
Check = Callable[[Any], object]


def dump_exception(exc: BaseException, check: Check) -> dict[str, Any]:
    """``exc`` as plain data. ``check`` serializes one argument and raises if it cannot: that one becomes its repr."""
    return _dump(exc, check, 0, iter(range(MAX_MEMBERS)))


def as_celery(data: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `dump_exception` returned, only what Celery itself would store: for where the whole is too large."""
    return {key: data[key] for key in ("exc_type", "exc_message", "exc_module")}


def _dump(exc: BaseException, check: Check, depth: int, room: Iterator[int]) -> dict[str, Any]:
    """``room`` gives one item for each member that may still be stored."""
    cls = type(exc)
    module = CELERY if TWINS.get(cls.__name__) is cls else cls.__module__
    args = complete_args(exc)
    is_group = issubclass(cls, BaseExceptionGroup)
    if depth and is_group:
        args = args[:1]  # Celery's readers do not look here, and the text of each level holds that of those below
    message = [_safe(arg, check) for arg in args]
    data = {"exc_type": cls.__qualname__, "exc_message": message, "exc_module": module}
    if not message or attributes_of(exc) or is_group:  # most have none of these
        with suppress(BaseException):  # code of the user's own; what has been added until then is well-formed
            _add_extras(data, exc, check, depth, room)
    return data


def complete_args(exc: BaseException) -> tuple[Any, ...]:
    """The arguments that make ``exc`` again: those of an `OSError` lack its file names (see its ``__reduce__``)."""
    args = args_of(exc)
    if len(args) == 2 and is_a(exc, OSError) and (name := _filename_of(exc)) is not None:
        second = _filename2_of(exc)
        return (*args, _as_path(name)) if second is None else (*args, _as_path(name), None, _as_path(second))
    return args


def _as_path(name: Any) -> Any:
    try:
        return name if isinstance(name, int) else os.fspath(name)
    except BaseException:  # a __fspath__ of the user's own
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
    """The attributes to store. A stand-in keeps those that the exception came with for which it stands."""
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
    """Whether that attribute may be stored, and be set again in the ``__dict__`` of an instance of ``cls``.

    It must not stand in for anything of the class but a default value: data may not take the place of a method. A class
    that says itself what its state is (``__getstate__``, ``__setstate__``) keeps its attributes to itself.
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
    """The class of Python's own that ``cls`` is, or derives from."""
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
    except BaseException:  # a __json__ or __reduce__ of the user's own
        return safe_repr(arg)
    return arg


def is_a(exc: BaseException, cls: type[BaseException]) -> bool:
    """`isinstance`, which asks ``exc`` for its ``__class__`` if its type is another one."""
    return issubclass(type(exc), cls)


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
