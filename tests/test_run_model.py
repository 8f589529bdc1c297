"""Every order of START, FINISH, REVOKE, RELEASE and RETRY, on the real transitions: `aioresult.backends.runs.Note`.

Two workers run a task, which is delivered twice, or again after a retry or a shutdown. Replies are lost and steps taken
twice; a listener is lost and comes back; a worker dies. Somebody revokes the task. Whatever comes: no body begins after
`revoke` has returned and the task was not running; a success is never replaced; an older run's failure is not told
while a newer one runs; a body that runs hears of the wish; and in the end a task that was revoked is over.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import NamedTuple

import pytest

from aioresult.backends import runs
from aioresult.backends.runs import Note, Taken
from aioresult.record import Record
from aioresult.run import RunOp, RunStep, Verdict
from aioresult.states import FAILURE, READY_STATES, RETRY, REVOKED, STARTED, SUCCESS


class Worker(NamedTuple):
    """A process with at most one run at a time."""

    #: idle → queued → asked (START was taken, and the reply is on its way) → body → leaving → idle; or dead.
    phase: str = "idle"
    #: Of the run that it has.
    run: str = ""
    #: The run was told to stop.
    stopped: bool = False
    #: 2: it hears, and has read the wishes; 1: it hears; 0: its listener is lost.
    hears: int = 2
    #: Runs that are to stop, as published to it.
    messages: tuple[str, ...] = ()
    #: What is recorded on leaving.
    leaves: str = ""


class World(NamedTuple):
    note: Note
    status: str | None = None
    payload: bytes = b""
    workers: tuple[Worker, Worker] = (Worker("queued"), Worker())
    #: How many runs there were, for their names.
    runs: int = 0
    #: What `revoke` has come to: "revoked", "asked", "over"; while it looks for the worker: the worker.
    revoke: str = ""
    #: Whether somebody died after the task had been asked to stop: then it may be over only with its next attempt.
    died_asked: bool = False
    redeliveries: int = 1
    retries: int = 1
    losses: int = 1
    repeats: int = 1
    deaths: int = 1

    @property
    def key(self) -> tuple[object, ...]:
        note = self.note
        return (note.run, note.worker, note.over, note.wish is not None, *self[1:])


NAMES = "ab"


class Model:
    """The search. ``note`` is the class of the note; the other two are mistakes of the worker."""

    def __init__(self, note: type[Note] = Note, reads_wishes: bool = True, looks_before_the_body: bool = True) -> None:
        self._note = note
        self._reads_wishes = reads_wishes
        self._looks_before_the_body = looks_before_the_body

    def explore(self, **budget: int) -> int:
        """How many states there are. Raises `AssertionError` if one of them must not be."""
        first = World(self._note())._replace(**budget)  # type: ignore[arg-type]
        seen = {first.key}
        todo = [first]
        while todo:
            world = todo.pop()
            at_rest = True
            for after in self._moves(world):
                at_rest = False
                if after.key not in seen:
                    check_change(world, after)
                    check(after)
                    seen.add(after.key)
                    todo.append(after)
            if at_rest:
                check_rest(world)
        return len(seen)

    # -- what may happen ----------------------------------------------------------------------------------------------

    def _moves(self, world: World) -> Iterator[World]:
        for index, worker in enumerate(world.workers):
            if worker.phase != "dead":
                yield from self._run(world, index, worker)
                yield from self._listen(world, index, worker)
        if world.redeliveries and world.workers[1].phase == "idle":
            yield _with(world, 1, phase="queued")._replace(redeliveries=world.redeliveries - 1)
        yield from self._revoke(world)

    def _run(self, world: World, index: int, worker: Worker) -> Iterator[World]:
        me = NAMES[index]
        match worker.phase:
            case "queued":
                named = world._replace(runs=world.runs + 1)
                yield self._start(_with(named, index, run=f"{me}{named.runs}", stopped=False), index)
            case "asked":
                yield self._begin(world, index, worker)
                if world.repeats:
                    yield self._start(world._replace(repeats=world.repeats - 1), index)
            case "body":
                for ending in (SUCCESS, FAILURE):
                    yield self._leave(world, index, ending)
                if world.retries:
                    fewer = world._replace(retries=world.retries - 1)
                    yield self._leave(fewer, index, RETRY)
                    yield self._leave(fewer, index, "")  # a shutdown
                if worker.stopped:
                    yield self._leave(world, index, REVOKED)
            case "leaving":
                yield self._left(world, index, worker)
                if world.repeats:
                    yield self._leave(world._replace(repeats=world.repeats - 1), index, worker.leaves)
        if world.deaths and worker.phase in ("asked", "body", "leaving"):
            asked = world.revoke not in ("", "revoked", "over")
            dead = _with(world, index, phase="dead", messages=())
            yield dead._replace(deaths=world.deaths - 1, died_asked=world.died_asked or asked)

    def _start(self, world: World, index: int) -> World:
        run = world.workers[index].run
        step = RunStep(RunOp.START, "t", run, NAMES[index], record=_record(STARTED, run), state=STARTED)
        after, verdict = _take(world, step)
        if verdict in (Verdict.STARTED, Verdict.AGAIN):
            assert world.revoke != "revoked" or world.status == SUCCESS, "a run begins after revoke() said: revoked"
            return _with(after, index, phase="asked", leaves="")
        # The reply that refuses may be lost, too; to repeat the step is what comes then.
        assert verdict is Verdict.REVOKED, verdict
        return _with(after, index, phase="asked", leaves="refused")

    def _begin(self, world: World, index: int, worker: Worker) -> World:
        if worker.leaves == "refused":
            return _with(world, index, phase="idle", run="", stopped=False, leaves="")
        if worker.stopped and self._looks_before_the_body:
            return self._leave(world, index, REVOKED)
        return _with(world, index, phase="body", stopped=False)  # nobody stops it twice

    def _leave(self, world: World, index: int, ending: str) -> World:
        run = world.workers[index].run
        if ending:
            step = RunStep(RunOp.FINISH, "t", run, record=_record(ending, run), state=ending)
        else:
            step = RunStep(RunOp.RELEASE, "t", run)
        after, verdict = _take(world, step)
        if verdict is Verdict.REVOKED and ending in (RETRY, ""):
            return _with(after, index, phase="leaving", leaves=ending or "released")
        return _with(after, index, phase="leaving", leaves=ending)

    def _left(self, world: World, index: int, worker: Worker) -> World:
        again = worker.leaves in (RETRY, "") and world.status != REVOKED
        return _with(world, index, phase="queued" if again else "idle", run="", stopped=False, leaves="")

    def _listen(self, world: World, index: int, worker: Worker) -> Iterator[World]:
        if worker.messages and worker.hears:
            stopped = worker.stopped or (worker.messages[0] == worker.run and worker.phase in ("asked", "body"))
            yield _with(world, index, messages=worker.messages[1:], stopped=stopped)
        if world.losses and worker.hears == 2:
            yield _with(world._replace(losses=world.losses - 1), index, hears=0, messages=())
        if worker.hears == 0:
            yield _with(world, index, hears=1)
        if worker.hears == 1:
            stopped = worker.stopped
            if self._reads_wishes and worker.phase in ("asked", "body"):
                note = copy(world.note)
                note.take(RunStep(RunOp.READ, "t"), world.status, same=False)
                state = note.state(Verdict.NOTED)
                stopped = stopped or (state.run == worker.run and state.wish is not None)
            yield _with(world, index, hears=2, stopped=stopped)

    def _revoke(self, world: World) -> Iterator[World]:
        """In two steps: the wish, and, if the worker that was asked is dead, once more without it."""
        step = RunStep(RunOp.REVOKE, "t", record=_record(REVOKED, "wish"), reason="why")
        if world.revoke == "":
            asked = world.note.worker
            after, verdict = _take(world, step)
            yield after._replace(revoke=f"at {asked}" if verdict is Verdict.ASKED else _SAID[verdict])
            if world.repeats:  # the reply was lost
                yield after._replace(repeats=world.repeats - 1)
        elif world.revoke.startswith("at "):
            asked = world.revoke.removeprefix("at ")
            if world.workers[NAMES.index(asked)].phase != "dead":
                yield world._replace(revoke="asked")
            else:
                after, verdict = _take(world, step._replace(gone=asked))
                yield after._replace(revoke=_SAID[verdict])


_SAID = {Verdict.ASKED: "asked", Verdict.REVOKED: "revoked", Verdict.DONE: "over"}


def _record(state: str, run: str) -> Record:
    return Record("t", f"{state} {run}".encode(), 0.0)


def _with(world: World, index: int, **changes: object) -> World:
    workers = list(world.workers)
    workers[index] = workers[index]._replace(**changes)  # type: ignore[arg-type]
    return world._replace(workers=(workers[0], workers[1]))


def _take(world: World, step: RunStep) -> tuple[World, Verdict]:
    """The step as a store does it, in one."""
    note, worker = copy(world.note), world.note.worker
    taken = note.take(step, world.status, step.record is not None and step.record.payload == world.payload)
    world = world._replace(note=note)
    if taken.store is not None:
        payload = taken.store.payload
        world = world._replace(status=payload.split()[0].decode(), payload=payload)
    if taken.tell:
        index = NAMES.index(worker)
        other = world.workers[index]
        if other.hears and other.phase != "dead":
            world = _with(world, index, messages=(*other.messages, note.run))
    return world, taken.verdict


# -- what must hold ---------------------------------------------------------------------------------------------------


def _runs(world: World) -> list[Worker]:
    return [worker for worker in world.workers if worker.phase in ("asked", "body") and worker.leaves != "refused"]


def check_change(before: World, after: World) -> None:
    assert before.status != SUCCESS or after.payload == before.payload, "a success is replaced"
    if after.payload != before.payload and after.status in (FAILURE, RETRY):
        newer = [worker.run for worker in _runs(after) if worker.run == before.note.run]
        assert not newer, f"the {after.status} of an older run is told while {newer} runs"


def check(world: World) -> None:
    if world.revoke == "revoked":
        assert world.status in READY_STATES, f"revoked, and then {world.status}"
    if world.note.wish is not None and world.status != SUCCESS:
        for worker in _runs(world):
            if worker.run == world.note.run and not world.note.over and worker.hears == 2 and not worker.messages:
                assert worker.stopped, "a body that runs has not heard of the wish, and never will"


def check_rest(world: World) -> None:
    """Nothing more can happen."""
    if world.revoke in ("asked", "revoked") and not world.died_asked:
        assert world.status in READY_STATES, f"revoked, and {world.status} for ever"
    alive = [worker for worker in world.workers if worker.phase != "dead"]
    assert all(worker.phase == "idle" for worker in alive)


BUDGETS = {
    "two deliveries": {"redeliveries": 1, "retries": 1, "losses": 0, "repeats": 0, "deaths": 0},
    "a lost listener": {"redeliveries": 1, "retries": 0, "losses": 2, "repeats": 0, "deaths": 0},
    "lost replies": {"redeliveries": 1, "retries": 0, "losses": 0, "repeats": 2, "deaths": 0},
    "a lost reply and a retry": {"redeliveries": 1, "retries": 1, "losses": 0, "repeats": 1, "deaths": 0},
    "a death": {"redeliveries": 1, "retries": 1, "losses": 0, "repeats": 0, "deaths": 1},
    "one delivery and everything": {"redeliveries": 0},
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_every_order_of_steps(budget: dict[str, int]) -> None:
    assert Model().explore(**budget) > 100


# -- mistakes, each of which the search finds -------------------------------------------------------------------------


class StartsWhatWasRevoked(Note):
    def _start(self, step: RunStep, status: str | None) -> Taken:
        self.run, self.worker, self.over = step.run, step.worker, False
        return Taken(Verdict.STARTED, step.record)


class StartsInSpiteOfTheWish(Note):
    def _start(self, step: RunStep, status: str | None) -> Taken:
        wish, self.wish = self.wish, None
        taken = super()._start(step, status)
        self.wish = wish
        return taken


class RefusesAndStoresNothing(Note):
    def _revoked(self, status: str | None) -> Taken:
        return super()._revoked(status)._replace(store=None)


class TellsOfOlderRuns(Note):
    def _finish(self, step: RunStep, status: str | None, same: bool, others: bool) -> Taken:
        return super()._finish(step, status, same, others=False)


class AsksTheDead(Note):
    def _revoke(self, step: RunStep, status: str | None) -> Taken:
        return super()._revoke(step._replace(gone=""), status)


class TellsNobody(Note):
    def _revoke(self, step: RunStep, status: str | None) -> Taken:
        return super()._revoke(step, status)._replace(tell=False)


class RetriesWhatIsRevoked(Note):
    def _finish(self, step: RunStep, status: str | None, same: bool, others: bool) -> Taken:
        over, self.over = self.over, False
        taken = super()._finish(step, status, same, others)
        self.over = over or self.over
        return taken


#: Each with the budget in which it shows.
MISTAKES = {
    StartsWhatWasRevoked: "two deliveries",
    StartsInSpiteOfTheWish: "lost replies",
    RefusesAndStoresNothing: "two deliveries",
    TellsOfOlderRuns: "two deliveries",
    AsksTheDead: "a death",
    TellsNobody: "two deliveries",
    RetriesWhatIsRevoked: "a lost reply and a retry",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_of_the_store_is_found(mistake: type[Note]) -> None:
    with pytest.raises(AssertionError):
        Model(mistake).explore(**BUDGETS[MISTAKES[mistake]])


@pytest.mark.parametrize("mistake", ["reads_wishes", "looks_before_the_body"])
def test_a_mistake_of_the_worker_is_found(mistake: str) -> None:
    with pytest.raises(AssertionError, match="has not heard of the wish"):
        Model(**{mistake: False}).explore(**BUDGETS["a lost listener"])  # type: ignore[arg-type]


def test_a_success_that_is_replaced_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_put", lambda record, status, same: Taken(Verdict.STORED, record))
    with pytest.raises(AssertionError, match="a success is replaced"):
        Model().explore(**BUDGETS["two deliveries"])
