from time import monotonic

import pytest
from confluent_kafka import Consumer, TopicPartition

from pipeline.errors import ConfigurationError, TransientError
from pipeline.sandbox.servers.broker import MockBroker
from pipeline.sandbox.simulator import Chaos, Simulation
from pipeline.sandbox.simulator.producer import Producer


@pytest.fixture(scope="module")
def broker():
    with MockBroker() as started:
        started.create_topic("Notifications", 3)
        started.create_topic("Prices", 2)
        yield started


def consumed(broker, ledger):
    """As many records as the ledger has, from its first one of each partition on."""
    starts: dict[tuple[str, int], int] = {}
    for topic, partition, offset in ledger:
        starts[topic, partition] = min(starts.get((topic, partition), offset), offset)
    consumer = Consumer(
        {"bootstrap.servers": broker.bootstrap_servers, "group.id": "test", "check.crcs": True}
    )
    consumer.assign([TopicPartition(*partition, first) for partition, first in starts.items()])
    found: dict[object, object] = {}
    while len(found) < len(ledger):
        message = consumer.poll(10)
        assert message is not None, "the broker has fewer records than the ledger"
        assert message.error() is None
        coordinates = message.topic(), message.partition(), message.offset()
        found[coordinates] = message.key(), message.value(), tuple(message.headers() or ())
    consumer.close()
    return found


def test_the_ledger_equals_the_records_of_the_broker(broker):
    ledger = {}

    def delivered(topic, partition, offset, record):
        ledger[topic, partition, offset] = record.key, record.value, tuple(record.headers)

    simulation = Simulation(
        1, events=2_000, partitions=3, prices_topic="Prices", chaos=Chaos(malformed=0.05)
    )

    with Producer({"bootstrap.servers": broker.bootstrap_servers}, on_delivery=delivered) as kafka:
        assert kafka.partitions("Notifications") == 3
        sent = kafka.produce(simulation)

    assert sent == len(ledger) > 2_000 + simulation.report.added
    assert consumed(broker, ledger) == ledger


def test_records_of_a_partition_are_in_the_order_in_which_they_were_sent(broker):
    delivered_records = {}
    records = list(Simulation(2, events=500, partitions=3))

    def delivered(topic, partition, offset, record):
        delivered_records[partition, offset] = record

    with Producer({"bootstrap.servers": broker.bootstrap_servers}, on_delivery=delivered) as kafka:
        kafka.produce(records)

    for partition in range(3):
        in_order = [
            delivered_records[key] for key in sorted(delivered_records) if key[0] == partition
        ]
        assert in_order == [record for record in records if record.partition == partition]


def test_the_rate_is_kept(broker):
    with Producer({"bootstrap.servers": broker.bootstrap_servers}) as kafka:
        started = monotonic()
        kafka.produce(Simulation(3, events=100, partitions=3), rate=400)
        took = monotonic() - started

    assert 0.25 <= took < 2


def test_a_topic_that_does_not_exist_is_named_and_not_created(broker):
    with Producer({"bootstrap.servers": broker.bootstrap_servers}) as kafka:
        for _ in range(2):
            with pytest.raises(ConfigurationError, match=r"no topic Gone.*does not exist"):
                kafka.produce(Simulation(1, events=1, topic="Gone"))


def test_a_wrong_option_is_refused():
    with pytest.raises(ConfigurationError, match="No such configuration"):
        Producer({"bootstrap.servers": "127.0.0.1:1", "no.such.option": 1})


def test_a_record_that_no_broker_accepts_is_an_error():
    options = {"message.timeout.ms": 300}
    with MockBroker() as broker:
        broker.create_topic("Notifications", 1)
        kafka = Producer({"bootstrap.servers": broker.bootstrap_servers, **options})
        assert kafka.partitions("Notifications") == 1
        broker.set_down()

        with pytest.raises(TransientError, match="not delivered"):
            kafka.produce(Simulation(1, events=5, partitions=1))


def test_records_that_the_client_never_delivers_are_given_up(monkeypatch):
    monkeypatch.setattr("pipeline.sandbox.simulator.producer._ANSWER_SECONDS_MAX", 1.0)
    for_ever = {"message.timeout.ms": 0}
    with MockBroker() as broker:
        broker.create_topic("Notifications", 1)
        kafka = Producer({"bootstrap.servers": broker.bootstrap_servers, **for_ever})
        assert kafka.partitions("Notifications") == 1
        broker.set_down()

        with pytest.raises(TransientError, match="for 1 s Kafka has confirmed none of 5 records"):
            kafka.produce(Simulation(1, events=5, partitions=1))
