"""Turns a `TaskMeta` into bytes and back, in Celery's wire format.

Each backend has a `Codec`: one serializer to write with, a list of serializers that may be read, a compression, and a
limit on the size. The module `dialect` implements JSON and msgpack.
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

#: A *head* is the beginning of a stored value. Even a server can tell the state from it without parsing. The JSON of
#: every successful task begins with this head, and no other JSON does.
SUCCESS_HEAD = b'{"status": "SUCCESS"'
#: The heads of all final states.
FINAL_HEADS = tuple(f'{{"status": "{state}"'.encode() for state in sorted(READY_STATES))

#: The fields that every stored meta has. All other fields are optional.
CORE_FIELDS: Final = frozenset({"status", "result", "traceback", "children", "date_done", "task_id"})
_KNOWN: Final = ("json", "msgpack", "pickle")

_json_text = json.encoder.encode_basestring_ascii


def _json_meta(encode: Callable[[Any], str]) -> Callable[[TaskMeta], bytes]:
    """Make a function that writes a meta as JSON. ``encode`` writes one value."""

    def dump(meta: TaskMeta) -> bytes:
        # Same bytes as `_dump_fields`, but twice as fast, because it makes no dict of the fields.
        traceback = "null" if meta.traceback is None else encode(meta.traceback)
        children = encode(meta.children) if meta.children else "[]"
        done = "null" if meta.date_done is None else f'"{meta.date_done.isoformat()}"'
        extra = f"{encode(meta.extra)[1:-1]}, " if meta.extra else ""
        return (
            f'{{"status": {_json_text(meta.status)}, "result": {encode(meta.result)}, "traceback": {traceback}, '
            f'"children": {children}, "date_done": {done}, {extra}"task_id": {_json_text(meta.task_id)}}}'
        ).encode()

    return dump


# -- pickle, which is read only if the reader lists it in ``accept`` ------------------------------------------------


def _pickle_dumps(value: Any) -> bytes:
    import pickle

    return pickle.dumps(value, protocol=4)


def _pickle_loads(data: bytes) -> Any:
    import pickle

    return pickle.loads(data)  # noqa: S301 - only reached when the reader put "pickle" into accept


def _serializer_of(data: bytes, own: str) -> str:
    """Return the name of the serializer that wrote ``data``, found by its first byte. For a single byte it is ``own``.

    JSON is ASCII, so its first byte is below 0x80. Pickle from protocol 2 on begins with the opcode PROTO, 0x80. In
    msgpack, 0x80 is an empty map, and lower bytes are small integers; each of these is a whole value of one byte. So
    only a single byte is ambiguous.
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


# -- errors in reading ----------------------------------------------------------------------------------------------


def unreadable(what: str, exc: BaseException) -> AioResultError:
    """Turn any exception that occurred while reading stored bytes into an error about ``what``.

    Building an object can run code of its class: the constructor, ``__setattr__`` or ``__reduce__``. Even a
    `SystemExit` or a `CancelledError` from there concerns only this value, and not the asyncio task that reads it.
    Only a `KeyboardInterrupt` is raised again.
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
    """Turn any exception in the block into an error about ``what``; see `unreadable`. Do not await in the block."""
    try:
        yield
    except BaseException as exc:
        error = unreadable(what, exc)
        raise error from exc.__cause__ if error is exc else exc


def _null(_: str) -> None:
    """Replace a number that JSON does not have with ``None``."""


# -- the codec ------------------------------------------------------------------------------------------------------


class _OnlyReads(Exception):
    """Raised by a codec that only reads. Not `ImproperlyConfigured`: the user's code may raise that in serializing."""


