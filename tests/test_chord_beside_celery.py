"""Celery's chords on Redis, where Celery's own code brings some parts and we bring the others: no worker is needed.

The messages of a chord's header are taken from the broker by hand. Each is then given to ``app.backend.mark_as_…``,
which is what Celery's worker calls, or to ours.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from queue import Empty
from typing import Any
from uuid import uuid4

import kombu.pools
import pytest
import redis
from celery import Celery, chain, chord
from celery.app.task import Context
from celery.result import GroupResult as CeleryGroupResult

import aioresult
from aioresult import Backend, BackendGetMetaError, ChordError, UsageError
from aioresult.celery import backend_from_app, dispatch, result_from_celery

from .celery_app import make_app
from .celery_worker import close
from .harness import until

#: Seconds after which a wait has failed.
GUARD = 10
#: Seconds between two looks at a chord that Celery may finish.
HEARTBEAT = 0.05

#: Of redis-py's, about a call of Celery's.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")


class Site:
    """An app whose broker is in this process, and what it has sent."""

    def __init__(self, url: str, **conf: Any) -> None:
        self.queue = f"chords-{uuid4()}"
        self.app: Celery = make_app("memory://", url, task_default_queue=self.queue, **conf)
        #: A plain client of where the results are.
        self.redis: Any = redis.Redis.from_url(url) if url.startswith("redis:") else self.app.backend.client
        self._connection = self.app.connection_for_read()
        self._messages = self._connection.SimpleQueue(self.queue)

    def close(self) -> None:
        self.redis.close()
        self._messages.close()
        self._connection.release()
        close(self.app)

    def backend(self, **options: Any) -> Backend:
        """Ours, not open yet, which dispatches what it claims."""
        options = {"on_chord_ready": partial(dispatch, app=self.app), "heartbeat": HEARTBEAT, **options}
        return backend_from_app(self.app, **options)

    def s(self, name: str, *args: Any, **options: Any) -> Any:
        return self.app.tasks[name].s(*args).set(**options)

    def sent(self) -> list[tuple[str, Any]]:
        """The names and arguments of all that was sent since, in order."""
        return [(message.headers["task"], message.payload[0]) for message in self._taken()]

    def requests(self) -> list[Context]:
        """All that was sent since, as a worker's tasks have it in ``self.request``."""
        found = []
        for message in self._taken():
            args, kwargs, embedded = message.payload
            found.append(Context(message.headers, args=args, kwargs=kwargs, errbacks=embedded["errbacks"]))
            found[-1].update(chord=embedded["chord"], chain=embedded["chain"])
        return sorted(found, key=lambda request: request.group_index or 0)

    def _taken(self) -> Iterator[Any]:
        while True:
            try:
                message = self._messages.get_nowait()
            except Empty:
                return
            message.ack()
            yield message

    def key(self, request: Context, suffix: str = "") -> str:
        return str(self.app.backend.get_key_for_group(request.group, suffix).decode())

    def ttl(self, request: Context, suffix: str = "") -> float | None:
        """Seconds; ``None`` for never."""
        left: Any = self.redis.pttl(self.key(request, suffix))
        assert left != -2, f"{suffix} is gone"
        return None if left == -1 else left / 1000


@pytest.fixture
def new_site(redis_url: str) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def make(**conf: Any) -> Site:
        sites.append(Site(redis_url, **conf))
        return sites[-1]

    yield make
    for site in sites:
        site.close()
    kombu.pools.reset()  # type: ignore[no-untyped-call]


@pytest.fixture
def site(new_site: Callable[..., Site]) -> Site:
    return new_site()


@pytest.fixture
async def backend(site: Site) -> AsyncIterator[Backend]:
    async with site.backend() as backend:
        yield backend


async def ours(backend: Backend, request: Context, value: Any) -> None:
    """We run the task: it returns ``value``, or fails with it."""
    if isinstance(value, Exception):
        await backend.mark_as_failure(request.id, value, request=request)
    else:
        await backend.mark_as_done(request.id, value, request=request)


def theirs(site: Site, request: Context, value: Any) -> None:
    """Celery runs it."""
    if isinstance(value, Exception):
        site.app.backend.mark_as_failure(request.id, value, request=request)
    else:
        site.app.backend.mark_as_done(request.id, value, request=request)


