"""The hub against a scripted source: every order of events up to a depth, and each rule by itself."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import pytest

from aioresult.exceptions import (
    BackendClosedError,
    BackendConnectionError,
    BackendError,
    BackendRefusedError,
    DecodeError,
)
from aioresult.hub import Hub
from aioresult.meta import TaskMeta
from aioresult.retry import Backoff
from aioresult.source import Finding
from aioresult.states import STARTED, SUCCESS
from aioresult.waiter import Outcome, SingleWaiter


class ScriptedSource:
    """A server whose every step is taken by the test.

    A call first waits to be *executed* (the server acts), then to be *answered* (the caller learns of it): `advance`
    takes one such step. `store` acts at once, and its message arrives at once if the id is subscribed.
    """

    def __init__(self) -> None:
        self.hub = Hub(self, backoff=Backoff(0, 0))
        self.stored: dict[str, TaskMeta] = {}
        self.subscribed: set[str] = set()
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        self.error: Exception | None = None
        self._step: asyncio.Future[None] | None = None
        self._name = ""

    @property
    def busy(self) -> bool:
        return self._step is not None

    async def _next_step(self) -> None:
        self._step = asyncio.get_running_loop().create_future()
        try:
            await self._step
        finally:
            self._step = None

    async def _call(self, name: str, ids: Sequence[str]) -> None:
        self._name = name
        self.calls.append((name, tuple(ids)))
        await self._next_step()
        if self.error is not None:
            raise self.error

    async def subscribe(self, ids: Sequence[str]) -> None:
        await self._call("subscribe", ids)
        self.subscribed.update(ids)
        await self._next_step()

    async def unsubscribe(self, ids: Sequence[str]) -> None:
        await self._call("unsubscribe", ids)
        self.subscribed.difference_update(ids)
        await self._next_step()

    async def read(self, ids: Sequence[str]) -> Sequence[Finding | None]:
        await self._call("read", ids)
        found = [self.stored.get(task_id) for task_id in ids]
        await self._next_step()
        return [None if meta is None else (meta, id(meta)) for meta in found]

    def store(self, task_id: str, status: str = SUCCESS) -> None:
        self.stored[task_id] = TaskMeta(task_id, status)
        if task_id in self.subscribed:
            self.hub.receive(task_id, self.stored[task_id], id(self.stored[task_id]))

    def lose(self) -> None:
        """The listener's connection breaks; a call on it fails, a read (another connection) does not."""
        self.subscribed.clear()
        if self._step is not None and not self._step.done() and self._name != "read":
            self._step.set_exception(BackendConnectionError("lost"))
        self.hub.lost()

    def fail(self) -> None:
        """The call in progress is refused, or its answer lost; every subscription stands as it was."""
        if self._step is not None and not self._step.done():
            self._step.set_exception(BackendConnectionError("busy"))

    async def advance(self) -> None:
        await settle()
        if self._step is not None and not self._step.done():
            self._step.set_result(None)
        await settle()

    async def drain(self) -> None:
        """Take steps until there is nothing left to do."""
        await settle()
        while self.busy:
            await self.advance()

    async def drain_until(self, condition: Callable[[], bool]) -> None:
        """Take steps until the condition holds, also such as a timer brings about."""
        while not condition():
            await self.advance()
            await asyncio.sleep(0.001)


async def settle() -> None:
    """Let every task run until it waits for something that the test controls."""
    for _ in range(6):
        await asyncio.sleep(0)


@pytest.fixture
async def source() -> AsyncIterator[ScriptedSource]:
    scripted = ScriptedSource()
    scripted.hub.start()
    yield scripted
    await scripted.hub.close(BackendClosedError("closed"))


def watch(source: ScriptedSource, task_id: str = "a") -> SingleWaiter:
    waiter = SingleWaiter(task_id, None)
    source.hub.watch(task_id, waiter)
    return waiter


