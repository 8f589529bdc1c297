"""The backend for a Redis master that sentinels watch and replace."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, Unpack

import hiredis
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection

from ...exceptions import (
    AioResultError,
    BackendConnectionError,
    BackendError,
    BackendRefusedError,
    ImproperlyConfigured,
)
from ...retry import Backoff
from ...tasks import SingleFlight, StandingTask, cancel_all, copy_of_error, spawn
from ..base import BackendOptions
from .backend import RedisBackend
from .connection import RedisConnection, translate
from .listener import RedisListener, ignore
from .node import Node, NodeEvents
from .places import Address, SentinelPlace, checked_remap, checked_sentinels, place_url, sentinel_place
from .scripts import Scripts
from .topology import Single

__all__ = ["Sentinel", "SentinelBackend"]

logger: logging.Logger = logging.getLogger("aioresult")

#: Seconds that a sentinel has to answer.
_TELL: Final = 3.0
#: Seconds between two rounds of questions to the sentinels, while the master they name cannot be used.
_PAUSE: Final = 0.1
#: The channel on which sentinels announce a new master: "<name> <old host> <old port> <new host> <new port>". See
#: https://redis.io/docs/latest/operate/oss_and_stack/management/sentinel/#pubsub-messages
_SWITCH: Final = "+switch-master"

#: The remedy if a sentinel refuses a connection.
_OF_THEIR_OWN: Final = (
    "the user, the password and the certificates for the sentinels are those in sentinel_kwargs={'password': …}, or in "
    "the URL: ?sentinel_password=…"
)


class _Answer(NamedTuple):
    """What a sentinel knows of the master."""

    address: Address
    #: The number of the configuration. Each failover raises it.
    epoch: int


class Sentinel(Single):
    """One master has every key. Sentinels know its address, and announce when another server takes its place.

    The sentinels are asked before each connection is made, and the server must say that it is the master: a sentinel
    that was cut off may name an old one. One connection to a sentinel waits for the announcement. If the master does
    not answer for half a heartbeat, the sentinels are asked, too.

    As soon as another server is the master, the connections to the old one are dropped: a frozen master would keep them
    open, and lose later what it is sent now. Attempts to connect to the old one end, too. The next attempt goes to the
    new master without asking again, because other sentinels may still name the old one for a moment.
    """

    def __init__(
        self,
        place: SentinelPlace,
        where: str,
        remap: Callable[[Address], Address],
        min_other_sentinels: int,
        heartbeat: float,
        scripts: Scripts,
        events: NodeEvents,
        on_switch: Callable[[], None],
    ) -> None:
        self._on_switch = on_switch
        self._place = place
        self._remap = remap
        self._min_others = min_other_sentinels
        self._heartbeat = heartbeat
        #: The address of the master, as it was learned last, and the epoch in which a sentinel named it. There are no
        #: connections to another server.
        self._address: Address | None = None
        self._epoch = 0
        #: An address that need not be asked for: it was learned after the sentinels were asked last.
        self._news: Address | None = None
        #: Servers that a sentinel has named, and that were no masters, since a connection was made last.
        self._wrong: set[Address] = set()
        #: True if the last attempt to connect has failed. Then all sentinels are asked, and not only the fastest.
        self._failed = False
        self._asked_at = 0.0
        self._find: SingleFlight[_Answer] = SingleFlight(self._find_master)
        super().__init__(
            Node(where, self._new_link, heartbeat, scripts, events._replace(on_doubt=self._doubted), self._greet)
        )
        self._watch: RedisListener | None = None
        # If code outside the library cancels these two, the next doubt or subscription starts them again, and no timer:
        # the loop may be about to end.
        self._watcher = StandingTask(self._keep_watching, "aioresult-sentinel", lambda: False)
        self._doubt = asyncio.Event()
        self._checker = StandingTask(self._keep_checking, "aioresult-sentinel-check", lambda: False)
        self._is_open = False

    async def open(self) -> None:
        try:
            await self.node.connect()
        except BackendConnectionError:
            if not self._wrong:
                raise
            await self.node.connect()  # a sentinel has named another server than the master: now all are asked
        self._doubt.clear()
        self._is_open = True
        self._keep_up()

    async def close(self) -> None:
        await self._watcher.stop()
        await self._checker.stop()
        await super().close()
        await self._find.stop()

    def abandon(self) -> None:
        if self._watch is not None:
            self._watch.abandon()
        super().abandon()

    # -- the master -------------------------------------------------------------------------------------------------

    async def _new_link(self) -> AbstractConnection:
        address = self._news
        if address is None:
            answer = await self._find()
            address = answer.address
            self._follow(address, answer.epoch)
        host, port = address
        return self._place.connection_class(**{**self._place.options, "host": host, "port": port})

    def _follow(self, address: Address, epoch: int) -> None:
        """Note that the server at ``address`` is the master, and leave any other server."""
        old, self._address, self._epoch = self._address, address, epoch
        if old is not None and address != old:
            reason = (
                f"the sentinels have replaced the master {self._place.master_name!r}, {place_url('redis', old)}, "
                f"by {place_url('redis', address)}"
            )
            logger.warning("%s; its connections are dropped", reason)
            self.node.drop(BackendConnectionError(reason))
            self._on_switch()

    async def _greet(self, link: AbstractConnection) -> None:
        """Raise unless the server is a master."""
        await link.send_command("ROLE")
        try:
            role = (await link.read_response())[0]
        except redis_errors.NoPermissionError:
            role = b"master"  # the server itself refuses what only a master may do
        if role not in (b"master", "master"):
            given: Any = link
            self._wrong.add((given.host, given.port))
            raise BackendConnectionError(
                f"{place_url('redis', (given.host, given.port))} is not the master {self._place.master_name!r}, "
                f"but a {_text(role)}"
            )
        self._wrong.clear()
        self._failed = False

    async def _find_master(self) -> _Answer:
        """Ask the sentinels for the master. Believe the newest configuration among the answers.

        The answers of more than half of the sentinels suffice, unless the last attempt to connect has failed.

        Raises `BackendConnectionError` if no sentinel answers, and `BackendRefusedError` if all of them refuse, or
        `ImproperlyConfigured` if ``address_remap`` fails.
        """
        now = asyncio.get_running_loop().time
        if self._failed:
            await asyncio.sleep(self._asked_at + _PAUSE - now())
        self._asked_at = now()
        asking = {spawn(self._ask(address)) for address in self._place.sentinels}
        enough = len(asking) if self._failed else len(asking) // 2 + 1
        answers: list[_Answer] = []
        failures: list[AioResultError] = []
        try:
            while asking and len(answers) < enough and (left := self._asked_at + _TELL - now()) > 0:
                done, asking = await asyncio.wait(asking, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    try:
                        answers.append(task.result())
                    except AioResultError as exc:
                        failures.append(exc)
        finally:
            await cancel_all(asking)
        if answers:
            votes = Counter(answer.address for answer in answers)
            # With equal epochs a sentinel that belongs to none of the others may have named a server of its own.
            return max(
                answers,
                key=lambda answer: (
                    answer.address not in self._wrong,
                    answer.epoch,
                    votes[answer.address],
                    answer.address == self._address,
                ),
            )
        refused = [error for error in failures if not isinstance(error, BackendConnectionError)]
        if len(refused) == len(self._place.sentinels):
            raise copy_of_error(refused[0])
        reasons = "; ".join(sorted({str(error) for error in failures})) or f"none answers within {_TELL:g} s"
        raise BackendConnectionError(f"no sentinel tells the address of master {self._place.master_name!r}: {reasons}")

    async def _ask(self, sentinel: Address) -> _Answer:
        where, name = self._shown(sentinel), self._place.master_name
        connection = RedisConnection(where, self._heartbeat)
        try:
            await self._connect(connection, sentinel)
            address, about = await connection.request(
                [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name), ("SENTINEL", "MASTER", name)]
            )
        finally:
            await connection.close()
        for reply in (address, about):
            if isinstance(reply, hiredis.ReplyError) and "No such master" not in str(reply):
                if "unknown command" in str(reply):
                    raise BackendRefusedError(f"{where} is no sentinel: {reply}; sentinels have port 26379 by default")
                raise translate(reply, where)
        if address is None or isinstance(about, hiredis.ReplyError):
            raise BackendRefusedError(f"{where} watches no master {name!r}; check master_name")
        try:
            fields = about if isinstance(about, dict) else dict(zip(about[::2], about[1::2], strict=True))
            epoch, others = int(fields[b"config-epoch"]), int(fields[b"num-other-sentinels"])
            host, port = address
            named = host.decode(), int(port)
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise BackendConnectionError(f"{where} does not answer as a sentinel does: {exc!r}") from exc
        if others < self._min_others:
            raise BackendConnectionError(
                f"{where} knows {others} other sentinels, and min_other_sentinels is {self._min_others}"
            )
        return _Answer(self._remap(named), epoch)

    async def _connect(self, connection: RedisConnection, sentinel: Address) -> None:
        host, port = sentinel
        link = self._place.sentinel_class(**{**self._place.sentinel_options, "host": host, "port": port})
        try:
            await connection.connect(link)
        except BackendRefusedError as exc:
            exc.args = (f"{exc}; {_OF_THEIR_OWN}",)
            raise

    def _shown(self, sentinel: Address) -> str:
        return place_url("sentinel", sentinel)

    # -- another master ---------------------------------------------------------------------------------------------

    def _keep_up(self) -> None:
        """Start the tasks of this object unless they run."""
        if self._is_open:
            self._watcher.start()
            self._checker.start()

    async def subscribe(self, channels: Sequence[str]) -> Mapping[str, BackendError] | None:
        self._keep_up()
        return await super().subscribe(channels)

    def _doubted(self, node: Node) -> None:
        self._failed = self._failed or node.failing
        self._news = None
        self._doubt.set()
        self._keep_up()

    async def _keep_checking(self) -> None:
        """Ask the sentinels for the master whenever the present one may be away, and for as long as it may be."""
        backoff = Backoff(0.1, 0.5)
        while True:
            await self._doubt.wait()
            self._doubt.clear()
            await self._check()
            if self.node.overdue:
                self._doubt.set()
            else:
                backoff.reset()
            await asyncio.sleep(backoff.pause())

    async def _check(self) -> None:
        """Leave the present master if the sentinels name another one in a newer configuration.

        A sentinel that was cut off has an older configuration. With the same configuration, another address is another
        name of the same server.
        """
        try:
            answer = await self._find()
        except AioResultError as exc:
            logger.debug("cannot find out whether %s has another master: %s", self.node.where, exc)
            return
        if answer.address == self._address:
            self._epoch = max(self._epoch, answer.epoch)
        elif answer.epoch > self._epoch:
            self._follow(answer.address, answer.epoch)
            self._news = answer.address

    async def _keep_watching(self) -> None:
        """Subscribe to the announcements of one sentinel after the other, as long as each answers."""
        backoff = Backoff()
        sentinels, failures = self._place.sentinels, 0
        turn = random.randrange(len(sentinels))  # noqa: S311 - spreads load
        now = asyncio.get_running_loop().time
        while True:
            began = now()
            try:
                await self._watch_one(sentinels[turn % len(sentinels)])
                failures = 0
            except AioResultError as exc:
                failures += 1
                if failures == len(sentinels):
                    logger.warning(
                        "no sentinel of %s can be watched (%s); it takes longer now to notice a new master",
                        self.node.where,
                        exc,
                    )
            turn += 1
            if now() - began > self._heartbeat:  # a connection that is lost at once must not be made at once again
                backoff.reset()
            await asyncio.sleep(backoff.pause())

    async def _watch_one(self, sentinel: Address) -> None:
        """Subscribe to the announcements of ``sentinel``, and return when the connection is lost.

        Raises `BackendConnectionError` or `BackendRefusedError` if that fails.
        """
        where = self._shown(sentinel)
        lost = asyncio.Event()
        watch = RedisListener(where, self._heartbeat, self._announced, ignore, partial(_set, lost))
        try:
            async with asyncio.timeout(_TELL):
                await self._connect(watch, sentinel)
                errors, missing = await watch.subscribe([("SUBSCRIBE", _SWITCH)])
            if missing:
                ended = BackendConnectionError(f"{where} has ended a subscription")
                raise translate(errors[0], where) if errors else ended
            self._watch = watch
            self._doubt.set()  # an announcement may have been missed
            await lost.wait()
        except TimeoutError as exc:
            raise BackendConnectionError(f"{where} has not answered for {_TELL:g} s") from exc
        finally:
            self._watch = None
            await watch.close()

    def _announced(self, channel: bytes, value: bytes) -> None:
        name, *words = value.decode("utf-8", "replace").rsplit(" ", 4)
        if name != self._place.master_name:
            return
        old_host, old_port, host, port = words
        try:
            old, new = self._remap((old_host, int(old_port))), self._remap((host, int(port)))
        except ImproperlyConfigured as exc:
            logger.warning("cannot follow the sentinels of %s to another master: %s", self.node.where, exc)
            return
        if old == self._address:
            self._follow(new, self._epoch)
            self._news = new
        else:  # the sentinel is late, or knows the server by another name
            self._doubt.set()


def _text(word: bytes | str) -> str:
    return word.decode("utf-8", "replace") if isinstance(word, bytes) else word


def _set(event: asyncio.Event, _: object) -> None:
    event.set()


class SentinelBackend(RedisBackend):
    """Keeps results in a Redis master of version 6.2 or later, or of Valkey, whose address sentinels know.

    The URL is ``redis+sentinel://[user:password@]host1[:26379][,host2…]/service[/database]``, and
    ``rediss+sentinel://`` for TLS. The hosts are sentinels, and the credentials are those of the master;
    ``?sentinel_username=…&sentinel_password=…`` are those of the sentinels. Or write the URL as Celery does:
    ``sentinel://[user:password@]host1:26379/database;sentinel://host2:26379``, with the option ``master_name``.

    Further options beside those of `RedisBackend`; the first three are Celery's transport options:

    - ``master_name``: the name by which the sentinels know the master.
    - ``sentinel_kwargs``: arguments for the connections to the sentinels, such as ``password`` and ``ssl``.
    - ``min_other_sentinels``: an answer counts only if the sentinel knows at least so many others.
    - ``address_remap``: a function, or a mapping, that replaces the address ``(host, port)`` that sentinels name with
      the address to connect to.
    """

    def __init__(
        self,
        url: str = "sentinel://",
        *,
        master_name: str | None = None,
        sentinel_kwargs: Mapping[str, Any] | None = None,
        min_other_sentinels: int = 0,
        address_remap: Mapping[Any, Any] | Callable[[tuple[str, int]], tuple[str, int]] | None = None,
        global_keyprefix: str = "",
        connect_options: Mapping[str, Any] | None = None,
        chord_ordered: bool = True,
        **options: Unpack[BackendOptions],
    ) -> None:
        self._master = (master_name, sentinel_kwargs)
        self._min_others = checked_sentinels(min_other_sentinels)
        self._remap = checked_remap(address_remap)
        super().__init__(
            url,
            global_keyprefix=global_keyprefix,
            connect_options=connect_options,
            chord_ordered=chord_ordered,
            **options,
        )

    def _read_url(self, url: str, given: Mapping[str, Any]) -> str:
        self._place = sentinel_place(url, given, *self._master)
        return url

    @property
    def store_id(self) -> Hashable:
        """Return what identifies the store: the class, the sentinels, the master, the database and the prefix."""
        return type(self), self._place.url, self._task_prefix

    def _new_topology(self) -> Sentinel:
        events = NodeEvents(self._published, self._lost_by_node)
        return Sentinel(
            self._place,
            self.as_uri(),
            self._remap,
            self._min_others,
            self.heartbeat,
            self._scripts,
            events,
            self._try_again,
        )

    def _try_again(self) -> None:
        for shard in self._shards:
            shard.try_again()