def nested(site: Site) -> list[Context]:
    """What is sent of a chord whose header is a group of two and a third, as Celery saves it."""
    sent = chord(header(site, 3))(site.s("echo"))
    first, second, third = sent.parent.results
    inner = CeleryGroupResult(str(uuid4()), [first, second], app=site.app)
    site.app.backend.apply_chord((sent.parent.id, [inner, third]), None)
    return site.requests()


def header(site: Site, size: int) -> list[Any]:
    return [site.s("add", number, number) for number in range(size)]


# -- its settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("we_first", [True, False], ids=["ours first", "Celery's first"])
@pytest.mark.parametrize("we_last", [True, False], ids=["ours last", "Celery's last"])
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "not ordered"])
async def test_the_parts_are_kept_as_celery_is_told_to(
    new_site: Callable[..., Site], ordered: bool, we_first: bool, we_last: bool
) -> None:
    site = new_site(result_backend_transport_options={"result_chord_ordered": ordered})
    async with site.backend() as backend:
        chord(header(site, 2))(site.s("echo"))
        first, last = site.requests()[::-1]
        await part(site, backend, we_first, first, "first to come")
        await part(site, backend, we_last, last, "last")
        expected = ["last", "first to come"] if ordered else ["first to come", "last"]
        assert site.sent() == [("echo", [expected])]


async def part(site: Site, backend: Backend, we: bool, request: Context, value: Any) -> None:
    if we:
        await ours(backend, request, value)
    else:
        theirs(site, request, value)


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "not ordered"])
async def test_parts_are_added_to_what_is_there_whatever_we_are_told(site: Site, ordered: bool) -> None:
    async with site.backend(chord_ordered=ordered) as one, site.backend(chord_ordered=not ordered) as other:
        chord(header(site, 2))(site.s("echo"))
        first, last = site.requests()
        await ours(one, first, 1)
        await ours(other, last, 2)
        await ours(other, last, 2)  # counts once
        assert site.sent() == [("echo", [[1, 2]])]


@pytest.mark.parametrize("expires", [2, None], ids=["results expire first", "results stay"])
async def test_a_chord_lives_as_celery_is_told(new_site: Callable[..., Site], expires: int | None) -> None:
    site = new_site(result_expires=expires, result_chord_expires=3600)
    async with site.backend() as backend:
        first, *_ = nested(site)
        await ours(backend, first, 1)
        for suffix in (".j", ".s", ".d", ".a", *([""] if expires else [])):  # a group lives as long as its members
            left = site.ttl(first, suffix)
            assert left is not None
            assert 3590 < left <= 3600


@pytest.mark.parametrize("here", [2, 0])
async def test_no_key_lives_shorter_for_a_part_of_ours(site: Site, here: int) -> None:
    async with site.backend(expires=here) as backend:
        first, second, third = nested(site)
        theirs(site, first, 1)
        suffixes = (".j", ".s", ".d", *([""] if here else []))  # a group lives as long as its members
        before = [site.ttl(first, suffix) for suffix in suffixes]
        await ours(backend, second, 2)
        after = [site.ttl(first, suffix) for suffix in suffixes]
        for left, was in zip(after, before, strict=True):
            assert left is not None
            assert was is not None
            assert was - 5 < left <= was
        await ours(backend, third, 3)
        assert site.sent() == [("echo", [[[1, 2], 3]])]


async def test_the_mark_of_a_finished_chord_lives_as_long_as_what_it_marks(site: Site) -> None:
    async with site.backend(expires=5000) as long, site.backend(expires=100) as short:
        chord(header(site, 2))(site.s("echo"))
        first, last = site.requests()
        await ours(long, first, 1)
        await ours(short, last, 2)
        mark, rest = site.ttl(first, ".c"), site.ttl(first, ".a")
        assert mark is not None
        assert rest is not None
        assert 4990 < rest <= mark <= 5000


