"""PostgreSQL: engine, sessions, transactions, and its errors as ours."""

from pipeline.db.engine import (
    LOG_SCHEMA,
    PERSONAL_SCHEMA,
    READ_SCHEMA,
    SHADOW_SCHEMA,
    SessionLimits,
    descriptor,
    metadata,
    open_engine,
    transaction,
    translated,
    use_one_snapshot,
)

__all__ = [
    "LOG_SCHEMA",
    "PERSONAL_SCHEMA",
    "READ_SCHEMA",
    "SHADOW_SCHEMA",
    "SessionLimits",
    "descriptor",
    "identifiers",
    "locks",
    "metadata",
    "open_engine",
    "session",
    "session_settings",
    "stored_times",
    "table_locks",
    "transaction",
    "translated",
    "use_one_snapshot",
]
