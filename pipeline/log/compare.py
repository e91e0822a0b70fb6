"""The log compared with Kafka: records that were read again are staged, compared, and inserted.

Rows are staged in temporary tables of one session, so no other session sees them and a crash leaves
nothing. A row is compared by the record (bytes, key, headers, timestamps) and by the columns that
the log derives from it; ``repeat_of`` and ``problem`` describe it, and are not compared.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Self

from sqlalchemy import Connection, Engine, text

from pipeline.db import locks, translated
from pipeline.errors import ExitCode, PipelineError
from pipeline.events import EncodedRow
from pipeline.log import offsets
from pipeline.log.append import copy_rows, driver_of
from pipeline.log.copying import COLUMNS
from pipeline.log.intervals import Intervals
from pipeline.log.segments import make_segment
from pipeline.partitions import NextOffset, Offset, OffsetRange, Partition

_PREPARE = (
    text("CREATE TEMP TABLE staged (LIKE pipeline.events INCLUDING DEFAULTS)"),
    text("CREATE TEMP TABLE kept (LIKE pipeline.events INCLUDING DEFAULTS)"),
)
_CLEAR = text("TRUNCATE pg_temp.staged")
_COPY = f"COPY pg_temp.staged ({COLUMNS}) FROM STDIN (FORMAT binary)"
# Bytes are compared where both sides kept them: keep_raw may have been set in between. A payload
# that jsonb refused has its bytes beside it. The rank shows neighbours, as offsets may be unused.
_COMPARE = text("""
SELECT at_offset, kind, rank FROM (
    SELECT coalesce(s."offset", e."offset") AS at_offset,
           row_number() OVER (ORDER BY coalesce(s."offset", e."offset")) AS rank,
           count(*) OVER () AS compared_rows,
           CASE WHEN e."offset" IS NULL THEN 'missing'
                WHEN s."offset" IS NULL THEN 'surplus'
                WHEN (s.digest, s.key, s.headers, s.kafka_timestamp, s.kafka_timestamp_type,
                      s.event_id, s.event_type, s.created_at, s.entity_id)
                     IS DISTINCT FROM
                     (e.digest, e.key, e.headers, e.kafka_timestamp, e.kafka_timestamp_type,
                      e.event_id, e.event_type, e.created_at, e.entity_id)
                  OR s.payload <> e.payload OR s.raw <> e.raw
                  OR (e.payload IS NULL AND e.raw IS NULL AND s.digest IS NOT NULL)
                THEN 'changed' END AS kind
    FROM pg_temp.staged s
    FULL JOIN (
        SELECT * FROM pipeline.events
        WHERE topic = :topic AND "partition" = :number
          AND "offset" >= :first AND "offset" < :end
    ) e ON e."offset" = s."offset") AS compared
