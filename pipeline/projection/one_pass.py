"""One pass: a range of one partition into all read models with the same checkpoint, or nothing.

The tables and the checkpoints change in one transaction. Rejected events become dead letters in it.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

import structlog
from sqlalchemy import Connection, Engine

from pipeline import failpoints
from pipeline.db import descriptor, transaction, translated
from pipeline.errors import ConfigurationError, InvariantError, LockHeldError
from pipeline.foreign_objects import (
    REFUSING,
    SILENT,
    Foreign,
    changes_of,
    fixes_of,
    foreign_objects,
)
from pipeline.log.search import count_by_type
from pipeline.partitions import OffsetRange, Partition
from pipeline.projection import checkpoints, dead_letters, registry
from pipeline.projection.apply import BrokenProjectorError, apply_batch, lock_tables, pin
from pipeline.readmodel.batch import Batch
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.readmodel.model import Projector

log = structlog.get_logger(__name__)


class Result(Enum):
    """What a pass did for one projector."""

    DONE = "done"
    LEFT_OUT = "left out"
    """Another session has locked its tables or its checkpoint, or it was just rebuilt by another
    definition: next time."""
    BROKEN = "broken"


def _idle(
    db: Connection, projectors: Sequence[Projector], partition: Partition, offsets: OffsetRange
) -> list[str]:
    """Projectors for which a range of the log holds no event.

    Queried only for several tables: the statement of a single table finds nothing as fast.
    """
    if sum(len(projector.tables) for projector in projectors) == 1:
        return []
    types = count_by_type(db, partition, offsets)
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
        # A rebuild may have put a table of another definition in place since the range was planned.
        stale = registry.stale(db, {of.name: fingerprint(of) for of in projectors})
        ours = [of for of in projectors if of.name in locked and of.name not in stale]
        if offsets.first == 0:
            for projector in ours:
                registry.note_build_begun(db, projector.name, fingerprint(projector))
        idle = _idle(db, ours, partition, offsets)
        for projector in sorted(ours, key=lambda projector: projector.name):
            if projector.name in idle:
                results[projector.name] = Result.DONE
            else:
                batch = Batch(partition, offsets)
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
        with _changed_tables_break(db, projector), translated(), db.begin_nested():
            # NOWAIT: a TRUNCATE that holds the tables waits for our checkpoint, to reset it.
            lock_tables(db, projector, "ROW EXCLUSIVE MODE NOWAIT")
            rejected = apply_batch(db, projector, None, batch, rejected_max=rejected_max)
            if rejected:
                _refuse_changed_tables(db, projector)
            dead_letters.put_aside(db, projector.name, batch.partition, rejected)
    except LockHeldError:
        return Result.LEFT_OUT
    except BrokenProjectorError as broken:
        _note_broken(db, projector.name, str(broken))
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
            effect="they are dead letters now; the other events were applied",
            action=f"pipeline dead-letters list {projector.name}",
        )
    return Result.DONE


@contextmanager
def _changed_tables_break(db: Connection, projector: Projector) -> Iterator[None]:
    """Where somebody has changed the tables, what PostgreSQL refuses breaks this projector alone.

    No event is rejected and no right is reported as missing for it, and the others continue.
    """
    try:
        yield
    except (BrokenProjectorError, ConfigurationError, InvariantError) as error:
        kinds = REFUSING if isinstance(error, ConfigurationError) else None
        _refuse_changed_tables(db, projector, kinds)
        raise


def _refuse_changed_tables(
    db: Connection, projector: Projector, kinds: Collection[str] | None = None
) -> None:
    found = foreign_objects(db, projector.tables)
    if found := [foreign for foreign in found if kinds is None or foreign.kind in kinds]:
        raise BrokenProjectorError(why_broken(projector.name, found))


def why_broken(projector: str, found: Sequence[Foreign]) -> str:
    """What an operator reads about tables that somebody has changed."""
    return (
        f"{changes_of(found)}. To fix it: {fixes_of(found)}. "
        f"Then run `pipeline rebuild {projector}`"
    )


def break_changed(db: Connection, projectors: Collection[Projector]) -> None:
    """Break projectors whose tables have a trigger or a rule that may leave out rows silently."""
    owners = {table.fullname: model.name for model in projectors for table in model.tables}
    every = foreign_objects(db, [table for model in projectors for table in model.tables])
    found = [foreign for foreign in every if foreign.kind in SILENT]
    for projector in sorted({owners[foreign.table] for foreign in found}):
        on_its_tables = [foreign for foreign in found if owners[foreign.table] == projector]
        _note_broken(db, projector, why_broken(projector, on_its_tables))


def _note_broken(db: Connection, projector: str, reason: str) -> None:
    if registry.note_broken(db, projector, reason):
        log.error("read_model_broken", projector=projector, reason=reason)