def test_what_is_taken_over(site: Site) -> None:
    """The settings of chords; in a database, Celery counts with a task of its own."""
    site.app.conf.update(result_chord_expires=77, result_backend_transport_options={"result_chord_ordered": False})
    on_redis = backend_from_app(site.app)
    assert (on_redis.chord_expires, on_redis.expires) == (77, 86400)
    assert on_redis._count_requests
    assert not vars(on_redis)["_chord_ordered"]
    in_database = backend_from_app(make_app(None, "db+postgresql+psycopg://localhost/x", result_chord_expires=77))
    assert not in_database._count_requests


# -- chains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("we", [True, False], ids=["ours", "Celery's"])
async def test_the_rest_of_a_chain_fails_with_its_first_task(site: Site, backend: Backend, we: bool) -> None:
    last = chain(site.s("add", 1, 1), site.s("add", 2), site.s("add", 3)).apply_async()
    (first,) = site.requests()
    await part(site, backend, we, first, KeyError("no"))
    for task_id in (last.id, last.parent.id, last.parent.parent.id):
        with pytest.raises(KeyError, match="no"):
            await backend.result(task_id).get(timeout=GUARD)
    assert [result.state for result in (last, last.parent)] == ["FAILURE"] * 2


@pytest.mark.parametrize("we", [True, False], ids=["ours", "Celery's"])
async def test_a_chain_in_a_header_returns_its_part_when_it_breaks(site: Site, backend: Backend, we: bool) -> None:
    body = site.s("echo").on_error(site.s("echo"))
    sent = chord([chain(site.s("add", 1, 1), site.s("add", 1)), site.s("add", 2, 2)])(body)
    broken, other = site.requests()
    await ours(backend, other, 4)
    for _ in range(2):  # an element that has failed already returns no part again
        await part(site, backend, we, broken, ValueError("no"))
    assert await backend.chord(sent.parent.id).progress() == (2, 2)
    assert [name for name, _ in site.sent()] == ["echo"]
    with pytest.raises(ChordError, match="no"):
        await backend.result(sent.id).get(timeout=GUARD)


@pytest.mark.parametrize("we", [True, False], ids=["ours", "Celery's"])
async def test_a_chord_in_a_chain_fails_by_its_body(site: Site, backend: Backend, we: bool) -> None:
    inner = chord(header(site, 2), site.s("echo"))
    sent = chord([chain(site.s("add", 1, 1), site.s("add", 1), inner), site.s("add", 2, 2)])(site.s("total"))
    broken, other = site.requests()
    await part(site, backend, we, broken, ValueError("no"))
    await ours(backend, other, 4)
    assert await backend.chord(sent.parent.id).progress() == (2, 2)
    with pytest.raises(ChordError, match="no"):
        await backend.result(sent.id).get(timeout=GUARD)


async def test_what_is_stored_for_a_link_is_what_celery_stores(new_site: Callable[..., Site]) -> None:
    site = new_site(result_extended=True)
    async with site.backend() as backend:
        steps = [site.s("add", 1, 1), site.s("add", 2).set(queue="elsewhere"), site.s("add", 3)]
        chords = [chord([chain(*steps), site.s("add", 9, 9)])(site.s("echo")) for _ in range(2)]
        del chords
        requests = [request for request in site.requests() if request.chain]
        metas = []
        for we, request in zip((True, False), requests, strict=True):
            await part(site, backend, we, request, ValueError("no"))
            assert request.chain
            for link in request.chain:
                meta = site.app.backend.get_task_meta(link["options"]["task_id"])
                meta["result"] = repr(meta["result"])
                apart = ("task_id", "date_done", "group_id", "parent_id")
                metas.append({name: value for name, value in meta.items() if name not in apart})
        assert metas[:2] == metas[2:]


async def test_a_chain_is_checked_before_anything_is_stored(backend: Backend) -> None:
    good = {"task": "add", "options": {"task_id": "good"}}
    for bad in ("add", ["add"], {"options": 1}, {"options": {"task_id": ""}}, {"options": {"task_id": 5}}):
        request = aioresult.TaskRequest(id="first", chain=[good, bad])
        with pytest.raises(UsageError):
            await backend.mark_as_failure("first", ValueError(), request=request)
    assert not await backend.exists("first")
    assert not await backend.exists("good")
    without_id: dict[str, Any] = {"task": "add", "options": {}, "subtask_type": None}
    request = aioresult.TaskRequest(id="first", chain=[without_id, good, {}])
    assert await backend.mark_as_failure("first", ValueError(), request=request)
    assert await backend.exists("good")


