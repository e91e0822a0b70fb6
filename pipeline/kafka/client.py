"""Kafka's client: its configuration, its start and end, and the record in a message of it."""

import re
import threading
from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller
from typing import Any, Protocol, TypeVar

from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Consumer, KafkaException

from pipeline.errors import ConfigurationError, Server
from pipeline.events import UNREADABLE_HEADERS, Record
from pipeline.kafka.reports import ClientReports
from pipeline.redaction import without
from pipeline.settings import Settings

REQUEST_S_MAX = 10.0
"""Maximum wait for the answer to one request to the brokers."""
OPTIONAL_REQUEST_S_MAX = 2.0
"""Maximum wait for an answer that some brokers never give, and that we can do without."""
CLOSE_S_MAX = 10.0
"""Maximum wait for a client to close; brokers that answer need a fraction of a second."""

COMMIT_METADATA = "pipeline:"
"""What we commit to Kafka names the database, the heartbeat and the member:
``pipeline:ID:HEARTBEAT:MEMBER``. It reveals two databases in one group, and a copy of a database
whose worker still runs."""
COMMIT_METADATA_PATTERN = re.compile(
    COMMIT_METADATA + r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?::([0-9]+):(.*))?"
)

Config = dict[str, Any]
_Client = TypeVar("_Client")

_GUARANTEES: Config = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",
    "isolation.level": "read_committed",
    "enable.partition.eof": True,
}
_DEFAULTS: Config = {
    # One queue for all partitions. With one batch in the loop and one in the writer, it bounds the
    # memory of a backlog.
    "queued.max.messages.kbytes": 16 * 1024,
    "fetch.max.bytes": 16 * 1024 * 1024,
    # When that queue is full, librdkafka fetches nothing for this long: by default a second, in
    # which we would empty the queue and then wait.
    "fetch.queue.backoff.ms": 50,
    "client.id": "upvest-pipeline",
    # Added partitions are found within this time.
    "topic.metadata.refresh.interval.ms": 60_000,
}
# Each attempt may be a refused login. The client's own 100 ms mean 20 connections per second to a
# broker that refuses them (measured with librdkafka 2.16): the wait did not grow.
_RECONNECT: Config = {"reconnect.backoff.ms": 1000, "reconnect.backoff.max.ms": 10_000}
_CLASSIC_DEFAULTS: Config = {"partition.assignment.strategy": "cooperative-sticky"}


def consumer_config(settings: Settings) -> Config:
    """For a consumer of the group. What a guarantee depends on overrides every option."""
    group: Config = {
        "group.id": settings.group_id,
        "group.protocol": settings.kafka_group_protocol,
    }
    if settings.group_instance_id:
        group["group.instance.id"] = settings.group_instance_id
    if settings.kafka_group_protocol == "classic":
        group = _CLASSIC_DEFAULTS | group
    return _DEFAULTS | group | connection_config(settings) | _GUARANTEES


def reader_config(settings: Settings, reports: ClientReports) -> Config:
    """For a consumer that assigns partitions to itself and never joins the group.

    It has the group's name, so the rights on the group suffice; its members do not notice.
    """
    config = consumer_config(settings) | reports.options
    config.pop("group.instance.id", None)
    return config


def connection_config(settings: Settings) -> Config:
    """For any client: the servers, the login, and the pauses between attempts to connect."""
    chosen = settings.kafka_client()
    # librdkafka refuses a minimum above the maximum, so an option replaces both.
    return dict(chosen) if _RECONNECT.keys() & chosen.keys() else _RECONNECT | chosen


def create(client: Callable[[], _Client], settings: Settings, reports: ClientReports) -> _Client:
    """Create a client.

    Raises:
        ConfigurationError: It refuses an option. The message has the option and the reason, but
            none of our values.
    """
    reports.client_created(settings.kafka_client(), settings.group_id)
    try:
        return client()
    except KafkaException as refused:
        reason = without(refused.args[0].str(), settings.kafka_client().values())
        raise ConfigurationError(
            f"PIPELINE_KAFKA_OPTIONS: {reason.strip()}", server=Server.KAFKA
        ) from None


def close(client: Consumer) -> bool:
    """Close a client; returns whether it was closed within ``CLOSE_S_MAX``.

    ``close()`` never returns while a request waits for a coordinator of the group that does not
    exist (librdkafka issue 3740). Then its thread is left behind.
    """
    # A daemon: a thread that never ends must not keep the process alive.
    closing = threading.Thread(target=client.close, name="kafka-close", daemon=True)
    closing.start()
    closing.join(CLOSE_S_MAX)
    return not closing.is_alive()


# ---------------------------------------------------------------------------------------- records


class RecordMessage(Protocol):
    """A message without an error; the client's own types also allow None."""

    def topic(self) -> str: ...  # noqa: D102 - the client's own methods
    def partition(self) -> int: ...  # noqa: D102
    def offset(self) -> int: ...  # noqa: D102
    def value(self) -> bytes | None: ...  # noqa: D102
    def key(self) -> bytes | None: ...  # noqa: D102
    def headers(self) -> Sequence[tuple[str, bytes | None]] | None: ...  # noqa: D102
    def timestamp(self) -> tuple[int, int]: ...  # noqa: D102


# Record's own constructor is a Python function around this one; both run once per record.
_new_record = partial(tuple.__new__, Record)

# At a name that is not UTF-8 the client returns headers and also sets an exception. A call that the
# interpreter has specialized does not check; the exception would surface at the next statement.
_headers = methodcaller("headers")


def record_of(message: RecordMessage) -> Record:
    """The record in a message without an error."""
    kind, milliseconds = message.timestamp()
    try:
        headers = _headers(message)
    except (SystemError, UnicodeDecodeError):
        # A name is not UTF-8. The client then gives none of the headers.
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
