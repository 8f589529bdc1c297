"""The codec: kombu's JSON, Celery's fields; what is refused; and that nothing but our own errors ever comes out."""

from __future__ import annotations

import contextlib
import json
import pickle
import tracemalloc
import zlib
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any, NamedTuple, Protocol
from uuid import UUID

import kombu.utils.json
import msgspec
import pytest
from celery.backends.base import compress_payload, decompress_payload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aioresult import (
    ContentDisallowed,
    DecodeError,
    EncodeError,
    ImproperlyConfigured,
    ResultTooLargeError,
    SerializationError,
    StoredType,
    TaskMeta,
)
from aioresult.dialect import Dialect
from aioresult.serialization import Codec, _dump_fields
from aioresult.states import EXCEPTION_STATES, FAILURE, RETRY, STARTED, SUCCESS

kombu_json: Any = kombu.utils.json  # has no annotations

DONE = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
EVERYTHING = ("json", "pickle", "msgpack")
#: Every name for a compression that Celery has, too.
CELERY_COMPRESSIONS = ["gzip", "zlib", "bzip2", "bzip", "lzma", "xz", "zstd", "zstandard", "application/x-bz2"]
#: One name for each method.
COMPRESSIONS = ["gzip", "bz2", "lzma", "zstd"]

# The machines that run this may be busy; a slow example is no failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def type_name(value: object) -> str:
    """What a parameter is called where its repr has an address in it, which no two processes have in common."""
    return type(value).__name__


def any_text() -> st.SearchStrategy[str]:
    return st.text(st.characters())


def any_value() -> st.SearchStrategy[Any]:
    """Whatever kombu's JSON can carry, nested."""
    zones = st.sampled_from([None, UTC, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(seconds=-1))])
    scalars = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | any_text()
        | st.binary()
        | st.dates()
        | st.builds(datetime.replace, st.datetimes(), tzinfo=zones)
        | st.builds(time.replace, st.times(), tzinfo=zones)
        | st.decimals()
        | st.uuids()
    )
    keys = any_text() | st.integers() | st.booleans() | st.none() | st.floats()
    return st.recursive(
        scalars, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(keys, inner), max_leaves=20
    )


