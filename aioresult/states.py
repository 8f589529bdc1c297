"""Task states: their names, and which of them mean what.

The names and the sets are Celery's (``celery/states.py``, 5.7), so that a state stored by either side reads the
same on the other. A task may also be in a state of its own making (``"PROGRESS"``): any other string.
"""

from __future__ import annotations

from functools import lru_cache
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
    "state_meant",
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


@lru_cache(maxsize=64)  # asked again with each store of a state of one's own
def state_meant(state: str) -> str | None:
    """The state of this module that ``state`` must be a slip for; ``None`` for a state of the task's own making.

    A slip is a state in other letters, upper or lower. One wrong letter counts for a state that ends a task alone: if
    that is misspelt, its waiters wait for ever. Beside the others there are names of one's own, such as SENDING beside
    PENDING, and a slip costs less.

    >>> [state_meant(state) for state in ("Success", "SUCCES", "FAILED", "SENDING")]
    ['SUCCESS', 'SUCCESS', None, None]
    """
    upper = state.strip().upper()
    if upper in ALL_STATES:
        return upper
    return next((name for name in sorted(READY_STATES) if _one_slip(upper, name)), None)


def _one_slip(text: str, name: str) -> bool:
    """Whether one letter of ``name`` is missing in ``text``, wrong, twice, or swapped with the next."""
    same = 0
    while same < len(name) and text[same : same + 1] == name[same]:
        same += 1
    rest, right = text[same:], name[same:]
    return right[1:] in (rest, rest[1:]) or rest[1:] == right or (rest[:2] == right[1::-1] and rest[2:] == right[2:])
