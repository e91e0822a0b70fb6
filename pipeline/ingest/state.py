"""What the ingest loop decides: a state machine without I/O, clock or threads.

The loop tells it what happened and does what ``next_step`` says. Tests, the model check and
production run this one class.

One batch at a time is with the database; the next one fills meanwhile. A partition is *owned* from
its claim until it is released, lost, fenced or refused; records of any other are ignored.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from pipeline.backoff import SERVER, Backoff
from pipeline.events import EncodedRow
from pipeline.partitions import Advance, Epoch, NextOffset, Offset, Ownership, Partition, after, lag


@dataclass(frozen=True)
class Bounds:
    """Every bound of the ingest loop.

    Attributes:
        batch_rows_max: Most rows in one transaction.
        batch_bytes_max: Most bytes in one transaction; a single larger record goes alone.
        backoff: Wait before a batch is tried again.
        reclaim_s_min: How long a fenced partition rests before it is claimed again. The group takes
            it from a process that only overslept well before.
        steals_max: How often a partition may be taken from us within ``steals_s``.
        steals_s: See ``steals_max``.
    """

    batch_rows_max: int = 10_000
    batch_bytes_max: int = 8 * 1024 * 1024
    backoff: Backoff = SERVER
    reclaim_s_min: float = 5.0
    steals_max: int = 3
    steals_s: float = 60.0


@dataclass(frozen=True)
class Batch:
    """What goes into one transaction."""

    rows: Sequence[EncodedRow]
    advances: Mapping[Partition, Advance]

    def without(self, partitions: Collection[Partition]) -> "Batch":
        """The batch of the other partitions."""
        return Batch(
            [row for row in self.rows if Partition(row.topic, row.partition) not in partitions],
            {place: step for place, step in self.advances.items() if place not in partitions},
        )


class Write(NamedTuple):
    """Append the batch; then tell ``committed``, ``fenced`` or ``failed``."""

    batch: Batch


class Resolve(NamedTuple):
    """Find out where the batch's partitions stand; then tell ``found`` or ``failed``."""

    batch: Batch


class Reclaim(NamedTuple):
    """Claim the partition again and read on where the log ends."""

    partition: Partition


class Stolen(NamedTuple):
    """Another process claims the partition again and again. Stop."""

    partition: Partition


Step = Write | Resolve | Reclaim | Stolen


class Outcome(NamedTuple):
    """What became of a batch.

    Attributes:
        records: How many of its rows are now known to be in the log.
        moved: Next offsets of the partitions that are ours still.
        foreign: Partitions that turned out to be no longer ours, or not where we left them.
    """

    records: int
    moved: Mapping[Partition, NextOffset]
    foreign: Collection[Partition]


class _Flight(Enum):
    """Where the one batch with the database stands."""

    READY = auto()  # to be written, for the first time or again
    WRITING = auto()
    UNKNOWN = auto()  # whether it was committed must be found out
    RESOLVING = auto()


@dataclass
class _Owned:
    """A partition that is ours.

    Attributes:
        stored: The next offset as we last committed it: what the next batch expects.
        taken: Behind the last record that we hold, stored or not.
        target: Where the partition ended when it was claimed.
    """

    held: Epoch
    stored: NextOffset
    taken: NextOffset
    target: NextOffset
    high_watermark: int | None = None
    seen_at: float | None = None


