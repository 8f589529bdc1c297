"""Turns stored data into exceptions: data from `aioresult.failure`, from Celery, or from any other program.

`aioresult.classes` finds the class. If the class cannot be used, or no instance can be built, a *stand-in* takes its
place: a `RemoteError` of the same name, with a note that gives the reason. All data counts as hostile. Its size has
limits, and it never chooses which code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, cast

from .classes import find_class, why_unusable
from .exceptions import RemoteError, RemoteTraceback, TaskRevokedError
from .failure import (
    MAX_ATTRIBUTES,
    MAX_DEPTH,
    MAX_MEMBERS,
    MAX_NOTE,
    MAX_NOTES,
    MAX_TEXT,
    STAND_IN,
    args_of,
    attributes_of,
    complete_args,
    is_a,
    is_attribute,
    members_of,
    message_of,
    nearest_builtin,
    safe_repr,
    safe_text,
)
from .states import REVOKED

__all__ = ["load_exception"]

_MAX_NAME = 500
#: The most characters of an error's text in a note.
_MAX_REASON = 200
#: A Celery worker stores this wrapper for an exception that pickle cannot copy. Its arguments are the module, the class
#: name, the arguments and the text of that exception (``celery/utils/serialization.py``, 5.7).
_WRAPPER = ("celery.utils.serialization", "UnpickleableExceptionWrapper")
#: Sets ``__cause__`` without calling ``__setattr__`` of the class, which may refuse it, as in a frozen dataclass.
_set_cause: Callable[[BaseException, BaseException], None] = vars(BaseException)["__cause__"].__set__
_NOTHING: Mapping[str, Any] = {}


def load_exception(stored: Any, state: str, traceback: str | None) -> Exception:
    """Build the exception that ``stored`` describes, to be raised. Its ``__cause__`` holds the worker's traceback.

    ``stored`` is the data from the store. ``state`` is the task's state: if nothing is stored, REVOKED gives
    `TaskRevokedError`, and any other state gives `RemoteError`.
    """
    exc = _build(stored, state)
    if traceback:
        _set_cause(exc, RemoteTraceback(traceback))
    return exc


def _build(stored: Any, state: str) -> Exception:
    if isinstance(stored, BaseException):
        return _of_pickled(stored)
    if isinstance(stored, Mapping) and (described := _of_mapping(stored)) is not None:
        return described
    revoked = state == REVOKED
    if not stored:
        return TaskRevokedError() if revoked else RemoteError("the task failed and stored no exception")
    exc: Exception
    try:
        exc = TaskRevokedError(stored) if revoked else RemoteError(stored)
        str(exc)
    except BaseException:  # the __repr__ of an unpickled object may raise anything
        exc = TaskRevokedError(safe_repr(stored)) if revoked else RemoteError(safe_repr(stored))
    if isinstance(exc, RemoteError):
        exc.stored = stored
    return exc


def _of_mapping(stored: Mapping[str, Any]) -> Exception | None:
    """Return the exception that ``stored`` describes; ``None`` if it describes none."""
    module, name, message = stored.get("exc_module"), stored.get("exc_type"), stored.get("exc_message", ())
    args = tuple(message) if isinstance(message, (list, tuple)) else (message,)
    if (wrapped := _unwrapped(module, name, args)) is not None:
        return _of_class(*wrapped, _NOTHING)
    if not isinstance(name, str) or not name:
        return None
    return _of_class(module, name, args, stored)


def _unwrapped(module: object, name: object, args: tuple[Any, ...]) -> tuple[object, str, tuple[Any, ...]] | None:
    """Return module, class name and arguments of the exception in Celery's wrapper; ``None`` if this is no wrapper."""
    if (module, name) != _WRAPPER or len(args) < 3 or not isinstance(args[2], (list, tuple)):
        return None
    return (args[0], args[1], tuple(args[2])) if isinstance(args[1], str) and args[1] else None


def _of_class(module: object, name: str, args: tuple[Any, ...], stored: Mapping[str, Any]) -> Exception:
    """Return an instance of the class ``name`` if it can be used, otherwise a `RemoteError` of that name."""
    found = find_class(module, name)
    is_group = (
        "exc_members" in stored
        and (type(found) is str or issubclass(cast("type", found), BaseExceptionGroup))
        and _are_members(stored["exc_members"])
    )
    if is_group:
        members = [_build(member, "") for member in stored["exc_members"]]
        args = (args[0] if args and isinstance(args[0], str) else "", members)
    # `isinstance` would ask an exception for its ``__class__``, and a class may answer with an error.
    built = found if type(found) is str else _instantiate(cast("type[Exception]", found), args, stored)
    if type(built) is str:
        return _stand_in(module, name, args, built, stored, is_group)
    built = cast("Exception", built)
    if "exc_notes" in stored:
        _restore_notes(built, stored["exc_notes"])
    return built


def _are_members(members: object) -> bool:
    """True if ``members`` can be the members of a group. Also checks their number and depth, before any is built."""
    if not isinstance(members, (list, tuple)) or not members:
        return False
    count, level = 0, [members]
    for _ in range(MAX_DEPTH):
        below = []
        for each in level:
            count += len(each)
            if count > MAX_MEMBERS:
                return False
            for member in each:
                if not isinstance(member, Mapping) or not isinstance(member.get("exc_type"), str):
                    return False
                if isinstance(deeper := member.get("exc_members"), (list, tuple)):
                    below.append(deeper)
        level = below
    return not level


