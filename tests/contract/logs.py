"""Two logs with one interface: the real one in PostgreSQL, and a fake one in memory.

The fake is what the random histories of ``tests/unit/test_state.py`` and the model check in
``tests/model/`` write to. ``test_log.py`` runs on both and proves that the fake behaves like the
real log.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from sqlalchemy import Engine, text

from pipeline.db import transaction
from pipeline.errors import FencedError, InvariantError
from pipeline.events import EncodedRow, Record, read
from pipeline.log import claims, offsets
from pipeline.log.append import append
from pipeline.log.claims import Owner
from pipeline.log.copying import encode
from pipeline.log.segments import make_segment
from pipeline.partitions import Advance, Epoch, NextOffset, Ownership, Partition

SPAN = 1000


class Guards(NamedTuple):
    """What an append compares; everything, unless a test needs a violation.

    The primary key would hide most violations of the first two guards; without it they are visible.
    """

    epoch: bool = True
    expected: bool = True
    primary_key: bool = True


EVERY_GUARD = Guards()


class Log(Protocol):
    """What the ingest loop needs from the log."""

    def begin(self, partition: Partition, first: int) -> None:
        """Store the first offset of a partition that has never been read."""

    def claim(self, partition: Partition) -> Ownership:
        """Raise the epoch; the new epoch and the next offset."""

    def append(self, rows: Sequence[EncodedRow], advances: Mapping[Partition, Advance]) -> None:
        """Write rows and move the next offsets, or raise and write nothing."""

    def find(self, partitions: Collection[Partition]) -> dict[Partition, Ownership]:
        """Where partitions stand."""

    def offsets(self, partition: Partition) -> list[int]:
        """The offsets of the rows, in the order in which they were written."""


@dataclass
class FakeLog:
    """The log in memory. Every call is one transaction."""

    guards: Guards = EVERY_GUARD
    ownerships: dict[Partition, Ownership] = field(default_factory=dict)
    rows: dict[Partition, list[int]] = field(default_factory=dict)

    def begin(self, partition: Partition, first: int) -> None:
        self.ownerships[partition] = Ownership(Epoch(0), NextOffset(first), is_owned=False)
        self.rows[partition] = []

    def claim(self, partition: Partition) -> Ownership:
        epoch, next_offset, _ = self.ownerships[partition]
        self.ownerships[partition] = Ownership(Epoch(epoch + 1), next_offset)
        return self.ownerships[partition]

    def append(self, rows: Sequence[EncodedRow], advances: Mapping[Partition, Advance]) -> None:
        for partition, advance in sorted(advances.items()):
            if not self._passes(partition, advance):
                raise FencedError(partition, held=advance.held)
        if self.guards.primary_key:
            self._refuse_existing_rows(rows)
        for row in rows:
            self.rows[Partition(row.topic, row.partition)].append(row.offset)
        for partition, advance in advances.items():
            self.ownerships[partition] = self.ownerships[partition]._replace(
                next_offset=advance.new
            )

    def _passes(self, partition: Partition, advance: Advance) -> bool:
        ownership = self.ownerships.get(partition)
        return (
            ownership is not None
            and (not self.guards.epoch or ownership.epoch == advance.held)
            and (not self.guards.expected or ownership.next_offset == advance.expected)
        )

    def _refuse_existing_rows(self, rows: Sequence[EncodedRow]) -> None:
        for row in rows:
            if row.offset in self.rows[Partition(row.topic, row.partition)]:
                raise InvariantError("a row is in the log already")

    def find(self, partitions: Collection[Partition]) -> dict[Partition, Ownership]:
        return {partition: self.ownerships[partition] for partition in sorted(partitions)}

    def offsets(self, partition: Partition) -> list[int]:
        return list(self.rows[partition])


class RealLog:
    """The log in a migrated database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def begin(self, partition: Partition, first: int) -> None:
        with transaction(self._engine) as db:
            offsets.begin(db, partition, NextOffset(first))
            make_segment(db, partition.topic, NextOffset(first), SPAN)

    def claim(self, partition: Partition) -> Ownership:
        with transaction(self._engine) as db:
            claim = claims.claim(db, partition, Owner("contract", "member"))
        return Ownership(claim.epoch, claim.next_offset)

    def append(self, rows: Sequence[EncodedRow], advances: Mapping[Partition, Advance]) -> None:
        with transaction(self._engine) as db:
            append(db, rows, advances)

    def find(self, partitions: Collection[Partition]) -> dict[Partition, Ownership]:
        with transaction(self._engine) as db:
            return claims.lock_ownerships(db, partitions)

    def offsets(self, partition: Partition) -> list[int]:
        with transaction(self._engine) as db:
            found = db.execute(
                text(
                    'SELECT "offset" FROM pipeline.events WHERE topic = :topic '
                    'AND "partition" = :number ORDER BY ctid'
                ),
                {"topic": partition.topic, "number": partition.number},
            )
            return list(found.scalars())


def row_at(
    partition: Partition, offset: int, value: bytes | None = b"", repeat_of: int | None = None
) -> EncodedRow:
    """A row of the log for a record of which only the coordinates matter."""
    row = read(Record(*partition, offset, value, None, None, None, 0))
    return encode(row._replace(repeat_of=repeat_of))


def owned_at(epoch: int, next_offset: int) -> Ownership:
    """The ownership of an owned partition, from plain numbers."""
    return Ownership(Epoch(epoch), NextOffset(next_offset))


def advance(held: int, expected: int, new: int, high: int | None = None) -> Advance:
    """An advance from plain numbers."""
    return Advance(Epoch(held), NextOffset(expected), NextOffset(new), high)
