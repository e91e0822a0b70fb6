"""The protocol holds in every reachable state, and a violation is found if a guard is missing.

Invariants of each state: the log has the records below the next offset, all, in order, once; what a
worker treats as committed is in the log; a worker that runs alone reaches the end.
"""

from dataclasses import replace

import pytest

from pipeline.ingest.state import Batch, BatchResult, IngestMachine
from pipeline.partitions import NextOffset, Ownership
from tests.contract.logs import Guards
from tests.model.protocol import BlindRetry, Model, Protocol, Space, Violation

pytestmark = pytest.mark.timeout(900)

# Without the primary key, which would prevent some violations; none of this needs it.
GUARDS = Guards(primary_key=False)
EPOCH_ALONE = GUARDS._replace(expected=False)
OFFSETS_ALONE = GUARDS._replace(epoch=False)
NEITHER = Guards(epoch=False, expected=False, primary_key=False)

# One partition with an offset that Kafka used for itself.
SMALL = Space(kafka=((0, 2),), end=3, claims_max=2, deaths_max=0)
TWO_PARTITIONS = Space(kafka=((0,), (0,)), end=1, claims_max=3, deaths_max=0, open_commits_max=1)
WITH_A_RESTORE = Space(kafka=((0, 2),), end=3, claims_max=2, deaths_max=0, restore=True)


@pytest.mark.parametrize(
    ("protocol", "space"),
    [
        (Protocol(GUARDS), Space(kafka=((0, 2),), end=3, claims_max=2, deaths_max=1)),
        (Protocol(GUARDS), Space(kafka=((1,),), end=2, claims_max=3, deaths_max=0)),
        (Protocol(GUARDS), TWO_PARTITIONS),
        (Protocol(GUARDS), replace(WITH_A_RESTORE, open_commits_max=1)),
        (Protocol(GUARDS, waits=False), SMALL),
        (Protocol(GUARDS, machine=BlindRetry), SMALL),
        (Protocol(OFFSETS_ALONE), SMALL),
        (Protocol(EPOCH_ALONE), SMALL),
    ],
    ids=[
        "a worker dies",
        "three claims",
        "two partitions",
        "a restored database",
        "no waiting for open commits",
        "a blind retry",
        "offsets alone",
        "the epoch alone",
    ],
)
def test_the_log_has_every_record_once_in_every_reachable_state(protocol, space):
    explored = Model(protocol, space).explore()

    print(f"{explored.states} states")
    assert explored.states > 10_000
    moves = " | ".join(explored.moves)
    for move in ("loses its connection", "FENCED", "resolves", "is lost"):
        assert move in moves
    if space.restore:
        assert "checks" in moves
    if space.claims_max > 2:
        assert "reclaims" in moves
    assert ("dies" in moves) == (space.deaths_max > 0)
    assert ("restore" in moves) == space.restore


@pytest.mark.parametrize(
    ("protocol", "space"),
    [
        (Protocol(NEITHER), SMALL),
        (Protocol(EPOCH_ALONE, waits=False), SMALL),
        (Protocol(EPOCH_ALONE, machine=BlindRetry), SMALL),
        (Protocol(EPOCH_ALONE), WITH_A_RESTORE),
    ],
    ids=[
        "no guards",
        "the epoch alone, no waiting for open commits",
        "the epoch alone, a blind retry",
        "the epoch alone, a restored database",
    ],
)
def test_without_a_guard_the_same_search_finds_a_violation(protocol, space):
    with pytest.raises(Violation, match=r"orders:0 below \d holds") as found:
        Model(protocol, space).explore()

    print(found.value)
    assert len(found.value.moves) <= 10


# ----------------------------------------------------------------------------- faulty machines


class TreatsFencedAsCommitted(IngestMachine):
    def resolved(self, stored, now):
        batch = self._batch
        assert batch is not None
        committed = {
            partition: Ownership(advance.held, advance.new)
            for partition, advance in batch.advances.items()
        }
        return super().resolved(committed, now)


class IgnoresTheEpoch(IngestMachine):
    def resolved(self, stored, now):
        batch = self._batch
        assert batch is not None
        return super().resolved(
            {
                partition: row._replace(epoch=batch.advances[partition].held)
                for partition, row in stored.items()
            },
            now,
        )


class ExpectsTheFirstRecord(IngestMachine):
    def _next_batch(self):
        batch = super()._next_batch()
        if batch is None or not batch.rows:
            return batch
        advances = {
            partition: advance._replace(
                expected=NextOffset(
                    min(row.offset for row in batch.rows if row.partition == partition.number)
                )
            )
            for partition, advance in batch.advances.items()
            if any(row.partition == partition.number for row in batch.rows)
        }
        return Batch(batch.rows, advances)


class StoresTheLastOffset(IngestMachine):
    def received(self, partition, rows):
        super().received(partition, rows)
        owned = self._owned[partition]
        owned.received = NextOffset(owned.received - 1)


class ForgetsTheCommit(IngestMachine):
    def committed(self):
        batch = self._finish_batch()
        return BatchResult(len(batch.rows), {}, ())


class KeepsRowsOfAnEarlierClaim(IngestMachine):
    def claimed(self, partition, held, next_offset, end):
        rows = list(self._rows)
        super().claimed(partition, held, next_offset, end)
        self._rows = rows


class AcceptsRecordsTwice(IngestMachine):
    def first_wanted(self, partition):
        return self.stored.get(partition)


class DropsUncommittedBatches(IngestMachine):
    def resolved(self, stored, now):
        outcome = super().resolved(stored, now)
        self._batch = None
        return outcome


class NeverChecksWhenIdle(IngestMachine):
    def checked(self, stored, now):
        return ()


class ComparesOnlyTheEpoch(IngestMachine):
    def _still_owns(self, partition, advance):
        owned = self._owned.get(partition)
        return owned is not None and owned.held == advance.held


@pytest.mark.parametrize(
    ("faulty", "space", "violation"),
    [
        (TreatsFencedAsCommitted, SMALL, "treats .* as"),
        (IgnoresTheEpoch, SMALL, "never reaches the end"),
        (ExpectsTheFirstRecord, SMALL, "never reaches the end"),
        (StoresTheLastOffset, SMALL, "never reaches the end"),
        (ForgetsTheCommit, SMALL, "never reaches the end"),
        (KeepsRowsOfAnEarlierClaim, SMALL, "below"),
        (AcceptsRecordsTwice, SMALL, "below"),
        (DropsUncommittedBatches, SMALL, "below"),
        (NeverChecksWhenIdle, WITH_A_RESTORE, "does nothing, and is not at the end"),
        (ComparesOnlyTheEpoch, WITH_A_RESTORE, "below"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_defect_of_the_machine_is_found_although_the_log_has_its_guards(faulty, space, violation):
    with pytest.raises(Violation, match=violation) as found:
        Model(Protocol(GUARDS, machine=faulty), space).explore()

    print(found.value)
