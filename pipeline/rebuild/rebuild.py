"""Rebuild: compute a read model anew beside the live one, then make the live one equal to it.

1. tables beside the live ones, filled from a work list of ranges of the log by one or several
   connections, each range struck off in the transaction that takes it, so a killed rebuild goes on
   where it was; the newest version of a row wins, so their order does not matter
2. one last transaction: stop the live projector, not the readers; bring both to the same place;
   delete, change and insert what differs; count it

Views, grants and comments stay, and the count is the proof (0) or the alarm. Readers see the old
table until the last transaction commits.
"""

import threading
from collections.abc import Callable

import structlog
from sqlalchemy import Engine, text

from pipeline.db import transaction
from pipeline.errors import TransientError
from pipeline.projection import checkpoints
from pipeline.projection.loop import Limits, Progress, run_projection
from pipeline.readmodel.model import Projector
from pipeline.rebuild.comparison import Difference
from pipeline.rebuild.shadow import (
    CHUNK_OFFSETS,
    LOCK_WAIT,
    Observe,
    RebuildProgress,
    RebuildRunsError,
    Shadow,
    StoppedError,
    insist,
)

__all__ = [
    "Difference",
    "RebuildProgress",
    "RebuildRunsError",
    "StoppedError",
    "check",
    "rebuild",
    "rebuild_in_place",
]

log = structlog.get_logger(__name__)

TRUNCATIONS_MAX = 3
"""How often a check begins again because the table was truncated under it."""


def rebuild(
    engine: Engine,
    projector: Projector,
    *,
    guilty_max: int = 1000,
    chunk_offsets: int = CHUNK_OFFSETS,
    jobs: int = 1,
    stop: threading.Event | None = None,
    observe: Observe = lambda _: None,
) -> Difference:
    """Make the live tables equal to what the log gives, without stopping readers.

    A killed rebuild is gone on with by the next call. A broken projector is live again afterwards.

    Args:
        engine: The database, with the schema of this program.
        projector: Which read model.
        guilty_max: Most events that may be refused in one chunk.
        chunk_offsets: Most offsets of one transaction while nobody waits for it.
        jobs: How many connections fill the tables at once.
        stop: Set it to end after the ranges in hand.
        observe: Called after each range, by one thread at a time.

    Returns:
        What differed, now repaired.

    Raises:
        RebuildRunsError: Somebody else rebuilds the same read model.
        BrokenProjectorError: The projector refuses too many events.
        StoppedError: It was told to stop.
        TransientError: The server went away, or the tables were not to be had; call again.
    """
    with Shadow.alone(engine, projector, guilty_max, chunk_offsets) as shadow:
        insist(shadow.prepare, projector)
        shadow.advance(engine, jobs, stop or threading.Event(), observe)
        difference = insist(shadow.reconcile, projector)
    log.info("rebuilt", **difference._asdict(), differing=difference.differing)
    return difference


def check(
    engine: Engine,
    projector: Projector,
    *,
    guilty_max: int = 1000,
    chunk_offsets: int = CHUNK_OFFSETS,
    jobs: int = 1,
    stop: threading.Event | None = None,
    observe: Observe = lambda _: None,
) -> Difference:
    """Compare the live tables with what the log gives, at one place, and change nothing.

    Neither readers nor the live projector wait. Arguments and errors are those of ``rebuild``.
    """
    with Shadow.alone(engine, projector, guilty_max, chunk_offsets) as shadow:
        for _ in range(TRUNCATIONS_MAX):
            insist(shadow.prepare, projector)
            shadow.advance(engine, jobs, stop or threading.Event(), observe, beyond_live=False)
            difference = shadow.compare()
            shadow.drop()
            if difference is not None:
                log.info("checked", **difference._asdict(), differing=difference.differing)
                return difference
    raise TransientError(f"{projector.name}: was truncated again and again during the check")


def rebuild_in_place(
    engine: Engine,
    projector: Projector,
    limits: Limits | None = None,
    *,
    stop: threading.Event | None = None,
    observe: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Empty the live tables and fill them again, from the log's beginning to its present end.

    Readers see them fill. Live workers help. A process killed in between leaves tables that go on
    filling as soon as any worker runs.

    Raises:
        RebuildRunsError: Somebody else rebuilds the same read model.
        TransientError: The server stayed away, or the tables were not to be had.
    """
    with Shadow.alone(engine, projector) as shadow:
        shadow.drop()
        insist(lambda: _truncate(engine, projector), projector)
        run_projection(engine, [projector], limits, stop=stop, until_end=True, observe=observe)


def _truncate(engine: Engine, projector: Projector) -> None:
    with transaction(engine) as db:
        checkpoints.register(db, [projector.name])
        db.execute(LOCK_WAIT)
        names = ", ".join(sorted(f'"{one.schema}"."{one.name}"' for one in projector.tables))
        db.execute(text(f"TRUNCATE {names}"))