class Codec:
    """Writes with one serializer, reads with all in ``accept``. Refuses values of more than ``max_result_size`` bytes.

    :raises ImproperlyConfigured: a serializer or a compression is unknown, or its package is missing; or ``types`` or
        ``json_default`` make no sense.
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
                f"serializer {serializer!r} is not in accept={tuple(sorted(self.accept))}, so "
                f"this backend could not read what it stores; add it to accept"
            )
        #: True if everything that this codec writes is uncompressed JSON, whose head shows a success (`SUCCESS_HEAD`).
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
        self._dumps_text: Callable[[Any], bytes] = dialect.json  # for browsers: `write_nothing` leaves it unchanged
        self._dumps_meta: Callable[[TaskMeta], bytes] = (
            _json_meta(dialect.text) if serializer == "json" else partial(_dump_fields, self._dumps)
        )

    def write_nothing(self, reason: str) -> None:
        """Only read from now on. Every attempt to write raises `ImproperlyConfigured` with ``reason``."""

        def refuse(_: object) -> bytes:
            raise _OnlyReads(reason)

        self._dumps = self._dumps_meta = self._dumps_json = refuse

    def dumps(self, value: Any, what: str, root: str = "value") -> bytes:
        """Turn ``value`` into bytes, compressed if this codec compresses.

        :param what: the name of the value in an error.
        :param root: the beginning of the path, in an error, to the part of the value that cannot be written.
        :raises EncodeError: the serializer cannot write the value.
        :raises ResultTooLargeError: the bytes are more than ``max_result_size`` bytes.
        """
        return self._written(self._dumps, value, what, root=root)

    def can_hold(self, value: Any) -> bool:
        """True if `dumps` can write ``value``. If not, this is cheaper than `dumps`, because it makes no error text."""
        try:
            data = self._dumps(value)
            self._check_types(data, self.serializer)
        except KeyboardInterrupt:
            raise
        except BaseException:  # the user's __json__ or __reduce__ may raise anything
            return False
        return len(data) <= self.max_result_size

    def dumps_chunk(self, chunk: Any, what: str) -> bytes:
        """Encode a chunk of an output. As `dumps`, but always as uncompressed JSON, so that chunks can be joined."""
        return self._written(self._dumps_json, chunk, what, "json", "chunk")

    def loads_chunks(self, data: bytes, what: str) -> list[Any]:
        """Return the chunks in ``data``, a JSON list of them from the log of an output. Raises `DecodeError`."""
        try:  # `with reading(…)` would be slower, and this runs for every message
            chunks = self._loads["json"](data)
            if not isinstance(chunks, list) or not chunks:
                raise TypeError("it is not a list of chunks")
        except BaseException as exc:
            error = unreadable(what, exc)
            raise error from exc.__cause__ if error is exc else exc
        return chunks

    def dumps_text(self, value: Any, what: str) -> bytes:
        """Turn ``value`` into one line of ASCII for a browser, in JSON that every parser reads.

        This works even after `write_nothing`. Types that JSON does not have are tagged as in the store. NaN and the
        infinities become null, as in JavaScript.
        """
        data = self._written(self._dumps_text, value, what, "json")
        if b"NaN" in data or b"Infinity" in data:  # perhaps only in a text that contains the word
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
        """Turn ``value`` into bytes. If ``serializer`` is given, the bytes are not compressed."""
        try:
            data = dumps(value)
            if b"__type__" in data:
                self._check_types(data, serializer or self.serializer)
        except KeyboardInterrupt:
            raise
        except _OnlyReads as exc:
            raise ImproperlyConfigured(str(exc)) from None
        except BaseException as exc:  # the user's __json__ or __reduce__ may raise anything
            name = serializer or self.serializer
            roots = _parts_of(value) if isinstance(value, TaskMeta) else {root: value}
            reason = explain(roots, self._grammar(name, fixed=serializer is not None), exc)
            raise EncodeError(f"{_describe(what)} cannot be stored as {name}: {reason}") from exc
        if len(data) > self.max_result_size:
            raise ResultTooLargeError(
                f"{_describe(what)} has {len(data):,} bytes, and max_result_size is {self.max_result_size:,}; "
                f"store a reference to it instead, or raise max_result_size in writers and readers"
            )
        return data if self.compression is None or serializer else compress(data, self.compression)

    def _grammar(self, serializer: str, fixed: bool) -> Grammar:
        if serializer == "pickle":
            return Grammar("pickle", (), (object,), _pickle_dumps)
        return self._dialect.grammar(serializer, fixed)

    def loads(self, data: bytes, what: str) -> Any:
        """Return the value in ``data``. Raises `DecodeError`, `ContentDisallowed` or `ResultTooLargeError`."""
        data = self._unpacked(data, what)
        name = _serializer_of(data, self.serializer)
        if name in self.accept:
            try:  # the bytes come from outside, and can make a parser raise anything
                return self._loads[name](data)
            except BaseException as exc:
                raise unreadable(what, exc) from exc
        raise ContentDisallowed(
            f"{what} was stored with {name}, which this reader does not accept; "
            f"if you trust every program that can write to the store, pass accept=({name!r}, …)"
        )

    def _unpacked(self, data: bytes, what: str) -> bytes:
        try:
            return decompress(data, self.max_result_size)
        except ResultTooLargeError as exc:
            raise ResultTooLargeError(f"{what}: {exc}") from None
        except Exception as exc:
            raise unreadable(what, exc) from exc

    def _check_types(self, data: bytes, serializer: str) -> None:
        """Refuse a dict that looks like a tagged value of kombu's (``__type__``) but is not one: no reader reads it."""
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
        """Encode only the result of ``meta``, for stores that keep the other fields in separate columns."""
        return self._written_meta(lambda meta: self._dumps(meta.result), meta)

    def encode(self, meta: TaskMeta) -> bytes:
        """Encode ``meta`` as one value, with its fields in Celery's order.

        Raises `EncodeError`, which names the task, the path to the value and its type; or `ResultTooLargeError`.
        """
        return self._written_meta(self._dumps_meta, meta)

    def _written_meta(self, dumps: Callable[[TaskMeta], bytes], meta: TaskMeta) -> bytes:
        """Turn ``meta`` into bytes. An exception becomes data, unless the serializer can write the exception itself."""
        if meta.status not in EXCEPTION_STATES or not isinstance(meta.result, BaseException):
            return self._written(dumps, meta, meta)
        if self.serializer == "pickle" and _survives_pickle(meta.result):
            with suppress(EncodeError):  # pickle wrote it one time, but may fail the second time
                return self._written(dumps, meta, meta)
        return self._written_failure(meta.result, lambda data: self._written(dumps, replace(meta, result=data), meta))

    def _written_failure(self, exc: BaseException, write: Callable[[dict[str, Any]], bytes]) -> bytes:
        """Turn ``exc`` into data, and pass it to ``write``. If that is too large, omit what Celery would not store."""
        data = dump_exception(exc, lambda arg: self._check_types(self._dumps(arg), self.serializer))
        try:
            return write(data)
        except ResultTooLargeError:
            data = as_celery(data)
        return write(data)

    def dumps_part(self, number: int, task_id: str, state: str, value: Any, what: str) -> bytes:
        """Encode a part of a chord, which is the result of one header task, as Celery does. Raises as `dumps` does."""

        def write(value: Any) -> bytes:
            return self.dumps([number, task_id, state, value], what, "part")

        if state in EXCEPTION_STATES and isinstance(value, BaseException):
            return self._written_failure(value, write)
        return write(value)

    def decode(self, task_id: str, data: bytes) -> TaskMeta:
        """Decode the meta of ``task_id``. Raises as `loads` does; a field of the wrong type raises `DecodeError`."""
        fields = self.loads(data, f"the result of task {task_id}")
        if not isinstance(fields, dict):
            raise DecodeError(f"the result of task {task_id} cannot be read: it is not a mapping")
        return self.build(task_id, fields)

    def build(self, task_id: str, fields: dict[str, Any]) -> TaskMeta:
        """Build a meta from its decoded fields. This removes the core fields from ``fields``."""
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
        """True if ``data``, a whole stored value, is the result of a successful task.

        Raises `DecodeError` if this process cannot read ``data``. It may be a success that another process can read,
        and a success must not be overwritten.
        """
        return data.startswith(SUCCESS_HEAD) or self._status_of(data) == SUCCESS

    def is_final(self, data: bytes) -> bool:
        """True if ``data``, a whole stored value, is the result of a task that is over. Raises as `is_success` does."""
        return data.startswith(FINAL_HEADS) or self._status_of(data) in READY_STATES

    def status(self, data: bytes) -> str | None:
        """Return the state in ``data``, a whole stored value; ``None`` if it has none. Raises as `is_success` does."""
        status = self._status_of(data)
        return status if isinstance(status, str) else None

    def _status_of(self, data: bytes) -> object:
        what = "what is stored already"
        if not data:
            return None
        try:
            data = self._unpacked(data, what)
            # JSON is parsed without the types of the dialect: only the status matters, and a type may be unknown here.
            plain = _serializer_of(data, self.serializer) == "json"
            text = data.decode().strip() if plain else ""
            fields = json.loads(text) if plain else self.loads(data, what)
            return fields.get("status") if isinstance(fields, dict) else None
        except AioResultError as exc:
            raise type(exc)(_keeps(str(exc))) from exc.__cause__
        except Exception as exc:
            raise DecodeError(_keeps(f"{what} cannot be read: {type(exc).__name__}: {exc}")) from exc


def _keeps(reason: str) -> str:
    return f"{reason}; it may be a success, so it is not overwritten; to store another result, forget the id first"


def _describe(what: str | TaskMeta) -> str:
    if isinstance(what, str):
        return what
    return f"the result of task {what.task_id}"


def _parts_of(meta: TaskMeta) -> dict[str, Any]:
    """Return the fields of ``meta`` that may hold any value, by their names in the path of an `EncodeError`."""
    return {"result": meta.result, "children": meta.children, **(meta.extra or {})}


def _survives_pickle(exc: BaseException) -> bool:
    try:
        if _is_ours(exc):  # a Celery process without this library could not read it
            return False
        _pickle_loads(_pickle_dumps(exc))
    except BaseException:  # this runs code of the user's class
        return False
    return True


def _is_ours(exc: BaseException) -> bool:
    """True if the class of ``exc``, or of any member if it is a group, belongs to this library."""
    if issubclass(type(exc), BaseExceptionGroup) and any(map(_is_ours, members_of(exc))):
        return True
    return type(exc).__module__.startswith("aioresult.")
