"""Every order of events that one reader of an output can meet, on the reader's own rule (`aioresult.reading`).

The store refuses what is not newer than its top, and publishes even so, as Redis does. A page is asked for, read in two
steps and answered, on another connection than the messages. The subscription is lost; entries are trimmed, or lost with
the key; a message vanishes; another attempt begins while a producer of the first still writes; the task is over with an
end mark or without. Whatever happens, the consumer gets 1, 2, 3 … of one attempt, or an error that says why not and
where to go on; and the reader ends where there is an end, and not before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest

from aioresult.exceptions import OutputGap, OutputRestarted
from aioresult.log import START, Place
from aioresult.reading import END, Decoded, Reading


class Write(NamedTuple):
    epoch: int
    first: int
    last: int
    state: str = ""


FINAL = Write(0, 0, 0, "the result, without an end mark")
LOST = Write(0, 0, 0, "the key is lost")


class World(NamedTuple):
    """All that there is beside the reader."""

    done: int = 0  # how much of the script
    store: tuple[Write, ...] = ()
    top: tuple[int, int] = START
    final: bool = False
    ended: bool = False  # there is an end, by a mark or by the result
    messages: tuple[Write, ...] = ()
    subscribed: int = 0  # 1: asked for, 2: confirmed
    heard_final: bool = False
    asked: tuple[Any, ...] = ()  # the look that is on its way
    losses: int = 1
    trims: int = 0
    evictions: int = 0
    vanishing: int = 0


def chunks(write: Write) -> list[tuple[int, int]]:
    return [] if write.state else [(write.epoch, seq) for seq in range(write.first, write.last + 1)]


def clone(reader: Reading) -> Reading:
    other: Reading = object.__new__(type(reader))
    other.__dict__.update(reader.__dict__)
    other._box = deque(reader._box)
    return other


def key(reader: Reading) -> tuple[Any, ...]:
    box = tuple(str(item) if isinstance(item, Exception) else item for _, item in reader._box)
    return tuple(value for name, value in sorted(reader.__dict__.items()) if name != "_box") + box


def explore(
    script: tuple[Write, ...],
    reading: type[Reading] = Reading,
    budget: Mapping[str, int] | None = None,
    log_first: bool = False,
) -> int:
    """How many states there are. Raises `AssertionError` if one of them must not be."""
    many: Mapping[str, Any] = budget or {}
    first = World(**many), reading(START)
    seen = {(first[0], key(first[1]))}
    todo = [first]
    while todo:
        world, reader = todo.pop()
        after = list(moves(script, world, reader, log_first))
        if not after:
            rest(world, reader)
        for state in after:
            known = state[0], key(state[1])
            if known not in seen:
                seen.add(known)
                todo.append(state)
    return len(seen)


def moves(script: tuple[Write, ...], world: World, reader: Reading, log_first: bool) -> Iterator[tuple[World, Reading]]:
    if world.done < len(script):
        yield write(world, script[world.done]), reader
    if reader.over and not len(reader):
        return
    yield from faults(world, reader)
    yield from heard(world, reader)
    yield from looks(world, reader, log_first)
    if len(reader):
        yield world, consumed(world, clone(reader))


def write(world: World, new: Write) -> World:
    if new is LOST:
        return world._replace(done=world.done + 1, store=(), top=START)
    messages = (*world.messages, new) if world.subscribed == 2 else world.messages
    world = world._replace(done=world.done + 1, messages=messages, ended=world.ended or bool(new.state))
    if new is FINAL:
        return world._replace(final=True)
    if (new.epoch, new.last) <= world.top:
        return world
    kept = world.store if new.epoch == world.top[0] else ()
    return world._replace(store=(*kept, new), top=(new.epoch, new.last))


def faults(world: World, reader: Reading) -> Iterator[tuple[World, Reading]]:
    if world.losses and world.subscribed == 2:
        yield world._replace(messages=(), subscribed=0, losses=world.losses - 1), reader
    if world.trims and len(world.store) > 1:
        yield world._replace(store=world.store[1:], trims=world.trims - 1), reader
    if world.evictions and world.store:
        yield world._replace(store=(), top=START, evictions=world.evictions - 1), reader
    if world.vanishing and world.messages:
        yield world._replace(messages=world.messages[1:], vanishing=world.vanishing - 1), reader


def heard(world: World, reader: Reading) -> Iterator[tuple[World, Reading]]:
    if world.subscribed == 0:
        yield world._replace(subscribed=1), reader
    if world.subscribed == 1:
        reader = clone(reader)
        reader.confirmed()
        yield world._replace(subscribed=2), reader
    elif world.messages:
        reader = clone(reader)
        message, *others = world.messages
        if message is FINAL:
            reader.ended()
        else:
            reader.receive(message.epoch, message.last, None if message.state else chunks(message), 1)
        yield world._replace(messages=tuple(others), heard_final=world.heard_final or message is FINAL), reader


def looks(world: World, reader: Reading, log_first: bool) -> Iterator[tuple[World, Reading]]:
    """Asked, read in two steps, answered: anything may come between."""

    def log(after: Place) -> tuple[Any, ...]:
        found = [entry for entry in world.store if (entry.epoch, entry.last) > after]
        return tuple(found[:1]), len(found) > 1, Place(*world.top)

    match world.asked:
        case () if reader.behind and not len(reader):
            reader = clone(reader)
            yield world._replace(asked=(reader.ask(),)), reader
        case (after,):
            yield world._replace(asked=(after, log(after) if log_first else world.final)), reader
        case (after, first):
            page, final = (first, world.final) if log_first else (log(after), first)
            yield world._replace(asked=("the reply", *page, final)), reader
        case (_, entries, more, top, final):
            reader = clone(reader)
            decoded = [Decoded(entry.epoch, entry.last, chunks(entry), entry.state) for entry in entries]
            reader.page(decoded, more, final, top)
            yield world._replace(asked=()), reader


def consumed(world: World, reader: Reading) -> Reading:
    place, obstacle = reader.place, reader.obstacle
    if obstacle is None:
        assert reader.take() == reader.place, "the cursor is not behind the chunk that was given"
        assert reader.place == (place.epoch or reader.place.epoch, place.seq + 1), f"{place}, then {reader.place}"
        return reader
    if obstacle is END:
        last = [entry.last for entry in world.store if not entry.state and entry.epoch == place.epoch]
        assert world.ended, f"it ends at {place}, and the task does not"
        assert not last or place.seq >= last[-1], f"it ends at {place}, before {last[-1]}"
        reader._box.popleft()
        return reader
    if isinstance(obstacle, OutputGap):
        there = [entry for entry in world.store if place.seq + 1 in range(entry.first, entry.last + 1)]
        assert not [entry for entry in there if entry.epoch == place.epoch], f"the chunk behind {place} is there"
    else:
        assert isinstance(obstacle, OutputRestarted)
        assert Place.parse(obstacle.cursor).epoch != place.epoch, f"no other attempt than that of {place}"
    # What a caller does: open a stream at the cursor. The others of the process are subscribed already.
    new = type(reader)(Place.parse(obstacle.cursor))
    assert new.place != place
    if world.subscribed == 2:
        new.confirmed()
    if world.heard_final:
        new.ended()
    return new


def rest(world: World, reader: Reading) -> None:
    """Nothing more can happen."""
    if world.final or (world.store and world.store[-1].state):
        assert reader.over, f"it waits for ever at {reader.place}"
        assert not len(reader), f"something is left at {reader.place}"
    elif world.store:
        assert reader.place == world.top, f"it waits at {reader.place}, and the log ends at {world.top}"


ONE = (Write(1, 1, 1), Write(1, 2, 2), Write(1, 3, 3), Write(1, 4, 5), Write(1, 6, 6), Write(1, 7, 7, "SUCCESS"))
#: Two flushes are repeated, for their replies were lost.
REPEATED = (Write(1, 1, 1), Write(1, 2, 3), Write(1, 2, 3), Write(1, 4, 4), Write(1, 4, 4), Write(1, 5, 5, "SUCCESS"))
#: A second attempt, and a flush of the first that comes late.
AGAIN = (Write(1, 1, 2), Write(1, 3, 3), Write(2, 1, 1), Write(2, 2, 3), Write(1, 4, 5), Write(2, 4, 4, "SUCCESS"))
DIES = (Write(1, 1, 1), Write(1, 2, 3), Write(1, 4, 4), Write(1, 5, 5))
NO_MARK = (Write(1, 1, 1), Write(1, 2, 3), Write(1, 4, 4), FINAL)
BOTH = (Write(1, 1, 1), Write(1, 2, 2), Write(1, 3, 4), Write(1, 5, 5, "SUCCESS"), FINAL)
AGAIN_NO_MARK = (Write(1, 1, 2), Write(2, 1, 1), Write(1, 3, 3), Write(2, 2, 2), FINAL)

SCRIPTS = {
    "one attempt": ONE,
    "a repeated flush": REPEATED,
    "another attempt": AGAIN,
    "the producer dies": DIES,
    "no end mark": NO_MARK,
    "both": BOTH,
    "another attempt, no end mark": AGAIN_NO_MARK,
    "nothing written": (FINAL,),
}


@pytest.fixture(autouse=True)
def small_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioresult.reading.BOX_CHUNKS", 2)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("budget", [{"losses": 2}, {"trims": 2}, {"evictions": 1}], ids=["cut", "trimmed", "evicted"])
def test_every_order_of_events(script: tuple[Write, ...], budget: dict[str, int]) -> None:
    explore(script, budget=budget)


def test_a_log_that_is_lost_and_begun_anew_by_a_clock_that_was_set_back() -> None:
    """The next attempt has a lower epoch than the one that was read."""
    for evicted_after in (1, 2):
        script = (
            *(Write(5, seq, seq) for seq in range(1, evicted_after + 1)),
            LOST,
            Write(3, 1, 1),
            Write(3, 2, 2),
            FINAL,
        )
        explore(script)


# -- mistakes, each of which the search finds -------------------------------------------------------------------------


class NoReadAfterTheConfirmation(Reading):
    def confirmed(self) -> None:
        pass


class ForgetsWhatComesDuringARead(Reading):
    def receive(self, epoch: int, last: int, chunks: Any, size: int = 0) -> None:
        if not self._asked:
            super().receive(epoch, last, chunks, size)


class TakesWhatDoesNotFollow(Reading):
    def receive(self, epoch: int, last: int, chunks: Any, size: int = 0) -> None:
        if chunks and epoch == self._at.epoch:
            self._at = Place(epoch, max(self._at.seq, last - len(chunks)))
        super().receive(epoch, last, chunks, size)


class TakesAnyEpoch(Reading):
    def receive(self, epoch: int, last: int, chunks: Any, size: int = 0) -> None:
        super().receive(self._at.epoch, last, chunks, size)


class ForgetsWhatDoesNotFit(Reading):
    def receive(self, epoch: int, last: int, chunks: Any, size: int = 0) -> None:
        behind = self.behind
        super().receive(epoch, last, chunks, size)
        self.behind = behind


class EndsWithAnOldPage(Reading):
    def page(self, entries: Any, more: bool, final: bool, top: Place) -> None:
        self._again = False
        super().page(entries, more, final or self._final, top)


class IgnoresOlderEpochs(Reading):
    def receive(self, epoch: int, last: int, chunks: Any, size: int = 0) -> None:
        if epoch >= self._at.epoch:
            super().receive(epoch, last, chunks, size)


MISTAKES: dict[type[Reading], dict[str, int]] = {
    NoReadAfterTheConfirmation: {},
    ForgetsWhatComesDuringARead: {},
    TakesWhatDoesNotFollow: {"vanishing": 1},
    TakesAnyEpoch: {},
    ForgetsWhatDoesNotFit: {},
    EndsWithAnOldPage: {},
}


def explore_all(mistake: type[Reading], budget: Mapping[str, int]) -> None:
    for script in SCRIPTS.values():
        explore(script, mistake, budget)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_found(mistake: type[Reading]) -> None:
    with pytest.raises(AssertionError):
        explore_all(mistake, MISTAKES[mistake])


def test_reading_the_log_before_the_state_is_found() -> None:
    with pytest.raises(AssertionError, match="it ends at"):
        explore(NO_MARK, log_first=True)


def test_a_clock_that_was_set_back_is_found() -> None:
    with pytest.raises(AssertionError, match="waits"):
        explore((Write(5, 1, 1), LOST, Write(3, 1, 1), Write(3, 2, 2)), IgnoresOlderEpochs)
