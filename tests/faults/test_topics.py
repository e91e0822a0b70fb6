"""Topics that are deleted, recreated, extended and truncated, with and without running workers."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Bench, until
from tests.integration.ingesting import Ledger, logged
from tests.servers import Kafka, KafkaServer
from tests.servers.databases import Database

# A Kafka that restarts after a session has expired may wait for dead members for as long as a
# member may be silent: 5 minutes by default.
QUICK = (
    "session.timeout.ms=6000,max.poll.interval.ms=10000,heartbeat.interval.ms=200,"
    "fetch.wait.max.ms=50,"
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


def next_offsets(bench: Bench, topic: str) -> dict[int, int]:
    return {
        partition.number: offset
        for partition, offset in bench.next_offsets().items()
        if partition.topic == topic
    }


@pytest.mark.core
def test_no_record_of_a_topic_recreated_under_a_running_worker_enters_the_log(
    bench: Bench, kafka: Kafka, topic: Callable[..., str], ledger: Ledger
):
    """Kafka returns the new topic's records at our offsets without any error, in half a second."""
    name, other = bench.topic, topic(1)
    ledger.send(name, numbered(5)).send(other, numbered(5)).flush()
    worker = bench.worker(topics=f"{name},{other}", linger_ms="10", kafka_options=QUICK)
    bench.wait_until_logged(10)

    kafka.delete_topic(name)
    kafka.create_topic(name, bench.partitions)
    Ledger(kafka.bootstrap_servers).send(name, numbered(2000, first=100)).flush()
    worker.wait_for_log("partitions_halted")
    ledger.send(other, numbered(5, first=5)).flush()
    until(lambda: next_offsets(bench, other) == {0: 10}, "the other topic is read")

    assert worker.exit_code is None
    assert logged(bench.database, name) | logged(bench.database, other) == ledger.records
    assert next_offsets(bench, name)[0] == 5
    assert all("topic id" in (text or "") for text in problem(bench, name)), problem(bench, name)


def test_a_deleted_topic_is_halted_and_the_other_topic_is_read(
    bench: Bench, kafka: Kafka, topic: Callable[..., str], ledger: Ledger
):
    """Also for a worker that starts while the topic is missing; a recreated topic is refused."""
    name, other = bench.topic, topic(1)
    both: dict[str, Any] = {"topics": f"{name},{other}", "linger_ms": "10", "kafka_options": QUICK}
    ledger.send(name, numbered(5)).send(other, numbered(5)).flush()
    first = bench.worker(**both)
    bench.wait_until_logged(10)

    kafka.delete_topic(name)
    first.wait_for_log("topic_missing")
    until(lambda: None not in problem(bench, name), "every partition of the topic has a reason")
    ledger.send(other, numbered(5, first=5)).flush()
    until(lambda: next_offsets(bench, other) == {0: 10}, "the other topic is read")
    assert problem(bench, other) == {None}
    assert all("no longer exists" in (text or "") for text in problem(bench, name))
    assert first.stop() == 0, first.tail()

    once = bench.worker("ingest", "--until-end", **both)
    ledger.send(other, numbered(5, first=10)).flush()
    assert once.wait() == 65, once.tail()
    second = bench.worker(**both)
    until(lambda: next_offsets(bench, other) == {0: 15}, "the other topic is read again")
    kafka.create_topic(name, bench.partitions + 1)
    Ledger(kafka.bootstrap_servers).send(name, numbered(9), partition=bench.partitions).flush()
    second.wait_for_log("partitions_halted")
    until(
        lambda: all("topic id" in (problem_text or "") for problem_text in problem(bench, name)),
        "the topic is detected as another topic",
    )

    assert second.stop() == 0, second.tail()
    assert logged(bench.database, name) | logged(bench.database, other) == ledger.records
    assert next_offsets(bench, name) == {0: 5, 1: 0, 2: 0, 3: 0}, "a new partition does not begin"


# ------------------------------------------------------------------------- records that Kafka loses


@pytest.mark.timeout(300)
def test_records_that_kafka_loses_and_replaces_halt_their_topic(
    private_kafka: KafkaServer, database: Database, tmp_path: Path
):
    """The topic keeps its id, and its end is after our offset again: there is no error."""
    bench = Bench(private_kafka, database, "read-before", 1, tmp_path)
    names = ["read-before", "read-on", "intact"]
    for name in names:
        private_kafka.create_topic(name)
    ledger = Ledger(private_kafka.bootstrap_servers)
    sizes = []
    for _ in range(2):
        for name in names:
            ledger.send(name, numbered(5)).flush()
        sizes.append(segment_of(private_kafka, names[0]).stat().st_size)
    once = bench.worker("ingest", "--until-end", topics="read-before", group_id="once")
    assert once.wait() == 0, once.tail()
    runs = bench.worker(topics="read-on,intact", group_id="runs", kafka_options=QUICK)
    bench.wait_until_logged(30)

    private_kafka.stop()
    for name in names[:2]:
        lose(private_kafka, name, keep=sizes[0])
    private_kafka.start()
    recreated = Ledger(private_kafka.bootstrap_servers)
    for name in names[:2]:
        recreated.send(name, numbered(15, first=100)).flush()
    ledger.send("intact", numbered(5)).flush()

    again = bench.worker("ingest", "--until-end", topics="read-before", group_id="once")
    assert again.wait() == 65, again.tail()
    runs.wait_for_log("partitions_halted")
    until(lambda: next_offsets(bench, "intact") == {0: 15}, "the other topic is read")
    assert runs.stop() == 0, runs.tail()
    for name in names[:2]:
        [text] = problem(bench, name)
        assert "Kafka has lost records" in (text or "")
        assert next_offsets(bench, name) == {0: 10}
    found = [logged(database, name) for name in names]
    assert found[0] | found[1] | found[2] == ledger.records
    bench.close()


def segment_of(kafka: KafkaServer, topic: str) -> Path:
    """The only file of records of the topic's only partition."""
    [found] = (kafka.directory / "data" / f"{topic}-0").glob("*.log")
    return found


def lose(kafka: KafkaServer, topic: str, *, keep: int) -> None:
    """Remove all but the first bytes of a partition while its broker is down."""
    segment = segment_of(kafka, topic)
    os.truncate(segment, keep)
    for kind in ("*.index", "*.timeindex", "*.snapshot"):
        for derived in segment.parent.glob(kind):
            derived.unlink()
    # Without this file the broker checks its log.
    (kafka.directory / "data" / ".kafka_cleanshutdown").unlink(missing_ok=True)
