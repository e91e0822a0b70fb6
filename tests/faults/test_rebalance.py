"""Partitions that move while records arrive are neither read twice nor omitted."""

import random
import time
from typing import Any

import pytest

from tests.faults.harness import QUICK_TO_NOTICE, Bench, until

PER_SECOND = 400
MOVES = 6
MEMBERS_MAX = 3
MOVE_SECONDS = 1.0

WAYS: dict[str, dict[str, Any]] = {
    "cooperative": {},
    "eager": {"kafka_options": f"{QUICK_TO_NOTICE},partition.assignment.strategy=range"},
    "consumer": {"kafka_group_protocol": "consumer"},
}


@pytest.mark.parametrize("way", WAYS)
def test_workers_may_start_and_stop_continuously(bench: Bench, way: str):
    seed = random.randrange(10**6)
    print(f"moves with seed={seed}")
    chance = random.Random(seed)
    stays, *others = [bench.worker(**WAYS[way]) for _ in range(2)]

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(1)
        for _ in range(MOVES):
            time.sleep(MOVE_SECONDS)  # the test is about this pace
            if len(others) < MEMBERS_MAX and chance.random() < 0.6:
                others.append(bench.worker(**WAYS[way]))
            elif others:
                leaver = others.pop(chance.randrange(len(others)))
                leaver.wait_for_log("started")
                assert leaver.stop() == 0, leaver.tail()

    bench.finish(feed.ledger)
    assert stays.exit_code == 0
    skipped = [line["error"] for line in stays.logged("kafka_commit_skipped")]
    assert len(skipped) <= 2 * len(set(skipped)), (
        "logged once per minute, whatever the number of failures"
    )


@pytest.mark.core
def test_partitions_that_are_paused_when_revoked_are_read_when_assigned_again(
    bench: Bench,
):
    """A full batch pauses them; the client keeps the pause for longer than the assignment."""
    stays = bench.worker(lock_timeout_ms="60000", revoke_deadline_ms="1000")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        with bench.database.connect(autocommit=False) as blocker:
            blocker.execute("LOCK TABLE pipeline.events IN SHARE ROW EXCLUSIVE MODE")
            until(lambda: bench.waits_for_lock(stays), "its COPY waits")
            goes = bench.worker()
            stays.wait_for_log("partitions_revoked")
        until(lambda: set(bench.owners().values()) == {stays.pid, goes.pid}, "both own partitions")
        assert goes.stop() == 0, goes.tail()
        bench.wait_until_owner_of_all(stays)

    bench.finish(feed.ledger)
