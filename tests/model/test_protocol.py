"""The protocol holds in every state there is, and each of its guards is missed at once.

What must hold in each state: the log has the records below the next offset, all, in order, once;
what a worker takes for committed is there; a worker that is left alone comes to the end.
"""

from dataclasses import replace

import pytest

from pipeline.ingest.state import Batch, Machine, Outcome
from pipeline.partitions import NextOffset, Ownership
from tests.contract.logs import Guards
from tests.model.protocol import BlindRetry, Model, Protocol, Space, Violation

pytestmark = pytest.mark.timeout(900)

# The primary key would refuse some of the harm; none of this needs it.
GUARDS = Guards(primary_key=False)
EPOCH_ALONE = GUARDS._replace(expected=False)
OFFSETS_ALONE = GUARDS._replace(epoch=False)
NEITHER = Guards(epoch=False, expected=False, primary_key=False)

# One partition with an offset that Kafka used for itself.
SMALL = Space(kafka=((0, 2),), end=3, claims_max=2, deaths_max=0)
TWO_PARTITIONS = Space(kafka=((0,), (0,)), end=1, claims_max=3, deaths_max=0, on_the_way_max=1)
WITH_A_RESTORE = Space(kafka=((0, 2),), end=3, claims_max=2, deaths_max=0, restore=True)


@pytest.mark.parametrize(
    ("protocol", "space"),
    [
        (Protocol(GUARDS), Space(kafka=((0, 2),), end=3, claims_max=2, deaths_max=1)),
        (Protocol(GUARDS), Space(kafka=((1,),), end=2, claims_max=3, deaths_max=0)),
        (Protocol(GUARDS), TWO_PARTITIONS),
        (Protocol(GUARDS), replace(WITH_A_RESTORE, on_the_way_max=1)),
        (Protocol(GUARDS, waits=False), SMALL),
        (Protocol(GUARDS, machine=BlindRetry), SMALL),
        (Protocol(OFFSETS_ALONE), SMALL),
        (Protocol(EPOCH_ALONE), SMALL),
    ],
    ids=[
        "a worker dies",
        "three claims",
        "two partitions",
        "the database is put back",
        "nobody waits",
        "a blind retry",
        "offsets alone",
        "the epoch alone",
    ],
)
def test_the_log_holds_every_record_once_in_every_state_there_is(protocol, space):
    explored = Model(protocol, space).explore()

    print(f"{explored.states} states")
    assert explored.states > 10_000
    happened = " | ".join(explored.moves)
    for what in ("cut off", "FENCED", "finds out", "is lost"):
        assert what in happened
    if space.restore:
        assert "looks around" in happened
    if space.claims_max > 2:
        assert "claims again" in happened
    assert ("dies" in happened) == (space.deaths_max > 0)
    assert ("restore" in happened) == space.restore


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
        "the epoch alone, nobody waits",
        "the epoch alone, a blind retry",
        "the epoch alone, the database is put back",
    ],
)
def test_without_a_guard_the_same_search_finds_the_harm(protocol, space):
    with pytest.raises(Violation, match=r"orders\[0\] below \d holds") as found:
        Model(protocol, space).explore()

    print(found.value)
    assert len(found.value.way) <= 10


# ----------------------------------------------------------------------------- machines with a flaw


class TakesForeignForCommitted(Machine):
    def found(self, places, now):
        batch = self._flight
        assert batch is not None
        here = {
            partition: Ownership(advance.held, advance.new)
            for partition, advance in batch.advances.items()
        }
        return super().found(here, now)


class NeverAsksAnEpoch(Machine):
    def found(self, places, now):
        batch = self._flight
        assert batch is not None
        return super().found(
            {place: at._replace(epoch=batch.advances[place].held) for place, at in places.items()},
            now,
        )


class ExpectsTheFirstRecord(Machine):
    def _cut(self):
        batch = super()._cut()
        if batch is None or not batch.rows:
            return batch
        advances = {
            partition: step._replace(
                expected=NextOffset(
                    min(it.offset for it in batch.rows if it.partition == partition.number)
                )
            )
            for partition, step in batch.advances.items()
            if any(it.partition == partition.number for it in batch.rows)
        }
        return Batch(batch.rows, advances)


class StoresTheLastOffset(Machine):
    def received(self, partition, rows):
        super().received(partition, rows)
        owned = self._owned[partition]
        owned.taken = NextOffset(owned.taken - 1)


class ForgetsThatItHasCommitted(Machine):
    def committed(self):
        batch = self._end_flight()
        return Outcome(len(batch.rows), {}, ())


class KeepsTheRowsOfAFormerClaim(Machine):
    def claimed(self, partition, held, next_offset, end):
        rows = list(self._rows)
        super().claimed(partition, held, next_offset, end)
        self._rows = rows


class WantsAgainWhatItHolds(Machine):
    def wants_from(self, partition):
        return self.stored.get(partition)


class DropsABatchThatWasNotCommitted(Machine):
    def found(self, places, now):
        outcome = super().found(places, now)
        self._flight = None
        return outcome


class LooksAtNothingWhenIdle(Machine):
    def looked(self, places, now):
        return ()


class TellsClaimsApartByTheirEpochOnly(Machine):
    def _holds(self, partition, advance):
        owned = self._owned.get(partition)
        return owned is not None and owned.held == advance.held


@pytest.mark.parametrize(
    ("flawed", "space", "harm"),
    [
        (TakesForeignForCommitted, SMALL, "takes .* for"),
        (NeverAsksAnEpoch, SMALL, "never comes to the end"),
        (ExpectsTheFirstRecord, SMALL, "never comes to the end"),
        (StoresTheLastOffset, SMALL, "never comes to the end"),
        (ForgetsThatItHasCommitted, SMALL, "never comes to the end"),
        (KeepsTheRowsOfAFormerClaim, SMALL, "below"),
        (WantsAgainWhatItHolds, SMALL, "below"),
        (DropsABatchThatWasNotCommitted, SMALL, "below"),
        (LooksAtNothingWhenIdle, WITH_A_RESTORE, "does nothing, and is not at the end"),
        (TellsClaimsApartByTheirEpochOnly, WITH_A_RESTORE, "below"),
    ],
    ids=lambda it: it.__name__ if isinstance(it, type) else None,
)
def test_a_flaw_of_the_machine_is_found_though_the_log_has_its_guards(flawed, space, harm):
    with pytest.raises(Violation, match=harm) as found:
        Model(Protocol(GUARDS, machine=flawed), space).explore()

    print(found.value)