def any_document() -> st.SearchStrategy[Any]:
    """JSON as somebody might have written it who knows the marks of kombu's, and misuses them."""
    words = ["datetime", "date", "time", "decimal", "uuid", "bytes", "no such type", "2024-05-06", "07:08", "1.5", ""]
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | any_text() | st.sampled_from(words)

    def nest(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        marked = st.fixed_dictionaries({"__type__": st.sampled_from(words) | inner, "__value__": inner})
        uuid = st.fixed_dictionaries({"__type__": st.just("uuid"), "__value__": st.dictionaries(any_text(), inner)})
        return st.lists(inner) | st.dictionaries(any_text(), inner) | marked | uuid

    return st.recursive(scalars, nest, max_leaves=20)


def meta_of(value: Any, status: str = SUCCESS) -> TaskMeta:
    return TaskMeta("task-7", status, value, date_done=DONE)


def as_json(**fields: Any) -> bytes:
    return json.dumps({"status": SUCCESS, "result": None, **fields}).encode()


# -- types registered with kombu ------------------------------------------------------------------------------------


@dataclass
class Coin:
    amount: int


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """kombu's `register_type`, for one test."""
    monkeypatch.setattr(kombu_json, "_encoders", dict(kombu_json._encoders))
    monkeypatch.setattr(kombu_json, "_decoders", dict(kombu_json._decoders))
    register: Callable[..., None] = kombu_json.register_type
    return register


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
def test_a_type_registered_with_kombu_is_written_and_read(register: Callable[..., None], serializer: str) -> None:
    codec = Codec(serializer, accept=(serializer,))
    with pytest.raises(EncodeError, match="Coin"):
        codec.dumps([Coin(3)], "it")
    register(Coin, "coin", lambda coin: coin.amount, Coin)
    data = codec.dumps({"price": Coin(3)}, "it")
    assert codec.loads(data, "it") == {"price": Coin(3)}
    if serializer == "json":
        assert json.loads(data) == json.loads(kombu_json.dumps({"price": Coin(3)}))
        assert kombu_json.loads(data) == {"price": Coin(3)}


def test_a_type_of_ours_that_is_registered_anew_is_written_as_kombu_writes_it(register: Callable[..., None]) -> None:
    register(datetime, None, datetime.isoformat)
    assert Codec().dumps(DONE, "it").decode() == kombu_json.dumps(DONE) == f'"{DONE.isoformat()}"'
    register(Decimal, "cents", lambda value: int(value * 100), lambda cents: Decimal(cents) / 100)
    data = Codec().dumps(Decimal("1.5"), "it")
    assert data.decode() == kombu_json.dumps(Decimal("1.5"))
    assert Codec().loads(data, "it") == Decimal("1.5")


def test_a_dict_that_looks_like_an_unknown_type_is_refused(register: Callable[..., None]) -> None:
    register(Coin, "coin", lambda coin: coin.amount, Coin)
    with pytest.raises(EncodeError, match="__type__ and __value__ that no reader can decode"):
        Codec().dumps({"__type__": "x", "__value__": 1}, "it")


def test_storing_calls_no_decoder_that_kombu_was_told_of(register: Callable[..., None]) -> None:
    register(Coin, "coin", lambda coin: coin.amount, refuses)
    with pytest.raises(DecodeError, match="refused 3"):
        Codec().loads(Codec().dumps(Coin(3), "it"), "it")


# -- types of a backend's own ---------------------------------------------------------------------------------------


class OldCoin(Coin):
    pass


@dataclass
class Purse:
    coins: list[Coin]


class Pair(NamedTuple):
    a: int = 0
    b: int = 0


class Lasting(Protocol):
    pass


def refuses(value: Any) -> Any:
    raise ValueError(f"refused {value}")


COIN = StoredType(Coin, "coin", lambda coin: coin.amount, Coin)
OLD_COIN = StoredType(OldCoin, "old coin", lambda coin: [coin.amount], lambda fields: OldCoin(*fields))
PURSE = StoredType(Purse, "purse", lambda purse: purse.coins, Purse)


@pytest.fixture(params=["json", "msgpack"])
def new_codec(request: pytest.FixtureRequest) -> Callable[..., Codec]:
    """A codec for one of the serializers that know types, with these."""
    return lambda *types: Codec(request.param, accept=(request.param,), types=types)


def test_a_type_is_written_and_read_wherever_it_stands(new_codec: Callable[..., Codec]) -> None:
    codec = new_codec(PURSE, COIN)
    value = {"purse": Purse([Coin(1), Coin(2)]), "when": DONE, "none": None}
    assert codec.decode("task-7", codec.encode(meta_of(value))) == meta_of(value)
    read = codec.decode("task-7", codec.encode(meta_of(ValueError(Coin(3)), FAILURE))).result
    assert (type(read), read.args) == (ValueError, (Coin(3),))
    extended = replace(meta_of(1), extra={"args": [Coin(3)]})
    assert codec.decode("task-7", codec.encode(extended)) == extended


def test_kombu_reads_what_a_type_wrote_and_the_other_way_round(register: Callable[..., None]) -> None:
    value = [Purse([Coin(1)]), Coin(2)]
    data = Codec(types=[COIN, PURSE]).dumps(value, "it")
    for stored in (COIN, PURSE):
        register(stored.cls, stored.name, stored.encode, stored.decode)
    assert data.decode() == kombu_json.dumps(value)
    assert kombu_json.loads(data) == value
    assert Codec(types=[COIN, PURSE]).loads(kombu_json.dumps(value).encode(), "it") == value


def test_a_type_takes_precedence_over_kombus_and_over_the_built_in_ones(
    register: Callable[..., None], new_codec: Callable[..., Codec]
) -> None:
    register(Coin, "coin", refuses, refuses)
    register(Decimal, "decimal", refuses, refuses)
    codec = new_codec(COIN, StoredType(Decimal, "decimal", lambda value: int(value * 100), lambda n: Decimal(n) / 100))
    data = codec.dumps([Coin(3), Decimal("1.5")], "it")
    assert codec.loads(data, "it") == [Coin(3), Decimal("1.5")]
    assert b"150" in data or b"\xcc\x96" in data


@pytest.mark.parametrize("types", [(COIN, OLD_COIN), (OLD_COIN, COIN)])
def test_the_most_specific_type_writes_whatever_the_order(
    new_codec: Callable[..., Codec], types: tuple[StoredType[Any], ...]
) -> None:
    codec = new_codec(*types)
    assert [type(coin) for coin in codec.loads(codec.dumps([OldCoin(1), Coin(2)], "it"), "it")] == [OldCoin, Coin]
    base_alone = new_codec(COIN)
    assert base_alone.loads(base_alone.dumps(OldCoin(1), "it"), "it") == Coin(1)


def test_of_two_types_of_a_class_the_first_writes_and_both_read(new_codec: Callable[..., Codec]) -> None:
    renamed = StoredType(Coin, "money", lambda coin: coin.amount, Coin)
    data = new_codec(renamed, COIN).dumps(Coin(3), "it")
    assert data == new_codec(renamed).dumps(Coin(3), "it")
    assert new_codec(COIN, renamed).loads(data, "it") == Coin(3)


def test_types_are_the_codecs_own(new_codec: Callable[..., Codec]) -> None:
    data = new_codec(COIN).encode(meta_of(Coin(3)))
    with pytest.raises(DecodeError, match=r"task-7.*unknown __type__ 'coin'; pass types= to the backend"):
        new_codec().decode("task-7", data)
    with pytest.raises(EncodeError, match=r"task-7.*Coin"):
        new_codec(PURSE).encode(meta_of(Purse([Coin(3)])))


@pytest.mark.parametrize("raised", [KeyError("why"), SystemExit("why"), RecursionError("why")], ids=type_name)
def test_an_encoder_that_raises_is_named_with_task_and_type(
    new_codec: Callable[..., Codec], raised: BaseException
) -> None:
    def encode(coin: Coin) -> Any:
        raise raised

    broken = StoredType(Coin, "coin", encode, Coin)
    kind = type(raised).__name__
    with pytest.raises(EncodeError, match=rf"task-7.*type Coin, and encode of the type 'coin' raised {kind}.*why"):
        new_codec(broken).encode(meta_of([Coin(3)]))
    read = new_codec(broken).decode("task-7", new_codec(broken).encode(meta_of(ValueError(Coin(3)), FAILURE))).result
    assert read.args == ("Coin(amount=3)",)


def test_an_error_of_ours_out_of_code_of_the_users_own_is_an_encode_error() -> None:
    class Odd:
        def __json__(self) -> Any:
            raise ImproperlyConfigured("of its own")

    with pytest.raises(EncodeError, match=r"task-7.*of its own"):
        Codec().encode(meta_of(Odd()))


def test_an_encoder_without_end_is_refused(new_codec: Callable[..., Codec]) -> None:
    with pytest.raises(EncodeError, match=r"task-7.*(too deeply|recursion)"):
        new_codec(StoredType(Coin, "coin", lambda coin: coin, Coin)).encode(meta_of(Coin(3)))


@pytest.mark.parametrize("name", ["coin", "decimal"])
@pytest.mark.parametrize("raised", [KeyError("why"), SystemExit("why")], ids=type_name)
def test_a_decoder_that_raises_is_an_error_of_the_reader_and_not_of_the_storer(
    new_codec: Callable[..., Codec], raised: BaseException, name: str
) -> None:
    def decode(value: Any) -> Coin:
        raise raised

    codec = new_codec(StoredType(Coin, name, lambda coin: coin.amount, decode))
    data = codec.encode(meta_of(Coin(3)))
    with pytest.raises(DecodeError, match=r"task-7.*why") as info:
        codec.decode("task-7", data)
    assert info.value.__cause__ is raised


def test_a_type_can_be_told_by_an_abstract_class_and_by_what_a_proxy_claims(new_codec: Callable[..., Codec]) -> None:
    class Proxy:
        amount = 3

        __class__: Any = property(lambda self: Coin)

    codec = new_codec(COIN, StoredType[Any](AbstractSet, "set", sorted, set))
    assert codec.loads(codec.dumps([Proxy(), frozenset({1, 2}), {3}], "it"), "it") == [Coin(3), {1, 2}, {3}]


def test_pickle_needs_no_types_but_its_reader_may_use_them() -> None:
    codec = Codec("pickle", accept=("pickle", "json"), types=[StoredType(Coin, "coin", refuses, Coin)])
    assert codec.loads(codec.dumps(Coin(3), "it"), "it") == Coin(3)
    assert codec.loads(Codec(types=[COIN]).dumps(Coin(3), "it"), "it") == Coin(3)


#: For arguments that a type checker refuses, too.
NEW_TYPE: Any = StoredType
NEW_CODEC: Any = Codec


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NEW_TYPE(Coin(1), "coin", int, Coin), r"must be a class, not Coin\(.*pass \(cls, name"),
        (lambda: NEW_TYPE(Lasting, "it", int, int), "Lasting does not support isinstance .* pass a class"),
        (lambda: NEW_TYPE(Coin, "", refuses, Coin), "Coin needs a name in the store, not ''; pass a str"),
        (lambda: NEW_TYPE(Coin, None, refuses, Coin), "Coin needs a name in the store, not None"),
        (lambda: NEW_TYPE(Coin, "coin", None, Coin), "encode of the StoredType 'coin' must be a function"),
        (lambda: NEW_TYPE(Coin, "coin", refuses, 1), "decode of the StoredType 'coin' must be a function"),
        (lambda: Codec(types=[COIN, COIN]), "two types with the name 'coin'; give each its own name"),
        (lambda: NEW_CODEC(types=COIN), "types must be a list of StoredType, not StoredType"),
        (lambda: NEW_CODEC(types={"coin": Coin}), "types must be made with StoredType.*, not 'coin'"),
        (
            lambda: Codec(types=[StoredType(Pair, "a", list, Pair)]),
            "the serializer itself writes Pair, as a tuple.*wrap the value",
        ),
        (
            lambda: Codec("msgpack", ("msgpack",), types=[StoredType(bytes, "b", list, bytes)]),
            "the serializer itself writes bytes, as a bytes",
        ),
    ],
)
def test_types_that_make_no_sense_are_refused_at_once(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=message):
        make()


