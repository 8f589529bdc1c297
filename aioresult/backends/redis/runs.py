"""Running tasks on Redis: the log of a task's output is a stream, the note of its run a hash, the leases a sorted set.

All keys of one task are in one slot (`sibling`). A flush is a transaction instead of a script, which costs the server a
third less. It needs no script because a stream itself refuses an entry whose id is not greater than its last id.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, TypeVar

import hiredis

from ...exceptions import BackendError, BackendGetMetaError, BackendStoreError, DecodeError, SerializationError
from ...log import START, Entry, Flush, Page, PageRequest, Place
from ...run import RunOp, RunState, RunStep, Verdict
from ...serialization import FINAL_HEADS
from ...states import READY_STATES
from ..keyvalue import KeyValueStoreBackend, Write, output_message, sibling
from ..runs import superseded
from .connection import WAITERS_FIRST, Command, code_of
from .groups import extend_command, milliseconds
from .scripts import Scripts

__all__ = ["NOT_TOLD", "RunningTasks", "flush_commands", "last_of", "top_of"]

T = TypeVar("T")

#: The error code that our Lua scripts return if the Redis user has no right to publish.
NOT_TOLD = "AIORESULT"

#: The greatest value of each half of a stream id: a half has 64 bits.
_GREATEST = 2**64 - 1
#: The JSON of every meta begins with this text.
_HEAD = b'{"status": "'
#: So many first bytes of that JSON suffice to tell a final state.
_HEAD_BYTES = len(FINAL_HEADS[0])
_BEGIN: Command = ("MULTI",)


class RunningTasks(KeyValueStoreBackend):
    """The part of `RedisBackend` that keeps running tasks."""

    _scripts: Scripts

    @abstractmethod
    async def _execute(self, commands: Sequence[Command]) -> list[Any]:
        """Send the commands, and return the reply to each.

        Raises if any reply says that the server is not ready. Then the caller must repeat all of the commands.
        """

    @abstractmethod
    def _command(self, write: Write, digest: str = "") -> Command:
        """Return the command that does ``write``."""

    @abstractmethod
    def _raise_if_not_ready(self, reply: hiredis.ReplyError) -> None:
        """Raise if ``reply``, which was inside another reply, says that the server is not ready."""

    @abstractmethod
    def _refusal(self, reply: hiredis.ReplyError, kind: type[BackendError], what: str) -> BackendError:
        """Return the error for one operation that the server refuses. ``what`` names the operation."""

    @abstractmethod
    def _at_once(
        self,
        key: str,
        commands: Sequence[Command],
        outcome: Callable[[list[Any]], T | None],
        done: Callable[[T | BaseException | None], None],
    ) -> bool:
        """Send the commands, which are about ``key``, before this method returns, and return true.

        Return false if no connection can take them.

        If it returns true, it calls ``done`` later with the outcome of the replies, or with the
        error of the connection. If it returns false, nothing was sent.
        """

    # -- the log ----------------------------------------------------------------------------------------------------

    def _append_at_once(self, flush: Flush, done: Callable[[int | BaseException | None], None]) -> bool:
        if not flush.epoch or not (flush.data or flush.state):
            return False

        def outcome(replies: list[Any]) -> int | None:
            executed = replies[-1]
            taken = isinstance(executed, list) and not isinstance(executed[0], hiredis.ReplyError)
            return flush.epoch if taken else None

        key = self._task_key(flush.task_id)
        return self._at_once(key, [WAITERS_FIRST, *flush_commands(self._scripts, key, flush)], outcome, done)

    async def _append(self, flushes: Sequence[Flush]) -> list[int | BaseException]:
        parts = [flush_commands(self._scripts, self._task_key(flush.task_id), flush) for flush in flushes]
        replies = iter((await self._execute([WAITERS_FIRST, *(command for part in parts for command in part)]))[1:])
        outcomes: list[int | BaseException] = []
        doubtful: list[int] = []
        for flush, part in zip(flushes, parts, strict=True):
            *queued, reply = islice(replies, len(part))
            if part[0] == _BEGIN and not isinstance(reply, hiredis.ReplyError):
                if isinstance(reply := reply[0], hiredis.ReplyError):
                    doubtful.append(len(outcomes))
                else:
                    reply = flush.epoch
            elif part[0] == _BEGIN:
                reply = self._why_aborted(part, queued, reply)
            outcomes.append(self._appended(flush, reply))
        if doubtful:
            # Redis refused the entry as a repetition, or because of a newer epoch. The end of the log tells which.
            keys = [sibling(self._task_key(flushes[index].task_id), ".out") for index in doubtful]
            ends = await self._execute([last_of(key) for key in keys])
            for index, end in zip(doubtful, ends, strict=True):
                flush = flushes[index]
                if isinstance(end, list) and (flush.epoch, flush.last) <= top_of(end):
                    outcomes[index] = self._appended(flush, end)
        return outcomes

    def _why_aborted(
        self, part: Sequence[Command], queued: Sequence[Any], reply: hiredis.ReplyError
    ) -> hiredis.ReplyError:
        """Return the error because of which the server did not execute a transaction."""
        for command, earlier in zip(part, queued, strict=False):
            if isinstance(earlier, hiredis.ReplyError):
                told = command[0] != self._scripts.tell or code_of(earlier) != "NOPERM"
                return earlier if told else hiredis.ReplyError(f"{NOT_TOLD} {earlier}")
        reason = hiredis.ReplyError(str(reply).partition("because of: ")[2] or str(reply))
        self._raise_if_not_ready(reason)
        return reason

    def _appended(self, flush: Flush, reply: Any) -> int | BaseException:
        """Return the outcome. ``reply`` is the epoch, 0 if another run has the output, or the log's last entry."""
        if isinstance(reply, hiredis.ReplyError):
            return self._refusal(reply, BackendStoreError, f"append to the output of task {flush.task_id}")
        if isinstance(reply, int):
            return reply or superseded(flush.task_id)
        return superseded(flush.task_id) if top_of(reply).epoch > flush.epoch else flush.epoch

    async def _pages(self, requests: Sequence[PageRequest]) -> list[Page | BaseException]:
        # Unless this backend writes plain JSON, the first bytes of a result do not tell its state: read all of them.
        pages = await self._read_pages(requests, whole=not self.codec.plain)
        if doubtful := [index for index, page in enumerate(pages) if page is None]:
            for index, page in zip(
                doubtful, await self._read_pages([requests[i] for i in doubtful], whole=True), strict=True
            ):
                pages[index] = page
        found = [page for page in pages if page is not None]
        # If no entry comes after a place, the reader needs the end of the log: the place may no longer be in it.
        beyond = [
            (index, request, page)
            for index, (request, page) in enumerate(zip(requests, found, strict=True))
            if isinstance(page, Page) and not page.entries and request.after is not None and request.after.epoch
        ]
        if beyond:
            keys = [sibling(self._task_key(request.task_id), ".out") for _, request, _ in beyond]
            ends = await self._execute([last_of(key) for key in keys])
            for (index, request, page), reply in zip(beyond, ends, strict=True):
                if isinstance(reply, hiredis.ReplyError):
                    found[index] = self._not_read(request, reply)
                else:  # there is more if an entry came after the first look
                    top = top_of(reply)
                    found[index] = page._replace(top=top, more=request.after is not None and top > request.after)
        return found

    async def _read_pages(self, requests: Sequence[PageRequest], whole: bool) -> list[Page | BaseException | None]:
        """Return a page for each request. A page without entries lacks the end of the log.

        A page is ``None`` if the first bytes of the result do not tell the task's state, and ``whole`` is false.
        """
        commands: list[Command] = []
        for request in requests:
            key = self._task_key(request.task_id)
            # Read the state first. Otherwise a last chunk and a final state that come between the two reads would end
            # the output without that chunk.
            commands.append(("GET", key) if whole else ("GETRANGE", key, 0, _HEAD_BYTES - 1))
            commands.append(_range(sibling(key, ".out"), request))
        replies = await self._execute(commands)
        return [
            self._page(request, self._is_final(state, whole), log)
            for request, state, log in zip(requests, replies[::2], replies[1::2], strict=True)
        ]

    def _page(
        self, request: PageRequest, final: bool | hiredis.ReplyError | None, log: Any
    ) -> Page | BaseException | None:
        for reply in (final, log):
            if isinstance(reply, hiredis.ReplyError):
                return self._not_read(request, reply)
        if final is None:
            return None
        try:
            entries = [_entry(request.task_id, *entry) for entry in log]
        except SerializationError as exc:
            return exc
        shown = tuple(entries[: request.limit])
        top = Place(entries[-1].epoch, entries[-1].last) if entries else START
        return Page(bool(final), shown, len(entries) > len(shown), top)

    def _not_read(self, request: PageRequest, reply: hiredis.ReplyError) -> BackendError:
        return self._refusal(reply, BackendGetMetaError, f"read the output of task {request.task_id}")

    def _is_final(self, stored: Any, whole: bool) -> bool | hiredis.ReplyError | None:
        """True if the task is over; ``None`` if ``stored`` is not the ``whole`` value and does not tell."""
        if isinstance(stored, hiredis.ReplyError):
            return stored
        if not stored:
            return False
        if not whole:
            return stored in FINAL_HEADS if stored.startswith(_HEAD) else None
        try:
            return self.codec.is_final(stored)
        except SerializationError:  # it counts as final, so that its readers learn why it cannot be decoded
            return True

    # -- runs -------------------------------------------------------------------------------------------------------

    async def _run_steps(self, steps: Sequence[RunStep]) -> list[RunState | BaseException]:
        outcomes: dict[int, RunState | BaseException] = {}
        left = list(range(len(steps)))
        while left:  # one round, unless a task has two steps: a step may need several calls, and they keep their order
            first = {steps[index].task_id: index for index in reversed(left)}
            due = sorted(first.values())
            left = [index for index in left if first[steps[index].task_id] != index]
            outcomes.update(zip(due, await self._distinct_steps([steps[index] for index in due]), strict=True))
        return [outcomes[index] for index in range(len(steps))]

    async def _distinct_steps(self, steps: Sequence[RunStep]) -> list[RunState | BaseException]:
        records = [step.record for step in steps if step.record is not None]
        groups = [] if self.groups_apart else map(self._command, self._extensions(records))
        commands = [self._step_command(step) for step in steps]
        _, *replies = await self._execute([WAITERS_FIRST, *commands, *groups])
        return [await self._stepped(step, reply) for step, reply in zip(steps, replies, strict=False)]

    def _step_command(self, step: RunStep, digest: str = "", status: str = "") -> Command:
        key, record = self._task_key(step.task_id), step.record
        epoch, last = ("", "") if step.output is None else (step.output.epoch, step.output.seq + 1)
        lives = "" if step.lives is None else milliseconds(step.lives)
        stored: Command = ("", 0, 0, "")
        if record is not None:
            stored = (record.payload, milliseconds(record.expires), int(record.custom), record.group_id or "")
        keys = (key, sibling(key, ".run"), sibling(key, ".out"))
        terms = (step.state, step.reason, int(step.skip_done), epoch, last, step.gone, self._worker_prefix)
        who = (step.op.value, step.run, step.worker, lives)
        return ("EVALSHA", self._scripts.run, len(keys), *keys, *who, *stored, *terms, digest, status)

    async def _stepped(self, step: RunStep, reply: Any) -> RunState | BaseException:
        try:
            while isinstance(reply, bytes):  # the reply is the stored value, because only the codec can read its state
                status = self.codec.status(reply)
                digest = hashlib.sha1(reply).hexdigest()  # noqa: S324 - Redis has only SHA-1; not used for security
                known = status if status in READY_STATES else ""
                (reply,) = await self._execute([self._step_command(step, digest, known or "")])
        except SerializationError as exc:
            return exc
        if isinstance(reply, hiredis.ReplyError):
            return self._refusal(reply, BackendStoreError, f"store the run of task {step.task_id}")
        verdict, run, worker, reason, group, expires = reply
        if group and step.op is not RunOp.REVOKE:  # the step stored the REVOKED of an earlier request to stop
            await self._keep_group_of(step.task_id, _text(group), int(expires) / 1000)
        return RunState(Verdict(_text(verdict)), _text(run), _text(worker), None if reason is None else _text(reason))

    async def _keep_group_of(self, task_id: str, group_id: str, expires: float) -> None:
        """Keep the group of a task whose REVOKED was stored, as long as that result."""
        await self._execute([extend_command(self._scripts, self._group_key(group_id), expires)])

    # -- workers ----------------------------------------------------------------------------------------------------

    async def _beat(self, worker: str, lease: float, last: float | None = None) -> float:
        before = "" if last is None else round(last * 1000)
        (reply,) = await self._execute(
            [("EVALSHA", self._scripts.beat, 1, self._workers_channel, worker, milliseconds(lease), before)]
        )
        if isinstance(reply, hiredis.ReplyError):
            raise self._refusal(reply, BackendStoreError, f"store that worker {worker or '(none)'} is alive")
        return float(reply) / 1000

    async def _alive(self, workers: Sequence[str]) -> list[bool]:
        if not workers:
            return []
        scores = [("ZSCORE", self._workers_channel, worker) for worker in workers]
        *leases, time = await self._execute([*scores, ("TIME",)])
        for reply in (*leases, time):
            if isinstance(reply, hiredis.ReplyError):
                raise self._refusal(reply, BackendGetMetaError, "read the leases of the workers")
        now = int(time[0]) * 1000 + int(time[1]) // 1000
        return [lease is not None and float(lease) > now for lease in leases]


