"""The Redis backend: `backend` has the class, `connection` a single connection, `scripts` the Lua scripts."""

from .backend import RedisBackend

__all__ = ["RedisBackend"]
