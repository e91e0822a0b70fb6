"""SIGTERM ends a worker after its batch, at any moment; a second SIGTERM ends it at once."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.harness import QUICK_TO_NOTICE, Bench, until
from tests.servers import KafkaServer
from tests.servers.databases import Database

PER_SECOND = 400
STOPS = 5
LONG_SESSION = "session.timeout.ms=45000,heartbeat.interval.ms=500"
HAND_OVER_SECONDS_MAX = 15
GRACE_S = 30
"""The default grace period of Kubernetes."""


@pytest.mark.timeout(240)
def test_a_worker_may_be_stopped_at_any_moment(bench: Bench):
    """It leaves the group, so the next worker does not wait for the session to time out."""
    seed = random.randrange(10**6)
    print(f"stops with seed={seed}")
    chance = random.Random(seed)
    worker = bench.worker(kafka_options=LONG_SESSION)

    with bench.feed(rate=PER_SECOND) as feed:
        for _ in range(STOPS):
            worker.wait_for_log("started")
            time.sleep(chance.uniform(0, 1.5))  # a random moment is the point
            assert worker.stop() == 0, worker.tail()
            worker = bench.worker(kafka_options=LONG_SESSION)

    bench.finish(feed.ledger)


@pytest.mark.core
def test_a_worker_that_stops_hands_its_partitions_over_at_once(bench: Bench):
    first, second = (
        bench.worker(kafka_options=LONG_SESSION),
        bench.worker(kafka_options=LONG_SESSION),
    )

    with bench.feed(rate=PER_SECOND) as feed:
        until(
            lambda: set(bench.owners().values()) == {first.pid, second.pid}, "both own partitions"
        )
        assert first.stop() == 0, first.tail()
        bench.wait_until_owner_of_all(second, seconds_max=HAND_OVER_SECONDS_MAX)

    bench.finish(feed.ledger)


@pytest.mark.timeout(240)
def test_a_worker_that_stops_while_kafka_is_silent_ends_within_a_grace_period(
    private_kafka: KafkaServer, database: Database, tmp_path: Path
):
    topic = "orders"
    private_kafka.create_topic(topic, 1)
    bench = Bench(private_kafka, database, topic, 1, tmp_path)
    worker = bench.worker(kafka_options=QUICK_TO_NOTICE)

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        private_kafka.pause()
        assert worker.stop(seconds_max=GRACE_S) == 0, worker.tail()
        private_kafka.resume()
        bench.worker(kafka_options=QUICK_TO_NOTICE)

    bench.finish(feed.ledger)
    bench.close()


def test_a_worker_that_stops_with_postgresql_locked_ends_within_its_deadline(bench: Bench):
    worker = bench.worker(revoke_deadline_ms="1000", lock_timeout_ms="60000")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        with bench.database.connect(autocommit=False) as blocker:
            blocker.execute("LOCK TABLE pipeline.events IN SHARE ROW EXCLUSIVE MODE")
            until(lambda: bench.waits_for_lock(worker), "its COPY waits")
            assert worker.stop(seconds_max=20) == 0, worker.tail()
        bench.worker()

    bench.finish(feed.ledger)


def test_a_second_signal_ends_a_worker_at_once(bench: Bench):
    worker = bench.worker(revoke_deadline_ms="60000", lock_timeout_ms="60000")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        with bench.database.connect(autocommit=False) as blocker:
            blocker.execute("LOCK TABLE pipeline.events IN SHARE ROW EXCLUSIVE MODE")
            until(lambda: bench.waits_for_lock(worker), "its COPY waits")
            worker.send(signal.SIGTERM)
            worker.wait_for_log("stop_requested")
            worker.send(signal.SIGTERM)
            assert worker.wait(seconds_max=5) == 128 + signal.SIGTERM
        bench.worker()

    bench.finish(feed.ledger)
