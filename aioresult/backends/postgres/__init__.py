"""The PostgreSQL backend. The head of `backend` says how it pushes; `schema` has the tables, `statements` the SQL."""

from .backend import PostgresBackend
from .schema import schema_sql

__all__ = ["PostgresBackend", "schema_sql"]
