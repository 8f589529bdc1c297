"""Task states: their names, and the sets of states that end a task, carry an exception, and so on.

The names and the sets are Celery's (``celery/states.py``, 5.7), so that a state means the same in Celery and here. Any
other string, such as ``"PROGRESS"``, is a state that the task defines itself.
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

#: The final states: the task is over, and there is a result or an exception. They end a wait.
READY_STATES: Final = frozenset({SUCCESS, FAILURE, REVOKED})
#: The states of a task that is not over.
UNREADY_STATES: Final = frozenset({PENDING, RECEIVED, STARTED, REJECTED, RETRY})
#: All states that this module names. Any other string is a state that the task defines itself.
ALL_STATES: Final = READY_STATES | UNREADY_STATES | {IGNORED}
#: The states in which the stored result is an exception.
EXCEPTION_STATES: Final = frozenset({RETRY, FAILURE, REVOKED})
#: The states in which awaiting the result raises the stored exception.
PROPAGATE_STATES: Final = frozenset({FAILURE, REVOKED})

#: The states from the one that says the most about a task to the one that says the least. ``None`` stands for every
#: state that the task defines itself.
_PRECEDENCE: Final = (SUCCESS, FAILURE, None, REVOKED, STARTED, RECEIVED, REJECTED, RETRY, PENDING)
_RANK: Final = {state: rank for rank, state in enumerate(_PRECEDENCE)}


def precedence(state: str) -> int:
    """Return the rank of ``state``. The lower the number, the more the state says about the task.

    >>> precedence("SUCCESS") < precedence("PROGRESS") < precedence("STARTED")
    True
    """
    return _RANK.get(state, _RANK[None])


@lru_cache(maxsize=64)  # every store of a state that a task defines calls this
def state_meant(state: str) -> str | None:
    """Return the state of this module that a misspelt ``state`` means; ``None`` for a state that the task defines.

    A state counts as misspelt if only the case of its letters is wrong. For a state that ends a task, one wrong letter
    counts, too: if that state is misspelt, its waiters wait for ever. For other states a mistake costs less, and names
    of your own may be similar: SENDING is not a misspelt PENDING.

    >>> state_meant("Success")
    'SUCCESS'
    >>> state_meant("FAILED") or state_meant("SENDING") or "a state of your own"
    'a state of your own'
    """
    upper = state.strip().upper()
    if upper in ALL_STATES:
        return upper
    return next((name for name in sorted(READY_STATES) if _one_slip(upper, name)), None)


def _one_slip(text: str, name: str) -> bool:
    """True if one letter of ``name`` is missing in ``text``, is wrong, is there twice, or is swapped with the next."""
    same = 0
    while same < len(name) and text[same : same + 1] == name[same]:
        same += 1
    rest, right = text[same:], name[same:]
    return right[1:] in (rest, rest[1:]) or rest[1:] == right or (rest[:2] == right[1::-1] and rest[2:] == right[2:])
