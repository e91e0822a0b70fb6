"""A command that is to end does not wait for ever for brokers that are gone."""

import threading
import time

import pytest
from confluent_kafka import Producer

from pipeline.db import open_engine
from pipeline.embedded.broker import MockBroker
from pipeline.errors import TransientError
from pipeline.ingest import Ingest, Progress, loop
from pipeline.settings import Settings
from tests.faults.harness import until
from tests.servers.databases import Database

RECORDS = 20_000


def test_a_one_shot_ingest_gives_up_when_its_brokers_go_on_the_way(
    database: Database, mock_broker: MockBroker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "AWAY_S_MAX", 1.0)
    monkeypatch.setattr(loop, "LOOK_S", 0.5)
    monkeypatch.setattr("pipeline.source.brokers.ASK_S_MAX", 1.0)
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
        # So that the records fetched ahead are few.
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
    # The client's goodbye, where it was not waited for, is said when somebody hears it.
    mock_broker.set_up()
    until(lambda: "leaving" not in {it.name for it in threading.enumerate()}, "the client is gone")


def settings_of(database: Database, broker: MockBroker) -> Settings:
    return Settings.model_validate(
        {
            "database_url": database.url,
            "kafka_bootstrap_servers": broker.bootstrap_servers,
            "kafka_security_protocol": "PLAINTEXT",
            # The client waits so long for the answer to a commit before it leaves.
            "kafka_options": "session.timeout.ms=1000,heartbeat.interval.ms=300,"
            "queued.max.messages.kbytes=1,fetch.message.max.bytes=1000",
            "topics": "orders",
            "batch_rows": 10,
        }
    )
