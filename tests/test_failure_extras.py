"""What travels with an exception beside Celery's three fields: members, notes, attributes, text; and their bounds."""

from __future__ import annotations

import asyncio
import json
import pickle
import traceback
import urllib.error
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Self, cast

import pytest
from celery import Celery
from celery.backends.base import BaseBackend
from hypothesis import given, settings
from hypothesis import strategies as st

from aioresult import AioResultError, RemoteError, TaskMeta, TaskRevokedError, TimeoutError
from aioresult.restore import load_exception
from aioresult.serialization import Codec
from aioresult.states import FAILURE, REVOKED
from aioresult.tasks import copy_of_error

HERE = __name__
SERIALIZERS = ["json", "msgpack", "pickle"]


def stored(exc: BaseException, serializer: str = "json") -> Any:
    """What a server would hold of ``exc``."""
    codec = Codec(serializer, accept=(serializer,))
    return codec.loads(codec.dumps_result(TaskMeta("t", FAILURE, exc)), "it")


def load(stored: Any, status: str = FAILURE) -> Any:
    return load_exception(stored, status, None)


def described(name: str, module: Any = HERE, message: Any = (), **more: Any) -> Any:
    return load({"exc_type": name, "exc_message": message, "exc_module": module, **more})


def there_and_back(exc: BaseException, serializer: str = "json") -> Any:
    return load(stored(exc, serializer))


def as_celery_reads(data: Any) -> Any:
    with Celery(set_as_current=False) as app:
        return BaseBackend(app=app).exception_to_python(data)


def notes_of(exc: BaseException) -> list[str]:
    return list(getattr(exc, "__notes__", ()))


class Plain(Exception):
    pass


class Declined(Exception):
    """The most common shape of all."""

    def __init__(self, amount: int) -> None:
        super().__init__(f"declined: {amount}")
        self.amount = amount


class NotFound(Exception):
    def __init__(self, id: int) -> None:
        super().__init__(f"no item {id + 0}")
        self.id = id


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__()
        self.code = code

    def __str__(self) -> str:
        return f"code {self.code}"


class Private(KeywordOnly):
    def __str__(self) -> str:
        return f"code {self._code}"

    def __init__(self, *, code: int) -> None:
        super().__init__(code=code)
        self._code = code