WHERE kind IS NOT NULL OR rank = compared_rows
ORDER BY rank
""")
_KEEP = text(f"""
INSERT INTO pg_temp.kept ({COLUMNS})
SELECT {COLUMNS} FROM pg_temp.staged WHERE "offset" = ANY (CAST(:missing AS bigint[]))
""")  # noqa: S608 - a constant of ours
_NEXT_KEPT = text('SELECT min("offset") FROM pg_temp.kept WHERE "offset" >= :begin')
_FILL = text(f"""
INSERT INTO pipeline.events ({COLUMNS})
SELECT {COLUMNS} FROM pg_temp.kept ORDER BY "offset"
""")  # noqa: S608 - a constant of ours


class RewindRunsError(PipelineError):
    """Another process rewinds the same partition. Nothing was done."""

    exit_code = ExitCode.FENCED

    def __init__(self, partition: Partition, holder: locks.Holder | None) -> None:
        detail = f": {holder}" if holder else ""
        super().__init__(
            f"{partition}: another rewind of this partition is running{detail}. Nothing was changed"
        )


@dataclass
class Comparison:
    """What Kafka and the log have at the same offsets.

    Attributes:
        read: Records that Kafka delivered.
        missing: In Kafka, not in the log.
        changed: In both, and not the same.
        surplus: In the log, not in Kafka.
    """

    read: int = 0
    missing: Intervals = field(default_factory=Intervals)
    changed: Intervals = field(default_factory=Intervals)
    surplus: Intervals = field(default_factory=Intervals)

    @property
    def same(self) -> int:
        """Records that are the same in both."""
        return self.read - self.missing.count - self.changed.count


class Staging:
    """Records of one partition that were read again, beside the log.

    Attributes:
        partition: Which.
        comparison: What was found so far.
    """

    def __init__(
        self, db: Connection, partition: Partition, held: locks.Held | None = None
    ) -> None:
        self._db = db
        self._held = held
        self.partition = partition
        self.comparison = Comparison()
        self._compared = 0
        self._last: tuple[str, int] | None = None

    @classmethod
    @contextmanager
    def alone(cls, engine: Engine, partition: Partition) -> Iterator[Self]:
        """The same, and no other rewind of the partition can run until the block ends.

        Raises:
            RewindRunsError: Another one is running.
        """
        with ExitStack() as stack:
            try:
                held = stack.enter_context(locks.held(engine, f"rewind {partition}"))
            except locks.LockTakenError as taken:
                raise RewindRunsError(partition, taken.holder) from None
            yield stack.enter_context(cls.of(engine, partition, held))

    @classmethod
    @contextmanager
    def of(
        cls, engine: Engine, partition: Partition, held: locks.Held | None = None
    ) -> Iterator[Self]:
        """Temporary tables for the length of the block, on a connection of their own.

        Raises:
            TransientError: The server became unavailable.
            ConfigurationError: The role may not create temporary tables.
        """
        with translated():
            connection = engine.connect()
        try:
            with translated(), connection.begin():
                for statement in _PREPARE:
                    connection.execute(statement)
            yield cls(connection, partition, held)
        finally:
            # Closed, not returned to the pool: there its tables would stay.
            connection.invalidate()
            connection.close()

    def compare(self, span: OffsetRange, rows: Sequence[EncodedRow], *, keep: bool) -> None:
        """Compare the log with all that Kafka has of a range, after all ranges compared before.

        Args:
            span: The offsets; ``rows`` are all that Kafka has of them.
            rows: In offset order.
            keep: Keep what is missing in the log, for ``fill``.
        """
        key = {"topic": self.partition.topic, "number": self.partition.number}
        with translated(), self._db.begin():
            self._db.execute(_CLEAR)
            copy_rows(driver_of(self._db), list(rows), _COPY)
            found = self._db.execute(_COMPARE, {**key, "first": span.first, "end": span.end}).all()
            missing = [row.at_offset for row in found if row.kind == "missing"]
            if keep and missing:
                self._db.execute(_KEEP, {"missing": missing})
        self.comparison.read += len(rows)
        self._note(found)

    def _note(self, found: Iterable[tuple[int, str | None, int]]) -> None:
        """Add differences; the last row shows how many were compared."""
        rank = 0
        for offset, kind, rank in found:
            if kind is None:
                continue
            position = self._compared + rank
            joins = self._last == (kind, position - 1)
            intervals: Intervals = getattr(self.comparison, kind)
            intervals.add(Offset(offset), joins=joins)
            self._last = (kind, position)
        self._compared += rank

    @contextmanager
    def fill(self, begins: NextOffset, *, segment_span: int) -> Iterator[Connection]:
        """Insert what is missing into the log; the caller's block is in the same transaction.

        Ingestion continues: it writes after ``next_offset``, this before it.

        Args:
            begins: Where the log of the partition begins from now on, if it began later.
            segment_span: How many offsets a new segment spans.

        Raises:
            RewindRunsError: Our lock was lost, and another rewind has taken it.
            InvariantError: Another process has written one of these rows meanwhile.
        """
        self._make_segments(segment_span)
        with translated(), self._db.begin():
            self._confirm()
            self._db.execute(_FILL)
            offsets.begin_earlier(self._db, self.partition, begins)
            yield self._db

    def _confirm(self) -> None:
        try:
            if self._held:
                self._held.confirm(self._db)
        except locks.LockTakenError as taken:
            raise RewindRunsError(self.partition, taken.holder) from None

    def _make_segments(self, span: int) -> None:
        begin: int | None = 0
        with translated(), self._db.begin():
            while (
                begin := self._db.execute(_NEXT_KEPT, {"begin": begin}).scalar_one()
            ) is not None:
                _first, begin = make_segment(
                    self._db, self.partition.topic, NextOffset(begin), span
                )
