"""Reads and writes values in kombu's dialect of JSON (``kombu/utils/json.py``, 5.7), and in msgpack in the same way.

A value of a type that JSON lacks is stored as ``{"__type__": name, "__value__": value}``; this dict is called a tagged
value. Three tables map the names to types. The option ``types`` of the backend takes precedence. kombu's table is next,
if the process has imported kombu. The table in this module is last.
"""

from __future__ import annotations

import base64
import json
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from functools import partial, singledispatch
from types import NoneType
from typing import Any, Final, Generic, TypeVar

from .culprit import Grammar, UnknownType
from .exceptions import ImproperlyConfigured

__all__ = ["Dialect", "Reader", "StoredType", "msgspec"]

T = TypeVar("T")

_MARKERS = frozenset({"__type__", "__value__"})
#: The names of types for which kombu's decoders are not used: kombu's decoder of base64 accepts text that is not
#: base64. kombu's table of encoders does not have these names.
_KEPT = frozenset({"bytes", "base64"})
_JSON_SCALARS = (str, int, float, NoneType)
_MSGPACK_SCALARS = (str, int, float, bytes, NoneType)
#: Serializer → the classes that it writes by itself, including their subclasses. It does not call the ``encode`` of a
#: `StoredType` for them.
_NATIVE: Final[Mapping[str, tuple[type, ...]]] = {
    "json": (dict, list, tuple, *_JSON_SCALARS),
    "msgpack": (dict, list, tuple, *_MSGPACK_SCALARS),
}


@dataclass(frozen=True)  # no slots: in Python 3.11, StoredType[…](…) would raise
class StoredType(Generic[T]):
    """Describes a class whose instances a backend stores and reads. Pass it in the backend's option ``types``.

    >>> from fractions import Fraction
    >>> fraction = StoredType(Fraction, "fraction", str, Fraction)

    JSON and msgpack then store ``Fraction(1, 3)`` as ``{"__type__": "fraction", "__value__": "1/3"}``. kombu's
    ``register_type`` takes the same arguments in the same order and stores the same form. So aioresult and Celery read
    each other's values. pickle stores instances by itself and ignores the types.

    An instance of a subclass is written with the most specific type that fits. Two types may have the same class, for
    instance after a change of the name. Then the first one in the list is written, and both are read.

    :param cls: the class. JSON writes `dict`, `list`, `tuple`, `str`, `int`, `float` and their subclasses by itself, so
        these classes are refused.
    :param name: the name in the store. It may also replace a name that aioresult knows by itself, such as ``datetime``.
    :param encode: a function that turns an instance into a value that the serializer, or another type, can write. If
        the function raises, storing raises `EncodeError`.
    :param decode: a function that turns that value, in which tuples have become lists, into an instance. If the
        function raises, reading this one result raises `DecodeError`. Other programs may write to the store, so the
        function must be safe for any value. Storing does not call it.
    :raises ImproperlyConfigured: an argument is wrong. The message says what to change.
    """

    cls: type[T]
    name: str
    encode: Callable[[T], Any]
    decode: Callable[[Any], T]

    def __post_init__(self) -> None:
        if not isinstance(self.cls, type):
            raise ImproperlyConfigured(
                f"the first argument of StoredType must be a class, not {self.cls!r}; pass (cls, name, encode, decode)"
            )
        try:
            issubclass(NoneType, self.cls)
        except TypeError as exc:  # `cls` is a Protocol
            raise ImproperlyConfigured(
                f"{self.cls.__qualname__} does not support isinstance ({exc}); pass a class that implements it"
            ) from exc
        if not isinstance(self.name, str) or not self.name:
            raise ImproperlyConfigured(
                f"the StoredType of {self.cls.__qualname__} needs a name in the store, not {self.name!r}; pass a str"
            )
        for what, function in (("encode", self.encode), ("decode", self.decode)):
            if not callable(function):
                raise ImproperlyConfigured(
                    f"{what} of the StoredType {self.name!r} must be a function of one argument, not {function!r}"
                )


def _checked(types: Iterable[StoredType[Any]], serializer: str) -> tuple[StoredType[Any], ...]:
    if not isinstance(types, Iterable):
        raise ImproperlyConfigured(f"types must be a list of StoredType, not {types!r}")
    found = tuple(types)
    native = _NATIVE.get(serializer, _NATIVE["json"])
    names: set[str] = set()
    for each in found:
        if not isinstance(each, StoredType):
            raise ImproperlyConfigured(f"types must be made with StoredType(cls, name, encode, decode), not {each!r}")
        if each.name in names:
            raise ImproperlyConfigured(f"types has two types with the name {each.name!r}; give each its own name")
        names.add(each.name)
        for base in native:
            if issubclass(each.cls, base):
                raise ImproperlyConfigured(
                    f"the serializer itself writes {each.cls.__qualname__}, as a {base.__name__}, and would not call "
                    f"encode; wrap the value in a class that is not a {base.__name__}, or convert it before storing it"
                )
    return found


