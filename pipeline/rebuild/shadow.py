"""The shadow tables that a rebuild computes: made, filled, compared with the live ones, reconciled.

Their checkpoints, dead letters and work list are kept under the projector's name with the suffix
``REBUILD``, so the process that resumes a killed rebuild finds its progress.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Self

import structlog
from sqlalchemy import Connection, Engine, text

from pipeline import failpoints
from pipeline.db import SHADOW_SCHEMA, descriptor, locks, table_locks, translated, use_one_snapshot
from pipeline.db.identifiers import qualified
from pipeline.errors import (
    ConfigurationError,
)
from pipeline.partitions import NextOffset, OffsetRange, Partition, lag
from pipeline.projection import checkpoints, dead_letters, registry
from pipeline.projection.apply import lock_tables, pin
from pipeline.projection.checkpoints import REBUILD
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.readmodel.model import Projector
from pipeline.rebuild import work_list
from pipeline.rebuild.comparison import Difference, count_shadow, measure, repair
from pipeline.rebuild.fill import (
    Fill,
    Observe,
    ProgressReporter,
    RebuildRunsError,
    StoppedError,
    bring_in,
)

log = structlog.get_logger(__name__)

CHUNK_OFFSETS = 50_000
"""Most offsets of one range; fewer than these may be left to the last transaction."""
EXISTS = text("SELECT to_regclass(:table) IS NOT NULL")
# Functions of the owner, so that any login may resume the rebuild of another one.
MAKE = text("SELECT pipeline.make_shadow(:table)")
DROP = text("SELECT pipeline.drop_shadow(:table)")
OTHERS_ON = text("SELECT pipeline.others_on(:table)")
MUST_SWAP = text("SELECT pipeline.must_swap(:table)")
SWAP = text("SELECT pipeline.swap_read_model(:table)")


class Shadow:
    """The tables beside the live ones, with their own checkpoints and dead letters.

    One connection holds the lock that keeps a second rebuild out, one works, others may help to
    fill the tables. After the lock is lost they may continue until another process resumes the
    rebuild, and no longer.
    """

    def __init__(
        self,
        db: Connection,
        held: locks.Held,
        projector: Projector,
        rejected_max: int,
        chunk_offsets: int,
    ) -> None:
        self._db = db
        self._held = held
        self._chunk_offsets = chunk_offsets
        self._projector = projector
        self._rejected_max = rejected_max
        self._name = projector.name + REBUILD
        # Of the rebuild that `prepare` begins or resumes; until then that of none.
        self._since = datetime.min.replace(tzinfo=UTC)

    @classmethod
    @contextmanager
    def exclusive(
        cls,
        engine: Engine,
        projector: Projector,
        rejected_max: int = 0,
        chunk_offsets: int = CHUNK_OFFSETS,
    ) -> Iterator[Self]:
        """Keep every other rebuild or check of the read model out for the length of the block.

        Args:
            engine: The database, with the schema of this program.
            projector: Which read model.
            rejected_max: Most events that may be rejected in one range.
            chunk_offsets: Most offsets of one range.

        Raises:
            RebuildRunsError: Another process rebuilds the same read model.
        """
        with translated(), ExitStack() as stack:
            try:
                held = stack.enter_context(locks.held(engine, f"rebuild {projector.name}"))
            except locks.LockTakenError as taken:
                raise RebuildRunsError(projector.name, taken.holder) from None
            db = stack.enter_context(engine.connect())
            yield cls(db, held, projector, rejected_max, chunk_offsets)

    # ------------------------------------------------------------------------------- the tables

    def prepare(self) -> None:
        """Resume the interrupted rebuild of this definition, or make empty tables."""
        with translated(), self._transaction():
            built = registry.fingerprints(self._db).get(self._name)
            if built == fingerprint(self._projector) and self._tables_exist():
                log.info("rebuild_resumed", projector=self._projector.name)
            else:
                self._drop()
                for table in self._projector.tables:
                    self._db.execute(MAKE, {"table": table.name})
                registry.register(self._db, [self._projector.name, self._name])
            code = fingerprint(self._projector)
            self._since = registry.note_built(self._db, self._name, code)

    def drop(self) -> None:
        """Remove the tables and all bookkeeping of the rebuild."""
        with translated(), self._transaction():
            self._drop()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """A transaction of the working connection; confirms that we still hold the lock."""
        with self._db.begin():
            self._confirm()
            yield

    def _confirm(self) -> None:
        try:
            self._held.confirm(self._db)
        except locks.LockTakenError as taken:
            raise RebuildRunsError(self._projector.name, taken.holder) from None

    def _drop(self) -> None:
        for table in self._projector.tables:
            self._db.execute(DROP, {"table": table.name})
        dead_letters.forget(self._db, self._name)
        work_list.forget(self._db, self._name)
        checkpoints.forget(self._db, self._name)
        registry.forget(self._db, self._name)

    def _tables_exist(self) -> bool:
        return all(
            self._db.execute(EXISTS, {"table": qualified(table, SHADOW_SCHEMA)}).scalar_one()
            for table in self._projector.tables
        )

    # ------------------------------------------------------------------------------ filling them

    def advance(
        self,
        engine: Engine,
        jobs: int,
        stop: threading.Event,
        observe: Observe,
        *,
        beyond_live: bool = True,
    ) -> None:
        """Fill the tables up to the log's end, as of when the last ranges are taken.

        Args:
            engine: Gives the helping connections.
            jobs: How many connections work at once, this one among them.
            stop: Set to end after the present ranges.
            observe: Called after each range.
            beyond_live: To the log's end; else at most to the live projector's checkpoint.
        """
        planned = self._chunk_offsets
        while planned >= self._chunk_offsets:
            planned, total = table_locks.retry(
                lambda: self._plan(beyond_live=beyond_live), self._projector.name
            )
            fill = Fill(self._projector, self._since, self._rejected_max)
            fill.run(self._db, engine, jobs, stop, ProgressReporter(observe, total))
            if stop.is_set() and self._left():
                name = self._projector.name
                raise StoppedError(
                    f"{name}: the rebuild was stopped and the table is unchanged. The same "
                    "command resumes it."
                )

    def _plan(self, *, beyond_live: bool) -> tuple[int, int]:
        """Put on the list what the log has after the rebuild's checkpoints.

        Returns:
            Offsets on the list, and offsets of the log in all.
        """
        db, name = self._db, self._name
        with translated(), self._transaction():
            # Waits for a rewind in progress, which moves the checkpoints back.
            checkpoints.lock_all(db, name)
            partitions = checkpoints.progress(db, [name])
            if not beyond_live:
                live = checkpoints.next_offsets(db, self._projector.name)
                partitions = [
                    progress._replace(log_end=live.get(progress.partition, NextOffset(0)))
                    for progress in partitions
                ]
            for progress in partitions:
                if progress.lag:
                    begin = max(progress.next_offset, progress.log_first)
                    new = OffsetRange(begin, progress.log_end)
                    work_list.put(db, name, progress.partition, new, span_max=self._chunk_offsets)
                    planned = OffsetRange(progress.next_offset, progress.log_end)
                    checkpoints.move_together(db, [name], progress.partition, planned)
            total = sum(lag(progress.log_first, progress.log_end) for progress in partitions)
            return work_list.left(db, name), total

    def _left(self) -> int:
        with translated(), self._db.begin():
            return work_list.left(self._db, self._name)

    def _catch_up(
        self,
        schema: str | None,
        name: str,
        next_offsets: Mapping[Partition, NextOffset],
        goal: Mapping[Partition, NextOffset],
    ) -> None:
        for partition, end in sorted(goal.items()):
            begin = next_offsets.get(partition)
            if begin is None:
                begin = NextOffset(0)
                checkpoints.set_next_offsets(self._db, name, {partition: begin})
            if begin < end:
                bring_in(
                    self._db,
                    self._projector,
                    (schema, name),
                    partition,
                    OffsetRange(begin, end),
                    self._rejected_max,
                )
                checkpoints.move_together(self._db, [name], partition, OffsetRange(begin, end))

    # --------------------------------------------------------------------------------- comparing

    def compare(self) -> Difference | None:
        """What differs at the live projector's checkpoints; None if it was truncated."""
        db, name = self._db, self._projector.name
        with translated(), db.begin():
            use_one_snapshot(db)
            # Before the snapshot, which would not see a TRUNCATE after it.
            lock_tables(db, self._projector, "ACCESS SHARE MODE")
            self._confirm()
            pin(db)
            live = checkpoints.next_offsets(db, name)
            shadow = checkpoints.lock_all(db, self._name)
            if any(
                next_offset > live.get(partition, 0) for partition, next_offset in shadow.items()
            ):
                return None
            self._catch_up(SHADOW_SCHEMA, self._name, shadow, live)
            return self._measured(records_lag=0)

    def reconcile(self) -> Difference:
        """Make the live tables equal and end the rebuild; the live projector waits meanwhile."""
        db, name = self._db, self._projector.name
        with translated(), self._transaction():
            table_locks.limit_wait(db)
            lock_tables(db, self._projector, "SHARE ROW EXCLUSIVE MODE")
            pin(db)
            live = checkpoints.lock_all(db, name)
            shadow = checkpoints.lock_all(db, self._name)
            goal = {
                partition: max(
                    live.get(partition, NextOffset(0)), shadow.get(partition, NextOffset(0))
                )
                for partition in live | shadow
            }
            self._catch_up(SHADOW_SCHEMA, self._name, shadow, goal)
            records_lag = sum(
                lag(live.get(partition, NextOffset(0)), end) for partition, end in goal.items()
            )
            is_replaced = self._must_swap()
            is_followed = records_lag < self._chunk_offsets and registry.is_live(db, name)
            if is_followed and not is_replaced:
                self._catch_up(None, name, live, goal)
                records_lag = 0
            failpoints.reach("before_swap", connection_fd=descriptor(db))
            if is_replaced:
                difference = self._swap(records_lag=records_lag)
            else:
                difference = self._measured(records_lag=records_lag)
                if difference.differing:
                    repair(db, self._projector)
            dead_letters.forget(db, name)
            dead_letters.hand_over(db, self._name, name)
            checkpoints.set_next_offsets(db, name, goal)
            registry.note_built(db, name, fingerprint(self._projector))
            self._drop()
            failpoints.reach("after_swap", connection_fd=descriptor(db))
        return difference

    def must_replace(self) -> bool:
        """Whether a live table has other columns or another key than it is declared to have."""
        with translated(), self._transaction():
            return self._must_swap()

    def _must_swap(self) -> bool:
        """Whether a live table has other columns or another key than it is declared to have."""
        return any(
            self._db.execute(MUST_SWAP, {"table": table.name}).scalar_one()
            for table in self._projector.tables
        )

    def _swap(self, *, records_lag: int) -> Difference:
        """Put the tables in the place of the live ones; readers wait for this instant only.

        Raises:
            ConfigurationError: Others have made objects on them, which would be lost.
        """
        rows = 0
        for table in self._projector.tables:
            if others := self._db.execute(OTHERS_ON, {"table": table.name}).scalar_one():
                raise ConfigurationError(
                    f"{table.fullname} must be replaced, and others have made objects on it, which "
                    f"would be lost: {'; '.join(others)}. Nothing was changed. Have their owners "
                    "drop them, then repeat `pipeline rebuild`"
                )
        for table in self._projector.tables:
            rows += self._db.execute(text(count_shadow(table))).scalar_one()
            self._db.execute(SWAP, {"table": table.name})
        letters = len(dead_letters.listed(self._db, [self._name]))
        return Difference(
            self._projector.name, rows, 0, 0, 0, records_lag, letters, is_replaced=True
        )

    def _measured(self, *, records_lag: int) -> Difference:
        letters = len(dead_letters.listed(self._db, [self._name]))
        return measure(self._db, self._projector, lag=records_lag, dead_letters=letters)
