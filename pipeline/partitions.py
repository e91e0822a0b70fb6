"""Where a record stands: partitions, offsets and the arithmetic on them.

The only place that says ``+ 1``.
"""

from typing import NamedTuple, NewType, Self

Offset = NewType("Offset", int)
"""Names an existing record of a partition."""

NextOffset = NewType("NextOffset", int)
"""The first record of a partition that has not been handled; what we store."""

Epoch = NewType("Epoch", int)
"""The number of an ownership of a partition; every claim raises it by one."""


class Partition(NamedTuple):
    """One partition of one topic. Sorts by topic, then number: the order of taking locks."""

    topic: str
    number: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.number}]"


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
