"""Questions to the brokers: what is there, from where to where, which record stands at an offset.

Asked with clients of their own, outside the consumer group, so no answer moves anything. A call
that serves callbacks, made from within a callback of the same client, would end the process at the
next callback of that poll ("CallState_get: Assertion `cs != NULL' failed", confluent-kafka 2.16).
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, cast
from uuid import UUID

import structlog
from confluent_kafka import (
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource, OffsetSpec

from pipeline.errors import (
    DeletedTopicError,
    ForbiddenTopicError,
    InvariantError,
    RefusedError,
    TransientError,
)
from pipeline.events import Record
from pipeline.kafka.access import Access, why_not_readable, why_not_visible
from pipeline.kafka.client import (
    DATABASE_NAMED,
    LIBRARY_LOG,
    OUT_OF_RANGE,
    PARTITION_END,
    Config,
    GoodMessage,
    asked,
    closes,
    connection_config,
    consumer_config,
    listens,
    listens_no_more,
    opened,
    record_of,
    report,
    translated,
)
from pipeline.partitions import NextOffset, Offset, OffsetRange, Partition, after
from pipeline.settings import Settings

log = structlog.get_logger(__name__)

ASK_S_MAX = 10.0
"""Longest wait for the answer to one question to the brokers."""
RETENTION_S = 60.0
"""How often a topic's retention is asked for."""
RETENTION_DAYS_MAX = 36_500
"""A longer retention is none."""
TOPIC_ID_S_MAX = 2.0
"""Longest wait for a topic's id; some brokers never answer, and a fingerprint does as well."""
COORDINATOR_S_MAX = 15.0
"""Longest wait for a broker to coordinate our group; a young cluster takes a few seconds."""
COORDINATOR_POLL_S = 0.2
MEMBERS_S_MAX = 5.0
"""Longest wait for the members of the group."""
PROBE_S_MAX = 10.0
"""Longest wait for one record, when the last stored one is compared with Kafka's."""
READ_S_MAX = 10.0
"""Longest wait for the next records of a range that is read again."""
PIECE_RECORDS_MAX = 5000
PIECE_BYTES_MAX = 8 * 1024 * 1024
"""Most of a range that is handed out at a time; a single larger record goes alone."""


class Watermarks(NamedTuple):
    """What Kafka has of a partition: ``low`` up to, and without, ``high``."""

    low: NextOffset
    high: NextOffset


class Fed(NamedTuple):
    """What the last commit of a partition says about who made it.

    Attributes:
        installation: The identity of the database that it feeds.
        beat: Rises while that worker writes to its database.
        member: Kafka's id of that worker.
    """

    installation: UUID
    beat: int
    member: str


class Member(NamedTuple):
    """A member of the consumer group, as the brokers see it.

    Attributes:
        instance: Its ``group.instance.id``; None for a member without one.
    """

    client: str
    host: str
    instance: str | None


@dataclass(frozen=True)
class Piece:
    """A part of a range that was read again.

    Attributes:
        offsets: What it covers; inside, Kafka has these records and no others.
        records: In offset order.
    """

    offsets: OffsetRange
    records: Sequence[Record]


