"""Records of Kafka by their offset: a single one, or a range of a partition once more.

Read by clients that assign partitions to themselves, so the group and its offsets do not change.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from pipeline.errors import ForbiddenTopicError, Server, TransientError
from pipeline.events import Record
from pipeline.kafka.access import why_not_readable
from pipeline.kafka.client import Config, RecordMessage, close, reader_config, record_of
from pipeline.kafka.errors import OUT_OF_RANGE, PARTITION_END
from pipeline.kafka.reports import ClientReports
from pipeline.partitions import NextOffset, Offset, OffsetRange, Partition, after
from pipeline.settings import Settings

RECORD_S_MAX = 10.0
"""Maximum wait for one record, when it is compared with the newest one in the log."""
READ_S_MAX = 10.0
"""Maximum wait for the next records of a range."""
BATCH_RECORDS_MAX = 5000
BATCH_BYTES_MAX = 8 * 1024 * 1024
"""Maximum part of a range that is returned at a time; a single larger record is returned alone."""

_ONE_RECORD: Config = {
    # A single record is requested, however large; and the end of a partition is reported at once.
    "fetch.message.max.bytes": 1024,
    "queued.min.messages": 1,
    "fetch.wait.max.ms": 10,
}


class Watermarks(NamedTuple):
    """The offsets that Kafka has of a partition: from ``low`` up to, and without, ``high``."""

    low: NextOffset
    high: NextOffset


@dataclass(frozen=True)
class RecordBatch:
    """A part of a range that was read.

    Attributes:
        offsets: The offsets that it covers; Kafka has these records there and no others.
        records: In offset order.
    """

    offsets: OffsetRange
    records: Sequence[Record]


class RecordReader:
    """Reads single records.

    Args:
        settings: The servers and the login.
        reports: Where the client reports errors.
        watermarks: The offsets that Kafka has of a partition.
    """

    def __init__(
        self,
        settings: Settings,
        reports: ClientReports,
        watermarks: Callable[[Partition], Watermarks],
    ) -> None:
        self._settings = settings
        self._reports = reports
        self._watermarks = watermarks
        self._consumer = Consumer({**reader_config(settings, reports), **_ONE_RECORD})

    def close(self) -> None:
        """Close the client."""
        close(self._consumer)

    def record_at(self, partition: Partition, offset: Offset) -> Record | None:
        """The record that Kafka has at an offset; None if it has none there, or no longer.

        Raises:
            ForbiddenTopicError: Kafka does not let this user read the topic.
            TransientError: The brokers did not answer in time.
        """
        self._consumer.assign([TopicPartition(partition.topic, partition.number, offset)])
        deadline = time.monotonic() + RECORD_S_MAX
        while messages := self._consumer.consume(1, max(0.0, deadline - time.monotonic())):
            [message] = messages
            error = message.error()
            if error is None:
                record = record_of(cast("RecordMessage", message))
                return record if record.offset == offset else None
            if error.code() in {PARTITION_END, *OUT_OF_RANGE}:
                return None
            _raise_unless_about_group(error, partition, self._settings, self._reports)
        raise TransientError(
            f"Kafka: {partition}: no answer about the record at offset {offset}",
            server=Server.KAFKA,
        )

    def may_read(self, topic: str) -> bool:
        """Whether Kafka lets this user read a topic; requests one record to find out.

        Raises:
            TransientError: The brokers did not answer in time.
        """
        partition = Partition(topic, 0)
        try:
            self.record_at(partition, Offset(self._watermarks(partition).low))
        except ForbiddenTopicError:
            return False
        return True


def read_range(
    settings: Settings,
    reports: ClientReports,
    partition: Partition,
    offsets: OffsetRange,
    watermarks: Callable[[Partition], Watermarks],
) -> Iterator[RecordBatch]:
    """Read a range once more, in order. What retention deletes meanwhile is in no batch.

    Args:
        settings: The servers and the login.
        reports: Where the client reports errors.
        partition: The partition.
        offsets: The range; within the watermarks, as just read.
        watermarks: The offsets that Kafka has of a partition.

    Raises:
        ForbiddenTopicError: Kafka does not let this user read the topic.
        TransientError: The brokers did not answer in time.
    """
    consumer = Consumer(reader_config(settings, reports))
    try:
        begin: int = offsets.first
        while begin < offsets.end:
            rest = OffsetRange(NextOffset(begin), offsets.end)
            consumer.assign([TopicPartition(partition.topic, partition.number, begin)])
            for batch in _read_until_out_of_range(consumer, partition, rest, settings, reports):
                begin = batch.offsets.end
                yield batch
            if begin < offsets.end:
                # Retention has deleted the next records.
                begin = max(begin, watermarks(partition).low)
    finally:
        close(consumer)


def _read_until_out_of_range(
    consumer: Consumer,
    partition: Partition,
    offsets: OffsetRange,
    settings: Settings,
    reports: ClientReports,
) -> Iterator[RecordBatch]:
    """Batches until the range ends, or until Kafka no longer has the next record."""
    begin: int = offsets.first
    records: list[Record] = []
    size = 0
    received_at = time.monotonic()
    while begin < offsets.end:
        messages = consumer.consume(BATCH_RECORDS_MAX - len(records), 0.2)
        end = None
        for message in messages:
            error = message.error()
            if error is None:
                record = record_of(cast("RecordMessage", message))
                if record.offset >= offsets.end:
                    end = offsets.end
                    break
                records.append(record)
                size += len(record.value or b"")
            elif error.code() == PARTITION_END:
                end = NextOffset(min(offsets.end, _offset(message)))
            elif error.code() in OUT_OF_RANGE:
                if records:
                    yield RecordBatch(OffsetRange(NextOffset(begin), _end_of(records)), records)
                return
            else:
                _raise_unless_about_group(error, partition, settings, reports)
        if messages:
            received_at = time.monotonic()
        elif time.monotonic() - received_at > READ_S_MAX:
            raise TransientError(
                f"Kafka: {partition}: no record within {READ_S_MAX:.0f} s, at offset {begin}",
                server=Server.KAFKA,
            )
        if records and _end_of(records) == offsets.end:
            end = offsets.end
        if end is None and (size >= BATCH_BYTES_MAX or len(records) >= BATCH_RECORDS_MAX):
            end = _end_of(records)
        if end is not None and end > begin:
            yield RecordBatch(OffsetRange(NextOffset(begin), NextOffset(end)), records)
            begin, records, size = end, [], 0


def _raise_unless_about_group(
    error: KafkaError, partition: Partition, settings: Settings, reports: ClientReports
) -> None:
    """Raise an error of the client as ours; reading needs no right on the group."""
    if error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
        return
    if error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
        raise ForbiddenTopicError(partition, why_not_readable(settings, partition.topic))
    raise reports.translated(error)


def _end_of(records: Sequence[Record]) -> NextOffset:
    return after(Offset(records[-1].offset))


def _offset(message: Message) -> int:
    offset = message.offset()
    if offset is None:
        raise TransientError(
            "Kafka: the client reported the end of a partition without its offset",
            server=Server.KAFKA,
        )
    return offset