async def test_who_has_looked_is_read_for_once_subscribed(source: ScriptedSource) -> None:
    waiter = SingleWaiter("a", None)
    source.hub.watch("a", waiter, read_first=False)
    source.store("a")  # before the subscription: no message tells of it
    await source.drain()
    assert waiter.future.done()
    assert [name for name, _ in source.calls] == ["subscribe", "read", "unsubscribe"]


async def perform(source: ScriptedSource, script: Sequence[str]) -> tuple[list[SingleWaiter], list[SingleWaiter]]:
    """Do what the script says. Returns those who still wait, or were told, and those who left before they were."""
    waiters = [watch(source)]
    left_waiting: list[SingleWaiter] = []
    for action in script:
        match action:
            case "store":
                source.store("a")
            case "start":
                if "a" not in source.stored:
                    source.store("a", STARTED)
            case "advance":
                await source.advance()
            case "lose":
                source.lose()
            case "fail":
                source.fail()
            case "cancel":
                if waiters:
                    leaver = waiters.pop(0)
                    source.hub.unwatch("a", leaver)
                    if not leaver.future.done():
                        left_waiting.append(leaver)
            case "watch":
                waiters.append(watch(source))
    return waiters, left_waiting


async def play(script: Sequence[str]) -> None:
    """Do what the script says, then let everything finish, and see that nobody was forgotten."""
    source = ScriptedSource()
    source.hub.start()
    waiters, left_waiting = await perform(source, script)
    await source.drain()
    if "a" not in source.stored or not source.stored["a"].ready:
        assert not any(waiter.future.done() for waiter in waiters)
        source.store("a")
        await source.drain()
    for waiter in waiters:
        assert waiter.future.done(), f"a waiter missed the result after {script}"
        assert waiter.future.result().status == SUCCESS
    assert not any(leaver.future.done() for leaver in left_waiting), "told after it had left"
    assert len(source.hub) == 0
    assert source.subscribed == set(), f"a subscription is left after {script}"
    await source.hub.close(BackendClosedError("closed"))


ACTIONS = ("store", "advance", "lose", "fail", "cancel", "watch", "start")


def scripts(length: int) -> Iterator[list[str]]:
    """Every ``length`` actions, after each number of steps that the start of a wait takes."""
    for steps_before in (0, 1, 2, 3, 4):
        for actions in itertools.product(ACTIONS, repeat=length):
            yield ["advance"] * steps_before + list(actions)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Without warnings: thousands of lost connections, each of them expected."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(300)
async def test_no_order_of_events_loses_a_wake_up_or_leaves_a_subscription(quiet: None) -> None:
    """Invariants 1, 5 and 7, exhaustively: every four actions, at each step of the start of a wait."""
    for script in scripts(4):
        await play(script)


async def test_closing_at_any_moment_leaves_nobody_waiting(quiet: None) -> None:
    """Invariant 7, exhaustively: every three actions, at each step of the start of a wait."""
    for script in scripts(3):
        source = ScriptedSource()
        source.hub.start()
        waiters, left_waiting = await perform(source, script)
        closed = BackendClosedError("closed")
        await source.hub.close(closed)
        for waiter in waiters:
            assert waiter.future.done(), f"a waiter was forgotten after {script}"
            assert repr(waiter.future.exception()) in ("None", repr(closed))
        assert not any(leaver.future.done() for leaver in left_waiting), "told after it had left"
        assert len(source.hub) == 0


async def test_a_subscription_is_confirmed_before_it_is_followed_by_a_read(source: ScriptedSource) -> None:
    watch(source)
    await source.drain()
    assert [name for name, _ in source.calls] == ["read", "subscribe", "read"]


async def test_a_finished_result_is_found_without_a_subscription(source: ScriptedSource) -> None:
    source.store("a")
    waiter = watch(source)
    await source.drain()
    assert waiter.future.result().status == SUCCESS
    assert [name for name, _ in source.calls] == ["read"]


