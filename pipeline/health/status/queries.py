"""The queries of `status`.

Whatever the size of the log, a status costs a few index searches per partition, and it reads a
bounded number of the newest rows.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import TypeVar

from sqlalchemy import Connection, Engine, Row, text

from pipeline.catalogue import Catalogue
from pipeline.db import transaction
from pipeline.health import problems
from pipeline.health.recent import RECENT_SPAN, bad_records, read_recent
from pipeline.health.status import find_problems, states
from pipeline.health.status.report import (
    ProjectingWorker,
    ProjectorStatus,
    Standby,
    Status,
)
from pipeline.log.search import first_since
from pipeline.log.watermarks import partition_rows
from pipeline.partitions import NextOffset, OffsetRange, Partition, lag
from pipeline.projection.checkpoints import REBUILD
from pipeline.projection.progress import projector_rows
from pipeline.projection.workers import EXPIRES_AFTER, LiveWorker, living, shared_out
from pipeline.readmodel import Projector
from pipeline.schema.drift import drift

_Row = Row[tuple[object, ...]]

NOW = text("SELECT now()")
REPLAYED = text("""
SELECT pg_last_xact_replay_timestamp() AS replayed_at, pg_is_wal_replay_paused() AS is_paused
WHERE pg_is_in_recovery()
""")


def read_status(engine: Engine, catalogue: Catalogue) -> Status:
    """The state of everything at one moment.

    Args:
        engine: The database, with the schema of this program.
        catalogue: The read models and views of this program.

    Raises:
        TransientError: The database is unavailable.
    """
    projectors = catalogue.models
    with transaction(engine, one_snapshot=True) as db:
        rows = partition_rows(db)
        as_of: datetime = db.execute(NOW).scalar_one()
        standby = _standby(db, as_of)
        a_minute_ago, an_hour_ago = as_of - states.RATE_SPAN, as_of - RECENT_SPAN
        since = first_since(db, [a_minute_ago, an_hour_ago])
        partitions = [
            states.partition_status(
                row, as_of, since.get((_place(row), a_minute_ago), row.next_offset)
            )
            for row in rows
        ]
        came_lately = {
            _place(row): OffsetRange(
                NextOffset(since.get((_place(row), an_hour_ago), row.next_offset)),
                NextOffset(row.next_offset),
            )
            for row in rows
        }
        recent = read_recent(db, came_lately, projectors)
        members = living(db)
        models = _models(db, projectors, as_of, members, standby)
        workers = _workers(members, {_place(row) for row in rows}, projectors)
        drifted = list(drift(db, catalogue))
    found = [
        *find_problems.of_standby(standby, seen_s_max=states.SEEN_S_MAX),
        *find_problems.of_partitions(partitions, as_of),
        *find_problems.of_retention(partitions),
        *find_problems.of_projectors(models, as_of),
        *(problems.NOT_AS_DECLARED.of(name, what=what) for name, what in drifted),
        *bad_records(recent),
    ]
    return Status(
        as_of=as_of,
        standby=standby,
        ok=not any(problem.severity == "error" for problem in found),
        offsets=sum(lag(row.first_offset, row.next_offset) for row in rows),
        lag=_sum(partition.lag for partition in partitions),
        lag_s=_longest([partition.lag_s for partition in partitions if partition.lag != 0]),
        rate=_sum(partition.rate for partition in partitions),
        partitions=partitions,
        projectors=models,
        workers=workers,
        recent=recent,
        problems=found,
    )


_Number = TypeVar("_Number", int, float)


def _sum(values: Iterable[_Number | None]) -> _Number | None:
    """None where there is nothing, or one of them is unknown: then so is the sum."""
    known = list(values)
    if not known or None in known:
        return None
    return sum(value for value in known if value is not None)


def _longest(values: Sequence[float | None]) -> float | None:
    """None where one of them is unknown; 0 where nothing lags."""
    return None if None in values else max((it for it in values if it is not None), default=0.0)


def _standby(db: Connection, as_of: datetime) -> Standby | None:
    row = db.execute(REPLAYED).one_or_none()
    if row is None:
        return None
    return Standby(row.replayed_at, states.seconds_between(row.replayed_at, as_of), row.is_paused)


# -------------------------------------------------------------------------------- of partitions


def _place(row: _Row) -> Partition:
    return Partition(row.topic, row.partition)


# -------------------------------------------------------------------------------- of read models


def _models(
    db: Connection,
    projectors: Sequence[Projector],
    as_of: datetime,
    members: Sequence[LiveWorker],
    standby: Standby | None,
) -> list[ProjectorStatus]:
    """The read models, also those that only the database has.

    On a standby that lags, the heartbeats of the workers are too old to show which are active.
    """
    lags = standby is not None and (
        standby.age_s is None or standby.age_s > EXPIRES_AFTER.total_seconds()
    )
    rows = projector_rows(db)
    ours = {model.name: model for model in projectors}
    live = sorted({name for name in rows if not name.endswith(REBUILD)} | set(ours))
    return [
        states.projector_status(
            name,
            rows.get(name),
            ours.get(name),
            as_of,
            attended_since=min((it.since for it in members if name in it.projectors), default=None),
            may_be_attended=lags,
            is_rebuilt=name + REBUILD in rows,
        )
        for name in live
    ]


def _workers(
    members: Sequence[LiveWorker],
    partitions: Collection[Partition],
    projectors: Iterable[Projector],
) -> list[ProjectingWorker]:
    shares = [shared_out(members, model.name, partitions) for model in projectors]
    return [
        ProjectingWorker(
            member.host,
            member.pid,
            member.since,
            [
                partition
                for partition in sorted(partitions)
                if any(share.get(partition) == member.worker for share in shares)
            ],
        )
        for member in members
    ]
