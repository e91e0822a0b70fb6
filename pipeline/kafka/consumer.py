"""One member of the consumer group: the partitions that it is assigned, and the records in them."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast
from uuid import UUID

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import ClusterMetadata

from pipeline.errors import ConfigurationError, InvariantError, Server, TransientError
from pipeline.events import Record
from pipeline.kafka.access import Access, why_not_visible
from pipeline.kafka.client import (
    CLOSE_S_MAX,
    COMMIT_METADATA,
    REQUEST_S_MAX,
    Config,
    RecordMessage,
    close,
    consumer_config,
    create,
    record_of,
)
from pipeline.kafka.errors import (
    LOGIN_REFUSED,
    NOT_FETCHING,
    OUT_OF_RANGE,
    PARTITION_END,
    POLLED_TOO_LATE,
    TOPIC_ERRORS,
)
from pipeline.kafka.metadata import Brokers
from pipeline.kafka.reports import ClientReports
from pipeline.partitions import NextOffset, Partition
from pipeline.settings import Settings

log = structlog.get_logger(__name__)

FIRST_REQUEST_S = 0.5
"""Maximum wait for one attempt of the first request; then we check if the login was refused."""

SESSION_MS_DEFAULT = 45_000
"""librdkafka's ``session.timeout.ms``, where no option sets it."""


class ReachedEnd(NamedTuple):
    """Every record below ``offset`` was returned, and Kafka has no more at the moment."""

    partition: Partition
    offset: NextOffset


class OutOfRange(NamedTuple):
    """Kafka does not return the records that we request; claiming the partition finds out why."""

    partition: Partition


Notice = ReachedEnd | OutOfRange


class Polled(NamedTuple):
    """The result of one poll."""

    records: Sequence[Record]
    notices: Sequence[Notice]


@dataclass(frozen=True)
class RebalanceListener:
    """What to do when partitions are assigned or taken away; called within ``poll``.

    Attributes:
        on_assign: The partitions are ours. Returns the offset at which to start each; one that is
            omitted is paused.
        on_revoke: The partitions are taken away when this returns. Write what we hold of them.
        on_lost: The partitions were taken away already. Drop what we hold of them.
    """

    on_assign: Callable[[Collection[Partition]], Mapping[Partition, NextOffset]]
    on_revoke: Callable[[Collection[Partition]], None]
    on_lost: Callable[[Collection[Partition]], None]