async def test_a_link_that_cannot_be_stored_costs_no_other(new_site: Callable[..., Site]) -> None:
    site = new_site(result_extended=True)
    async with site.backend(max_result_size=5000) as backend:
        large = {"task": "add", "args": ["x" * 6000], "options": {"task_id": "large"}}
        small = {"task": "add", "args": [], "options": {"task_id": "small"}}
        request = aioresult.TaskRequest(id="first", chain=[large, small])
        with pytest.raises(aioresult.ResultTooLargeError):
            await backend.mark_as_failure("first", ValueError("no"), request=request)
        for task_id in ("first", "small"):
            with pytest.raises(ValueError, match="no"):
                await backend.result(task_id).get(timeout=0)


# -- run again ------------------------------------------------------------------------------------------------------


async def test_a_frozen_chord_that_failed_runs_again(site: Site, backend: Backend) -> None:
    frozen = chord(header(site, 2), site.s("echo"))
    frozen.freeze()
    frozen.apply_async()
    first, last = site.requests()
    await ours(backend, first, 1)
    await ours(backend, last, ValueError("first run"))
    with pytest.raises(ChordError, match="first run"):
        await backend.chord(first.group).get(timeout=GUARD)
    frozen.apply_async()
    again, second = site.requests()
    assert again.group == first.group
    assert await backend.chord(first.group).progress() == (0, 2)
    await ours(backend, again, 10)
    await ours(backend, second, 20)
    assert site.sent() == [("echo", [[10, 20]])]
    assert await backend.chord(first.group).get(timeout=GUARD) == [10, 20]


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "not ordered"])
async def test_a_chord_goes_as_it_does_by_celery_alone_whoever_runs_what(
    new_site: Callable[..., Site], ordered: bool
) -> None:
    """Three parts, each run by either side, in several orders."""
    site = new_site(result_backend_transport_options={"result_chord_ordered": ordered})
    sides = list(itertools.product([True, False], repeat=3))
    async with site.backend() as backend:
        for order in [(0, 1, 2), (2, 1, 0), (1, 2, 0)][: 3 if ordered else 2]:
            alone = await runs(site, backend, (False,) * 3, order)
            for we in sides:
                assert await runs(site, backend, we, order) == alone, (we, order)


async def runs(site: Site, backend: Backend, we: tuple[bool, ...], order: tuple[int, ...]) -> list[Any]:
    """What is sent, and how the body fares, of a frozen chord that is sent three times: at last, a part fails."""
    frozen = chord(header(site, 3), site.s("echo").on_error(site.s("total")))
    frozen.freeze()
    outcome: list[Any] = []
    for number in range(3):
        sent = frozen.apply_async()
        requests = site.requests()
        for index in order:
            value = ValueError("no") if number == 2 and index == 1 else f"{index} of {number}"
            await part(site, backend, we[index], requests[index], value)
        outcome.append([(name, args) for name, args in site.sent() if name == "echo"])
        outcome.append(site.app.backend.get_state(sent.id))
    return outcome


# -- finished by Celery ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("brings_first", [True, False], ids=["with a part of ours", "by Celery alone"])
async def test_a_chord_that_celery_finishes_is_told(site: Site, backend: Backend, brings_first: bool) -> None:
    chord(header(site, 2))(site.s("echo"))
    first, last = site.requests()
    handle = backend.chord(first.group)
    waiting = asyncio.ensure_future(handle.get(timeout=GUARD))
    await part(site, backend, brings_first, first, 1)
    theirs(site, last, 2)
    for waiter in (waiting, handle.get(timeout=GUARD), handle.get(timeout=0)):
        with pytest.raises(BackendGetMetaError, match=r"await the group, backend\.result"):
            await waiter
    assert await handle.progress() == ((2, 2) if brings_first else (0, None))
    assert site.sent() == [("echo", [[1, 2]])]


