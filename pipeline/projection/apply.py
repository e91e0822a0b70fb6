"""One batch of events into the tables of one projector, without the events that it rejects.

The statements run on the whole batch. Only when PostgreSQL reports that a value is wrong are the
rejected events searched: one screening query names them with their columns; what it does not see is
found by bisecting the range. The other events are applied.
"""

from typing import NamedTuple

from sqlalchemy import Connection, text

from pipeline.db import identifiers, translated
from pipeline.errors import ExitCode, PipelineError, PoisonRecordError
from pipeline.log.search import count_by_type
from pipeline.partitions import Offset
from pipeline.readmodel.batch import Batch
from pipeline.readmodel.compiler import compile_declared, rows_of, screening_of, table_name
from pipeline.readmodel.model import Custom, CustomBatch, Declared, Projector

MATCHING_MIN = 100
"""A projector that rejects half of its events is broken, but only if there are at least so many."""

# The plan must know the range, or it would touch every segment; a batch is sorted in memory, and is
# too short to be worth compiling.
PIN = text("""
SELECT set_config('plan_cache_mode', 'force_custom_plan', true), set_config('jit', 'off', true),
       set_config('work_mem', '64MB', true)
""")


class BrokenProjectorError(PipelineError):
    """The projector's table is gone, or it rejects too many events. Repair it, then rebuild."""

    exit_code = ExitCode.REFUSED


class RejectedEvent(NamedTuple):
    """An event that a read model could not take.

    Attributes:
        offset: Its offset.
        sqlstate: PostgreSQL's code for what is wrong.
        column: The column whose value is wrong; None where it is not known.
    """

    offset: Offset
    sqlstate: str
    column: str | None


def pin(db: Connection) -> None:
    """Have PostgreSQL plan for one range of the log, until the transaction ends."""
    db.execute(PIN)


def lock_tables(db: Connection, projector: Projector, mode: str) -> None:
    """Lock the projector's tables, always in the same order."""
    db.execute(text(f"LOCK TABLE {identifiers.listed(projector.tables)} IN {mode}"))


def apply_batch(
    db: Connection,
    projector: Projector,
    schema: str | None,
    batch: Batch,
    *,
    rejected_max: int | None = None,
) -> list[RejectedEvent]:
    """Bring a batch into the projector's tables in ``schema``, except the rejected events.

    Args:
        db: An open transaction with pinned settings.
        projector: Whose statements.
        schema: Of the tables that a rebuild computes; None for the live ones.
        batch: The events.
        rejected_max: Most events that may be rejected; None for any number.

    Returns:
        The rejected events, in the order of the log.

    Raises:
        BrokenProjectorError: More events are rejected than may be, or half of many.
    """
    if _try(db, projector, schema, batch) is None:
        return []
    rejected = _screen(db, projector, batch)
    matching = 0 if rejected_max is None else _matching(db, projector, batch)
    budget = _Budget(rejected_max, matching)
    budget.spend(len(rejected))
    others = batch.without([event.offset for event in rejected])
    rejected += _bisect(db, projector, schema, others, budget)
    return sorted(rejected)


class _Budget:
    """How many events may be rejected before the projector itself is taken for broken.

    Args:
        rejected_max: Most of them; None for any number.
        matching: How many events the projector takes in this pass.
    """

    def __init__(self, rejected_max: int | None, matching: int) -> None:
        self._rejected_max = rejected_max
        self._matching = matching
        self._rejected = 0

    def spend(self, count: int) -> None:
        self._rejected += count
        if self._rejected_max is None:
            return
        half_of_many = self._matching >= MATCHING_MIN and self._rejected * 2 >= self._matching
        if self._rejected > self._rejected_max or half_of_many:
            raise BrokenProjectorError(
                f"at least {self._rejected} of {self._matching} events in one pass were rejected"
            )


def _matching(db: Connection, projector: Projector, batch: Batch) -> int:
    """How many events of the range the projector takes."""
    types = count_by_type(db, batch.partition, batch.offsets)
    return sum(count for event_type, count in types.items() if projector.takes(event_type))


def _try(
    db: Connection, projector: Projector, schema: str | None, batch: Batch
) -> PoisonRecordError | None:
    try:
        with translated(), db.begin_nested():
            _run(db, projector, schema, batch)
    except PoisonRecordError as error:
        return error
    return None


def _run(db: Connection, projector: Projector, schema: str | None, batch: Batch) -> None:
    match projector:
        case Declared():
            parameters = batch.parameters
            for statement in compile_declared(projector, schema).clauses:
                db.execute(statement, parameters)
        case Custom():
            given = CustomBatch(table_name(projector, schema), rows_of(projector), batch.parameters)
            projector.apply(db, given)


def _screen(db: Connection, projector: Projector, batch: Batch) -> list[RejectedEvent]:
    screening = (
        screening_of(projector)
        if isinstance(projector, Custom)
        else compile_declared(projector).screening
    )
    found: dict[Offset, RejectedEvent] = {}
    for offset, column, sqlstate in db.execute(text(screening), batch.parameters):
        found.setdefault(offset, RejectedEvent(Offset(offset), sqlstate, column))
    return list(found.values())


def _bisect(
    db: Connection, projector: Projector, schema: str | None, batch: Batch, budget: _Budget
) -> list[RejectedEvent]:
    error = _try(db, projector, schema, batch)
    if error is None:
        return []
    if batch.offsets.span == 1:
        budget.spend(1)
        return [RejectedEvent(Offset(batch.offsets.first), error.sqlstate, error.column)]
    return [
        event for half in batch.halves() for event in _bisect(db, projector, schema, half, budget)
    ]
