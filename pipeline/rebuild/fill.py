"""Fills the shadow tables of a rebuild: ranges of its work list, taken by several connections."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, Engine, text

from pipeline import failpoints
from pipeline.db import SHADOW_SCHEMA, descriptor, locks, translated
from pipeline.errors import DEADLOCK, ExitCode, PipelineError, TransientError
from pipeline.partitions import OffsetRange, Partition
from pipeline.projection import dead_letters, registry
from pipeline.projection.apply import apply_batch, pin
from pipeline.projection.checkpoints import REBUILD
from pipeline.readmodel.batch import Batch
from pipeline.readmodel.model import Projector
from pipeline.rebuild import work_list

# What a crash of the server loses is computed again: its progress is lost with it.
COMMIT_LAZILY = text("SET LOCAL synchronous_commit = off")
# For a row that another range writes too, however long that takes.
WAIT_FOR_OTHERS = text("SET LOCAL lock_timeout = 0")


class RebuildRunsError(PipelineError):
    """Another process rebuilds or checks the same read model. Nothing was done; wait for it."""

    exit_code = ExitCode.FENCED

    def __init__(self, projector: str, holder: locks.Holder | None = None) -> None:
        detail = f": {holder}" if holder else ""
        super().__init__(f"{projector}: another rebuild or check of it is running{detail}")
        self.projector = projector


class StoppedError(PipelineError):
    """The rebuild was stopped. What it has computed is kept; the same command resumes it."""

    exit_code = ExitCode.DONE


class RebuildProgress(NamedTuple):
    """Offsets taken, and offsets of the log in all."""

    done: int
    total: int


Observe = Callable[[RebuildProgress], None]


class ProgressReporter:
    """Reports the progress of a rebuild, one thread after the other."""

    def __init__(self, observe: Observe, total: int) -> None:
        self._observe = observe
        self._total = total
        self._lock = threading.Lock()

    def report(self, left: int) -> None:
        """Report how much is left on the list."""
        with self._lock:
            self._observe(RebuildProgress(max(0, self._total - left), self._total))


class Fill:
    """Takes the ranges of one rebuild.

    Args:
        projector: Which read model.
        since: The start of the rebuild; after another one has begun, nothing is taken.
        rejected_max: Most events that may be rejected in one range.
    """

    def __init__(self, projector: Projector, since: datetime, rejected_max: int) -> None:
        self._projector = projector
        self._name = projector.name + REBUILD
        self._since = since
        self._rejected_max = rejected_max

    def run(
        self,
        first: Connection,
        engine: Engine,
        jobs: int,
        stop: threading.Event,
        reporter: ProgressReporter,
    ) -> None:
        """Take what is on the list, by several connections; the first error ends them all.

        Args:
            first: A connection that works.
            engine: Gives the others.
            jobs: How many connections work at once.
            stop: Set to end after the present ranges.
            reporter: Called after each range.
        """
        failed = threading.Event()

        def work(db: Connection) -> None:
            try:
                while not (stop.is_set() or failed.is_set()) and self._take_range(db, reporter):
                    pass
            except BaseException:
                failed.set()
                raise

        def work_on_new_connection() -> None:
            with translated(), engine.connect() as db:
                work(db)

        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(work, first)]
            futures += [pool.submit(work_on_new_connection) for _ in range(jobs - 1)]
        for future in futures:
            future.result()

    def _take_range(self, db: Connection, reporter: ProgressReporter) -> bool:
        """Bring a range of the list into the tables; False if none is left to take."""
        try:
            with translated(), db.begin():
                db.execute(COMMIT_LAZILY)
                db.execute(WAIT_FOR_OTHERS)
                pin(db)
                if not registry.is_building(db, self._name, self._since):
                    raise RebuildRunsError(self._projector.name)
                taken = work_list.take(db, self._name)
                if taken is None:
                    return False
                bring_in(
                    db,
                    self._projector,
                    (SHADOW_SCHEMA, self._name),
                    taken.partition,
                    taken.offsets,
                    self._rejected_max,
                )
                failpoints.reach("mid_rebuild", connection_fd=descriptor(db))
                work_list.remove(db, self._name, taken)
        except TransientError as error:
            # Ranges with rejected events write some rows twice, so not in the order of their keys.
            if error.sqlstate != DEADLOCK:
                raise
            return True
        with translated(), db.begin():
            reporter.report(work_list.left(db, self._name))
        return True


def bring_in(
    db: Connection,
    projector: Projector,
    into: tuple[str | None, str],
    partition: Partition,
    offsets: OffsetRange,
    rejected_max: int,
) -> None:
    """Bring a range of the log into a projector's tables, with its dead letters.

    Args:
        db: An open transaction with pinned settings.
        projector: Which read model.
        into: The schema of the tables, None for the live ones, and the name for the bookkeeping.
        partition: The partition.
        offsets: The range.
        rejected_max: Most events that may be rejected.
    """
    schema, name = into
    rejected = apply_batch(
        db, projector, schema, Batch(partition, offsets), rejected_max=rejected_max
    )
    dead_letters.put_aside(db, name, partition, rejected)
