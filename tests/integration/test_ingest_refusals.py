"""What must not be read: after lost records, another topic, another cluster, another database.

Each is reported with its name, what was expected, what was found, and what to do; the other
partitions are read.
"""

from contextlib import closing
from functools import partial
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, TopicPartition
from structlog.testing import capture_logs

from pipeline.db import open_engine, transaction
from pipeline.errors import (
    GroupFencedError,
    RecreatedTopicError,
    RetentionGapError,
    SharedGroupError,
    WrongClusterError,
)
from pipeline.ingest import loop
from pipeline.ingest.state import Bounds
from pipeline.log.gaps import accept_gap
from pipeline.partitions import Partition
from tests.integration.ingesting import (
    Ledger,
    Running,
    ingest_until_end,
    installation,
    logged,
    next_offsets,
    offset_rows,
    running,
    settings_for,
    until,
)
from tests.servers.databases import fresh_database


@pytest.fixture
def ledger(kafka):
    return Ledger(kafka.bootstrap_servers)


@pytest.fixture
def settings(database, kafka):
    def make(topic, **changes):
        return settings_for(database, kafka.bootstrap_servers, topic, **changes)

    return make


@pytest.fixture
def frequent_checks(monkeypatch):
    """The periodic checks run ten times per second."""
    monkeypatch.setattr(loop, "CHECK_S", 0.1)


def numbered(count, first=0):
    return [b'{"n": %d}' % (first + n) for n in range(count)]


def gaps(database):
    with database.connect() as db:
        return db.execute(
            'SELECT "partition", first_offset, end_offset, accepted_at IS NOT NULL '
            "FROM pipeline.gaps ORDER BY 1, 2"
        ).fetchall()


def accept(database, partition):
    engine = open_engine(database.url, application="test")
    with transaction(engine) as db:
        accepted = accept_gap(db, partition)
    engine.dispose()
    return accepted


def problem(database, topic, partition=0):
    return offset_rows(database)[topic, partition].problem


# ---------------------------------------------------------------------------------------- retention


def test_records_that_retention_deleted_halt_only_their_partition(
    kafka, topic, database, settings, ledger
):
    name = topic(3)
    for n in range(3):
        ledger.send(name, numbered(10), partition=n)
    ledger.flush()
    ingest_until_end(settings(name))
    for n in range(3):
        ledger.send(name, numbered(10, first=10), partition=n)
    ledger.flush()
    kafka.delete_records(name, 1, 17)

    with pytest.raises(RetentionGapError) as refused:
        ingest_until_end(settings(name))

    assert refused.value.exit_code == 65
    for fact in (f"{name}:1", "offset 10", "at 17", "7 offsets", f"gaps accept {name}:1"):
        assert fact in str(refused.value)
    assert problem(database, name, 1) == refused.value.what
    assert gaps(database) == [(1, 10, 17, False)]
    assert next_offsets(database, name) == {0: 20, 1: 10, 2: 20}
    assert logged(database, name) == ledger.without(lambda at: at[1] == 1 and at[2] >= 10)

    assert accept(database, Partition(name, 1)) == (10, 17)
    ingest_until_end(settings(name))

    assert gaps(database) == [(1, 10, 17, True)]
    assert problem(database, name, 1) is None
    assert logged(database, name) == ledger.without(lambda at: at[1] == 1 and 10 <= at[2] < 17)


@pytest.mark.faults
def test_retention_that_overtakes_a_running_ingest_halts_the_partition_until_the_gap_is_accepted(
    kafka, topic, database, settings, ledger, frequent_checks
):
    name = topic(2)
    ledger.send(name, numbered(5)).send(name, numbered(5), partition=1).flush()
    little_at_a_time = {"queued.max.messages.kbytes": "64", "max.partition.fetch.bytes": "20000"}

    with (
        capture_logs() as lines,
        running(settings(name, batch_rows=10, options=little_at_a_time)) as ingest,
    ):
        until(lambda: next_offsets(database, name) == {0: 5, 1: 5}, "all is in the log")
        # The database is locked while Kafka receives records and deletes them.
        with database.connect(autocommit=False) as somebody:
            somebody.execute("SELECT 1 FROM pipeline.consumer_offsets FOR UPDATE")
            ledger.send(name, [b"x" * 10_000 for _ in range(200)])
            ledger.send(name, numbered(5, first=5), partition=1).flush()
            kafka.delete_records(name, 0, 190)
        until(lambda: problem(database, name), "the gap is detected")
        stopped_at = next_offsets(database, name)[0]
        until(lambda: next_offsets(database, name)[1] == 10, "the other partition is read")

        assert gaps(database) == [(0, stopped_at, 190, False)]
        assert accept(database, Partition(name, 0)) == (stopped_at, 190)
        until(lambda: next_offsets(database, name) == {0: 205, 1: 10}, "it continues")
        ledger.send(name, numbered(2)).flush()
        until(lambda: next_offsets(database, name)[0] == 207, "it continues further")
        assert not ingest.has_ended

    assert problem(database, name) is None
    events = [line["event"] for line in lines]
    assert [event for event in events if event in ("partitions_halted", "partitions_resumed")] == [
        "partitions_halted",
        "partitions_resumed",
    ]
    assert not {"server_unavailable", "partitions_lost"} & set(events), "it stays in the group"
    assert logged(database, name) == ledger.without(
        lambda at: at[1] == 0 and stopped_at <= at[2] < 190
    )


