"""A result backend for Celery's workers on a Redis Cluster. Celery itself has none (5.7).

It keeps results under the same keys and in the same JSON as Celery's Redis backend. The keys of a chord are the
exception: they have to be in one slot, so they have other names, which the backend of this library uses, too.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from celery import maybe_signature, states
from celery.backends.base import SyncBackendMixin
from celery.backends.redis import RedisBackend
from celery.exceptions import BackendStoreError, ChordError
from celery.result import GroupResult, allow_join_result
from redis.exceptions import AskError, ClusterError, RedisClusterException, ResponseError, TryAgainError

from .backends.keyvalue import sibling
from .backends.redis.blocking import ClusterClient, checked_options
from .backends.redis.chords import CHORD_SUFFIXES, chord_command, chord_state, parts_key
from .backends.redis.connection import Command
from .backends.redis.groups import extend_command, milliseconds
from .backends.redis.places import checked_remap, cluster_place
from .backends.redis.runs import NOT_TOLD
from .backends.redis.scripts import SHARDED
from .backends.redis.slots import key_slot
from .chord import ChordOp, ChordState, ChordStep
from .exceptions import ImproperlyConfigured
from .settings import backend_options
from .urls import hide_password

__all__ = ["ClusterBackend"]

logger: logging.Logger = logging.getLogger("aioresult")

#: How many keys or parts one request reads. One very large reply would block the server.
_CHUNK = 1000
#: Errors of a cluster that pass, beside those that Celery knows: a failover, or a slot that migrates.
_PASSING = (ClusterError, RedisClusterException, AskError, TryAgainError)


if TYPE_CHECKING:

    class _CelerysBackend:
        """What this module uses of Celery's backend. Celery has no annotations."""

        app: Any
        url: str | None
        expires: int | None

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def get_key_for_group(self, group_id: Any, key: str = "") -> bytes: ...
        def wait_for(self, task_id: str, *args: Any, on_interval: Any = None, **kwargs: Any) -> Any: ...
        def __getattr__(self, name: str) -> Any: ...

else:

    class _CelerysBackend(SyncBackendMixin, RedisBackend):
        """Celery's backend for Redis. The mixin makes `AsyncResult.get` poll instead of subscribing."""


