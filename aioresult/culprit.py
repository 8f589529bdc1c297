"""Explains why a value cannot be stored: the path to the part at fault, and what to do about it.

This module runs only after a serializer has failed. Then `explain` walks through the value in the order of the
serializer, and stops at the first part that the serializer cannot write. It calls the same functions as the serializer,
so a user's ``__json__`` may be called a second time. The walk blocks the event loop, so its time and the number of
parts that it visits are limited.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from datetime import timedelta
from enum import Enum
from os import PathLike
from time import monotonic
from types import CoroutineType, GeneratorType, NoneType
from typing import Any, Final, NamedTuple

from .failure import safe_text

__all__ = ["Grammar", "UnknownType", "explain"]

_MAX_PARTS: Final = 50_000
_MAX_SECONDS: Final = 0.1
#: How many steps of a long path are shown from its beginning, and how many from its end. The middle is left out.
_SHOWN_STEPS: Final = 10
#: The most characters of a dict's key that a path shows.
_SHOWN_KEY: Final = 60

_MARKERS = {"__type__", "__value__"}


class UnknownType(TypeError):
    """No function turns ``value`` into a value that the serializer can write."""

    def __init__(self, value: object) -> None:
        super().__init__(f"it holds {_an_object(value)}")
        self.value = value


class Grammar(NamedTuple):
    """Describes to `explain` what a serializer can write, and how it writes."""

    serializer: str
    #: The classes that the serializer writes by itself, including their subclasses, but without containers.
    scalars: tuple[type, ...]
    #: The classes that the serializer allows for the keys of a dict.
    keys: tuple[type, ...]
    #: Writes a value, or raises.
    write: Callable[[Any], bytes]
    #: Takes the bytes that `write` has returned, and raises if no reader could read them.
    check: Callable[[bytes], object] | None = None
    #: Takes a value of an unknown type, and returns the value to write instead. ``None``: every type is known.
    replace: Callable[[Any], Any] | None = None
    #: Returns the name of the function that `replace` calls for a value, and how a path shows that call. For instance
    #: ``("its __json__", "{}.__json__()")``.
    replaced_by: Callable[[Any], tuple[str, str]] | None = None
    #: True if the caller cannot choose another serializer.
    fixed: bool = False


def explain(roots: Mapping[str, Any], grammar: Grammar, error: BaseException) -> str:
    """Return why writing the values of ``roots`` raised ``error``, as a clause that completes an error message.

    ``roots`` maps the name of each value, which begins the path, to the value.
    """
    try:
        found = _Search(grammar).search(roots)
    except KeyboardInterrupt:
        raise
    except BaseException:  # a class of the user may raise anything in any method
        found = None
    if found is not None:
        return found
    if isinstance(error, UnknownType):
        return f"it holds {_an_object(error.value)}; {_remedy(type(error.value), grammar)}"
    return "it nests too deeply" if isinstance(error, RecursionError) else safe_text(error) or type(error).__name__


#: The return value of `_Search._by` if it cannot find out which function replaced a value.
_UNKNOWN = ("its class", "{}")


class _Gone(Exception):
    """Ends the walk, because it has reached its limit of parts or of time."""


class _Step(NamedTuple):
    """One step of a path: from a value to a part of the value, or to the value that is written in its place."""

    #: The key or the index of the part. Not used with a `template`.
    key: object = None
    #: How the path shows the replacement of a value, such as ``{}.__json__()``.
    template: str | None = None


class _Frame(NamedTuple):
    """A value whose parts the walk visits. It keeps the value alive, because `_Search` stores the value's ``id()``."""

    value: Any
    parts: Iterator[tuple[_Step, Any]]


