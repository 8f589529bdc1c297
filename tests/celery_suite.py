"""What holds between Celery 5.7 and this library wherever the results are kept: Celery's own readers are the judge."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, Protocol
from uuid import UUID, uuid4

import celery.exceptions
import pytest
from celery import Celery, chain, chord, group
from celery.app.task import Context
from celery.result import AsyncResult as CeleryResult
from celery.result import GroupResult as CeleryGroupResult
from celery.result import ResultSet as CeleryResultSet
from celery.utils.serialization import UnpickleableExceptionWrapper

import aioresult
from aioresult import AsyncResult, Backend, GroupResult, ResultSet, TaskRequest, states
from aioresult.celery import backend_from_app, result_from_celery
from aioresult.exceptions import RemoteTraceback

from . import celery_app
from .celery_app import FAILURES, Shop
from .celery_worker import GUARD, Worker, app_with, both, reaches, same_exception

VALUES = [
    None,
    True,
    False,
    0,
    -(2**200),
    0.1,
    1e300,
    float("inf"),
    "",
    "naïve 漢字 🦊 \x00\u2028",
    [],
    {"a": [1, {"b": [None, {"ß": []}]}], "c": {}},
    datetime(2024, 2, 29, 12, 30, 15, 250),  # noqa: DTZ001 - one without a time zone
    datetime(2024, 2, 29, 12, 30, tzinfo=UTC),
    datetime(2024, 2, 29, 12, 30, tzinfo=timezone(timedelta(hours=5, minutes=45))),
    date(2024, 2, 29),
    time(12, 30, 15),
    UUID(int=42),
    Decimal("1.10"),
    "größe".encode(),
    b"\xff\x00",
    [{"when": date(2024, 1, 1), "what": [b"\xfe", Decimal(1)]}],
]

#: Calls of a method that both sides have, by the same name and with the same arguments.
STORES: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "done": ("mark_as_done", ({"n": [1, Decimal("0.5")]},)),
    **{
        f"failure: {kind}": ("mark_as_failure", (make(), "Traceback:\n  …\n"))
        for kind, make in FAILURES.items()
        if kind != "imported by the worker alone"
    },
    "retry": ("mark_as_retry", (celery_app.CardDeclined("not yet"), "Traceback:\n  …\n")),
    "revoked": ("mark_as_revoked", ("no longer wanted",)),
    "started": ("store_result", ({"pid": 7, "hostname": "w@host"}, states.STARTED)),
    "custom": ("store_result", ({"done": 3}, "PROGRESS")),
}


def by_control(worker: Worker) -> Any:
    task_id = str(uuid4())
    assert worker.app.control.revoke(task_id, reply=True, timeout=GUARD, limit=1)
    return worker.signature("echo", "never").apply_async(task_id=task_id)


def by_expiry(worker: Worker) -> Any:
    return worker.signature("echo", "never").apply_async(expires=-1)


def by_hand(worker: Worker) -> Any:
    sent = worker.app.AsyncResult(str(uuid4()))
    sent.backend.mark_as_revoked(sent.id, "by hand")
    return sent


def celery_request(app: Celery, task_id: str) -> Context:
    """What a task of Celery's has as ``self.request``."""
    request = Context(
        id=task_id,
        task="add",
        args=[1],
        kwargs={"y": Decimal(2)},
        hostname="w@host",
        retries=1,
        group="the-group",
        parent_id="the-parent",
        delivery_info={"routing_key": "the-queue"},
    )
    request.children.append(CeleryResult("child", app=app))
    request.children.append(CeleryGroupResult("children", [CeleryResult("nested", app=app)], app=app))
    return request


def our_request(app: Celery, task_id: str) -> TaskRequest:
    """The same as `celery_request`."""
    nested = GroupResult("children", [AsyncResult("nested", None)])
    return TaskRequest(
        id=task_id,
        task="add",
        args=[1],
        kwargs={"y": Decimal(2)},
        hostname="w@host",
        retries=1,
        group="the-group",
        parent_id="the-parent",
        queue="the-queue",
        children=[AsyncResult("child", None), nested],
    )


