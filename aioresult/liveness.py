"""Liveness: the lease of this process, and how waiters learn that the worker of their task is dead.

A worker is a process that runs tasks. Each worker has one lease on the server, however many tasks it runs; the note of
a run names the worker. A beat renews the lease. It also removes the leases that have run out, and publishes the workers
that held them. So the workers that live find the dead ones. A process that only waits beats, too, without a lease of
its own. So the waiters also learn of the death of the last worker.

After an outage of the server every worker seems dead until its next beat. So a process removes the leases of others
only if its own beats have succeeded for a whole lease without a gap. The server checks that again, so that a beat that
a frozen server executes late removes no lease. A waiter may find a lease missing without news of a death. It then looks
again after one more lease, and takes the worker for dead only if its own beats have also succeeded. Leases are measured
by the server's clock alone.
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
from .tasks import EMPTY, StandingTask, twin
from .waiter import Outcome, Waiter

__all__ = ["Beats", "LifeStore", "Liveness", "Tell"]

logger: logging.Logger = logging.getLogger("aioresult")

#: Is called with an error when the worker of a task is lost, or when its state can no longer be found out.
Tell = Callable[[Exception], None]


class LifeStore(Protocol):
    """What liveness needs of a backend."""

    lease: float

    def watch_topic(self, topic: str, waiter: Waiter, read_first: bool = True) -> None: ...
    def unwatch(self, task_id: str, waiter: Waiter) -> None: ...
    async def beat(self, worker: str, lease: float, last: float | None = None, persist: bool = False) -> float: ...
    async def alive(self, workers: Sequence[str]) -> Sequence[bool]: ...
    async def run_steps(self, steps: Sequence[RunStep]) -> list[RunState | BaseException]: ...


class Beats:
    """Decides when this process may remove the leases of other workers.

    ``lease`` is in seconds. All times are of the server's clock, which each beat returns.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._since: float | None = None
        self._last: float | None = None

    @property
    def last(self) -> float | None:
        """The time of the last beat if the beats have succeeded for a whole lease without a gap; otherwise ``None``."""
        if self._since is None or self._last is None or self._last - self._since < self._lease:
            return None
        return self._last

    def went_through(self, now: float) -> float:
        """Note that a beat has succeeded at ``now``. Returns the seconds since the previous beat."""
        gap = 0.0 if self._last is None else now - self._last
        if self._since is None or gap > self._lease / 2:
            self._since = now
        self._last = now
        return gap

    def failed(self) -> None:
        """Note that a beat has failed."""
        self._since = None


