"""`TaskMeta` ↔ bytes, in Celery's wire format.

`Codec` is what a backend holds: one serializer to write with, a list of those it may read, a compression, a bound on
the size. `dialect` has JSON and msgpack.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeVar

from .compression import compress, compressor, decompress
from .culprit import Grammar, explain
from .dialect import Dialect, StoredType, msgspec
from .exceptions import (
    AioResultError,
    ContentDisallowed,
    CyclicResultError,
    DecodeError,
    EncodeError,
    ImproperlyConfigured,
    ResultTooLargeError,
    SerializationError,
)
from .failure import as_celery, dump_exception, members_of, safe_text
from .meta import TaskMeta
from .restore import load_exception
from .states import EXCEPTION_STATES, READY_STATES, SUCCESS

__all__ = ["CORE_FIELDS", "FINAL_HEADS", "SUCCESS_HEAD", "Codec", "reading", "unreadable"]

T = TypeVar("T")

#: How the JSON of every finished task begins that went well, and no other's: a server can tell it without parsing.
SUCCESS_HEAD = b'{"status": "SUCCESS"'
#: The same of every final state.
FINAL_HEADS = tuple(f'{{"status": "{state}"'.encode() for state in sorted(READY_STATES))

#: The fields that every meta has; the others are optional.
CORE_FIELDS: Final = frozenset({"status", "result", "traceback", "children", "date_done", "task_id"})
_KNOWN: Final = ("json", "msgpack", "pickle")

_json_text = json.encoder.encode_basestring_ascii


def _json_meta(encode: Callable[[Any], str]) -> Callable[[TaskMeta], bytes]:
    """A writer of metas in JSON, given one of values."""

    def dump(meta: TaskMeta) -> bytes:
        # The bytes of `_dump_fields`, written in place: half of the time would go into a dict and a walk over it.
        traceback = "null" if meta.traceback is None else encode(meta.traceback)
        children = encode(meta.children) if meta.children else "[]"
        done = "null" if meta.date_done is None else f'"{meta.date_done.isoformat()}"'
        extra = f"{encode(meta.extra)[1:-1]}, " if meta.extra else ""
        return (
            f'{{"status": {_json_text(meta.status)}, "result": {encode(meta.result)}, "traceback": {traceback}, '
            f'"children": {children}, "date_done": {done}, {extra}"task_id": {_json_text(meta.task_id)}}}'
        ).encode()

    return dump


# -- pickle, which a reader has to ask for --------------------------------------------------------------------------


def _pickle_dumps(value: Any) -> bytes:
    import pickle

    return pickle.dumps(value, protocol=4)


def _pickle_loads(data: bytes) -> Any:
    import pickle

    return pickle.loads(data)  # noqa: S301 - only reached when the reader put "pickle" into accept


def _serializer_of(data: bytes, own: str) -> str:
    """Which serializer wrote ``data``, by its first byte. A single byte may be a number of two; then it is our ``own``.

    JSON is ASCII. Pickle 2 and later begins with the opcode PROTO, which in msgpack is a map without entries, and that
    is a single byte. Everything in msgpack below that is a small integer, and a single byte, too.
    """
    if len(data) <= 1:
        return own
    first = data[0]
    return "json" if first < 0x80 else "pickle" if first == 0x80 else "msgpack"


def _dump_fields(dumps: Callable[[Any], bytes], meta: TaskMeta) -> bytes:
    return dumps(
        {
            "status": meta.status,
            "result": meta.result,
            "traceback": meta.traceback,
            "children": meta.children,
            "date_done": None if meta.date_done is None else meta.date_done.isoformat(),
            **(meta.extra or {}),
            "task_id": meta.task_id,
        }
    )


# -- what goes wrong in reading -------------------------------------------------------------------------------------


def unreadable(what: str, exc: BaseException) -> AioResultError:
    """The one place where whatever went wrong while stored bytes became a value is made an error about ``what``.

    A class that the data names runs code of its own when it is built: its constructor, ``__setattr__``, ``__reduce__``.
    Even a `SystemExit` or a `CancelledError` out of those concerns this one value, and not the task that reads. Only a
    `KeyboardInterrupt` is raised again.
    """
    if isinstance(exc, (SerializationError, CyclicResultError)):
        return exc
    if isinstance(exc, KeyboardInterrupt):
        raise exc
    reason = "it nests too deeply" if isinstance(exc, RecursionError) else f"{type(exc).__name__}: {safe_text(exc)}"
    error = DecodeError(f"{what} cannot be read: {reason}")
    error.__cause__ = exc
    return error


@contextmanager
def reading(what: str) -> Iterator[None]:
    """The same for a block of code; inside, nothing is awaited."""
    try:
        yield
    except BaseException as exc:
        error = unreadable(what, exc)
        raise error from exc.__cause__ if error is exc else exc


def _null(_: str) -> None:
    """What stands for a number that JSON lacks."""


# -- the codec ------------------------------------------------------------------------------------------------------


class _OnlyReads(Exception):
    """Of `Codec.write_nothing`. Code of the user's own may raise `ImproperlyConfigured` while it is serialized."""


