"""A projector's turn: one batch of events into its tables, and its checkpoint, or neither.

The statements run as they are. Only when PostgreSQL says that a value is at fault are the guilty
events looked for: one screening query names them with their columns; whatever it does not see is
found by halving the range. They are put aside, the others land.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

import structlog
from sqlalchemy import Connection, Engine, text

from pipeline import dead_letters, failpoints
from pipeline.db import READ_SCHEMA, descriptor, transaction, translated
from pipeline.dead_letters import Fault
from pipeline.errors import (
    ConfigurationError,
    ExitCode,
    InvariantError,
    LockHeldError,
    PipelineError,
    PoisonRecordError,
)
from pipeline.foreign_objects import REFUSING, SILENT, Foreign, foreign_objects
from pipeline.positions import NextOffset, Offset, OffsetRange, Partition, after
from pipeline.projection import checkpoints
from pipeline.projection.batch import Batch
from pipeline.projection.compiler import compile_declared
from pipeline.projection.declaration import Custom, Declared, Projector
from pipeline.projection.fingerprint import fingerprint

log = structlog.get_logger(__name__)

MATCHING_MIN = 100
"""Half of the events guilty breaks a projector, but only if there are at least so many."""

# The plan must know the range, or it would touch every segment; a batch is sorted in memory, and is
# too short to be worth compiling.
PIN = text("""
SELECT set_config('plan_cache_mode', 'force_custom_plan', true), set_config('jit', 'off', true),
       set_config('work_mem', '64MB', true)
""")
TYPES = text("""
SELECT DISTINCT e.event_type FROM pipeline.events e
WHERE e.topic = :topic AND e."partition" = CAST(:number AS integer)
  AND e."offset" >= CAST(:first AS bigint) AND e."offset" < CAST(:end AS bigint)
  AND e.repeat_of IS NULL AND e.event_type IS NOT NULL
""")
SEARCH_IN = text("SELECT set_config('search_path', :schema, true)")


class BrokenProjectorError(PipelineError):
    """Somebody has changed or dropped its table, or it refuses too many events. Fix, rebuild."""

    exit_code = ExitCode.REFUSED


class Result(Enum):
    """How a turn ended."""

    DONE = "done"
    LEFT_OUT = "left out"
    """Somebody holds the tables or has the turn: next time."""
    BROKEN = "broken"


def pin(db: Connection) -> None:
    """Have PostgreSQL plan for one range of the log, until the transaction ends."""
    db.execute(PIN)


def _idle(
    db: Connection, projectors: Sequence[Projector], partition: Partition, offsets: OffsetRange
) -> list[str]:
    """Projectors for which a range of the log holds nothing.

    Asked only where it is worth a look at the whole range: the statement of a single table finds
    nothing as fast.
    """
    if sum(len(one.tables) for one in projectors) == 1:
        return []
    place = {"topic": partition.topic, "number": partition.number}
    types = db.execute(TYPES, {**place, "first": offsets.first, "end": offsets.end}).scalars().all()
    return [one.name for one in projectors if not any(map(one.takes, types))]


def project(
    engine: Engine,
    projectors: Sequence[Projector],
    partition: Partition,
    offsets: OffsetRange,
    *,
    guilty_max: int,
) -> dict[str, Result]:
    """One pass: bring projectors that stand at the same place over the same range, all at once.

    One transaction, so whoever reads several tables in one sees them at one instant of the log.
    A projector whose tables are held, whose turn is somebody else's, or that breaks, is left out;
    the others go on.

    Args:
        engine: The database.
        projectors: Which; they take their turns by name, so two workers cannot deadlock.
        partition: The partition of the log.
        offsets: Begins where the projectors stand; ends at most at the log's end.
        guilty_max: Most events that one projector may put aside in one pass.

    Raises:
        TransientError: The server went away or ended the transaction to resolve a conflict;
            nothing happened, or, if it was at COMMIT, all of it may have: just go on.
    """
    results = dict.fromkeys((one.name for one in projectors), Result.LEFT_OUT)
    with transaction(engine) as db:
        pin(db)
        held = checkpoints.hold_together(db, list(results), partition, offsets.first)
        ours = [one for one in projectors if one.name in held]
        if offsets.first == 0:
            for one in ours:
                checkpoints.note_build_begun(db, one.name, fingerprint(one))
        idle = _idle(db, ours, partition, offsets)
        for one in sorted(ours, key=lambda projector: projector.name):
            if one.name in idle:
                results[one.name] = Result.DONE
            else:
                batch = Batch(partition, offsets, one.condition())
                results[one.name] = _take_turn(db, one, batch, guilty_max)
        done = [name for name, result in results.items() if result is Result.DONE]
        if done:
            checkpoints.move_together(db, done, partition, offsets)
        failpoints.reach("after_projection", connection_fd=descriptor(db))
    return results


def _take_turn(db: Connection, projector: Projector, batch: Batch, guilty_max: int) -> Result:
    """Bring a batch into the live tables of a projector whose checkpoint is ours."""
    try:
        with _tables_unchanged(db, projector), translated(), db.begin_nested():
            # Not waited for: a TRUNCATE that has them waits for our checkpoint, to put it back.
            lock_tables(db, projector, "ROW EXCLUSIVE MODE NOWAIT")
            faults = fill(db, projector, READ_SCHEMA, batch, guilty_max=guilty_max)
            if faults:
                _refuse_changed_tables(db, projector)
            dead_letters.put_aside(db, projector.name, batch.partition, faults)
    except LockHeldError:
        return Result.LEFT_OUT
    except BrokenProjectorError as broken:
        _note_broken(db, projector.name, str(broken))
        return Result.BROKEN
    if faults:
        log.warning(
            "dead_letters",
            projector=projector.name,
            topic=batch.partition.topic,
            partition=batch.partition.number,
            offset_first=faults[0].offset,
            count=len(faults),
            sqlstates=sorted({fault.sqlstate for fault in faults}),
            columns=sorted({fault.column for fault in faults if fault.column}),
        )
    return Result.DONE


def lock_tables(db: Connection, projector: Projector, mode: str) -> None:
    """Lock the projector's tables, always in the same order."""
    names = ", ".join(sorted(f'"{table.schema}"."{table.name}"' for table in projector.tables))
    db.execute(text(f"LOCK TABLE {names} IN {mode}"))


