"""From a real Kafka into a real PostgreSQL: everything, once, unchanged, and nothing else."""

import time
from datetime import UTC, datetime

import pytest
from confluent_kafka import Consumer, TopicPartition

from pipeline.errors import ConfigurationError
from pipeline.sandbox.simulator import Chaos, Simulation
from tests.integration.ingesting import (
    Ledger,
    ingest_until_end,
    installation,
    is_faithful,
    logged,
    next_offsets,
    offset_rows,
    payloads,
    read_back,
    running,
    settings_for,
    until,
)
from tests.records import HOSTILE, deep_nesting, envelope

pytestmark = deep_nesting
HOUR_MS = 3_600_000


@pytest.fixture
def ledger(kafka):
    return Ledger(kafka.bootstrap_servers)


@pytest.fixture
def settings(database, kafka):
    def make(topic, **changes):
        return settings_for(database, kafka.bootstrap_servers, topic, **changes)

    return make


def numbered(count, first=0):
    return [b'{"n": %d}' % (first + n) for n in range(count)]


def committed(kafka, group, topic, partitions):
    """The commits of the group in Kafka: offset and metadata by partition."""
    reader = Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": group})
    found = reader.committed([TopicPartition(topic, n) for n in range(partitions)], timeout=10)
    reader.close()
    return {commit.partition: (commit.offset, commit.metadata) for commit in found}


# --------------------------------------------------------------------------------- all of it, once


@pytest.mark.both_postgres
def test_the_log_equals_the_producers_ledger(kafka, topic, database, settings, ledger):
    name = topic(6, config={"max.message.bytes": "10000000"})
    for record in Simulation(seed=3, events=1500, topic=name, partitions=6, chaos=Chaos()):
        ledger.send(
            name, [record.value], partition=record.partition or 0, key=record.key,
            headers=record.headers,
        )  # fmt: skip
    ledger.send(name, [value for value, *_ in HOSTILE.values()], partition=1, key=b"\x00\xff")
    repeated = [("a", b"1"), ("a", b"\xff\x00"), ("b", None), ("", b""), ("a", b"1")]
    ledger.send(name, [None, b"", envelope()], partition=2, headers=repeated)
    ledger.send(name, [envelope(note="x" * 5_000_000)], partition=3, key=b"")
    ledger.flush()

    written = ingest_until_end(settings(name))

    assert written == len(ledger.records) > 1500
    assert logged(database, name) == ledger.records
    stored = payloads(database, name)
    assert [at for at, value in ledger.values.items() if not is_faithful(value, stored[at])] == []
    ends = {n: max(at for _, number, at in ledger.records if number == n) + 1 for n in range(6)}
    assert next_offsets(database, name) == ends
    commits = committed(kafka, name, name, 6)
    assert {n: end for n, (end, _) in commits.items()} == ends
    named = f"pipeline:{installation(database)}:"
    assert [text for _, text in commits.values() if not text.startswith(named)] == []
    assert {row.lag for row in offset_rows(database).values()} == {0}


def test_unusual_times_are_kept_where_postgresql_can_represent_them(
    kafka, topic, database, settings, ledger
):
    for_ever = str(2**63 - 1)
    name = topic(1, config={
        "message.timestamp.after.max.ms": for_ever, "retention.ms": "-1", "segment.ms": for_ever,
    })  # fmt: skip
    by_the_broker = topic(1, config={"message.timestamp.type": "LogAppendTime"})
    for milliseconds in (1, 4_102_444_800_000, 9_224_318_016_000_000, 2**62):
        ledger.send(name, numbered(1), timestamp_ms=milliseconds)
    ledger.flush()
    stamped = (
        Ledger(kafka.bootstrap_servers).send(by_the_broker, numbered(3), timestamp_ms=5).flush()
    )

    ingest_until_end(settings(f"{name},{by_the_broker}", group_id=name))

    with database.connect() as db:
        times = db.execute(
            "SELECT extract(epoch FROM kafka_timestamp)::float8, kafka_timestamp_type "
            'FROM pipeline.events WHERE topic = %s ORDER BY "offset"',
            [name],
        ).fetchall()
    assert times == [(0.001, 1), (4_102_444_800.0, 1), (None, 1), (None, 1)]
    assert logged(database, by_the_broker) == stamped.records
    assert {sent.timestamp_type for sent in stamped.records.values()} == {2}


