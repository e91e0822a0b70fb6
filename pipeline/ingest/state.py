"""The decisions of the ingest loop: a state machine without I/O, clock or threads.

The loop reports what happened and executes what ``next_step`` returns. Tests, the model check and
production run this class.

One batch at a time is with the database; the next one fills meanwhile. A partition is *owned* from
its claim until it is released, lost, fenced or halted; records of any other partition are ignored.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from pipeline.backoff import SERVER, Backoff
from pipeline.events import EncodedRow
from pipeline.partitions import (
    Advance,
    Epoch,
    NextOffset,
    Offset,
    Ownership,
    Partition,
    after,
    lag,
)


@dataclass(frozen=True)
class Bounds:
    """Every bound of the ingest loop.

    Attributes:
        batch_rows_max: Maximum number of rows in one transaction.
        batch_bytes_max: Maximum number of bytes in one transaction; a larger record is written
            alone.
        backoff: Wait before a batch is tried again.
        reclaim_s_min: Wait before a fenced partition is claimed again. The group takes it from a
            process that was only paused well before.
        takeovers_max: How often another process may claim our partition within ``takeovers_s``.
        takeovers_s: See ``takeovers_max``.
    """

    batch_rows_max: int = 10_000
    batch_bytes_max: int = 8 * 1024 * 1024
    backoff: Backoff = SERVER
    reclaim_s_min: float = 5.0
    takeovers_max: int = 3
    takeovers_s: float = 60.0


@dataclass(frozen=True)
class Batch:
    """The rows of one transaction, and the next offsets that it stores."""

    rows: Sequence[EncodedRow]
    advances: Mapping[Partition, Advance]

    def without(self, partitions: Collection[Partition]) -> "Batch":
        """The batch of the other partitions."""
        return Batch(
            [row for row in self.rows if Partition(row.topic, row.partition) not in partitions],
            {
                partition: advance
                for partition, advance in self.advances.items()
                if partition not in partitions
            },
        )


class Write(NamedTuple):
    """Append the batch; then report ``committed``, ``append_refused`` or ``failed``."""

    batch: Batch


class Resolve(NamedTuple):
    """Read the next offsets of the batch's partitions; then report ``resolved`` or ``failed``."""

    batch: Batch


class Reclaim(NamedTuple):
    """Claim the partition again and continue where the log ends."""

    partition: Partition


class Contested(NamedTuple):
    """Another process claims the partition again and again. Stop."""

    partition: Partition


Step = Write | Resolve | Reclaim | Contested


class BatchResult(NamedTuple):
    """The outcome of a batch.

    Attributes:
        records: How many of its rows are now known to be in the log.
        next_offsets: The stored next offsets of the partitions that we still own.
        fenced: Partitions that we no longer own, or whose next offset somebody else has moved.
    """

    records: int
    next_offsets: Mapping[Partition, NextOffset]
    fenced: Collection[Partition]


class _BatchState(Enum):
    """What happens to the one batch in hand."""

    READY = auto()  # to be written, for the first time or again
    WRITING = auto()
    UNKNOWN = auto()  # whether it was committed must be read from the database
    RESOLVING = auto()


@dataclass
class _Owned:
    """A partition that we own.

    Attributes:
        held: The epoch of our claim.
        stored: The next offset that we committed last: what the next batch expects.
        received: The next offset after the last record that we have received, stored or not.
        target: Where the partition ended when it was claimed.
        high_watermark: Kafka's end as last reported.
        seen_at: When that was.
    """

    held: Epoch
    stored: NextOffset
    received: NextOffset
    target: NextOffset
    high_watermark: int | None = None
    seen_at: float | None = None