@contextmanager
def _tables_unchanged(db: Connection, projector: Projector) -> Iterator[None]:
    """Where somebody has changed the tables, what PostgreSQL refuses breaks this projector alone.

    Neither an event nor a right is blamed for it, and the others continue.
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
    if found := [one for one in found if kinds is None or one.kind in kinds]:
        raise BrokenProjectorError(why_broken(projector.name, found))


def why_broken(projector: str, found: Sequence[Foreign]) -> str:
    """What an operator reads of tables that somebody has changed."""
    changed = "; ".join(f"{one.table} {one.what}" for one in found)
    fixes = "; ".join(dict.fromkeys(one.fix for one in found))
    return f"{changed}. To fix it: {fixes}. Then run `pipeline rebuild {projector}`"


def break_changed(db: Connection, projectors: Collection[Projector]) -> None:
    """Break projectors whose tables have a trigger or a rule that may leave out rows silently."""
    tables = {f"{one.schema}.{one.name}": it.name for it in projectors for one in it.tables}
    every = foreign_objects(db, [table for it in projectors for table in it.tables])
    found = [one for one in every if one.kind in SILENT]
    for projector in sorted({tables[one.table] for one in found}):
        theirs = [one for one in found if tables[one.table] == projector]
        _note_broken(db, projector, why_broken(projector, theirs))


def _note_broken(db: Connection, projector: str, reason: str) -> None:
    if checkpoints.note_broken(db, projector, reason):
        log.error("projector_broken", projector=projector, reason=reason)


def fill(
    db: Connection,
    projector: Projector,
    schema: str,
    batch: Batch,
    *,
    guilty_max: int | None = None,
) -> list[Fault]:
    """Bring a batch into the projector's tables in ``schema``, all of it but the guilty events.

    Args:
        db: An open transaction with pinned settings.
        projector: Whose statements.
        schema: That of the live tables, or of those beside them.
        batch: The events.
        guilty_max: Most events that may be guilty; None for any number.

    Returns:
        The guilty events, in the order of the log.

    Raises:
        BrokenProjectorError: More events are guilty than may be, or half of many.
    """
    if _try(db, projector, schema, batch) is None:
        return []
    faults = _screen(db, projector, batch)
    budget = _Budget(db, batch, guilty_max)
    budget.spend(len(faults))
    faults += _halve(
        db, projector, schema, batch.without([fault.offset for fault in faults]), budget
    )
    return sorted(faults)


class _Budget:
    """How many events may be guilty before the projector is."""

    def __init__(self, db: Connection, batch: Batch, guilty_max: int | None) -> None:
        self._allowed: int | None = guilty_max
        self._guilty = 0
        if guilty_max is not None:
            # The condition is the compiler's own constant.
            count = text(f"SELECT count(*) FROM pipeline.events e WHERE {batch.where}")  # noqa: S608
            self._matching: int = db.execute(count, batch.parameters).scalar_one()

    def spend(self, count: int) -> None:
        self._guilty += count
        if self._allowed is None:
            return
        half_of_many = self._matching >= MATCHING_MIN and self._guilty * 2 >= self._matching
        if self._guilty > self._allowed or half_of_many:
            raise BrokenProjectorError(
                f"{self._guilty} or more of {self._matching} events in one pass were refused"
            )


def _try(
    db: Connection, projector: Projector, schema: str, batch: Batch
) -> PoisonRecordError | None:
    try:
        with translated(), db.begin_nested():
            _run(db, projector, schema, batch)
    except PoisonRecordError as refusal:
        return refusal
    return None


def _run(db: Connection, projector: Projector, schema: str, batch: Batch) -> None:
    match projector:
        case Declared():
            parameters = batch.parameters
            for statement in compile_declared(projector, schema).clauses:
                db.execute(statement, parameters)
        case Custom():
            db.execute(SEARCH_IN, {"schema": schema})
            projector.apply(db, batch)


def _screen(db: Connection, projector: Projector, batch: Batch) -> list[Fault]:
    if not isinstance(projector, Declared):
        return []
    query = text(compile_declared(projector, READ_SCHEMA).screening)
    found: dict[Offset, Fault] = {}
    for offset, column, sqlstate in db.execute(query, batch.parameters):
        found.setdefault(offset, Fault(Offset(offset), sqlstate, column))
    return list(found.values())


def _halve(
    db: Connection, projector: Projector, schema: str, batch: Batch, budget: _Budget
) -> list[Fault]:
    refusal = _try(db, projector, schema, batch)
    if refusal is None:
        return []
    if batch.offsets.span == 1:
        budget.spend(1)
        return [Fault(Offset(batch.offsets.first), refusal.sqlstate, refusal.column)]
    return [
        fault for half in batch.halves() for fault in _halve(db, projector, schema, half, budget)
    ]


def retry(
    engine: Engine, projectors: Collection[Projector], names: Collection[str] | None = None
) -> tuple[int, int]:
    """Try dead letters again, each in its own transaction; checkpoints stay where they are.

    An event lands right whenever that is: its version decides, not the moment.

    Args:
        engine: The database.
        projectors: Every projector there is.
        names: Of which projectors; None for all.

    Returns:
        How many have landed, and how many are still refused.
    """
    by_name = {one.name: one for one in projectors}
    wanted = set(by_name) if names is None else set(names)
    with transaction(engine) as db:
        letters = dead_letters.listed(db, wanted & set(by_name))
    landed = 0
    for letter in letters:
        with transaction(engine) as db:
            landed += _retry_one(db, by_name[letter.projector], letter)
    return landed, len(letters) - landed


def _retry_one(db: Connection, projector: Projector, letter: dead_letters.DeadLetter) -> bool:
    pin(db)
    # Tables first, as a TRUNCATE does; it may have come before us and dropped the letter.
    lock_tables(db, projector, "ROW EXCLUSIVE MODE")
    if not dead_letters.lock(db, letter):
        return True
    if not dead_letters.has_event(db, letter):
        return False
    offsets = OffsetRange(NextOffset(letter.offset), after(letter.offset))
    batch = Batch(letter.partition, offsets, projector.condition())
    faults = fill(db, projector, READ_SCHEMA, batch)
    if faults:
        dead_letters.put_aside(db, projector.name, letter.partition, faults)
    else:
        dead_letters.take_back(db, letter)
    return not faults
