"""Durations that callers pass: they are checked when the call is made, and converted to seconds."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from math import inf, isnan
from typing import Self, TypeAlias

from .exceptions import ImproperlyConfigured, UsageError

__all__ = ["MAX_SECONDS", "Limit", "Seconds", "Timeout", "checked_seconds", "checked_timeout"]

#: A duration that a caller may pass: a number of seconds, or a timedelta.
Seconds: TypeAlias = float | timedelta
#: A timeout that a caller may pass: a number of seconds, or a timedelta. ``None`` means the default, or no limit.
Timeout: TypeAlias = float | timedelta | None

#: The longest expiry, about 317 years: every server can add it to the present time and still represent the date.
MAX_SECONDS = 10_000_000_000.0


class Limit(float):
    """A timeout in seconds, with the name that the text of a `TimeoutError` uses for it."""

    __slots__ = ("name",)

    def __new__(cls, seconds: float, name: str) -> Self:
        limit = super().__new__(cls, seconds)
        limit.name = name
        return limit

    name: str

    @staticmethod
    def name_of(timeout: float) -> str:
        """Return the name of ``timeout`` for the text of a `TimeoutError`."""
        return timeout.name if isinstance(timeout, Limit) else f"timeout={timeout:g}"


def checked_seconds(name: str, value: Seconds) -> float:
    """Return ``value`` as a number of seconds, from 0 to `MAX_SECONDS`. Raises `ImproperlyConfigured` for other values.

    ``name`` is the name of the option in the error.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_SECONDS:
        raise ImproperlyConfigured(
            f"{name} must be a number of seconds from 0 to {MAX_SECONDS:,.0f}, or a timedelta, not {value!r}"
        )
    return float(value)


def checked_timeout(timeout: Timeout, default: float | None = None) -> float | None:
    """Return ``timeout`` in seconds, or ``None`` for no limit. Raises `UsageError` for text, NaN and the like.

    If ``timeout`` is ``None``, this returns ``default``. An infinite ``timeout`` means no limit, whatever the default.
    """
    if timeout is None or isinstance(timeout, Limit):
        return default if timeout is None else timeout
    if isinstance(timeout, timedelta):
        return timeout.total_seconds()
    with suppress(OverflowError):  # an int may be too large for a float
        if not isinstance(timeout, bool) and isinstance(timeout, (int, float)) and not isnan(timeout):
            return None if timeout == inf else float(timeout)
    raise UsageError(f"timeout must be a number of seconds, a timedelta or None, not {timeout!r}")
