"""Whether a topic is still the one whose records are in the log, by what both sides report."""

from typing import NamedTuple

import pytest

from pipeline.errors import (
    RecreatedTopicError,
    RefusedError,
    TruncatedTopicError,
    WrongClusterError,
)
from pipeline.events import Record, read
from pipeline.log.origin import (
    KafkaPartition,
    LastRecord,
    Origin,
    why_other_origin,
    why_other_topic,
)
from pipeline.partitions import NextOffset, Offset, Partition

ORDERS = Partition("orders", 3)
SAME, OTHER = b'{"n": 1}', b'{"n": 2}'


class Logged(NamedTuple):
    origin: Origin
    next_offset: NextOffset


def record(value):
    return Record("orders", 3, 9, value, None, None, None, 0)


def digest(value):
    return read(record(value)).digest


def refusal(
    logged_ids=("cluster", "topic"),
    kafka_ids=("cluster", "topic"),
    *,
    next_offset=10,
    low=0,
    high=10,
    last=SAME,
    in_kafka=SAME,
):
    """What is refused, of a log that ends at ``next_offset`` and a topic from low to high."""
    return why_other_topic(
        ORDERS,
        Logged(Origin(*logged_ids), NextOffset(next_offset)),
        None if last is None else LastRecord(Offset(next_offset - 1), digest(last)),
        KafkaPartition(kafka_ids[0], kafka_ids[1], NextOffset(low), NextOffset(high)),
        lambda _partition, _offset: None if in_kafka is None else record(in_kafka),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"high": 99},
        {"logged_ids": (None, None)},
        {"logged_ids": ("cluster", None)},
        {"kafka_ids": ("cluster", None)},
        {"next_offset": 0, "last": None, "high": 0},
        # Compacted away, or a marker of a transaction: nothing to compare.
        {"in_kafka": None},
        # Retention has deleted it: a gap, perhaps, but not another topic.
        {"low": 10, "high": 20, "in_kafka": OTHER},
    ],
)
def test_the_same_topic_is_accepted(changes):
    assert refusal(**changes) is None


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"kafka_ids": ("another", "topic")}, WrongClusterError, "cluster another"),
        ({"kafka_ids": ("another", None), "high": 0}, WrongClusterError, "cluster another"),
        ({"kafka_ids": ("cluster", "new")}, RecreatedTopicError, "topic id topic, found new"),
        ({"high": 9}, TruncatedTopicError, "continue at offset 10, found a topic that ends at 9"),
        ({"in_kafka": OTHER}, TruncatedTopicError, "at offset 9, found another record"),
        ({"kafka_ids": ("cluster", None), "high": 9}, RecreatedTopicError, "ends at 9"),
        ({"kafka_ids": ("cluster", None), "in_kafka": OTHER}, RecreatedTopicError, "another"),
        ({"logged_ids": ("cluster", None), "in_kafka": OTHER}, RecreatedTopicError, "another"),
    ],
)
def test_another_topic_is_refused_with_the_reason_and_what_to_do(changes, error, words):
    found = refusal(**changes)

    assert type(found) is error
    assert isinstance(found, RefusedError)
    assert words in found.what
    assert found.partition == ORDERS
    assert str(found) == f"orders:3: {found.what}. {found.fix}"


def test_a_new_partition_is_compared_with_every_recorded_one():
    recorded = [Origin(None, None), Origin("cluster", "topic"), Origin("cluster", "older")]

    found = why_other_origin(ORDERS, recorded, Origin("cluster", "topic"))

    assert isinstance(found, RecreatedTopicError)
    assert why_other_origin(ORDERS, recorded[:2], Origin("cluster", "topic")) is None