# -- kombu's JSON ---------------------------------------------------------------------------------------------------


@unhurried
@given(any_value())
def test_json_is_kombus_byte_for_byte(value: Any) -> None:
    data = Codec().dumps(value, "it")
    assert data == kombu_json.dumps(value).encode()
    # repr, because it tells 1 from True and -0.0 from 0, and finds one NaN as good as another.
    assert repr(Codec().loads(data, "it")) == repr(kombu_json.loads(data))


@unhurried
@given(any_document())
def test_json_of_anybodys_making_reads_as_with_kombu(document: Any) -> None:
    data = json.dumps(document).encode()
    try:
        expected = kombu_json.loads(data)
    except Exception:
        with pytest.raises(DecodeError):
            Codec().loads(data, "it")
    else:
        assert repr(Codec().loads(data, "it")) == repr(expected)


EXTRAS = [
    (DONE, '{"__type__": "datetime", "__value__": "2024-05-06T07:08:09.123456+00:00"}'),
    (date(2024, 5, 6), '{"__type__": "date", "__value__": "2024-05-06"}'),
    (time(7, 8), '{"__type__": "time", "__value__": "07:08:00"}'),
    (Decimal("1.50"), '{"__type__": "decimal", "__value__": "1.50"}'),
    (UUID(int=7), '{"__type__": "uuid", "__value__": {"hex": "00000000000000000000000000000007"}}'),
    ("h\u00e9".encode(), '{"__type__": "bytes", "__value__": "h\\u00e9"}'),
    (b"\xff\x00", '{"__type__": "base64", "__value__": "/wA="}'),
]


