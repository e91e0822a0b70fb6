"""Claiming partitions: become their owner, and check that Kafka still has what was read before.

``Claimer.claim`` reads from top to bottom: which topics exist, where new partitions begin, then per
partition the claim in the database, the comparison with Kafka, and the result: ``Claimed``, or the
reason why it is halted.
"""

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

import structlog
from sqlalchemy import Engine

from pipeline.db import transaction
from pipeline.errors import (
    ConfigurationError,
    ForbiddenTopicError,
    LockHeldError,
    RefusedError,
    RetentionGapError,
    SharedGroupError,
)
from pipeline.ingest.repeats import RepeatWindow
from pipeline.kafka.access import why_not_readable
from pipeline.kafka.consumer import GroupConsumer
from pipeline.kafka.records import RecordReader
from pipeline.log import claims, offsets
from pipeline.log.claims import Owner
from pipeline.log.origin import (
    KafkaPartition,
    LastRecord,
    Origin,
    last_record,
    why_other_origin,
    why_other_topic,
)
from pipeline.log.ranges import LoggedPartition
from pipeline.log.search import recent
from pipeline.partitions import Epoch, NextOffset, Partition
from pipeline.settings import Settings

log = structlog.get_logger(__name__)


class Claimed(NamedTuple):
    """A partition that we own and may read.

    Attributes:
        held: The epoch under which to append.
        start: The offset at which to start reading.
        end: Kafka's end at this moment.
        topic_id: The id of the topic that is read; None if unknown.
        window: The digests of the last offsets, to detect repeats.
    """

    held: Epoch
    start: NextOffset
    end: NextOffset
    topic_id: str | None
    window: RepeatWindow


