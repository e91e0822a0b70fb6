"""Requests to the brokers about topics and partitions: what exists, its ids, settings and offsets.

Sent by clients of their own, outside the consumer group, so no answer changes anything there. A
call that runs callbacks, made within a callback of the same client, would end the process at the
next callback of that poll ("CallState_get: Assertion `cs != NULL' failed", confluent-kafka 2.16).
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import structlog
from confluent_kafka import (
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource, OffsetSpec

from pipeline.errors import DeletedTopicError, ForbiddenTopicError, RefusedError, TransientError
from pipeline.kafka.access import Access, why_not_visible
from pipeline.kafka.client import (
    OPTIONAL_REQUEST_S_MAX,
    REQUEST_S_MAX,
    close,
    connection_config,
    create,
    reader_config,
)
from pipeline.kafka.group import ConsumerGroup
from pipeline.kafka.records import RecordBatch, RecordReader, Watermarks, read_range
from pipeline.kafka.reports import ClientReports
from pipeline.partitions import NextOffset, OffsetRange, Partition
from pipeline.settings import Settings

log = structlog.get_logger(__name__)

RETENTION_REFRESH_S = 60.0
"""How often the retention of a topic is requested."""
RETENTION_DAYS_MAX = 36_500
"""A longer retention counts as no limit."""


class Brokers:
    """Sends requests to the brokers; is no member of the group.

    Args:
        settings: The servers and the login.
        reports: Where the clients report errors.

    Attributes:
        group: Requests about the consumer group.

    Raises (any method):
        TransientError: The brokers did not answer in time.
    """

    def __init__(self, settings: Settings, reports: ClientReports) -> None:
        self._settings = settings
        self._reports = reports
        self._consumer = create(
            lambda: Consumer(reader_config(settings, reports)), settings, reports
        )
        self._admin = create(
            lambda: AdminClient({**connection_config(settings), **reports.options}),
            settings,
            reports,
        )
        self.group = ConsumerGroup(settings.group_id, self._admin, self._consumer, reports)
        self._returns_topic_ids: bool | None = None
        self._topic_settings: dict[str, tuple[float, Mapping[str, str]]] = {}
        self._reports.add_client(self.run_callbacks)

    def run_callbacks(self) -> None:
        """Run the callbacks in which the clients report errors; they would pile up."""
        self._admin.poll(0)
        self._consumer.poll(0)

    def close(self) -> None:
        """Close the clients."""
        self._reports.remove_client(self.run_callbacks)
        close(self._consumer)
        # It has no close(); as long as the object exists it logs in again and again.
        del self._admin, self.group

    # -------------------------------------------------------------------------- cluster and topics

    def cluster_id(self) -> str:
        """Kafka's id of the cluster."""
        return str(
            self._reports.request(lambda: self._admin.list_topics(timeout=REQUEST_S_MAX)).cluster_id
        )

    def partition_counts(self) -> Mapping[str, int]:
        """Every topic that this user may see, with its number of partitions."""
        topics = self._reports.request(
            lambda: self._admin.list_topics(timeout=REQUEST_S_MAX)
        ).topics
        return {name: len(topic.partitions) for name, topic in topics.items() if not topic.error}

    def partition_count(self, topic: str) -> int:
        """The number of partitions of a topic now; 0 if it does not exist."""
        found = self._reports.request(lambda: self._admin.list_topics(topic, timeout=REQUEST_S_MAX))
        return len(found.topics[topic].partitions)

    def replicas(self, topic: str) -> int:
        """The number of brokers that have a copy of each partition of the topic, at least."""
        found = self._reports.request(lambda: self._admin.list_topics(topic, timeout=REQUEST_S_MAX))
        partitions = found.topics[topic].partitions.values()
        return min((len(partition.replicas) for partition in partitions), default=0)

    def access(self, topics: Collection[str]) -> Mapping[str, Access]:
        """What Kafka shows of topics that are named; omits those that the brokers do not answer.

        Creates no topic.
        """
        found = {}
        answers = self._admin.describe_topics(
            TopicCollection(list(topics)), request_timeout=OPTIONAL_REQUEST_S_MAX
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

    def missing_topic_error(self, partition: Partition) -> RefusedError:
        """Why a partition cannot be read whose topic Kafka does not show."""
        if self.access([partition.topic]).get(partition.topic) is Access.HIDDEN:
            reason = why_not_visible(self._settings, partition.topic, Access.HIDDEN)
            return ForbiddenTopicError(partition, reason)
        return DeletedTopicError(partition)

    # ----------------------------------------------------------------------------------- topic ids

    def topic_ids(self, topics: Collection[str]) -> Mapping[str, str]:
        """Kafka's ids of topics (KIP-516), of those for which the brokers return one.

        A broker may have none, or this user may not request them; then the topic is omitted.
        Brokers that return none to the first request are not asked again.
        """
        if self._returns_topic_ids is False:
            return {}
        try:
            answered = self.request_topic_ids(topics)()
        except TransientError as error:
            log.debug("topic_ids_unknown", reason=str(error))
            answered = {}
        ids = {topic: topic_id for topic, topic_id in answered.items() if topic_id}
        if ids:
            self._returns_topic_ids = True
        elif not answered and topics and self._returns_topic_ids is None:
            self._returns_topic_ids = False
        return ids

    def request_topic_ids(self, topics: Collection[str]) -> Callable[[], Mapping[str, str | None]]:
        """Send a request for the ids of topics; the result waits for the answer when called.

        An answer describes a moment after the request: what was read before came from the topics
        with these ids, as a recreated topic never gets its old id. None where there is no such
        topic; a topic is omitted where the broker has no ids.

        Raises (the result, when called):
            TransientError: The brokers did not answer, or not for one of the topics.
        """
        answers = self._admin.describe_topics(
            TopicCollection(list(topics)), request_timeout=OPTIONAL_REQUEST_S_MAX
        )

        def wait() -> Mapping[str, str | None]:
            ids: dict[str, str | None] = {}
            for topic, answer in answers.items():
                try:
                    topic_id = answer.result().topic_id
                except KafkaException as error:
                    if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                        raise self._reports.translated(error.args[0]) from None
                    ids[topic] = None
                    continue
                # Brokers before Kafka 2.8 leave it zero.
                if topic_id.get_most_significant_bits() or topic_id.get_least_significant_bits():
                    ids[topic] = str(topic_id)
            return ids

        return wait

    # ------------------------------------------------------------------------------------- settings

    def topic_settings(self, topic: str) -> Mapping[str, str]:
        """A topic's settings, such as ``retention.ms``; empty where the broker returns none."""
        resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
        answers = self._admin.describe_configs([resource], request_timeout=OPTIONAL_REQUEST_S_MAX)
        [answer] = answers.values()
        try:
            return {name: entry.value for name, entry in answer.result().items()}
        except KafkaException as error:
            log.debug("topic_settings_unknown", topic=topic, error=error.args[0].name())
            return {}

    def retention_ms(self, topics: Collection[str]) -> Mapping[str, int | None]:
        """How long Kafka keeps a record of these topics; omits those without an answer.

        None where Kafka deletes nothing by time. A topic without an answer to the first request,
        for lack of a right or because of an old broker, is not asked for again.
        """
        now = time.monotonic()
        for topic in topics:
            requested_at, known = self._topic_settings.get(topic, (-math.inf, {}))
            if now - requested_at > RETENTION_REFRESH_S:
                answer = self.topic_settings(topic)
                # Where no answer ever comes, each request would cost its longest wait.
                next_from = now if answer or known else math.inf
                self._topic_settings[topic] = (next_from, answer or known)
        return {
            topic: _retention_ms(settings)
            for topic in topics
            if (settings := self._topic_settings[topic][1])
        }

    # -------------------------------------------------------------------------------------- offsets

    def watermarks(self, partition: Partition) -> Watermarks:
        """The offsets that Kafka has of a partition now; ``high`` is the last stable offset."""
        low, high = self._reports.request(
            lambda: self._consumer.get_watermark_offsets(
                TopicPartition(*partition), timeout=REQUEST_S_MAX
            )
        )
        return Watermarks(NextOffset(low), NextOffset(high))

    def ends(self, partitions: Collection[Partition]) -> Mapping[Partition, int]:
        """The ends of partitions; omits those without an answer.

        A reader gets nothing after the start of the first open transaction. This is the end after
        all transactions, since what waits there counts as lag.
        """
        if not partitions:
            return {}
        newest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
        answers = self._admin.list_offsets(
            {TopicPartition(*partition): newest for partition in partitions},
            isolation_level=IsolationLevel.READ_UNCOMMITTED,
            request_timeout=OPTIONAL_REQUEST_S_MAX,
        )
        ends = {}
        for requested, answer in answers.items():
            partition = Partition(requested.topic, requested.partition)
            try:
                ends[partition] = answer.result().offset
            except KafkaException as error:
                log.debug("end_unknown", topic=partition.topic, error=error.args[0].name())
        return ends

    def offset_at(self, partition: Partition, milliseconds: int) -> NextOffset | None:
        """The first record at or after a time since 1970; None if there is none."""
        [found] = self._reports.request(
            lambda: self._consumer.offsets_for_times(
                [TopicPartition(partition.topic, partition.number, milliseconds)], REQUEST_S_MAX
            )
        )
        return NextOffset(found.offset) if found.offset >= 0 else None

    # -------------------------------------------------------------------------------------- records

    @contextmanager
    def record_reader(self) -> Iterator[RecordReader]:
        """A reader of single records for the length of the block. It costs one more login."""
        reader = RecordReader(self._settings, self._reports, self.watermarks)
        try:
            yield reader
        finally:
            reader.close()

    def read(self, partition: Partition, offsets: OffsetRange) -> Iterator[RecordBatch]:
        """Read a range once more: see ``read_range``."""
        return read_range(self._settings, self._reports, partition, offsets, self.watermarks)


def _retention_ms(settings: Mapping[str, str]) -> int | None:
    retention = int(settings.get("retention.ms", -1))
    if "delete" not in settings.get("cleanup.policy", "delete") or retention < 0:
        return None
    return retention if retention <= RETENTION_DAYS_MAX * 86_400_000 else None