class ClusterBackend(_CelerysBackend):
    """Celery's result backend for a Redis Cluster of Redis 7 or later, or of Valkey. It needs Celery 5.7.

    ::

        app = Celery(
            broker="amqp://…",
            backend="aioresult.celery:ClusterBackend+redis+cluster://h1:6379,h2:6379",
        )

    After ``aioresult.celery:ClusterBackend+`` comes the URL of `aioresult.backends.redis.ClusterBackend`. Celery's
    settings for results and for Redis have the same effects as with Celery's Redis backend. Two differ:
    ``result_backend_transport_options`` may have ``address_remap``, and certificates are verified unless
    ``ssl_cert_reqs`` says otherwise. `backend_from_app` makes an asyncio backend with the same settings.

    Storing a result and notifying its waiters in asyncio services is one step. A blocking ``AsyncResult.get`` polls:
    it reads the result every ``interval`` seconds, half a second by default. Chords work as with Celery's Redis
    backend, and this library's workers may run some of their parts.

    After an outage or during a failover, each operation is repeated as ``retry_policy`` in
    ``result_backend_transport_options`` says; Celery's default is 20 times, a second apart.
    """

    connection_errors: tuple[type[Exception], ...]

    def __init__(self, *args: Any, url: str | None = None, **kwargs: Any) -> None:
        if not hasattr(RedisBackend, "_chord_publish_claim_expires"):
            raise ImproperlyConfigured("aioresult.celery:ClusterBackend needs Celery 5.7; install a newer Celery")
        if not url or url.partition("://")[0].partition("+")[2] != "cluster":
            raise ImproperlyConfigured(
                "result_backend needs the URL of a cluster after the class: "
                "aioresult.celery:ClusterBackend+redis+cluster://host1:6379,host2:6379"
            )
        super().__init__(*args, url=url, **kwargs)
        self.connection_errors += _PASSING
        prefix = _text(self.group_keyprefix).removesuffix("celery-taskset-meta-")
        self._ready_channel = f"{prefix}aioresult-chords"

    def as_uri(self, include_password: bool = False) -> str:
        """Return the URL of the cluster, without the password unless ``include_password`` is set."""
        return str(self.url) if include_password else hide_password(str(self.url))

    # -- the client -------------------------------------------------------------------------------------------------

    def _params_from_url(self, url: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        checked, options = backend_options(self.app.conf, url, {})
        place = cluster_place(checked, options.get("connect_options", {}))
        # The settings that the asyncio backend has no use for.
        kept = ("socket_timeout", "max_connections")
        return {
            **{name: defaults[name] for name in kept if defaults.get(name) is not None},
            **checked_options(place),
            "start": place.start,
            "remap": checked_remap(options.get("address_remap")),
        }

    def _create_client(self, **params: Any) -> ClusterClient:
        return ClusterClient(**params)

    def run(self, command: Command) -> Any:
        """Execute a command or a script of this library, and return the reply. After an outage, execute it again.

        Every command that is passed to this method is idempotent.
        """
        return self.ensure(self._run_once, (command,))

    def _run_once(self, command: Command) -> Any:
        try:
            return self.client.run(command)
        except ResponseError as exc:
            if str(exc).startswith(NOT_TOLD):
                raise BackendStoreError(
                    f"the cluster does not let this user publish, and nothing is stored without its message: {exc}; "
                    f"grant the right with ACL SETUSER <user> '&*', and use Redis 7 or later"
                ) from exc
            raise
        except RedisClusterException:
            # All nodes that the client knows are away. The next attempt begins with the nodes of the URL.
            self.__dict__.pop("client", None)
            raise

    # -- results ----------------------------------------------------------------------------------------------------

    def _store_result(
        self, task_id: Any, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        # Unlike Celery's, this does not read the stored result first: the script keeps a success.
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = _text(task_id) if isinstance(task_id, bytes) else task_id
        try:
            self._set_with_state(self.get_key_for_task(task_id), self.encode(meta), state)
        except BackendStoreError as exc:
            raise BackendStoreError(str(exc), state=state, task_id=task_id) from exc
        group_id = getattr(request, "group", None)
        if group_id and state in states.READY_STATES:
            # A saved group lives as long as its members, and its members are counted for `ResultSet.progress`.
            index = request.group_index if type(request.group_index) is int else None
            key, failed = _text(self.get_key_for_group(group_id)), state in states.PROPAGATE_STATES
            self.run(extend_command(SHARDED, key, self.expires or 0, index, failed))
        return result

    def _set(self, key: bytes, value: str | bytes, expires: int | None = None) -> None:
        ttl = milliseconds((self.expires if expires is None else expires) or 0)
        if not key.startswith(self.task_keyprefix):
            self._run_once(("SET", _text(key), value, *(("PX", ttl) if ttl else ())))
            return
        digest = ""
        while True:
            reply = self._run_once(("EVALSHA", SHARDED.put, 1, _text(key), value, ttl, "", digest))
            # The script returns a stored value whose state it cannot read.
            if not isinstance(reply, bytes) or self.decode(reply).get("status") == states.SUCCESS:
                return
            digest = hashlib.sha1(reply).hexdigest()  # noqa: S324 - Redis has only SHA-1; it is not used for security

    def get(self, key: bytes) -> bytes | None:
        value: bytes | None = self.run(("GET", _text(key)))
        return value

    def mget(self, keys: Sequence[bytes]) -> list[bytes | None]:
        values: list[bytes | None] = []
        for first in range(0, len(keys), _CHUNK):
            values += self.ensure(self._get_some, (keys[first : first + _CHUNK],))
        return values

    def _get_some(self, keys: Sequence[bytes]) -> list[bytes | None]:
        with self.client.pipeline() as pipeline:
            for key in keys:
                pipeline.get(key)
            values: list[bytes | None] = pipeline.execute()
            return values

    def delete(self, key: bytes) -> None:
        self.run(("DEL", _text(key)))

    def wait_for(self, task_id: str, *args: Any, on_interval: Any = None, **kwargs: Any) -> Any:
        meta = super().wait_for(task_id, *args, on_interval=on_interval, **kwargs)
        if on_interval and meta["status"] in states.PROPAGATE_STATES:
            on_interval()  # `AsyncResult.get` raises a parent's exception here, even if both failed since the last look
        return meta

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Subscribe to nothing: `AsyncResult.get` polls."""

    # -- chords -----------------------------------------------------------------------------------------------------

    def get_key_for_group(self, group_id: Any, key: str = "") -> bytes:
        name = super().get_key_for_group(group_id)
        return sibling(_text(name), key).encode("utf-8", "surrogateescape") if key else name

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        # As in Celery: a frozen chord that is sent again has the same group id, but is a new run.
        self.run(("DEL", _text(self.get_key_for_group(group_id, ".c"))))
        self._chord_step(ChordStep(ChordOp.SIZE, group_id, size=chord_size))

    def _set_chord_key(self, key: bytes, value: Any) -> None:
        ttl = milliseconds(self._kept)
        self.run(("SET", _text(key), value, *(("PX", ttl) if ttl else ())))

    def on_chord_part_return(
        self, request: Any, state: str, result: Any, propagate: bool | None = None, **kwargs: Any
    ) -> None:
        """Add a part to its chord. If it is the last one, dispatch the callback, or fail it if a part has failed."""
        task_id, group_id, index = request.id, request.group, request.group_index
        if not group_id or not task_id:
            return
        # Redis keeps equal parts of a sorted set once; our script makes them distinct by spaces after JSON.
        plain = self.serializer == "json" and not self.compression
        number = 1 if plain or index is None else 2 + index
        lease = max(5, int((self.app.conf.result_chord_join_timeout or 5.0) * 2))  # as Celery's
        step = ChordStep(
            ChordOp.PART,
            group_id,
            token=uuid4().hex,
            lease=lease,
            task_id=task_id,
            index=index,
            part=_bytes(self.encode([number, task_id, state, self.encode_result(result, state)])),
            failed=state in states.PROPAGATE_STATES,
            body=_bytes(self.encode(request.chord)),
        )
        if self._chord_step(step).claimed:
            self._finish_chord(replace(step, part=b"", body=None), request)

    def _finish_chord(self, step: ChordStep, request: Any) -> None:
        """Dispatch the callback of a chord that ``step`` has claimed."""
        group_id, callback = step.group_id, maybe_signature(request.chord, app=self.app)
        # If this worker dies, a service with `ready_chords` finds the chord in this set.
        self.run(("EVALSHA", SHARDED.register, 1, self._ready_channel, group_id, milliseconds(self._kept), ""))
        try:
            results = self._chord_results(group_id)
            lease = self._chord_publish_claim_expires(int(step.lease), callback)
            if not self._chord_step(replace(step, op=ChordOp.RENEW, lease=lease)).claimed:
                logger.warning("the claim to chord %s ran out: another worker dispatches its callback", group_id)
                return
            try:
                self.app.amqp._retry_publish(callback.delay, results)
            except Exception as exc:
                logger.exception("the callback of chord %s cannot be sent", group_id)
                self.chord_error_from_stack(callback, ChordError(f"Callback error: {exc!r}"))
        except ChordError as exc:
            logger.exception("chord %s has failed", group_id)
            self.chord_error_from_stack(callback, exc)
        except Exception as exc:
            logger.exception("the results of chord %s cannot be joined", group_id)
            self.chord_error_from_stack(callback, ChordError(f"Join error: {exc!r}"))
        if not self._chord_step(replace(step, op=ChordOp.FINISH)).claimed:
            logger.warning("the claim to chord %s was lost: its callback may be dispatched twice", group_id)
        self.run(("ZREM", self._ready_channel, group_id))

    def _chord_results(self, group_id: str) -> list[Any]:
        """Return the results of the header. Raises the error of a failed part."""
        group = GroupResult.restore(group_id, backend=self, app=self.app)
        if group is None:
            unpack = partial(self._unpack_chord_result, decode=self.decode)
            return [unpack(part) for part in self._chord_parts(group_id)]
        # The header has groups in it, so `apply_chord` has saved it. All its results are there.
        group.on_ready()
        with allow_join_result():
            results: list[Any] = group.join_native(timeout=self.app.conf.result_chord_join_timeout, propagate=True)
            return results

    def _chord_parts(self, group_id: str) -> list[bytes]:
        where, is_list = parts_key(self.run(self._chord_command(ChordStep(ChordOp.PARTS, group_id))))
        key, name = _text(self.get_key_for_group(group_id, where)), "LRANGE" if is_list else "ZRANGE"
        parts: list[bytes] = []
        while len(parts) % _CHUNK == 0:
            piece = self.run((name, key, len(parts), len(parts) + _CHUNK - 1))
            if not piece:
                break
            parts += piece
        return parts

    def _chord_step(self, step: ChordStep) -> ChordState:
        kept = replace(step, expires=self._kept, group_expires=self._chord_result_expires)
        return chord_state(self.run(self._chord_command(kept)))

    def _chord_command(self, step: ChordStep) -> Command:
        key = _text(self.get_key_for_group(step.group_id))
        keys = [key, *(sibling(key, suffix) for suffix in CHORD_SUFFIXES)]
        if len(set(map(key_slot, keys))) > 1:
            raise BackendStoreError(
                f"a Redis Cluster cannot keep chord {step.group_id} on one node, because the id or the prefix has a "
                f"brace '}}' but no hash tag '{{…}}'; use another id"
            )
        return chord_command(SHARDED, keys, self._ready_channel, step, bool(self._chord_zset))

    @property
    def _kept(self) -> float:
        """Seconds that a chord is kept; 0 for ever."""
        return self.chord_expires or 0


def _text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
