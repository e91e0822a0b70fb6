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
    RecreatedTopicError,
    RefusedError,
    RetentionGapError,
    SharedGroupError,
    TransientError,
    WrongClusterError,
)
from pipeline.events import read
from pipeline.ingest.repeats import RepeatWindow
from pipeline.log import ownership
from pipeline.log.ownership import Claim, LastRecord, Owner, Source
from pipeline.positions import Epoch, NextOffset, Partition, lag
from pipeline.settings import Settings
from pipeline.source import KafkaSource

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

    def __init__(self, engine: Engine, source: KafkaSource, settings: Settings) -> None:
        self._engine = engine
        self._source = source
        self._settings = settings
        with transaction(engine) as db:
            self.installation: UUID = ownership.installation_id(db)

    def take(self, partitions: Collection[Partition]) -> Mapping[Partition, Taken | RefusedError]:
        """Claim partitions; those that must not go on are named with the reason, and recorded so.

        A partition never seen begins at ``START``; one that was added to a known topic at its
        beginning, for what came before we noticed it must not be lost.

        Raises:
            TransientError: A server is away. Claims already made do no harm; take again.
            ConfigurationError: A login or a right is missing.
        """
        topics = {partition.topic for partition in partitions}
        for topic in sorted(topics):
            self._begin(topic, {place.number for place in partitions if place.topic == topic})
        cluster_id = self._source.cluster_id()
        topic_ids = self._source.topic_ids(topics)
        others = self.other_databases(topics)
        return {
            partition: self._take(
                partition, cluster_id, topic_ids.get(partition.topic), others.get(partition.topic)
            )
            for partition in sorted(partitions)
        }

    def other_databases(self, topics: Collection[str]) -> Mapping[str, UUID]:
        """By topic, a database besides this one that the consumer group says it feeds.

        All partitions are looked at, not ours alone: two databases that share a group from the
        start own different ones.
        """
        partitions = [
            Partition(topic, number)
            for topic in sorted(topics)
            for number in range(self._source.partition_count(topic))
        ]
        return {
            partition.topic: fed
            for partition, fed in self._source.feeds(partitions).items()
            if fed != self.installation
        }

    def _begin(self, topic: str, given: Collection[int]) -> None:
        # The broker that we ask may not have heard yet of partitions that the group has given us.
        numbers = sorted({*range(self._source.partition_count(topic)), *given})
        with transaction(self._engine) as db:
            known = ownership.known_partitions(db, topic)
            for number in numbers:
                if number not in known:
                    partition = Partition(topic, number)
                    first = self._low(partition) if known else self._start(partition)
                    ownership.begin(db, partition, first)

    def _low(self, partition: Partition) -> NextOffset:
        return self._source.watermarks(partition).low

    def _start(self, partition: Partition) -> NextOffset:
        low, high = self._source.watermarks(partition)
        match self._settings.start:
            case "earliest":
                return low
            case "latest":
                return high
            case datetime() as moment:
                milliseconds = int(moment.timestamp() * 1000)
                first = self._source.offset_at(partition, milliseconds)
                return high if first is None else first

    def _take(
        self, partition: Partition, cluster_id: str, topic_id: str | None, other: UUID | None
    ) -> Taken | RefusedError:
        owner = Owner(self._settings.group_id, self._source.member_id)
        try:
            with transaction(self._engine) as db:
                claim = ownership.claim(db, partition, owner)
                last = ownership.last_record(db, partition, claim.next_offset)
        except TransientError as error:
            if error.sqlstate == LOCK_NOT_AVAILABLE:
                self._end_silent_owner(partition)
            raise
        # Not before the claim: the commit that it waited for may have moved past an older reading,
        # and the topic would seem to end in front of us.
        low, high = self._source.watermarks(partition)
        source = Source(cluster_id, topic_id, low, high)
        refusal = self._objection(partition, claim, source, last, other)
        with transaction(self._engine) as db:
            if refusal is not None:
                ownership.stand_still(db, partition, claim.epoch, refusal)
                return refusal
            ownership.describe(db, partition, claim.epoch, source)
            size = self._settings.repeat_window
            seen = ownership.recent(db, partition, claim.next_offset, size)
        log.info(
            "partition_claimed",
            topic=partition.topic,
            partition=partition.number,
            epoch=claim.epoch,
            next_offset=claim.next_offset,
            lag=lag(claim.next_offset, high),
        )
        known_id = topic_id or claim.topic_id
        return Taken(claim.epoch, claim.next_offset, high, known_id, RepeatWindow(size, seen))

    def _end_silent_owner(self, partition: Partition) -> None:
        """A former owner that was stopped must not keep the partition for as long as it likes."""
        silent_for = timedelta(milliseconds=self._settings.idle_in_transaction_timeout_ms)
        try:
            with transaction(self._engine) as db:
                ended = ownership.end_silent_owner(db, partition, silent_for)
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
        claim: Claim,
        source: Source,
        last: LastRecord | None,
        other: UUID | None,
    ) -> RefusedError | None:
        """Why the partition must not go on; None if all is well."""
        if other is not None:
            return SharedGroupError(
                partition,
                group=self._settings.group_id,
                expected=str(self.installation),
                found=str(other),
            )
        if claim.cluster_id not in (None, source.cluster_id):
            return WrongClusterError(
                partition, expected=str(claim.cluster_id), found=source.cluster_id
            )
        if claim.topic_id and source.topic_id and claim.topic_id != source.topic_id:
            return RecreatedTopicError(
                partition, expected=f"topic id {claim.topic_id}", found=source.topic_id
            )
        if claim.next_offset > source.high:
            return RecreatedTopicError(
                partition,
                expected=f"to read on at offset {claim.next_offset}",
                found=f"a topic that ends at {source.high}",
            )
        if claim.next_offset < source.low:
            return RetentionGapError(partition, expected=claim.next_offset, low=source.low)
        if last and not (claim.topic_id and source.topic_id):
            return self._other_record(partition, last, source)
        return None

    def _other_record(
        self, partition: Partition, last: LastRecord, source: Source
    ) -> RefusedError | None:
        """Where no topic id tells, the last stored record must still be the one at its offset."""
        if last.offset < source.low:
            return None
        there = self._source.record_at(partition, last.offset)
        # None: compacted away, or an aborted transaction's; then nothing can be said.
        if there is None or read(there).digest == last.digest:
            return None
        return RecreatedTopicError(
            partition,
            expected=f"the record of the log at offset {last.offset}",
            found="another record there",
        )
