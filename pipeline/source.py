"""Kafka: which partitions are ours, what is in them, from where on.

The only module of the pipeline that imports the Kafka client. Kafka's committed offsets are written
for monitoring and never read to decide where to go on; ``auto.offset.reset`` is ``error``, always.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any, NamedTuple, Protocol, TypeVar, cast
from uuid import UUID

import structlog
from confluent_kafka import (
    TIMESTAMP_NOT_AVAILABLE,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
    libversion,
)
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.admin._listoffsets import OffsetSpec

from pipeline.errors import (
    ConfigurationError,
    GroupFencedError,
    InvariantError,
    PipelineError,
    TransientError,
)
from pipeline.events import UNREADABLE_HEADERS, Record
from pipeline.positions import NextOffset, Offset, Partition
from pipeline.settings import Settings

log = structlog.get_logger(__name__)

ASK_S_MAX = 10.0
"""Longest wait for the answer to one question to the brokers."""
TOPIC_ID_S_MAX = 2.0
"""Longest wait for a topic's id; some brokers never answer, and a fingerprint does as well."""
COMPLAINT_S_MIN = 60.0
"""Least time between two logs of the same complaint of the client."""
LEAVE_S_MAX = 10.0
"""Longest wait for Kafka's goodbye; brokers that are there take a fraction of a second."""
PROBE_S_MAX = 10.0
"""Longest wait for one record, when the last stored one is compared with Kafka's."""

_COMMIT_METADATA = "pipeline:"
_DATABASE_NAMED = re.compile(_COMMIT_METADATA + r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")

_Config = dict[str, Any]

_GUARANTEES: _Config = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",
    "isolation.level": "read_committed",
    "enable.partition.eof": True,
}
_DEFAULTS: _Config = {
    # One queue for all partitions; with one batch in hand and one with the database, this bounds
    # the memory of a backlog.
    "queued.max.messages.kbytes": 16 * 1024,
    "fetch.max.bytes": 16 * 1024 * 1024,
    # When that queue is full, librdkafka fetches nothing for this long: a second by default, in
    # which we empty it and stand idle.
    "fetch.queue.backoff.ms": 50,
    "client.id": "upvest-pipeline",
    # Partitions that are added are found within this time.
    "topic.metadata.refresh.interval.ms": 60_000,
}
_CLASSIC_DEFAULTS: _Config = {"partition.assignment.strategy": "cooperative-sticky"}


class ReachedEnd(NamedTuple):
    """Everything below ``offset`` was given out, and Kafka has no more at the moment."""

    partition: Partition
    offset: NextOffset


class OutOfRange(NamedTuple):
    """Kafka's records at the offset that we asked for are gone; taking over again tells why."""

    partition: Partition


Happening = ReachedEnd | OutOfRange


class Polled(NamedTuple):
    """What one poll gave."""

    records: Sequence[Record]
    happenings: Sequence[Happening]