@pytest.mark.parametrize(("value", "written"), EXTRAS, ids=lambda item: type(item).__name__)
def test_what_json_lacks_is_tagged(value: Any, written: str) -> None:
    data = Codec().dumps([value], "it")
    assert data.decode() == f"[{written}]"
    assert Codec().loads(data, "it") == [value]


class Money:
    def __json__(self) -> Any:
        return {"cents": Decimal(5)}


class Broken:
    def __json__(self) -> Any:
        raise ZeroDivisionError("broken")


class Colour(Enum):
    RED = 1


@dataclass
class Point:
    x: int = 1


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
def test_an_object_may_say_what_stands_for_it(serializer: str) -> None:
    codec = Codec(serializer, accept=(serializer,))
    assert codec.loads(codec.dumps([Money()], "it"), "it") == [{"cents": Decimal(5)}]


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
@pytest.mark.parametrize(
    "value", [{1}, frozenset(), timedelta(1), object(), 1j, bytearray(), Colour.RED, Point(), Point], ids=type_name
)
def test_the_storer_learns_which_type_of_which_task_is_refused(serializer: str, value: Any) -> None:
    with pytest.raises(
        EncodeError, match=rf"task task-7 .* {serializer}: result\[0\] .* type {type(value).__qualname__};"
    ):
        Codec(serializer, accept=(serializer,)).encode(meta_of([value]))


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
@pytest.mark.parametrize("key", [(1, 2), DONE, UUID(int=7)], ids=repr)
def test_a_key_that_would_change_its_type_is_refused(serializer: str, key: Any) -> None:
    with pytest.raises(EncodeError, match=type(key).__name__):
        Codec(serializer, accept=(serializer,)).encode(meta_of({key: 1}))


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
@pytest.mark.parametrize("make", [Broken, circular, lambda: nested(100_000), lambda: 10**5000])
def test_a_value_that_cannot_be_written_out_is_refused(serializer: str, make: Callable[[], Any]) -> None:
    with pytest.raises(EncodeError, match="task-7"):
        Codec(serializer, accept=(serializer,)).encode(meta_of(make()))


def test_what_pickle_cannot_hold_is_refused() -> None:
    with pytest.raises(EncodeError, match=r"task-7.*pickle"):
        Codec("pickle", accept=("pickle",)).encode(meta_of(lambda: 1))


# -- the fields of a meta -------------------------------------------------------------------------------------------


def test_the_fields_are_celerys_in_celerys_order() -> None:
    assert Codec().encode(TaskMeta("task-7", SUCCESS, 42, None, [(("child", None), None)], DONE)) == (
        b'{"status": "SUCCESS", "result": 42, "traceback": null, "children": [[["child", null], null]], '
        b'"date_done": "2024-05-06T07:08:09.123456+00:00", "task_id": "task-7"}'
    )


def test_optional_fields_stand_before_the_id() -> None:
    extra = {"group_id": "g", "parent_id": "p", "name": "add", "args": [1], "kwargs": {}, "worker": "w", "retries": 2}
    extra["queue"] = "q"
    data = Codec().encode(TaskMeta("task-7", SUCCESS, 42, date_done=DONE, extra=extra))
    assert list(json.loads(data))[4:] == ["date_done", *extra, "task_id"]
    read = Codec().decode("task-7", data)
    assert {name: getattr(read, name) for name in extra} == extra