class _Search:
    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._steps: list[_Step] = []
        self._root = ""
        #: The ``id()`` of each value that contains the present value → how many steps lead to that value.
        self._around: dict[int, int] = {}
        self._left = _MAX_PARTS
        self._end = monotonic() + _MAX_SECONDS

    def search(self, roots: Mapping[str, Any]) -> str | None:
        try:
            for self._root, value in roots.items():
                if (found := self._search_in(value)) is not None:
                    return found
        except _Gone:
            pass
        return None

    def _search_in(self, value: Any) -> str | None:
        self._steps, self._around = [], {}
        frames: list[_Frame] = []
        met = self._meet(value)
        while True:
            if isinstance(met, str):
                return met
            if met is None:
                if self._steps:
                    self._steps.pop()
            else:
                self._around[id(value)] = len(self._steps)
                frames.append(_Frame(value, met))
            while frames:
                part = next(frames[-1].parts, None)
                if part is not None:
                    break
                del self._around[id(frames.pop().value)]
                if self._steps:
                    self._steps.pop()
            else:
                return None
            step, value = part
            self._steps.append(step)
            met = self._meet(value)

    def _meet(self, value: Any) -> str | Iterator[tuple[_Step, Any]] | None:
        """Visit ``value``. Return why it cannot be written; or its parts; or ``None`` if it is fine and has no parts.

        A returned text is the explanation, and ends the walk. Parts are ``(step, part)`` pairs.
        """
        self._left -= 1
        if self._left < 0 or monotonic() > self._end:
            raise _Gone
        grammar = self._grammar
        cls = type(value)  # `isinstance` would read the `__class__` of the value, and so could run code
        if cls in (bool, NoneType, float):
            return None
        if (depth := self._around.get(id(value))) is not None:
            if grammar.replace is None:  # pickle can write a value that contains itself
                return None
            return f"{self._path()} is {self._path(depth)} again, so the value contains itself: it nests too deeply"
        if issubclass(cls, dict):
            return self._bad_key(value) or self._bad_mark(value) or self._items(value)
        if issubclass(cls, (list, tuple)):
            items = list.__iter__(value) if issubclass(cls, list) else tuple.__iter__(value)
            return ((_Step(index), item) for index, item in enumerate(items))
        if grammar.replace is None or issubclass(cls, grammar.scalars):
            return self._alone(value)
        return self._replaced(value, grammar.replace)

    def _items(self, value: dict[Any, Any]) -> str | Iterator[tuple[_Step, Any]]:
        try:
            # A subclass may override `items`; the serializer calls that method, too.
            items = value.items() if type(value) is dict else list(value.items())
        except BaseException as exc:
            _go_on(exc)
            return self._raised("its items", value, exc)
        return ((_Step(key), item) for key, item in items)

    def _raised(self, by: str, value: Any, exc: BaseException) -> str:
        return f"{self._path()} is {_an_object(value)}, and {by} raised {type(exc).__name__}: {safe_text(exc)}"

    def _bad_key(self, value: dict[Any, Any]) -> str | None:
        for key in dict.keys(value):
            if not issubclass(type(key), self._grammar.keys):
                return (
                    f"{self._path()} is a dict with a key of type {_name(type(key))}; "
                    f"make its keys texts{self._or_pickle()}"
                )
        return None

    def _bad_mark(self, value: dict[Any, Any]) -> str | None:
        if dict.keys(value) != _MARKERS or self._grammar.check is None:
            return None
        try:
            data = self._grammar.write(value)
        except BaseException as exc:  # a part of the value is at fault, and the walk will visit it
            _go_on(exc)
            return None
        try:
            self._grammar.check(data)
        except BaseException as exc:
            _go_on(exc)
            return (
                f"{self._path()} is a dict with the keys __type__ and __value__ that no reader can decode "
                f"({safe_text(exc)}); give it another key"
            )
        return None

    def _alone(self, value: Any) -> str | None:
        try:
            self._grammar.write(value)
        except BaseException as exc:
            _go_on(exc)
            cls = type(value)
            if self._grammar.replace is None:
                remedy = "store plain data instead, or give its class a __reduce__ method"
            else:
                remedy = f"store {'a number in its bounds or ' if issubclass(cls, int) else ''}str(value) instead"
                if issubclass(cls, str):
                    remedy = "store value.encode(errors='surrogatepass'), or a plain str"
            return f"{self._path()} is {_an_object(value)} that cannot be written ({safe_text(exc)}); {remedy}"
        return None

    def _replaced(self, value: Any, replace: Callable[[Any], Any]) -> str | Iterator[tuple[_Step, Any]]:
        try:
            found = replace(value)
        except UnknownType as exc:
            if exc.value is value:
                return f"{self._path()} is {_an_object(value)}; {_remedy(type(value), self._grammar)}"
            raise
        except BaseException as exc:
            _go_on(exc)
            by, _ = self._by(value)
            return self._raised(by, value, exc)
        _, template = self._by(value)
        if template.startswith("encode") and type(found) is dict and found.keys() == _MARKERS:
            found = found["__value__"]
        return iter([(_Step(template=template), found)])

    def _by(self, value: Any) -> tuple[str, str]:
        by = self._grammar.replaced_by
        try:
            return _UNKNOWN if by is None else by(value)
        except BaseException as exc:  # the class of the value raises when `by` reads an attribute
            _go_on(exc)
            return _UNKNOWN

    def _or_pickle(self) -> str:
        return "" if self._grammar.fixed else ', or use serializer="pickle"'

    def _path(self, depth: int | None = None) -> str:
        steps: list[_Step | None] = [*self._steps[:depth]]
        if len(steps) > 2 * _SHOWN_STEPS:
            steps = [*steps[:_SHOWN_STEPS], None, *steps[-_SHOWN_STEPS:]]
        path, template = self._root, "{}"
        for step in steps:
            if step is None:
                path, template = f"{template.replace('{}', path)}…", "{}"
            elif step.template is not None:
                path, template = template.replace("{}", path), step.template
            elif template != "{}" and type(step.key) is str and step.key.isidentifier():
                # A function has turned an object into this dict. So show the key as a field of that object.
                path, template = f"{path}.{step.key}", "{}"
            else:
                path, template = f"{template.replace('{}', path)}[{_shown(step.key)}]", "{}"
        return template.replace("{}", path)


