"""The tables that a rebuild computes beside the live ones: made, filled, compared, handed over.

Their checkpoints, dead letters and work list are kept under the projector's name with ``REBUILD``
behind it, so whoever takes up a killed rebuild finds what it had done.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Self, TypeVar

import structlog
from sqlalchemy import Connection, Engine, text

from pipeline import failpoints
from pipeline.db import SHADOW_SCHEMA, descriptor, locks, translated
from pipeline.errors import DEADLOCK, ExitCode, LockHeldError, PipelineError, TransientError
from pipeline.partitions import NextOffset, OffsetRange, Partition, lag
from pipeline.projection import checkpoints, dead_letters
from pipeline.projection.checkpoints import REBUILD
from pipeline.projection.one_pass import fill, lock_tables, pin
from pipeline.readmodel.batch import Batch
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.readmodel.model import Projector
from pipeline.rebuild import work_list
from pipeline.rebuild.comparison import Difference, measure, repair

log = structlog.get_logger(__name__)

CHUNK_OFFSETS = 50_000
"""Most offsets of one range; fewer than these may be left to the last transaction."""
SWAP_ATTEMPTS_MAX = 20
"""How often the live table's lock is asked for; each time for LOCK_WAIT."""

# A waiting request for the lock makes later writers wait behind it, so it must give up soon.
LOCK_WAIT = text("SET LOCAL lock_timeout = '3s'")
# What a crash takes is computed again: its progress is lost together with it.
COMMIT_LAZILY = text("SET LOCAL synchronous_commit = off")
# For a row that another range holds too, however long that takes.
WAIT_FOR_OTHERS = text("SET LOCAL lock_timeout = 0")
ONE_SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
EXISTS = text("SELECT to_regclass(:table) IS NOT NULL")
# Through functions of the owner's, so that any login may go on where another one was killed.
MAKE = text("SELECT pipeline.make_shadow(:table)")
DROP = text("SELECT pipeline.drop_shadow(:table)")


class RebuildRunsError(PipelineError):
    """Another process rebuilds the same read model. Nothing was done; look at that one."""

    exit_code = ExitCode.FENCED

    def __init__(self, projector: str, holder: locks.Holder | None = None) -> None:
        detail = f": {holder}" if holder else ""
        super().__init__(f"{projector}: another rebuild or check of it is running{detail}")
        self.projector = projector


class StoppedError(PipelineError):
    """The rebuild was told to stop. What it has computed waits to be gone on with."""

    exit_code = ExitCode.DONE


class RebuildProgress(NamedTuple):
    """Offsets taken, and offsets of the log in all."""

    done: int
    total: int


Observe = Callable[[RebuildProgress], None]
_T = TypeVar("_T")


def insist(attempt: Callable[[], _T], projector: Projector) -> _T:
    """Ask for a lock again and again, each time for a little while.

    Raises:
        LockHeldError: Somebody held the tables each time.
    """
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


class Shadow:
    """The tables beside the live ones, with their own checkpoints and dead letters.

    One connection holds the lock that keeps a second rebuild out, one works, others may help it to
    fill the tables; should the lock be lost, they may do so until somebody else takes the rebuild
    up, and no further.
    """

    def __init__(
        self,
        db: Connection,
        held: locks.Held,
        projector: Projector,
        guilty_max: int,
        chunk_offsets: int,
    ) -> None:
        self._db = db
        self._held = held
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
        """Keep a second rebuild or check of the read model out while we have them.

        Args:
            engine: The database, with the schema of this program.
            projector: Which read model.
            guilty_max: Most events that may be refused in one range.
            chunk_offsets: Most offsets of one range.

        Raises:
            RebuildRunsError: Somebody else rebuilds the same read model.
        """
        with translated(), ExitStack() as stack:
            try:
                held = stack.enter_context(locks.held(engine, f"rebuild {projector.name}"))
            except locks.LockTakenError as taken:
                raise RebuildRunsError(projector.name, taken.holder) from None
            db = stack.enter_context(engine.connect())
            yield cls(db, held, projector, guilty_max, chunk_offsets)

    # ------------------------------------------------------------------------------- the tables

    def prepare(self) -> None:
        """Have tables and progress of this very definition: an interrupted rebuild's, or new."""
        with translated(), self._alone():
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
        with translated(), self._alone():
            self._drop()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A transaction of the working connection, in which the rebuild is ours."""
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

    def _tables_exist(self) -> bool:
        return all(
            self._db.execute(EXISTS, {"table": f'"{SHADOW_SCHEMA}"."{table.name}"'}).scalar_one()
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
            planned, total = insist(lambda: self._plan(beyond_live=beyond_live), self._projector)
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
        with translated(), self._alone():
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
                    work_list.put(db, name, one.partition, new, span_max=self._chunk_offsets)
                    moved = OffsetRange(one.next_offset, one.log_end)
                    checkpoints.move(db, name, one.partition, moved)
            return work_list.left(db, name), sum(
                lag(one.log_first, one.log_end) for one in standings
            )

    def _left(self) -> int:
        with translated(), self._db.begin():
            return work_list.left(self._db, self._name)

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
                taken = work_list.take(db, self._name)
                if taken is None:
                    return False
                self._fill(db, SHADOW_SCHEMA, self._name, taken.partition, taken.offsets)
                failpoints.reach("mid_rebuild", connection_fd=descriptor(db))
                work_list.strike_off(db, self._name, taken)
        except TransientError as error:
            # Ranges with dead letters write some rows twice, so not in the order of their keys.
            if error.sqlstate != DEADLOCK:
                raise
            return True
        with translated(), db.begin():
            teller.tell(work_list.left(db, self._name))
        return True

    def _fill(
        self,
        db: Connection,
        schema: str | None,
        name: str,
        partition: Partition,
        offsets: OffsetRange,
    ) -> None:
        """Bring a range into the tables of a schema, with its dead letters."""
        batch = Batch(partition, offsets, self._projector.condition())
        faults = fill(db, self._projector, schema, batch, guilty_max=self._guilty_max)
        dead_letters.put_aside(db, name, partition, faults)

    def _bring(
        self,
        schema: str | None,
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
            self._confirm()
            pin(db)
            live = checkpoints.places(db, name)
            beside = checkpoints.hold_all(db, self._name)
            if any(place > live.get(partition, 0) for partition, place in beside.items()):
                return None
            self._bring(SHADOW_SCHEMA, self._name, beside, live)
            return self._measured(behind=0)

    def reconcile(self) -> Difference:
        """Make the live tables equal, and end the rebuild; the live projector waits meanwhile."""
        db, name = self._db, self._projector.name
        with translated(), self._alone():
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
                self._bring(None, name, live, goal)
                behind = 0
            failpoints.reach("before_swap", connection_fd=descriptor(db))
            difference = self._measured(behind=behind)
            if difference.differing:
                repair(db, self._projector)
            dead_letters.forget(db, name)
            dead_letters.hand_over(db, self._name, name)
            checkpoints.place(db, name, goal)
            checkpoints.note_built(db, name, fingerprint(self._projector))
            self._drop()
            failpoints.reach("after_swap", connection_fd=descriptor(db))
        return difference

    def _measured(self, *, behind: int) -> Difference:
        letters = len(dead_letters.listed(self._db, [self._name]))
        return measure(self._db, self._projector, behind=behind, dead_letters=letters)
