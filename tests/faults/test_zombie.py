"""A worker that was paused for too long writes nothing, and logs it."""

import pytest

from tests.faults.harness import Bench, Worker

PER_SECOND = 400
PROTOCOLS = ("classic", "consumer")


def resume_and_find_fenced(bench: Bench, zombie: Worker, next_owner: Worker) -> None:
    """Resume the worker after another has taken over, and wait until it logs that it is fenced."""
    bench.wait_until_owner_of_all(next_owner)
    standing = bench.logged()
    bench.wait_until_logged(standing + PER_SECOND)

    zombie.resume()

    zombie.wait_for_log("partitions_fenced", "member_timed_out")


@pytest.mark.core
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_worker_stopped_past_its_session_writes_nothing_afterwards(bench: Bench, protocol: str):
    zombie = bench.worker(kafka_group_protocol=protocol)

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_owner_of_all(zombie)
        next_owner = bench.worker(kafka_group_protocol=protocol)
        bench.wait_until_logged(PER_SECOND)
        zombie.pause()
        resume_and_find_fenced(bench, zombie, next_owner)

    bench.finish(feed.ledger)


@pytest.mark.parametrize(
    ("step", "protocol"),
    [
        ("after_poll@9", "classic"),
        ("after_begin@3", "classic"),
        ("after_fence@3", "classic"),
        ("mid_copy@3", "classic"),
        ("before_commit@3", "classic"),
        ("after_poll@9", "consumer"),
        ("before_commit@3", "consumer"),
    ],
)
def test_a_worker_stopped_during_a_batch_writes_nothing_afterwards(
    bench: Bench, step: str, protocol: str
):
    """Between fence and COMMIT it locks the partition's row until PostgreSQL ends its session."""
    zombie = bench.worker(fail=f"{step}:stop", kafka_group_protocol=protocol)

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_owner_of_all(zombie)
        zombie.wait_until_stopped()
        next_owner = bench.worker(kafka_group_protocol=protocol)
        resume_and_find_fenced(bench, zombie, next_owner)

    bench.finish(feed.ledger)


def test_a_worker_that_resumes_before_the_next_owner_writes_is_refused_by_its_epoch(
    bench: Bench,
):
    """The next offset is what it expects; only the epoch shows that it is no longer the owner."""
    zombie = bench.worker(fail="after_poll@9:stop")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_owner_of_all(zombie)
        zombie.wait_until_stopped()
        next_owner = bench.worker(fail="after_begin:stop")
        bench.wait_until_owner_of_all(next_owner)
        next_owner.wait_until_stopped()
        zombie.resume()
        zombie.wait_for_log("partitions_fenced", "member_timed_out")
        next_owner.resume()

    bench.finish(feed.ledger)
