"""Whose each partition is follows from who lives, and from nothing else."""

from collections import Counter
from datetime import UTC, datetime
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from pipeline.partitions import Partition
from pipeline.projection.workers import LiveWorker, shared_out

PROJECTORS = ("accounts", "orders", "users")
A_DAY = datetime(2026, 1, 12, tzinfo=UTC)

partitions = st.sets(
    st.builds(Partition, st.sampled_from(["Notifications", "Prices"]), st.integers(0, 50))
)
members = st.lists(
    st.builds(
        LiveWorker,
        worker=st.uuids(),
        host=st.just("here"),
        pid=st.integers(1, 9),
        since=st.just(A_DAY),
        projectors=st.sets(st.sampled_from(PROJECTORS)).map(sorted),
    ),
    unique_by=lambda member: member.worker,
)


@given(members, partitions)
def test_every_partition_has_one_worker_and_the_shares_differ_by_one_at_most(members, partitions):
    for projector in PROJECTORS:
        able = {member.worker for member in members if projector in member.projectors}

        owners = shared_out(members, projector, partitions)

        assert set(owners) == (partitions if able else set())
        assert set(owners.values()) <= able
        shares = Counter(dict.fromkeys(able, 0) | Counter(owners.values()))
        assert max(shares.values(), default=0) - min(shares.values(), default=0) <= 1


@given(members, partitions)
def test_projectors_that_the_same_workers_have_stay_together(members, partitions):
    alike = [member._replace(projectors=PROJECTORS) for member in members]

    owners = [shared_out(alike, projector, partitions) for projector in PROJECTORS]

    assert owners[0] == owners[1] == owners[2]


def test_a_single_worker_has_every_partition():
    alone = LiveWorker(UUID(int=1), "here", 1, A_DAY, PROJECTORS)
    all_there_are = {Partition("Notifications", number) for number in range(6)}

    assert set(shared_out([alone], "orders", all_there_are)) == all_there_are
