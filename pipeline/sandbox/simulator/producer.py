"""Writes records to Kafka, and returns the offset of each."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from time import monotonic
from typing import Any, Final, Self

from confluent_kafka import KafkaError, KafkaException, Message
from confluent_kafka import Producer as KafkaProducer
from confluent_kafka.admin import AdminClient, NewTopic

from pipeline.causes import KAFKA_CODES
from pipeline.counts import count
from pipeline.errors import ConfigurationError, TransientError
from pipeline.kafka.reports import ClientReports
from pipeline.partitions import Offset
from pipeline.redaction import without
from pipeline.sandbox.simulator.records import Record

_ANSWER_SECONDS_MAX: Final = 30.0
_QUEUE_RECORDS_MAX: Final = 50_000
_QUEUE_KBYTES_MAX: Final = 64 * 1024
_WAIT_SECONDS: Final = 0.05
_RECORDS_PER_POLL: Final = 100

_NOT_ALLOWED: Final = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        # Kafka's answer where no topic at all may be written.
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    }
)

Delivered = Callable[[str, int, Offset, Record], None]
"""Called with topic, partition, offset and record, once the brokers have it for good."""


class Producer:
    """Produces with ``acks=all`` and idempotence: each record once, in order within a partition.

    The queue of what is on its way is bounded: a slow broker slows the caller down.

    Args:
        options: librdkafka's, at least ``bootstrap.servers``.
        on_delivery: Called for each record, in the thread that produces.
        simulated_time: Give the records the simulation's time. Left alone, they get the client's:
            Apache Kafka deletes what is dated outside the topic's retention, and refuses what lies
            more than an hour ahead.

    Raises:
        ConfigurationError: From every method: a topic does not exist, an option is wrong, or Kafka
            refuses a login or a right.
        TransientError: From every method: no answer in time, or a record was not delivered.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        on_delivery: Delivered | None = None,
        simulated_time: bool = False,
    ) -> None:
        self._reports = ClientReports()
        self._options = {**self._reports.options, **options}
        self._on_delivery = on_delivery
        self._simulated_time = simulated_time
        self._failed: KafkaError | None = None
        self._topic_failed: str | None = None
        self._topic_last: str | None = None
        self._topics: dict[str, int] = {}
        self._reports.client_created(options)
        try:
            self._client = KafkaProducer(
                {
                    "linger.ms": 5,
                    "queue.buffering.max.messages": _QUEUE_RECORDS_MAX,
                    "queue.buffering.max.kbytes": _QUEUE_KBYTES_MAX,
                    # What Kafka's own client does; it decides where a record names no partition.
                    "partitioner": "murmur2_random",
                    **self._options,
                    "acks": "all",
                    "enable.idempotence": True,
                }
            )
        except KafkaException as refused:
            complaint = without(refused.args[0].str(), options.values())
            raise ConfigurationError(f"Kafka's client: {complaint}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is not None:
            # What is still queued is given up, or leaving would wait for the brokers.
            self._client.purge()
        self._flush(_ANSWER_SECONDS_MAX)

    def create_topics(self, *topics: str, partitions: int) -> None:
        """Create the topics that do not exist, with the brokers' replication."""
        admin = AdminClient(dict(self._options))
        wanted = [NewTopic(topic, partitions, -1) for topic in topics]
        answers = admin.create_topics(wanted, request_timeout=_ANSWER_SECONDS_MAX)
        for topic, answer in answers.items():
            try:
                answer.result()
            except KafkaException as refused:
                error = refused.args[0]
                if error.code() == KafkaError.TOPIC_ALREADY_EXISTS:
                    continue
                if error.code() in _NOT_ALLOWED:
                    raise self._not_allowed("CREATE", topic, error) from None
                if error.name() in KAFKA_CODES:
                    raise self._reports.translated(error) from None
                raise ConfigurationError(f"topic {topic}: {error.str()}") from None

    def partitions(self, topic: str) -> int:
        """How many partitions a topic has; never creates it."""
        if topic not in self._topics:
            # Asking for all topics: asking for one by name would create it on many brokers.
            try:
                found = self._client.list_topics(timeout=_ANSWER_SECONDS_MAX).topics
            except KafkaException as failed:
                self._client.poll(0)  # callbacks say why nobody answered
                raise self._reports.translated(failed.args[0]) from None
            self._topics = {name: len(topic.partitions) for name, topic in found.items()}
        if topic not in self._topics:
            user = self._options.get("sasl.username")
            raise ConfigurationError(
                f"Kafka shows no topic {topic}{f' to user {user}' if user else ''}: it does not "
                "exist, or the right DESCRIBE (or WRITE) on it is missing. Make it with "
                "--create-topics, or ask for WRITE on it"
            )
        return self._topics[topic]

    def produce(self, records: Iterable[Record], *, rate: float | None = None) -> int:
        """Produce all records and wait until the brokers have each of them.

        Args:
            records: Read no faster than they are sent.
            rate: Records per second; None for as fast as possible.

        Returns:
            How many records there were.
        """
        started, sent = monotonic(), 0
        for record in records:
            self._send(record)
            sent += 1
            if rate is not None:
                self._serve_until(started + sent / rate)
            elif sent % _RECORDS_PER_POLL == 0:
                self._serve(0)
        self.flush()
        return sent

    def flush(self) -> None:
        """Wait until the brokers have everything sent so far.

        librdkafka gives a record up after ``message.timeout.ms``. Rarely it keeps one longer, if
        the brokers go away while it looks for them: then this gives up.
        """
        patience = int(self._options.get("message.timeout.ms", 300_000)) / 1000
        patience += _ANSWER_SECONDS_MAX
        fewest, until = len(self._client), monotonic() + patience
        while left := self._flush(_WAIT_SECONDS):
            self._check()
            if left < fewest:
                fewest, until = left, monotonic() + patience
            elif monotonic() > until:
                raise TransientError(
                    f"a record was not delivered: for {patience:,.0f} s Kafka has confirmed none "
                    f"of {count(left, 'record')}"
                )
        self._check()

    def _flush(self, seconds: float) -> int:
        """Wait for confirmations; how many are missing. A fatal error of the client is kept."""
        try:
            return self._client.flush(seconds)
        except (KafkaException, SystemError) as raised:
            # A fatal error that comes while the client waits leaves its own exception, and
            # the interpreter wraps that.
            failed = raised if isinstance(raised, KafkaException) else raised.__cause__
            if not isinstance(failed, KafkaException):
                raise
            self._failed = self._failed or failed.args[0]
            return 0

    def _send(self, record: Record) -> None:
        self._topic_last = record.topic
        if record.topic not in self._topics:
            self.partitions(record.topic)
        while True:
            try:
                self._client.produce(
                    record.topic,
                    record.value,
                    record.key,
                    partition=-1 if record.partition is None else record.partition,
                    on_delivery=partial(self._delivered, record),
                    timestamp=record.timestamp_ms if self._simulated_time else 0,
                    headers=list(record.headers),
                )
            except BufferError:
                self._serve(_WAIT_SECONDS)
            except KafkaException as failed:
                if failed.args[0].code() == KafkaError._FATAL:  # noqa: SLF001 - its public name
                    self._flush(_WAIT_SECONDS)  # brings the reason, which this error does not say
                self._failed = self._failed or failed.args[0]
                self._topic_failed = self._topic_failed or record.topic
                self._check()
            else:
                return

    def _delivered(self, record: Record, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            if self._failed is None:
                self._failed, self._topic_failed = error, record.topic
            return
        topic, partition, offset = message.topic(), message.partition(), message.offset()
        if self._on_delivery is not None and topic is not None:
            self._on_delivery(topic, partition or 0, Offset(offset or 0), record)

    def _serve_until(self, due: float) -> None:
        """Serve delivery reports until it is time for the next record."""
        while (left := due - monotonic()) > 0:
            self._serve(min(left, _WAIT_SECONDS))

    def _serve(self, seconds: float) -> None:
        try:
            self._client.poll(seconds)
        except KafkaException as failed:
            self._failed = self._failed or failed.args[0]
        self._check()

    def _check(self) -> None:
        if self._failed is not None:
            # Given as a fatal error it has another code, and only its text shows it.
            if self._failed.code() in _NOT_ALLOWED or (
                "authorization failed" in self._failed.str().lower()
            ):
                topic = self._topic_failed or self._topic_last or "?"
                raise self._not_allowed("WRITE", topic, self._failed)
            raise TransientError(f"a record was not delivered: {self._failed.str()}")

    def _not_allowed(self, operation: str, topic: str, error: KafkaError) -> ConfigurationError:
        user = self._options.get("sasl.username", "NAME")
        return ConfigurationError(
            f"Kafka refused {operation} on topic {topic} to user {user} ({error.name()}). Ask for "
            f"it: kafka-acls.sh --add --allow-principal User:{user} --operation {operation} "
            f"--topic {topic}"
        )
