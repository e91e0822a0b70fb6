"""A batch: the events of one range of one partition that a projector has to take."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from pipeline.partitions import Offset, OffsetRange, Partition

WHERE = (
    'e.topic = :topic AND e."partition" = CAST(:number AS integer) '
    'AND e."offset" >= CAST(:first AS bigint) AND e."offset" < CAST(:end AS bigint) '
    'AND (CAST(:skip AS bigint[]) IS NULL OR e."offset" <> ALL (CAST(:skip AS bigint[]))) '
    "AND e.repeat_of IS NULL"
)
"""The events of a batch, without rejected events and without repeats."""


@dataclass(frozen=True)
class Batch:
    """Which events a projector's statements are about.

    Attributes:
        partition: The partition of the log.
        offsets: The range of its offsets.
        skip: Offsets of rejected events, which are left out.
    """

    partition: Partition
    offsets: OffsetRange
    skip: frozenset[Offset] = frozenset()

    @property
    def parameters(self) -> dict[str, object]:
        """Values of the bound names in compiled statements."""
        return {
            "topic": self.partition.topic,
            "number": self.partition.number,
            "first": self.offsets.first,
            "end": self.offsets.end,
            "skip": sorted(self.skip) or None,
        }

    def without(self, rejected: Collection[Offset]) -> "Batch":
        """The same batch without these events too."""
        return replace(self, skip=self.skip | frozenset(rejected))

    def halves(self) -> Sequence["Batch"]:
        """The batch cut in two; only for one of two offsets or more."""
        return [replace(self, offsets=half) for half in self.offsets.halves()]
