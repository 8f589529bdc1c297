"""Liveness: the lease of this process, and how waiters learn that the worker of their task is dead.

A worker is a process that runs tasks. Each worker has one lease on the server, even if it runs many tasks. A lease is a
sign of life that runs out. While a worker runs a task, the task's record on the server (its run) names the worker. A
beat is a call to the server that renews the lease. It also removes the leases that have run out, and publishes the
workers that held them. So living workers find dead workers. A process that only waits for results beats, too, without a
lease of its own. So the waiters also learn of the death of the last worker.

After an outage of the server, every worker seems dead until its next beat. So a process may remove the leases of other
workers only if its own beats have succeeded for the length of a whole lease without a gap. The server checks this
condition again: a frozen server may execute a beat late, and such a beat must not remove a lease. A waiter may find a
lease missing without news of a death. Then it looks again after the length of one more lease. It takes the worker for
dead only if its own beats have also succeeded. Only the server's clock measures leases.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol
from uuid import uuid4

from .exceptions import AioResultError, BackendConnectionError, WorkerLostError
from .retry import Backoff
from .run import WORKERS_TOPIC, RunOp, RunState, RunStep
from .tasks import EMPTY, StandingTask, copy_of_error
from .waiter import Outcome, Waiter

__all__ = ["Beats", "LifeStore", "Liveness", "Tell"]

logger: logging.Logger = logging.getLogger("aioresult")

#: A callback of a waiter. `Liveness` calls it with an error if the worker of the task is lost, or if the state of that
#: worker cannot be read.
Tell = Callable[[Exception], None]


class LifeStore(Protocol):
    """The attributes and methods of a backend that this module uses."""

    lease: float

    def watch_topic(self, topic: str, waiter: Waiter, read_first: bool = True) -> None: ...
    def unwatch(self, task_id: str, waiter: Waiter) -> None: ...
    async def beat(self, worker: str, lease: float, last: float | None = None, persist: bool = False) -> float: ...
    async def alive(self, workers: Sequence[str]) -> Sequence[bool]: ...
    async def run_steps(self, steps: Sequence[RunStep]) -> list[RunState | BaseException]: ...


class Beats:
    """Decides when this process may remove the leases of other workers.

    A beat is a call to the server that renews the lease of this process. ``lease`` is the length of a lease in seconds.
    All times are times of the server's clock, which each beat returns.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._since: float | None = None
        self._last: float | None = None

    @property
    def last(self) -> float | None:
        """The time of the last beat, if the beats have succeeded for the length of a lease without a gap.

        Otherwise ``None``; then this process must not remove the leases of other workers.
        """
        if self._since is None or self._last is None or self._last - self._since < self._lease:
            return None
        return self._last

    def went_through(self, now: float) -> float:
        """Record that a beat has succeeded at ``now``. Returns the seconds since the previous beat that succeeded."""
        gap = 0.0 if self._last is None else now - self._last
        if self._since is None or gap > self._lease / 2:
            self._since = now
        self._last = now
        return gap

    def failed(self) -> None:
        """Record that a beat has failed."""
        self._since = None


