"""Offsets of one kind, reported as a short list of intervals."""

from dataclasses import dataclass, field

from pipeline.partitions import NextOffset, Offset, OffsetRange, after

INTERVALS_MAX = 100
"""Maximum number of intervals of one kind; after that the last interval grows."""


@dataclass
class Intervals:
    """Offsets of one kind, as intervals.

    Attributes:
        count: How many offsets.
        ranges: Where they are; offsets inside may be unused. At most ``INTERVALS_MAX``; after that
            the last interval grows.
    """

    count: int = 0
    ranges: list[OffsetRange] = field(default_factory=list)

    def add(self, offset: Offset, *, joins: bool) -> None:
        """Add an offset after all others; ``joins`` where it continues the last interval."""
        self.count += 1
        if self.ranges and (joins or len(self.ranges) >= INTERVALS_MAX):
            self.ranges[-1] = self.ranges[-1]._replace(end=after(offset))
        else:
            self.ranges.append(OffsetRange(NextOffset(offset), after(offset)))