def test_a_second_run_continues_where_the_first_ended(topic, database, settings, ledger):
    name = topic(2)
    written = []
    for n in range(3):
        ledger.send(name, numbered(10, first=10 * n), partition=n % 2).flush()
        written.append(ingest_until_end(settings(name, keep_raw=True)))

    assert written == [10, 10, 10]
    assert logged(database, name) == ledger.records
    assert {raw for _, raw in payloads(database, name).values()} == set(numbered(30))


def test_a_running_ingest_writes_records_as_they_arrive(topic, database, settings, ledger):
    name = topic(2)

    with running(settings(name)) as ingest:
        for n in range(5):
            ledger.send(name, numbered(7, first=7 * n), partition=n % 2).flush()
            until(
                lambda: sum(next_offsets(database, name).values()) == len(ledger.records),
                "the records are in the log",
            )
        until(lambda: ingest.progress == (35, 0), "the progress is reported")

    assert logged(database, name) == ledger.records


def test_an_empty_topic_is_read_to_its_end(topic, database, settings):
    name = topic(3)

    assert ingest_until_end(settings(name)) == 0

    assert next_offsets(database, name) == {0: 0, 1: 0, 2: 0}
    assert {row.lag for row in offset_rows(database).values()} == {0}


def test_several_topics_are_read_together(topic, database, settings, ledger):
    names = [topic(2), topic(1)]
    for name in names:
        ledger.send(name, numbered(5)).flush()

    ingest_until_end(settings(",".join(names), group_id=names[0]))

    assert logged(database, names[0]) | logged(database, names[1]) == ledger.records


def test_repeats_are_marked_across_batches_and_restarts(topic, database, settings, ledger):
    name = topic(1)
    first, second = envelope(), envelope(id="00000000-0000-0000-0000-000000000002")
    for values in ([first, second, first], [b"not JSON", b"not JSON"], [second, first]):
        ledger.send(name, values).flush()
        ingest_until_end(settings(name, repeat_window=4))

    with database.connect() as db:
        marks = db.execute('SELECT repeat_of FROM pipeline.events ORDER BY "offset"').fetchall()
    # The second event's first copy lies four offsets back, the first event's second copy four.
    assert [mark for (mark,) in marks] == [None, None, 0, None, None, 1, 0]


# --------------------------------------------------------------------------------- where it begins


@pytest.mark.parametrize(
    ("start", "begins"),
    [
        ("earliest", 0),
        ("latest", 30),
        (-25, 0),  # before the first record of all
        (5, 10),
        (15, 20),
        (25, 30),  # after the last
    ],
)
def test_a_new_topic_begins_at_start(topic, database, settings, ledger, start, begins):
    name = topic(1)
    now = int(time.time()) * 1000 - 20 * HOUR_MS
    for hours in (0, 10, 20):
        ledger.send(
            name, numbered(10, first=hours), timestamp_ms=now + hours * HOUR_MS - 5 * HOUR_MS
        )
    ledger.flush()
    if isinstance(start, int):
        start = datetime.fromtimestamp((now + (start - 5) * HOUR_MS) / 1000, UTC).isoformat()

    ingest_until_end(settings(name, start=start))
    ledger.send(name, numbered(3, first=90)).flush()
    ingest_until_end(settings(name, start="latest"))

    assert logged(database, name) == ledger.without(lambda at: at[2] < begins)


def test_a_partition_that_is_added_is_read_from_its_beginning(
    kafka, topic, database, settings, ledger
):
    name = topic(1)
    ledger.send(name, numbered(5)).flush()
    quick = {"topic.metadata.refresh.interval.ms": "200"}

    with running(settings(name, start="latest", options=quick)):
        until(lambda: 0 in next_offsets(database, name), "the topic has begun")
        kafka.create_partitions(name, 3)
        # The first producer learns of the new partitions only now and then.
        ledger = Ledger(kafka.bootstrap_servers)
        ledger.send(name, numbered(5), partition=1).send(name, numbered(5), partition=2).flush()
        until(
            lambda: next_offsets(database, name) == {0: 5, 1: 5, 2: 5},
            "the new partitions are in the log",
        )

    assert logged(database, name) == ledger.records