class Liveness:
    """Renews the lease of one open backend, and tells its waiters if the worker that runs their task has died."""

    def __init__(self, store: LifeStore) -> None:
        self._store = store
        #: The id under which this process is a worker. It is valid while the backend is open.
        self.worker: str = uuid4().hex
        self._works = False
        self._beats = Beats(store.lease)
        #: Set while this process must renew its lease or look for dead workers: while it is a worker or has waiters.
        self._needed = asyncio.Event()
        self._beating = StandingTask(self._beat_on, "aioresult-beat", self._needed.is_set)
        self._watched: dict[str, dict[Tell, None]] = {}
        #: The ids of the tasks whose workers must be checked.
        self._due: dict[str, None] = {}
        #: Set when an id is added to `_due`.
        self._check_due = asyncio.Event()
        self._checks = StandingTask(self._keep_checking, "aioresult-liveness", lambda: bool(self._watched))
        #: The ids of workers that were published as dead.
        self._gone: set[str] = set()
        #: True while this object is subscribed to the news of dead workers. If the hub delivers an error, the
        #: subscription has ended.
        self._listens = False
        #: Task id → ``(run, time)``, for each task whose worker has no lease. ``run`` is the id of the attempt.
        #: ``time`` is when the lease was first found missing, by the event loop's clock.
        self._suspects: dict[str, tuple[str, float]] = {}
        self._reminders: set[asyncio.TimerHandle] = set()

    # -- the worker's side ------------------------------------------------------------------------------------------

    async def work(self) -> None:
        """Get a lease for this process, which makes it a worker. Does nothing if the process has a lease already.

        Raises `BackendConnectionError` if the server cannot be reached.
        """
        if not self._works:
            self._beats.went_through(await self._store.beat(self.worker, self._store.lease, persist=True))
            self._works = True
            self._needed.set()
            self._beating.start()

    async def _beat_on(self) -> None:
        lease = self._store.lease
        # After an outage, every worker must renew its lease before any waiter has waited for the length of a lease.
        backoff = Backoff(min(0.05, lease / 12), min(2.0, lease / 6))
        while True:
            await self._needed.wait()
            try:
                now = await self._store.beat(self.worker if self._works else "", lease, self._beats.last)
            except BackendConnectionError:
                self._beats.failed()
                await asyncio.sleep(backoff.pause())
                continue
            except AioResultError as exc:
                self._beats.failed()
                logger.error("the lease of this worker could not be renewed, and is tried again: %s", exc)
                await asyncio.sleep(lease / 3)
                continue
            backoff.reset()
            if self._beats.went_through(now) > lease and self._works:
                logger.warning(
                    "the lease of this worker ran out: it was not renewed for more than lease=%g seconds, because the "
                    "server was away or the event loop was blocked. Waiters may have got WorkerLostError for its tasks",
                    lease,
                )
            await asyncio.sleep(lease / 3)

    async def close(self) -> None:
        """Stop the beats and the checks."""
        for reminder in self._reminders:
            reminder.cancel()
        await self._beating.stop()
        await self._checks.stop()

    @property
    def works(self) -> bool:
        """True if this process is a worker, and so has a lease."""
        return self._works

    # -- the waiter's side ------------------------------------------------------------------------------------------

    def watch(self, task_id: str, tell: Tell) -> None:
        """Call ``tell`` with an error if the worker that runs the task is lost, until `unwatch` is called."""
        self._watched.setdefault(task_id, {})[tell] = None
        self._check(task_id)
        if not self._listens:
            self._listens = True
            self._store.watch_topic(WORKERS_TOPIC, self, read_first=False)
            self._needed.set()
            self._beating.start()
            self._checks.start()

    def unwatch(self, task_id: str, tell: Tell) -> None:
        """Stop calling ``tell`` for this task. Does nothing if ``tell`` is not being called for it."""
        tells = self._watched.get(task_id)
        if tells is None or tell not in tells:
            return
        del tells[tell]
        if not tells:
            del self._watched[task_id]
            # If the task is watched again much later, the time in between must not count against its worker.
            self._suspects.pop(task_id, None)
            if not self._watched:
                if not self._works:
                    self._needed.clear()
                self._listens = False
                self._store.unwatch(WORKERS_TOPIC, self)
                self._gone.clear()

    def receive(self, topic: str, outcome: Outcome) -> None:
        """Take news of workers from the hub; this method makes the object a `aioresult.waiter.Waiter`."""
        if isinstance(outcome, Exception):
            self._listens = False  # the next watcher subscribes again
            for task_id in tuple(self._watched):
                self._notify(task_id, outcome)
            return
        if outcome.result is None:  # the subscription has just begun, so earlier messages were missed
            self._suspects.clear()
        else:
            self._gone.add(outcome.result)
        self._check(*self._watched)

    def _check(self, *task_ids: str) -> None:
        self._due.update(dict.fromkeys(task_ids))
        self._check_due.set()

    async def _keep_checking(self) -> None:
        backoff = Backoff()
        self._check(*self._watched)
        while True:
            await self._check_due.wait()
            self._check_due.clear()
            due = [task_id for task_id in self._due if task_id in self._watched]
            self._due.clear()
            try:
                if due:
                    await self._examine(due)
                backoff.reset()
            except BackendConnectionError:
                self._suspects.clear()
                self._check(*due)
                await asyncio.sleep(backoff.pause())
            except AioResultError as exc:
                for task_id in due:
                    self._notify(task_id, exc)

    async def _examine(self, task_ids: Sequence[str]) -> None:
        """Check the workers of these tasks. If a worker is lost, notify the watchers of its task.

        If that is not certain yet, check the task again later.
        """
        gone = set(self._gone)
        states = await self._store.run_steps([RunStep(RunOp.READ, task_id) for task_id in task_ids])
        runs: dict[str, RunState] = {}
        for task_id, state in zip(task_ids, states, strict=True):
            if isinstance(state, BackendConnectionError):
                raise state
            if not isinstance(state, RunState) or self._suspects.get(task_id, (state.run,))[0] != state.run:
                self._suspects.pop(task_id, None)  # the suspicion concerned an earlier attempt of the task
            if isinstance(state, Exception):
                self._notify(task_id, state)
            elif isinstance(state, RunState) and state.worker:
                runs[task_id] = state
        workers = sorted({state.worker for state in runs.values()})
        lives = dict(zip(workers, await self._store.alive(workers) if workers else (), strict=True))
        self._gone -= gone
        now, lease = asyncio.get_running_loop().time(), self._store.lease
        for task_id, state in runs.items():
            if task_id not in self._watched:  # the watchers of the task have left in the meantime
                continue
            if lives[state.worker]:
                self._suspects.pop(task_id, None)
                continue
            waited = now - self._suspects.setdefault(task_id, (state.run, now))[1]
            if state.worker in gone or (waited >= lease and self._beats.last is not None):
                self._notify(task_id, WorkerLostError(_LOST.format(task_id)))
            else:  # if the beats of this process had a gap, the worker's beats may have had a gap, too
                self._remind(task_id, max(lease - waited, lease / 3))

    def _remind(self, task_id: str, seconds: float) -> None:
        def remember() -> None:
            self._reminders.discard(reminder)
            self._check(task_id)

        reminder = asyncio.get_running_loop().call_later(seconds + 0.01, remember, context=EMPTY.context)
        self._reminders.add(reminder)

    def _notify(self, task_id: str, error: Exception) -> None:
        for tell in tuple(self._watched.get(task_id, ())):
            tell(copy_of_error(error))


_LOST = (
    "the worker that ran task {} has not been heard of for its whole lease. The queue may run the task again; "
    "await the result again to wait for that"
)
