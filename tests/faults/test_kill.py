"""SIGKILL at any moment, repeatedly, neither loses nor repeats a record, in log and tables."""

import random
import time

import pytest

from pipeline.sandbox.simulator import Chaos
from tests.faults.harness import Bench, until

KILLS = 30
PER_SECOND = 250
LIFE_SECONDS_MAX = 0.7


@pytest.mark.timeout(300)
def test_thirty_kills_at_random_moments_neither_lose_nor_repeat_a_record(bench: Bench):
    """Two workers ingest and project while records arrive; one of them is always killed soon.

    Each has a name in the group, so the next worker gets its partitions at once.
    """
    seed = random.randrange(10**6)
    print(f"kills with seed={seed}")
    chance = random.Random(seed)
    names = ["one", "other"]
    workers = {name: bench.worker("run", group_instance_id=name) for name in names}

    with bench.feed(rate=PER_SECOND, chaos=Chaos(), seed=seed) as feed:
        for _ in range(KILLS):
            name = chance.choice(names)
            victim = workers[name]
            if chance.random() < 0.8:  # else the worker may be killed before it owns a partition
                until(lambda: victim.pid in bench.owners().values(), "it owns partitions")  # noqa: B023 # called at once
            time.sleep(chance.uniform(0, LIFE_SECONDS_MAX))  # a random moment is the point
            victim.kill()
            workers[name] = bench.worker("run", group_instance_id=name)

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)
    assert len(bench.writers()) > KILLS / 2, "most were killed before they wrote anything"