# -- the types that every backend has -------------------------------------------------------------------------------
#
# If the process has imported kombu, this module also uses the types that were registered with
# ``kombu.utils.json.register_type``, in the same way as Celery. kombu's table takes precedence, so it may also override
# a type of this module. The table has no public name; it has the same form in kombu 5.3 to 5.7. Values that JSON itself
# can write never get here.


def _tag(name: str, value: Any) -> dict[str, Any]:
    return {"__type__": name, "__value__": value}


def _lazy_text() -> type | tuple[()]:
    """Return the class of Django's lazy translations, or ``()`` if Django is not imported.

    kombu stores such translations as texts, too.
    """
    django = sys.modules.get("django.utils.functional")
    return getattr(django, "Promise", ())


def _default(value: Any, unknown: Callable[[Any], Any] | None = None) -> Any:
    """Return the value to write in place of ``value``, whose type the serializer does not know.

    If this function does not know the type either, it calls ``unknown`` (the user's ``json_default``). Without
    ``unknown`` it raises `UnknownType`.
    """
    reduce = getattr(value, "__json__", None)
    if reduce is not None:
        return reduce()
    if isinstance(value, _lazy_text()):
        return str(value)
    kombus = sys.modules.get("kombu.utils.json")
    for cls, (marker, encode) in getattr(kombus, "_encoders", {}).items():
        if isinstance(value, cls):
            return encode(value) if marker is None else _tag(marker, encode(value))
    match value:
        case datetime():
            return _tag("datetime", value.isoformat())
        case date():
            return _tag("date", value.isoformat())
        case time():
            return _tag("time", value.isoformat())
        case Decimal():
            return _tag("decimal", str(value))
        case uuid.UUID():
            return _tag("uuid", {"hex": value.hex})
        case bytes():
            try:
                return _tag("bytes", value.decode())
            except UnicodeDecodeError:
                return _tag("base64", base64.b64encode(value).decode())
    reduce = getattr(value, "as_tuple", None)
    if reduce is not None:  # a result handle: Celery stores a handle that a task returns in the same form
        return reduce()
    if unknown is not None:
        return unknown(value)
    raise UnknownType(value)


_untag: Mapping[str, Callable[[Any], Any]] = {
    "datetime": datetime.fromisoformat,
    "date": lambda text: datetime.fromisoformat(text).date(),
    "time": time.fromisoformat,
    "decimal": Decimal,
    "uuid": lambda fields: uuid.UUID(**fields),
    "bytes": lambda text: text.encode(),
    "base64": lambda text: base64.b64decode(text, validate=True),
}


def _decoder(kind: str) -> Callable[[Any], Any] | None:
    if kind in _KEPT:
        return _untag[kind]
    kombus = sys.modules.get("kombu.utils.json")
    found: Callable[[Any], Any] | None = getattr(kombus, "_decoders", {}).get(kind)
    return _untag.get(kind) if found is None else found


# -- reading --------------------------------------------------------------------------------------------------------

# Reads JSON without tagged values. The hook that decodes tagged values costs a Python call for every object in the
# document, and most documents have no tagged value.
_plain = json.JSONDecoder().raw_decode


class Reader:
    """Reads JSON and msgpack.

    ``own`` maps the names of a backend's own types to their decoders. These take precedence over the decoders that
    every backend has.
    """

    def __init__(self, own: Mapping[str, Callable[[Any], Any]]) -> None:
        self._own = own
        self._tagged = json.JSONDecoder(object_hook=self._hook).raw_decode

    def json(self, data: bytes) -> Any:
        """Return the value in ``data``, which is JSON. Raises any exception of the parser or of a decoder."""
        text = data.decode().strip(" \t\n\r")  # `json.loads` would also take UTF-16 and UTF-32
        value, end = self._tagged(text) if "__type__" in text else _plain(text)
        if end != len(text):
            raise ValueError(f"there is more text after the end of its JSON, at {end:,}")
        return value

    def msgpack(self, data: bytes) -> Any:
        """Return the value in ``data``, which is msgpack. Raises any exception of the parser or of a decoder."""
        return self._untagged(msgspec().msgpack.decode(data))

    def _untagged(self, value: Any) -> Any:
        if isinstance(value, dict):
            return self._hook({key: self._untagged(item) for key, item in value.items()})
        return [self._untagged(item) for item in value] if isinstance(value, list) else value

    def _hook(self, value: dict[str, Any]) -> Any:
        if value.keys() != _MARKERS:
            return value
        kind = value["__type__"]
        decode = self._decoder(kind) if isinstance(kind, str) else None
        if decode is None:
            raise ValueError(f"unknown __type__ {kind!r}; pass types= to the backend to have it decoded")
        return decode(value["__value__"])

    def _decoder(self, kind: str) -> Callable[[Any], Any] | None:
        return self._own[kind] if kind in self._own else _decoder(kind)


