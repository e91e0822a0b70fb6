"""Rebuild: recompute a read model beside the live one, then make the live one equal to it.

1. shadow tables, filled from a work list of ranges of the log by one or several connections. Each
   range is removed from the list in the transaction that takes it, so a killed rebuild resumes; the
   newest version of a row wins, so the order of the ranges does not matter
2. one last transaction: stop the live projector, not the readers; bring both to the same
   checkpoints; delete, update and insert what differs; count it

Views, grants and comments stay, and the count is the proof (0) or the alarm. Readers see the old
table until the last transaction commits.
"""

import threading
from collections.abc import Callable

import structlog
from sqlalchemy import Engine, text

from pipeline.db import identifiers, table_locks, transaction
from pipeline.errors import ConfigurationError, TransientError
from pipeline.projection import registry
from pipeline.projection.loop import Limits, ProjectionProgress, run_projection
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.readmodel.model import Projector
from pipeline.rebuild.comparison import Difference
from pipeline.rebuild.fill import Observe, RebuildProgress, RebuildRunsError, StoppedError
from pipeline.rebuild.shadow import CHUNK_OFFSETS, Shadow

__all__ = [
    "Difference",
    "RebuildProgress",
    "RebuildRunsError",
    "StoppedError",
    "check",
    "rebuild",
    "rebuild_if_stale",
    "rebuild_in_place",
]

log = structlog.get_logger(__name__)

TRUNCATIONS_MAX = 3
"""How often a check restarts because the table was truncated meanwhile."""


def rebuild(
    engine: Engine,
    projector: Projector,
    *,
    rejected_max: int = 1000,
    chunk_offsets: int = CHUNK_OFFSETS,
    jobs: int = 1,
    stop: threading.Event | None = None,
    observe: Observe = lambda _: None,
) -> Difference:
    """Make the live tables equal to what the log gives, without stopping readers.

    The next call resumes a killed rebuild. A broken projector is live again afterwards.

    Args:
        engine: The database, with the schema of this program.
        projector: Which read model.
        rejected_max: Most events that may be rejected in one chunk.
        chunk_offsets: Most offsets of one transaction while no other session waits for it.
        jobs: How many connections fill the tables at once.
        stop: Set it to end after the present ranges.
        observe: Called after each range, by one thread at a time.

    Returns:
        What differed, now repaired.

    Raises:
        RebuildRunsError: Another process rebuilds the same read model.
        BrokenProjectorError: The projector rejects too many events.
        StoppedError: ``stop`` was set before the end.
        TransientError: The server is unavailable, or the tables stayed locked; call again.
    """
    with Shadow.exclusive(engine, projector, rejected_max, chunk_offsets) as shadow:
        return _fill_and_reconcile(
            shadow, engine, projector, jobs, stop or threading.Event(), observe
        )


def rebuild_if_stale(
    engine: Engine, projector: Projector, *, rejected_max: int, stop: threading.Event
) -> None:
    """As ``rebuild``, unless another process has finished the same rebuild meanwhile."""
    with Shadow.exclusive(engine, projector, rejected_max) as shadow:
        with transaction(engine) as db:
            is_stale = registry.stale(db, {projector.name: fingerprint(projector)})
        if is_stale:
            _fill_and_reconcile(shadow, engine, projector, 1, stop, lambda _: None)


def _fill_and_reconcile(
    shadow: Shadow,
    engine: Engine,
    projector: Projector,
    jobs: int,
    stop: threading.Event,
    observe: Observe,
) -> Difference:
    table_locks.retry(shadow.prepare, projector.name)
    shadow.advance(engine, jobs, stop, observe)
    difference = table_locks.retry(shadow.reconcile, projector.name)
    log.info("read_model_rebuilt", **difference._asdict(), differing=difference.differing)
    return difference


def check(
    engine: Engine,
    projector: Projector,
    *,
    rejected_max: int = 1000,
    chunk_offsets: int = CHUNK_OFFSETS,
    jobs: int = 1,
    stop: threading.Event | None = None,
    observe: Observe = lambda _: None,
) -> Difference:
    """Compare the live tables with what the log gives, at the same checkpoints; change nothing.

    Neither readers nor the live projector wait. Arguments and errors are those of ``rebuild``.
    """
    with Shadow.exclusive(engine, projector, rejected_max, chunk_offsets) as shadow:
        for _ in range(TRUNCATIONS_MAX):
            table_locks.retry(shadow.prepare, projector.name)
            shadow.advance(engine, jobs, stop or threading.Event(), observe, beyond_live=False)
            difference = shadow.compare()
            shadow.drop()
            if difference is not None:
                log.info(
                    "read_model_compared", **difference._asdict(), differing=difference.differing
                )
                return difference
    raise TransientError(
        f"{projector.name} was truncated {TRUNCATIONS_MAX} times during the check. Nothing was "
        "compared; repeat the command."
    )


def rebuild_in_place(
    engine: Engine,
    projector: Projector,
    limits: Limits | None = None,
    *,
    stop: threading.Event | None = None,
    observe: Callable[[ProjectionProgress], None] = lambda _: None,
) -> None:
    """Empty the live tables and fill them again, from the log's beginning to its present end.

    Readers see them fill. Live workers help. After a kill, any worker that runs fills them further.

    Raises:
        RebuildRunsError: Another process rebuilds the same read model.
        ConfigurationError: The tables must be replaced, which ``rebuild`` does.
        TransientError: The server stayed unavailable, or the tables stayed locked.
    """
    with Shadow.exclusive(engine, projector) as shadow:
        shadow.drop()
        _refuse_other_tables(engine, projector, shadow)
        table_locks.retry(lambda: _truncate(engine, projector), projector.name)
        run_projection(engine, [projector], limits, stop=stop, until_end=True, observe=observe)


def _refuse_other_tables(engine: Engine, projector: Projector, shadow: Shadow) -> None:
    """Tables with other columns than declared cannot be filled; they must be replaced."""
    with transaction(engine) as db:
        if not registry.stale(db, {projector.name: fingerprint(projector)}):
            return
    table_locks.retry(shadow.prepare, projector.name)
    is_replaced = shadow.must_replace()
    shadow.drop()
    if is_replaced:
        raise ConfigurationError(
            f"{projector.name}: its tables have other columns or another key than declared and "
            f"cannot be filled in place. Run `pipeline rebuild {projector.name}` to replace them"
        )


def _truncate(engine: Engine, projector: Projector) -> None:
    with transaction(engine) as db:
        registry.register(db, [projector.name])
        table_locks.limit_wait(db)
        db.execute(text(f"TRUNCATE {identifiers.listed(projector.tables)}"))