@dataclass
class Machine:
    """See the module's text. Times are seconds of one monotonic clock."""

    bounds: Bounds = field(default_factory=Bounds)
    _owned: dict[Partition, _Owned] = field(default_factory=dict)
    _fenced: dict[Partition, float] = field(default_factory=dict)
    _steals: dict[Partition, list[float]] = field(default_factory=dict)
    _rows: list[EncodedRow] = field(default_factory=list)
    _bytes: int = 0
    _flight: Batch | None = None
    _flight_state: _Flight = _Flight.READY
    # Let go since their batch is with the database. The epoch alone would not tell: a database that
    # was put back to a backup gives the same one out again.
    _let_go: set[Partition] = field(default_factory=set)
    _try_at: float = 0.0
    _failures: int = 0

    # ------------------------------------------------------------------------------- what happened

    def claimed(
        self, partition: Partition, held: Epoch, next_offset: NextOffset, end: NextOffset
    ) -> None:
        """The partition is ours, under ``held``; Kafka's end was ``end``."""
        self._forget([partition])
        self._owned[partition] = _Owned(held, next_offset, next_offset, end)

    def wants_from(self, partition: Partition) -> NextOffset | None:
        """The first offset that is new to us; None where the partition is not ours.

        A record below was fetched before a seek or delivered again: it is in the log or in a batch.
        """
        owned = self._owned.get(partition)
        return None if owned is None else owned.taken

    def received(self, partition: Partition, rows: Sequence[EncodedRow]) -> None:
        """Records of an owned partition came, in offset order, none below ``wants_from``."""
        if rows:
            self._owned[partition].taken = after(Offset(rows[-1].offset))
            self._rows += rows
            self._bytes += sum(len(row.copied) for row in rows)

    def reached_end(self, partition: Partition, offset: NextOffset) -> None:
        """The partition has no record below ``offset`` that we have not been given.

        Behind the last record there may be offsets that Kafka used for itself; storing the end
        makes the lag of an idle partition zero.
        """
        if (owned := self._owned.get(partition)) and offset > owned.taken:
            owned.taken = offset

    def saw_end(self, partition: Partition, high_watermark: int, now: float) -> None:
        """Kafka's end of a partition was seen; stored with the next batch, decides nothing."""
        if owned := self._owned.get(partition):
            owned.high_watermark, owned.seen_at = high_watermark, now

    def committed(self) -> Outcome:
        """The batch with the database is in the log."""
        batch = self._end_flight()
        moved = {}
        for partition, advance in batch.advances.items():
            if self._holds(partition, advance):
                self._owned[partition].stored = advance.new
                moved[partition] = advance.new
        return Outcome(len(batch.rows), moved, ())

    def fenced(self, now: float) -> None:
        """The append was refused for a partition; nothing of the batch was written.

        Which of the batch's partitions still are ours is found out before the rest is repeated.
        """
        self._flight_state = _Flight.UNKNOWN
        self._try_at = now

    def failed(self, now: float) -> None:
        """The database went away while it had the batch; whether it is in the log is unknown."""
        self._failures += 1
        self._flight_state = _Flight.UNKNOWN
        self._try_at = now + self.bounds.backoff.wait_s(self._failures)

    def found(self, places: Mapping[Partition, Ownership], now: float) -> Outcome:
        """Where the batch's partitions stand, read after all that was in flight had ended."""
        batch = self._flight
        if batch is None:
            raise AssertionError("no batch is with the database")
        foreign = {
            partition
            for partition, advance in batch.advances.items()
            if places[partition].epoch != advance.held
            or places[partition].next_offset not in (advance.expected, advance.new)
        }
        ours = [
            partition
            for partition, advance in batch.advances.items()
            if partition not in foreign and self._holds(partition, advance)
        ]
        for partition in foreign:
            if self._holds(partition, batch.advances[partition]):
                self._fence(partition, places[partition], now)
        # One transaction: where one partition has moved, all have.
        if any(
            places[partition].next_offset == batch.advances[partition].new for partition in ours
        ):
            return self.committed()._replace(foreign=foreign)
        self._flight = batch.without(batch.advances.keys() - ours) if ours else None
        self._flight_state = _Flight.READY
        self._try_at = now
        return Outcome(0, {}, foreign)

    def looked(self, places: Mapping[Partition, Ownership], now: float) -> Collection[Partition]:
        """Where owned partitions stand; those that are not where we left them.

        With nothing to write no append is refused, so this is how a worker learns that the database
        was put back to a backup: what is missing is read again before the next record comes. It
        also learns that another process claimed a partition and has released it since, as a run of
        another group does: without a claim of ours nobody owns it. A batch in hand shows by its
        own outcome what happened, and a new owner that still reads is the group's business.
        """
        if self._flight is not None:
            return ()
        moved = {
            partition
            for partition, place in places.items()
            if (owned := self._owned.get(partition))
            and (place.epoch <= owned.held or not place.is_owned)
            and (place.epoch, place.next_offset) != (owned.held, owned.stored)
        }
        for partition in moved:
            self._fence(partition, places[partition], now)
        return moved

    def released(self, partitions: Iterable[Partition]) -> int:
        """The partitions are no longer ours, or must not go on; how many rows that dropped."""
        return self._forget(partitions)

    def abandon(self) -> None:
        """Nothing is ours any more, and nobody waits for any outcome."""
        self._flight = None
        self._forget(list(self._owned) + list(self._fenced))

    # -------------------------------------------------------------------------- what is to be done

    def next_step(self, now: float) -> Step | None:
        """What to do now, if anything; each call hands out a step once."""
        for partition, reclaim_at in self._fenced.items():
            if len(self._steals[partition]) >= self.bounds.steals_max:
                return Stolen(partition)
            if reclaim_at <= now:
                self._fenced[partition] = float("inf")
                return Reclaim(partition)
        if self._flight is None:
            self._flight = self._cut()
            self._flight_state = _Flight.READY
            self._let_go.clear()
            # What had failed was let go meanwhile; this batch has not been tried yet.
            self._failures = 0
            self._try_at = now
        if self._flight is None or now < self._try_at:
            return None
        match self._flight_state:
            case _Flight.READY:
                self._flight_state = _Flight.WRITING
                return Write(self._flight)
            case _Flight.UNKNOWN:
                self._flight_state = _Flight.RESOLVING
                return Resolve(self._flight)
            case _Flight.WRITING | _Flight.RESOLVING:
                return None

    @property
    def room(self) -> int:
        """How many more records may be taken; 0 while the next batch is full."""
        if self._bytes >= self.bounds.batch_bytes_max:
            return 0
        return max(0, self.bounds.batch_rows_max - len(self._rows))

    @property
    def has_waiting(self) -> bool:
        """Whether records have come that are not in a batch yet."""
        return bool(self._rows)

    @property
    def is_with_database(self) -> bool:
        """Whether a step was handed out whose outcome has not been told."""
        return self._flight is not None and self._flight_state in (
            _Flight.WRITING,
            _Flight.RESOLVING,
        )

    @property
    def is_troubled(self) -> bool:
        """Whether the batch in hand could not be written so far, for the database failed."""
        return self._flight is not None and self._failures > 0

    @property
    def owned(self) -> Mapping[Partition, Epoch]:
        """The partitions that are ours, with the epoch of each."""
        return {partition: owned.held for partition, owned in self._owned.items()}

    @property
    def stored(self) -> Mapping[Partition, NextOffset]:
        """The next offsets of the owned partitions, as last committed."""
        return {partition: owned.stored for partition, owned in self._owned.items()}

    @property
    def behind(self) -> int:
        """Offsets between the log and Kafka's ends as last seen."""
        return sum(
            lag(owned.stored, NextOffset(owned.high_watermark or owned.target))
            for owned in self._owned.values()
        )

    def is_drained(self, partitions: Iterable[Partition]) -> bool:
        """Whether nothing of these partitions waits to be written."""
        return all(
            owned.stored == owned.taken
            for partition in partitions
            if (owned := self._owned.get(partition))
        )

    @property
    def is_caught_up(self) -> bool:
        """Whether the log holds all that Kafka had when each partition was claimed."""
        return not self._fenced and all(
            owned.stored >= owned.target for owned in self._owned.values()
        )

    # ------------------------------------------------------------------------------------ within

    def _cut(self) -> Batch | None:
        advances = {
            partition: Advance(
                owned.held, owned.stored, owned.taken, owned.high_watermark, owned.seen_at
            )
            for partition, owned in self._owned.items()
            if owned.taken > owned.stored
        }
        if not advances:
            return None
        batch = Batch(self._rows, advances)
        self._rows, self._bytes = [], 0
        return batch

    def _end_flight(self) -> Batch:
        batch = self._flight
        if batch is None:
            raise AssertionError("no batch is with the database")
        self._flight, self._flight_state, self._failures = None, _Flight.READY, 0
        return batch

    def _fence(self, partition: Partition, place: Ownership, now: float) -> None:
        taken_over = place.epoch > self._owned[partition].held and place.is_owned
        self._forget([partition])
        self._fenced[partition] = now + (self.bounds.reclaim_s_min if taken_over else 0.0)
        steals = self._steals.setdefault(partition, [])
        steals[:] = [at for at in steals if now - at < self.bounds.steals_s]
        if taken_over:
            steals.append(now)

    def _holds(self, partition: Partition, advance: Advance) -> bool:
        owned = self._owned.get(partition)
        return owned is not None and owned.held == advance.held and partition not in self._let_go

    def _forget(self, partitions: Iterable[Partition]) -> int:
        gone = set(partitions)
        for partition in gone:
            self._owned.pop(partition, None)
            self._fenced.pop(partition, None)
        kept = [row for row in self._rows if Partition(row.topic, row.partition) not in gone]
        dropped = len(self._rows) - len(kept)
        self._rows, self._bytes = kept, sum(row.size for row in kept)
        # A batch that is with the database keeps its rows: its outcome is told, and then ignored.
        if self.is_with_database:
            self._let_go |= gone
        elif self._flight is not None:
            rest = self._flight.without(gone)
            dropped += len(self._flight.rows) - len(rest.rows)
            self._flight = rest if rest.advances else None
        return dropped
