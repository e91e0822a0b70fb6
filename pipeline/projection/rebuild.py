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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, Self, TypeVar

import structlog
from sqlalchemy import (
    BigInteger,
    Boolean,
    Connection,
    Date,
    DateTime,
    Engine,
    Integer,
    SmallInteger,
    Table,
    Text,
    Uuid,
    text,
)

from pipeline import dead_letters, failpoints
from pipeline.db import READ_SCHEMA, descriptor, transaction, translated
from pipeline.errors import ExitCode, LockHeldError, PipelineError, TransientError
from pipeline.positions import NextOffset, OffsetRange, Partition, lag
from pipeline.projection import checkpoints, ranges
from pipeline.projection.batch import Batch
from pipeline.projection.checkpoints import REBUILD
from pipeline.projection.declaration import Projector
from pipeline.projection.fingerprint import fingerprint
from pipeline.projection.loop import Limits, Progress, run_projection
from pipeline.projection.turn import fill, lock_tables, pin

log = structlog.get_logger(__name__)

SHADOW_SCHEMA = "pipeline_shadow"

CHUNK_OFFSETS = 50_000
"""Most offsets of one range; fewer than these may be left to the last transaction."""
SWAP_ATTEMPTS_MAX = 20
"""How often the live table's lock is asked for; each time for LOCK_WAIT."""
TRUNCATIONS_MAX = 3
"""How often a check begins again because the table was truncated under it."""

# A waiting request for the lock makes later writers wait behind it, so it must give up soon.
LOCK_WAIT = text("SET LOCAL lock_timeout = '3s'")
# What a crash takes is computed again: its progress is lost together with it.
COMMIT_LAZILY = text("SET LOCAL synchronous_commit = off")
# For a row that another range holds too, however long that takes.
WAIT_FOR_OTHERS = text("SET LOCAL lock_timeout = 0")
DEADLOCK = "40P01"
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
    with _Shadow.alone(engine, projector, guilty_max, chunk_offsets) as shadow:
        _insist(shadow.prepare, projector)
        shadow.advance(engine, jobs, stop or threading.Event(), observe)
        difference = _insist(shadow.reconcile, projector)
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
    with _Shadow.alone(engine, projector, guilty_max, chunk_offsets) as shadow:
        for _ in range(TRUNCATIONS_MAX):
            _insist(shadow.prepare, projector)
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
    """Ask for a lock again and again, each time for a little while."""
    for number in range(1, SWAP_ATTEMPTS_MAX):
        try:
            return attempt()
        except LockHeldError:
            log.info("rebuild_waits_for_tables", projector=projector.name, attempt=number)
    return attempt()


class _Teller:
    """Tells how far a rebuild is, one thread after the other."""

    def __init__(self, observe: Observe, total: int) -> None:
        self._observe = observe
        self._total = total
        self._one_at_a_time = threading.Lock()

    def tell(self, left: int) -> None:
        with self._one_at_a_time:
            self._observe(RebuildProgress(max(0, self._total - left), self._total))