def _go_on(exc: BaseException) -> None:
    if isinstance(exc, KeyboardInterrupt):
        raise exc


def _shown(key: object) -> str:
    """Return the text that shows a key or an index in a path. Calls no method of a class of the user."""
    if issubclass(type(key), str):
        text = json.dumps(str.__str__(key), ensure_ascii=False)
        return text if len(text) <= _SHOWN_KEY else f'{text[:_SHOWN_KEY]}…"'
    if type(key) is int:
        return str(key) if key.bit_length() < 200 else "…"
    return repr(key) if type(key) in (bool, NoneType, float) else f"<{_name(type(key))}>"


def _name(cls: type) -> str:
    return cls.__qualname__


def _an_object(value: object) -> str:
    return f"an object of type {_name(type(value))}"


def _remedy(cls: type, grammar: Grammar) -> str:
    other = [] if (instead := _instead(cls)) is None else [f"store {instead} instead"]
    other.append("pass types=[StoredType(...)] or json_default= to connect()")
    if cls.__module__.partition(".")[0] not in sys.stdlib_module_names:
        other.append("give the class a __json__ method")
    if not grammar.fixed and not issubclass(cls, _UNPICKLED):
        other.append('use serializer="pickle"')
    return ", or ".join(filter(None, [", ".join(other[:-1]), other[-1]]))


def _instead(cls: type) -> str | None:
    """Return an expression to store in place of an instance of ``cls``, such as ``list(value)`` for a set.

    Returns ``None`` if no such expression is known.
    """
    names = {name for each in cls.__mro__ for name in vars(each)}
    found = next((text for base, text in _INSTEAD if issubclass(cls, base)), None)
    if found is None:
        if "__pydantic_validator__" in names and "model_dump" in names:
            return 'value.model_dump(mode="json")'
        if "__struct_fields__" in names:  # of msgspec
            return "msgspec.to_builtins(value)"
        if dataclasses.is_dataclass(cls):
            return "dataclasses.asdict(value)"
        if "__attrs_attrs__" in names:
            return "attrs.asdict(value)"
        if cls.__module__.partition(".")[0] == "numpy" and "tolist" in names:
            return "value.tolist()"
    return found


#: Of the types below, those that pickle refuses, too.
_UNPICKLED: Final = (memoryview, GeneratorType, CoroutineType)
_INSTEAD: Final[tuple[tuple[type, str], ...]] = (
    (Enum, "value.value"),
    (PathLike, "str(value)"),
    (AbstractSet, "list(value)"),
    (timedelta, "value.total_seconds()"),
    (bytearray, "bytes(value)"),
    (memoryview, "bytes(value)"),
    (GeneratorType, "list(value)"),
    (CoroutineType, "what awaiting it returns"),
)
