"""Brokers that are unavailable: a one-shot command does not wait forever, `run` continues."""

import re
import socketserver
import threading
import time
from collections.abc import Iterator, MutableSequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer
from structlog.testing import capture_logs

from pipeline import outages
from pipeline.backoff import Backoff
from pipeline.catalogue import Catalogue
from pipeline.db import open_engine
from pipeline.errors import TransientError
from pipeline.health.status import read_status, states
from pipeline.ingest import loop
from pipeline.ingest.process import Progress
from pipeline.ingest.service import Ingest
from pipeline.kafka import metadata
from pipeline.kafka.client import consumer_config
from pipeline.sandbox.servers.broker import MockBroker
from pipeline.settings import Settings
from tests.faults import ledger as sent
from tests.faults.harness import QUICK_TO_NOTICE, Bench, until
from tests.integration.ingesting import Ledger, logged, running, settings_for
from tests.servers import KafkaServer
from tests.servers.databases import Database

RECORDS = 20_000


def test_a_one_shot_ingest_ends_when_its_brokers_stop_answering(
    database: Database, mock_broker: MockBroker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.outages.UNAVAILABLE_S_MAX", 1.0)
    monkeypatch.setattr(loop, "CHECK_S", 0.5)
    monkeypatch.setattr("pipeline.kafka.metadata.REQUEST_S_MAX", 1.0)
    mock_broker.create_topic("orders", 1)
    producer = Producer({"bootstrap.servers": mock_broker.bootstrap_servers, "log_level": 0})
    for _ in range(RECORDS):
        producer.produce("orders", b"{}", partition=0)
    assert producer.flush(30) == 0
    engine = open_engine(database.url, application="ingest")
    written = 0

    def go_away(progress: Progress) -> None:
        nonlocal written
        if progress.written and not written:
            mock_broker.set_down()
        written = progress.written
        # So that few records are fetched ahead.
        time.sleep(0.01)

    ingest = Ingest(
        settings_of(database, mock_broker),
        engine,
        stop=threading.Event(),
        until_end=True,
        observe=go_away,
    )
    with pytest.raises(TransientError):
        ingest.run()

    engine.dispose()
    assert 0 < written < RECORDS
    # A client that did not close in time may log later, when it closes.
    mock_broker.set_up()
    until(lambda: "kafka-close" not in {thread.name for thread in threading.enumerate()}, "closed")


def settings_of(database: Database, broker: MockBroker) -> Settings:
    return Settings.model_validate(
        {
            "database_url": database.url,
            "kafka_bootstrap_servers": broker.bootstrap_servers,
            "kafka_security_protocol": "PLAINTEXT",
            # Maximum time that the client waits for the answer to a commit before it leaves.
            "kafka_options": "session.timeout.ms=1000,heartbeat.interval.ms=300,"
            "queued.max.messages.kbytes=1,fetch.message.max.bytes=1000",
            "topics": "orders",
            "batch_rows": 10,
        }
    )


@pytest.mark.core
@pytest.mark.timeout(240)
def test_a_batch_is_committed_only_after_kafka_confirms_its_topic(
    private_kafka: KafkaServer, database: Database, tmp_path: Path
):
    bench = Bench(private_kafka, database, "waits", 1, tmp_path)
    private_kafka.create_topic("waits")
    ledger = Ledger(private_kafka.bootstrap_servers)
    ledger.send("waits", [b"1"] * 20).flush()
    with database.connect(autocommit=False) as blocker:
        blocker.execute("LOCK TABLE pipeline.events IN SHARE ROW EXCLUSIVE MODE")
        worker = bench.worker(kafka_options="reconnect.backoff.max.ms=500")
        until(lambda: bench.waits_for_lock(worker), "its COPY waits")
        private_kafka.pause()
        # An earlier request may still be answered; the next attempt sends another request.
        until(lambda: not bench.waits_for_lock(worker), "it gives up")
        until(lambda: bench.waits_for_lock(worker), "it tries again")

    def has_missed_kafka() -> bool:
        return any(
            line["reason"].startswith("Kafka at ") for line in worker.logged("server_unavailable")
        )

    until(has_missed_kafka, "the worker logs what it waits for")
    assert bench.logged() == 0
    private_kafka.resume()
    bench.wait_until_logged(20)

    assert worker.stop() == 0, worker.tail()
    assert logged(database, "waits") == ledger.records
    bench.close()


@pytest.mark.timeout(240)
def test_a_worker_continues_by_itself_after_its_only_broker_was_killed_under_load(
    private_kafka: KafkaServer, database: Database, tmp_path: Path
):
    bench = Bench(private_kafka, database, "killed", 2, tmp_path)
    private_kafka.create_topic("killed", 2)
    # Maximum time that a restarted Kafka waits for dead members: 5 minutes by default.
    worker = bench.worker(kafka_options=f"{QUICK_TO_NOTICE},max.poll.interval.ms=20000")
    with bench.feed(rate=200) as feed:
        bench.wait_until_logged(200)
        private_kafka.kill()
        private_kafka.start()
        here = bench.logged()
        bench.wait_until_logged(here + 200, seconds_max=120)
        feed.stop()

    bench.finish(sent.Ledger.read_back(private_kafka.bootstrap_servers, "killed", 2))
    assert worker.exit_code == 0
    bench.close()


# ------------------------------------------------------------- time left before retention deletes


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[MutableSequence[Any]]:
    """Log an outage again every second, and run the checks more often; the log lines."""
    monkeypatch.setattr(outages, "REPORTS_S", (1.0,))
    monkeypatch.setattr(outages, "SERVER", Backoff(0.1, 0.5))
    monkeypatch.setattr(loop, "CHECK_S", 0.2)
    monkeypatch.setattr(metadata, "REQUEST_S_MAX", 0.5)
    monkeypatch.setattr(metadata, "OPTIONAL_REQUEST_S_MAX", 0.5)
    with capture_logs() as lines:
        yield lines


def seconds_left(lines: MutableSequence[Any], server: str) -> list[float]:
    """The seconds that each line of an outage names, in order; 0 if the time is over."""
    return [
        float(reported[1] or 0)
        for line in lines
        if line["event"] == "server_unavailable" and line["reason"].startswith(server)
        if (reported := re.search(r"in about ([\d.]+) s|is over", line["effect"]))
    ]


@pytest.mark.timeout(120)
def test_while_kafka_is_unavailable_log_and_status_report_how_long_it_keeps_unread_records(
    private_kafka: KafkaServer,
    database: Database,
    impatient: MutableSequence[Any],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
):
    monkeypatch.setattr(states, "SEEN_S_MAX", 1.0)
    retention_s = 8
    private_kafka.create_topic("kept", config={"retention.ms": str(retention_s * 1000)})
    ledger = Ledger(private_kafka.bootstrap_servers).send("kept", [b"1"] * 5).flush()
    # After a longer silence the group waits for the worker again.
    soon = {"session.timeout.ms": "4000", "heartbeat.interval.ms": "1000"}
    settings = settings_for(database, private_kafka.bootstrap_servers, "kept", options=soon)
    engine = open_engine(database.url, application="status")
    request.addfinalizer(engine.dispose)

    def of_status() -> str:
        return " ".join(problem.what for problem in read_status(engine, Catalogue(())).problems)

    with running(settings):
        until(lambda: logged(database, "kept") == ledger.records, "all is read")
        until(lambda: has_recorded_retention(database), "how long Kafka keeps it is recorded")
        private_kafka.pause()
        until(lambda: len(seconds_left(impatient, "Kafka")) > 2, "it is logged repeatedly")
        until(
            lambda: "Kafka may delete the oldest unread event" in of_status(), "status reports it"
        )
        until(lambda: 0 in seconds_left(impatient, "Kafka"), "the time is over")
        until(
            lambda: "may have deleted events" in of_status(), "status reports that the time is over"
        )
        private_kafka.resume()
        until(
            lambda: "server_available" in [line["event"] for line in impatient],
            "the server is available",
        )
        until(lambda: "unread event" not in of_status(), "status no longer reports it")

    reported = seconds_left(impatient, "Kafka")
    assert reported == sorted(reported, reverse=True), "it shrinks"
    assert retention_s > reported[0] > reported[-1]


def has_recorded_retention(database: Database) -> bool:
    """Whether the worker has requested ends and retention since it has read everything."""
    with database.connect() as db:
        found = db.execute(
            "SELECT FROM pipeline.consumer_offsets WHERE retention_ms IS NOT NULL "
            "AND high_watermark = next_offset AND watermarks_at > committed_at"
        )
        return found.rowcount > 0


@pytest.mark.timeout(120)
def test_while_postgresql_is_unavailable_the_log_reports_how_long_kafka_keeps_unread_records(
    private_kafka: KafkaServer, database: Database, impatient: MutableSequence[Any]
):
    """From Kafka's answers while it answers, then from its last answer."""
    retention_s = 100
    private_kafka.create_topic("unread", config={"retention.ms": str(retention_s * 1000)})
    ledger = Ledger(private_kafka.bootstrap_servers).send("unread", [b"1"] * 5).flush()
    settings = settings_for(
        database,
        private_kafka.bootstrap_servers,
        "unread",
        lock_timeout_ms=200,
        options={"socket.timeout.ms": "1000", "api.version.request.timeout.ms": "1000"},
    )

    def reported() -> list[float]:
        return seconds_left(impatient, "PostgreSQL")

    with running(settings):
        until(lambda: logged(database, "unread") == ledger.records, "all is read")
        with database.connect(autocommit=False) as blocker:
            blocker.execute("LOCK TABLE pipeline.events IN SHARE ROW EXCLUSIVE MODE")
            ledger.send("unread", [b"2"] * 5).flush()
            until(reported, "it is logged")
            private_kafka.pause()
            before = len(reported())
            until(lambda: len(reported()) > before, "it is logged again")
            private_kafka.resume()
            private_kafka.delete_records("unread", 0, 10)
            until(lambda: 0 in reported(), "the records are deleted")
        until(lambda: logged(database, "unread") == ledger.records, "the records were in a batch")

    seconds = reported()
    assert seconds == sorted(seconds, reverse=True), "it shrinks"
    assert retention_s >= seconds[0] > seconds[-2] > retention_s / 2


WAIT_S_MIN = 0.5
"""Shortest wait of a client between two connections; with librdkafka's own settings, 0.1 s."""


def test_a_client_waits_before_it_reconnects_to_a_port_that_closes_each_connection(database):
    seen: list[float] = []

    class Closing(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            seen.append(time.monotonic())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Closing) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        here = f"127.0.0.1:{server.server_address[1]}"
        settings = settings_for(database, here, "orders", kafka_options="")
        consumer = Consumer(consumer_config(settings))
        consumer.subscribe(["orders"])
        try:
            until(lambda: consumer.poll(0.05) or len(seen) >= 4, "four connections")
        finally:
            consumer.close()
            server.shutdown()
            thread.join()

    assert min(later - earlier for earlier, later in pairwise(seen)) > WAIT_S_MIN