def _of_pickled(exc: BaseException) -> Exception:
    cls = type(exc)
    args = args_of(exc)
    wrapped = _unwrapped(cls.__module__, cls.__qualname__, args)
    if wrapped is not None:
        return _of_class(*wrapped, _NOTHING)
    reason = why_unusable(cls)
    is_group = is_a(exc, BaseExceptionGroup)
    if is_group:
        members = members_of(exc)
        usable = [_of_pickled(member) for member in members]
        if not reason and all(one is other for one, other in zip(members, usable, strict=True)):
            return exc  # type: ignore[return-value] # an Exception: `why_unusable` accepts no other class
        args = (message_of(exc), usable)
        reason = reason or "some of its members may not be raised here"
    elif not reason:
        return exc  # type: ignore[return-value]
    as_stored = {"exc_notes": attributes_of(exc).get("__notes__")}
    return _stand_in(cls.__module__, cls.__qualname__, args, reason, as_stored, is_group)


# -- instances ------------------------------------------------------------------------------------------------------


def _instantiate(cls: type[Exception], args: tuple[Any, ...], stored: Mapping[str, Any]) -> Exception | str:
    """Return an instance of ``cls`` with the arguments ``args``. If none can be made, return the reason, as a clause.

    Some constructors pass other arguments to ``super().__init__()`` than they get, such as a message made of them. Only
    the passed-on arguments are stored, and they would be wrong for the constructor. In that case the instance is made
    without calling the constructor. If that fails, the instance from the constructor is better than none.
    """
    reason, spare = "", None
    for make in (_construct, _bypass):
        try:
            exc = make(cls, args)
            if "exc_state" in stored:
                _restore_state(exc, stored["exc_state"])
            # Log handlers use the text and the notes. If the instance is incomplete, it must fail here.
            text = str(exc)[:MAX_TEXT]
            getattr(exc, "__notes__", None)
            if not is_a(exc, Exception):
                raise TypeError(f"it made a {type(exc).__qualname__}")
            if not args and stored.get("exc_text", text) != text:
                raise ValueError("its text differs from the stored text")
            if make is _bypass or _keeps(exc, args):
                return exc
            spare = exc
        except BaseException as error:  # the user's constructor may raise anything; not even a SystemExit may escape
            reason = reason or f"{type(error).__name__}: {safe_text(error)[:_MAX_REASON]}"
    if spare is not None:
        return spare
    if issubclass(cls, BaseExceptionGroup):
        return f"its members were stored as text, or there are none ({reason})"
    remedy = (
        "" if nearest_builtin(cls) is cls else "; let its constructor pass all of its arguments to super().__init__()"
    )
    return f"it cannot be built from the stored arguments ({reason}){remedy}"


def _construct(cls: type[Exception], args: tuple[Any, ...]) -> Exception:
    return cls(*args)


def _bypass(cls: type[Exception], args: tuple[Any, ...]) -> Exception:
    """Make an instance without calling the constructor of ``cls``, which may, for example, take only keywords."""
    base = nearest_builtin(cls)
    exc: Exception = base.__new__(cls, *args) if issubclass(cls, BaseExceptionGroup) else cls.__new__(cls, *args)
    base.__init__(exc, *args)
    return exc


def _keeps(exc: Exception, args: tuple[Any, ...]) -> bool:
    """True if ``exc`` has the arguments ``args``. A tuple and a list count as equal: JSON stores tuples as lists."""
    if is_a(exc, BaseExceptionGroup):
        return bool(message_of(exc) == args[0]) and list(members_of(exc)) == args[1]
    own = complete_args(exc)
    return own == args or _as_lists(own) == _as_lists(args)


def _as_lists(args: tuple[Any, ...]) -> list[Any]:
    return [list(arg) if isinstance(arg, tuple) else arg for arg in args]


def _restore_state(exc: Exception, state: object) -> None:
    """Set the stored attributes. Bypasses ``__setattr__`` and properties, so that data cannot choose what runs."""
    if isinstance(state, dict) and len(state) <= MAX_ATTRIBUTES:
        cls = type(exc)
        attributes_of(exc).update({key: value for key, value in state.items() if is_attribute(cls, key, value)})


def _restore_notes(exc: Exception, notes: object, *more: str) -> None:
    """Give ``exc`` the stored notes and ``more``, in a new list that no other exception shares."""
    own = notes[:MAX_NOTES] if isinstance(notes, (list, tuple)) else ()
    attributes_of(exc)["__notes__"] = [*(note[:MAX_NOTE] for note in own if type(note) is str), *more]


# -- stand-ins ------------------------------------------------------------------------------------------------------


def _stand_in(
    module: object, name: str, args: tuple[Any, ...], reason: str, stored: Mapping[str, Any], is_group: bool
) -> Exception:
    """Return a `RemoteError` whose class has this name, with the ``reason`` in a note.

    If ``is_group`` is true, it is an `ExceptionGroup`, too.
    """
    home = _printable(module) if isinstance(module, str) and module else RemoteError.__module__
    shown = _printable(name)
    exc = _make_class(home, shown, is_group)(*args)
    exc.stored = stored if "exc_type" in stored else None
    text = stored.get("exc_text")
    if isinstance(text, str) and not args:
        exc._text = text[:MAX_TEXT]
    _restore_notes(exc, stored.get("exc_notes"), _printable(f"{STAND_IN}{home}.{shown}: {reason}", 2000))
    return exc


@lru_cache(maxsize=256)  # bounded, because the names come from outside
def _make_class(module: str, name: str, is_group: bool) -> type[RemoteError]:
    short = name.rpartition(".")[2] or name
    bases = (RemoteError, ExceptionGroup) if is_group else (RemoteError,)
    return type(short, bases, {"__module__": module, "__qualname__": name})


def _printable(text: str, limit: int = _MAX_NAME) -> str:
    return "".join(char if char.isprintable() else "?" for char in text[:limit])
