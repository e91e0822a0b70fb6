"""The core of the ingest on librdkafka's mock broker: without Java, in seconds."""

import ctypes
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, Uuid
from structlog.testing import capture_logs

from pipeline.db import open_engine, transaction
from pipeline.errors import RecreatedTopicError, RetentionGapError, TransientError
from pipeline.ingest import loop, membership
from pipeline.ingest.claim import Claimed, Claimer
from pipeline.kafka import group, metadata
from pipeline.kafka.consumer import GroupConsumer
from pipeline.kafka.metadata import Brokers
from pipeline.kafka.reports import ClientReports
from pipeline.log import claims, offsets
from pipeline.log.append import append
from pipeline.log.claims import Owner
from pipeline.log.installation import installation_id
from pipeline.log.segments import make_segment
from pipeline.partitions import NextOffset, Partition
from pipeline.sandbox.servers import broker
from pipeline.sandbox.servers.broker import MockBroker
from tests.contract.logs import advance, row_at
from tests.integration.ingesting import (
    Ledger,
    ingest_until_end,
    is_faithful,
    logged,
    next_offsets,
    offset_rows,
    payloads,
    running,
    settings_for,
    until,
)
from tests.records import HOSTILE, deep_nesting

pytestmark = deep_nesting
TOPIC = "orders"


@pytest.fixture(autouse=True)
def short_requests(monkeypatch):
    """This broker never answers some requests, and none while it is down."""
    monkeypatch.setattr(metadata, "OPTIONAL_REQUEST_S_MAX", 0.3)
    monkeypatch.setattr(metadata, "REQUEST_S_MAX", 2.0)
    monkeypatch.setattr(group, "REQUEST_S_MAX", 2.0)


@pytest.fixture
def settings(database, mock_broker):
    mock_broker.create_topic(TOPIC, 2)

    def make(**changes):
        return settings_for(
            database, mock_broker.bootstrap_servers, TOPIC, kafka_group_protocol="consumer",
            **changes,
        )  # fmt: skip

    return make


@pytest.fixture
def ledger(mock_broker):
    return Ledger(mock_broker.bootstrap_servers)


def timeless(records):
    """Without the times: this broker confirms others than it stores."""
    return {at: sent[:3] for at, sent in records.items()}


def numbered(count, first=0):
    return [b'{"n": %d}' % (first + n) for n in range(count)]


def test_every_record_is_in_the_log_as_it_was_sent(database, settings, ledger):
    headers = [("a", b"1"), ("a", None), ("b", b"\xff")]
    values = [value for value, *_ in HOSTILE.values()]
    ledger.send(TOPIC, values, key=b"\x00", headers=headers)
    ledger.send(TOPIC, numbered(50), partition=1).flush()

    assert ingest_until_end(settings()) == len(ledger.records)
    assert ingest_until_end(settings()) == 0

    assert timeless(logged(database, TOPIC)) == timeless(ledger.records)
    stored = payloads(database, TOPIC)
    assert [at for at, value in ledger.values.items() if not is_faithful(value, stored[at])] == []


def produce_with_a_header_named(name, bootstrap_servers):
    """What librdkafka lets a program in C send; Python's client does not."""
    library = ctypes.CDLL(str(broker._shipped_library()))
    pointer = ctypes.c_void_p
    for function in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_headers_new"):
        getattr(library, function).restype = pointer
    configuration = pointer(library.rd_kafka_conf_new())
    library.rd_kafka_conf_set(
        configuration, b"bootstrap.servers", bootstrap_servers.encode(), None, 0
    )
    library.rd_kafka_conf_set(configuration, b"log_level", b"0", None, 0)
    producer = pointer(library.rd_kafka_new(0, configuration, None, 0))
    headers = pointer(library.rd_kafka_headers_new(1))
    library.rd_kafka_header_add(headers, name, len(name), b"value", 5)
    end, topic, partition, value, flags, with_headers, copy = 0, 1, 3, 4, 7, 10, 2
    refused = library.rd_kafka_producev(
        producer, topic, TOPIC.encode(), partition, ctypes.c_int32(0), value, b"a value",
        ctypes.c_size_t(7), flags, copy, with_headers, headers, end,
    )  # fmt: skip
    assert refused == 0
    assert library.rd_kafka_flush(producer, 10_000) == 0
    library.rd_kafka_destroy(producer)