def test_a_missing_topic_is_refused_and_the_existing_ones_are_named(topic, settings):
    name = topic(1)

    with pytest.raises(
        ConfigurationError, match=f"no topic no-such-topic.*show .*{name}"
    ) as refused:
        ingest_until_end(settings(f"{name},no-such-topic", group_id=name))

    assert refused.value.exit_code == 78


# ------------------------------------------------------------------------------ gaps in the offsets


def test_aborted_records_are_left_out_and_markers_leave_no_lag(kafka, topic, database, settings):
    name = topic(1)
    ledger = Ledger(kafka.bootstrap_servers, {"transactional.id": name})
    ledger.producer.init_transactions(10)
    for n in range(6):
        ledger.producer.begin_transaction()
        ledger.send(name, numbered(3, first=3 * n))
        if n % 2:
            ledger.forget().producer.abort_transaction(10)
        else:
            ledger.flush().producer.commit_transaction(10)

    ingest_until_end(settings(name))

    assert logged(database, name) == ledger.records
    assert [at for *_, at in ledger.records] == [0, 1, 2, 8, 9, 10, 16, 17, 18]
    assert next_offsets(database, name) == {0: 24}
    assert offset_rows(database)[name, 0].lag == 0


def test_a_running_ingest_waits_for_an_open_transaction(kafka, topic, database, settings):
    name = topic(1)
    before = Ledger(kafka.bootstrap_servers).send(name, numbered(2)).flush()
    ledger = Ledger(kafka.bootstrap_servers, {"transactional.id": name})
    ledger.producer.init_transactions(10)
    ledger.producer.begin_transaction()
    ledger.send(name, numbered(3)).flush()
    after = Ledger(kafka.bootstrap_servers).send(name, numbered(2)).flush()

    with running(settings(name)):
        until(
            lambda: next_offsets(database, name) == {0: 2},
            "the log ends at the transaction",
        )
        ledger.producer.commit_transaction(10)
        until(lambda: next_offsets(database, name) == {0: 8}, "the end is reached")

    assert logged(database, name) == before.records | ledger.records | after.records


def test_a_compacted_topic_is_read_with_its_holes_and_tombstones(
    kafka, topic, database, settings, ledger
):
    config = {
        "cleanup.policy": "compact",
        "segment.ms": "100",
        "min.cleanable.dirty.ratio": "0.001",
        "max.compaction.lag.ms": "100",
        "delete.retention.ms": "600000",
    }
    name = topic(1, config=config)

    def is_compacted():
        # Only a closed segment is cleaned, and only a new record closes one.
        for n in range(4):
            ledger.send(name, [b'{"n": %d}' % n], key=b"%d" % (n % 2))
        ledger.send(name, [None], key=b"2").flush()
        return len(read_back(kafka.bootstrap_servers, name)) < len(ledger.records)

    until(is_compacted, "Kafka has compacted the topic")
    ingest_until_end(settings(name))

    found = logged(database, name)
    left = read_back(kafka.bootstrap_servers, name)
    assert left <= found.keys() < ledger.records.keys()
    assert {at: ledger.records[at] for at in found} == found
    assert next_offsets(database, name) == {0: max(at for *_, at in ledger.records) + 1}
    assert offset_rows(database)[name, 0].lag == 0


# ------------------------------------------------------------------------------ who decides where


@pytest.mark.parametrize("odd", [0, 3, 10, 1_000_000])
def test_the_offsets_committed_to_kafka_decide_nothing(
    kafka, topic, database, settings, ledger, odd
):
    name = topic(1)
    ledger.send(name, numbered(10)).flush()
    ingest_until_end(settings(name))
    other = Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": name})
    # Even if it looks like a commit of ours.
    other.commit(offsets=[TopicPartition(name, 0, odd, f"pipeline:{odd}")], asynchronous=False)
    other.close()
    ledger.send(name, numbered(5, first=10)).flush()

    written = ingest_until_end(settings(name))

    assert written == 5
    assert logged(database, name) == ledger.records
    assert committed(kafka, name, name, 1)[0][0] == 15