@pytest.mark.parametrize("serializer", EVERYTHING)
@pytest.mark.parametrize("compression", [None, *COMPRESSIONS])
def test_a_meta_comes_back_as_it_was(serializer: str, compression: str | None) -> None:
    codec = Codec(serializer, accept=(serializer,), compression=compression)
    values = [value for value, _ in EXTRAS]
    meta = TaskMeta("task-7", STARTED, values, "a traceback", [[["child", None], None]], DONE, {"group_id": "g"})
    assert codec.decode("task-7", codec.encode(meta)) == meta


def test_a_missing_field_is_an_absent_one() -> None:
    assert Codec().decode("task-7", b'{"status": "STARTED"}') == TaskMeta("task-7", STARTED)


def test_the_id_asked_for_counts_and_not_the_one_in_the_data() -> None:
    assert Codec().decode("task-7", as_json(task_id="another")).task_id == "task-7"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (None, None),
        ("2024-05-06T07:08:09.123456+00:00", DONE),
        ("2024-05-06T07:08:09.123456", DONE.replace(tzinfo=None)),
        ({"__type__": "datetime", "__value__": "2024-05-06T07:08:09.123456+00:00"}, DONE),
    ],
)
def test_date_done_in_every_form_that_celery_has_written(written: Any, read: datetime | None) -> None:
    assert Codec().decode("task-7", as_json(date_done=written)).date_done == read


def test_of_a_field_given_twice_the_last_counts_as_with_kombu() -> None:
    data = b'{"status": "STARTED", "status": "SUCCESS", "result": 1, "result": 2}'
    assert (read := Codec().decode("task-7", data)).status == SUCCESS
    assert read.result == kombu_json.loads(data)["result"]


class Unpicklable(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


def test_pickle_keeps_an_exception_whole_if_it_survives_that() -> None:
    codec = Codec("pickle", accept=("pickle",))
    whole = OSError(2, "no such file", "the name")  # the name is not among its args
    read = codec.decode("task-7", codec.encode(meta_of(whole, FAILURE))).result
    assert (type(read), read.filename) == (FileNotFoundError, "the name")
    read = codec.decode("task-7", codec.encode(meta_of(Unpicklable(code=5), FAILURE))).result
    assert (type(read), str(read)) == (Unpicklable, "code 5")


@pytest.mark.parametrize(
    ("meta", "written"),
    [
        (meta_of([DONE]), f"[{EXTRAS[0][1]}]"),
        (meta_of(ValueError(1), RETRY), '{"exc_type": "ValueError", "exc_message": [1], "exc_module": "builtins"}'),
    ],
)
def test_a_result_can_be_written_without_the_other_fields(meta: TaskMeta, written: str) -> None:
    assert Codec().dumps_result(meta).decode() == written


@pytest.mark.parametrize(
    "meta",
    [
        TaskMeta('ü"\\', "SUCCESS", {"a": [1.5, None, "\ud83d\ude00"]}, None, (), DONE),
        TaskMeta("t", STARTED, {"pid": 1}),
        TaskMeta("t", FAILURE, None, 'line 1\n\t"line 2"', [(("child", None), None)], DONE),
        TaskMeta("t", 'MY "STATE"', DONE, None, (), None, {"name": "tasks.add", "args": [1, "é"], "retries": 0}),
    ],
)
def test_the_json_written_in_place_is_that_of_a_mapping(meta: TaskMeta) -> None:
    assert Codec().encode(meta) == _dump_fields(Dialect().json, meta)


def test_white_space_around_a_result_is_nothing_and_anything_else_an_error() -> None:
    assert Codec().decode("t", b' {"status": "SUCCESS", "result": 1}\r\n').result == 1
    for data in (b'{"status": "SUCCESS"} {}', b'{"status": "SUCCESS"}x', b" "):
        with pytest.raises(DecodeError, match="the result of task t cannot be read"):
            Codec().decode("t", data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (Codec().encode(meta_of(1)), True),
        (Codec(compression="gzip").encode(meta_of(1)), True),
        (Codec("pickle", accept=("pickle",)).encode(meta_of(1)), True),
        (Codec("msgpack", accept=("msgpack",)).encode(meta_of(1)), True),
        (b'{"result":1,"status":"SUCCESS"}', True),
        (b'{"status": "SUCCESS", "what follows is not looked at', True),
        (Codec().encode(meta_of('{"status": "SUCCESS"', STARTED)), False),
        (Codec(compression="gzip").encode(meta_of(ValueError(), FAILURE)), False),
        (Codec("pickle", accept=("pickle",)).encode(meta_of(ValueError(), FAILURE)), False),
        (b"", False),
        (b"[]", False),
        (b'"SUCCESS"', False),
    ],
)
def test_whether_stored_bytes_are_a_success(data: bytes, expected: bool) -> None:
    assert Codec(accept=EVERYTHING, max_result_size=2**20).is_success(data) is expected