class Codec:
    """Writes with one serializer, reads those in ``accept``, refuses what is larger than ``max_result_size`` bytes.

    Raises `ImproperlyConfigured` for an unknown serializer or compression, or one whose package is missing, and for
    ``types`` or a ``json_default`` that make no sense.
    """

    def __init__(
        self,
        serializer: str = "json",
        accept: Iterable[str] = ("json",),
        compression: str | None = None,
        max_result_size: int = 128 * 2**20,
        types: Iterable[StoredType[Any]] = (),
        json_default: Callable[[Any], Any] | None = None,
    ) -> None:
        if isinstance(max_result_size, bool) or not isinstance(max_result_size, int) or max_result_size < 1:
            raise ImproperlyConfigured(f"max_result_size must be a number of bytes, not {max_result_size!r}")
        self.serializer = serializer
        if not isinstance(accept, Iterable):
            raise ImproperlyConfigured(f"accept must be the names of serializers, not {accept!r}")
        self.accept: frozenset[str] = frozenset((accept,) if isinstance(accept, str) else accept)
        self.max_result_size = max_result_size
        self.compression: str | None = None if compression is None else compressor(compression)
        for name in (serializer, *self.accept):
            if name not in _KNOWN:
                raise ImproperlyConfigured(f"unknown serializer {name!r}; known are {', '.join(_KNOWN)}")
        if "msgpack" in {serializer, *self.accept}:
            msgspec()
        if serializer not in self.accept:
            raise ImproperlyConfigured(
                f"serializer {serializer!r} is not in accept={tuple(sorted(self.accept))}: "
                f"this backend could not read what it stores; add it to accept"
            )
        #: Whether all that it writes is JSON, whose head tells a success (`SUCCESS_HEAD`).
        self.plain: bool = serializer == "json" and self.compression is None
        self._dialect = dialect = Dialect(types, serializer, json_default)
        self._check: Mapping[str, Callable[[bytes], object]] = {
            "json": dialect.checker.json,
            "msgpack": dialect.checker.msgpack,
        }
        self._loads: Mapping[str, Callable[[bytes], Any]] = {
            "json": dialect.reader.json,
            "msgpack": dialect.reader.msgpack,
            "pickle": _pickle_loads,
        }
        writers = {"json": dialect.json, "msgpack": dialect.msgpack, "pickle": _pickle_dumps}
        self._dumps: Callable[[Any], bytes] = writers[serializer]
        self._dumps_json: Callable[[Any], bytes] = dialect.json
        self._dumps_text: Callable[[Any], bytes] = dialect.json  # not for the store: never refused
        self._dumps_meta: Callable[[TaskMeta], bytes] = (
            _json_meta(dialect.text) if serializer == "json" else partial(_dump_fields, self._dumps)
        )

    def write_nothing(self, reason: str) -> None:
        """From now on only read: whatever is to be written raises `ImproperlyConfigured` with ``reason``."""

        def refuse(_: object) -> bytes:
            raise _OnlyReads(reason)

        self._dumps = self._dumps_meta = self._dumps_json = refuse

    def dumps(self, value: Any, what: str, root: str = "value") -> bytes:
        """``value`` as bytes, compressed if this codec compresses.

        ``what`` names it in the `EncodeError`, and the path to what cannot be written begins with ``root``.
        """
        return self._written(self._dumps, value, what, root=root)

    def can_hold(self, value: Any) -> bool:
        """Whether `dumps` writes ``value``. Unlike the error of that, the answer is cheap."""
        try:
            data = self._dumps(value)
            self._check_types(data, self.serializer)
        except KeyboardInterrupt:
            raise
        except BaseException:  # a __json__ or __reduce__ of the user's own may raise anything
            return False
        return len(data) <= self.max_result_size

    def dumps_chunk(self, chunk: Any, what: str) -> bytes:
        """As `dumps`, of a chunk of an output: always JSON, and not compressed, for chunks are joined as they are."""
        return self._written(self._dumps_json, chunk, what, "json", "chunk")

    def loads_chunks(self, data: bytes, what: str) -> list[Any]:
        """The chunks of an entry of an output, a JSON list. Raises `DecodeError`."""
        try:  # not `reading`: this is done for every message
            chunks = self._loads["json"](data)
            if not isinstance(chunks, list) or not chunks:
                raise TypeError("it is no list of chunks")
        except BaseException as exc:
            error = unreadable(what, exc)
            raise error from exc.__cause__ if error is exc else exc
        return chunks

    def dumps_text(self, value: Any, what: str) -> bytes:
        """``value`` as one line of ASCII that every JSON parser reads, for a browser; also where this codec only reads.

        What JSON lacks is tagged as in the store. NaN and the infinities become null, as in JavaScript.
        """
        data = self._written(self._dumps_text, value, what, "json")
        if b"NaN" in data or b"Infinity" in data:  # perhaps only in a text
            data = json.dumps(json.loads(data, parse_constant=_null)).encode()
        return data

    def _written(
        self,
        dumps: Callable[[T], bytes],
        value: T,
        what: str | TaskMeta,
        serializer: str | None = None,
        root: str = "value",
    ) -> bytes:
        """With a ``serializer``: as it is, not compressed."""
        try:
            data = dumps(value)
            if b"__type__" in data:
                self._check_types(data, serializer or self.serializer)
        except KeyboardInterrupt:
            raise
        except _OnlyReads as exc:
            raise ImproperlyConfigured(str(exc)) from None
        except BaseException as exc:  # a __json__ or __reduce__ of the user's own may raise anything
            name = serializer or self.serializer
            roots = _parts_of(value) if isinstance(value, TaskMeta) else {root: value}
            reason = explain(roots, self._grammar(name, fixed=serializer is not None), exc)
            raise EncodeError(f"{_describe(what)} cannot be stored as {name}: {reason}") from exc
        if len(data) > self.max_result_size:
            raise ResultTooLargeError(
                f"{_describe(what)} is {len(data):,} bytes; max_result_size is {self.max_result_size:,}: "
                f"store a reference to it instead, or raise the bound on both sides"
            )
        return data if self.compression is None or serializer else compress(data, self.compression)

    def _grammar(self, serializer: str, fixed: bool) -> Grammar:
        if serializer == "pickle":
            return Grammar("pickle", (), (object,), _pickle_dumps)
        return self._dialect.grammar(serializer, fixed)

    def loads(self, data: bytes, what: str) -> Any:
        """The value in ``data``. Raises `DecodeError`, `ContentDisallowed` or `ResultTooLargeError`."""
        data = self._unpacked(data, what)
        name = _serializer_of(data, self.serializer)
        if name in self.accept:
            try:  # the bytes come from outside: anything that a parser can raise is their fault
                return self._loads[name](data)
            except BaseException as exc:
                raise unreadable(what, exc) from exc
        raise ContentDisallowed(
            f"{what} was stored with {name}, which this reader does not accept; "
            f"if you trust everyone who can write to the store, pass accept=({name!r}, …)"
        )

    def _unpacked(self, data: bytes, what: str) -> bytes:
        try:
            return decompress(data, self.max_result_size)
        except ResultTooLargeError as exc:
            raise ResultTooLargeError(f"{what}: {exc}") from None
        except Exception as exc:
            raise unreadable(what, exc) from exc

    def _check_types(self, data: bytes, serializer: str) -> None:
        """Refuse to store what no reader could read: a dict that looks like a tagged value of kombu's and is none."""
        if b"__type__" not in data or serializer == "pickle":
            return
        try:
            self._check[serializer](data)
        except Exception as exc:
            raise ValueError(
                f"it holds a dict with the keys __type__ and __value__ that no reader can decode ({safe_text(exc)}); "
                f"give it another key"
            ) from exc

    def dumps_result(self, meta: TaskMeta) -> bytes:
        """The result of ``meta`` alone, for stores that keep the other fields in columns of their own."""
        return self._written_meta(lambda meta: self._dumps(meta.result), meta)

    def encode(self, meta: TaskMeta) -> bytes:
        """``meta`` as one value, its fields in Celery's order.

        Raises `EncodeError`, which names the task, the path to the value and the type, and `ResultTooLargeError`.
        """
        return self._written_meta(self._dumps_meta, meta)

    def _written_meta(self, dumps: Callable[[TaskMeta], bytes], meta: TaskMeta) -> bytes:
        """``meta`` as bytes; an exception as data, unless the serializer can write it as it is."""
        if meta.status not in EXCEPTION_STATES or not isinstance(meta.result, BaseException):
            return self._written(dumps, meta, meta)
        if self.serializer == "pickle" and _survives_pickle(meta.result):
            with suppress(EncodeError):  # it did so once, and that is no promise
                return self._written(dumps, meta, meta)
        return self._written_failure(meta.result, lambda data: self._written(dumps, replace(meta, result=data), meta))

    def _written_failure(self, exc: BaseException, write: Callable[[dict[str, Any]], bytes]) -> bytes:
        """``exc`` as data, given to ``write``. What Celery would not store must not keep the rest from being stored."""
        data = dump_exception(exc, lambda arg: self._check_types(self._dumps(arg), self.serializer))
        try:
            return write(data)
        except ResultTooLargeError:
            data = as_celery(data)
        return write(data)

    def dumps_part(self, number: int, task_id: str, state: str, value: Any, what: str) -> bytes:
        """A part of a chord, as Celery stores it. Raises as `dumps`."""

        def write(value: Any) -> bytes:
            return self.dumps([number, task_id, state, value], what, "part")

        if state in EXCEPTION_STATES and isinstance(value, BaseException):
            return self._written_failure(value, write)
        return write(value)

    def decode(self, task_id: str, data: bytes) -> TaskMeta:
        """The meta stored under ``task_id``. Raises as `loads` does, also where a field has the wrong type."""
        fields = self.loads(data, f"the result of task {task_id}")
        if not isinstance(fields, dict):
            raise DecodeError(f"the result of task {task_id} cannot be read: it is no mapping")
        return self.build(task_id, fields)

    def build(self, task_id: str, fields: dict[str, Any]) -> TaskMeta:
        """A meta from its decoded fields, which are taken from ``fields``."""
        take = fields.pop
        try:
            status, result, traceback = take("status"), take("result", None), take("traceback", None)
            children, done = take("children", None) or (), take("date_done", None)
            take("task_id", None)
            if isinstance(done, str):
                done = datetime.fromisoformat(done)
            if isinstance(done, datetime) and done.tzinfo is not UTC and done.tzinfo is not None:
                done = done.astimezone(UTC)  # Celery writes it in the time zone of the app
            if not (
                isinstance(status, str)
                and (traceback is None or isinstance(traceback, str))
                and isinstance(children, (list, tuple))
                and (done is None or isinstance(done, datetime))
            ):
                raise TypeError("a field has the wrong type")
        except (KeyError, TypeError, ValueError, OverflowError) as exc:
            raise DecodeError(f"the result of task {task_id} cannot be read: {type(exc).__name__}: {exc}") from exc
        if status in EXCEPTION_STATES:
            result = load_exception(result, status, traceback)
        return TaskMeta(task_id, status, result, traceback, children, done, fields or None)

    def is_success(self, data: bytes) -> bool:
        """Whether ``data``, a whole stored value, is a task that went well.

        Raises `DecodeError` where this process cannot tell: another one may be able to read it, and what may be a
        success must not be overwritten.
        """
        return data.startswith(SUCCESS_HEAD) or self._status_of(data) == SUCCESS

    def is_final(self, data: bytes) -> bool:
        """Whether ``data``, a whole stored value, is a task that is over. Raises as `is_success`."""
        return data.startswith(FINAL_HEADS) or self._status_of(data) in READY_STATES

    def status(self, data: bytes) -> str | None:
        """The state in ``data``, a whole stored value; ``None`` if it is no result. Raises as `is_success`."""
        status = self._status_of(data)
        return status if isinstance(status, str) else None

    def _status_of(self, data: bytes) -> object:
        what = "what is stored already"
        if not data:
            return None
        try:
            data = self._unpacked(data, what)
            # Types that are not known here do not matter: nothing but the status is looked at.
            plain = _serializer_of(data, self.serializer) == "json"
            text = data.decode().strip() if plain else ""
            fields = json.loads(text) if plain else self.loads(data, what)
            return fields.get("status") if isinstance(fields, dict) else None
        except AioResultError as exc:
            raise type(exc)(_keeps(str(exc))) from exc.__cause__
        except Exception as exc:
            raise DecodeError(_keeps(f"{what} cannot be read: {type(exc).__name__}: {exc}")) from exc


def _keeps(reason: str) -> str:
    return f"{reason}; it may be a success, and is not overwritten: forget the id first to store another result"


def _describe(what: str | TaskMeta) -> str:
    if isinstance(what, str):
        return what
    return f"the result of task {what.task_id}"


def _parts_of(meta: TaskMeta) -> dict[str, Any]:
    """What of ``meta`` may be any value, by the names in the path of an `EncodeError`."""
    return {"result": meta.result, "children": meta.children, **(meta.extra or {})}


def _survives_pickle(exc: BaseException) -> bool:
    try:
        if _is_ours(exc):  # it would be lost on a Celery without this library
            return False
        _pickle_loads(_pickle_dumps(exc))
    except BaseException:  # the class is the user's own
        return False
    return True


def _is_ours(exc: BaseException) -> bool:
    """Whether its class is this library's, or that of any member if it is a group."""
    if issubclass(type(exc), BaseExceptionGroup) and any(map(_is_ours, members_of(exc))):
        return True
    return type(exc).__module__.startswith("aioresult.")