class Translated(Exception):
    """Called with the arguments that it keeps, it would have another code."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Tuples(Exception):
    def __init__(self, parts: Any) -> None:
        super().__init__(tuple(parts))
        self.parts = tuple(parts)


@dataclass(frozen=True)
class Frozen(Exception):
    amount: int
    currency: str = "EUR"


class KeepsItself(Plain):
    secret = ""

    def __getstate__(self) -> Any:
        return None


class Guarded(Exception):
    """Code of its own would run if data were set on it as an attribute."""

    __slots__ = ("slot",)
    ran = 0
    default = 1

    @property
    def computed(self) -> int:
        return 7

    @computed.setter
    def computed(self, value: object) -> None:
        Guarded.ran += 1

    def __setattr__(self, name: str, value: object) -> None:
        Guarded.ran += 1

    def method(self) -> str:
        return "the method"


class NeverMade(Exception):
    def __new__(cls, *args: object) -> Self:
        raise ZeroDivisionError("not even once")


class OwnGroup(ExceptionGroup[Exception]):
    pass


class CodedGroup(ExceptionGroup[Exception]):
    code: int

    def __new__(cls, message: str, members: list[Exception], code: int) -> Self:
        self = super().__new__(cls, message, members)
        self.code = code
        return self

    def __init__(self, message: str, members: list[Exception], code: int) -> None:
        super().__init__(message, members)


class UnmakeableGroup(ExceptionGroup[Exception]):
    def __str__(self) -> str:
        raise ZeroDivisionError("no text")


# -- why it is a stand-in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "why"),
    [
        ("shop.payments", "CardDeclined", "shop.payments is not imported in this process; import shop.payments before"),
        (HERE, "CardDeclined", f"the module {HERE} does not define it in this process"),
        (HERE, "Plain.Inner", "does not define it"),
        ("__main__", "CardDeclined", "define the class in a module that both programs import"),
        (HERE, "f.<locals>.E", "it is defined inside a function; define it at the top level"),
        (HERE, "json", "that is not an exception class"),
        ("builtins", "dict", "that is not an exception class"),
        (None, "CardDeclined", "its module was not stored"),
        ("builtins", "SystemExit", "could stop the program that reads the result"),
        ("asyncio.exceptions", "CancelledError", "it is not an ordinary Exception"),
        ("builtins", "StopIteration", "it would become a RuntimeError"),
        ("aioresult.exceptions", "TimeoutError", "would say that your own call failed"),
        (HERE, "NeverMade", "(ZeroDivisionError: not even once); let its constructor pass all of its arguments to"),
        ("builtins", "ExceptionGroup", "its members were stored as text"),
    ],
)
def test_a_stand_in_says_why_it_is_one(module: Any, name: str, why: str) -> None:
    exc = described(name, module, ["text"])
    assert isinstance(exc, RemoteError)
    assert str(exc) == "text"
    (note,) = notes_of(exc)
    assert note.startswith(f"aioresult: this is a stand-in for {module or 'aioresult.exceptions'}.{name}: ")
    assert why in note
    assert note in "".join(traceback.format_exception(exc))


def test_of_pythons_own_class_nobody_is_told_to_change_the_constructor() -> None:
    stored = {"exc_type": "UnicodeDecodeError", "exc_module": "builtins", "exc_message": ["utf-8", "x", 0, 1, "r"]}
    (note,) = load_exception(stored, FAILURE, None).__notes__
    assert "cannot be built from the stored arguments (TypeError: " in note
    assert "constructor" not in note


def test_its_own_class_has_no_such_note() -> None:
    assert notes_of(described("Plain")) == []


def test_the_note_is_fit_to_be_shown() -> None:
    (note,) = notes_of(described("E\n" * 10**5, "a\x1b[2J\ud800" * 10**5))
    assert note.isprintable()
    assert len(note) <= 2000


def test_notes_do_not_accumulate() -> None:
    data = {"exc_type": "E", "exc_message": [], "exc_module": "shop.payments", "exc_notes": ["of the worker"]}
    assert len(notes_of(load(data))) == 2
    assert notes_of(load(data)) == notes_of(load(data))
    assert stored(load(data)) == data
    codec = Codec()
    meta = codec.decode("t", json.dumps({"status": FAILURE, "result": data}).encode())
    assert notes_of(codec.decode("t", codec.encode(meta)).result) == notes_of(meta.result)


def test_a_copy_for_another_caller_has_notes_of_its_own() -> None:
    one = described("E", "shop.payments")
    other = copy_of_error(one)
    one.add_note("of this caller")
    assert len(notes_of(other)) == 1
    assert other.stored == one.stored


# -- groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_a_group_comes_back_as_a_group(serializer: str) -> None:
    inner = ExceptionGroup("inner", [KeyError("k"), type("Away", (Exception,), {"__module__": "shop"})("gone")])
    inner.add_note("about the inner one")
    group = ExceptionGroup("outer", [ValueError(1, "two"), inner, FileNotFoundError(2, "no", "f.txt")])
    read = there_and_back(group, serializer)
    assert type(read) is ExceptionGroup
    assert str(read) == str(group)
    first, second, third = cast("list[Any]", read.exceptions)
    assert (type(first), first.args) == (ValueError, (1, "two"))
    assert (type(second), second.message, notes_of(second)) == (ExceptionGroup, "inner", ["about the inner one"])
    assert (type(third), third.filename) == (FileNotFoundError, "f.txt")
    away = second.exceptions[1]
    assert isinstance(away, RemoteError)
    assert "import shop before" in notes_of(away)[0]
    caught = []
    try:
        raise read
    except* KeyError as found:
        caught.append(found)
    except* (ValueError, OSError, RemoteError):
        pass
    assert len(caught) == 1


async def test_the_group_of_a_task_group() -> None:
    async def fail() -> None:
        raise ZeroDivisionError("in the child")

    with pytest.raises(ExceptionGroup) as raised:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())
    with pytest.raises(ExceptionGroup) as again:
        raise there_and_back(raised.value)
    assert again.group_contains(ZeroDivisionError, match="in the child")


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_a_group_that_could_stop_the_reader_comes_back_as_an_ordinary_one(serializer: str) -> None:
    group = BaseExceptionGroup("both", [asyncio.CancelledError("stop"), ValueError(1)])
    if serializer == "pickle":
        data = pickle.dumps({"status": FAILURE, "result": group})
        read: Any = Codec(accept=("json", "pickle")).decode("t", data).result
    else:
        read = there_and_back(group, serializer)
    assert isinstance(read, ExceptionGroup)
    assert isinstance(read, RemoteError)
    assert "not an ordinary Exception" in notes_of(read)[0]
    cancelled, error = read.exceptions
    assert isinstance(cancelled, RemoteError)
    assert (type(cancelled).__name__, str(cancelled)) == ("CancelledError", "stop")
    assert type(error) is ValueError
    assert stored(read)["exc_members"] == stored(group)["exc_members"]
    assert stored(read)["exc_type"] == "BaseExceptionGroup"


def test_a_pickled_group_does_not_bring_the_readers_own_errors() -> None:
    group = ExceptionGroup("both", [TimeoutError("of the task"), ExceptionGroup("in", [StopIteration()])])
    data = pickle.dumps({"status": FAILURE, "result": group})
    for read in (Codec(accept=("json", "pickle")).decode("t", data).result, there_and_back(group, "pickle")):
        assert isinstance(read, ExceptionGroup)
        assert isinstance(read.exceptions[0], RemoteError)
        assert not isinstance(read.exceptions[0], TimeoutError)


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize("group", [OwnGroup("m", [ValueError(1)]), CodedGroup("m", [ValueError(1)], 7)], ids=repr)
def test_a_group_of_the_users_own_class_is_of_that_class(group: Any, serializer: str) -> None:
    read = there_and_back(group, serializer)
    assert type(read) is type(group)
    assert (str(read), vars(read)) == (str(group), vars(group))
    assert read.exceptions[0].args == (1,)


@pytest.mark.parametrize(("name", "module"), [("Several", "shop"), ("UnmakeableGroup", HERE), ("E", None)])
def test_a_group_of_a_class_that_cannot_be_used_is_a_group(name: str, module: Any) -> None:
    member = {"exc_type": "Plain", "exc_message": ["text"], "exc_module": HERE}
    read = described(name, module, ["m", "[Plain('text')]"], exc_members=[member])
    assert isinstance(read, ExceptionGroup)
    assert isinstance(read, RemoteError)
    assert (type(read).__name__, str(read), type(read.exceptions[0])) == (name, "m (1 sub-exception)", Plain)
    assert len(notes_of(read)) == 1
    assert str(copy_of_error(read)) == str(read)


def test_celery_sees_of_a_group_what_it_stores_itself() -> None:
    group = ExceptionGroup("several", [ValueError(1), ExceptionGroup("in", [KeyError(2)])])
    data = stored(group)
    with Celery(set_as_current=False) as app:
        theirs: Any = BaseBackend(app=app).prepare_exception(group, "json")
    assert {key: data[key] for key in theirs} == {**theirs, "exc_message": list(theirs["exc_message"])}
    assert str(as_celery_reads(data)) == str(as_celery_reads({**theirs, "exc_message": data["exc_message"]}))
    assert type(load(theirs)).__name__ == "ExceptionGroup"
    assert not isinstance(load(theirs), ExceptionGroup)


def nested(depth: int) -> Any:
    data: Any = {"exc_type": "Plain", "exc_module": HERE}
    for _ in range(depth):
        data = {"exc_type": "ExceptionGroup", "exc_module": "builtins", "exc_message": ["m"], "exc_members": [data]}
    return data


LEAF = {"exc_type": "Plain", "exc_module": HERE}


@pytest.mark.parametrize(
    "members",
    [
        [],
        None,
        "text",
        {"exc_type": "Plain"},
        ["text"],
        [LEAF, None],
        [{"exc_type": 5}],
        [LEAF] * 1001,
        [{**LEAF, "exc_members": [LEAF] * 20}] * 50,
        [{**LEAF, "exc_members": ["text"]}],
        [LEAF] * 10**6,
        [nested(20)],
        [nested(10_000)],
    ],
    ids=[
        "empty",
        "none",
        "text",
        "mapping",
        "texts",
        "odd",
        "nameless",
        "many",
        "broad",
        "deep",
        "million",
        "20",
        "10000",
    ],
)
def test_members_that_are_none_or_too_many_are_not_built(members: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(Plain, "__init__", lambda self, *args: made.append(args))
    read = described("ExceptionGroup", "builtins", ["m", "text"], exc_members=members)
    assert isinstance(read, RemoteError)
    assert not isinstance(read, ExceptionGroup)
    assert not made


def test_members_within_the_bounds_are_built() -> None:
    assert len(described("ExceptionGroup", "builtins", ["m"], exc_members=[LEAF] * 1000).exceptions) == 1000
    assert isinstance(load(nested(20)), ExceptionGroup)


def test_members_of_what_is_no_group_are_not_built() -> None:
    assert type(described("Plain", message=["m"], exc_members=[LEAF])) is Plain
    assert isinstance(described("NeverMade", message=["m"], exc_members=[LEAF]), RemoteError)


def test_of_a_group_that_is_too_large_the_first_members_are_stored() -> None:
    read = there_and_back(ExceptionGroup("m", [ValueError(number) for number in range(1500)]))
    assert [member.args[0] for member in read.exceptions] == list(range(1000))
    assert notes_of(read) == ["aioresult: 500 more members of this group were not stored"]


def test_of_a_group_that_is_too_deep_the_outer_part_is_stored() -> None:
    group: ExceptionGroup[Exception] = ExceptionGroup("m", [ValueError("innermost")])
    for _ in range(60):
        group = ExceptionGroup("m", [group])
    read, depth = there_and_back(group), 0
    while isinstance(read, ExceptionGroup):
        (read,) = read.exceptions
        depth += 1
    assert depth == 20
    assert isinstance(read, RemoteError)


# -- notes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize("make", [Plain, lambda: Frozen(5), lambda: ExceptionGroup("m", [Plain()])])
def test_notes_come_back(make: Callable[[], Exception], serializer: str) -> None:
    exc = make()
    vars(exc)["__notes__"] = ["one"]  # a frozen class takes none by `add_note`
    data = stored(exc, serializer)
    assert type(load(data)) is type(exc)
    assert notes_of(load(data)) == ["one"]


@pytest.mark.parametrize(
    ("notes", "kept"),
    [
        (["a", 5, "b", None], ["a", "b"]),
        (("a",), ["a"]),
        (5, []),
        ("text", []),
        (["x" * 5000], ["x" * 4000]),
        ([str(number) for number in range(100)], [str(number) for number in range(50)]),
    ],
    ids=["mixed", "tuple", "number", "text", "long", "many"],
)
def test_only_so_many_texts_are_notes(notes: Any, kept: list[str]) -> None:
    exc = Plain()
    exc.__notes__ = notes
    assert stored(exc).get("exc_notes", []) == kept
    assert notes_of(described("Plain", exc_notes=notes)) == kept


# -- errors of the operating system ---------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize(
    "exc",
    [
        FileNotFoundError(2, "no", "f.txt"),
        OSError(18, "cross-device", "a", None, "b"),
        PermissionError(13, "no", b"\xff"),
        OSError(5, "I/O"),
        OSError("text"),
        BlockingIOError(11, "again", 5),
        OSError(9, "bad", 3),
    ],
    ids=repr,
)
def test_an_oserror_keeps_its_file_names(exc: OSError, serializer: str) -> None:
    data = stored(exc, serializer)
    for read in (load(data), as_celery_reads(data)):
        assert type(read) is type(exc)
        assert (str(read), read.args, read.filename) == (str(exc), exc.args, exc.filename)
        assert (read.errno, read.filename2) == (exc.errno, exc.filename2)


class NoSpace(OSError):
    def __init__(self, *, path: str) -> None:
        super().__init__(28, "no space", path)


def test_a_subclass_with_a_constructor_of_its_own_keeps_them_too() -> None:
    read = there_and_back(NoSpace(path="/"))
    assert (type(read), str(read), read.errno, read.filename) == (NoSpace, "[Errno 28] no space: '/'", 28, "/")


# -- constructors, and attributes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize(
    "exc",
    [
        Declined(5),
        NotFound(7),
        KeywordOnly(code=3),
        Translated("text", code=4),
        Tuples([1, 2]),
        Frozen(5, "USD"),
        Frozen(amount=5),
        json.JSONDecodeError("bad", "document", 3),
    ],
    ids=repr,
)
def test_an_exception_comes_back_whole(exc: Exception, serializer: str) -> None:
    read = there_and_back(exc, serializer)
    assert type(read) is type(exc)
    # pickle itself runs the constructor once more, with the arguments that the exception keeps.
    twice = serializer == "pickle" and type(exc) is Declined
    assert str(read) == (f"declined: {exc}" if twice else str(exc))
    assert vars(read) == vars(exc)


def test_stored_by_celery_its_message_is_not_made_twice() -> None:
    assert str(described("Declined", message=["declined: 5"])) == "declined: 5"
    assert str(described("NotFound", message=["no item 7"])) == "no item 7"


def test_a_tuple_that_has_become_a_list_is_the_same_argument() -> None:
    assert described("Tuples", message=[[1, 2]]).parts == (1, 2)


def test_attributes_of_any_plain_type_are_stored() -> None:
    exc = Plain()
    attributes = {
        "none": None,
        "flag": True,
        "number": 1.5,
        "text": "t",
        "price": Decimal("1.10"),
        "at": datetime(2030, 1, 1, tzinfo=UTC),
    }
    vars(exc).update(attributes)
    assert vars(there_and_back(exc)) == attributes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_private", 1),
        ("__cause__", 1),
        ("with spaces", 1),
        ("x" * 101, 1),
        ("list", [1]),
        ("dict", {}),
        ("tuple", (1,)),
        ("long", "x" * 1001),
        ("huge", 10**5000),
        ("object", object()),
        ("exc", ValueError()),
        ("add_note", "not a method"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else type(value).__name__,
)
def test_no_other_attribute_is_stored_or_set(name: str, value: Any) -> None:
    exc = Plain()
    vars(exc)[name] = value
    assert "exc_state" not in stored(exc)
    assert (name in vars(described("Plain", exc_state={name: value}))) is (name == "huge")


def test_only_so_many_attributes_are_stored_or_set() -> None:
    exc = Plain()
    vars(exc).update({f"a{number}": number for number in range(100)})
    assert len(stored(exc)["exc_state"]) == 32
    assert vars(described("Plain", exc_state=dict(vars(exc)))) == {}


def test_a_class_may_keep_its_attributes_to_itself() -> None:
    exc = KeepsItself("text")
    vars(exc)["secret"] = "s"
    assert set(stored(exc)) == {"exc_type", "exc_message", "exc_module"}
    assert vars(described("KeepsItself", exc_state={"secret": "s"})) == {}


def test_attributes_out_of_a_store_run_nothing() -> None:
    names = ["slot", "computed", "default", "method", "with_traceback", "args", "free", "__class__", "__notes__"]
    read = described("Guarded", exc_state=dict.fromkeys(names, 5))
    assert Guarded.ran == 0
    assert vars(read) == {"default": 5, "free": 5}
    assert (read.computed, read.method(), type(read)) == (7, "the method", Guarded)


@pytest.mark.parametrize("state", [None, 5, "text", [1], {5: 5}, [["amount", 5]]])
def test_an_odd_state_is_none(state: Any) -> None:
    assert vars(described("Plain", exc_state=state)) == {}


def test_a_stand_in_hands_on_what_it_stands_for() -> None:
    exc = type("Away", (Declined,), {"__module__": "shop"})(5)
    exc.add_note("one")
    read = there_and_back(exc)
    assert isinstance(read, RemoteError)
    assert stored(read) == stored(exc)
    assert read.stored["exc_state"] == {"amount": 5}


# -- text -----------------------------------------------------------------------------------------------------------


def test_an_exception_without_arguments_keeps_its_text() -> None:
    error = urllib.error.HTTPError("http://x", 404, "Not Found", {}, None)  # type: ignore[arg-type]
    with error:
        read = there_and_back(error)
    assert (type(read).__name__, str(read), read.args) == ("HTTPError", "HTTP Error 404: Not Found", ())
    assert isinstance(read, RemoteError)
    assert "HTTP Error 404: Not Found" in "".join(traceback.format_exception(read))
    assert str(there_and_back(read)) == str(read)


def test_its_own_class_is_used_if_it_makes_the_same_text() -> None:
    assert type(described("KeywordOnly", exc_state={"code": 3}, exc_text="code 3")) is KeywordOnly
    other = described("KeywordOnly", exc_state={"code": 3}, exc_text="code 4")
    assert isinstance(other, RemoteError)
    assert str(other) == "code 4"


def test_a_text_that_needs_what_is_not_stored_is_the_stand_ins() -> None:
    read = there_and_back(Private(code=3))
    assert isinstance(read, RemoteError)
    assert str(read) == "code 3"
    assert "super().__init__()" in notes_of(read)[0]


@pytest.mark.parametrize("text", [5, None, ["text"]])
def test_an_odd_text_is_none(text: Any) -> None:
    assert str(described("Away", "shop", exc_text=text)) == ""


# -- data in the place of an exception ------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [{"progress": 50}, {"exc_type": 5}, [1, 2], 5, "text"], ids=repr)
def test_what_a_task_stored_in_place_of_an_exception_is_there_as_data(data: Any) -> None:
    exc = load(data)
    assert type(exc) is RemoteError
    assert exc.args == (data,)
    assert exc.stored == data
    assert load(data, REVOKED).args == (data,)
    assert type(load(data, REVOKED)) is TaskRevokedError


def test_what_a_task_added_to_an_exception_is_there_as_data() -> None:
    """The advice for `update_state` that is found most often."""
    data = {"exc_type": "ValueError", "exc_message": ["line 1"], "custom": {"a": 1}}
    assert load(data).stored["custom"] == {"a": 1}


def test_without_anything_stored_there_is_no_data() -> None:
    assert load(None).stored is None
    assert RemoteError("text").stored is None


# -- nothing keeps it from being stored -----------------------------------------------------------------------------


class Hides(Exception):
    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise ZeroDivisionError("asked")

    def __getattribute__(self, name: str) -> Any:
        raise ZeroDivisionError("asked")

    def __str__(self) -> str:
        raise SystemExit


class HidesMembers(ExceptionGroup[Exception]):
    @property
    def exceptions(self) -> Any:
        raise ZeroDivisionError("asked")


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize(
    "make", [Hides, lambda: HidesMembers("m", [Hides(), ValueError(1)])], ids=["an exception", "a group"]
)
def test_storing_never_fails(make: Callable[[], Exception], serializer: str) -> None:
    data = stored(make(), serializer)
    assert data["exc_module"] == HERE
    assert ("exc_members" in data) is (data["exc_type"] == "HidesMembers")
    assert issubclass(type(load(data)), Exception)


def test_what_celery_would_not_store_does_not_make_it_too_large() -> None:
    exc = Plain("text")
    exc.add_note("x" * 3000)
    codec = Codec(max_result_size=500)
    read = codec.decode("t", codec.encode(TaskMeta("t", FAILURE, exc))).result
    assert (type(read), read.args, notes_of(read)) == (Plain, ("text",), [])
    part = codec.loads(codec.dumps_part(1, "t", FAILURE, exc, "a part"), "a part")
    assert part[3] == {"exc_type": "Plain", "exc_message": ["text"], "exc_module": HERE}


def test_celery_reads_what_it_knows_and_ignores_the_rest() -> None:
    exc = Plain("text")
    exc.add_note("one")
    vars(exc)["code"] = 5
    data = stored(exc)
    assert set(data) == {"exc_type", "exc_message", "exc_module", "exc_notes", "exc_state"}
    read = as_celery_reads(data)
    assert (type(read), read.args, vars(read)) == (Plain, ("text",), {})


documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
exceptions = st.recursive(
    st.none(),
    lambda inner: st.fixed_dictionaries(
        {"exc_type": st.sampled_from(["ValueError", "ExceptionGroup", "BaseExceptionGroup", "OSError", "Away"])},
        optional={
            "exc_module": st.sampled_from(["builtins", "shop"]),
            "exc_message": documents,
            "exc_members": st.lists(inner, max_size=3) | documents,
            "exc_notes": st.lists(st.text(max_size=5), max_size=3) | documents,
            "exc_state": st.dictionaries(st.sampled_from(["a", "args", "__dict__"]), documents) | documents,
            "exc_text": documents,
        },
    ),
    max_leaves=4,
)


@settings(deadline=None, max_examples=60)
@given(exceptions, st.sampled_from([FAILURE, REVOKED]))
def test_whatever_is_stored_is_an_exception_that_can_be_shown_and_stored_again(data: Any, status: str) -> None:
    exc = load(data, status)
    assert isinstance(exc, Exception)
    assert not isinstance(exc, AioResultError) or isinstance(exc, (RemoteError, TaskRevokedError))
    "".join(traceback.format_exception(exc))
    again = load(stored(exc), status)
    assert str(again) == str(exc)
    assert isinstance(stored(again), Mapping)