async def test_what_is_asked_for_meanwhile_goes_into_one_call(source: ScriptedSource) -> None:
    watch(source, "first")
    await settle()
    for number in range(10):
        watch(source, str(number))
    await source.drain()
    assert ("subscribe", tuple(str(number) for number in range(10))) in source.calls


async def test_a_chunk_bounds_every_call() -> None:
    source = ScriptedSource()
    source.hub = Hub(source, chunk=3)
    source.hub.start()
    for number in range(10):
        watch(source, str(number))
    await source.drain()
    assert max(len(ids) for _, ids in source.calls) == 3
    assert source.subscribed == {str(number) for number in range(10)}
    await source.hub.close(BackendClosedError("closed"))


async def test_the_last_waiter_of_an_id_ends_its_subscription(source: ScriptedSource) -> None:
    waiters = [watch(source) for _ in range(3)]
    await source.drain()
    for waiter in waiters[:2]:
        source.hub.unwatch("a", waiter)
    await source.drain()
    assert source.subscribed == {"a"}
    source.hub.unwatch("a", waiters[2])
    await source.drain()
    assert source.subscribed == set()


async def test_waiters_hear_of_every_state_until_the_last(source: ScriptedSource) -> None:
    heard: list[str] = []

    class Listener:
        def receive(self, task_id: str, outcome: Outcome) -> None:
            assert isinstance(outcome, TaskMeta)
            heard.append(outcome.status)

    source.hub.watch("a", Listener())
    await source.drain()
    for status in (STARTED, "PROGRESS", SUCCESS, SUCCESS):
        source.store("a", status)
    assert heard == [STARTED, "PROGRESS", SUCCESS]


async def test_an_event_during_a_read_does_not_hide_what_the_read_finds(source: ScriptedSource) -> None:
    """An event is no newer state: without what the read finds, whatever was before the event would stay unknown."""
    heard: list[str] = []

    class Listener:
        def receive(self, task_id: str, outcome: Outcome) -> None:
            assert isinstance(outcome, TaskMeta)
            heard.append(outcome.status)

    source.store("a", STARTED)
    source.hub.watch("a", Listener(), read_first=False)
    await source.drain_until(lambda: source.calls[-1:] == [("read", ("a",))])
    await source.advance()  # the read is executed, and not answered
    source.hub.receive("a", TaskMeta("a", "EVENT"), remember=False)
    await source.drain()
    assert heard == ["EVENT", STARTED]


async def test_an_error_in_place_of_a_meta_reaches_those_who_wait_for_that_id_alone(source: ScriptedSource) -> None:
    """Invariant 6."""
    broken, sound = watch(source, "broken"), watch(source, "sound")
    await source.drain()
    source.hub.receive("broken", DecodeError("not JSON"))
    source.store("sound")
    assert isinstance(broken.future.exception(), DecodeError)
    assert sound.future.result().ready


async def test_an_error_that_a_retry_cannot_mend_reaches_everyone_at_once(source: ScriptedSource) -> None:
    """Invariant 7: and the next wait tries afresh."""
    waiters = [watch(source, "a"), watch(source, "b")]
    source.error = BackendRefusedError("wrong password")
    await source.drain()
    assert [repr(waiter.future.exception()) for waiter in waiters] == [repr(source.error)] * 2
    assert waiters[0].future.exception() is not waiters[1].future.exception()
    source.error = None
    again = watch(source, "a")
    await source.drain()
    source.store("a")
    assert again.future.result().ready


async def test_a_bug_in_a_backend_fails_the_waiters_and_not_the_hub(
    source: ScriptedSource, caplog: pytest.LogCaptureFixture
) -> None:
    waiter = watch(source)
    source.error = ZeroDivisionError("a bug")
    await source.drain()
    error = waiter.future.exception()
    assert isinstance(error, BackendError)
    assert error.__cause__ is source.error
    assert "the listener failed" in caplog.text
    source.error = None
    again = watch(source)
    source.store("a")
    await source.drain()
    assert again.future.result().ready