def test_a_halted_partition_that_the_group_takes_and_returns_is_logged_as_resumed(
    kafka, topic, database, settings, ledger, monkeypatch
):
    """No check resumes it: the operator decides while another worker has it, which then stops."""
    monkeypatch.setattr(loop, "CHECK_S", 3600.0)
    name = topic(2)
    ledger.send(name, numbered(5)).send(name, numbered(5), partition=1).flush()
    ingest_until_end(settings(name))
    ledger.send(name, numbered(5)).send(name, numbered(5), partition=1).flush()
    for partition in range(2):
        kafka.delete_records(name, partition, 7)

    with capture_logs() as lines, running(settings(name)):

        def halted():
            return [line["partitions"] for line in lines if line["event"] == "partitions_halted"]

        until(lambda: problem(database, name, 0) and problem(database, name, 1), "both are halted")
        with running(settings(name)):
            until(lambda: len(halted()) == 3, "the second worker has one of them")
            for partition in range(2):
                assert accept(database, Partition(name, partition)) == (5, 7)
        until(lambda: 10 in next_offsets(database, name).values(), "the first worker reads it")

    [resumed] = [line["partitions"] for line in lines if line["event"] == "partitions_resumed"]
    assert sorted(halted()[:2]) == [[f"{name}:0"], [f"{name}:1"]]
    assert halted()[2:] == [resumed]


# -------------------------------------------------------------------------------- recreated topics


@pytest.mark.parametrize("records", [3, 5, 9], ids=["shorter", "as long", "longer"])
def test_a_recreated_topic_is_not_read(kafka, topic, database, settings, ledger, records):
    name = topic(1)
    ledger.send(name, numbered(5)).flush()
    ingest_until_end(settings(name))
    kafka.delete_topic(name)
    kafka.create_topic(name)
    Ledger(kafka.bootstrap_servers).send(name, numbered(records, first=100)).flush()

    with pytest.raises(RecreatedTopicError, match=r"expected topic id .* found .*") as refused:
        ingest_until_end(settings(name))

    assert refused.value.exit_code == 65
    assert f"{name}:0" in str(refused.value)
    assert "another topic name or into another database" in str(refused.value)
    assert problem(database, name) == refused.value.what
    assert logged(database, name) == ledger.records


@pytest.mark.parametrize("records", [2, 20], ids=["shorter", "longer"])
def test_a_topic_that_is_recreated_under_a_running_ingest_is_detected(
    kafka, topic, database, settings, ledger, frequent_checks, records
):
    name, other = topic(1), topic(1)
    ledger.send(name, numbered(5)).send(other, numbered(5)).flush()
    # A member that went while its topic did counts until its session ends.
    quick = {"topic.metadata.refresh.interval.ms": "200", "session.timeout.ms": "6000"}

    with running(settings(f"{name},{other}", group_id=name, options=quick)):
        until(lambda: next_offsets(database, name) == {0: 5}, "all is in the log")
        kafka.delete_topic(name)
        kafka.create_topic(name)
        Ledger(kafka.bootstrap_servers).send(name, numbered(records, first=100)).flush()
        until(lambda: "topic id" in (problem(database, name) or ""), "the new topic is detected")
        ledger.send(other, numbered(5, first=5)).flush()
        until(lambda: next_offsets(database, other) == {0: 10}, "the other topic is read")

    of_first_topic = {at: sent for at, sent in ledger.records.items() if at[0] == name}
    found = logged(database, name)
    assert {at: found[at] for at in of_first_topic} == of_first_topic
    assert logged(database, other).items() <= ledger.records.items()


