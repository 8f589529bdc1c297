"""A blocking client for a Redis Cluster, for Celery's workers: redis-py's own, which also runs our scripts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from redis.asyncio.connection import SSLConnection
from redis.cluster import REDIS_ALLOWED_KEYS, ClusterNode, RedisCluster
from redis.exceptions import NoScriptError, RedisClusterException, RedisError

from ...exceptions import ImproperlyConfigured
from .cluster import NUDGE
from .connection import Command
from .places import Address, ClusterPlace
from .scripts import SHARDED
from .slots import key_slot

__all__ = ["ClusterClient", "checked_options"]

#: redis-py's class has no annotations.
_new_node: Callable[..., ClusterNode] = ClusterNode


def checked_options(place: ClusterPlace) -> dict[str, Any]:
    """Return the arguments of `ClusterClient` for the options of ``place``.

    :raises ImproperlyConfigured: redis-py's blocking client for clusters does not take one of them. It would ignore the
        argument, and so perhaps connect without TLS. The message names it.
    """
    options = dict(place.options)
    options.pop("decode_responses", None)  # a compressed result is no text
    if issubclass(place.connection_class, SSLConnection):
        options["ssl"] = True
    if unknown := sorted(options.keys() - set(REDIS_ALLOWED_KEYS)):
        raise ImproperlyConfigured(
            f"the RedisCluster of the installed redis-py does not take {', '.join(unknown)}; remove the option, or "
            f"install a newer redis-py"
        )
    return options


class ClusterClient(RedisCluster):
    """redis-py's client for clusters, with `run`. It also follows ASK and MOVED to nodes that are new to it.

    It connects when it is made. Threads may share it.

    :raises redis.exceptions.RedisClusterException: no start node answers, or some slots have no owner.
    :raises ImproperlyConfigured: the start nodes are no cluster.
    """

    def __init__(self, start: tuple[Address, ...], remap: Callable[[Address], Address], **options: Any) -> None:
        self._remap = remap
        #: The nodes to which others have redirected this client, and which are not in its table of slots.
        self._strangers: dict[Address, ClusterNode] = {}
        self._redirected = threading.local()
        nodes = [_new_node(*address) for address in start]
        try:
            super().__init__(startup_nodes=nodes, address_remap=remap, **options)
        except RedisClusterException as exc:
            if "Cluster mode is not enabled" in str(exc):
                raise ImproperlyConfigured(
                    "result_backend names a server that is no Redis Cluster; write redis://host:6379/0, without the "
                    "class, for a single server"
                ) from None
            raise
        self._get_node = self.nodes_manager.get_node
        vars(self.nodes_manager)["get_node"] = self._known_node  # pipelines share the manager, but not this class

    def run(self, command: Command) -> Any:
        """Execute a command or a script of `SHARDED`, and return the reply.

        :raises redis.exceptions.RedisError: any error of the server or of the connections.
        """
        _, what, *terms = command
        execute: Callable[..., Any] = self.execute_command
        self._redirected.by_ask = False
        try:
            reply = execute(*command)
        except NoScriptError:  # the node is new, or has been promoted
            reply = execute("EVAL", SHARDED.texts[str(what)], *terms)
        if self._redirected.by_ask:
            self._nudge(command)
        return reply

    def _nudge(self, command: Command) -> None:
        """Make waiters read again at the node that still owns the slot. The messages went to the slot's next owner."""
        for channel in SHARDED.channels(command):
            with contextlib.suppress(RedisError, RedisClusterException, OSError):
                node = self.nodes_manager.get_node_from_slot(key_slot(channel))
                publish: Callable[..., Any] = self.get_redis_connection(node).execute_command
                publish("SPUBLISH", channel, NUDGE)

    def _known_node(
        self, host: str | None = None, port: int | None = None, node_name: str | None = None
    ) -> ClusterNode | None:
        """Return the node that another one named in ASK or MOVED.

        redis-py calls this with a name for ASK, otherwise with a host and a port. By itself it does not apply
        ``address_remap`` to either, and fails if the node is not in its table, as a node that owns no slot yet.
        """
        if node_name:
            self._redirected.by_ask = True
            host, _, number = node_name.rpartition(":")
            port = int(number)
        address = self._remap((str(host), int(port or 0)))
        known: ClusterNode | None = self._get_node(*address)
        if known is None:
            known = self._strangers.setdefault(address, _new_node(*address, "primary"))
        return known
