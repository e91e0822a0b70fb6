"""Taking a partition over: claim it, and make sure that Kafka still is what was read before."""

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
    RefusedError,
    RetentionGapError,
    SharedGroupError,
    TransientError,
)
from pipeline.ingest.repeats import RepeatWindow
from pipeline.kafka import GroupConsumer, RecordReader, why_not_readable
from pipeline.log import offsets
from pipeline.log.installation import installation_id
from pipeline.log.offsets import LoggedPartition, Owner
from pipeline.log.origin import (
    KafkaPartition,
    LastRecord,
    Origin,
    last_record,
    why_other_origin,
    why_other_topic,
)
from pipeline.log.search import recent
from pipeline.partitions import Epoch, NextOffset, Partition
from pipeline.settings import Settings

log = structlog.get_logger(__name__)

LOCK_NOT_AVAILABLE = "55P03"
"""What a claim gets while the former owner's transaction is open for longer than we wait."""


class Taken(NamedTuple):
    """A partition that is ours and may go on.

    Attributes:
        held: The epoch under which to append.
        begin: Where to read on.
        end: Kafka's end at this moment.
        topic_id: The id of the topic whose records come; None where nobody knows it.
        window: What the last offsets held, for telling repeats.
    """

    held: Epoch
    begin: NextOffset
    end: NextOffset
    topic_id: str | None
    window: RepeatWindow


