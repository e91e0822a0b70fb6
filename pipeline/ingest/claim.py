"""Taking a partition over: claim it, and make sure that Kafka still is what was read before."""

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

import structlog
from sqlalchemy import Engine

from pipeline.db import transaction
from pipeline.errors import (
    ConfigurationError,
    ForbiddenTopicError,
    RecreatedTopicError,
    RefusedError,
    RetentionGapError,
    SharedGroupError,
    TransientError,
    TruncatedTopicError,
    WrongClusterError,
)
from pipeline.events import read
from pipeline.ingest.repeats import RepeatWindow
from pipeline.kafka import GroupConsumer, RecordReader, why_not_readable
from pipeline.log import ownership
from pipeline.log.ownership import Claim, LastRecord, Origin, Owner, Source
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
            self.installation: UUID = ownership.installation_id(db)

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
            deserted = ownership.deserted(db, topic)
        for partition in deserted:
            self._miss(partition)

    def _miss(self, partition: Partition) -> RefusedError:
        return self._halt(partition, self._source.brokers.missing_topic_error(partition))

    def _halt(self, partition: Partition, refusal: RefusedError) -> RefusedError:
        with transaction(self._engine) as db:
            if partition.number in ownership.known_partitions(db, partition.topic):
                claim = ownership.claim(db, partition, self._owner)
                ownership.stand_still(db, partition, claim.epoch, refusal)
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
            known = ownership.known_partitions(db, topic)
            for number in numbers:
                if number in known:
                    continue
                partition = Partition(topic, number)
                if refusal := _another_origin(partition, known.values(), now):
                    refused[partition] = refusal
                else:
                    first = self._low(partition) if known else self._start(partition)
                    ownership.begin(db, partition, first)
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
                claim = ownership.claim(db, partition, self._owner)
                last = ownership.last_record(db, partition, claim.next_offset)
        except TransientError as error:
            if error.sqlstate == LOCK_NOT_AVAILABLE:
                self._end_silent_owner(partition)
            raise
        # Not before the claim: the commit that it waited for may have moved past an older reading,
        # and the topic would seem to end in front of us.
        low, high = self._source.brokers.watermarks(partition)
        source = Source(str(now.cluster_id), now.topic_id, low, high)
        refusal = self._objection(partition, claim, source, last, other, reader)
        with transaction(self._engine) as db:
            if refusal is not None:
                ownership.stand_still(db, partition, claim.epoch, refusal)
                return refusal
            ownership.describe(db, partition, claim.epoch, source)
            size = self._settings.repeat_window
            seen = ownership.recent(db, partition, claim.next_offset, size)
        known_id = now.topic_id or claim.topic_id
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
        if other_topic := another_topic(reader, partition, claim, source, last):
            return other_topic
        if claim.next_offset < source.low:
            return RetentionGapError(partition, expected=claim.next_offset, low=source.low)
        return None


def another_topic(
    reader: RecordReader,
    partition: Partition,
    claim: Claim,
    source: Source,
    last: LastRecord | None,
) -> RefusedError | None:
    """Why Kafka is not what the log was read from; None if it is, as far as can be told.

    Args:
        reader: Reads the last stored record.
        partition: Which.
        claim: What the log knows of it.
        source: What Kafka says of it now.
        last: The newest record in the log.
    """
    now = Origin(source.cluster_id, source.topic_id)
    if refusal := _another_origin(partition, [Origin(claim.cluster_id, claim.topic_id)], now):
        return refusal
    is_same = bool(claim.topic_id and source.topic_id)
    if claim.next_offset > source.high:
        return (TruncatedTopicError if is_same else RecreatedTopicError)(
            partition,
            expected=f"to read on at offset {claim.next_offset}",
            found=f"a topic that ends at {source.high}",
        )
    return _other_record(reader, partition, last, source, is_same=is_same) if last else None


def _other_record(
    reader: RecordReader, partition: Partition, last: LastRecord, source: Source, *, is_same: bool
) -> RefusedError | None:
    """The last stored record must still be the one at its offset.

    Where no topic id tells, this alone tells a topic that was made anew. And the same topic may
    have lost its newest records and got others since.
    """
    if last.offset < source.low:
        return None
    there = reader.record_at(partition, last.offset)
    # None: compacted away, or an aborted transaction's; then nothing can be said.
    if there is None or read(there).digest == last.digest:
        return None
    return (TruncatedTopicError if is_same else RecreatedTopicError)(
        partition,
        expected=f"the record of the log at offset {last.offset}",
        found="another record there",
    )


def _another_origin(
    partition: Partition, recorded: Iterable[Origin], now: Origin
) -> RefusedError | None:
    """Why what has the topic's name now is not what was read; None if it may be the same."""
    for cluster_id, topic_id in recorded:
        if cluster_id not in (None, now.cluster_id):
            return WrongClusterError(partition, expected=str(cluster_id), found=str(now.cluster_id))
        if topic_id and now.topic_id and topic_id != now.topic_id:
            return RecreatedTopicError(
                partition, expected=f"topic id {topic_id}", found=now.topic_id
            )
    return None
