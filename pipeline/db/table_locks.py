"""Statements that need a lock of a table which workers and readers use: short waits, repeated."""

from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy import Connection, text

from pipeline.errors import DEADLOCK, LockHeldError, TransientError

log = structlog.get_logger(__name__)

ATTEMPTS_MAX = 20
"""How often the lock is requested; each time for LOCK_WAIT."""
# A waiting request makes later readers and writers wait behind it, so it must give up soon.
LOCK_WAIT = text("SET LOCAL lock_timeout = '3s'")

_T = TypeVar("_T")


def limit_wait(db: Connection) -> None:
    """Have this transaction wait briefly for each lock."""
    db.execute(LOCK_WAIT)


def retry(attempt: Callable[[], _T], name: str) -> _T:
    """Repeat a transaction that another session's locks prevented, up to ``ATTEMPTS_MAX`` times.

    Args:
        attempt: One transaction; it begins with ``limit_wait``.
        name: The table or read model, for the log.

    Raises:
        LockHeldError: Another session held the lock each time.
        TransientError: The session lost a deadlock each time, or the server is unavailable.
    """
    for number in range(1, ATTEMPTS_MAX):
        try:
            return attempt()
        except TransientError as error:
            if not isinstance(error, LockHeldError) and error.sqlstate != DEADLOCK:
                raise
            log.info("table_locked", object=name, attempt=number, reason=str(error))
    return attempt()
