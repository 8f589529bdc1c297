"""A warning for waits that may never end: for a minute, nothing has been stored under the id."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from .meta import TaskMeta
from .tasks import EMPTY, SLICE, chunked

__all__ = ["Unheard"]

logger: logging.Logger = logging.getLogger("aioresult")

#: At so many looks in a row nothing must be stored. The first look comes after a quarter of the time at most, and each
#: further one after another quarter.
_LOOKS = 5
#: How many ids the warning names.
_NAMED = 5


class _Topic(Protocol):
    """What this needs of an id that is waited for in the hub."""

    known: TaskMeta | Exception | None
    looks: int

    def waiters(self) -> Iterable[object]: ...


class Unheard:
    """Looks at the ids in ``topics`` now and then, and warns once of each under which nothing is stored for `after`.

    One timer serves all ids, and it runs only while there are any. A look asks the server nothing: it goes by what the
    last read has found and by the messages since. So it is done by the hub's own task, between the calls to the server.
    At such a moment an id that is in none of the ``queues`` has been read; during an outage all ids are in a queue, and
    no look counts. ``wake()`` has the hub call `look` soon.

    An id counts as waited for as long as it has a waiter. Waits that follow each other without a pause are one.
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
        #: In seconds. The warning may come up to a quarter later.
        self.after: float = 60.0
        #: Whether the hub is to call `look`.
        self.due: bool = False
        self.timer: asyncio.TimerHandle | None = None

    def set_timer(self) -> None:
        """Begin to look. The hub calls this when an id is waited for and `timer` is ``None``."""
        pause = self.after / (_LOOKS - 1)
        self.timer = asyncio.get_running_loop().call_later(pause, self._ring, context=EMPTY)

    def _ring(self) -> None:
        self.timer = None
        if self._topics:
            self.due = True
            self._wake()
            self.set_timer()

    async def look(self) -> None:
        """Look at every id, a few hundred at a time, and log one warning for all that are due."""
        self.due = False
        overdue: list[str] = []
        for ids in chunked(self._topics, SLICE):
            overdue += [task_id for task_id in ids if self._is_overdue(task_id)]
            await asyncio.sleep(0)
        overdue = [task_id for task_id in overdue if task_id in self._topics]
        if overdue:
            self._warn(overdue)

    def _is_overdue(self, task_id: str) -> bool:
        topic = self._topics.get(task_id)
        # What is waited for and is no task begins with NUL.
        if topic is None or topic.looks >= _LOOKS or topic.known is not None or task_id[0] == "\x00":
            return False
        for queue in self._queues:
            if task_id in queue:
                return False
        topic.looks += 1
        # Not if every waiter expects that nothing is stored yet.
        return topic.looks == _LOOKS and not all(
            getattr(waiter, "expects_nothing", False) for waiter in topic.waiters()
        )

    def _warn(self, task_ids: Sequence[str]) -> None:
        more = len(task_ids) - _NAMED
        logger.warning(
            "after %g seconds of waiting, nothing is stored in %s under the id of %s %s%s. The task may still be "
            "queued, or its worker stores nothing before the end (Celery without task_track_started). Otherwise the "
            "wait never ends: check that the task was submitted; that a worker serves its queue; that the task has no "
            "ignore_result and was not run eagerly (task_always_eager); and that the worker stores its results in "
            "this database, with the same global_keyprefix or table",
            self.after,
            self._where,
            "task" if len(task_ids) == 1 else "tasks",
            ", ".join(task_ids[:_NAMED]),
            f" and {more:,} more" if more > 0 else "",
        )

    def close(self) -> None:
        """Look no more."""
        if self.timer is not None:
            self.timer.cancel()
