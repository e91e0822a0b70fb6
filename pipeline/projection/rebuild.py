"""Rebuild: compute a read model anew beside the live one, then make the live one equal to it.

1. tables beside the live ones, filled in chunks, each with its progress in one transaction, so a
   killed rebuild goes on where it was
2. one last transaction: stop the live projector, not the readers; bring both to the same place;
   delete, change and insert what differs; count it

Views, grants and comments stay, and the count is the proof (0) or the alarm. Readers see the old
table until the last transaction commits.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Self, TypeVar

import structlog
from sqlalchemy import Connection, Engine, Table, text

from pipeline import dead_letters, failpoints
from pipeline.db import READ_SCHEMA, descriptor, transaction, translated
from pipeline.errors import ExitCode, LockHeldError, PipelineError, TransientError
from pipeline.positions import NextOffset, OffsetRange, Partition, lag
from pipeline.projection import checkpoints
from pipeline.projection.batch import Batch
from pipeline.projection.checkpoints import REBUILD, Standing
from pipeline.projection.declaration import Projector
from pipeline.projection.fingerprint import fingerprint
from pipeline.projection.loop import Limits, Progress, run_projection
from pipeline.projection.turn import fill, lock_tables, pin

log = structlog.get_logger(__name__)

SHADOW_SCHEMA = "pipeline_shadow"

CHUNK_OFFSETS = 50_000
"""Offsets of one transaction of a rebuild; fewer than these may be left to the last one."""
SWAP_ATTEMPTS_MAX = 20
"""How often the live table's lock is asked for; each time for LOCK_WAIT."""
TRUNCATIONS_MAX = 3
"""How often a check begins again because the table was truncated under it."""

# A waiting request for the lock makes later writers wait behind it, so it must give up soon.
LOCK_WAIT = text("SET LOCAL lock_timeout = '3s'")
# What a crash takes is computed again: its progress is lost together with it.
COMMIT_LAZILY = text("SET LOCAL synchronous_commit = off")
ONE_SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
TAKE = text("SELECT pg_try_advisory_lock(hashtextextended('pipeline.rebuild ' || :projector, 0))")
LEAVE = text("SELECT pg_advisory_unlock(hashtextextended('pipeline.rebuild ' || :projector, 0))")
EXISTS = text("SELECT to_regclass(:table) IS NOT NULL")
# Through functions of the owner's, so that any login may go on where another one was killed.
MAKE = text("SELECT pipeline.make_shadow(:table)")
DROP = text("SELECT pipeline.drop_shadow(:table)")


class RebuildRunsError(PipelineError):
    """Another process rebuilds the same read model. Nothing was done; look at that one."""

    exit_code = ExitCode.FENCED

    def __init__(self, projector: str) -> None:
        super().__init__(f"{projector}: another rebuild or check of it is running")
        self.projector = projector


class StoppedError(PipelineError):
    """The rebuild was told to stop. What it has computed waits to be gone on with."""

    exit_code = ExitCode.DONE


class Difference(NamedTuple):
    """How a live read model differed from the one computed anew, over all its tables.

    Attributes:
        projector: Which read model.
        rows: Rows that the log makes.
        missing: Rows that the live tables lacked.
        changed: Rows whose content was another one, to the last byte.
        surplus: Rows that should not have been there.
        behind: Offsets that the live projector had not taken yet, so that some of the difference
            is no fault; 0 where both stood at the same place.
        dead_letters: Events that the rebuild could not take.
    """

    projector: str
    rows: int
    missing: int
    changed: int
    surplus: int
    behind: int
    dead_letters: int

    @property
    def differing(self) -> int:
        """Rows that were not what the log says."""
        return self.missing + self.changed + self.surplus


class RebuildProgress(NamedTuple):
    """Offsets taken, and offsets of the log in all."""

    done: int
    total: int


Observe = Callable[[RebuildProgress], None]


