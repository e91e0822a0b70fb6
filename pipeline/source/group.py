"""One member of the consumer group: which partitions are ours, and what comes out of them."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast
from uuid import UUID

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import ClusterMetadata

from pipeline.errors import ConfigurationError, InvariantError, TransientError
from pipeline.events import Record
from pipeline.positions import NextOffset, Partition
from pipeline.settings import Settings
from pipeline.source.access import Access, why_not_visible
from pipeline.source.brokers import ASK_S_MAX, Brokers
from pipeline.source.client import (
    CLOSE_S_MAX,
    COMMIT_METADATA,
    LIBRARY_LOG,
    LOGIN_REFUSED,
    OUT_OF_RANGE,
    PARTITION_END,
    POLLED_TOO_LATE,
    TOPICS_OWN,
    Config,
    GoodMessage,
    asked,
    closes,
    consumer_config,
    log_commit_failure,
    opened,
    record_of,
    report,
    translated,
)

log = structlog.get_logger(__name__)

ANSWER_S = 0.5
"""How long the first answer is waited for before we see whether the login was refused."""


class ReachedEnd(NamedTuple):
    """Everything below ``offset`` was given out, and Kafka has no more at the moment."""

    partition: Partition
    offset: NextOffset


class OutOfRange(NamedTuple):
    """Kafka does not give the records that we asked for; taking over again tells why."""

    partition: Partition


Happening = ReachedEnd | OutOfRange


class Polled(NamedTuple):
    """What one poll gave."""

    records: Sequence[Record]
    happenings: Sequence[Happening]


@dataclass(frozen=True)
class Listener:
    """What to do when partitions come and go; called from within ``poll``.

    Attributes:
        on_assign: Partitions are ours. Returns where each is to be read from.
        on_revoke: Partitions will go when this returns. Drain them.
        on_lost: Partitions are gone already. Drop them.
    """

    on_assign: Callable[[Collection[Partition]], Mapping[Partition, NextOffset]]
    on_revoke: Callable[[Collection[Partition]], None]
    on_lost: Callable[[Collection[Partition]], None]


class KafkaSource:
    """One member of the consumer group, from its joining to its leaving.

    Attributes:
        brokers: Answers what has nothing to do with the membership.

    Raises (any method):
        TransientError: The brokers did not answer in time.
        MemberReplacedError: Kafka knows another member in our place; join anew.
    """

    def __init__(self, settings: Settings) -> None:
        config = consumer_config(settings)
        self._settings = settings
        self._topics = settings.topics
        self._subscribed: set[str] = set()
        listening: Config = {
            "error_cb": self._heard_of,
            "logger": LIBRARY_LOG,
            "on_commit": _on_commit,
        }
        self._refused_login: KafkaError | None = None
        self._consumer = opened(lambda: Consumer({**config, **listening}), settings)
        try:
            self._cluster = self._first_answer()
        except BaseException:
            closes(self._consumer)
            raise
        # Not before: each client is one more login that may be refused.
        self.brokers = Brokers(settings)
        self._cooperates = settings.kafka_group_protocol == "consumer" or "cooperative" in str(
            config.get("partition.assignment.strategy")
        )
        self._listener: Listener | None = None
        self._raised: BaseException | None = None
        self._paused: set[Partition] = set()

    # -------------------------------------------------------------------------------- membership

    def _first_answer(self) -> ClusterMetadata:
        """What Kafka shows us; a login that is refused is not tried for longer than it takes."""
        deadline = time.monotonic() + ASK_S_MAX
        while True:
            try:
                return self._ask_for_topics()
            except TransientError:
                # Nothing is subscribed, so this runs callbacks only.
                self._consumer.poll(0)
                self._raise_refused_login()
                if time.monotonic() > deadline:
                    # The reason may have been reported just now.
                    return self._ask_for_topics()

    def _ask_for_topics(self) -> ClusterMetadata:
        cluster: ClusterMetadata = asked(lambda: self._consumer.list_topics(timeout=ANSWER_S))
        return cluster

    def _raise_refused_login(self) -> None:
        if self._refused_login is not None:
            raise translated(self._refused_login)

    def join(
        self,
        listener: Listener,
        begun: Collection[str] = (),
        before: Callable[[], None] = lambda: None,
    ) -> frozenset[str]:
        """Join the group for the configured topics.

        A topic of the default list that was never read may be missing: not every client of Upvest
        has it. One that somebody configured must be there, or a typing error would pass.

        Args:
            listener: What to do when partitions come and go.
            begun: Topics that have been read before. One of them that is gone is waited for.
            before: Called when the brokers answer, before the group sees anything of us.

        Returns:
            Topics of the default list that Kafka does not show.

        Raises:
            ConfigurationError: A topic does not exist.
        """
        self._listener = listener
        cluster = self._cluster
        absent = [topic for topic in self._topics if topic not in {*cluster.topics, *begun}]
        if absent:
            self._miss(absent, cluster.topics)
        before()
        self.subscribe(set(self._topics) - set(absent))
        return frozenset(absent)

    def _miss(self, absent: Sequence[str], shown: Collection[str]) -> None:
        """Refuse or warn of topics that were never read and that Kafka does not show."""
        access = self.brokers.access(absent)
        reasons = "; ".join(
            why_not_visible(self._settings, topic, access.get(topic, Access.ABSENT))
            for topic in absent
        )
        is_default = "topics" not in self._settings.model_fields_set
        if is_default and len(absent) < len(self._topics):
            rest = ",".join(topic for topic in self._topics if topic not in absent)
            log.warning(
                "topic_not_available",
                topics=absent,
                reason=reasons,
                effect=f"continuing with {rest}",
                action="have Upvest provide the topic (Prices needs a contract of its own), or set "
                f"PIPELINE_TOPICS={rest}",
            )
            return
        there = ", ".join(sorted(name for name in shown if name[:2] != "__")[:20])
        raise ConfigurationError(
            f"PIPELINE_TOPICS: {reasons}. The brokers show {there or 'no topic'}"
        )

    def subscribe(self, topics: Collection[str]) -> None:
        """Read these topics too."""
        self._subscribed |= set(topics)
        self._consumer.subscribe(
            sorted(self._subscribed),
            on_assign=self._assigned,
            on_revoke=self._revoked,
            on_lost=self._lost,
        )

    def poll(self, records_max: int, wait_s: float, linger_s: float = 0.0) -> Polled:
        """Records and happenings that are there; serves the listener.

        Args:
            records_max: Most records; at least 1.
            wait_s: Longest wait where there is nothing.
            linger_s: Longest wait for more once there is something.
        """
        self.brokers.serve()
        try:
            messages = self._consumer.consume(1, wait_s)
            if messages and records_max > 1:
                messages += self._consumer.consume(records_max - 1, linger_s)
        except KafkaException as error:
            raise translated(error.args[0]) from None
        if self._raised is not None:
            raise self._raised
        self._raise_refused_login()
        records: list[Record] = []
        happenings: list[Happening] = []
        for message in messages:
            trouble = message.error()
            if trouble is None:
                records.append(record_of(cast("GoodMessage", message)))
            elif happening := self._happening(message, trouble):
                happenings.append(happening)
        return Polled(records, happenings)

    def leave(self) -> None:
        """Leave the group, so that others get the partitions at once; serves ``on_revoke``.

        Where Kafka does not answer, the client is let go alone: Kafka finds this member gone after
        its ``session.timeout.ms``, as after a crash.
        """
        if not closes(self._consumer):
            self._listener = None
            log.warning(
                "group_not_left",
                waited_s=CLOSE_S_MAX,
                effect="Kafka notices within session.timeout.ms; nothing is lost",
            )
        self.brokers.close()
        if self._raised is not None:
            raise self._raised

    @property
    def member_id(self) -> str:
        """Kafka's id of this member; empty before it has joined."""
        return self._consumer.memberid() or ""

    # -------------------------------------------------------------------------------- flow

    def seek(self, partition: Partition, to: NextOffset) -> None:
        """Read on at ``to``."""
        asked(lambda: self._consumer.seek(TopicPartition(partition.topic, partition.number, to)))

    def hold(self, partitions: Iterable[Partition]) -> None:
        """Fetch no more of these partitions; what was fetched is fetched again later."""
        fresh = set(partitions) - self._paused
        if fresh:
            self._consumer.pause([TopicPartition(*partition) for partition in fresh])
            self._paused |= fresh

    def let_flow(self, partitions: Iterable[Partition]) -> None:
        """Fetch these partitions again."""
        held = set(partitions) & self._paused
        if held:
            self._consumer.resume([TopicPartition(*partition) for partition in held])
            self._paused -= held

    def commit(
        self, offsets: Mapping[Partition, NextOffset], installation: UUID, beat: int = 0
    ) -> None:
        """Tell Kafka's tools how far the log is; best effort, waits for nothing.

        The offsets decide nothing. The metadata name the database and this member, and ``beat``
        rises while it writes there, so that two databases are noticed in one group.
        """
        if not offsets:
            return
        metadata = f"{COMMIT_METADATA}{installation}:{beat}:{self.member_id}"
        places = [
            TopicPartition(partition.topic, partition.number, offset, metadata)
            for partition, offset in offsets.items()
        ]
        try:
            self._consumer.commit(offsets=places, asynchronous=True)
        except KafkaException as error:
            log_commit_failure(error.args[0])

    # -------------------------------------------------------------------------------- callbacks

    # An exception in a callback would leave poll() while the assignment is made all the same, at
    # Kafka's offset and not ours (confluent-kafka-python). So it is kept, nothing is fetched, and
    # poll() raises it.

    def _assigned(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        partitions = [Partition(place.topic, place.partition) for place in places]
        try:
            begin = self._heard().on_assign(partitions)
        except Exception as error:  # noqa: BLE001 - kept for poll(), which raises it
            self._raised = error
            begin = {}
        offsets = [
            TopicPartition(partition.topic, partition.number, begin.get(partition, 0))
            for partition in partitions
        ]
        if self._cooperates:
            consumer.incremental_assign(offsets)
        else:
            consumer.assign(offsets)
        self.hold(partition for partition in partitions if partition not in begin)

    def _revoked(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        self._gone(consumer, places, self._heard().on_revoke)

    def _lost(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        self._gone(consumer, places, self._heard().on_lost)

    def _gone(
        self,
        consumer: Consumer,
        places: list[TopicPartition],
        tell: Callable[[Collection[Partition]], None],
    ) -> None:
        partitions = [Partition(place.topic, place.partition) for place in places]
        try:
            tell(partitions)
        except Exception as error:  # noqa: BLE001 - kept for poll(), which raises it
            self._raised = error
        # librdkafka keeps a partition held that goes and comes back.
        self.let_flow(partitions)
        if self._cooperates:
            consumer.incremental_unassign(places)
        else:
            consumer.unassign()

    def _heard_of(self, error: KafkaError) -> None:
        if error.code() in LOGIN_REFUSED:
            self._refused_login = error
        report(error)

    def _heard(self) -> Listener:
        if self._listener is None:
            raise InvariantError("the group was not joined")
        return self._listener

    def _happening(self, message: Message, error: KafkaError) -> Happening | None:
        topic, number, offset = message.topic(), message.partition(), message.offset()
        code = error.code()
        if code == KafkaError.TOPIC_AUTHORIZATION_FAILED and topic and number is not None:
            # Fetching was refused; a subscription that is refused names no partition.
            report(error)
            return OutOfRange(Partition(topic, number)) if number >= 0 else None
        if code in TOPICS_OWN or code == POLLED_TOO_LATE:
            report(error)
            return None
        if topic is None or number is None or offset is None:
            raise translated(error)
        partition = Partition(topic, number)
        if code == PARTITION_END:
            return ReachedEnd(partition, NextOffset(offset))
        if code in OUT_OF_RANGE:
            return OutOfRange(partition)
        report(error)
        return None


def _on_commit(error: KafkaError | None, places: list[TopicPartition]) -> None:
    if error is not None:
        log_commit_failure(error, {place.topic for place in places if place.error})