def test_a_header_that_the_client_cannot_read_empties_only_the_headers(
    database, settings, ledger, mock_broker
):
    # So many that the interpreter has specialized the calls.
    ledger.send(TOPIC, numbered(100)).flush()
    produce_with_a_header_named(b"\xff\xfe", mock_broker.bootstrap_servers)
    ledger.send(TOPIC, numbered(1)).flush()

    ingest_until_end(settings())

    assert payloads(database, TOPIC)[TOPIC, 0, 100] == (None, b"a value")
    assert next_offsets(database, TOPIC)[0] == 102
    with database.connect() as db:
        headers = db.execute('SELECT headers FROM pipeline.events ORDER BY "offset"').fetchall()
    unreadable = ([[{"unreadable": "a name is not UTF-8"}, None]],)
    assert headers == [*[(None,)] * 100, unreadable, (None,)]


def test_a_running_ingest_continues_when_the_broker_is_available_again(
    database, settings, ledger, mock_broker
):
    ledger.send(TOPIC, numbered(5)).flush()

    with running(settings()):
        until(lambda: next_offsets(database, TOPIC) == {0: 5, 1: 0}, "all is in the log")
        mock_broker.set_down()
        mock_broker.set_up()
        ledger.send(TOPIC, numbered(5, first=5)).flush()
        until(lambda: next_offsets(database, TOPIC)[0] == 10, "all is in the log")

    assert timeless(logged(database, TOPIC)) == timeless(ledger.records)


def test_a_restored_database_is_filled_again_without_new_records(database, settings, ledger):
    """A backup from when the running worker had claimed already: the epoch is the same."""
    ledger.send(TOPIC, numbered(20)).flush()

    with running(settings()):
        until(lambda: next_offsets(database, TOPIC) == {0: 20, 1: 0}, "all is in the log")
        with database.connect(autocommit=False) as db:
            db.execute("SET LOCAL session_replication_role = replica")
            db.execute('DELETE FROM pipeline.events WHERE "offset" >= 8')
            db.execute('UPDATE pipeline.consumer_offsets SET next_offset = 8 WHERE "partition" = 0')
        until(lambda: next_offsets(database, TOPIC) == {0: 20, 1: 0}, "it is filled again")

    assert timeless(logged(database, TOPIC)) == timeless(ledger.records)


def test_records_that_retention_deleted_are_a_gap(database, settings, ledger, mock_broker):
    for n in range(2):
        ledger.send(TOPIC, numbered(5), partition=n)
    ledger.flush()
    ingest_until_end(settings())
    for n in range(2):
        ledger.send(TOPIC, numbered(5, first=5), partition=n)
    ledger.flush()
    mock_broker.delete_records(TOPIC, 0, 8)

    with pytest.raises(RetentionGapError, match=r"offset 5.*at 8: 3 offsets are lost"):
        ingest_until_end(settings())

    assert timeless(logged(database, TOPIC)) == timeless(
        ledger.without(lambda at: at[1] == 0 and at[2] >= 5)
    )


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (3, "to continue at offset 5.*a topic that ends at 3"),
        (9, "the record of the log at offset 4.*another record there"),
    ],
    ids=["shorter", "longer"],
)
def test_a_recreated_topic_is_detected_by_its_records(
    database, settings, ledger, mock_broker, records, reason
):
    """This broker returns no topic id."""
    ledger.send(TOPIC, numbered(5)).flush()
    ingest_until_end(settings())
    mock_broker.delete_topic(TOPIC)
    mock_broker.create_topic(TOPIC, 2)
    Ledger(mock_broker.bootstrap_servers).send(TOPIC, numbered(records, first=100)).flush()

    with pytest.raises(RecreatedTopicError, match=reason):
        ingest_until_end(settings())

    assert timeless(logged(database, TOPIC)) == timeless(ledger.records)


def test_a_topic_that_was_not_recreated_is_read_on(database, settings, ledger, mock_broker):
    ledger.send(TOPIC, [None, *numbered(4)]).send(TOPIC, [None], partition=1).flush()
    ingest_until_end(settings())
    # The last record of one partition is gone, that of the other is a tombstone.
    mock_broker.delete_records(TOPIC, 0, 5)
    ledger.send(TOPIC, numbered(2, first=5)).flush()

    ingest_until_end(settings())

    assert timeless(logged(database, TOPIC)) == timeless(ledger.records)
    assert {row.problem for row in offset_rows(database).values()} == {None}