def rebuild(
    engine: Engine,
    projector: Projector,
    *,
    guilty_max: int = 1000,
    chunk_offsets: int = CHUNK_OFFSETS,
    stop: threading.Event | None = None,
    observe: Observe = lambda _: None,
) -> Difference:
    """Make the live tables equal to what the log gives, without stopping readers.

    A killed rebuild is gone on with by the next call. A broken projector is live again afterwards.

    Args:
        engine: The database, with the schema of this program.
        projector: Which read model.
        guilty_max: Most events that may be refused in one chunk.
        chunk_offsets: Offsets of one transaction while nobody waits for it.
        stop: Set it to end after the chunk in hand.
        observe: Called after each chunk.

    Returns:
        What differed, now repaired.

    Raises:
        RebuildRunsError: Somebody else rebuilds the same read model.
        BrokenProjectorError: The projector refuses too many events.
        StoppedError: It was told to stop.
        TransientError: The server went away, or the tables were not to be had; call again.
    """
    with _Shadow.alone(engine, projector, guilty_max, chunk_offsets) as shadow:
        shadow.prepare()
        shadow.advance(stop or threading.Event(), observe)
        difference = _insist(shadow.reconcile, projector)
    log.info("rebuilt", **difference._asdict(), differing=difference.differing)
    return difference


def check(
    engine: Engine,
    projector: Projector,
    *,
    guilty_max: int = 1000,
    chunk_offsets: int = CHUNK_OFFSETS,
    stop: threading.Event | None = None,
    observe: Observe = lambda _: None,
) -> Difference:
    """Compare the live tables with what the log gives, at one place, and change nothing.

    Neither readers nor the live projector wait. Arguments and errors are those of ``rebuild``.
    """
    with _Shadow.alone(engine, projector, guilty_max, chunk_offsets) as shadow:
        for _ in range(TRUNCATIONS_MAX):
            shadow.prepare()
            shadow.advance(stop or threading.Event(), observe, beyond_live=False)
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
    with _Shadow.alone(engine, projector) as shadow:
        shadow.drop()
        _insist(lambda: _truncate(engine, projector), projector)
        run_projection(engine, [projector], limits, stop=stop, until_end=True, observe=observe)


def _truncate(engine: Engine, projector: Projector) -> None:
    with transaction(engine) as db:
        checkpoints.register(db, [projector.name])
        db.execute(LOCK_WAIT)
        names = ", ".join(sorted(_in(READ_SCHEMA, table) for table in projector.tables))
        db.execute(text(f"TRUNCATE {names}"))


_T = TypeVar("_T")


def _insist(attempt: Callable[[], _T], projector: Projector) -> _T:
    """Ask for the live table's lock again and again, each time for a little while."""
    for number in range(1, SWAP_ATTEMPTS_MAX):
        try:
            return attempt()
        except LockHeldError:
            log.info("rebuild_waits_for_tables", projector=projector.name, attempt=number)
    return attempt()


