"""The Redis backend: `backend` has the class, `connection` has one connection, and `scripts` has the Lua scripts."""

from .backend import RedisBackend

__all__ = ["RedisBackend"]
