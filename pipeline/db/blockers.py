"""The sessions that hold a lock that a session of ours waits for.

A waiting session cannot execute a query, so a second connection of the same login does, for a
moment. It reads process ids, roles and applications; never the statements of others, which may hold
personal data.
"""

from datetime import datetime
from typing import Any, NamedTuple

import psycopg

# The start of another role's transaction is visible only to superusers and pg_read_all_stats.
_HOLDERS = """
SELECT b.pid, a.usename, a.application_name, a.xact_start
FROM unnest(pg_blocking_pids(%(waiting)s)) AS b(pid)
LEFT JOIN pg_stat_activity a ON a.pid = b.pid
GROUP BY 1, 2, 3, 4 ORDER BY 1
"""
# For a row, the wait is for its holder's transaction, and the lock on the row names the table.
_OBJECT = """
SELECT relation::regclass::text, locktype = 'tuple' AS is_row FROM pg_locks
WHERE pid = %(waiting)s AND relation IS NOT NULL AND (NOT granted OR locktype = 'tuple')
ORDER BY granted LIMIT 1
"""


class Holder(NamedTuple):
    """A session that holds what another one waits for.

    Attributes:
        pid: Process id of the server's; 0 for a prepared transaction.
        role: Its login; None where the session has just ended.
        application: Its application_name.
        since: When its transaction began; None where our login may not see it.
    """

    pid: int
    role: str | None
    application: str | None
    since: datetime | None

    def __str__(self) -> str:
        if not self.pid:
            return "a prepared transaction (see pg_prepared_xacts)"
        since = (
            f"{self.since:%Y-%m-%d %H:%M:%S} UTC"
            if self.since
            else "a time that this login may not see"
        )
        return (
            f"session {self.pid} (role {self.role}, application {self.application!r}, in a "
            f"transaction since {since})"
        )


def who_blocks(asking: "psycopg.Connection[Any]", waiting_pid: int) -> str | None:
    """The lock that a session waits for and its holders, as text; None if it waits for no lock.

    Args:
        asking: Another session of the same login.
        waiting_pid: The server's process of the session that waits.
    """
    waiting = {"waiting": waiting_pid}
    holders = [Holder(*row) for row in asking.execute(_HOLDERS, waiting)]
    row = asking.execute(_OBJECT, waiting).fetchone()
    if not holders:
        return None
    thing = "a row" if row is None else f"a row of {row[0]}" if row[1] else str(row[0])
    return f"{thing} is locked by {', '.join(map(str, holders))}"