class _Shadow:
    """The tables beside the live ones, with their own checkpoints and dead letters.

    One connection does it all: it holds the advisory lock that keeps a second rebuild out, so with
    the lock goes the ability to write.
    """

    def __init__(
        self, db: Connection, projector: Projector, guilty_max: int, chunk_offsets: int
    ) -> None:
        self._db = db
        self._chunk_offsets = chunk_offsets
        self._projector = projector
        self._guilty_max = guilty_max
        self._name = projector.name + REBUILD

    @classmethod
    @contextmanager
    def alone(
        cls,
        engine: Engine,
        projector: Projector,
        guilty_max: int = 0,
        chunk_offsets: int = CHUNK_OFFSETS,
    ) -> Iterator[Self]:
        with translated(), engine.connect() as db:
            taken = db.execute(TAKE, {"projector": projector.name}).scalar_one()
            db.commit()
            if not taken:
                raise RebuildRunsError(projector.name)
            try:
                yield cls(db, projector, guilty_max, chunk_offsets)
            finally:
                if not db.invalidated:
                    db.rollback()
                    db.execute(LEAVE, {"projector": projector.name})
                    db.commit()

    # ------------------------------------------------------------------------------- the tables

    def prepare(self) -> None:
        """Have tables and progress of this very definition: an interrupted rebuild's, or new."""
        with translated(), self._db.begin():
            built = checkpoints.fingerprints(self._db).get(self._name)
            if built == fingerprint(self._projector) and self._tables_exist():
                log.info("rebuild_resumed", projector=self._projector.name)
                return
            self._drop()
            for table in self._projector.tables:
                self._db.execute(MAKE, {"table": table.name})
            checkpoints.register(self._db, [self._projector.name, self._name])
            checkpoints.note_built(self._db, self._name, fingerprint(self._projector))

    def drop(self) -> None:
        """Leave nothing behind."""
        with translated(), self._db.begin():
            self._drop()

    def _drop(self) -> None:
        for table in self._projector.tables:
            self._db.execute(DROP, {"table": table.name})
        dead_letters.forget(self._db, self._name)
        checkpoints.forget(self._db, self._name)

    def _tables_exist(self) -> bool:
        return all(
            self._db.execute(EXISTS, {"table": _in(SHADOW_SCHEMA, table)}).scalar_one()
            for table in self._projector.tables
        )

    # ------------------------------------------------------------------------------ filling them

    def advance(self, stop: threading.Event, observe: Observe, *, beyond_live: bool = True) -> None:
        """Fill the tables up to where the log ends while the last chunk is being taken.

        Args:
            stop: Set to end after the chunk in hand.
            observe: Called after each chunk.
            beyond_live: Go to the log's end; else never further than the live projector is.
        """
        nearly_done = False
        while not nearly_done:
            standings = self._standings(beyond_live=beyond_live)
            left = sum(one.lag for one in standings)
            nearly_done = left < self._chunk_offsets
            for one in sorted(standings, key=lambda one: one.lag, reverse=True):
                if stop.is_set():
                    name = self._projector.name
                    raise StoppedError(f"{name}: stopped; the same command goes on with it")
                if one.lag:
                    self._take_chunk(one)
                if not nearly_done:
                    break
            total = sum(lag(one.log_first, one.log_end) for one in standings)
            left = sum(one.lag for one in self._standings(beyond_live=beyond_live))
            observe(RebuildProgress(max(0, total - left), total))

    def _standings(self, *, beyond_live: bool) -> Sequence[Standing]:
        with translated(), self._db.begin():
            standings = checkpoints.standings(self._db, [self._name])
            if beyond_live:
                return standings
            live = checkpoints.places(self._db, self._projector.name)
            return [
                one._replace(log_end=live.get(one.partition, NextOffset(0))) for one in standings
            ]

    def _take_chunk(self, standing: Standing) -> None:
        with translated(), self._db.begin():
            self._db.execute(COMMIT_LAZILY)
            pin(self._db)
            held = checkpoints.hold(self._db, self._name, standing.partition)
            if held != standing.next_offset:
                # A rewind has filled the log below, or is about to: look again.
                return
            offsets = standing.next_range(self._chunk_offsets)
            self._take(SHADOW_SCHEMA, self._name, standing.partition, offsets)
            failpoints.reach("mid_rebuild", connection_fd=descriptor(self._db))

    def _take(self, schema: str, name: str, partition: Partition, offsets: OffsetRange) -> None:
        """Bring a range into the tables of a schema, with its dead letters and checkpoint."""
        batch = Batch(partition, offsets, self._projector.condition())
        faults = fill(self._db, self._projector, schema, batch, guilty_max=self._guilty_max)
        dead_letters.put_aside(self._db, name, partition, faults)
        checkpoints.move(self._db, name, partition, offsets)

    def _bring(
        self,
        schema: str,
        name: str,
        places: Mapping[Partition, NextOffset],
        goal: Mapping[Partition, NextOffset],
    ) -> None:
        for partition, end in sorted(goal.items()):
            begin = places.get(partition)
            if begin is None:
                begin = NextOffset(0)
                checkpoints.place(self._db, name, {partition: begin})
            if begin < end:
                self._take(schema, name, partition, OffsetRange(begin, end))

    # --------------------------------------------------------------------------------- comparing

    def compare(self) -> Difference | None:
        """What differs at the place where the live projector stands; None if it was truncated."""
        db, name = self._db, self._projector.name
        with translated(), db.begin():
            db.execute(ONE_SNAPSHOT)
            # Before the snapshot, which would not see a TRUNCATE that comes in between.
            lock_tables(db, self._projector, "ACCESS SHARE MODE")
            pin(db)
            live = checkpoints.places(db, name)
            beside = checkpoints.hold_all(db, self._name)
            if any(place > live.get(partition, 0) for partition, place in beside.items()):
                return None
            self._bring(SHADOW_SCHEMA, self._name, beside, live)
            return self._difference(behind=0)

    def reconcile(self) -> Difference:
        """Make the live tables equal, and end the rebuild; the live projector waits meanwhile."""
        db, name = self._db, self._projector.name
        with translated(), db.begin():
            db.execute(LOCK_WAIT)
            lock_tables(db, self._projector, "SHARE ROW EXCLUSIVE MODE")
            pin(db)
            live = checkpoints.hold_all(db, name)
            beside = checkpoints.hold_all(db, self._name)
            goal = {
                partition: max(
                    live.get(partition, NextOffset(0)), beside.get(partition, NextOffset(0))
                )
                for partition in live | beside
            }
            self._bring(SHADOW_SCHEMA, self._name, beside, goal)
            behind = sum(lag(live.get(place, NextOffset(0)), end) for place, end in goal.items())
            if behind < self._chunk_offsets and checkpoints.is_live(db, name):
                self._bring(READ_SCHEMA, name, live, goal)
                behind = 0
            failpoints.reach("before_swap", connection_fd=descriptor(db))
            difference = self._difference(behind=behind)
            if difference.differing:
                for table in self._projector.tables:
                    for statement in (_delete, _change, _insert):
                        db.execute(text(statement(table)))
            dead_letters.forget(db, name)
            dead_letters.hand_over(db, self._name, name)
            checkpoints.place(db, name, goal)
            checkpoints.note_built(db, name, fingerprint(self._projector))
            self._drop()
            failpoints.reach("after_swap", connection_fd=descriptor(db))
        return difference

    def _difference(self, *, behind: int) -> Difference:
        rows = missing = changed = surplus = 0
        for table in self._projector.tables:
            found = self._db.execute(text(_compare(table))).one()
            rows += found.rows
            missing += found.missing
            changed += found.changed
            surplus += found.surplus
        letters = len(dead_letters.listed(self._db, [self._name]))
        return Difference(self._projector.name, rows, missing, changed, surplus, behind, letters)