class Takeover:
    """Takes partitions over for one membership in the group."""

    def __init__(self, engine: Engine, source: GroupConsumer, settings: Settings) -> None:
        self._engine = engine
        self._source = source
        self._settings = settings
        with transaction(engine) as db:
            self.installation: UUID = installation_id(db)

    def take(self, partitions: Collection[Partition]) -> Mapping[Partition, Taken | RefusedError]:
        """Claim partitions; those that must not go on are named with the reason, and recorded so.

        A partition never seen begins at ``START``; one that was added to a known topic at its
        beginning, for what came before we noticed it must not be lost.

        Raises:
            TransientError: A server is away. Claims already made do no harm; take again.
            ConfigurationError: A login or a right is missing.
        """
        cluster_id = self._source.brokers.cluster_id()
        # All of them are asked for: a broker may make a topic that it is asked for by name.
        counts = self._source.brokers.partition_counts()
        topics = sorted({partition.topic for partition in partitions} & counts.keys())
        topic_ids = self._source.brokers.topic_ids(topics)
        taken: dict[Partition, Taken | RefusedError] = {}
        for topic in topics:
            # The broker that we ask may not have heard yet of what the group has given us.
            given = {place.number for place in partitions if place.topic == topic}
            now = Origin(cluster_id, topic_ids.get(topic))
            taken |= self._begin(topic, sorted({*range(counts[topic]), *given}), now)
        others = self.other_databases(topics)
        with self._source.brokers.record_reader() as reader:
            readable = {topic for topic in topics if reader.may_read(topic)}
            for partition in sorted(set(partitions) - taken.keys()):
                if partition.topic in readable:
                    now = Origin(cluster_id, topic_ids.get(partition.topic))
                    taken[partition] = self._take(
                        partition, now, others.get(partition.topic), reader
                    )
                elif partition.topic in topics:
                    why = why_not_readable(self._settings, partition.topic)
                    taken[partition] = self._halt(partition, ForbiddenTopicError(partition, why))
                else:
                    taken[partition] = self._miss(partition)
        return {partition: taken[partition] for partition in sorted(partitions)}

    def miss(self, topic: str) -> None:
        """Record that a topic is gone, for its partitions that the group gives to nobody now.

        Raises:
            TransientError: The database is away.
            ConfigurationError: A login or a right is missing.
        """
        with transaction(self._engine) as db:
            deserted = offsets.without_reader(db, topic)
        for partition in deserted:
            self._miss(partition)

    def _miss(self, partition: Partition) -> RefusedError:
        return self._halt(partition, self._source.brokers.missing_topic_error(partition))

    def _halt(self, partition: Partition, refusal: RefusedError) -> RefusedError:
        with transaction(self._engine) as db:
            if partition.number in offsets.lock_origins(db, partition.topic):
                claim = offsets.claim(db, partition, self._owner)
                offsets.halt(db, partition, claim.epoch, refusal)
        return refusal

    def other_databases(self, topics: Collection[str]) -> Mapping[str, UUID]:
        """By topic, a database besides this one that the consumer group says it feeds.

        All partitions are looked at, not ours alone: two databases that share a group from the
        start own different ones.
        """
        partitions = [
            Partition(topic, number)
            for topic in sorted(topics)
            for number in range(self._source.brokers.partition_count(topic))
        ]
        return {
            partition.topic: fed.installation
            for partition, fed in self._source.brokers.group.last_commits(partitions).items()
            if fed.installation != self.installation
        }

    def _begin(
        self, topic: str, numbers: Collection[int], now: Origin
    ) -> Mapping[Partition, RefusedError]:
        """Begin partitions that were never read; not those of what only has our topic's name."""
        refused: dict[Partition, RefusedError] = {}
        with transaction(self._engine) as db:
            known = offsets.lock_origins(db, topic)
            for number in numbers:
                if number in known:
                    continue
                partition = Partition(topic, number)
                if refusal := why_other_origin(partition, known.values(), now):
                    refused[partition] = refusal
                else:
                    first = self._low(partition) if known else self._start(partition)
                    offsets.begin(db, partition, first)
        return refused

    def _low(self, partition: Partition) -> NextOffset:
        return self._source.brokers.watermarks(partition).low

    def _start(self, partition: Partition) -> NextOffset:
        low, high = self._source.brokers.watermarks(partition)
        match self._settings.start:
            case "earliest":
                return low
            case "latest":
                return high
            case datetime() as moment:
                milliseconds = int(moment.timestamp() * 1000)
                first = self._source.brokers.offset_at(partition, milliseconds)
                return high if first is None else first

    @property
    def _owner(self) -> Owner:
        return Owner(self._settings.group_id, self._source.member_id)

    def _take(
        self, partition: Partition, now: Origin, other: UUID | None, reader: RecordReader
    ) -> Taken | RefusedError:
        try:
            with transaction(self._engine) as db:
                claim = offsets.claim(db, partition, self._owner)
                last = last_record(db, partition, claim.next_offset)
        except TransientError as error:
            if error.sqlstate == LOCK_NOT_AVAILABLE:
                self._end_silent_owner(partition)
            raise
        # Not before the claim: the commit that it waited for may have moved past an older reading,
        # and the topic would seem to end in front of us.
        low, high = self._source.brokers.watermarks(partition)
        source = KafkaPartition(str(now.cluster_id), now.topic_id, low, high)
        refusal = self._objection(partition, claim, source, last, other, reader)
        with transaction(self._engine) as db:
            if refusal is not None:
                offsets.halt(db, partition, claim.epoch, refusal)
                return refusal
            offsets.record_source(db, partition, claim.epoch, source)
            size = self._settings.repeat_window
            seen = recent(db, partition, claim.next_offset, size)
        known_id = now.topic_id or claim.topic_id
        return Taken(claim.epoch, claim.next_offset, high, known_id, RepeatWindow(size, seen))

    def _end_silent_owner(self, partition: Partition) -> None:
        """A former owner that was stopped must not keep the partition for as long as it likes."""
        silent_for = timedelta(milliseconds=self._settings.idle_in_transaction_timeout_ms)
        try:
            with transaction(self._engine) as db:
                ended = offsets.end_silent_owner(db, partition, silent_for)
        except ConfigurationError as error:
            log.warning("former_owner_not_ended", partition=str(partition), reason=str(error))
            return
        if ended:
            log.warning(
                "former_owner_ended",
                partition=str(partition),
                reason="its session was silent in the midst of a COPY and held the partition",
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
        """Why the partition must not go on; None if all is well."""
        if other is not None:
            return SharedGroupError(
                partition,
                group=self._settings.group_id,
                expected=str(self.installation),
                found=str(other),
            )
        if other_topic := why_other_topic(partition, claim, last, source, reader.record_at):
            return other_topic
        if claim.next_offset < source.low:
            return RetentionGapError(partition, expected=claim.next_offset, low=source.low)
        return None
