"""One pass: a range of one partition into all read models with the same checkpoint, or nothing.

The tables and the checkpoints change in one transaction. Rejected events become dead letters in it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

import structlog
from sqlalchemy import Connection, Engine, text

from pipeline import failpoints
from pipeline.db import descriptor, transaction, translated
from pipeline.errors import ConfigurationError, LockHeldError
from pipeline.partitions import OffsetRange, Partition
from pipeline.projection import checkpoints, dead_letters
from pipeline.projection.apply import BrokenProjectorError, apply_batch, lock_tables, pin
from pipeline.readmodel.batch import Batch
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.readmodel.model import Projector

log = structlog.get_logger(__name__)

TYPES = text("""
SELECT DISTINCT e.event_type FROM pipeline.events e
WHERE e.topic = :topic AND e."partition" = CAST(:number AS integer)
  AND e."offset" >= CAST(:first AS bigint) AND e."offset" < CAST(:end AS bigint)
  AND e.repeat_of IS NULL AND e.event_type IS NOT NULL
""")
MISSING = text(
    "SELECT name FROM unnest(CAST(:tables AS text[])) AS name WHERE to_regclass(name) IS NULL"
)


class Result(Enum):
    """What a pass did for one projector."""

    DONE = "done"
    LEFT_OUT = "left out"
    """Another session has locked its tables or its checkpoint: next time."""
    BROKEN = "broken"


def _idle(
    db: Connection, projectors: Sequence[Projector], partition: Partition, offsets: OffsetRange
) -> list[str]:
    """Projectors for which a range of the log holds no event.

    Queried only for several tables: the statement of a single table finds nothing as fast.
    """
    if sum(len(projector.tables) for projector in projectors) == 1:
        return []
    key = {"topic": partition.topic, "number": partition.number}
    types = db.execute(TYPES, {**key, "first": offsets.first, "end": offsets.end}).scalars().all()
    return [projector.name for projector in projectors if not any(map(projector.takes, types))]


def project(
    engine: Engine,
    projectors: Sequence[Projector],
    partition: Partition,
    offsets: OffsetRange,
    *,
    rejected_max: int,
) -> dict[str, Result]:
    """Bring projectors with the same checkpoint to the end of a range, in one transaction.

    So a transaction that reads several tables sees them at one instant of the log. A projector is
    left out when another session has locked its tables or its checkpoint, or when it breaks; the
    others continue.

    Args:
        engine: The database.
        projectors: Which. They are taken by name, so two workers cannot deadlock.
        partition: The partition of the log.
        offsets: Begins at the projectors' next offset; ends at most at the log's end.
        rejected_max: Most events that one projector may reject in one pass.

    Raises:
        TransientError: The server is unavailable, or ended the transaction to resolve a conflict.
            Nothing was written, or, if it happened at COMMIT, perhaps everything was: continue.
    """
    results = dict.fromkeys((projector.name for projector in projectors), Result.LEFT_OUT)
    with transaction(engine) as db:
        pin(db)
        locked = checkpoints.lock_together(db, list(results), partition, offsets.first)
        ours = [projector for projector in projectors if projector.name in locked]
        if offsets.first == 0:
            for projector in ours:
                checkpoints.note_build_begun(db, projector.name, fingerprint(projector))
        idle = _idle(db, ours, partition, offsets)
        for projector in sorted(ours, key=lambda projector: projector.name):
            if projector.name in idle:
                results[projector.name] = Result.DONE
            else:
                batch = Batch(partition, offsets, projector.condition())
                results[projector.name] = _apply_to_live_tables(db, projector, batch, rejected_max)
        done = [name for name, result in results.items() if result is Result.DONE]
        if done:
            checkpoints.move_together(db, done, partition, offsets)
        failpoints.reach("after_projection", connection_fd=descriptor(db))
    return results


def _apply_to_live_tables(
    db: Connection, projector: Projector, batch: Batch, rejected_max: int
) -> Result:
    """Bring a batch into the live tables of a projector whose checkpoint is locked."""
    try:
        with _dropped_table_breaks(db, projector), translated(), db.begin_nested():
            # NOWAIT: a TRUNCATE that holds the tables waits for our checkpoint, to reset it.
            lock_tables(db, projector, "ROW EXCLUSIVE MODE NOWAIT")
            rejected = apply_batch(db, projector, None, batch, rejected_max=rejected_max)
            dead_letters.put_aside(db, projector.name, batch.partition, rejected)
    except LockHeldError:
        return Result.LEFT_OUT
    except BrokenProjectorError as broken:
        checkpoints.note_broken(db, projector.name, str(broken))
        log.error(  # noqa: TRY400 - the reason says it all
            "projector_broken", projector=projector.name, reason=str(broken)
        )
        return Result.BROKEN
    if rejected:
        log.warning(
            "events_rejected",
            projector=projector.name,
            topic=batch.partition.topic,
            partition=batch.partition.number,
            offset_first=rejected[0].offset,
            count=len(rejected),
            sqlstates=sorted({event.sqlstate for event in rejected}),
            columns=sorted({event.column for event in rejected if event.column}),
        )
    return Result.DONE


@contextmanager
def _dropped_table_breaks(db: Connection, projector: Projector) -> Iterator[None]:
    """A dropped table breaks its projector only; any other error of the schema stops the loop."""
    try:
        yield
    except ConfigurationError:
        tables = [table.fullname for table in projector.tables]
        if missing := db.execute(MISSING, {"tables": tables}).scalars().all():
            raise BrokenProjectorError(
                f"{', '.join(missing)} is missing: restore it from a copy, whatever its rows"
            ) from None
        raise