class Brokers:
    """Asks the brokers; belongs to no group.

    Raises (any method):
        TransientError: The brokers did not answer in time.
    """

    def __init__(self, settings: Settings) -> None:
        self._config = consumer_config(settings)
        listening: Config = {"error_cb": report, "logger": LIBRARY_LOG}
        self._consumer = opened(lambda: Consumer({**self._config, **listening}), settings)
        self._group = settings.group_id
        self._admin = opened(
            lambda: AdminClient({**connection_config(settings), **listening}), settings
        )
        # Readers take assigned partitions and no membership: the rights on the group suffice, and
        # its members do not notice.
        self._config.pop("group.instance.id", None)
        self._settings = settings
        self._tells_topic_ids: bool | None = None
        self._retention: dict[str, tuple[float, Mapping[str, str]]] = {}
        self._probe: Consumer | None = None
        listens(self.serve)

    def serve(self) -> None:
        """Hear what the clients have to say of their connections, which would pile up."""
        self._admin.poll(0)
        self._consumer.poll(0)

    def close(self) -> None:
        """Ask no more."""
        listens_no_more(self.serve)
        closes(self._consumer)
        # It has no close(), and as long as it is there it logs in again and again.
        del self._admin

    # ------------------------------------------------------------------------ what there is

    def cluster_id(self) -> str:
        """Kafka's id of the cluster."""
        return str(asked(lambda: self._admin.list_topics(timeout=ASK_S_MAX)).cluster_id)

    def partition_count(self, topic: str) -> int:
        """How many partitions the topic has now; 0 where there is none."""
        found = asked(lambda: self._admin.list_topics(topic, timeout=ASK_S_MAX))
        return len(found.topics[topic].partitions)

    def topics_there(self) -> Mapping[str, int]:
        """Every topic that this user may see, with its number of partitions."""
        found = asked(lambda: self._admin.list_topics(timeout=ASK_S_MAX)).topics
        return {name: len(topic.partitions) for name, topic in found.items() if not topic.error}

    def access(self, topics: Collection[str]) -> Mapping[str, Access]:
        """What Kafka shows of topics, asked for by name; without those it tells nothing of.

        Creates none.
        """
        found = {}
        answers = self._admin.describe_topics(
            TopicCollection(list(topics)), request_timeout=TOPIC_ID_S_MAX
        )
        for topic, answer in answers.items():
            try:
                answer.result()
            except KafkaException as error:
                match error.args[0].code():
                    case KafkaError.TOPIC_AUTHORIZATION_FAILED:
                        found[topic] = Access.HIDDEN
                    case KafkaError.UNKNOWN_TOPIC_OR_PART:
                        found[topic] = Access.ABSENT
                    case _:
                        pass
            else:
                found[topic] = Access.VISIBLE
        return found

    def why_gone(self, partition: Partition) -> RefusedError:
        """Why a partition cannot be read whose topic Kafka does not show."""
        if self.access([partition.topic]).get(partition.topic) is Access.HIDDEN:
            why = why_not_visible(self._settings, partition.topic, Access.HIDDEN)
            return ForbiddenTopicError(partition, why)
        return DeletedTopicError(partition)

    def may_read(self, topic: str) -> bool:
        """Whether Kafka lets this user fetch from a topic; tried with one record of it.

        Only within ``probing``, whose client it asks.
        """
        low = self.watermarks(Partition(topic, 0)).low
        try:
            self.record_at(Partition(topic, 0), Offset(low))
        except ForbiddenTopicError:
            return False
        return True

    def group_operations(self) -> frozenset[str]:
        """What this user may do with the consumer group, by Kafka's names; does not disturb it.

        Empty where the broker does not tell; ``NONE`` where nothing is allowed. READ, which
        allows joining, includes DESCRIBE, which is enough for this question.
        """
        deadline = time.monotonic() + COORDINATOR_S_MAX
        while True:
            answers = self._admin.describe_consumer_groups(
                [self._settings.group_id],
                include_authorized_operations=True,
                request_timeout=ASK_S_MAX,
            )
            try:
                described = answers[self._settings.group_id].result()
            except KafkaException as error:
                refusal = error.args[0]
                if refusal.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                    return frozenset({"NONE"})
                if refusal.code() == KafkaError._UNSUPPORTED_FEATURE:  # noqa: SLF001 - public
                    return frozenset()
                if "COORDINATOR" not in refusal.name() or time.monotonic() > deadline:
                    raise translated(refusal) from None
                time.sleep(COORDINATOR_POLL_S)
            else:
                return frozenset(one.name for one in described.authorized_operations or ())

    def replicas(self, topic: str) -> int:
        """How many brokers have a copy of each of the topic's partitions, at least."""
        found = asked(lambda: self._admin.list_topics(topic, timeout=ASK_S_MAX)).topics[topic]
        return min((len(one.replicas) for one in found.partitions.values()), default=0)

    def topic_settings(self, topic: str) -> Mapping[str, str]:
        """A topic's settings, e.g. ``retention.ms``; empty where the broker does not tell."""
        resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
        [answer] = self._admin.describe_configs([resource], request_timeout=TOPIC_ID_S_MAX).values()
        try:
            return {name: entry.value for name, entry in answer.result().items()}
        except KafkaException as error:
            log.debug("topic_settings_unknown", topic=topic, error=error.args[0].name())
            return {}

    def retention_ms(self, topics: Collection[str]) -> Mapping[str, int | None]:
        """How long Kafka keeps a record of these topics, of those that the broker tells.

        None where time deletes nothing. A topic whose settings were not answered at first, for
        want of a right or by an old broker, is not asked again.
        """
        now = time.monotonic()
        for topic in topics:
            asked_at, known = self._retention.get(topic, (-math.inf, {}))
            if now - asked_at > RETENTION_S:
                answer = self.topic_settings(topic)
                # Where nothing ever comes, each question costs its longest wait.
                ask_next = now if answer or known else math.inf
                self._retention[topic] = (ask_next, answer or known)
        return {
            topic: _retention_ms(settings)
            for topic in topics
            if (settings := self._retention[topic][1])
        }

    def topic_ids(self, topics: Collection[str]) -> Mapping[str, str]:
        """Kafka's ids of topics (KIP-516), of those that the broker tells.

        A broker may not know them, or this user may not ask; then the topic is missing here. One
        that does not tell at first is not asked again.
        """
        if self._tells_topic_ids is False:
            return {}
        try:
            told = self.ask_topic_ids(topics)()
        except TransientError as error:
            log.debug("topic_ids_unknown", reason=str(error))
            told = {}
        ids = {topic: topic_id for topic, topic_id in told.items() if topic_id}
        if ids:
            self._tells_topic_ids = True
        elif not told and topics and self._tells_topic_ids is None:
            self._tells_topic_ids = False
        return ids

    def ask_topic_ids(self, topics: Collection[str]) -> Callable[[], Mapping[str, str | None]]:
        """Ask for the ids of topics now; the answer is waited for when the result is called.

        An answer tells of the time after the question: what was read before it came from the topics
        with these ids, for a topic that is made anew never gets its old id. None where there is no
        such topic; a topic is missing where the broker knows no ids.

        Raises (the result, when called):
            TransientError: The brokers did not answer, or not for one of the topics.
        """
        answers = self._admin.describe_topics(
            TopicCollection(list(topics)), request_timeout=TOPIC_ID_S_MAX
        )

        def wait() -> Mapping[str, str | None]:
            ids: dict[str, str | None] = {}
            for topic, answer in answers.items():
                try:
                    topic_id = answer.result().topic_id
                except KafkaException as error:
                    if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                        raise translated(error.args[0]) from None
                    ids[topic] = None
                    continue
                # Brokers before Kafka 2.8 leave it zero.
                if topic_id.get_most_significant_bits() or topic_id.get_least_significant_bits():
                    ids[topic] = str(topic_id)
            return ids

        return wait

    def watermarks(self, partition: Partition) -> Watermarks:
        """What Kafka has of a partition now; ``high`` is the last stable offset."""
        low, high = asked(
            lambda: self._consumer.get_watermark_offsets(
                TopicPartition(*partition), timeout=ASK_S_MAX
            )
        )
        return Watermarks(NextOffset(low), NextOffset(high))

    def ends(self, partitions: Collection[Partition]) -> Mapping[Partition, int]:
        """Where partitions end, of those that the brokers tell.

        What may be read ends in front of the first transaction that is open; this is behind all of
        them, for what waits there is lag too.
        """
        if not partitions:
            return {}
        newest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
        answers = self._admin.list_offsets(
            {TopicPartition(*partition): newest for partition in partitions},
            isolation_level=IsolationLevel.READ_UNCOMMITTED,
            request_timeout=TOPIC_ID_S_MAX,
        )
        ends = {}
        for place, answer in answers.items():
            try:
                ends[Partition(place.topic, place.partition)] = answer.result().offset
            except KafkaException as error:
                log.debug("end_unknown", topic=place.topic, error=error.args[0].name())
        return ends

    def offset_at(self, partition: Partition, milliseconds: int) -> NextOffset | None:
        """The first record at or after a time since 1970; None if there is none."""
        [found] = asked(
            lambda: self._consumer.offsets_for_times(
                [TopicPartition(partition.topic, partition.number, milliseconds)], ASK_S_MAX
            )
        )
        return NextOffset(found.offset) if found.offset >= 0 else None

    def feeds(self, partitions: Collection[Partition]) -> Mapping[Partition, Fed]:
        """Which database each partition feeds, as the consumer group's last commit says.

        Raises:
            ConfigurationError: This user may not use the group.
            TransientError: No answer in time.
        """
        wanted = [TopicPartition(*p) for p in partitions]
        try:
            places = asked(lambda: self._consumer.committed(wanted, ASK_S_MAX))
        except TransientError:
            # The client asks for a coordinator until time is up, also where it is refused one.
            if self.group_operations() == {"NONE"}:
                refusal = KafkaError(KafkaError.GROUP_AUTHORIZATION_FAILED)
                raise translated(refusal) from None
            raise
        return {
            Partition(place.topic, place.partition): Fed(
                UUID(named[1]), int(named[2] or 0), named[3] or ""
            )
            for place in places
            if (named := DATABASE_NAMED.fullmatch(place.metadata or ""))
        }

    def members(self) -> Mapping[str, Member] | None:
        """The living members of the configured consumer group, by id; None if it is not known.

        READ on the group is enough. A member that died stays until its session times out.
        """
        answers = self._admin.describe_consumer_groups([self._group], request_timeout=MEMBERS_S_MAX)
        try:
            found = answers[self._group].result().members
        except KafkaException as error:
            log.debug("members_unknown", group=self._group, error=error.args[0].name())
            return None
        return {
            one.member_id: Member(one.client_id, one.host.lstrip("/"), one.group_instance_id)
            for one in found
        }

    # ------------------------------------------------------------------------ what stands there

    def record_at(self, partition: Partition, offset: Offset) -> Record | None:
        """The record that Kafka holds at an offset; None if there is none (any more).

        Only within ``probing``, whose client it asks.
        """
        if self._probe is None:
            raise InvariantError("a record was asked for outside of probing()")
        self._probe.assign([TopicPartition(partition.topic, partition.number, offset)])
        deadline = time.monotonic() + PROBE_S_MAX
        while messages := self._probe.consume(1, max(0.0, deadline - time.monotonic())):
            [message] = messages
            trouble = message.error()
            if trouble is None:
                return (
                    record_of(cast("GoodMessage", message)) if message.offset() == offset else None
                )
            if trouble.code() in {PARTITION_END, *OUT_OF_RANGE}:
                return None
            if trouble.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                continue  # the client looks for a coordinator, which reading does not need
            if trouble.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                raise ForbiddenTopicError(
                    partition, why_not_readable(self._settings, partition.topic)
                )
            raise translated(trouble)
        raise TransientError(f"Kafka: {partition}: no answer about the record at {offset}")

    @contextmanager
    def probing(self) -> Iterator[None]:
        """A client for ``record_at``, for the length of the block."""
        probing: Config = {
            "error_cb": report,
            "logger": LIBRARY_LOG,
            # One record is all that is wanted, however large, and an end is told at once.
            "fetch.message.max.bytes": 1024,
            "queued.min.messages": 1,
            "fetch.wait.max.ms": 10,
        }
        self._probe = Consumer({**self._config, **probing})
        try:
            yield
        finally:
            closes(self._probe)
            self._probe = None

    def read(self, partition: Partition, offsets: OffsetRange) -> Iterator[Piece]:
        """A range once more, in order. What retention takes meanwhile is in no piece.

        Args:
            partition: Which.
            offsets: Begins and ends within the watermarks, as just seen.
        """
        reader = Consumer(
            {
                **self._config,
                "error_cb": report,
                "logger": LIBRARY_LOG,
            }
        )
        try:
            begin: int = offsets.first
            while begin < offsets.end:
                reader.assign([TopicPartition(partition.topic, partition.number, begin)])
                for piece in _pieces(
                    reader, partition, OffsetRange(NextOffset(begin), offsets.end)
                ):
                    begin = piece.offsets.end
                    yield piece
                if begin < offsets.end:
                    # Out of range: retention has passed us.
                    begin = max(begin, self.watermarks(partition).low)
        finally:
            closes(reader)