# -------------------------------------------------------------------------------- the statements
# Assembled from the names of declared tables, quoted.


def _in(schema: str, table: Table) -> str:
    return f'"{schema}"."{table.name}"'


def _key(table: Table) -> list[str]:
    return [f'"{column.name}"' for column in table.primary_key]


def _same_key(table: Table) -> str:
    return " AND ".join(f"t.{name} = s.{name}" for name in _key(table))


def _compare(table: Table) -> str:
    key = _key(table)[0]
    return (
        f"SELECT count(s.{key}) AS rows, "  # noqa: S608 - declared names
        f"count(*) FILTER (WHERE t.{key} IS NULL) AS missing, "
        f"count(*) FILTER (WHERE s.{key} IS NULL) AS surplus, "
        f"count(*) FILTER (WHERE t.{key} IS NOT NULL AND s.{key} IS NOT NULL AND t *<> s) "
        f"AS changed FROM {_in(READ_SCHEMA, table)} AS t "
        f"FULL JOIN {_in(SHADOW_SCHEMA, table)} AS s ON {_same_key(table)}"
    )


def _delete(table: Table) -> str:
    return (
        f"DELETE FROM {_in(READ_SCHEMA, table)} AS t WHERE NOT EXISTS "  # noqa: S608 - declared names
        f"(SELECT FROM {_in(SHADOW_SCHEMA, table)} AS s WHERE {_same_key(table)})"
    )


def _change(table: Table) -> str:
    columns = [f'"{column.name}"' for column in table.columns]
    changes = ", ".join(f"{name} = s.{name}" for name in columns)
    return (
        f"UPDATE {_in(READ_SCHEMA, table)} AS t SET {changes} "  # noqa: S608 - declared names
        f"FROM {_in(SHADOW_SCHEMA, table)} AS s WHERE {_same_key(table)} AND t *<> s"
    )


def _insert(table: Table) -> str:
    columns = ", ".join(f'"{column.name}"' for column in table.columns)
    return (
        f"INSERT INTO {_in(READ_SCHEMA, table)} ({columns}) "  # noqa: S608 - declared names
        f"SELECT {columns} FROM {_in(SHADOW_SCHEMA, table)} AS s WHERE NOT EXISTS "
        f"(SELECT FROM {_in(READ_SCHEMA, table)} AS t WHERE {_same_key(table)})"
    )
