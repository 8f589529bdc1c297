"""The PostgreSQL backend. The docstring of `backend` explains how results are pushed to waiters.

`schema` has the tables, and `statements` has the SQL.
"""

from .backend import PostgresBackend
from .schema import schema_sql

__all__ = ["PostgresBackend", "schema_sql"]