def flush_commands(scripts: Scripts, key: str, flush: Flush) -> list[Command]:
    """Return the commands that write a flush to the log of the result ``key``. The last reply tells the outcome.

    A flush that opens the output is a script, and any other is a transaction. A flush without data only reads the end
    of the log.
    """
    out = sibling(key, ".out")
    ttl = None if flush.expires is None else milliseconds(flush.expires)
    if not flush.epoch:
        carried = output_message(0, flush.last, flush.data)[-1:] != b" "
        terms = (flush.last, flush.data, flush.state, int(carried), "" if ttl is None else ttl, flush.run)
        return [("EVALSHA", scripts.open, 3, key, sibling(key, ".run"), out, flush.writer, *terms)]
    keep: list[Command] = [] if ttl is None else [("PEXPIRE", out, ttl) if ttl else ("PERSIST", out)]
    if not (flush.data or flush.state):
        return [*keep, last_of(out)]
    trim = ("MINID", "~", f"{flush.epoch}-{flush.keep_from}") if flush.keep_from else ()
    fields = (*(("d", flush.data) if flush.data else ()), *(("e", flush.state) if flush.state else ()))
    append: Command = ("XADD", out, *trim, f"{flush.epoch}-{flush.last}", *fields)
    tell: Command = (scripts.tell, out, output_message(flush.epoch, flush.last, flush.data))
    return [_BEGIN, append, tell, *keep, ("EXEC",)]