class _Shadow:
    """The tables beside the live ones, with their own checkpoints and dead letters.

    One connection holds the advisory lock that keeps a second rebuild out. Others may help it to
    fill the tables; should it lose the lock, they may do so until somebody else takes the rebuild
    up, and no further.
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
            else:
                self._drop()
                for table in self._projector.tables:
                    self._db.execute(MAKE, {"table": table.name})
                checkpoints.register(self._db, [self._projector.name, self._name])
            code = fingerprint(self._projector)
            self._since = checkpoints.note_built(self._db, self._name, code)

    def drop(self) -> None:
        """Leave nothing behind."""
        with translated(), self._db.begin():
            self._drop()

    def _drop(self) -> None:
        for table in self._projector.tables:
            self._db.execute(DROP, {"table": table.name})
        dead_letters.forget(self._db, self._name)
        ranges.forget(self._db, self._name)
        checkpoints.forget(self._db, self._name)

    def _tables_exist(self) -> bool:
        return all(
            self._db.execute(EXISTS, {"table": _in(SHADOW_SCHEMA, table)}).scalar_one()
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
        """Fill the tables up to where the log ends while the last ranges are being taken.

        Args:
            engine: Where those who help have their connections from.
            jobs: How many connections work at once, this one among them.
            stop: Set to end after the ranges in hand.
            observe: Called after each range.
            beyond_live: Go to the log's end; else never further than the live projector is.
        """
        planned = self._chunk_offsets
        while planned >= self._chunk_offsets:
            planned, total = _insist(lambda: self._plan(beyond_live=beyond_live), self._projector)
            self._work_off(engine, jobs, stop, _Teller(observe, total))
            if stop.is_set() and self._left():
                name = self._projector.name
                raise StoppedError(f"{name}: stopped; the same command goes on with it")

    def _plan(self, *, beyond_live: bool) -> tuple[int, int]:
        """Put on the list what the log has more than the rebuild has heard of.

        Returns:
            Offsets on the list, and offsets of the log in all.
        """
        db, name = self._db, self._name
        with translated(), db.begin():
            # A rewind that is under way puts the checkpoints back first.
            checkpoints.hold_all(db, name)
            standings = checkpoints.standings(db, [name])
            if not beyond_live:
                live = checkpoints.places(db, self._projector.name)
                standings = [
                    one._replace(log_end=live.get(one.partition, NextOffset(0)))
                    for one in standings
                ]
            for one in standings:
                if one.lag:
                    new = OffsetRange(max(one.next_offset, one.log_first), one.log_end)
                    ranges.put(db, name, one.partition, new, span_max=self._chunk_offsets)
                    moved = OffsetRange(one.next_offset, one.log_end)
                    checkpoints.move(db, name, one.partition, moved)
            return ranges.left(db, name), sum(lag(one.log_first, one.log_end) for one in standings)

    def _left(self) -> int:
        with translated(), self._db.begin():
            return ranges.left(self._db, self._name)

    def _work_off(
        self, engine: Engine, jobs: int, stop: threading.Event, teller: "_Teller"
    ) -> None:
        """Have several connections take what is on the list; the first error ends them all."""
        over = threading.Event()

        def work(db: Connection) -> None:
            try:
                while not (stop.is_set() or over.is_set()) and self._take_range(db, teller):
                    pass
            except BaseException:
                over.set()
                raise

        def help_with_it() -> None:
            with translated(), engine.connect() as db:
                work(db)

        with ThreadPoolExecutor(jobs) as crew:
            at_work = [crew.submit(work, self._db)]
            at_work += [crew.submit(help_with_it) for _ in range(jobs - 1)]
        for one in at_work:
            one.result()

    def _take_range(self, db: Connection, teller: "_Teller") -> bool:
        """Bring a range of the list into the tables; False if there is none to be had."""
        try:
            with translated(), db.begin():
                db.execute(COMMIT_LAZILY)
                db.execute(WAIT_FOR_OTHERS)
                pin(db)
                if not checkpoints.is_building(db, self._name, self._since):
                    raise RebuildRunsError(self._projector.name)
                taken = ranges.take(db, self._name)
                if taken is None:
                    return False
                self._fill(db, SHADOW_SCHEMA, self._name, taken.partition, taken.offsets)
                failpoints.reach("mid_rebuild", connection_fd=descriptor(db))
                ranges.strike_off(db, self._name, taken)
        except TransientError as error:
            # Ranges with dead letters write some rows twice, so not in the order of their keys.
            if error.sqlstate != DEADLOCK:
                raise
            return True
        with translated(), db.begin():
            teller.tell(ranges.left(db, self._name))
        return True

    def _fill(
        self, db: Connection, schema: str, name: str, partition: Partition, offsets: OffsetRange
    ) -> None:
        """Bring a range into the tables of a schema, with its dead letters."""
        batch = Batch(partition, offsets, self._projector.condition())
        faults = fill(db, self._projector, schema, batch, guilty_max=self._guilty_max)
        dead_letters.put_aside(db, name, partition, faults)

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
                self._fill(self._db, schema, name, partition, OffsetRange(begin, end))
                checkpoints.move(self._db, name, partition, OffsetRange(begin, end))

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


# Of these, equal values are written alike; 1.0 and 1.00 are not.
_WRITTEN_ALIKE = (BigInteger, Boolean, Date, DateTime, Integer, SmallInteger, Text, Uuid)


def _differs(table: Table) -> str:
    """Whether two rows are not the same to the last byte: cheaper than by their images."""
    values = []
    for column in table.columns:
        name = f'"{column.name}"'
        as_written = "" if isinstance(column.type, _WRITTEN_ALIKE) else "::text"
        values.append(f"t.{name}{as_written} IS DISTINCT FROM s.{name}{as_written}")
    return f"({' OR '.join(values)})"


def _compare(table: Table) -> str:
    key = _key(table)[0]
    return (
        f"SELECT count(s.{key}) AS rows, "  # noqa: S608 - declared names
        f"count(*) FILTER (WHERE t.{key} IS NULL) AS missing, "
        f"count(*) FILTER (WHERE s.{key} IS NULL) AS surplus, "
        f"count(*) FILTER (WHERE t.{key} IS NOT NULL AND s.{key} IS NOT NULL "
        f"AND {_differs(table)}) "
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
        f"FROM {_in(SHADOW_SCHEMA, table)} AS s WHERE {_same_key(table)} AND {_differs(table)}"
    )


def _insert(table: Table) -> str:
    columns = ", ".join(f'"{column.name}"' for column in table.columns)
    return (
        f"INSERT INTO {_in(READ_SCHEMA, table)} ({columns}) "  # noqa: S608 - declared names
        f"SELECT {columns} FROM {_in(SHADOW_SCHEMA, table)} AS s WHERE NOT EXISTS "
        f"(SELECT FROM {_in(READ_SCHEMA, table)} AS t WHERE {_same_key(table)})"
    )
