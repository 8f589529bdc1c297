"""The Redis backends: for one server (`backend`), for a cluster (`clustered`), and with sentinels (`sentinel`)."""

from .backend import RedisBackend
from .clustered import ClusterBackend
from .sentinel import SentinelBackend

__all__ = ["ClusterBackend", "RedisBackend", "SentinelBackend"]