async def test_its_group_gives_the_values(site: Site, backend: Backend) -> None:
    sent = chord(header(site, 2))(site.s("echo"))
    first, last = site.requests()
    theirs(site, first, 1)
    theirs(site, last, 2)
    header_result = result_from_celery(sent, backend).parent
    assert header_result is not None
    assert await header_result == [1, 2]


@pytest.mark.parametrize("mark", [True, False], ids=["Celery 5.7", "without its mark"])
async def test_a_saved_group_gives_the_values(site: Site, backend: Backend, mark: bool) -> None:
    requests = nested(site)
    handle = backend.chord(requests[0].group)
    waiting = asyncio.ensure_future(handle.get(timeout=GUARD))
    for number, request in enumerate(requests):
        theirs(site, request, number)
    assert await waiting == [[0, 1], 2]
    if not mark:
        site.redis.delete(site.key(requests[0], ".c"))
    assert await handle.get(timeout=0) == [[0, 1], 2]
    assert await handle.get(timeout=GUARD) == [[0, 1], 2]
    assert await handle.progress() == (3, 3)


async def test_a_member_of_a_saved_group_that_fails_is_told_at_once(new_site: Callable[..., Site]) -> None:
    site = new_site()
    async with site.backend(heartbeat=1000) as backend:
        first, *_ = nested(site)
        waiting = asyncio.ensure_future(backend.chord(first.group).get(timeout=GUARD))
        await until(lambda: subscribed(site, f"celery-task-meta-{first.id}", 2))  # one is Celery's
        theirs(site, first, ValueError("no"))
        with pytest.raises(ChordError, match=first.id) as caught:
            await waiting
        assert isinstance(caught.value.__cause__, ValueError)


def subscribed(site: Site, channel: str, times: int = 1) -> bool:
    ((_, count),) = site.redis.pubsub_numsub(channel)
    return bool(count == times)


async def test_the_result_of_the_body_tells_at_once(site: Site) -> None:
    async with site.backend(heartbeat=1000) as backend:
        sent = chord(header(site, 2))(site.s("echo"))
        first, last = site.requests()
        await ours(backend, first, 1)
        waiting = asyncio.ensure_future(backend.chord(first.group).get(timeout=GUARD))
        await until(lambda: subscribed(site, f"celery-task-meta-{sent.id}"))
        theirs(site, last, 2)
        (body,) = site.requests()
        theirs(site, body, [1, 2])
        with pytest.raises(BackendGetMetaError, match=r"await the group, backend\.result"):
            await waiting


@pytest.mark.parametrize("brings_first", [True, False], ids=["with a part of ours", "by Celery alone"])
@pytest.mark.parametrize("mark", [True, False], ids=["at once", "later"])
async def test_a_chord_that_celery_fails_is_told(site: Site, backend: Backend, brings_first: bool, mark: bool) -> None:
    chord(header(site, 3))(site.s("echo"))
    first, failing, last = site.requests()
    handle = backend.chord(first.group)
    waiting = asyncio.ensure_future(handle.get(timeout=GUARD))
    patient = asyncio.ensure_future(handle.get(timeout=GUARD, propagate=False))
    await part(site, backend, brings_first, first, 1)
    theirs(site, failing, ValueError("no"))
    with pytest.raises(ChordError, match=failing.id) as caught:
        await waiting  # though a part is missing
    assert isinstance(caught.value.__cause__, ValueError)
    assert not patient.done()
    theirs(site, last, 3)
    assert repr(await patient) == "[1, ValueError('no'), 3]"
    if not mark:
        site.redis.delete(site.key(first, ".c"))
    for timeout in (0, GUARD):
        with pytest.raises(ChordError, match=failing.id):
            await handle.get(timeout=timeout)
    if mark or brings_first:
        assert await handle.progress() == (3, 3)
        assert repr(await handle.get(timeout=GUARD, propagate=False)) == "[1, ValueError('no'), 3]"
    async with backend_from_app(site.app) as other:  # nobody dispatches it once more
        assert await other.chord(first.group).claim() is None


