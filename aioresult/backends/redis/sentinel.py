"""The backend for a Redis master that sentinels watch and replace."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple, Unpack

import hiredis
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection

from ...exceptions import BackendConnectionError, BackendError, BackendRefusedError
from ...retry import Backoff
from ...tasks import StandingTask, copy_of_error, spawn
from ..base import BackendOptions
from .backend import RedisBackend
from .connection import RedisConnection, translate
from .listener import RedisListener
from .node import Node, NodeEvents
from .places import Address, SentinelPlace, checked_remap, checked_sentinels, place_url, sentinel_place
from .scripts import Scripts
from .topology import Single

__all__ = ["Sentinel", "SentinelBackend"]

logger: logging.Logger = logging.getLogger("aioresult")

#: Seconds that a sentinel has to answer.
_TELL: Final = 1.0
#: The channel on which sentinels announce a new master: "<name> <old host> <old port> <new host> <new port>". See
#: https://redis.io/docs/latest/operate/oss_and_stack/management/sentinel/#pubsub-messages
_SWITCH: Final = "+switch-master"


class _Answer(NamedTuple):
    """What a sentinel knows of the master."""

    epoch: int
    address: Address
    others: int


class Sentinel(Single):
    """One master has every key. Sentinels know its address, and announce when another server takes its place.

    The address is asked for before each connection is made, and the server must say that it is the master: a sentinel
    that was cut off may name an old one. One connection to a sentinel waits for the announcement. If the master does
    not answer for half a heartbeat, the sentinels are asked, too. As soon as they name another server, the connections
    to the old one are dropped: a frozen master would keep them open, and lose later what it is sent now.
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
    ) -> None:
        self._place = place
        self._where = where
        self._remap = remap
        self._min_others = min_other_sentinels
        self._heartbeat = heartbeat
        #: The address of the master that was connected to last.
        self._address: Address | None = None
        super().__init__(
            Node(where, self._new_link, heartbeat, scripts, events._replace(on_doubt=self._doubted), self._greet)
        )
        self._watch: RedisListener | None = None
        self._watcher = StandingTask(self._keep_watching, "aioresult-sentinel", lambda: True)
        self._checking: asyncio.Task[None] | None = None

    async def open(self) -> None:
        await self.node.connect()
        self._watcher.start()

    async def close(self) -> None:
        await self._watcher.stop()
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.wait([self._checking])
        if self._watch is not None:
            await self._watch.close()
        await super().close()

    def abandon(self) -> None:
        if self._watch is not None:
            self._watch.abandon()
        super().abandon()

    # -- the master -------------------------------------------------------------------------------------------------

    async def _new_link(self) -> AbstractConnection:
        self._address = await self._find_master()
        host, port = self._address
        return self._place.connection_class(**{**self._place.options, "host": host, "port": port})

    async def _greet(self, link: AbstractConnection) -> None:
        """Raise unless the server is a master."""
        await link.send_command("ROLE")
        try:
            role = (await link.read_response())[0]
        except redis_errors.NoPermissionError:
            return  # then the server itself refuses what only a master may do
        if role not in (b"master", "master"):
            shown = place_url("redis", self._address or ("", 0))
            raise BackendConnectionError(f"{shown} is not the master {self._place.master_name!r}, but a {_text(role)}")

    async def _find_master(self) -> Address:
        """Ask the sentinels. Believes the newest configuration among the answers of more than half of them."""
        asking = {spawn(self._ask(address)) for address in self._place.sentinels}
        enough = len(asking) // 2 + 1
        answers: list[_Answer] = []
        failures: list[BackendError] = []
        now = asyncio.get_running_loop().time
        until = now() + _TELL
        try:
            while asking and len(answers) < enough and (left := until - now()) > 0:
                done, asking = await asyncio.wait(asking, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    error = task.exception()
                    if isinstance(error, BackendError):
                        failures.append(error)
                    elif error is not None:
                        raise error
                    else:
                        answers.append(task.result())
        finally:
            for task in asking:
                task.cancel()
            if asking:
                await asyncio.wait(asking)
        answers = [answer for answer in answers if answer.others >= self._min_others]
        if answers:
            return self._remap(max(answers).address)
        refused = [error for error in failures if isinstance(error, BackendRefusedError)]
        if refused and len(refused) == len(failures):
            raise copy_of_error(refused[0])
        reasons = "; ".join(sorted({str(error) for error in failures})) or "none of them answers"
        if not failures and self._min_others:
            reasons = f"none knows min_other_sentinels={self._min_others} others"
        raise BackendConnectionError(f"no sentinel tells the address of master {self._place.master_name!r}: {reasons}")

    async def _ask(self, sentinel: Address) -> _Answer:
        where = self._shown(sentinel)
        connection = RedisConnection(where, self._heartbeat)
        try:
            await connection.connect(self._sentinel_link(sentinel))
            name = self._place.master_name
            address, about = await connection.request(
                [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name), ("SENTINEL", "MASTER", name)]
            )
        finally:
            if not connection.closed:
                await connection.close()
        for reply in (address, about):
            if isinstance(reply, hiredis.ReplyError) and "No such master" not in str(reply):
                raise translate(reply, where)
        if address is None or isinstance(about, hiredis.ReplyError):
            raise BackendRefusedError(f"{where} watches no master {name!r}; check master_name")
        fields = about if isinstance(about, dict) else dict(zip(about[::2], about[1::2], strict=False))
        host, port = address
        return _Answer(
            int(fields.get(b"config-epoch", 0)), (host.decode(), int(port)), int(fields.get(b"num-other-sentinels", 0))
        )

    def _sentinel_link(self, sentinel: Address) -> AbstractConnection:
        host, port = sentinel
        return self._place.sentinel_class(**{**self._place.sentinel_options, "host": host, "port": port})

    def _shown(self, sentinel: Address) -> str:
        return place_url("sentinel", sentinel)

    # -- another master ---------------------------------------------------------------------------------------------

    def _doubted(self, _: Node) -> None:
        if self._checking is None or self._checking.done():
            self._checking = spawn(self._check())

    async def _check(self) -> None:
        """Ask the sentinels for the master while the present one may be away."""
        backoff = Backoff(0.1, 0.5)
        while self.node.doubtful and not self.node.failing:
            await self._compare()
            await asyncio.sleep(backoff.pause())

    async def _compare(self) -> None:
        """Drop the connections to the master if the sentinels name another."""
        try:
            address = await self._find_master()
        except BackendError:
            return
        if address != self._address and self._address is not None:
            self.node.drop(
                BackendConnectionError(
                    f"the sentinels have replaced the master {place_url('redis', self._address)} by "
                    f"{place_url('redis', address)}"
                )
            )

    async def _keep_watching(self) -> None:
        """Subscribe to the announcements of one sentinel after the other, as long as each answers."""
        backoff, turn = Backoff(), 0
        while True:
            sentinel = self._place.sentinels[turn % len(self._place.sentinels)]
            turn += 1
            lost = asyncio.Event()
            self._watch = RedisListener(
                self._shown(sentinel), self._heartbeat, self._announced, _ignore, partial(_set, lost)
            )
            try:
                async with asyncio.timeout(_TELL):
                    await self._watch.connect(self._sentinel_link(sentinel))
                    _, missing = await self._watch.subscribe([("SUBSCRIBE", _SWITCH)])
                if not missing:
                    await self._compare()  # the announcement may have been missed
                    backoff.reset()
                    await lost.wait()
            except (BackendError, TimeoutError) as exc:
                logger.debug("cannot watch %s: %s", self._shown(sentinel), exc)
            finally:
                if not self._watch.closed:
                    await self._watch.close()
            await asyncio.sleep(backoff.pause())

    def _announced(self, channel: bytes, value: bytes) -> None:
        if value.split(b" ")[0].decode("utf-8", "replace") == self._place.master_name:
            if self._checking is not None:
                self._checking.cancel()
            self._checking = spawn(self._compare())


def _text(word: bytes | str) -> str:
    return word.decode("utf-8", "replace") if isinstance(word, bytes) else word


def _set(event: asyncio.Event, _: object) -> None:
    event.set()


def _ignore(_: object) -> None:
    pass


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
        address_remap: Mapping[Any, Any] | Callable[[Address], Address] | None = None,
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
        events = NodeEvents(self._published, _ignore, self._lost_by_node, _ignore)
        return Sentinel(
            self._place, self.as_uri(), self._remap, self._min_others, self.heartbeat, self._scripts, events
        )
