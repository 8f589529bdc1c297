"""Warns of waits that may never end, because no worker has stored anything under the id for a minute."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from .meta import TaskMeta
from .states import PENDING
from .tasks import CALLBACKS_PER_TURN, EMPTY, chunked

__all__ = ["Unheard"]

logger: logging.Logger = logging.getLogger("aioresult")

#: The warning comes after so many looks that found nothing stored. The first look comes within a quarter of
#: `Unheard.after` seconds, and each further look after another quarter.
_LOOKS = 5
#: How many ids the warning names.
_NAMED = 5


class _Topic(Protocol):
    """What this module needs of a topic, which is an id that has waiters in the hub."""

    known: TaskMeta | Exception | None
    looks: int

    def waiters(self) -> Iterable[object]: ...


class Unheard:
    """Looks at the ids in ``topics`` at intervals, and warns one time of each id that stays empty for `after` seconds.

    An id is empty if no worker has stored anything under it: nothing is stored, or PENDING from its submission. One
    timer serves all ids, and runs only while there are ids. A look does not ask the server: it uses the last read of
    each id, and the messages since. The hub's own asyncio task looks, between its calls to the server. At that moment,
    the hub has read each id that is in none of the ``queues``. During an outage all ids are in a queue, so no look
    counts. ``wake()`` makes the hub call `look` soon.

    The time counts while the id has a waiter. If one wait follows another without a pause, they count as one wait.
    """

    def __init__(
        self,
        topics: Mapping[str, _Topic],
        queues: Sequence[Mapping[str, None]],
        wake: Callable[[], None],
        where: str,
    ) -> None:
        self._topics = topics
        self._queues = queues
        self._wake = wake
        self._where = where
        #: Seconds until the warning. The warning may come later, by up to a quarter of this time.
        self.after: float = 60.0
        #: True if the hub should call `look`.
        self.due: bool = False
        self.timer: asyncio.TimerHandle | None = None

    def set_timer(self) -> None:
        """Start the timer. The hub calls this when an id has a waiter and `timer` is ``None``."""
        pause = self.after / (_LOOKS - 1)
        self.timer = asyncio.get_running_loop().call_later(pause, self._ring, context=EMPTY.context)

    def _ring(self) -> None:
        self.timer = None
        if self._topics:
            self.due = True
            self._wake()
            self.set_timer()

    async def look(self) -> None:
        """Look at every id, a few hundred at a time, and log one warning for all that are empty for long enough."""
        self.due = False
        overdue: list[str] = []
        for ids in chunked(self._topics, CALLBACKS_PER_TURN):
            overdue += [task_id for task_id in ids if self._is_overdue(task_id)]
            await asyncio.sleep(0)
        overdue = [task_id for task_id in overdue if task_id in self._topics]
        if overdue:
            self._warn(overdue)

    def _is_overdue(self, task_id: str) -> bool:
        topic = self._topics.get(task_id)
        # A topic that is not the id of a task begins with NUL.
        if topic is None or topic.looks >= _LOOKS or task_id[0] == "\x00":
            return False
        # PENDING says only that the task was submitted: no worker has stored anything.
        if topic.known is not None and not (isinstance(topic.known, TaskMeta) and topic.known.status == PENDING):
            return False
        for queue in self._queues:
            if task_id in queue:
                return False
        topic.looks += 1
        # No warning if every waiter expects that nothing is stored yet. The attribute is read from the class of a
        # waiter, which may be the caller's own object: if its `__getattr__` raised, every wait of this hub would end.
        return topic.looks == _LOOKS and not all(
            getattr(type(waiter), "expects_nothing", False) for waiter in topic.waiters()
        )

    def _warn(self, task_ids: Sequence[str]) -> None:
        more = len(task_ids) - _NAMED
        logger.warning(
            "after %g seconds of waiting, no worker has stored anything in %s under the id of %s %s%s. The task may "
            "still be queued, or its worker stores nothing before the end (Celery without task_track_started). "
            "Otherwise the wait never ends: check that the task was submitted; that a worker serves its queue; that "
            "the task has no ignore_result and was not run eagerly (task_always_eager); and that the worker stores "
            "its results in this database, with the same global_keyprefix or table",
            self.after,
            self._where,
            "task" if len(task_ids) == 1 else "tasks",
            ", ".join(task_ids[:_NAMED]),
            f" and {more:,} more" if more > 0 else "",
        )

    def close(self) -> None:
        """Stop the timer."""
        if self.timer is not None:
            self.timer.cancel()