async def test_what_is_waited_for_is_read_again_every_so_often_if_that_is_asked_for() -> None:
    """For sources whose messages may be lost on the way; nobody asks while nobody waits."""
    source = ScriptedSource()
    source.hub = Hub(source, chunk=3, recheck=0.001)
    source.hub.start()
    waiters = [watch(source, str(number)) for number in range(10)]
    await source.drain_until(lambda: len(source.subscribed) == 10)
    source.calls.clear()
    for number in range(10):
        source.stored[str(number)] = TaskMeta(str(number), SUCCESS)  # and no message comes
    await source.drain_until(lambda: all(waiter.future.done() for waiter in waiters))
    await source.drain_until(lambda: not source.subscribed)
    assert all(len(ids) <= 3 for _, ids in source.calls)
    assert len(source.hub) == 0
    source.calls.clear()
    await asyncio.sleep(0.01)
    assert source.calls == []
    await source.hub.close(BackendClosedError("closed"))
    await asyncio.sleep(0.01)
    assert source.calls == []


async def test_close_fails_everyone_who_waits_and_whoever_comes_later(source: ScriptedSource) -> None:
    """Invariant 7: nothing hangs."""
    waiter = watch(source)
    await source.drain()
    closed = BackendClosedError("closed")
    await source.hub.close(closed)
    assert repr(waiter.future.exception()) == repr(closed)
    with pytest.raises(BackendClosedError):
        watch(source)


def test_pauses_between_attempts_grow_to_a_cap_and_start_over() -> None:
    backoff = Backoff(first=1.0, cap=8.0)
    pauses = [backoff.pause() for _ in range(6)]
    for pause, whole in zip(pauses, (1, 2, 4, 8, 8, 8), strict=True):
        assert whole / 2 <= pause <= whole
    backoff.reset()
    assert backoff.pause() <= 1.0


async def test_what_has_not_been_read_is_not_looked_at(
    source: ScriptedSource, caplog: pytest.LogCaptureFixture
) -> None:
    """With more ids than go into a call, some are in a queue whenever the hub has no call in flight."""
    await source.hub.close(BackendClosedError("made anew"))
    hub = source.hub = Hub(source, chunk=1)
    hub.start()
    waiters = {task_id: SingleWaiter(task_id, None) for task_id in "abc"}
    for task_id, waiter in waiters.items():
        hub.watch(task_id, waiter)
    await settle()
    hub.unheard.due = True
    while hub.unheard.due:
        await source.advance()
    await settle()
    assert {task_id: topic.looks for task_id, topic in hub._topics.items()} == {"a": 1, "b": 0, "c": 0}
    await source.drain()
    for _ in range(3):
        hub.unheard.due = True
        hub._wake()
        await source.drain()
    assert not caplog.records
    hub.unheard.due = True
    hub._wake()
    await source.drain()
    (record,) = caplog.records
    assert "task a." in record.getMessage()
    for task_id, waiter in waiters.items():
        hub.unwatch(task_id, waiter)
        waiter.stop()
    await source.drain()
    await hub.close(BackendClosedError("closed"))


async def test_an_outage_is_over_though_some_have_left(
    source: ScriptedSource, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioresult")
    waiters = {task_id: SingleWaiter(task_id, None) for task_id in "abc"}
    for task_id, waiter in waiters.items():
        source.hub.watch(task_id, waiter)
    await source.drain()
    source.lose()
    source.hub.unwatch("c", waiters["c"])
    assert not caplog.records
    await source.drain()
    (record,) = caplog.records
    assert record.getMessage().endswith("2 subscriptions were restored")
    for task_id, waiter in waiters.items():
        source.hub.unwatch(task_id, waiter)
        waiter.stop()
