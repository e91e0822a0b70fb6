"""Each refusal is logged once per process, in one line per cause."""

from structlog.testing import capture_logs

from pipeline.errors import DeletedTopicError, RetentionGapError
from pipeline.ingest.halts import HaltLog
from pipeline.partitions import NextOffset, Partition

PRICES = [Partition("Prices", number) for number in range(3)]
ORDERS = [Partition("Orders", number) for number in range(2)]


def gap(partition, low):
    return RetentionGapError(partition, expected=NextOffset(5), low=NextOffset(low))


def logged(lines):
    return [(line["event"], line["partitions"]) for line in lines]


def test_a_cause_is_one_line_with_its_partitions():
    halts = HaltLog()

    with capture_logs() as lines:
        halts.log_halted([*map(DeletedTopicError, PRICES), gap(ORDERS[0], 7), gap(ORDERS[1], 8)])

    assert logged(lines) == [
        ("partitions_halted", ["Prices:0", "Prices:1", "Prices:2"]),
        ("partitions_halted", ["Orders:0"]),
        ("partitions_halted", ["Orders:1"]),
    ]
    assert "7: 2 offsets are lost" in lines[1]["reason"]


def test_a_refusal_is_logged_once_and_another_one_of_the_same_partition_too():
    halts = HaltLog()
    halts.log_halted([DeletedTopicError(PRICES[0]), gap(ORDERS[0], 7)])

    with capture_logs() as lines:
        halts.log_halted([DeletedTopicError(PRICES[0]), gap(ORDERS[0], 9)])

    assert logged(lines) == [("partitions_halted", ["Orders:0"])]


def test_what_the_line_about_the_topic_contains_is_not_repeated():
    halts = HaltLog()
    halts.mark_logged(DeletedTopicError(PRICES[0]).cause, PRICES)

    with capture_logs() as lines:
        halts.log_halted(map(DeletedTopicError, PRICES))

    assert lines == []


def test_a_halted_partition_is_resumed_when_it_is_claimed_and_only_then():
    halts = HaltLog()
    halts.log_halted(map(DeletedTopicError, PRICES))

    with capture_logs() as lines:
        halts.log_resumed([PRICES[2], PRICES[0], *ORDERS])
        halts.log_resumed([PRICES[2], PRICES[0], *ORDERS])

    assert logged(lines) == [("partitions_resumed", ["Prices:0", "Prices:2"])]