def test_the_last_commit_of_a_former_owner_does_not_make_a_topic_look_recreated(
    database, settings, ledger, mock_broker
):
    """Its records arrived, and its commit ended, while the claim waited for it."""
    partition = Partition(TOPIC, 0)
    ledger.send(TOPIC, numbered(5)).flush()
    engine = open_engine(database.url, application="test")
    with transaction(engine) as db:
        for number in range(2):
            offsets.begin(db, Partition(TOPIC, number), NextOffset(0))
        make_segment(db, TOPIC, NextOffset(0), 1000)
        held = claims.claim(db, partition, Owner("group", "former")).epoch
    consumer = GroupConsumer(settings(), ClientReports())
    with transaction(engine) as db:
        identity = installation_id(db)
    claimer = Claimer(engine, consumer, settings(), identity)
    claimed = []

    with engine.connect() as former, database.connect() as watcher:
        former.execute(claims.LOCK_OWNERSHIP, {"of_topic": TOPIC, "of_number": 0})
        claiming = threading.Thread(target=lambda: claimed.append(claimer.claim([partition])))
        claiming.start()
        until(
            lambda: watcher.execute(
                "SELECT true FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
                "AND datname = current_database()"
            ).fetchone(),
            "the claim waits",
        )
        ledger.send(TOPIC, numbered(5, first=5)).flush()
        rows = [row_at(partition, n, value) for n, value in enumerate(numbered(10))]
        append(former, rows, {partition: advance(held, 0, 10)})
        former.commit()
        claiming.join(20)

    [outcome] = [results[partition] for results in claimed]
    assert isinstance(outcome, Claimed), outcome
    assert (outcome.start, outcome.end, outcome.held) == (10, 10, held + 1)
    consumer.leave()
    engine.dispose()


@pytest.mark.parametrize(
    ("bits", "ids"), [((0, 0), {}), ((0, 7), {TOPIC: "AAAAAAAAAAAAAAAAAAAABw"})]
)
def test_a_topic_id_of_zeros_is_no_id(settings, monkeypatch, bits, ids):
    """Brokers before Kafka 2.8 leave the field as it is; every topic would seem to be the same."""
    brokers = Brokers(settings(), ClientReports())
    answer: Future[Any] = Future()
    answer.set_result(SimpleNamespace(topic_id=Uuid(*bits)))
    monkeypatch.setattr(
        brokers, "_admin", SimpleNamespace(describe_topics=lambda *_, **__: {TOPIC: answer})
    )

    assert brokers.topic_ids([TOPIC]) == ids

    brokers.close()


def test_a_commit_does_not_ask_the_client_for_its_member_id(settings, ledger, monkeypatch):
    """A client that leaves its group may never answer, and then stops every thread."""
    requests: list[str] = []
    requests_of_commits: list[tuple[str, ...]] = []
    commit, member_id = GroupConsumer.commit, GroupConsumer.member_id.fget  # type: ignore[attr-defined]

    def observed_commit(self, *arguments):
        requests.clear()
        commit(self, *arguments)
        requests_of_commits.append(tuple(requests))

    def observed_member_id(self):
        requests.append(member_id(self))
        return requests[-1]

    monkeypatch.setattr(GroupConsumer, "commit", observed_commit)
    monkeypatch.setattr(GroupConsumer, "member_id", property(observed_member_id))
    ledger.send(TOPIC, numbered(3)).flush()

    ingest_until_end(settings())

    assert set(requests_of_commits) == {()}


def test_brokers_that_do_not_answer_are_a_transient_error(database, settings, mock_broker):
    brokers = Brokers(settings(options={"socket.timeout.ms": "1000"}), ClientReports())
    mock_broker.set_down()

    with pytest.raises(TransientError, match="refuses connections"):
        brokers.watermarks(Partition(TOPIC, 0))

    mock_broker.set_up()
    assert until(lambda: brokers.watermarks(Partition(TOPIC, 0)) == (0, 0), "an answer")
    brokers.close()


def test_a_lost_connection_is_explained_without_a_request_that_kafka_cannot_read(capfd):
    """A broker without TLS logs an error for each TLS handshake."""
    with MockBroker() as broker_without_tls:
        reports = ClientReports()
        reports.client_created(
            {"bootstrap.servers": broker_without_tls.bootstrap_servers}, "pipeline"
        )
        lost = KafkaError(
            KafkaError._TRANSPORT, f"{broker_without_tls.bootstrap_servers}/1: Disconnected"
        )

        error = reports.translated(lost)

    assert "Disconnected" in str(error)
    assert "PROTOERR" not in capfd.readouterr().err


def test_a_process_that_waits_for_its_assignment_says_so_once(
    database, mock_broker, settings, monkeypatch
):
    """The first check runs after the first poll, which does not wait here."""
    monkeypatch.setattr(membership, "PENDING_S", 0.0)
    monkeypatch.setattr(loop, "IDLE_WAIT_S", 0.0)
    Ledger(mock_broker.bootstrap_servers).send(TOPIC, [b"1"]).flush()

    with capture_logs() as lines, running(settings()):
        until(lambda: 1 in next_offsets(database, TOPIC).values(), "the record is read")

    events = [line["event"] for line in lines]
    assert events.count("assignment_pending") == 1
    assert events.index("assignment_pending") < events.index("partitions_claimed")
