"""The Redis backend. `backend` has the whole, `connection` one connection, `scripts` what the server decides."""

from .backend import RedisBackend

__all__ = ["RedisBackend"]