# ---------------------------------------------------------------- another cluster, another database


def test_another_cluster_than_that_of_the_log_is_detected(
    topic, database, settings, ledger, mock_broker
):
    name = topic(1)
    ledger.send(name, numbered(5)).flush()
    ingest_until_end(settings(name))
    mock_broker.create_topic(name, 1)
    Ledger(mock_broker.bootstrap_servers).send(name, numbered(9)).flush()

    with pytest.raises(WrongClusterError) as refused:
        ingest_until_end(settings_for(database, mock_broker.bootstrap_servers, name))

    assert refused.value.exit_code == 65
    assert "PIPELINE_KAFKA_BOOTSTRAP_SERVERS" in str(refused.value)
    assert logged(database, name) == ledger.records
    ingest_until_end(settings(name))
    assert problem(database, name) is None


@pytest.fixture
def another_database(postgres_server, _templates):
    with fresh_database(postgres_server, template=_templates(postgres_server)) as made:
        # A copy of a template has its identity too.
        with made.connect() as db:
            db.execute("UPDATE pipeline.installation SET installation_id = gen_random_uuid()")
        yield made


def test_a_second_database_in_the_same_group_is_refused(
    kafka, topic, database, settings, ledger, another_database
):
    name = topic(2)
    ledger.send(name, numbered(5)).send(name, numbered(5), partition=1).flush()
    ingest_until_end(settings(name))

    with pytest.raises(SharedGroupError) as refused:
        ingest_until_end(settings_for(another_database, kafka.bootstrap_servers, name))

    assert refused.value.exit_code == 65
    for fact in (name, str(installation(database)), str(installation(another_database))):
        assert fact in str(refused.value)
    assert logged(another_database, name) == {}
    assert {p for p in (problem(another_database, name, n) for n in (0, 1)) if p is None} == set()


def test_another_database_that_joins_the_group_later_is_detected(
    kafka, topic, database, settings, ledger, frequent_checks
):
    """Each database would have a part of the events, and no error would be reported."""
    name = topic(2)
    ledger.send(name, numbered(5)).send(name, numbered(5), partition=1).flush()
    other = uuid4()
    member = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap_servers,
            "group.id": name,
            "partition.assignment.strategy": "cooperative-sticky",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
        }
    )

    def joins_and_commits():
        member.consume(10, 0.1)
        mine = member.assignment()
        for partition in mine:
            commit = TopicPartition(partition.topic, partition.partition, 0, f"pipeline:{other}")
            member.commit(offsets=[commit], asynchronous=False)
        return mine

    quick = {"heartbeat.interval.ms": "200", "session.timeout.ms": "6000"}
    with closing(member), running(settings(name, options=quick)):
        until(lambda: next_offsets(database, name) == {0: 5, 1: 5}, "all is in the log")
        member.subscribe([name])
        until(joins_and_commits, "the other member has a partition")
        halted = until(
            lambda: [row.problem for row in offset_rows(database).values() if row.problem],
            "a partition is halted",
        )

    assert [str(other) in reason and f"consumer group '{name}'" in reason for reason in halted] == [
        True
    ]


def test_two_groups_on_one_database_do_not_replace_each_other_forever(
    topic, database, settings, ledger, monkeypatch
):
    """Safe, but each would take the partitions from the other for ever."""
    monkeypatch.setattr(loop, "Bounds", partial(Bounds, reclaim_s_min=0.2))
    name = topic(2)
    both = [Running(settings(name, group_id=f"{name}-{n}")) for n in range(2)]

    def one_has_ended():
        ledger.send(name, numbered(1)).send(name, numbered(1), partition=1).flush()
        return any(ingest.has_ended for ingest in both)

    try:
        until(one_has_ended, "one of them ends")
    finally:
        errors = [ingest.end() for ingest in both]
    ingest_until_end(settings(name, group_id=f"{name}-0"))

    # If each owned one of the partitions, both were fenced as often, and both have ended.
    ended = [error for error in errors if error is not None]
    assert [type(error) for error in ended] in ([GroupFencedError], [GroupFencedError] * 2)
    assert all(getattr(error, "exit_code", None) == 75 for error in ended)
    assert "another PIPELINE_GROUP_ID" in str(ended[0])
    assert logged(database, name) == ledger.records