def test_whether_it_is_a_success_is_not_guessed_where_another_reader_can_tell() -> None:
    with pytest.raises(ContentDisallowed, match="pickle"):
        Codec().is_success(Codec("pickle", accept=("pickle",)).encode(meta_of(1)))
    with pytest.raises(ResultTooLargeError):
        Codec(max_result_size=2**20).is_success(compress_payload(b"{" + b" " * 2**21 + b"}", "gzip"))


UNKNOWN_HERE = {
    "Celery with result_serializer=yaml": b"children: []\nresult: 42\nstatus: SUCCESS\ntask_id: x\n",
    "compressed by a method of another version": b"\x00celery-compressed\x00application/x-brotli\x00\x0b\x02\x80abc",
    "a cut stream": b"\x00celery-compressed\x00application/x-gzip\x00",
    "another encoding": '{"status": "SUCCESS"}'.encode("utf-16"),
    "an alien serializer": b"\xc1\xffwhatever",
}


@pytest.mark.parametrize("data", UNKNOWN_HERE.values(), ids=UNKNOWN_HERE)
def test_what_this_process_cannot_read_may_be_a_success(data: bytes) -> None:
    for judge in (Codec(accept=EVERYTHING).is_success, Codec(accept=EVERYTHING).is_final):
        with pytest.raises(DecodeError, match="not overwritten; to store another result, forget the id first"):
            judge(data)


def test_a_type_that_is_unknown_here_does_not_keep_the_state_from_being_known() -> None:
    """kombu's `register_type` in the worker, and not here."""
    for status in (SUCCESS, FAILURE, STARTED):
        text = f'{{"result": {{"__type__": "money", "__value__": "4 EUR"}}, "status": "{status}"}}'
        data = b"\x00celery-compressed\x00application/x-gzip\x00" + zlib.compress(text.encode())
        assert Codec().is_success(data) is (status == SUCCESS)
        assert Codec().is_final(data) is (status != STARTED)


# -- what is accepted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", ["pickle", "msgpack"])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_other_serializers_are_read_only_if_named(serializer: str, compression: str | None) -> None:
    data = Codec(serializer, accept=(serializer,), compression=compression).encode(meta_of([1]))
    with pytest.raises(ContentDisallowed, match=rf"task-7.*{serializer}.*accept=\('{serializer}', …\)"):
        Codec().decode("task-7", data)
    assert Codec(accept=("json", serializer)).decode("task-7", data) == meta_of([1])


def test_json_too_can_be_left_out() -> None:
    with pytest.raises(ContentDisallowed, match="json"):
        Codec("msgpack", accept=("msgpack",)).decode("task-7", as_json())


class Trap:
    """Unpickling one of these must not happen."""

    sprung = False

    def __reduce__(self) -> Any:
        return setattr, (Trap, "sprung", True)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_is_not_accepted_is_not_touched(protocol: int) -> None:
    data = pickle.dumps({"status": SUCCESS, "result": Trap()}, protocol)
    with pytest.raises(ContentDisallowed):
        Codec(accept=("json", "msgpack")).decode("task-7", data)
    assert not Trap.sprung


@pytest.mark.parametrize("protocol", [0, 1])
def test_a_pickle_older_than_its_own_mark_is_not_touched_either(protocol: int) -> None:
    with pytest.raises(DecodeError):
        Codec(accept=EVERYTHING).decode("task-7", pickle.dumps({"status": SUCCESS, "result": Trap()}, protocol))
    assert not Trap.sprung


@pytest.mark.parametrize("size", [1, 15, 16, 70_000])
@pytest.mark.parametrize("make", [lambda size: {str(n): n for n in range(size)}, lambda size: list(range(size))])
def test_msgpack_is_recognised_whatever_its_size(size: int, make: Callable[[int], Any]) -> None:
    codec = Codec("msgpack", accept=EVERYTHING)
    assert codec.loads(codec.dumps(make(size), "it"), "it") == make(size)


@pytest.mark.parametrize("serializer", EVERYTHING)
@pytest.mark.parametrize("value", [0, 5, 42, 127, 128, -1, True, None, 1.5, "", "x", b"", b"\xff", [], {}], ids=repr)
def test_a_value_on_its_own_is_read_by_a_codec_like_the_writers(serializer: str, value: Any) -> None:
    codec = Codec(serializer, accept=EVERYTHING)
    assert codec.loads(codec.dumps(value, "it"), "it") == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"serializer": "yaml"}, "unknown serializer 'yaml'; known are json, msgpack, pickle"),
        ({"accept": ("json", "yaml")}, "unknown serializer 'yaml'"),
        ({"serializer": "msgpack"}, "add it to accept"),
        ({"accept": "pickle"}, "'json' is not in accept"),
        ({"compression": "rar"}, "unknown compression 'rar'; known are .*bz2.*gzip.*lzma.*zstd"),
        *(({"max_result_size": size}, "max_result_size") for size in (0, -1, True, 1.5, "1", None)),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=message):
        Codec(**options)