def last_of(out: str) -> Command:
    return "XREVRANGE", out, "+", "-", "COUNT", 1


def _range(out: str, request: PageRequest) -> Command:
    if request.after is None:
        return last_of(out)
    epoch, seq = request.after
    return "XRANGE", out, f"({min(epoch, _GREATEST - 1)}-{min(seq, _GREATEST)}", "+", "COUNT", request.limit + 1


def top_of(reply: Any) -> Place:
    """Return the end of a log, from the reply to the command of `last_of`."""
    if not reply:
        return START
    epoch, last = reply[0][0].split(b"-")
    return Place(int(epoch), int(last))


def _entry(task_id: str, place: bytes, fields: Sequence[bytes]) -> Entry:
    """Return an entry of the log. Raises `DecodeError` for an entry in a form that this library never writes."""
    given = dict(zip(fields[::2], fields[1::2], strict=True))
    try:
        epoch, last = map(int, place.split(b"-"))
        data, state = given.get(b"d", b""), given.get(b"e", b"").decode()
        if not (data or state):
            raise ValueError("it has neither chunks nor an end")
    except ValueError as exc:
        raise DecodeError(f"the output of task {task_id} cannot be read: entry {place!r}: {exc}") from exc
    return Entry(epoch, last, data, state)


def _text(reply: bytes) -> str:
    return reply.decode("utf-8", "surrogateescape")