class GroupConsumer:
    """One member of the consumer group, until it leaves.

    Kafka's committed offsets are for monitoring; they never decide where to read.

    Args:
        settings: The servers, the login, the group and its topics.
        reports: Where the clients report errors.

    Attributes:
        brokers: For requests that have nothing to do with the membership.

    Raises (any method):
        TransientError: The brokers did not answer in time.
        MemberReplacedError: Kafka has another member in our place; join again.
    """

    def __init__(self, settings: Settings, reports: ClientReports) -> None:
        config = consumer_config(settings)
        self._reports = reports
        self._settings = settings
        self._topics = settings.topics
        self._subscribed: set[str] = set()
        callbacks: Config = {"error_cb": self._on_error, "on_commit": self._on_commit}
        self._refused_login: KafkaError | None = None
        self._consumer = create(
            lambda: Consumer({**config, **reports.options, **callbacks}), settings, reports
        )
        try:
            self._cluster = self._first_answer()
        except BaseException:
            close(self._consumer)
            raise
        # Only now: each client is one more login that may be refused.
        self.brokers = Brokers(settings, reports)
        self._is_cooperative = settings.kafka_group_protocol == "consumer" or "cooperative" in str(
            config.get("partition.assignment.strategy")
        )
        self._client_id = str(config["client.id"])
        self._session_timeout_s = int(config.get("session.timeout.ms", SESSION_MS_DEFAULT)) / 1000
        self._listener: RebalanceListener | None = None
        # Stored, because the last commit is sent from within close(): there memberid() may never
        # return, and it holds the interpreter's lock (seen with librdkafka 2.16).
        self._assigned_to = ""
        self._raised: BaseException | None = None
        self._paused: set[Partition] = set()

    # ---------------------------------------------------------------------------------- membership

    def _first_answer(self) -> ClusterMetadata:
        """What Kafka shows us. A refused login is raised as soon as the client reports it."""
        deadline = time.monotonic() + REQUEST_S_MAX
        while True:
            try:
                return self._request_topics()
            except TransientError:
                # Nothing is subscribed, so this only runs callbacks.
                self._consumer.poll(0)
                self._raise_refused_login()
                if time.monotonic() > deadline:
                    # Once more: the reason may have been reported just now.
                    return self._request_topics()

    def _request_topics(self) -> ClusterMetadata:
        cluster: ClusterMetadata = self._reports.request(
            lambda: self._consumer.list_topics(timeout=FIRST_REQUEST_S)
        )
        return cluster

    def _raise_refused_login(self) -> None:
        if self._refused_login is not None:
            raise self._reports.translated(self._refused_login)

    def join(
        self,
        listener: RebalanceListener,
        known_topics: Collection[str] = (),
        before_joining: Callable[[], None] = lambda: None,
    ) -> frozenset[str]:
        """Join the group for the configured topics.

        A topic of the default list that was never read may be missing: not every client of Upvest
        has it. One that somebody configured must exist, or a typing error would go unnoticed.

        Args:
            listener: What to do when partitions are assigned or taken away.
            known_topics: Topics that were read before. If one of them is missing, we wait for it.
            before_joining: Called when the brokers answer, before the group sees this process.

        Returns:
            Topics of the default list that Kafka does not show.

        Raises:
            ConfigurationError: A topic does not exist.
        """
        self._listener = listener
        shown = self._cluster.topics
        absent = [topic for topic in self._topics if topic not in {*shown, *known_topics}]
        if absent:
            self._refuse_or_warn(absent, shown)
        before_joining()
        self.subscribe(set(self._topics) - set(absent))
        return frozenset(absent)

    def _refuse_or_warn(self, absent: Sequence[str], shown: Collection[str]) -> None:
        """For topics that were never read and that Kafka does not show."""
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
                action="have Upvest provide the topic (Prices needs a separate contract), or set "
                f"PIPELINE_TOPICS={rest}",
            )
            return
        names = ", ".join(sorted(name for name in shown if name[:2] != "__")[:20])
        raise ConfigurationError(
            f"PIPELINE_TOPICS: {reasons}. The brokers show {names or 'no topic'}",
            server=Server.KAFKA,
        )

    def subscribe(self, topics: Collection[str]) -> None:
        """Read these topics too."""
        self._subscribed |= set(topics)
        self._consumer.subscribe(
            sorted(self._subscribed),
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_lost,
        )

    def leave(self) -> None:
        """Leave the group, so that others get the partitions at once; calls ``on_revoke``.

        If Kafka does not answer, the client is left behind. Kafka removes this member after its
        ``session.timeout.ms``, as after a crash.
        """
        if not close(self._consumer):
            self._listener = None
            log.warning(
                "group_not_left",
                waited_s=CLOSE_S_MAX,
                effect="Kafka removes this member after session.timeout.ms; nothing is lost",
            )
        self.brokers.close()
        if self._raised is not None:
            raise self._raised

    @property
    def client_id(self) -> str:
        """The name of our clients, which is the same for every worker with our settings."""
        return self._client_id

    @property
    def session_timeout_s(self) -> float:
        """How long the brokers list a member that has died."""
        return self._session_timeout_s

    @property
    def member_id(self) -> str:
        """Kafka's id of this member; empty before it has joined."""
        return self._consumer.memberid() or ""

    # ------------------------------------------------------------------------------------- records

    def poll(self, records_max: int, wait_s: float, linger_s: float = 0.0) -> Polled:
        """Records and notices that have arrived; calls the listener.

        Args:
            records_max: Maximum number of records; at least 1.
            wait_s: Maximum wait for the first record.
            linger_s: Maximum wait for more after the first.
        """
        self.brokers.run_callbacks()
        try:
            messages = self._consumer.consume(1, wait_s)
            if messages and records_max > 1:
                messages += self._consumer.consume(records_max - 1, linger_s)
        except KafkaException as error:
            raise self._reports.translated(error.args[0]) from None
        if self._raised is not None:
            raise self._raised
        self._raise_refused_login()
        records: list[Record] = []
        notices: list[Notice] = []
        for message in messages:
            problem = message.error()
            if problem is None:
                records.append(record_of(cast("RecordMessage", message)))
            elif notice := self._notice(message, problem):
                notices.append(notice)
        return Polled(records, notices)

    def _notice(self, message: Message, error: KafkaError) -> Notice | None:
        topic, number, offset = message.topic(), message.partition(), message.offset()
        code = error.code()
        if code == KafkaError.TOPIC_AUTHORIZATION_FAILED and topic and number is not None:
            # Fetching was refused. If the subscription was refused, no partition is named.
            self._reports.on_client_error(error)
            return OutOfRange(Partition(topic, number)) if number >= 0 else None
        if code in TOPIC_ERRORS or code == POLLED_TOO_LATE:
            self._reports.on_client_error(error)
            return None
        if topic is None or number is None or offset is None:
            raise self._reports.translated(error)
        partition = Partition(topic, number)
        if code == PARTITION_END:
            return ReachedEnd(partition, NextOffset(offset))
        if code in OUT_OF_RANGE:
            return OutOfRange(partition)
        self._reports.on_client_error(error)
        return None

    def seek(self, partition: Partition, to: NextOffset) -> None:
        """Continue reading at ``to``, also where the client fetches no more."""
        start = TopicPartition(partition.topic, partition.number, to)
        try:
            self._consumer.seek(start)
        except KafkaException as error:
            if error.args[0].code() != NOT_FETCHING or not self._is_cooperative:
                raise self._reports.translated(error.args[0]) from None
            self._consumer.incremental_unassign([start])
            self._consumer.incremental_assign([start])

    def pause(self, partitions: Iterable[Partition]) -> None:
        """Stop fetching these partitions; records that were fetched are fetched again later."""
        to_pause = set(partitions) - self._paused
        if to_pause:
            self._consumer.pause([TopicPartition(*partition) for partition in to_pause])
            self._paused |= to_pause

    def resume(self, partitions: Iterable[Partition]) -> None:
        """Fetch these partitions again."""
        to_resume = set(partitions) & self._paused
        if to_resume:
            self._consumer.resume([TopicPartition(*partition) for partition in to_resume])
            self._paused -= to_resume

    def commit(
        self, offsets: Mapping[Partition, NextOffset], installation: UUID, heartbeat: int = 0
    ) -> None:
        """Show Kafka's tools how far the log is; best effort, waits for nothing.

        The offsets decide nothing. The metadata name the database and this member; ``heartbeat``
        rises while it writes there, which reveals a second database in the same group.
        """
        if not offsets:
            return
        metadata = f"{COMMIT_METADATA}{installation}:{heartbeat}:{self._assigned_to}"
        commits = [
            TopicPartition(partition.topic, partition.number, offset, metadata)
            for partition, offset in offsets.items()
        ]
        try:
            self._consumer.commit(offsets=commits, asynchronous=True)
        except KafkaException as error:
            self._reports.on_commit_failure(error.args[0])

    # ----------------------------------------------------------------------------------- callbacks

    # An exception in a callback would leave poll() although the partitions are assigned, at Kafka's
    # offset and not at ours (confluent-kafka-python). So it is stored, nothing is fetched, and
    # poll() raises it.

    def _on_assign(self, consumer: Consumer, assigned: list[TopicPartition]) -> None:
        partitions = _partitions(assigned)
        self._assigned_to = self.member_id
        try:
            starts = self._listener_of_group().on_assign(partitions)
        except Exception as error:  # noqa: BLE001 - stored for poll(), which raises it
            self._raised = error
            starts = {}
        # A halted partition is assigned too, or the group would give it to nobody: at any offset,
        # because it is paused before anything is fetched, and a claim of it seeks.
        offsets = [
            TopicPartition(partition.topic, partition.number, starts.get(partition, 0))
            for partition in partitions
        ]
        if self._is_cooperative:
            consumer.incremental_assign(offsets)
        else:
            consumer.assign(offsets)
        self.pause(partition for partition in partitions if partition not in starts)

    def _on_revoke(self, consumer: Consumer, revoked: list[TopicPartition]) -> None:
        self._unassign(consumer, revoked, self._listener_of_group().on_revoke)

    def _on_lost(self, consumer: Consumer, lost: list[TopicPartition]) -> None:
        self._unassign(consumer, lost, self._listener_of_group().on_lost)

    def _unassign(
        self,
        consumer: Consumer,
        taken: list[TopicPartition],
        notify: Callable[[Collection[Partition]], None],
    ) -> None:
        partitions = _partitions(taken)
        try:
            notify(partitions)
        except Exception as error:  # noqa: BLE001 - stored for poll(), which raises it
            self._raised = error
        # librdkafka keeps a partition paused that is taken away and assigned again.
        self.resume(partitions)
        if self._is_cooperative:
            consumer.incremental_unassign(taken)
        else:
            consumer.unassign()

    def _on_error(self, error: KafkaError) -> None:
        if error.code() in LOGIN_REFUSED:
            self._refused_login = error
        self._reports.on_client_error(error)

    def _on_commit(self, error: KafkaError | None, commits: list[TopicPartition]) -> None:
        if error is not None:
            topics = {commit.topic for commit in commits if commit.error}
            self._reports.on_commit_failure(error, topics)

    def _listener_of_group(self) -> RebalanceListener:
        if self._listener is None:
            raise InvariantError("the group was not joined")
        return self._listener


def _partitions(assigned: Iterable[TopicPartition]) -> list[Partition]:
    return [Partition(partition.topic, partition.partition) for partition in assigned]
