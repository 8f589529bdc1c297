"""What a result may hold: the path and the remedy in an `EncodeError`, `json_default`, and handles with a type."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, make_dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum, Flag, IntEnum, IntFlag, StrEnum
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypedDict

import kombu.utils.json
import msgspec
import pytest
from django.utils.functional import lazystr

import aioresult
from aioresult import (
    AsyncResult,
    DecodeError,
    EncodeError,
    ImproperlyConfigured,
    ResultSet,
    StoredType,
    TaskMeta,
    TaskRequest,
    UsageError,
    connect,
)
from aioresult.serialization import Codec
from aioresult.states import SUCCESS
from tests.test_imports import run_without

kombu_json: Any = kombu.utils.json  # has no annotations

TYPES = "pass types=[StoredType(...)] or json_default= to connect()"
METHOD = ", give the class a __json__ method"
PICKLE = ', or use serializer="pickle"'


def refused(value: Any, serializer: str = "json", **options: Any) -> tuple[str, BaseException | None]:
    """What the error says behind the name of the task, and its cause."""
    with pytest.raises(EncodeError) as info:
        Codec(serializer, (serializer,), **options).encode(TaskMeta("v", SUCCESS, value))
    said, head = str(info.value), f"the result of task v cannot be stored as {serializer}: "
    assert said.startswith(head)
    return said.removeprefix(head), info.value.__cause__


class Unknown:
    pass


class Row:
    def __init__(self, price: Any) -> None:
        self.price = price

    def __json__(self) -> Any:
        return vars(self)


class Listed(Row):
    def __json__(self) -> Any:
        return [1, self.price]


class Endless:
    def __json__(self) -> Any:
        return Endless()


class Itself:
    def __json__(self) -> Any:
        return self


class Broken:
    def __json__(self) -> Any:
        raise ZeroDivisionError("why")


class Hostile:
    """Every question to it ends in an exception that is no `Exception`."""

    def __getattribute__(self, name: str) -> Any:
        raise SystemExit("no")

    def __repr__(self) -> str:
        raise SystemExit("no")


class HostileDict(dict[str, Any]):
    def items(self) -> Any:
        raise SystemExit("no")


class HostileList(list[Any]):
    def __repr__(self) -> str:
        raise SystemExit("no")

    def __eq__(self, other: object) -> bool:
        raise SystemExit("no")

    __hash__ = None


def circle() -> dict[str, Any]:
    value: dict[str, Any] = {"a": [1]}
    value["a"].append(value)
    return value


def deep(depth: int, inmost: Any) -> Any:
    for _ in range(depth):
        inmost = [inmost]
    return inmost


# -- the path -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
@pytest.mark.parametrize(
    ("value", "path"),
    [
        (Unknown(), "result"),
        ({"rows": [1, [2], {}, Row(Unknown())]}, 'result["rows"][3].price'),
        ([Row({"a": Unknown()})], 'result[0].price["a"]'),
        ([Listed(Unknown())], "result[0].__json__()[1]"),
        (Listed(Listed(Unknown())), "result.__json__()[1].__json__()[1]"),
        ({1: {"a b": Unknown()}}, 'result[1]["a b"]'),
        ({"x" * 1000: Unknown()}, f'result["{"x" * 59}…"]'),
        (OrderedDict(a=defaultdict(list, b=[Unknown()])), 'result["a"]["b"][0]'),
        (HostileList([Unknown()]), "result[0]"),
        (deep(50, Unknown()), f"result{'[0]' * 10}…{'[0]' * 10}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_error_names_the_path_the_type_and_the_remedy(serializer: str, value: Any, path: str) -> None:
    said, cause = refused(value, serializer)
    assert said == f"{path} is an object of type Unknown; {TYPES}{METHOD}{PICKLE}"
    assert isinstance(cause, TypeError)


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (circle(), r'result\["a"\]\[1\] is result again, so the value contains itself: it nests too deeply'),
        ([Itself()], r"result\[0\]\.__json__\(\) is result\[0\] again"),
        (Endless(), "it nests too deeply"),
        (deep(100_000, 1), "it nests too deeply"),
        ([Broken()], r"result\[0\] is an object of type Broken, and its __json__ raised ZeroDivisionError: why"),
        ([Hostile()], r"result\[0\] is an object of type Hostile, and its class raised SystemExit: no"),
        ([HostileDict(a=1)], r"result\[0\] is an object of type HostileDict, and its items raised SystemExit: no"),
        (
            {"a": {(1, 2): 3}},
            r'result\["a"\] is a dict with a key of type tuple; make its keys texts, or use ser.*kle"',
        ),
        ([10**5000], r"result\[0\] is an object of type int that cannot be written \(.*str\(value\) instead"),
        (
            [1, {"__type__": "coin", "__value__": 1}],
            r"result\[1\] is a dict with the keys __type__ and __value__ .*'coin'.*; give it another key",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_else_is_wrong_with_a_value_has_a_path_too(serializer: str, value: Any, message: str) -> None:
    said, _ = refused(value, serializer)
    assert re.fullmatch(message + ".*", said), said


def test_pickle_names_the_path_and_takes_what_contains_itself() -> None:
    value = [circle(), {"a": [lambda: 1]}]
    said, _ = refused(value, "pickle")
    assert said.startswith('result[1]["a"][0] is an object of type function that cannot be written (')
    assert said.endswith("store plain data instead, or give its class a __reduce__ method")


def test_the_search_for_the_path_is_short_and_the_type_is_named_without_it() -> None:
    calls = 0

    class Slow:
        def __json__(self) -> Any:
            nonlocal calls
            calls += 1
            return deep(100, [])

    said, _ = refused([*[Slow()] * 5_000, Unknown()])
    assert said == f"it holds an object of type Unknown; {TYPES}{METHOD}{PICKLE}"
    assert calls < 5_000 + 1_500


def test_a_path_through_an_encoder_and_through_json_default_shows_them() -> None:
    coin = StoredType(Listed, "coin", lambda value: [value.price], Listed)
    row = StoredType(Row, "row", lambda value: {"price": value.price}, Row)
    assert refused({"a": Listed(Unknown())}, types=[coin])[0].startswith('encode(result["a"])[0] is an object of')
    assert refused([Row(Unknown())], types=[row, coin])[0].startswith("result[0].price is an object of type Unknown;")
    said, _ = refused([Unknown()], json_default=lambda value: [{1, 2}] if isinstance(value, Unknown) else refuse(value))
    assert said == "json_default(result[0])[0] is an object of type set, and json_default raised KeyError: 'no set'"


def refuse(value: Any) -> Any:
    raise KeyError(f"no {type(value).__name__}")


async def test_whatever_is_stored_has_a_path() -> None:
    async with connect("memory://", extended=True) as backend:
        with pytest.raises(EncodeError, match=r'^the result of task a cannot .* json: result\["rows"\]\[0\] is an obj'):
            await backend.store_result("a", {"rows": [Unknown()]}, "PROGRESS")
        with pytest.raises(EncodeError, match=r'body of chord g cannot .* json: body\["a"\] is an object of type Unkn'):
            await backend.create_chord("g", body={"a": Unknown()}, size=1)
        async with backend.running("b") as task:
            with pytest.raises(EncodeError, match=r'of task b cannot .* json: result\["rows"\] is an object of type U'):
                task.progress(1, 2, rows=Unknown())
            with pytest.raises(
                EncodeError, match=r"chunk of the output of task b cannot .* json: chunk\[1\] is an o"
            ) as it:
                await task.output.send([1, Unknown()])
            assert "pickle" not in str(it.value)  # chunks are JSON, whatever the serializer
        # The arguments are a note beside the result: they cannot make storing fail.
        await backend.mark_as_done("c", 1, TaskRequest(id="c", args=(Hostile(),), kwargs={"a": Listed(Broken())}))
        meta = await backend.get_task_meta("c")
        assert (meta.result, type(meta.args), type(meta.kwargs)) == (1, str, str)


# -- as with kombu --------------------------------------------------------------------------------------------------


@dataclass
class Point:
    x: int = 1


class Named(NamedTuple):
    a: int = 1


class Struct(msgspec.Struct):
    x: int = 1


Colour = Enum("Colour", "RED")
Name = StrEnum("Name", "RED")
Number = IntEnum("Number", "ONE")
Bit = Flag("Bit", "ONE")
IntBit = IntFlag("IntBit", "ONE")


class Array:
    """As an array of NumPy, which the tests do without."""

    __module__ = "numpy"

    def tolist(self) -> list[int]:
        return []


async def coroutine() -> None: ...


@pytest.mark.parametrize(
    "value",
    [Name.RED, Number.ONE, IntBit.ONE, Named(), Row(Decimal(1)), lazystr("text"), OrderedDict(a=1), {1: 2, None: 3}],
    ids=lambda value: type(value).__name__,
)
def test_what_kombu_writes_we_write(value: Any) -> None:
    assert Codec().dumps([value], "it").decode() == kombu_json.dumps([value])
    msgpack = Codec("msgpack", ("msgpack",))
    read = msgpack.loads(msgpack.dumps([value], "it"), "it")
    assert read == ([value] if type(value) is dict else kombu_json.loads(kombu_json.dumps([value])))


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (Point(), "store dataclasses.asdict(value) instead"),
        (Colour.RED, "store value.value instead"),
        (Bit.ONE, "store value.value instead"),
        (Path(), "store str(value) instead"),
        (PurePosixPath(), "store str(value) instead"),
        (Struct(), "store msgspec.to_builtins(value) instead"),
        ({1}, "store list(value) instead"),
        (frozenset(), "store list(value) instead"),
        ((_ for _ in ()), "store list(value) instead"),
        (timedelta(), "store value.total_seconds() instead"),
        (bytearray(), "store bytes(value) instead"),
        (memoryview(b""), "store bytes(value) instead"),
        (Array(), "store value.tolist() instead"),
        (Point, TYPES),
        (1j, TYPES),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_kombu_refuses_we_refuse_and_name_what_to_store_instead(serializer: str, value: Any, remedy: str) -> None:
    with pytest.raises(TypeError):
        kombu_json.dumps(value)
    said, _ = refused([value], serializer)
    assert said.startswith(f"result[0] is an object of type {type(value).__qualname__}; {remedy}")
    own = type(value).__module__ in {__name__, "numpy"}  # to other classes nobody adds a method
    assert (METHOD in said) is own
    refused_by_pickle = isinstance(value, (memoryview, Generator))
    assert ("pickle" in said) is not refused_by_pickle


def test_a_coroutine_that_was_not_awaited_is_named_as_that() -> None:
    forgotten = coroutine()
    assert "store what awaiting it returns instead" in refused({"a": forgotten})[0]
    forgotten.close()


# -- json_default ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
def test_json_default_gets_what_nothing_else_knows_and_what_it_returns_is_written_again(serializer: str) -> None:
    seen: list[Any] = []

    def default(value: Any) -> Any:
        seen.append(value)
        return str(value) if isinstance(value, Path) else vars(value)

    struct = StoredType(Struct, "struct", lambda value: value.x, Struct)
    codec = Codec(serializer, (serializer,), types=[struct], json_default=default)
    cart = Cart({1: Point()}, Path("a"))
    read = codec.loads(codec.dumps([cart, Decimal(2), Row(Path("b")), Struct(5), WHEN, Name.RED], "it"), "it")
    rows = {1 if serializer == "msgpack" else "1": {"x": 1}}
    assert read == [{"rows": rows, "path": "a"}, Decimal(2), {"price": "b"}, Struct(5), WHEN, "red"]
    assert seen == [cart, Point(), Path("a"), Path("b")]


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
@pytest.mark.parametrize("raised", [KeyError("why"), SystemExit("why")], ids=lambda raised: type(raised).__name__)
def test_what_json_default_raises_is_the_cause(serializer: str, raised: BaseException) -> None:
    def default(value: Any) -> Any:
        raise raised

    said, cause = refused({"a": Unknown()}, serializer, json_default=default)
    assert cause is raised
    kind = type(raised).__name__
    assert said.startswith(f'result["a"] is an object of type Unknown, and json_default raised {kind}: ')


def test_a_json_default_without_end_is_refused() -> None:
    assert "again, so the value contains itself" in refused(Unknown(), json_default=lambda value: value)[0]
    assert refused(Unknown(), json_default=lambda value: Unknown())[0] == "it nests too deeply"


async def test_json_default_is_an_option_of_backends_and_must_be_a_function() -> None:
    async with connect("memory://", json_default=str) as backend:
        await backend.mark_as_done("a", Path("a"))
        assert await backend.result("a") == "a"
    wrong: Any = "str"
    with pytest.raises(ImproperlyConfigured, match=r"json_default must be a function of one argument, .* not 'str'"):
        connect("memory://", json_default=wrong)


# -- a handle with a type -------------------------------------------------------------------------------------------


class Order(TypedDict):
    id: int
    when: date


class Basket(msgspec.Struct):
    orders: list[Order]
    total: Decimal = Decimal(0)


@dataclass
class Cart:
    rows: dict[int, Point] = field(default_factory=dict)
    path: Path = Path()


WHEN = date(2024, 5, 6)
ORDER: Order = {"id": 1, "when": WHEN}


@pytest.mark.parametrize(
    ("wanted", "stored", "value"),
    [
        (int, 5, 5),
        (list[int], [1, 2], [1, 2]),
        (tuple[int, str], (1, "a"), (1, "a")),
        (set[str], ["a"], {"a"}),
        (int | None, None, None),
        (dict[int, datetime], {1: datetime(2024, 5, 6)}, {1: datetime(2024, 5, 6)}),  # noqa: DTZ001
        (Colour, 1, Colour.RED),
        (Path, "a/b", Path("a/b")),
        (Order, {"id": 1, "when": "2024-05-06"}, {"id": 1, "when": WHEN}),
        (
            Basket,
            {"orders": [{"id": 1, "when": WHEN}], "total": Decimal(3)},
            Basket([{"id": 1, "when": WHEN}], Decimal(3)),
        ),
        (Cart, {"rows": {"7": {"x": 2}}, "path": "p"}, Cart({7: Point(2)}, Path("p"))),
        (Any, {"a": 1}, {"a": 1}),
        (Unknown, Unknown(), Unknown),
    ],
    ids=lambda value: "an Unknown" if isinstance(value, Unknown) else repr(value),
)
async def test_a_value_is_converted_to_the_type_of_the_handle(wanted: Any, stored: Any, value: Any) -> None:
    unknown = StoredType(Unknown, "unknown", lambda value: 1, lambda value: Unknown())
    async with connect("memory://", types=[unknown]) as backend:
        await backend.mark_as_done("a", stored)
        read = await backend.result("a", type=wanted)
        assert type(read) is value if value is Unknown else (read, type(read)) == (value, type(value))


MISFITS = [
    (list[int], [1, "a"], r"type=list\[int\]: result\[1\]: Expected `int`, got `str`"),
    (Point, {"x": "a"}, r"type=Point: result\.x: Expected `int`, got `str`"),
    (Basket, {"orders": [{"id": 1}]}, r"type=Basket: result\.orders\[0\]: Object missing required field `when`"),
    (dict[int, int], {"a": 1}, r"type=dict\[int, int\]: a key of result: Expected `int`, got `str`"),
    (Cart, {"path": 1}, r"type=Cart: result\.path: Expected `Path`, got `int`"),
    (Unknown, 1, "type=Unknown: result: Expected `Unknown`, got `int`"),
]


@pytest.mark.parametrize(("wanted", "stored", "message"), MISFITS, ids=[repr(misfit[0]) for misfit in MISFITS])
async def test_a_value_that_does_not_fit_raises_at_every_await_and_the_task_has_succeeded(
    wanted: Any, stored: Any, message: str
) -> None:
    async with connect("memory://") as backend:
        await backend.mark_as_done("a", stored)
        result = backend.result("a", type=wanted)
        errors = []
        for wait in (result.get, lambda: result.get(propagate=False), ResultSet([result]).get, result.get):
            with pytest.raises(DecodeError, match=f"^the result of task a does not fit {message}$") as info:
                await wait()
            errors.append(info.value)
        assert len({id(error) for error in errors}) == len(errors)
        assert isinstance(errors[0].__cause__, msgspec.ValidationError)
        with pytest.raises(DecodeError):
            result.value()
        assert (await result.state(), await result.successful()) == (SUCCESS, True)
        assert await backend.result("a") == (await result.fetch()).result


async def test_typed_members_of_a_join_give_typed_values() -> None:
    async with connect("memory://") as backend:
        for task_id in "abc":
            await backend.mark_as_done(task_id, {"x": ord(task_id)})
        typed = backend.result("a", type=Point)
        group = backend.group([typed, "b", backend.group([backend.result("c", type=Point)])])
        value = [Point(97), {"x": 98}, [Point(99)]]
        assert await group == await aioresult.gather(*group) == group.value() == value
        assert [await each async for each in aioresult.as_completed([typed])] == [Point(97)]
        done, _ = await aioresult.wait([typed])
        assert [each.value() for each in done] == [Point(97)]
        assert await backend.result("a", typed, type=Point).get() == Point(97)
        assert typed == backend.result("a")
        assert [value async for _, value in typed.collect()] == [Point(97)]


async def test_a_value_is_converted_once_a_handle_and_anew_after_forget() -> None:
    async with connect("memory://") as backend:
        await backend.mark_as_done("a", {"x": 1})
        result = backend.result("a", type=Point)
        assert await result is await result is result.value() is (await ResultSet([result]))[0]
        await result.forget()
        await backend.mark_as_done("a", {"x": 2})
        assert await result == Point(2)
        assert await backend.result("a", type=Point) is not await result


async def test_what_is_no_value_of_a_success_is_not_converted() -> None:
    async with connect("memory://") as backend:
        await backend.mark_as_failure("a", KeyError("why"))
        await backend.store_result("b", "half", "PROGRESS")
        failed, going, child = (backend.result(task_id, type=int) for task_id in ("a", "b", "c"))
        for _ in range(2):
            with pytest.raises(KeyError, match="why"):
                await failed
        assert isinstance(await failed.get(propagate=False), KeyError)
        await going.fetch()
        assert going.value() == "half"
        child.parent = failed
        with pytest.raises(KeyError, match="why"):
            await child
        ignored = backend.result("d", type=int)
        ignored.ignored = True
        assert await ignored is ignored.value() is None


async def test_a_constructor_that_raises_anything_is_an_error_of_this_value_alone() -> None:
    @dataclass
    class Odd:
        x: int

        def __post_init__(self) -> None:
            raise KeyError("odd") if self.x else ValueError("none")

    async with connect("memory://") as backend:
        await backend.mark_as_done("a", {"x": 1})
        await backend.mark_as_done("b", {"x": 0})
        with pytest.raises(DecodeError, match=r"the result of task a as type=.*Odd cannot be read: KeyError: 'odd'"):
            await backend.result("a", type=Odd)
        with pytest.raises(DecodeError, match=r"the result of task b does not fit type=.*Odd: result: none"):
            await backend.result("b", type=Odd)


async def test_a_type_that_cannot_be_converted_to_is_refused_at_once() -> None:
    async with connect("memory://") as backend:
        wrong: Any = 5
        with pytest.raises(UsageError, match="msgspec cannot convert to type=5"):
            backend.result("a", type=wrong)
        assert type(backend.result("a")) is AsyncResult  # without a type, a handle costs no more than before


WITHOUT_EITHER = """
import aioresult
backend = aioresult.connect("memory://")
try:
    backend.result("a", type=list[int])