class Liveness:
    """The lease of one open backend, and the tasks whose workers it watches for its waiters."""

    def __init__(self, store: LifeStore) -> None:
        self._store = store
        #: The id of this process as a worker, for as long as its backend is open.
        self.worker: str = uuid4().hex
        self._works = False
        self._beats = Beats(store.lease)
        #: Set while this process must beat: while it is a worker or has waiters.
        self._needed = asyncio.Event()
        self._beating = StandingTask(self._beat_on, "aioresult-beat", self._needed.is_set)
        self._watched: dict[str, dict[Tell, None]] = {}
        #: The tasks to check, and whether there are any.
        self._due: dict[str, None] = {}
        self._check_due = asyncio.Event()
        self._checks = StandingTask(self._keep_checking, "aioresult-liveness", lambda: bool(self._watched))
        #: The workers that were published as dead.
        self._gone: set[str] = set()
        #: Whether this is subscribed to the news of workers. The hub ends the subscription by delivering an error.
        self._listens = False
        #: For each task whose worker has no lease: its run, and since when, by the event loop's clock.
        self._suspects: dict[str, tuple[str, float]] = {}
        self._reminders: set[asyncio.TimerHandle] = set()

    # -- the worker's side ------------------------------------------------------------------------------------------

    async def work(self) -> None:
        """Get a lease for this process, unless it has one.

        Raises `BackendConnectionError` if the server cannot be reached.
        """
        if not self._works:
            self._beats.went_through(await self._store.beat(self.worker, self._store.lease, persist=True))
            self._works = True
            self._needed.set()
            self._beating.start()

    async def _beat_on(self) -> None:
        lease = self._store.lease
        # After an outage every worker must beat again before any waiter has waited for a whole lease.
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
        """Whether this process is a worker, with a lease."""
        return self._works

    # -- the waiter's side ------------------------------------------------------------------------------------------

    def watch(self, task_id: str, tell: Tell) -> None:
        """Have ``tell`` called when the worker that runs the task is lost. Call `unwatch` to end that."""
        self._watched.setdefault(task_id, {})[tell] = None
        self._check(task_id)
        if not self._listens:
            self._listens = True
            self._store.watch_topic(WORKERS_TOPIC, self, read_first=False)
            self._needed.set()
            self._beating.start()
            self._checks.start()

    def unwatch(self, task_id: str, tell: Tell) -> None:
        """End what `watch` began. Does nothing if it has ended already."""
        tells = self._watched.get(task_id)
        if tells is None or tell not in tells:
            return
        del tells[tell]
        if not tells:
            del self._watched[task_id]
            # Otherwise, if the task is watched again much later, the time in between would count against its worker.
            self._suspects.pop(task_id, None)
            if not self._watched:
                if not self._works:
                    self._needed.clear()
                self._listens = False
                self._store.unwatch(WORKERS_TOPIC, self)
                self._gone.clear()

    def receive(self, topic: str, outcome: Outcome) -> None:
        """Take news of the workers from the hub (`aioresult.waiter.Waiter`)."""
        if isinstance(outcome, Exception):
            self._listens = False  # the next watcher subscribes again
            for task_id in tuple(self._watched):
                self._notify(task_id, outcome)
            return
        if outcome.result is None:  # the subscription has begun: messages published before it are missed
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
        """Notify the watchers of each of these tasks whose worker is lost, and check doubtful workers again later."""
        gone = set(self._gone)
        states = await self._store.run_steps([RunStep(RunOp.READ, task_id) for task_id in task_ids])
        runs: dict[str, RunState] = {}
        for task_id, state in zip(task_ids, states, strict=True):
            if isinstance(state, BackendConnectionError):
                raise state
            if not isinstance(state, RunState) or self._suspects.get(task_id, (state.run,))[0] != state.run:
                self._suspects.pop(task_id, None)  # the suspicion concerned another run
            if isinstance(state, Exception):
                self._notify(task_id, state)
            elif isinstance(state, RunState) and state.worker:
                runs[task_id] = state
        workers = sorted({state.worker for state in runs.values()})
        lives = dict(zip(workers, await self._store.alive(workers) if workers else (), strict=True))
        self._gone -= gone
        now, lease = asyncio.get_running_loop().time(), self._store.lease
        for task_id, state in runs.items():
            if task_id not in self._watched:  # its watchers have left meanwhile
                continue
            if lives[state.worker]:
                self._suspects.pop(task_id, None)
                continue
            waited = now - self._suspects.setdefault(task_id, (state.run, now))[1]
            if state.worker in gone or (waited >= lease and self._beats.last is not None):
                self._notify(task_id, WorkerLostError(_LOST.format(task_id)))
            else:  # if the beats of this process had a gap, the worker's beats may have had one, too
                self._remind(task_id, max(lease - waited, lease / 3))

    def _remind(self, task_id: str, seconds: float) -> None:
        def remember() -> None:
            self._reminders.discard(reminder)
            self._check(task_id)

        reminder = asyncio.get_running_loop().call_later(seconds + 0.01, remember, context=EMPTY.context)
        self._reminders.add(reminder)

    def _notify(self, task_id: str, error: Exception) -> None:
        for tell in tuple(self._watched.get(task_id, ())):
            tell(twin(error))


_LOST = (
    "the worker that ran task {} has not been heard of for its whole lease. The queue may run the task again; "
    "await the result again to wait for that"
)