class Watermarks(NamedTuple):
    """What Kafka has of a partition: ``low`` up to, and without, ``high``."""

    low: NextOffset
    high: NextOffset


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

    Raises (any method):
        TransientError: The brokers did not answer in time.
        GroupFencedError: Another process uses the same ``GROUP_INSTANCE_ID``.
    """

    def __init__(self, settings: Settings) -> None:
        client = settings.kafka_client()
        group: _Config = {
            "group.id": settings.group_id,
            "group.protocol": settings.kafka_group_protocol,
        }
        if settings.group_instance_id:
            group["group.instance.id"] = settings.group_instance_id
        if settings.kafka_group_protocol == "classic":
            group = _CLASSIC_DEFAULTS | group
        self._config: _Config = _DEFAULTS | group | client | _GUARANTEES
        self._group = settings.group_id
        self._topics = settings.topics
        listening: _Config = {"error_cb": self._heard_of, "logger": _library_log}
        self._consumer = Consumer({**self._config, **listening, "on_commit": _on_commit})
        self._admin = AdminClient({**client, **listening})
        self._cooperates = settings.kafka_group_protocol == "consumer" or "cooperative" in str(
            self._config.get("partition.assignment.strategy")
        )
        self._refused_login: str | None = None
        self._listener: Listener | None = None
        self._raised: BaseException | None = None
        self._paused: set[Partition] = set()
        self._tells_topic_ids: bool | None = None
        self._probe: Consumer | None = None

    # -------------------------------------------------------------------------------- membership

    def join(self, listener: Listener, begun: Collection[str] = ()) -> None:
        """Join the group for the configured topics.

        Args:
            listener: What to do when partitions come and go.
            begun: Topics that have been read before. One of them that is gone is waited for.

        Raises:
            ConfigurationError: A topic does not exist, or the brokers refuse the login.
        """
        self._listener = listener
        try:
            cluster = _asked(lambda: self._consumer.list_topics(timeout=ASK_S_MAX))
        except TransientError:
            # The client goes on trying whatever the reason, and tells it when it is polled.
            self._consumer.poll(0)
            if self._refused_login is not None:
                raise ConfigurationError(
                    f"Kafka refused the login: {self._refused_login}"
                ) from None
            raise
        absent = [topic for topic in self._topics if topic not in {*cluster.topics, *begun}]
        if absent:
            there = ", ".join(sorted(name for name in cluster.topics if name[:2] != "__")[:20])
            raise ConfigurationError(
                f"PIPELINE_TOPICS: no {', '.join(absent)}, or it is hidden from this user. "
                f"The brokers show {there or 'no topic'}"
            )
        self._consumer.subscribe(
            list(self._topics),
            on_assign=self._assigned,
            on_revoke=self._revoked,
            on_lost=self._lost,
        )

    def poll(self, records_max: int, timeout_s: float) -> Polled:
        """Records and happenings, as soon as there are any; serves the listener.

        Args:
            records_max: Most records; at least 1.
            timeout_s: Longest wait.
        """
        # What it has to say of its connections would pile up in its queue.
        self._admin.poll(0)
        try:
            messages = self._consumer.consume(records_max, timeout_s)
        except KafkaException as error:
            raise _translated(error.args[0]) from None
        if self._raised is not None:
            raise self._raised
        records: list[Record] = []
        happenings: list[Happening] = []
        for message in messages:
            trouble = message.error()
            if trouble is None:
                records.append(_record(message))  # type: ignore[arg-type]  # see _Good
            elif happening := self._happening(message, trouble):
                happenings.append(happening)
        return Polled(records, happenings)

    def leave(self) -> None:
        """Leave the group, so that others get the partitions at once; serves ``on_revoke``.

        With a commit on its way and no coordinator, the client's ``close()`` never returns
        (librdkafka issue 3740). So it may go on alone: Kafka finds this member gone after its
        ``session.timeout.ms``, as after a crash.
        """
        # A daemon, for a thread that never ends must not keep the process.
        leaving = threading.Thread(target=self._consumer.close, name="leaving", daemon=True)
        leaving.start()
        leaving.join(LEAVE_S_MAX)
        if leaving.is_alive():
            self._listener = None
            log.warning(
                "group_not_left",
                waited_s=LEAVE_S_MAX,
                effect="Kafka notices within session.timeout.ms; nothing is lost",
            )
        if self._raised is not None:
            raise self._raised

    @property
    def member_id(self) -> str:
        """Kafka's id of this member; empty before it has joined."""
        return self._consumer.memberid() or ""

    # -------------------------------------------------------------------------------- flow

    def seek(self, partition: Partition, to: NextOffset) -> None:
        """Read on at ``to``."""
        _asked(lambda: self._consumer.seek(TopicPartition(partition.topic, partition.number, to)))

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

    def commit(self, offsets: Mapping[Partition, NextOffset], installation: UUID) -> None:
        """Tell Kafka's tools how far the log is; best effort, decides nothing, waits for nothing.

        The metadata name the database, so that two of them are noticed in one group.
        """
        if not offsets:
            return
        metadata = f"{_COMMIT_METADATA}{installation}"
        places = [
            TopicPartition(partition.topic, partition.number, offset, metadata)
            for partition, offset in offsets.items()
        ]
        try:
            self._consumer.commit(offsets=places, asynchronous=True)
        except KafkaException as error:
            _log_commit_failure(error.args[0])

    # -------------------------------------------------------------------------------- questions

    # For lists the other client is asked: a call that serves callbacks, made from within a callback
    # of the same client, ends the process at the next callback of that poll ("CallState_get:
    # Assertion `cs != NULL' failed", confluent-kafka 2.16).

    def cluster_id(self) -> str:
        """Kafka's id of the cluster."""
        return str(_asked(lambda: self._admin.list_topics(timeout=ASK_S_MAX)).cluster_id)

    def partition_count(self, topic: str) -> int:
        """How many partitions the topic has now; 0 where there is none."""
        found = _asked(lambda: self._admin.list_topics(topic, timeout=ASK_S_MAX))
        return len(found.topics[topic].partitions)

    def topics_there(self) -> Mapping[str, int]:
        """Every topic that this user may see, with its number of partitions."""
        found = _asked(lambda: self._admin.list_topics(timeout=ASK_S_MAX)).topics
        return {name: len(topic.partitions) for name, topic in found.items() if not topic.error}

    def topic_settings(self, topic: str) -> Mapping[str, str]:
        """A topic's settings, e.g. ``retention.ms``; empty where the broker does not tell."""
        resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
        [answer] = self._admin.describe_configs([resource], request_timeout=TOPIC_ID_S_MAX).values()
        try:
            return {name: entry.value for name, entry in answer.result().items()}
        except KafkaException as error:
            log.debug("topic_settings_unknown", topic=topic, error=error.args[0].name())
            return {}

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
                        raise _translated(error.args[0]) from None
                    ids[topic] = None
                    continue
                # Brokers before Kafka 2.8 leave it zero.
                if topic_id.get_most_significant_bits() or topic_id.get_least_significant_bits():
                    ids[topic] = str(topic_id)
            return ids

        return wait

    def watermarks(self, partition: Partition) -> Watermarks:
        """What Kafka has of a partition now; ``high`` is the last stable offset."""
        low, high = _asked(
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
        [found] = _asked(
            lambda: self._consumer.offsets_for_times(
                [TopicPartition(partition.topic, partition.number, milliseconds)], ASK_S_MAX
            )
        )
        return NextOffset(found.offset) if found.offset >= 0 else None

    def feeds(self, partitions: Collection[Partition]) -> Mapping[Partition, UUID]:
        """The databases that this consumer group says it feeds, where it says so."""
        places = _asked(
            lambda: self._consumer.committed([TopicPartition(*p) for p in partitions], ASK_S_MAX)
        )
        return {
            Partition(place.topic, place.partition): UUID(named[1])
            for place in places
            if (named := _DATABASE_NAMED.fullmatch(place.metadata or ""))
        }

    def record_at(self, partition: Partition, offset: Offset) -> Record | None:
        """The record that Kafka holds at an offset; None if there is none (any more).

        Only within ``probing``, whose client it asks, so that nothing of the membership moves.
        """
        if self._probe is None:
            raise InvariantError("a record was asked for outside of probing()")
        self._probe.assign([TopicPartition(partition.topic, partition.number, offset)])
        for message in self._probe.consume(1, PROBE_S_MAX):
            trouble = message.error()
            if trouble is None:
                return _record(cast("_Good", message)) if message.offset() == offset else None
            if trouble.code() in {KafkaError._PARTITION_EOF, *_ELSEWHERE}:  # noqa: SLF001
                return None
            raise _translated(trouble)
        raise TransientError(f"Kafka: {partition}: no answer about the record at {offset}")

    @contextmanager
    def probing(self) -> Iterator[None]:
        """A client for ``record_at``, for the length of the block."""
        probing: _Config = {
            "group.id": f"{self._group}-probe",
            "error_cb": _report,
            "logger": _library_log,
            # One record is all that is wanted, however large, and an end is told at once.
            "fetch.message.max.bytes": 1024,
            "queued.min.messages": 1,
            "fetch.wait.max.ms": 10,
        }
        self._probe = Consumer({**self._config, **probing})
        try:
            yield
        finally:
            self._probe.close()
            self._probe = None

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
        if error.code() in _LOGIN:
            self._refused_login = error.str()
        _report(error)

    def _heard(self) -> Listener:
        if self._listener is None:
            raise InvariantError("the group was not joined")
        return self._listener

    def _happening(self, message: Message, error: KafkaError) -> Happening | None:
        topic, number, offset = message.topic(), message.partition(), message.offset()
        code = error.code()
        if code in _TOPICS_OWN:
            # One of the topics is gone or hidden; the others flow.
            _report(error)
            return None
        if topic is None or number is None or offset is None:
            raise _translated(error)
        partition = Partition(topic, number)
        if code == KafkaError._PARTITION_EOF:  # noqa: SLF001 - its public name begins so
            return ReachedEnd(partition, NextOffset(offset))
        if code in _ELSEWHERE:
            return OutOfRange(partition)
        _report(error)
        return None


class _Good(Protocol):
    """A message without error, for which the client's types allow too much."""

    def topic(self) -> str: ...
    def partition(self) -> int: ...
    def offset(self) -> int: ...
    def value(self) -> bytes | None: ...
    def key(self) -> bytes | None: ...
    def headers(self) -> Sequence[tuple[str, bytes | None]] | None: ...
    def timestamp(self) -> tuple[int, int]: ...


# Record's own constructor is a function of Python around this one; both run once a record.
_new_record = partial(tuple.__new__, Record)

# At a name that is not UTF-8 the client returns headers and leaves an exception behind. A call that
# the interpreter has specialized does not look; the exception would come at whatever runs next.
_headers = methodcaller("headers")


def _record(message: _Good) -> Record:
    kind, milliseconds = message.timestamp()
    try:
        headers = _headers(message)
    except (SystemError, UnicodeDecodeError):
        # The client's way to say that a name is not UTF-8; the others are lost to it too.
        headers = UNREADABLE_HEADERS
    return _new_record(
        (
            message.topic(),
            message.partition(),
            message.offset(),
            message.value(),
            message.key(),
            headers,
            None if kind == TIMESTAMP_NOT_AVAILABLE else milliseconds,
            kind,
        )
    )


# ----------------------------------------------------------------------------------------- errors

_FENCED = {KafkaError.FENCED_INSTANCE_ID, KafkaError._FENCED}  # noqa: SLF001 - public
_LOGIN = {
    KafkaError._AUTHENTICATION,  # noqa: SLF001 - public, as are all that begin so
    KafkaError.SASL_AUTHENTICATION_FAILED,
}
_OPERATORS_BUSINESS = {
    *_LOGIN,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
}

_ELSEWHERE = {
    KafkaError._AUTO_OFFSET_RESET,  # noqa: SLF001
    KafkaError._LOG_TRUNCATION,  # noqa: SLF001
    KafkaError.OFFSET_OUT_OF_RANGE,
}
_TOPICS_OWN = {
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
}


Answer = TypeVar("Answer")


def client_version() -> str:
    """The version of librdkafka that does the work."""
    version, _number = libversion()
    return version


def _asked(ask: Callable[[], Answer]) -> Answer:
    try:
        return ask()
    except KafkaException as error:
        raise _translated(error.args[0]) from None


def _translated(error: KafkaError) -> PipelineError:
    text = f"Kafka: {error.name()}: {error.str()}"
    if error.code() in _FENCED:
        return GroupFencedError(f"{text}. Another process uses the same PIPELINE_GROUP_INSTANCE_ID")
    if error.fatal():
        return InvariantError(text)
    return TransientError(text)


class _Repeated:
    """Tells what is repeated once, then once a minute with how often it came."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[float, int]] = {}

    def times_due(self, name: str) -> int:
        """How often it came since it was last told; 0 if it is not to be told now."""
        now = time.monotonic()
        told_at, silent = self._told.get(name, (float("-inf"), 0))
        if now - told_at < COMPLAINT_S_MIN:
            self._told[name] = (told_at, silent + 1)
            return 0
        self._told[name] = (now, 0)
        return silent + 1


class _NotRepeated(logging.Filter):
    """Lets what the library says pass once a minute; it says it again at every attempt."""

    def __init__(self) -> None:
        super().__init__()
        self._said = _Repeated()

    def filter(self, record: logging.LogRecord) -> bool:
        return bool(self._said.times_due(_NUMBERS.sub("", record.getMessage())))


_NUMBERS = re.compile(r"[0-9]+")
_library_log = logging.getLogger("librdkafka")
_library_log.addFilter(_NotRepeated())

_complaints = _Repeated()
_skipped_commits = _Repeated()


def _report(error: KafkaError) -> None:
    if times := _complaints.times_due(error.name()):
        level = log.error if error.code() in _OPERATORS_BUSINESS else log.warning
        level("kafka_trouble", error=error.name(), reason=error.str(), times_since=times)


def _on_commit(error: KafkaError | None, _places: list[TopicPartition]) -> None:
    if error is not None:
        _log_commit_failure(error)


def _log_commit_failure(error: KafkaError) -> None:
    if error.code() == KafkaError._NO_OFFSET:  # noqa: SLF001 - its public name begins so
        return
    # After a rebalance all that are on their way come back at once.
    if times := _skipped_commits.times_due(error.name()):
        log.info(
            "kafka_commit_skipped",
            error=error.name(),
            effect="monitoring only",
            times_since=times,
        )