@dataclass
class IngestMachine:
    """See the module's text. Times are seconds of one monotonic clock."""

    bounds: Bounds = field(default_factory=Bounds)
    _owned: dict[Partition, _Owned] = field(default_factory=dict)
    _reclaim_at: dict[Partition, float] = field(default_factory=dict)
    _takeovers: dict[Partition, list[float]] = field(default_factory=dict)
    _rows: list[EncodedRow] = field(default_factory=list)
    _bytes: int = 0
    _batch: Batch | None = None
    _batch_state: _BatchState = _BatchState.READY
    # Partitions that were released while their batch is with the database. The epoch alone is not
    # enough: a database that was restored from a backup returns the same epoch again.
    _released: set[Partition] = field(default_factory=set)
    _try_at: float = 0.0
    _failures: int = 0

    # ------------------------------------------------------------------------------- what happened

    def claimed(
        self, partition: Partition, held: Epoch, next_offset: NextOffset, end: NextOffset
    ) -> None:
        """We own the partition, under ``held``; Kafka's end was ``end``."""
        self._forget([partition])
        self._owned[partition] = _Owned(held, next_offset, next_offset, end)

    def first_wanted(self, partition: Partition) -> NextOffset | None:
        """The first offset that we have not received; None if we do not own the partition.

        A record below it was fetched before a seek or delivered again: it is in the log or in a
        batch.
        """
        owned = self._owned.get(partition)
        return None if owned is None else owned.received

    def received(self, partition: Partition, rows: Sequence[EncodedRow]) -> None:
        """Records of an owned partition arrived, in offset order, none below ``first_wanted``."""
        if rows:
            self._owned[partition].received = after(Offset(rows[-1].offset))
            self._rows += rows
            self._bytes += sum(len(row.copied) for row in rows)

    def reached_end(self, partition: Partition, offset: NextOffset) -> None:
        """The partition has no record below ``offset`` that we have not received.

        After the last record there may be offsets that Kafka used for itself. Storing the end makes
        the lag of an idle partition zero.
        """
        if (owned := self._owned.get(partition)) and offset > owned.received:
            owned.received = offset

    def end_reported(self, partition: Partition, high_watermark: int, now: float) -> None:
        """Kafka reported the end of a partition. Stored with the next batch; decides nothing."""
        if owned := self._owned.get(partition):
            owned.high_watermark, owned.seen_at = high_watermark, now

    def committed(self) -> BatchResult:
        """The batch with the database is in the log."""
        batch = self._finish_batch()
        next_offsets = {}
        for partition, advance in batch.advances.items():
            if self._still_owns(partition, advance):
                self._owned[partition].stored = advance.new
                next_offsets[partition] = advance.new
        return BatchResult(len(batch.rows), next_offsets, ())

    def append_refused(self, now: float) -> None:
        """The append was refused, for a partition or a topic; nothing of the batch was written.

        The next step finds out which of the batch's partitions we still own.
        """
        self._batch_state = _BatchState.UNKNOWN
        self._try_at = now

    def failed(self, now: float) -> None:
        """The database failed while it had the batch; whether it is in the log is unknown."""
        self._failures += 1
        self._batch_state = _BatchState.UNKNOWN
        self._try_at = now + self.bounds.backoff.wait_s(self._failures)

    def resolved(self, stored: Mapping[Partition, Ownership], now: float) -> BatchResult:
        """What is stored of the batch's partitions, read after every open commit had ended."""
        batch = self._batch
        if batch is None:
            raise AssertionError("no batch is with the database")
        fenced = {
            partition
            for partition, advance in batch.advances.items()
            if stored[partition].epoch != advance.held
            or stored[partition].next_offset not in (advance.expected, advance.new)
        }
        ours = [
            partition
            for partition, advance in batch.advances.items()
            if partition not in fenced and self._still_owns(partition, advance)
        ]
        for partition in fenced:
            if self._still_owns(partition, batch.advances[partition]):
                self._fence(partition, stored[partition], now)
        # One transaction: if one partition has advanced, all have.
        if any(
            stored[partition].next_offset == batch.advances[partition].new for partition in ours
        ):
            return self.committed()._replace(fenced=fenced)
        self._batch = batch.without(batch.advances.keys() - ours) if ours else None
        self._batch_state = _BatchState.READY
        self._try_at = now
        return BatchResult(0, {}, fenced)

    def checked(self, stored: Mapping[Partition, Ownership], now: float) -> Collection[Partition]:
        """What is stored of owned partitions; returns those that are not as we left them.

        Without a batch no append is refused, so this is how a worker detects that the database was
        restored from a backup: what is missing is read again before the next record arrives. It
        also detects that another process claimed a partition and has released it since, as a run in
        another group does: without a claim of ours nobody owns it. A batch in hand detects this by
        its own outcome, and a new owner that still reads is the business of the group.
        """
        if self._batch is not None:
            return ()
        fenced = {
            partition
            for partition, row in stored.items()
            if (owned := self._owned.get(partition))
            and (row.epoch <= owned.held or not row.is_owned)
            and (row.epoch, row.next_offset) != (owned.held, owned.stored)
        }
        for partition in fenced:
            self._fence(partition, stored[partition], now)
        return fenced

    def released(self, partitions: Iterable[Partition]) -> int:
        """We no longer own the partitions; returns how many rows were dropped with them."""
        return self._forget(partitions)

    def abandon(self) -> None:
        """Own nothing, and wait for no outcome."""
        self._batch = None
        self._forget(list(self._owned) + list(self._reclaim_at))

    # -------------------------------------------------------------------------------- what to do

    def next_step(self, now: float) -> Step | None:
        """What to do now, if anything; each step is returned once."""
        for partition, reclaim_at in self._reclaim_at.items():
            if len(self._takeovers[partition]) >= self.bounds.takeovers_max:
                return Contested(partition)
            if reclaim_at <= now:
                self._reclaim_at[partition] = float("inf")
                return Reclaim(partition)
        if self._batch is None:
            self._batch = self._next_batch()
            self._batch_state = _BatchState.READY
            self._released.clear()
            # The batch that failed was released meanwhile; this one has not been tried yet.
            self._failures = 0
            self._try_at = now
        if self._batch is None or now < self._try_at:
            return None
        match self._batch_state:
            case _BatchState.READY:
                self._batch_state = _BatchState.WRITING
                return Write(self._batch)
            case _BatchState.UNKNOWN:
                self._batch_state = _BatchState.RESOLVING
                return Resolve(self._batch)
            case _BatchState.WRITING | _BatchState.RESOLVING:
                return None

    @property
    def room(self) -> int:
        """How many more records the next batch takes; 0 while it is full."""
        if self._bytes >= self.bounds.batch_bytes_max:
            return 0
        return max(0, self.bounds.batch_rows_max - len(self._rows))

    @property
    def has_rows_waiting(self) -> bool:
        """Whether records have arrived that are not in a batch yet."""
        return bool(self._rows)

    @property
    def awaits_outcome(self) -> bool:
        """Whether a step was returned whose outcome has not been reported."""
        return self._batch is not None and self._batch_state in (
            _BatchState.WRITING,
            _BatchState.RESOLVING,
        )

    @property
    def is_failing(self) -> bool:
        """Whether the database failed at every attempt to write the batch in hand."""
        return self._batch is not None and self._failures > 0

    @property
    def owned(self) -> Mapping[Partition, Epoch]:
        """The partitions that we own, with the epoch of each."""
        return {partition: owned.held for partition, owned in self._owned.items()}

    @property
    def stored(self) -> Mapping[Partition, NextOffset]:
        """The next offsets of the owned partitions, as last committed."""
        return {partition: owned.stored for partition, owned in self._owned.items()}

    @property
    def lag(self) -> int:
        """Offsets between the log and Kafka's ends as last reported."""
        return sum(
            lag(owned.stored, NextOffset(owned.high_watermark or owned.target))
            for owned in self._owned.values()
        )

    def is_drained(self, partitions: Iterable[Partition]) -> bool:
        """Whether nothing of these partitions waits to be written."""
        return all(
            owned.stored == owned.received
            for partition in partitions
            if (owned := self._owned.get(partition))
        )

    @property
    def is_caught_up(self) -> bool:
        """Whether the log has everything that Kafka had when each partition was claimed."""
        return not self._reclaim_at and all(
            owned.stored >= owned.target for owned in self._owned.values()
        )

    # ------------------------------------------------------------------------------------ within

    def _next_batch(self) -> Batch | None:
        advances = {
            partition: Advance(
                owned.held, owned.stored, owned.received, owned.high_watermark, owned.seen_at
            )
            for partition, owned in self._owned.items()
            if owned.received > owned.stored
        }
        if not advances:
            return None
        batch = Batch(self._rows, advances)
        self._rows, self._bytes = [], 0
        return batch

    def _finish_batch(self) -> Batch:
        batch = self._batch
        if batch is None:
            raise AssertionError("no batch is with the database")
        self._batch, self._batch_state, self._failures = None, _BatchState.READY, 0
        return batch

    def _fence(self, partition: Partition, stored: Ownership, now: float) -> None:
        was_taken = stored.epoch > self._owned[partition].held and stored.is_owned
        self._forget([partition])
        self._reclaim_at[partition] = now + (self.bounds.reclaim_s_min if was_taken else 0.0)
        takeovers = self._takeovers.setdefault(partition, [])
        takeovers[:] = [at for at in takeovers if now - at < self.bounds.takeovers_s]
        if was_taken:
            takeovers.append(now)

    def _still_owns(self, partition: Partition, advance: Advance) -> bool:
        owned = self._owned.get(partition)
        return owned is not None and owned.held == advance.held and partition not in self._released

    def _forget(self, partitions: Iterable[Partition]) -> int:
        gone = set(partitions)
        for partition in gone:
            self._owned.pop(partition, None)
            self._reclaim_at.pop(partition, None)
        kept = [row for row in self._rows if Partition(row.topic, row.partition) not in gone]
        dropped = len(self._rows) - len(kept)
        self._rows, self._bytes = kept, sum(row.size for row in kept)
        # A batch that is with the database keeps its rows: its outcome is reported, then ignored.
        if self.awaits_outcome:
            self._released |= gone
        elif self._batch is not None:
            rest = self._batch.without(gone)
            dropped += len(self._batch.rows) - len(rest.rows)
            self._batch = rest if rest.advances else None
        return dropped
