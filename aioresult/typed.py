"""`TypedResult`: a handle that converts its value to a type that the caller names, with msgspec or pydantic.

A store holds plain data. msgspec and pydantic turn plain data into Structs, dataclasses and models, and refuse data
that does not fit. Neither package is imported before a caller names a type.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import PurePath
from typing import Any, Final, TypeVar, cast, get_args, get_type_hints

from .exceptions import DecodeError, ImproperlyConfigured, UsageError
from .failure import safe_text
from .meta import TaskMeta
from .result import AsyncResult
from .serialization import unreadable
from .states import SUCCESS
from .waiter import Outcome

__all__ = ["TypedResult"]

T = TypeVar("T")

#: How many misfits an error names at most.
_SHOWN: Final = 3
#: How msgspec's errors name a place: "Expected `int`, got `str` - at `$.rows[0].price`"; or "at `key` in `$.rows`".
_PLACE: Final = re.compile(r"(?s)(.*) - at (?:`(key|value)` in )?`\$([^`]*)`")

Converter = Callable[[Any], Any]


class TypedResult(AsyncResult[T]):
    """An `AsyncResult` that converts its value to a type. `aioresult.Backend.result` makes it with ``type``.

    The value is converted only one time. If it does not fit, every method that returns the value raises `DecodeError`;
    the state of the task stays SUCCESS. Exceptions are not converted. The ``None`` of a task that stores no
    result is not converted, either.
    """

    __slots__ = ("_convert", "_converted", "_wanted")

    def __init__(self, handle: AsyncResult[Any], wanted: type[T]) -> None:
        super().__init__(handle.id, handle.store, handle.parent, ignored=handle.ignored)
        if handle.meta is not None:  # the handle already has its outcome: Celery has run the task eagerly
            self.set_outcome(handle.meta)
        self._wanted: Any = wanted
        self._convert = _converter(wanted)
        #: The meta whose value was converted, and the converted value.
        self._converted: tuple[TaskMeta, T] | None = None

    def _value_or_raise(self, outcome: Outcome | None, propagate: bool) -> T:
        value = super()._value_or_raise(outcome, propagate)
        if isinstance(outcome, TaskMeta) and outcome.status == SUCCESS:
            return self._fitting(outcome, value)
        return value

    def value(self) -> Any:
        value, meta = super().value(), self.meta
        return value if meta is None or meta.status != SUCCESS else self._fitting(meta, value)

    def _fitting(self, meta: TaskMeta, value: Any) -> T:
        kept = self._converted
        if kept is not None and kept[0] is meta:
            return kept[1]
        converted = value
        if not (isinstance(self._wanted, type) and type(value) is self._wanted):  # perhaps a `StoredType` has made it
            try:
                converted = self._convert(value)
            except _Unfit as exc:
                raise DecodeError(
                    f"the result of task {self.id} does not fit type={_named(self._wanted)}: {exc}"
                ) from exc.__cause__
            except BaseException as exc:  # a validator of the user may raise anything
                error = unreadable(f"the result of task {self.id} as type={_named(self._wanted)}", exc)
                raise error from exc
        self._converted = meta, converted
        return cast("T", converted)


class _Unfit(Exception):
    """Raised if the data does not fit the type. The text says where; the cause is the error of msgspec or pydantic."""


def _named(wanted: Any) -> str:
    return wanted.__qualname__ if isinstance(wanted, type) else repr(wanted)


def _converter(wanted: Any) -> Converter:
    """Return a function that converts plain data to ``wanted``, or raises `_Unfit`."""
    try:
        return _cached(wanted)
    except TypeError as exc:
        if "unhashable" not in str(exc):
            raise
    return _build(wanted)


def _build(wanted: Any) -> Converter:
    if _is_pydantics(wanted):
        return _by_pydantic(wanted)
    try:
        import msgspec
    except ImportError:
        return _by_pydantic(wanted)
    return _by_msgspec(wanted, msgspec)


#: Building a converter is slow, and a service names few types.
_cached = lru_cache(maxsize=256)(_build)


def _by_msgspec(wanted: Any, msgspec: Any) -> Converter:
    try:
        msgspec.json.Decoder(wanted)
    except Exception as exc:
        raise UsageError(f"msgspec cannot convert to type={_named(wanted)}: {safe_text(exc)}") from exc

    def convert(value: Any) -> Any:
        try:
            # The keys of a JSON object are always texts: let msgspec convert them.
            return msgspec.convert(value, wanted, str_keys=True, dec_hook=_of_text)
        except msgspec.ValidationError as exc:
            found = _PLACE.fullmatch(str(exc))
            what, part, path = found.groups() if found else (str(exc), None, "")
            place = f"result{path.replace('[...]', '[…]')}"
            raise _Unfit(f"{f'a {part} of ' if part else ''}{place}: {what}") from exc

    return convert


def _of_text(wanted: Any, value: Any) -> Any:
    """Convert a value to a class that msgspec does not know. msgspec calls this."""
    if isinstance(wanted, type) and isinstance(value, wanted):
        return value
    if isinstance(wanted, type) and issubclass(wanted, PurePath) and isinstance(value, str):
        return wanted(value)
    raise TypeError(f"Expected `{_named(wanted)}`, got `{type(value).__qualname__}`")


def _by_pydantic(wanted: Any) -> Converter:
    try:
        from pydantic import TypeAdapter, ValidationError
    except ImportError:
        raise ImproperlyConfigured(
            f"type={_named(wanted)} needs msgspec, or pydantic 2 or later; install one of them with: "
            f"pip install 'aioresult-tasks[msgpack]', or pip install 'pydantic>=2'"
        ) from None
    try:
        adapter = TypeAdapter(wanted)
    except Exception as exc:
        raise UsageError(f"pydantic cannot convert to type={_named(wanted)}: {safe_text(exc)}") from exc

    def convert(value: Any) -> Any:
        try:
            return adapter.validate_python(value)
        except ValidationError as exc:
            errors = exc.errors(include_url=False, include_context=False, include_input=False)
            said = "; ".join(f"{_place(error['loc'])}: {error['msg']}" for error in errors[:_SHOWN])
            raise _Unfit(f"{said}; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else said) from exc

    return convert


def _place(steps: tuple[int | str, ...]) -> str:
    shown = (f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{step!r}]" for step in steps)
    return f"result{''.join(shown)}"


def _is_pydantics(wanted: Any) -> bool:
    """True if ``wanted`` is, or contains, a class of pydantic, which msgspec does not know."""
    return any(
        hasattr(each, "__get_pydantic_core_schema__") or hasattr(each, "__pydantic_validator__")
        for each in _types_in(wanted)
    )


def _types_in(wanted: Any) -> Iterator[Any]:
    """Yield ``wanted`` and, in turn, its type arguments and the types of its fields."""
    found: list[Any] = []
    left = [wanted]
    while left:
        each = left.pop()
        if any(each is known for known in found):
            continue
        found.append(each)
        yield each
        left += get_args(each)
        if isinstance(each, type) and (dataclasses.is_dataclass(each) or hasattr(each, "__total__")):  # a TypedDict
            with suppress(Exception):  # a name cannot be resolved: msgspec or pydantic raises an error about it
                left += get_type_hints(each, include_extras=True).values()
