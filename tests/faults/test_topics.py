"""Topics that are deleted, made anew, widened and cut back, while workers run and while none do."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.harness import Bench, until
from tests.integration.ingesting import Ledger, logged
from tests.servers import Kafka

QUICK = (
    "session.timeout.ms=6000,heartbeat.interval.ms=200,fetch.wait.max.ms=50,"
    "reconnect.backoff.max.ms=500,topic.metadata.refresh.interval.ms=500"
)


@pytest.fixture
def ledger(kafka: Kafka) -> Ledger:
    return Ledger(kafka.bootstrap_servers)


def numbered(count: int, first: int = 0) -> list[bytes | None]:
    return [b'{"n": %d}' % (first + n) for n in range(count)]


def problem(bench: Bench, topic: str) -> set[str | None]:
    rows = bench.query("SELECT problem FROM pipeline.consumer_offsets WHERE topic = %s", topic)
    return {text for (text,) in rows}


def stands(bench: Bench, topic: str) -> dict[int, int]:
    return {place.number: at for place, at in bench.next_offsets().items() if place.topic == topic}


def test_of_a_topic_made_anew_under_a_running_worker_no_record_enters_the_log(
    bench: Bench, kafka: Kafka, topic: Callable[..., str], ledger: Ledger
):
    """Kafka gives what the new topic has at our offsets without any error, within half a second."""
    name, other = bench.topic, topic(1)
    ledger.send(name, numbered(5)).send(other, numbered(5)).flush()
    worker = bench.worker(topics=f"{name},{other}", linger_ms="10", kafka_options=QUICK)
    bench.wait_until_logged(10)

    kafka.delete_topic(name)
    kafka.create_topic(name, bench.partitions)
    Ledger(kafka.bootstrap_servers).send(name, numbered(2000, first=100)).flush()
    worker.wait_until_said("partition_stands_still")
    ledger.send(other, numbered(5, first=5)).flush()
    until(lambda: stands(bench, other) == {0: 10}, "the other topic flows on")

    assert worker.exit_code is None
    assert logged(bench.database, name) | logged(bench.database, other) == ledger.records
    assert stands(bench, name)[0] == 5
    assert all("topic id" in (text or "") for text in problem(bench, name)), problem(bench, name)


def test_a_topic_that_is_deleted_stands_still_and_the_other_one_flows_on(
    bench: Bench, kafka: Kafka, topic: Callable[..., str], ledger: Ledger
):
    """Also for a worker that starts while it is gone; made anew it is refused as another one."""
    name, other = bench.topic, topic(1)
    both: dict[str, Any] = {"topics": f"{name},{other}", "linger_ms": "10", "kafka_options": QUICK}
    ledger.send(name, numbered(5)).send(other, numbered(5)).flush()
    first = bench.worker(**both)
    bench.wait_until_logged(10)

    kafka.delete_topic(name)
    first.wait_until_said("topic_gone")
    until(lambda: None not in problem(bench, name), "every partition of it says why")
    ledger.send(other, numbered(5, first=5)).flush()
    until(lambda: stands(bench, other) == {0: 10}, "the other topic flows on")
    assert problem(bench, other) == {None}
    assert all("does not exist any more" in (text or "") for text in problem(bench, name))
    assert first.stop() == 0, first.tail()

    once = bench.worker("ingest", "--until-end", **both)
    ledger.send(other, numbered(5, first=10)).flush()
    assert once.wait() == 65, once.tail()
    second = bench.worker(**both)
    until(lambda: stands(bench, other) == {0: 15}, "the other topic flows again")
    kafka.create_topic(name, bench.partitions + 1)
    Ledger(kafka.bootstrap_servers).send(name, numbered(9), partition=bench.partitions).flush()
    second.wait_until_said("partition_stands_still")
    until(lambda: all("topic id" in (it or "") for it in problem(bench, name)), "it is another one")

    assert second.stop() == 0, second.tail()
    assert logged(bench.database, name) | logged(bench.database, other) == ledger.records
    assert stands(bench, name) == {0: 5, 1: 0, 2: 0, 3: 0}, "a new partition is not begun"
