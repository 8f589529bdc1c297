"""Write a flush with the caller's blocking redis-py client: for the tasks of Celery's workers."""

from __future__ import annotations

from typing import Any

from redis.exceptions import ResponseError

from ...log import Flush, Place
from ..keyvalue import sibling
from ..runs import superseded
from .connection import Command
from .runs import flush_commands, last_of, top_of
from .scripts import PLAIN, SHARDED

__all__ = ["flush_now"]


def flush_now(client: Any, key: str, flush: Flush) -> int:
    """Append ``flush`` to the log of the result ``key``, and return its epoch there. The call is idempotent.

    ``client`` is a `redis.Redis`, or the `aioresult.celery.ClusterBackend`, whose ``run`` executes a command. Raises
    `OutputSuperseded` if another producer has taken over the output, and the errors of the client.
    """
    sharded = hasattr(client, "run")
    scripts = SHARDED if sharded else PLAIN
    commands = flush_commands(scripts, key, flush)
    if not flush.epoch:
        (opening,) = commands
        epoch = int(client.run(opening) if sharded else _evaluated(client, opening))
        if not epoch:
            raise superseded(flush.task_id)
        return epoch
    refused = _appended(client, commands) if sharded else _transacted(client, commands)
    if refused is None:
        return flush.epoch
    error, by_log = refused
    if by_log:
        # Redis refused the entry as a repetition, or because of a newer epoch. The end of the log tells which.
        ending = last_of(sibling(key, ".out"))
        top = top_of(client.run(ending) if sharded else client.execute_command(*ending))
        if top.epoch > flush.epoch:
            raise superseded(flush.task_id)
        if top >= Place(flush.epoch, flush.last):
            return flush.epoch
    raise error


def _evaluated(client: Any, command: Command) -> Any:
    _, digest, *terms = command  # EVALSHA and the digest
    return client.execute_command("EVAL", PLAIN.texts[str(digest)], *terms)


def _transacted(client: Any, commands: list[Command]) -> tuple[Exception, bool] | None:
    """Execute the commands, from MULTI to EXEC. Returns the first error, and whether only the log has refused."""
    with client.pipeline(transaction=True) as transaction:
        for command in commands[1:-1]:  # without MULTI and EXEC
            transaction.execute_command(*command)
        replies: list[Any] = transaction.execute(raise_on_error=False)
    refused = [reply for reply in replies if isinstance(reply, Exception)]
    return (refused[0], refused == replies[:1]) if refused else None


def _appended(cluster: Any, commands: list[Command]) -> tuple[Exception, bool] | None:
    """Do the same with a script: redis-py has no transaction that follows the redirections of a cluster."""
    _, (_, out, *entry), (_, _, message), *keep, _ = commands
    ttl = "" if not keep else 0 if keep[0][0] == "PERSIST" else keep[0][2]
    try:
        cluster.run(("EVALSHA", SHARDED.append, 1, out, message, ttl, *entry))
    except ResponseError as exc:
        return exc, True
    return None