class Claimer:
    """Claims partitions for one membership in the group.

    Args:
        engine: The database.
        consumer: The member of the group.
        settings: Where a new topic begins, the group, the size of the window for repeats.
        installation: The identity of the database.
    """

    def __init__(
        self, engine: Engine, consumer: GroupConsumer, settings: Settings, installation: UUID
    ) -> None:
        self._engine = engine
        self._consumer = consumer
        self._brokers = consumer.brokers
        self._settings = settings
        self._installation = installation

    def claim(
        self, partitions: Collection[Partition]
    ) -> Mapping[Partition, Claimed | RefusedError]:
        """Claim partitions; one that must not be read is recorded as halted, with the reason.

        A partition that was never read begins at ``START``; one that was added to a known topic at
        its beginning, so that nothing is lost from before we noticed it.

        Raises:
            TransientError: A server is unavailable. Claims that were made do no harm; claim again.
            ConfigurationError: A login or a right is missing.
        """
        cluster_id = self._brokers.cluster_id()
        # Request all topics: a broker may create a topic that is requested by name.
        counts = self._brokers.partition_counts()
        topics = sorted({partition.topic for partition in partitions} & counts.keys())
        topic_ids = self._brokers.topic_ids(topics)
        origins = {topic: Origin(cluster_id, topic_ids.get(topic)) for topic in topics}
        results: dict[Partition, Claimed | RefusedError] = {}
        for topic in topics:
            # This broker may not know yet of a partition that the group has assigned to us.
            assigned = {partition.number for partition in partitions if partition.topic == topic}
            numbers = sorted({*range(counts[topic]), *assigned})
            results |= self._begin_new_partitions(topic, numbers, origins[topic])
        others = self.other_databases(topics)
        with self._brokers.record_reader() as reader:
            readable = {topic for topic in topics if reader.may_read(topic)}
            for partition in sorted(set(partitions) - results.keys()):
                topic = partition.topic
                if topic in readable:
                    results[partition] = self._claim_one(
                        partition, origins[topic], others.get(topic), reader
                    )
                elif topic in topics:
                    reason = why_not_readable(self._settings, topic)
                    results[partition] = self._halt(
                        partition, ForbiddenTopicError(partition, reason)
                    )
                else:
                    results[partition] = self._halt_missing(partition)
        return {partition: results[partition] for partition in sorted(partitions)}

    # ------------------------------------------------------------------------------- new partitions

    def _begin_new_partitions(
        self, topic: str, numbers: Collection[int], origin: Origin
    ) -> Mapping[Partition, RefusedError]:
        """Begin partitions that were never read; refuse them if the topic is another one."""
        refused: dict[Partition, RefusedError] = {}
        with transaction(self._engine) as db:
            known = offsets.lock_origins(db, topic)
            for number in numbers:
                if number in known:
                    continue
                partition = Partition(topic, number)
                if refusal := why_other_origin(partition, known.values(), origin):
                    refused[partition] = refusal
                else:
                    first = self._low(partition) if known else self._start(partition)
                    offsets.begin(db, partition, first)
        return refused

    def _low(self, partition: Partition) -> NextOffset:
        return self._brokers.watermarks(partition).low

    def _start(self, partition: Partition) -> NextOffset:
        low, high = self._brokers.watermarks(partition)
        match self._settings.start:
            case "earliest":
                return low
            case "latest":
                return high
            case datetime() as moment:
                milliseconds = int(moment.timestamp() * 1000)
                first = self._brokers.offset_at(partition, milliseconds)
                return high if first is None else first

    # -------------------------------------------------------------------------------- one partition

    def _claim_one(
        self, partition: Partition, origin: Origin, other: UUID | None, reader: RecordReader
    ) -> Claimed | RefusedError:
        try:
            with transaction(self._engine) as db:
                claim = claims.claim(db, partition, self._owner)
                last = last_record(db, partition, claim.next_offset)
        except LockHeldError:
            # By a transaction of the former owner, for too long.
            self._terminate_silent_owner(partition)
            raise
        # Only after the claim: it waited for a commit that may have advanced past an older reading,
        # and the topic would seem to end before our next offset.
        low, high = self._brokers.watermarks(partition)
        source = KafkaPartition(str(origin.cluster_id), origin.topic_id, low, high)
        refusal = self._objection(partition, claim, source, last, other, reader)
        with transaction(self._engine) as db:
            if refusal is not None:
                offsets.halt(db, partition, claim.epoch, refusal)
                return refusal
            offsets.record_source(db, partition, claim.epoch, source)
            size = self._settings.repeat_window
            seen = recent(db, partition, claim.next_offset, size)
        topic_id = origin.topic_id or claim.topic_id
        return Claimed(claim.epoch, claim.next_offset, high, topic_id, RepeatWindow(size, seen))

    @property
    def _owner(self) -> Owner:
        return Owner(self._settings.group_id, self._consumer.member_id)

    def _terminate_silent_owner(self, partition: Partition) -> None:
        """Terminate the session of a former owner that was stopped; it would hold the lock."""
        silent_for = timedelta(milliseconds=self._settings.idle_in_transaction_timeout_ms)
        try:
            with transaction(self._engine) as db:
                terminated = claims.end_silent_owner(db, partition, silent_for)
        except ConfigurationError as error:
            log.warning("former_owner_not_terminated", partition=str(partition), reason=str(error))
            return
        if terminated:
            log.warning(
                "former_owner_terminated",
                partition=str(partition),
                reason="its session sent nothing in the middle of a COPY and held the partition",
            )

    def _objection(
        self,
        partition: Partition,
        claim: LoggedPartition,
        source: KafkaPartition,
        last: LastRecord | None,
        other: UUID | None,
        reader: RecordReader,
    ) -> RefusedError | None:
        """Why the partition must not be read; None if it may be."""
        if other is not None:
            return SharedGroupError(
                partition,
                group=self._settings.group_id,
                expected=str(self._installation),
                found=str(other),
            )
        if refusal := why_other_topic(partition, claim, last, source, reader.record_at):
            return refusal
        if claim.next_offset < source.low:
            return RetentionGapError(partition, expected=claim.next_offset, low=source.low)
        return None

    # ---------------------------------------------------------------------------- halted partitions

    def _halt(self, partition: Partition, refusal: RefusedError) -> RefusedError:
        with transaction(self._engine) as db:
            if partition.number in offsets.lock_origins(db, partition.topic):
                claim = claims.claim(db, partition, self._owner)
                offsets.halt(db, partition, claim.epoch, refusal)
        return refusal

    def _halt_missing(self, partition: Partition) -> RefusedError:
        return self._halt(partition, self._brokers.missing_topic_error(partition))

    def halt_unassigned(self, topic: str) -> None:
        """Record that a topic is missing, for its partitions that the group assigns to nobody.

        Raises:
            TransientError: The database is unavailable.
            ConfigurationError: A login or a right is missing.
        """
        with transaction(self._engine) as db:
            unassigned = claims.without_reader(db, topic)
        for partition in unassigned:
            self._halt_missing(partition)

    def other_databases(self, topics: Collection[str]) -> Mapping[str, UUID]:
        """By topic, another database for which members of the consumer group commit.

        Reads the commits of all partitions, not only of ours: two databases that share a group from
        the start own different ones.
        """
        partitions = [
            Partition(topic, number)
            for topic in sorted(topics)
            for number in range(self._brokers.partition_count(topic))
        ]
        return {
            partition.topic: commit.installation
            for partition, commit in self._brokers.group.last_commits(partitions).items()
            if commit.installation != self._installation
        }