# -- what cannot be read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"1",
        b"[]",
        b'["status", "SUCCESS"]',
        b'"SUCCESS"',
        b"{}",
        b"celery",
        b"\x00celery-compressed\x00\xe9\x00",
        b'{"status": "SUCCESS"} {"status": "SUCCESS"}',
        b'{"status": "SUCCESS\xff"}',
        b'{"status": "SUCCESS", "result": "\xed\xa0\x80"}',
        b"\xef\xbb\xbf" + as_json(),
        as_json().decode().encode("utf-16"),
        as_json().decode().encode("utf-32-le"),
        b'{"status": "SUCCESS", "result": ' + b"[" * 200_000,
        b'{"status": "SUCCESS", "result": ' + b'{"a":' * 200_000,
        b'{"status": "SUCCESS", "result": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"status": "SUCCESS", "result": ' + b"9" * 5000 + b"}",
        as_json(result={"__type__": "no such type", "__value__": 1}),
        as_json(result={"__type__": ["datetime"], "__value__": 1}),
        as_json(result={"__type__": None, "__value__": 1}),
        as_json(result={"__type__": "datetime", "__value__": 1}),
        as_json(result={"__type__": "datetime", "__value__": "yesterday"}),
        as_json(result={"__type__": "decimal", "__value__": "one"}),
        as_json(result={"__type__": "uuid", "__value__": {"hex": "7"}}),
        as_json(result={"__type__": "uuid", "__value__": {"no such field": 1}}),
        as_json(result={"__type__": "bytes", "__value__": None}),
        as_json(result={"__type__": "base64", "__value__": "Y*Q=="}),
        *(as_json(status=status) for status in (None, 1, ["SUCCESS"], {"__type__": "bytes", "__value__": "SUCCESS"})),
        *(as_json(traceback=traceback) for traceback in (1, ["text"], {"a": 1})),
        *(as_json(children=children) for children in (1, "abc", {"a": 1}, True)),
        *(
            as_json(date_done=done)
            for done in (1, "", "now", "2024-13-01", ["2024-01-01"], {"__type__": "date", "__value__": "x"})
        ),
    ],
    ids=lambda data: repr(data[:60]),
)
def test_what_is_no_meta_is_a_decode_error(data: bytes) -> None:
    codec = Codec(accept=EVERYTHING)
    with pytest.raises(DecodeError, match="task-7"):
        codec.decode("task-7", data)
    with contextlib.suppress(DecodeError):  # what no reader could tell is another test's
        assert codec.is_success(data) is data.startswith(b'{"status": "SUCCESS"')


@pytest.mark.parametrize("serializer", EVERYTHING)
@pytest.mark.parametrize("compression", [None, *COMPRESSIONS])
def test_a_value_that_is_cut_short_anywhere_is_a_decode_error(serializer: str, compression: str | None) -> None:
    codec = Codec(serializer, accept=EVERYTHING, compression=compression)
    data = codec.encode(meta_of([1, "two", DONE]))
    for length in range(len(data)):
        with pytest.raises(DecodeError):
            codec.decode("task-7", data[:length])


@pytest.mark.parametrize(
    "data",
    [
        b"\x81",
        b"\xc1",
        b"\x81\x90\x01",
        b"\x81\xa6status\x01",
        b"\x81\xa6status\xa1\xff",
        b"\x81\xa6status" + b"\x91" * 200_000 + b"\x01",
        msgspec.msgpack.encode({"status": SUCCESS, "result": {"__type__": "no such type", "__value__": 1}}),
    ],
    ids=lambda data: repr(data[:30]),
)
def test_msgpack_that_is_no_meta_is_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError, match="task-7"):
        Codec(accept=("json", "msgpack")).decode("task-7", data)


@pytest.mark.parametrize("value", [[{"status": SUCCESS}], {"result": 1}, {"status": b"SUCCESS"}, SUCCESS, None])
def test_a_pickle_of_something_else_is_a_decode_error(value: Any) -> None:
    with pytest.raises(DecodeError, match="task-7"):
        Codec(accept=EVERYTHING).decode("task-7", pickle.dumps(value))