except aioresult.ImproperlyConfigured as exc:
    print(exc)
"""


def test_without_either_package_the_error_says_how_to_install_one() -> None:
    printed = run_without(["msgspec", "pydantic"], WITHOUT_EITHER)
    assert printed == (
        "type=list[int] needs msgspec, or pydantic 2 or later; install one of them with: "
        "pip install 'aioresult-tasks[msgpack]', or pip install 'pydantic>=2'"
    )


# -- pydantic -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> Any:
    pydantic = pytest.importorskip("pydantic")

    class Item(pydantic.BaseModel):  # type: ignore[name-defined, misc]
        price: Decimal
        when: date
        tags: set[str]

    return Item


def test_a_model_is_refused_with_a_hint_that_works(model: Callable[..., Any]) -> None:
    item = model(price="1.5", when=WHEN, tags=["a"])
    with pytest.raises(TypeError):
        kombu_json.dumps(item)
    said, _ = refused([item])
    assert said.startswith("result[0] is an object of type ")
    assert '; store value.model_dump(mode="json") instead, ' in said
    assert Codec().dumps(item.model_dump(mode="json"), "it")


async def test_models_are_made_by_pydantic(model: Any) -> None:
    holder = make_dataclass("Holder", [("items", list[model])])
    async with connect("memory://") as backend:
        item = model(price="1.5", when=WHEN, tags=["a"])
        await backend.mark_as_done("a", item.model_dump(mode="json"))
        assert await backend.result("a", type=model) == item
        await backend.mark_as_done("b", [item.model_dump(mode="json")] * 2)
        assert await backend.result("b", type=list[model]) == [item, item]
        assert await backend.result("b", type=list[model] | None) == [item, item]
        await backend.mark_as_done("c", {"items": [{"price": "x", "when": "2024-05-06", "tags": []}, {"tags": []}]})
        result: AsyncResult[Any] = backend.result("c", type=holder)
        for _ in range(2):
            with pytest.raises(DecodeError) as info:
                await result
            assert str(info.value).endswith(
                "Holder: result.items[0].price: Input should be a valid decimal; "
                "result.items[1].price: Field required; result.items[1].when: Field required"
            )
            assert type(info.value.__cause__).__module__.startswith("pydantic")


async def test_without_msgspec_pydantic_converts_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydantic")
    from aioresult.typed import _cached

    _cached.cache_clear()
    monkeypatch.setitem(sys.modules, "msgspec", None)
    async with connect("memory://") as backend:
        await backend.mark_as_done("a", {"1": ["2024-05-06"]})
        assert await backend.result("a", type=dict[int, list[date]]) == {1: [WHEN]}
        with pytest.raises(DecodeError, match=r"result\['1'\]: Input should be a valid integer"):
            await backend.result("a", type=dict[str, int])
        wrong: Any = 5
        with pytest.raises(UsageError, match="pydantic cannot convert to type=5"):
            backend.result("a", type=wrong)
    _cached.cache_clear()
