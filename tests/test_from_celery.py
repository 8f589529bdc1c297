"""Results of Celery's given to aioresult, and handles of aioresult used as Celery's: it works, or names the remedy."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import pydoc
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import celery
import pytest
from celery.result import AsyncResult as CeleryResult
from celery.result import EagerResult as CeleryEagerResult
from celery.result import GroupResult as CeleryGroup
from celery.result import ResultSet as CelerySet

import aioresult
from aioresult import AsyncResult, Backend, DecodeError, EagerResult, GroupResult, ResultSet, UsageError
from aioresult.celery import result_from_celery, revoke
from aioresult.remedies import INSTEAD

_MIGRATING = Path(__file__).parent.parent / "docs" / "migrating.md"

app: Any = celery.Celery("tests", broker="memory://", backend="cache+memory://", set_as_current=False)
#: Tasks of this one run on the spot.
eager: Any = celery.Celery("eager", broker="memory://", backend="cache+memory://", set_as_current=False)
eager.conf.task_always_eager = True


@app.task(ignore_result=True)  # type: ignore[untyped-decorator]
def forgotten() -> None: ...


@eager.task  # type: ignore[untyped-decorator]
def add(x: int, y: int) -> int:
    return x + y


@eager.task  # type: ignore[untyped-decorator]
def fail() -> None:
    raise LookupError("not there")


# -- Celery's given to us -------------------------------------------------------------------------------------------


async def test_what_delay_returns_is_awaited() -> None:
    async with aioresult.connect("memory://") as backend:
        await backend.mark_as_done("sent", "value")
        result = backend.result(app.AsyncResult("sent"))
        assert type(result) is AsyncResult
        assert await result.get(timeout=5) == "value"
        assert await backend.result(add.delay(2, 2)).get(timeout=5) == 4
        with pytest.raises(UsageError, match="the task was run on the spot"):
            backend.result(add.delay(2, 2)).updates()
        assert await backend.result(forgotten.delay()).get(timeout=5) is None
        assert await backend.result(add.delay(2, 2), type=float) == 4.0
        with pytest.raises(DecodeError, match="does not fit type=str"):
            await backend.result(add.delay(2, 2), type=str)
        with pytest.raises(LookupError, match="not there"):
            await backend.result(fail.delay())


async def test_the_parents_of_a_result_of_celerys_are_kept() -> None:
    async with aioresult.connect("memory://") as backend:
        members = [app.AsyncResult("a"), CeleryEagerResult("b", 2, "SUCCESS")]
        header = CeleryGroup("header", members, app=app, parent=app.AsyncResult("first"))
        body = backend.result(CeleryResult("body", app=app, parent=header))
        assert isinstance(body.parent, GroupResult)
        assert isinstance(body.parent.parent, AsyncResult)
        assert (body.parent.id, body.parent.parent.id) == ("header", "first")
        await backend.mark_as_failure("first", LookupError("first"))
        with pytest.raises(LookupError, match="first"):
            await body.get(timeout=5)


async def test_a_group_of_celerys_is_awaited_alone_or_as_a_member() -> None:
    async with aioresult.connect("memory://") as backend:
        await backend.mark_as_done("a", 1)
        members = [app.AsyncResult("a"), add.delay(1, 1)]
        theirs = CeleryGroup("g", members, app=app)
        ours = backend.group(theirs)
        assert ours.id == "g"
        assert await ours.get(timeout=5) == [1, 2]
        assert backend.group(theirs, id="other").id == "other"
        assert await backend.group(members).get(timeout=5) == [1, 2]
        assert await backend.group(CelerySet(members, app=app)).get(timeout=5) == [1, 2]
        mixed = backend.group([theirs, "a", backend.result("a"), *members])
        assert await mixed.get(timeout=5) == [[1, 2], 1, 1, 1, 2]


def test_a_handle_of_the_same_backend_is_returned_as_it_is() -> None:
    backend, other = aioresult.connect("memory://"), aioresult.connect("memory://")
    result, on_the_spot = backend.result("a"), EagerResult[int]("b", 2)
    assert backend.result(result) is result
    assert backend.result(on_the_spot) is on_the_spot
    with pytest.raises(UsageError, match=re.escape("<AsyncResult: a> is a handle of another backend; pass its id")):
        other.result(result)


async def no_id() -> str:
    return "task"


def given_a_coroutine(backend: Backend) -> None:
    coroutine: Any = no_id()
    try:
        backend.result(coroutine)
    finally:
        coroutine.close()


_A = app.AsyncResult("a")
_GROUP = CeleryGroup("g", [_A], app=app)


async def called(call: Callable[[Any], Any], backend: Backend) -> None:
    made = call(backend)
    if isinstance(made, Awaitable):
        await made


@pytest.mark.parametrize(
    ("call", "told"),
    [
        pytest.param(lambda b: b.result(_GROUP), "celery.result.GroupResult is a group; pass it to backend.group()"),
        pytest.param(lambda b: b.result(b.group(["a"])), "aioresult.result.GroupResult is a group; pass it to"),
        pytest.param(lambda b: b.result(_A, b.result("p")), "celery.result.AsyncResult has a parent of its own; to"),
        pytest.param(given_a_coroutine, "an id must be a str or a UUID, not coroutine; await it first"),
        pytest.param(lambda b: b.group(_A), "pass several results or ids, not celery.result.AsyncResult: a list"),
        pytest.param(lambda b: b.group(b.result("a")), "pass several results or ids, not aioresult.result.AsyncResult"),
        pytest.param(lambda b: b.chord(_GROUP), "not celery.result.GroupResult; pass its id"),
        pytest.param(lambda b: b.get_task_meta(_A), "not celery.result.AsyncResult; pass its id"),
        pytest.param(lambda b: b.get_many([b.result("a")]), "not aioresult.result.AsyncResult; pass its id"),
        pytest.param(lambda b: b.mark_as_done(aioresult.TaskMeta("a", "PENDING"), 1), "TaskMeta; pass its task_id"),
        pytest.param(lambda b: AsyncResult(_A, b), "not celery.result.AsyncResult; pass its id"),
        pytest.param(
            lambda b: aioresult.gather(_A),
            "celery.result.AsyncResult is not a handle of aioresult; make one with backend.result(it)",
        ),
        pytest.param(lambda b: aioresult.wait([_GROUP]), "make one with backend.group(it)"),
        pytest.param(lambda b: aioresult.wait(_A), "pass several results, not a single celery.result.AsyncResult"),
        pytest.param(
            lambda b: aioresult.gather(cast("Any", "a")),
            "str is not a handle of aioresult; make one with backend.result(",
        ),
        pytest.param(lambda b: revoke(_A, app), "celery.result.AsyncResult is not a handle of aioresult"),
        pytest.param(lambda b: result_from_celery(b.result("a"), b), "aioresult.result.AsyncResult is a handle of aio"),
        pytest.param(lambda b: result_from_celery("a", b), "str is not a result of Celery's; for an id use backend.re"),
    ],
)
async def test_what_is_no_id_or_no_handle_is_told_by_its_full_name(call: Callable[[Any], Any], told: str) -> None:
    async with aioresult.connect("memory://") as backend:
        with pytest.raises(UsageError, match=re.escape(told)):
            await called(call, backend)


# -- ours used as Celery's ------------------------------------------------------------------------------------------


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_an_object_whose_id_raises_is_told_to_be_none() -> None:
    class Detached:
        @property
        def id(self) -> str:
            raise LookupError("the row is not bound to a session")

    with pytest.raises(UsageError, match="an id must be a str or a UUID, not "):
        aioresult.connect("memory://").result(cast("str", Detached()))


def test_a_mock_of_a_result_of_celerys_has_no_parents_without_end() -> None:
    backend = aioresult.connect("memory://")
    mocked = Mock(spec=CeleryResult, id="t")
    with pytest.raises(UsageError, match=r"a parent or a member is unittest\.mock\.Mock, .* pass the id alone"):
        backend.result(mocked)
    mocked.parent = None
    assert backend.result(mocked).id == "t"


def test_every_attribute_of_celerys_results_is_here_or_names_the_remedy() -> None:
    backend = aioresult.connect("memory://")
    ours = {CeleryResult: backend.result("a"), CeleryGroup: backend.group(["a"], id="g")}
    missing: set[str] = set()
    for theirs, handle in ours.items():
        for name in public(theirs) - set(dir(handle)):
            with pytest.raises(AttributeError, match=re.escape(f"has no attribute '{name}'; write {INSTEAD[name]} (")):
                getattr(handle, name)
            missing.add(name)
    # Celery sets the last ones on instances.
    assert missing | {"add_done_callback", "on_ready"} == set(INSTEAD)


def test_the_guide_has_a_row_for_every_attribute_of_celerys_results() -> None:
    rows: dict[str, list[str]] = {}
    for theirs, here in re.findall(r"^\| (.*?`.*?) \| (.*) \|$", _MIGRATING.read_text(encoding="utf-8"), re.M):
        for name in re.findall(r"`(?:result|group)\.(\w+)", theirs):
            rows.setdefault(name, []).append(here.replace("`", ""))
    assert public(CeleryResult) | public(CeleryGroup) <= set(rows)
    for name, remedy in INSTEAD.items():
        if name != "add_done_callback":
            same = re.compile(re.escape(remedy.replace("`", "")) + "([.,] .*)?")
            assert any(map(same.fullmatch, rows[name])), name


async def test_ours_given_to_celery_or_to_asyncio_names_the_remedy() -> None:
    result: Any = aioresult.connect("memory://").result("a")
    with pytest.raises(AttributeError, match="has no attribute 'then'; write "):
        CelerySet([], app=app).add(result)
    with pytest.raises(AttributeError, match=re.escape("write aioresult.wait(results), or asyncio.create_task(")):
        await asyncio.wait([result])


def test_a_missing_attribute_disturbs_nothing_else() -> None:
    result: Any = aioresult.connect("memory://").result("a")
    for kind in (result, AsyncResult):
        assert not hasattr(kind, "status")
        assert not hasattr(kind, "no_such_thing")
        assert inspect.getmembers(kind)
    assert "state" in dir(result)
    assert set(INSTEAD) & set(dir(result)) == {"revoke"}  # which groups lack
    assert not asyncio.isfuture(result)
    assert not asyncio.iscoroutine(result)
    assert copy.copy(result) == result
    assert pickle.loads(pickle.dumps(ResultSet([EagerResult[int]("a", 2)]))).results[0].value() == 2
    assert "await result.state()" in pydoc.render_doc(AsyncResult)


def test_a_subclass_may_have_an_attribute_that_the_handles_lack() -> None:
    class Named(ResultSet):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    assert Named("mine").name == "mine"
    assert "name" in dir(Named("mine"))