class _Checker(Reader):
    """Checks whether data can be read. It calls only the decoders of the types that every backend has.

    The check runs in the worker that stores the data. The decoder of another type is written for readers: it may be
    slow, or need something that the worker lacks.
    """

    def _decoder(self, kind: str) -> Callable[[Any], Any] | None:
        found = super()._decoder(kind)
        return found if found is None or (kind in _untag and kind not in self._own) else _as_it_is


def _as_it_is(value: Any) -> Any:
    return value


# -- writing --------------------------------------------------------------------------------------------------------


class Dialect:
    """Writes JSON and msgpack with the types of one backend.

    ``types`` are the backend's own types, and ``serializer`` is the serializer that it uses. ``json_default`` is called
    for a value of an unknown type; it returns a value to write instead.

    Raises `ImproperlyConfigured` if ``types`` is wrong or ``json_default`` cannot be called.
    """

    def __init__(
        self,
        types: Iterable[StoredType[Any]] = (),
        serializer: str = "json",
        json_default: Callable[[Any], Any] | None = None,
    ) -> None:
        types = _checked(types, serializer)
        if json_default is not None and not callable(json_default):
            raise ImproperlyConfigured(
                f"json_default must be a function of one argument, as for json.dumps, not {json_default!r}"
            )
        self._types = types
        self._has_default = json_default is not None
        last = _default if json_default is None else partial(_default, unknown=json_default)
        self._default: Callable[[Any], Any] = _default_with(types, last) if types else last
        #: Writes a value as JSON. A value that contains itself ends in a `RecursionError` without json's own check.
        self.text: Callable[[Any], str] = json.JSONEncoder(default=self._default, check_circular=False).encode
        self.reader: Reader = Reader({each.name: each.decode for each in types})
        self.checker: Reader = _Checker({each.name: each.decode for each in types})

    def grammar(self, serializer: str, fixed: bool) -> Grammar:
        """Describe to `aioresult.culprit.explain` how ``serializer`` ("json" or "msgpack") writes.

        ``fixed`` is true if the caller cannot choose another serializer.
        """
        scalars = _MSGPACK_SCALARS if serializer == "msgpack" else _JSON_SCALARS
        write, check = (
            (self.msgpack, self.checker.msgpack) if serializer == "msgpack" else (self.json, self.checker.json)
        )
        return Grammar(serializer, scalars, scalars, write, check, self._default, self._replaced_by, fixed)

    def _replaced_by(self, value: Any) -> tuple[str, str]:
        """Name the function that `_default` calls for ``value``, and return an expression for that call.

        In the expression, ``{}`` stands for the value: ``("its __json__", "{}.__json__()")``.
        """
        fitting = [each for each in self._types if isinstance(value, each.cls)]
        if fitting:
            name = next((each.name for each in fitting if each.cls is type(value)), fitting[0].name)
            return f"encode of the type {name!r}", "encode({})"
        for method in ("__json__", "as_tuple"):
            if hasattr(value, method):
                return f"its {method}", f"{{}}.{method}()"
        if self._has_default:
            return "json_default", "json_default({})"
        return "its encoder", "encode({})"

    def json(self, value: Any) -> bytes:
        """Return ``value`` as JSON. Raises any exception of an encoder."""
        return self.text(value).encode()

    def msgpack(self, value: Any) -> bytes:
        """Return ``value`` as msgpack. Raises any exception of an encoder.

        The package msgspec would also write sets, durations, dataclasses and more. But reading would return lists,
        texts and mappings in their place, and no value must change its type silently. So msgspec gets msgpack's own
        types only. Any other value is stored as a tagged value or refused, as in JSON.
        """
        return bytes(msgspec().msgpack.encode(self._tagged(value)))

    def _tagged(self, value: Any) -> Any:
        if isinstance(value, _MSGPACK_SCALARS):
            return value
        if isinstance(value, (list, tuple)):
            return [self._tagged(item) for item in value]
        if not isinstance(value, dict):
            return self._tagged(self._default(value))
        for key in value:
            if not isinstance(key, _MSGPACK_SCALARS):
                raise TypeError(f"it holds a key of type {type(key).__qualname__}")
        return {key: self._tagged(item) for key, item in value.items()}


def _default_with(types: Iterable[StoredType[Any]], last: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that encodes instances of ``types``, and calls ``last`` for all other values.

    If several types fit a value, the one with the most specific class is used. If these are equal, the first one in
    the list is used.
    """
    default = singledispatch(last)
    by_class: dict[type, StoredType[Any]] = {}
    for each in types:
        by_class.setdefault(each.cls, each)
    for cls, each in by_class.items():
        default.register(cls, _encoder(each))
    return default


def _encoder(stored: StoredType[Any]) -> Callable[[Any], Any]:
    return lambda value: _tag(stored.name, stored.encode(value))


def msgspec() -> Any:
    """Import and return the package msgspec. Raises `ImproperlyConfigured` if it is not installed."""
    try:
        import msgspec
    except ImportError:
        raise ImproperlyConfigured(
            "serializer 'msgpack' needs msgspec; install it with: pip install 'aioresult-tasks[msgpack]'"
        ) from None
    return msgspec