def _retention_ms(settings: Mapping[str, str]) -> int | None:
    retention = int(settings.get("retention.ms", -1))
    if "delete" not in settings.get("cleanup.policy", "delete") or retention < 0:
        return None
    return retention if retention <= RETENTION_DAYS_MAX * 86_400_000 else None


def _pieces(reader: Consumer, partition: Partition, offsets: OffsetRange) -> Iterator[Piece]:
    """Pieces until the range ends, or until Kafka no longer has what comes next."""
    begin: int = offsets.first
    records: list[Record] = []
    size = 0
    heard_at = time.monotonic()
    while begin < offsets.end:
        messages = reader.consume(PIECE_RECORDS_MAX - len(records), 0.2)
        end = None
        for message in messages:
            trouble = message.error()
            if trouble is None:
                record = record_of(cast("GoodMessage", message))
                if record.offset >= offsets.end:
                    end = offsets.end
                    break
                records.append(record)
                size += len(record.value or b"")
            elif trouble.code() == PARTITION_END:
                end = NextOffset(min(offsets.end, _offset(message)))
            elif trouble.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                continue  # reading does not need the group
            elif trouble.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                raise ForbiddenTopicError(
                    partition, f"Kafka does not let us read topic {partition.topic} (READ)"
                )
            elif trouble.code() in OUT_OF_RANGE:
                if records:
                    yield Piece(OffsetRange(NextOffset(begin), _behind(records)), records)
                return
            else:
                raise translated(trouble)
        if messages:
            heard_at = time.monotonic()
        elif time.monotonic() - heard_at > READ_S_MAX:
            raise TransientError(
                f"Kafka: {partition}: nothing came within {READ_S_MAX:.0f} s, at offset {begin}"
            )
        if records and _behind(records) == offsets.end:
            end = offsets.end
        if end is None and (size >= PIECE_BYTES_MAX or len(records) >= PIECE_RECORDS_MAX):
            end = _behind(records)
        if end is not None and end > begin:
            yield Piece(OffsetRange(NextOffset(begin), NextOffset(end)), records)
            begin, records, size = end, [], 0


def _behind(records: Sequence[Record]) -> NextOffset:
    return after(Offset(records[-1].offset))


def _offset(message: Message) -> int:
    offset = message.offset()
    if offset is None:
        raise TransientError("Kafka: the end of a partition was told without its offset")
    return offset
