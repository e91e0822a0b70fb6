"""Where a record is: partitions, offsets and the arithmetic on them.

No other module computes ``offset + 1``.
"""

from typing import NamedTuple, NewType, Self

Offset = NewType("Offset", int)
"""Names an existing record of a partition."""

NextOffset = NewType("NextOffset", int)
"""The first record of a partition that has not been handled; what we store."""

Epoch = NewType("Epoch", int)
"""The number of an ownership of a partition; every claim raises it by one."""


class Partition(NamedTuple):
    """One partition of one topic. Sorts by topic, then number: the order of taking locks.

    Written as ``TOPIC:NUMBER``, as the commands take it.
    """

    topic: str
    number: int

    def __str__(self) -> str:
        return f"{self.topic}:{self.number}"


class Ownership(NamedTuple):
    """Who owns a partition, and where its log ends.

    Attributes:
        epoch: The number of the newest ownership.
        next_offset: The first record that is not in the log.
        is_owned: Whether the newest owner still reads it; False once it was released.
    """

    epoch: Epoch
    next_offset: NextOffset
    is_owned: bool = True


class Advance(NamedTuple):
    """What a batch does to the next offset of one partition.

    Attributes:
        held: The epoch under which the partition was claimed.
        expected: The next offset that we stored last; never the first record's, as Kafka's offsets
            have gaps.
        new: The next offset after the batch.
        high_watermark: Kafka's end as last seen; None if not seen.
        seen_at: When that was, by ``time.monotonic()``; None counts as this moment.
    """

    held: Epoch
    expected: NextOffset
    new: NextOffset
    high_watermark: int | None
    seen_at: float | None = None


class OffsetRange(NamedTuple):
    """Offsets from ``first`` up to, and without, ``end``. Offsets inside may be unused."""

    first: NextOffset
    end: NextOffset

    @property
    def span(self) -> int:
        """How many offsets the range spans, in records if none is unused."""
        return self.end - self.first

    def halves(self) -> tuple[Self, Self]:
        """The range cut in two; only for a range of two offsets or more."""
        middle = NextOffset((self.first + self.end) // 2)
        return type(self)(self.first, middle), type(self)(middle, self.end)


def after(offset: Offset) -> NextOffset:
    """The next offset once the record at ``offset`` has been handled."""
    return NextOffset(offset + 1)


def lag(next_offset: NextOffset, end: NextOffset) -> int:
    """Offsets not yet handled; never negative, as ``end`` may be an older reading."""
    return max(0, end - next_offset)
