"""Task states: their names, and which of them mean what.

The names and the sets are Celery's (``celery/states.py``, 5.7), so that a state stored by either side reads the
same on the other. A task may also be in a state of its own making (``"PROGRESS"``): any other string.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "ALL_STATES",
    "EXCEPTION_STATES",
    "FAILURE",
    "IGNORED",
    "PENDING",
    "PROPAGATE_STATES",
    "READY_STATES",
    "RECEIVED",
    "REJECTED",
    "RETRY",
    "REVOKED",
    "STARTED",
    "SUCCESS",
    "UNREADY_STATES",
    "precedence",
]

PENDING: Final = "PENDING"
RECEIVED: Final = "RECEIVED"
STARTED: Final = "STARTED"
SUCCESS: Final = "SUCCESS"
FAILURE: Final = "FAILURE"
REVOKED: Final = "REVOKED"
REJECTED: Final = "REJECTED"
RETRY: Final = "RETRY"
IGNORED: Final = "IGNORED"

#: The task is over: there is a result, or an exception, and a waiter may go on.
READY_STATES: Final = frozenset({SUCCESS, FAILURE, REVOKED})
#: The task is known and not over.
UNREADY_STATES: Final = frozenset({PENDING, RECEIVED, STARTED, REJECTED, RETRY})
#: Every state that has a name here; any other string is a state of the task's own making.
ALL_STATES: Final = READY_STATES | UNREADY_STATES | {IGNORED}
#: What is stored as the result is an exception.
EXCEPTION_STATES: Final = frozenset({RETRY, FAILURE, REVOKED})
#: Awaiting the result raises that exception.
PROPAGATE_STATES: Final = frozenset({FAILURE, REVOKED})

#: From the strongest claim about a task to the weakest; ``None`` stands for every state not named here.
_PRECEDENCE: Final = (SUCCESS, FAILURE, None, REVOKED, STARTED, RECEIVED, REJECTED, RETRY, PENDING)
_RANK: Final = {state: rank for rank, state in enumerate(_PRECEDENCE)}


def precedence(state: str) -> int:
    """The rank of ``state``: the lower the number, the more it says about the task.

    >>> precedence("SUCCESS") < precedence("PROGRESS") < precedence("STARTED")
    True
    """
    return _RANK.get(state, _RANK[None])