def decode_or_refuse(data: bytes) -> None:
    codec = Codec(accept=("json", "msgpack"), max_result_size=10_000)
    try:
        codec.is_success(data)
        meta = codec.decode("task-7", data)
    except SerializationError:
        return
    assert isinstance(meta.status, str)
    assert isinstance(meta.traceback, str | None)
    assert isinstance(meta.children, list | tuple)
    assert isinstance(meta.date_done, datetime | None)
    if meta.status in EXCEPTION_STATES:
        assert isinstance(meta.result, Exception)


VALID = [
    Codec(serializer, accept=EVERYTHING, compression=compression).encode(meta_of([1, "two", DONE]))
    for serializer in ("json", "msgpack")
    for compression in (None, *COMPRESSIONS)
]


@unhurried
@given(st.sampled_from(VALID), st.integers(0, 200), st.integers(0, 200), st.binary())
def test_no_bytes_whatever_make_anything_else_escape(valid: bytes, start: int, skipped: int, inserted: bytes) -> None:
    decode_or_refuse(valid[:start] + inserted + valid[start + skipped :])


@unhurried
@given(
    st.fixed_dictionaries(
        {"status": st.sampled_from([SUCCESS, *sorted(EXCEPTION_STATES)]) | any_document()},
        optional={name: any_document() for name in ("result", "traceback", "children", "date_done", "task_id", "name")},
    ),
    st.sampled_from([json.dumps, msgspec.msgpack.encode]),
)
def test_no_fields_whatever_make_anything_else_escape(fields: Any, dumps: Callable[[Any], str | bytes]) -> None:
    try:
        data = dumps(fields)
    except (UnicodeEncodeError, OverflowError):  # msgpack has no lone surrogates and no large integers
        return
    decode_or_refuse(data.encode() if isinstance(data, str) else data)


@unhurried
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "exc_type": st.sampled_from(["ValueError", "system", "UnicodeDecodeError", "OSError", "a.b"])
            | any_document(),
            "exc_module": st.sampled_from(["builtins", "os", "celery.exceptions"]) | any_document(),
            "exc_message": any_document(),
        },
    ),
    st.sampled_from(sorted(EXCEPTION_STATES)),
    st.none() | any_text(),
)
def test_whatever_is_stored_as_a_failure_is_an_exception(stored: Any, status: str, traceback: str | None) -> None:
    decode_or_refuse(as_json(status=status, result=stored, traceback=traceback))


# -- compression ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CELERY_COMPRESSIONS)
def test_celery_unpacks_what_we_pack(name: str) -> None:
    plain, packed = (Codec(compression=compression).encode(meta_of("x" * 1000)) for compression in (None, name))
    assert packed == compress_payload(plain, name)
    assert decompress_payload(packed) == plain


@pytest.mark.parametrize("name", CELERY_COMPRESSIONS)
def test_we_unpack_what_celery_packs_without_being_told(name: str) -> None:
    assert Codec().decode("task-7", compress_payload(Codec().encode(meta_of("x")), name)) == meta_of("x")


@pytest.mark.parametrize("name", ["application/x-brotli", "gzip", ""])
@pytest.mark.parametrize("end", [b"\x00body", b"\x00", b""])
def test_an_unknown_compression_is_a_decode_error(name: str, end: bytes) -> None:
    with pytest.raises(DecodeError, match=f"task-7.*unknown compression '{name}'"):
        Codec().decode("task-7", b"\x00celery-compressed\x00" + name.encode() + end)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_damaged_stream_is_a_decode_error(name: str) -> None:
    packed = bytearray(Codec(compression=name).encode(meta_of("x" * 1000)))
    packed[-20:-10] = bytes(byte ^ 0xFF for byte in packed[-20:-10])
    with pytest.raises(DecodeError, match="task-7"):
        Codec().decode("task-7", bytes(packed))


# -- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, *COMPRESSIONS])
def test_the_bound_is_on_the_unpacked_bytes_and_includes_the_last(compression: str | None) -> None:
    meta = meta_of("x" * 1000)
    size = len(Codec().encode(meta))
    exact, less = (Codec(compression=compression, max_result_size=bound) for bound in (size, size - 1))
    assert exact.decode("task-7", exact.encode(meta)) == meta
    with pytest.raises(ResultTooLargeError, match=rf"task-7.*{size:,} bytes.*{size - 1:,}"):
        less.encode(meta)
    with pytest.raises(ResultTooLargeError, match=rf"task-7.*{size - 1:,}"):
        less.decode("task-7", exact.encode(meta))


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_bomb_is_not_unpacked(name: str) -> None:
    bomb = compress_payload(b" " * 2**26, "bzip2" if name == "bz2" else name)
    codec = Codec(max_result_size=2**20)
    tracemalloc.start()
    try:
        with pytest.raises(ResultTooLargeError, match="task-7"):
            codec.decode("task-7", bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 8 MiB are the dictionary of lzma, whatever it unpacks; the rest is the output and the growth of its buffer.
    assert peak < 2**23 + 4 * 2**20
