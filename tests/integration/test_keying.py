"""One partition does all the work, or all share it: the three ways in which Upvest keys a topic."""

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest

from pipeline.db import transaction
from pipeline.health.check.keying import check_keying, keying_of, result_of
from pipeline.log.keying import TopicKeys
from pipeline.log.ranges import ranges
from pipeline.partitions import Partition
from pipeline.projection.workers import LiveWorker, shared_out
from pipeline.sandbox.simulator import Chaos, Keying, Simulation
from pipeline.sandbox.simulator.producer import Producer
from tests.commands import on_mock

TOPIC = "Notifications"
PARTITIONS = 6
EVENTS = 3_000
NOW = datetime(2026, 1, 5, tzinfo=UTC)


def simulated(keying: Keying, **options) -> Simulation:
    return Simulation(
        7, events=EVENTS, topic=TOPIC, partitions=PARTITIONS, keying=keying, **options
    )


@pytest.mark.parametrize("chaos", [None, Chaos()], ids=["calm", "chaos"])
def test_keyed_by_tenant_one_partition_has_every_record(chaos):
    used = {
        keying: {record.partition for record in simulated(keying, chaos=chaos)} for keying in Keying
    }

    assert len(used[Keying.TENANT]) == 1
    assert used[Keying.USER] == used[Keying.ENTITY] == set(range(PARTITIONS))


def test_the_keying_changes_no_event():
    values = [[record.value for record in simulated(keying)] for keying in Keying]

    assert values[0] == values[1] == values[2]


@pytest.mark.faults
@pytest.mark.parametrize("keying", Keying)
def test_check_reports_by_what_a_topic_is_keyed_and_the_log_holds_each_record(
    keying, given, mock_broker
):
    """All else that the log, its segments and read models promise holds too."""
    mock_broker.create_topic(TOPIC, PARTITIONS)
    commands = on_mock(given.database, mock_broker).with_(segment_offsets="1000")
    records = list(simulated(keying))
    with Producer({"bootstrap.servers": mock_broker.bootstrap_servers}) as producer:
        producer.produce(records)

    ingested = commands.run("run", "--until-end")
    checked = commands.run("rebuild", "--all", "--check", "--jobs", "3")
    verified = commands.run("verify", "--only", "log")

    assert [ingested.code, checked.code, verified.code] == [0, 0, 0], ingested.err + checked.err
    with transaction(given.engine) as db:
        [found] = list(check_keying(db))
        held = {partition: range_.end for partition, range_ in ranges(db).items()}
    assert f"is keyed by {keying}" in str(found), found
    sent = Counter(record.partition for record in records)
    assert {partition.number: end for partition, end in held.items()} == {
        number: sent[number] for number in range(PARTITIONS)
    }
    spans = given.scalar("SELECT count(*) FROM pipeline.segments WHERE topic = 'Notifications'")
    # Each offset that is used has a segment, and at most one is made ahead.
    assert max(sent.values()) <= spans * 1000 <= max(sent.values()) + 2000


def seen(**changed) -> TopicKeys:
    well = TopicKeys(TOPIC, 6, 5000, 6, 0, users=100, stray_users=0, entities=900, stray_entities=0)
    return well._replace(**changed)


@pytest.mark.parametrize(
    ("changed", "keying", "expected"),
    [
        ({}, "user", "Up to 6 workers share"),
        ({"stray_users": 5}, "user", "Up to 6"),
        ({"stray_users": 60}, "entity", "keyed by entity"),
        (
            {"stray_users": 60, "stray_entities": 300},
            "mixed",
            "not keyed by tenant, user or entity",
        ),
        ({"used": 1, "busiest": 4}, "tenant", "partition 4 of 6. Only one worker"),
        ({"partitions": 1, "used": 1}, "one partition", "more workers do not help"),
        ({"records": 99, "used": 1}, "too little", "99 recent records are too few"),
        ({"users": 3, "entities": 3}, "too little", "too few"),
        ({"records": 0, "used": 0, "busiest": None}, "too little", "0 recent records"),
    ],
)
def test_what_the_log_shows_is_reported_with_what_more_workers_bring(changed, keying, expected):
    found = result_of(seen(**changed))

    assert keying_of(seen(**changed)) == keying
    assert expected in str(found)
    assert found.exit_code == 0


# --------------------------------------------------------------------------------- sharing the work


def shares(workers_: int, topics: Mapping[str, int]) -> dict[Partition, UUID]:
    members = [LiveWorker(uuid4(), "host", number, NOW, ["orders"]) for number in range(workers_)]
    partitions = [Partition(topic, n) for topic, count in topics.items() for n in range(count)]
    return dict(shared_out(members, "orders", partitions))


@pytest.mark.parametrize("workers_", range(1, 13))
@pytest.mark.parametrize(
    "topics", [{"a": 6, "b": 6}, {"a": 6, "b": 6, "c": 6}, {"a": 50}, {"a": 1, "b": 7, "c": 3}]
)
def test_shares_differ_by_one_at_most_whatever_the_topics(workers_, topics):
    dealt = Counter(shares(workers_, topics).values())
    counts = [*dealt.values(), *[0] * (workers_ - len(dealt))]

    assert sum(counts) == sum(topics.values())
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("workers_", range(2, 13))
def test_the_busy_partitions_of_two_topics_are_two_workers(workers_):
    """Keyed by tenant, they have the same number."""
    dealt = shares(workers_, {"Notifications": 6, "Prices": 6})

    for number in range(6):
        assert dealt[Partition("Notifications", number)] != dealt[Partition("Prices", number)]
