"""Checks the options of backends, and makes the errors for options that are unknown or of the wrong type."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from .exceptions import ImproperlyConfigured

__all__ = [
    "UnknownOption",
    "checked_flag",
    "checked_function",
    "checked_option",
    "checked_text",
    "did_you_mean",
    "option_names",
    "unknown_in_url",
    "unknown_options",
]

T = TypeVar("T")


class UnknownOption(ImproperlyConfigured, TypeError):
    """Raised for an option that a backend does not take. It is also a `TypeError`, as Python raises in this case."""


def unknown_options(backend_class: type, names: Iterable[str], owners: Mapping[str, str] | None = None) -> str:
    """Return the text of the error for options that ``backend_class`` does not take.

    ``owners`` maps each option of another backend to a sentence about it.
    """
    known = option_names(backend_class)
    told = [
        (owners or {}).get(name) or f"unknown option {name!r}{did_you_mean(name, known) or '.'}"
        for name in sorted(names)
    ]
    sentences = [each if told[0] is each else each[0].upper() + each[1:] for each in told]
    return f"{' '.join(sentences)} {backend_class.__name__} takes: {', '.join(sorted(known))}"


def option_names(cls: type) -> set[str]:
    """Return the names of the keyword arguments that ``cls()`` takes, including those that its base classes take."""
    known: set[str] = set()
    for each in cls.__mro__:
        if "__init__" in vars(each) and each is not object:
            parameters = inspect.signature(vars(each)["__init__"]).parameters.values()
            known.update(one.name for one in parameters if one.kind is one.KEYWORD_ONLY)
            if not any(one.kind is one.VAR_KEYWORD for one in parameters):
                break
    return known


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'expires'?"`` with a known name similar to ``name``, or ``""`` if no name is similar."""
    from difflib import get_close_matches  # imported here, because it is seldom needed

    similar = get_close_matches(name.lower(), sorted(known), 1, 0.7)
    return f"; did you mean {similar[0]!r}?" if similar else ""


def unknown_in_url(name: str, known: Iterable[str], options: Iterable[str]) -> str:
    """Return the text of the error for a parameter in the query of a URL.

    ``known`` are the parameters that a URL may have, and ``options`` are the options that the backend takes.
    """
    if name in options:
        return f"{name!r} does not belong in the URL: it is an option, connect(url, {name}=…)"
    return f"unknown parameter {name!r} in the URL{did_you_mean(name, known)}"


def checked_option(name: str, value: T, kinds: type | tuple[type, ...], expected: str) -> T:
    """Return ``value`` if it is an instance of ``kinds``; otherwise raise `ImproperlyConfigured`.

    The error does not quote the value, which may hold a password.
    """
    if not isinstance(value, kinds):
        raise ImproperlyConfigured(f"{name} must be {expected}, not {type(value).__qualname__}")
    return value


def checked_flag(name: str, value: bool) -> bool:
    """Return ``value`` as a `bool`; 0 and 1 are allowed, too. Raises `ImproperlyConfigured` for other values."""
    if not isinstance(value, int) or value not in (0, 1):
        raise ImproperlyConfigured(f"{name} must be True or False, not {value!r}")
    return bool(value)


def checked_text(name: str, value: str) -> str:
    return checked_option(name, value, str, "a str")


def checked_function(name: str, value: Callable[..., Any] | None) -> None:
    if value is not None and not callable(value):
        raise ImproperlyConfigured(f"{name} must be a coroutine function or None, not {type(value).__qualname__}")
