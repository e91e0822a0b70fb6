"""The states of partitions and read models, decided from their rows and the database's time."""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row

from pipeline.health.status.report import (
    Owner,
    PartitionState,
    PartitionStatus,
    ProjectorState,
    ProjectorStatus,
)
from pipeline.partitions import NextOffset, lag
from pipeline.readmodel import Projector
from pipeline.readmodel.fingerprint import fingerprint

LAG_S_MAX = 60.0
"""A longer lag is a warning; with lag and without a move for this long, a partition is stalled."""
SEEN_S_MAX = 30.0
"""How far from now, by the database's clock, what is recorded may be. A reader records Kafka's end
every 5 seconds. After six times that, with room for a rebalance and for rows that are locked, what
is recorded is no longer current."""
CATCHING_UP_S = 10.0
"""A read model that lags by more than this is catching up, not live."""
RATE_SPAN = timedelta(minutes=1)
"""Over which throughput is measured."""


def partition_status(row: Row[Any], as_of: datetime, minute_began: int) -> PartitionStatus:
    """The status of a partition.

    Args:
        row: Of ``log.watermarks.partition_rows``.
        as_of: The database's time.
        minute_began: The first offset of the last minute.
    """
    owner = None
    if row.owner_member is not None:
        owner = Owner(
            row.owner_group, row.owner_member, row.owner_host, row.owner_pid, row.claimed_at
        )
    seen_s = seconds_between(row.watermarks_at, as_of)
    # A time in the future was recorded before the clock was set back: it can be of any age.
    is_current = owner is not None and seen_s is not None and abs(seen_s) <= SEEN_S_MAX
    offsets_behind = None
    if is_current and row.high_watermark is not None:
        offsets_behind = lag(NextOffset(row.next_offset), NextOffset(row.high_watermark))
    lag_s = None
    if offsets_behind is not None:
        lag_s = 0.0 if offsets_behind == 0 else _age(row.newest_at, as_of)
    return PartitionStatus(
        topic=row.topic,
        partition=row.partition,
        state=_state(row, as_of, offsets_behind, lag_s, owner, is_current=is_current),
        next_offset=row.next_offset,
        end=row.high_watermark,
        seen_at=row.watermarks_at,
        seen_s=seen_s,
        lag=offsets_behind,
        lag_s=lag_s,
        rate=(row.next_offset - minute_began) / RATE_SPAN.total_seconds() if is_current else None,
        kept_s=_kept_s(row, as_of),
        committed_at=row.committed_at,
        owner=owner,
        problem=row.problem,
        problem_fix=row.problem_fix,
        problem_at=row.problem_at,
    )


def _state(
    row: Row[Any],
    as_of: datetime,
    offsets_behind: int | None,
    lag_s: float | None,
    owner: Owner | None,
    *,
    is_current: bool,
) -> PartitionState:
    if row.problem is not None:
        return "ERR"
    if owner is None:
        return "STOP"
    if not is_current:
        return "UNKNOWN"
    if not offsets_behind:
        return "OK"
    still_s = seconds_between(_latest(row.committed_at, row.claimed_at), as_of)
    if still_s is not None and abs(still_s) > LAG_S_MAX:
        return "STALL"
    return "WARN" if lag_s is not None and lag_s > LAG_S_MAX else "OK"


def _kept_s(row: Row[Any], as_of: datetime) -> float | None:
    if row.retention_deadline is None or not row.retention_deadline.is_finite():
        return None
    return float(row.retention_deadline) - as_of.timestamp()


def _latest(*times: datetime | None) -> datetime | None:
    return max(filter(None, times), default=None)


def seconds_between(begin: datetime | None, end: datetime) -> float | None:
    """Negative where ``begin`` is in the future."""
    return None if begin is None else (end - begin).total_seconds()


def _age(begin: datetime | None, end: datetime) -> float | None:
    return None if begin is None else max(0.0, (end - begin).total_seconds())


def projector_status(
    name: str,
    row: Row[Any] | None,
    ours: Projector | None,
    as_of: datetime,
    *,
    attended_since: datetime | None,
    may_be_attended: bool,
    is_rebuilt: bool,
) -> ProjectorStatus:
    """The status of a read model.

    Args:
        name: Its name.
        row: Of ``queries.PROJECTORS``; None if it never ran.
        ours: Its projector in this program; None if this program has none.
        as_of: The database's time.
        attended_since: Since when a process projects it; None if none does.
        may_be_attended: Whether the data is too old to show that no process projects it.
        is_rebuilt: Whether a rebuild is in progress.
    """
    if row is None:
        return ProjectorStatus(name, "never run", 0, 0.0, 0, None, None, None, None)
    lag_s = _age(row.unread_since, as_of) or 0.0
    stuck_since = _latest(row.stuck_since, attended_since) if row.stuck_since else None
    is_unattended = attended_since is None and not may_be_attended
    stuck_s = _age(stuck_since, as_of) or 0.0
    state: ProjectorState = "live"
    if row.state == "broken":
        state = "broken"
    elif ours is None:
        state = "not in this program"
    elif is_unattended and row.lag:
        state = "unattended"
    elif stuck_s > LAG_S_MAX:
        state = "stalled"
    elif is_rebuilt:
        state = "rebuilding"
    elif row.fingerprint not in (None, fingerprint(ours)):
        state = "stale"
    elif is_unattended:
        state = "unattended"
    elif lag_s > CATCHING_UP_S:
        state = "catching up"
    return ProjectorStatus(
        name,
        state,
        int(row.lag),
        lag_s,
        row.dead_letters,
        row.moved_at,
        stuck_since,
        row.built_at,
        row.problem,
    )
