"""Write a flush with the caller's blocking redis-py client: for the tasks of Celery's workers."""

from __future__ import annotations

from typing import Any

from ...log import Flush, Place
from ..keyvalue import sibling
from ..runs import superseded
from .runs import flush_commands, last_of, top_of
from .scripts import PLAIN

__all__ = ["flush_now"]


def flush_now(client: Any, key: str, flush: Flush) -> int:
    """Append ``flush`` to the log of the result ``key``, and return its epoch there. The call is idempotent.

    ``client`` is a `redis.Redis`. Raises `OutputSuperseded` if another producer has taken over the output, and the
    errors of the client.
    """
    commands = flush_commands(PLAIN, key, flush)
    if not flush.epoch:
        (_, _, *terms), *_ = commands  # EVALSHA and the digest
        epoch = int(client.execute_command("EVAL", PLAIN.texts[PLAIN.open], *terms))
        if not epoch:
            raise superseded(flush.task_id)
        return epoch
    with client.pipeline(transaction=True) as transaction:
        for command in commands[1:-1]:  # without MULTI and EXEC
            transaction.execute_command(*command)
        replies: list[Any] = transaction.execute(raise_on_error=False)
    refused = [reply for reply in replies if isinstance(reply, Exception)]
    if not refused:
        return flush.epoch
    if refused == replies[:1]:
        # Redis refused the entry as a repetition, or because of a newer epoch. The end of the log tells which.
        top = top_of(client.execute_command(*last_of(sibling(key, ".out"))))
        if top.epoch > flush.epoch:
            raise superseded(flush.task_id)
        if top >= Place(flush.epoch, flush.last):
            return flush.epoch
    raise refused[0]