REQUESTS = pytest.mark.parametrize("make_request", [celery_request, our_request])


def fields(result: Any) -> dict[str, Any]:
    """All that Celery's reader says of a result, in a form that can be compared."""
    names = ("state", "traceback", "name", "args", "kwargs", "worker", "retries", "queue")
    meta = result.backend.get_task_meta(result.id)
    outcome = result.result
    return {
        **{name: getattr(result, name) for name in names},
        "result": (type(outcome), outcome.args) if isinstance(outcome, Exception) else outcome,
        "children": [child.as_tuple() if result.ready() else child for child in result.children],
        "done": result.date_done is not None,
        "related": (meta.get("group_id"), meta.get("parent_id")),
    }


def as_celery_stores(stored: Any) -> Any:
    """Without the attributes of an exception, which stand behind what Celery stores of it."""
    if isinstance(stored, bytes):
        return stored.replace(b', "exc_state": {"item": "tea"}}', b"}")
    if isinstance(stored, tuple):
        return tuple(map(as_celery_stores, stored))
    return {key: as_celery_stores(value) for key, value in stored.items()} if isinstance(stored, dict) else stored


class Stored(Protocol):
    """What is stored, as bytes, without the moment of it."""

    async def task(self, task_id: str) -> Any: ...

    async def group(self, group_id: str) -> Any: ...