async def test_parts_that_come_before_the_size_are_no_end(site: Site, backend: Backend) -> None:
    await backend.on_chord_part_return("g", "a", "SUCCESS", 1, 0)
    handle = backend.chord("g")
    assert await handle.progress() == (1, None)
    with pytest.raises(aioresult.TimeoutError):
        await handle.get(timeout=3 * HEARTBEAT)
    site.app.backend.set_chord_size("g", 1)
    assert await handle.get(timeout=GUARD) == [1]


async def test_the_first_part_of_another_run_is_no_end(site: Site, backend: Backend) -> None:
    """It may come before Celery sets the size anew, and after its mark of the former run has expired."""
    chord(header(site, 2))(site.s("echo"))
    first, last = site.requests()
    await ours(backend, first, 1)
    theirs(site, last, 2)
    site.redis.delete(site.key(first, ".c"))
    assert await backend.chord(first.group).progress() == (2, 2)
    theirs(site, first, 10)
    assert await backend.chord(first.group).progress() == (1, None)
    with pytest.raises(aioresult.TimeoutError):
        await backend.chord(first.group).get(timeout=0)


async def test_a_part_that_was_waited_for_and_is_gone_ends_the_wait(site: Site, backend: Backend) -> None:
    """Celery before 5.7 leaves no mark."""
    chord(header(site, 2))(site.s("echo"))
    first, _ = site.requests()
    theirs(site, first, 1)
    waiting = asyncio.ensure_future(backend.chord(first.group).get(timeout=GUARD))
    await until(lambda: subscribed(site, site.key(first)))
    await backend.chord(first.group).progress()
    site.redis.delete(*(site.key(first, suffix) for suffix in (".j", ".s", ".t")))
    with pytest.raises(BackendGetMetaError, match=r"await the group, backend\.result"):
        await waiting


@pytest.mark.parametrize("value", [2, ValueError("no")], ids=["done", "failed"])
async def test_a_dispatcher_is_done_with_what_celery_has_finished(site: Site, value: Any) -> None:
    async with backend_from_app(site.app) as backend:
        chord(header(site, 2))(site.s("echo"))
        first, last = site.requests()
        await ours(backend, first, 1)
        theirs(site, last, value)
        assert await backend.active_chords() == [first.group]
        next_one = asyncio.ensure_future(anext(backend.ready_chords()))

        async def none_left() -> bool:
            return not await backend.active_chords()

        await until(none_left)
        assert not next_one.done()
        next_one.cancel()
        await asyncio.gather(next_one, return_exceptions=True)


async def test_chords_of_ours_are_not_looked_at_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async with site.backend() as backend:
        looks: list[str] = []
        monkeypatch.setattr(backend, "read_again", looks.append)
        await backend.create_chord("ours", size=1)
        mine = asyncio.ensure_future(backend.chord("ours").get(timeout=GUARD))
        other = asyncio.ensure_future(backend.chord("celerys").get(timeout=GUARD))
        await until(lambda: len(looks) >= 2)
        assert {look.split()[-1] for look in looks} == {"celerys"}
        await backend.on_chord_part_return("ours", "a", "SUCCESS", 1)
        assert await mine == [1]
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        assert not backend._chords._lookouts._lookouts
        assert backend._chords._lookouts._timer is None


async def test_closing_ends_the_wait_and_the_looks(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    backend = site.backend()
    for _ in range(2):  # it can be opened again
        async with backend:
            waiting = asyncio.ensure_future(backend.chord("g").get())
            await until(lambda: subscribed(site, "celery-taskset-meta-g"))
        with pytest.raises(aioresult.BackendClosedError):
            await waiting
        assert backend._chords._lookouts._timer is None
    assert not [record for record in caplog.records if record.name == "aioresult"]


async def test_many_looks_are_one_batch(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async with site.backend() as backend:
        batches: list[int] = []
        steps = backend._chord_steps

        async def counted(some: Any) -> Any:
            batches.append(len(some))
            return await steps(some)

        waiting = [asyncio.ensure_future(backend.chord(f"g{number}").get(timeout=GUARD)) for number in range(50)]
        await until(lambda: subscribed(site, "celery-taskset-meta-g49"))
        monkeypatch.setattr(backend, "_chord_steps", counted)
        await until(lambda: len(batches) >= 2)
        assert batches[:2] == [50, 50]
        for waiter in waiting:
            waiter.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