class Interoperability:
    """For a module with these fixtures: ``worker``, ``backend`` as its app is configured, and ``stored``."""

    async def test_values(self, worker: Worker, backend: Backend) -> None:
        results = [worker.call("echo", value) for value in VALUES]
        for value, sent in zip(VALUES, results, strict=True):
            theirs, ours = await both(sent, result_from_celery(sent, backend))
            assert repr(ours) == repr(theirs) == repr(value)

    @pytest.mark.parametrize(
        "kind", ["builtin", "no arguments", "constructor in C", "custom", "nested", "argument without JSON"]
    )
    async def test_exception_with_the_workers_traceback(self, worker: Worker, backend: Backend, kind: str) -> None:
        sent = worker.call("fail", kind)
        result = backend.result(sent.id)
        theirs, ours = await both(sent, result)
        assert type(ours) is type(FAILURES[kind]())
        assert same_exception(theirs, ours)
        assert isinstance(ours.__cause__, RemoteTraceback)
        assert "raise FAILURES[kind]()" in str(ours.__cause__)
        assert await result.traceback() == sent.traceback == ours.__cause__.args[0]
        assert await result.failed()

    @pytest.mark.parametrize("kind", ["argument without pickle", "keyword-only"])
    async def test_exception_that_celery_wraps_is_itself(self, worker: Worker, backend: Backend, kind: str) -> None:
        sent = worker.call("fail", kind)
        theirs, ours = await both(sent, backend.result(sent.id))
        assert isinstance(theirs, UnpickleableExceptionWrapper)
        assert type(ours) is type(FAILURES[kind]())
        assert list(ours.args) == list(theirs.exc_args)

    async def test_exception_of_a_module_that_is_not_imported(
        self, worker: Worker, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(sys.modules, "wave", raising=False)
        sent = worker.call("fail", "imported by the worker alone")
        theirs, ours = await both(sent, backend.result(sent.id))
        assert isinstance(ours, aioresult.RemoteError)
        assert (type(ours).__module__, type(ours).__name__) == ("wave", type(theirs).__name__)
        assert ours.args == theirs.args == ("no header",)
        assert "wave" not in sys.modules

    async def test_retry_is_seen_and_then_the_success(self, worker: Worker, backend: Backend) -> None:
        gate = str(uuid4())
        sent = worker.call("flaky", gate)
        result = backend.result(sent.id)
        await reaches(result, states.RETRY)
        meta = await result.fetch()
        assert same_exception(sent.result, meta.result)
        assert isinstance(meta.result, celery_app.CardDeclined)
        assert meta.traceback == sent.traceback
        assert meta.date_done is None
        worker.open(gate, "at last")
        assert await both(sent, result) == ("at last", "at last")

    @pytest.mark.parametrize("with_exception", [True, False])
    async def test_retries_exhausted(self, worker: Worker, backend: Backend, with_exception: bool) -> None:
        sent = worker.call("hopeless", with_exception)
        theirs, ours = await both(sent, backend.result(sent.id))
        assert same_exception(theirs, ours)
        assert isinstance(
            ours, celery_app.CardDeclined if with_exception else celery.exceptions.MaxRetriesExceededError
        )

    @pytest.mark.parametrize("revoke", [by_control, by_expiry, by_hand])
    async def test_revoked(self, worker: Worker, backend: Backend, revoke: Callable[[Worker], Any]) -> None:
        sent = revoke(worker)
        result = backend.result(sent.id)
        theirs, ours = await both(sent, result)
        assert isinstance(ours, aioresult.TaskRevokedError)
        assert isinstance(ours, type(theirs))  # whoever catches Celery's class catches it too
        assert ours.args == theirs.args
        assert await result.state() == sent.state == states.REVOKED

    async def test_ignored_result_is_none_at_once(self, worker: Worker, backend: Backend) -> None:
        sent = worker.call("ignored")
        assert await both(sent, result_from_celery(sent, backend)) == (None, None)

    async def test_every_field_of_the_meta(self, worker: Worker, backend: Backend) -> None:
        sent = worker.signature("add", 1).apply_async((2,), stamped_headers=["who"], who="me")
        meta = await backend.wait_for(sent.id, GUARD)
        assert sent.get(timeout=GUARD) == meta.result == 3
        for field in ("name", "args", "kwargs", "worker", "retries", "queue"):
            assert getattr(meta, field) == getattr(sent, field), field
        theirs = sent.backend.get_task_meta(sent.id)
        for field in ("status", "result", "traceback", "children", "date_done", "task_id"):
            del theirs[field]
        assert theirs == (meta.extra or {})
        if worker.app.conf.result_extended:
            assert (meta.name, meta.args, meta.retries, meta.queue) == ("add", [2, 1], 0, "celery")
        assert meta.date_done is not None
        assert meta.date_done.tzinfo is UTC
        # Celery's own reader gives the time of a database as that does: in its time zone, which it does not name.
        assert meta.date_done == (
            sent.date_done if sent.date_done.tzinfo else sent.date_done.replace(tzinfo=worker.zone)
        )

    async def test_chain_keeps_its_parents(self, worker: Worker, backend: Backend) -> None:
        sent = chain(worker.signature("add", 1, 2), worker.signature("add", 3), worker.signature("add", 4))()
        result = result_from_celery(sent, backend)
        assert result.as_tuple() == sent.as_tuple()
        assert await both(sent, result) == (10, 10)
        assert result.parent is not None
        assert await both(sent.parent, result.parent) == (6, 6)

    @pytest.mark.parametrize("failing", [True, False], ids=["failed", "revoked"])
    async def test_chain_raises_what_became_of_its_first_link(
        self, worker: Worker, backend: Backend, failing: bool
    ) -> None:
        first = worker.signature("fail", "custom") if failing else worker.signature("echo", 1).set(expires=-1)
        sent = chain(first, worker.signature("add", 1), worker.signature("add", 2))()
        result = result_from_celery(sent, backend)
        theirs, ours = await both(sent, result)
        assert isinstance(ours, type(theirs))
        assert isinstance(ours, celery_app.CardDeclined if failing else aioresult.TaskRevokedError)
        last = backend.result(sent.id)
        if failing:
            await reaches(last, states.FAILURE)
        else:  # Celery tells the later links of a failure, but not of this: only the parent knows
            assert await last.state() == states.PENDING

    async def test_group_keeps_its_order_and_its_shape(self, worker: Worker, backend: Backend) -> None:
        inner = chain(worker.signature("add", 1, 2), group(worker.signature("add", 3), worker.signature("add", 4)))
        sent = group(worker.signature("add", 1, 1), inner, worker.signature("add", 5, 5)).apply_async()
        result = result_from_celery(sent, backend)
        assert result.as_tuple() == sent.as_tuple()
        assert await both(sent, result) == ([2, [6, 7], 10], [2, [6, 7], 10])

    async def test_group_with_a_failing_member(self, worker: Worker, backend: Backend) -> None:
        sent = group(worker.signature("add", 1, 1), worker.signature("fail", "nested")).apply_async()
        theirs, ours = await both(sent, result_from_celery(sent, backend))
        assert same_exception(theirs, ours)

    async def test_set_without_an_id(self, worker: Worker, backend: Backend) -> None:
        sent = CeleryResultSet([worker.call("add", 1, 1), worker.call("add", 2, 2)])
        result = result_from_celery(sent, backend)
        assert type(result) is ResultSet
        assert await both(sent, result) == ([2, 4], [2, 4])

    async def test_chord(self, worker: Worker, backend: Backend) -> None:
        sent = chord([worker.signature("add", n, n) for n in (1, 2, 3)], worker.signature("total"))()
        result = result_from_celery(sent, backend)
        assert result.as_tuple() == sent.as_tuple()
        assert await both(sent, result) == (12, 12)
        assert isinstance(result.parent, GroupResult)
        assert await result.parent == [2, 4, 6]

    async def test_what_a_failed_chord_raises_does_not_depend_on_when_one_looks(
        self, worker: Worker, backend: Backend
    ) -> None:
        sent = chord([worker.signature("add", 1, 1), worker.signature("fail", "custom")], worker.signature("total"))()
        while_it_runs = result_from_celery(sent, backend)
        theirs, ours = await both(sent, while_it_runs)
        assert isinstance(theirs, celery_app.CardDeclined)
        assert isinstance(ours, celery_app.CardDeclined)
        await reaches(backend.result(sent.id), states.FAILURE)
        for result in (while_it_runs, result_from_celery(sent, backend)):
            with pytest.raises(celery_app.CardDeclined):
                await result.get(GUARD)
            with pytest.raises(celery_app.CardDeclined):
                await aioresult.gather(result)
        with pytest.raises(aioresult.ChordError):
            await backend.result(sent.id)  # a handle without a parent has nothing to look at

    async def test_group_saved_by_celery(self, worker: Worker, backend: Backend) -> None:
        sent = group(worker.signature("add", n, n) for n in (1, 2)).apply_async()
        sent.save()
        restored = await GroupResult.restore(sent.id, backend)
        assert restored is not None
        assert restored.as_tuple() == sent.as_tuple()
        assert await both(sent, restored) == ([2, 4], [2, 4])

    async def test_children(self, worker: Worker, backend: Backend) -> None:
        sent = worker.call("parent")
        result = backend.result(sent.id)
        assert await both(sent, result) == ("busy", "busy")
        children = await result.children()
        assert [child.as_tuple() for child in children] == [child.as_tuple() for child in sent.children]
        theirs = await asyncio.to_thread(lambda: [(found.id, value) for found, value in sent.collect(timeout=GUARD)])
        ours = [(found.id, value) async for found, value in result.collect(timeout=GUARD)]
        assert ours == theirs
        assert [value for _, value in ours] == ["busy", 3, [7, 11], 7, 11]
        assert await result.get_leaf() == await asyncio.to_thread(sent.get_leaf) == 11
        graph = await asyncio.to_thread(sent.build_graph)
        assert {node.id: [child.id for child in below] for node, below in (await result.graph()).items()} == {
            node.id: [child.id for child in below] for node, below in graph.items()
        }

    @pytest.mark.parametrize("store", STORES)
    async def test_celery_reads_what_we_store_as_what_it_stores(
        self, worker: Worker, backend: Backend, store: str
    ) -> None:
        method, args = STORES[store]
        theirs, ours = (worker.app.AsyncResult(str(uuid4())) for _ in range(2))
        getattr(worker.app.backend, method)(theirs.id, *args, request=celery_request(worker.app, theirs.id))
        assert await getattr(backend, method)(ours.id, *args, request=our_request(worker.app, ours.id))
        assert fields(ours) == fields(theirs)
        if theirs.date_done is not None:
            assert timedelta(0) <= ours.date_done - theirs.date_done < timedelta(seconds=GUARD)

    @REQUESTS
    @pytest.mark.parametrize(
        ("method", "args"),
        [
            *(pytest.param("mark_as_done", (value,), id=type(value).__name__) for value in (None, VALUES)),
            *(pytest.param(*call, id=name) for name, call in STORES.items()),
        ],
    )
    async def test_the_bytes_are_the_same(
        self,
        worker: Worker,
        backend: Backend,
        stored: Stored,
        method: str,
        args: tuple[Any, ...],
        make_request: Callable[[Celery, str], Any],
    ) -> None:
        task_id = str(uuid4())
        getattr(worker.app.backend, method)(task_id, *args, request=celery_request(worker.app, task_id))
        theirs = await stored.task(task_id)
        await backend.forget(task_id)
        await getattr(backend, method)(task_id, *args, request=make_request(worker.app, task_id))
        assert as_celery_stores(await stored.task(task_id)) == theirs

    async def test_the_bytes_of_a_group_are_the_same(self, worker: Worker, backend: Backend, stored: Stored) -> None:
        nested = CeleryGroupResult("nested", [worker.app.AsyncResult("b")], parent=worker.app.AsyncResult("first"))
        group = CeleryGroupResult(str(uuid4()), [worker.app.AsyncResult("a"), nested])
        group.save(worker.app.backend)
        theirs = await stored.group(group.id)
        await backend.delete_group(group.id)
        await backend.save_group(group.id, result_from_celery(group, backend))
        assert await stored.group(group.id) == theirs

    async def test_group_saved_by_us(self, worker: Worker, backend: Backend) -> None:
        ids = [str(uuid4()) for _ in range(3)]
        for number, task_id in enumerate(ids):
            await backend.mark_as_done(task_id, number)
        saved = backend.group([backend.result(ids[0]), backend.group(ids[1:])])
        await saved.save()
        restored = CeleryGroupResult.restore(saved.id, app=worker.app)
        assert restored.as_tuple() == saved.as_tuple()
        assert await both(restored, saved) == ([0, [1, 2]], [0, [1, 2]])

    async def test_a_success_stays_whoever_stored_it(self, worker: Worker, backend: Backend) -> None:
        theirs, ours = (worker.app.AsyncResult(str(uuid4())) for _ in range(2))
        worker.app.backend.mark_as_done(theirs.id, "theirs")
        assert not await backend.mark_as_failure(theirs.id, ValueError("late"))
        await backend.mark_as_done(ours.id, "ours")
        worker.app.backend.mark_as_failure(ours.id, ValueError("late"))
        assert await both(theirs, backend.result(theirs.id)) == ("theirs", "theirs")
        assert await both(ours, backend.result(ours.id)) == ("ours", "ours")

    async def test_exists_once_either_has_stored_it(self, worker: Worker, backend: Backend) -> None:
        theirs, ours, neither = (str(uuid4()) for _ in range(3))
        worker.app.backend.mark_as_started(theirs)
        await backend.mark_as_started(ours)
        for task_id, stored in ((theirs, True), (ours, True), (neither, False)):
            assert await backend.exists(task_id) is stored
            assert worker.app.AsyncResult(task_id).exists() is stored

    async def test_pickle_both_ways(self, worker: Worker) -> None:
        with app_with(worker.backend, result_serializer="pickle", accept_content=["pickle"]) as app:
            async with backend_from_app(app) as backend:
                their_value, their_failure, our_value, our_failure = (str(uuid4()) for _ in range(4))
                app.backend.mark_as_done(their_value, {1, 2})
                app.backend.mark_as_failure(their_failure, Shop.Closed({3}))
                await backend.mark_as_done(our_value, {1, 2})
                await backend.mark_as_failure(our_failure, Shop.Closed({3}))
                for task_id in (their_value, our_value):
                    assert await both(app.AsyncResult(task_id), backend.result(task_id)) == ({1, 2}, {1, 2})
                for task_id in (their_failure, our_failure):
                    theirs, ours = await both(app.AsyncResult(task_id), backend.result(task_id))
                    assert same_exception(theirs, ours)
                    assert ours.args == ({3},)
