"""Kafka's client: how ours are configured, a record of its, and its errors in our words."""

import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from operator import methodcaller
from typing import Any, NamedTuple, Protocol, TypeVar

import structlog
from confluent_kafka import (
    TIMESTAMP_NOT_AVAILABLE,
    Consumer,
    KafkaError,
    KafkaException,
    libversion,
)

from pipeline import causes, handshakes
from pipeline.errors import (
    ConfigurationError,
    InvariantError,
    MemberReplacedError,
    PipelineError,
    server_error,
)
from pipeline.events import UNREADABLE_HEADERS, Record
from pipeline.redaction import without
from pipeline.settings import Settings

log = structlog.get_logger(__name__)

COMPLAINT_S_MIN = 60.0
"""Least time between two logs of the same complaint of the client."""

CLOSE_S_MAX = 10.0
"""Longest wait for a client's goodbye; brokers that are there take a fraction of a second."""

COMMIT_METADATA = "pipeline:"
DATABASE_NAMED = re.compile(
    COMMIT_METADATA + r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?::([0-9]+):(.*))?"
)
"""What we commit to Kafka names the database, the beat and the member: `pipeline:ID:BEAT:MEMBER`.
So two databases in one group are noticed, and a copy of a database whose worker still beats."""

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
# Each attempt may be a refused login. The client's own 100 ms mean 20 connections per second to a
# broker that refuses them (measured with librdkafka 2.16): the wait did not grow.
_RECONNECT: Config = {"reconnect.backoff.ms": 1000, "reconnect.backoff.max.ms": 10_000}
_CLASSIC_DEFAULTS: Config = {"partition.assignment.strategy": "cooperative-sticky"}


def consumer_config(settings: Settings) -> Config:
    """For a consumer of the group; what the guarantees stand on wins over any option."""
    group: Config = {
        "group.id": settings.group_id,
        "group.protocol": settings.kafka_group_protocol,
    }
    if settings.group_instance_id:
        group["group.instance.id"] = settings.group_instance_id
    if settings.kafka_group_protocol == "classic":
        group = _CLASSIC_DEFAULTS | group
    return _DEFAULTS | group | connection_config(settings) | _GUARANTEES


def connection_config(settings: Settings) -> Config:
    """For any client: where to connect, as whom, and how fast again."""
    chosen = settings.kafka_client()
    # librdkafka refuses a least wait above the longest, so an option replaces both.
    return dict(chosen) if _RECONNECT.keys() & chosen.keys() else _RECONNECT | chosen


def opened(client: Callable[[], _Client], settings: Settings) -> _Client:
    """A client, made.

    Raises:
        ConfigurationError: It refuses an option; which, and why, without any value of ours.
    """
    begins(settings.kafka_client(), settings.group_id)
    try:
        return client()
    except KafkaException as refused:
        complaint = without(refused.args[0].str(), settings.kafka_client().values())
        raise ConfigurationError(f"PIPELINE_KAFKA_OPTIONS: {complaint.strip()}") from None


def closes(client: Consumer) -> bool:
    """Close a client; whether it was done within ``CLOSE_S_MAX``.

    With a request to the group's coordinator on its way and no coordinator there, ``close()`` never
    returns (librdkafka issue 3740). So it may go on alone.
    """
    # A daemon, for a thread that never ends must not keep the process.
    closing = threading.Thread(target=client.close, name="leaving", daemon=True)
    closing.start()
    closing.join(CLOSE_S_MAX)
    return not closing.is_alive()


def client_version() -> str:
    """The version of librdkafka that does the work."""
    version, _number = libversion()
    return version


# ---------------------------------------------------------------------------------------- records


class GoodMessage(Protocol):
    """A message without error, for which the client's types allow too much."""

    def topic(self) -> str: ...  # noqa: D102 - the client's own methods
    def partition(self) -> int: ...  # noqa: D102
    def offset(self) -> int: ...  # noqa: D102
    def value(self) -> bytes | None: ...  # noqa: D102
    def key(self) -> bytes | None: ...  # noqa: D102
    def headers(self) -> Sequence[tuple[str, bytes | None]] | None: ...  # noqa: D102
    def timestamp(self) -> tuple[int, int]: ...  # noqa: D102


# Record's own constructor is a function of Python around this one; both run once a record.
_new_record = partial(tuple.__new__, Record)

# At a name that is not UTF-8 the client returns headers and leaves an exception behind. A call that
# the interpreter has specialized does not look; the exception would come at whatever runs next.
_headers = methodcaller("headers")


def record_of(message: GoodMessage) -> Record:
    """The record that a message without error brings."""
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
LOGIN_REFUSED = frozenset(
    {KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED}  # noqa: SLF001 - public
)
OUT_OF_RANGE = frozenset(
    {
        KafkaError._AUTO_OFFSET_RESET,  # noqa: SLF001 - public, as are all that begin so
        KafkaError._LOG_TRUNCATION,  # noqa: SLF001
        KafkaError.OFFSET_OUT_OF_RANGE,
    }
)
TOPICS_OWN = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
    }
)
"""One of the topics is gone or hidden; the others flow."""
PARTITION_END = KafkaError._PARTITION_EOF  # noqa: SLF001 - public
POLLED_TOO_LATE = KafkaError._MAX_POLL_EXCEEDED  # noqa: SLF001 - public
"""The client gives its partitions up, as it tells by ``on_lost``, and joins again by itself."""

_Answer = TypeVar("_Answer")


class _Target(NamedTuple):
    """Whom we talk to, and as whom."""

    servers: str
    user: str | None
    group: str
    uses_tls: bool = False
    authority: str = ""

    @classmethod
    def of(cls, options: Mapping[str, Any], group: str) -> "_Target":
        return cls(
            str(options.get("bootstrap.servers") or ""),
            options.get("sasl.username"),
            group,
            str(options.get("security.protocol")).endswith("SSL"),
            str(options.get("ssl.ca.location") or ""),
        )


class _Standing:
    """What the clients of this process have last reported of their connections.

    A request that is not answered in time says no more than that. Why, the client reports beside
    it, by callbacks. A process talks to one Kafka.

    Attributes:
        target: That Kafka.
    """

    def __init__(self) -> None:
        self.target = _Target("", None, "")
        self._reported: tuple[float, str, str] | None = None
        self._serve: list[Callable[[], None]] = []

    def listens(self, serve: Callable[[], None]) -> None:
        """Call this, which runs callbacks of clients, before a reason is looked for."""
        self._serve.append(serve)

    def listens_no_more(self, serve: Callable[[], None]) -> None:
        self._serve.remove(serve)

    def note(self, error: KafkaError) -> None:
        # That all brokers are unavailable is reported after the reason of each.
        if error.name() != "_ALL_BROKERS_DOWN":
            self._reported = (time.monotonic(), error.name(), error.str())

    def begins(self, target: _Target) -> None:
        """A client is made: what others reported before does not explain what it meets.

        It may log in with another password than they did.
        """
        self.target = target
        self._reported = None

    def answered(self) -> None:
        self._reported = None

    def reason(self, error: KafkaError) -> tuple[str, str]:
        """Name and words of the error, or what was reported where it only says "no answer"."""
        said = error.name(), error.str()
        if said[0] not in _VAGUE:
            return said
        for serve in self._serve:
            serve()
        if self._reported is None or time.monotonic() - self._reported[0] > REPORT_S_MAX:
            return said
        return self._reported[1:]

    def broker(self, words: str) -> tuple[str, int] | None:
        """Host and port of the broker that a client's words name, else of the first configured."""
        host, _, port = self._servers(words).split(",")[0].strip().rpartition(":")
        return (host.strip("[]"), int(port)) if port.isdecimal() else None

    def _servers(self, words: str) -> str:
        """The broker that a client's words name, else all that are configured."""
        named = re.search(r"://([^/\s]+:\d+)/", words) or re.match(r"([^/\s:]+:\d+)/", words)
        return named[1] if named else self.target.servers

    def where(self, words: str) -> str:
        """The broker that a client's words name, else all that are configured; and the user."""
        servers = self._servers(words)
        return f"{servers} for user {self.target.user}" if self.target.user else servers


_standing = _Standing()


def begins(options: Mapping[str, Any], group: str | None = None) -> None:
    """Note whom a client that is made now talks to; its ``error_cb`` is to be ``report``.

    Args:
        options: librdkafka's.
        group: Its consumer group, if it has one.
    """
    _standing.begins(_Target.of(options, _standing.target.group if group is None else group))


listens, listens_no_more = _standing.listens, _standing.listens_no_more
_VAGUE = frozenset({"_TRANSPORT", "_TIMED_OUT", "_ALL_BROKERS_DOWN", "_WAIT_COORD", "_FAIL"})
REPORT_S_MAX = 60.0
"""How long a report of a connection explains requests that are not answered."""


def asked(ask: Callable[[], _Answer]) -> _Answer:
    """The answer to a question, or our error."""
    try:
        answer = ask()
    except KafkaException as error:
        raise translated(error.args[0]) from None
    _standing.answered()
    return answer


def _is_replaced(error: KafkaError) -> bool:
    """Whether Kafka knows another member in this one's place.

    Given as an event of the queue, a fatal error has a code of its own, and only its text tells.
    """
    return error.code() in _FENCED or (
        error.code() == KafkaError._FATAL  # noqa: SLF001 - its public name begins so
        and any(KafkaError(code).str() in error.str() for code in _FENCED)
    )


def translated(error: KafkaError) -> PipelineError:
    """The branch of our tree that an error of the client belongs to."""
    if _is_replaced(error):
        return MemberReplacedError(f"Kafka: {error.name()}: {error.str()}")
    name, words = _standing.reason(error)
    words, cause = _explained(name, words)
    if error.fatal() and name not in causes.KAFKA_CODES:
        return InvariantError(f"Kafka: {name}: {words}")
    what = cause.what.format(group=repr(_standing.target.group))
    where = _standing.where(words)
    return server_error(
        cause, f"Kafka at {where} {what}. Cause: {name}, {_without_place(words)}. {cause.fix}"
    )


def _explained(name: str, words: str) -> tuple[str, causes.Cause]:
    """What the client says of an error, and what we find out ourselves; the cause of both."""
    cause, broker = causes.of_kafka(name, words), _standing.broker(words)
    found = None
    if cause is causes.UNKNOWN_CA and broker:
        found = handshakes.why_refused(*broker, _standing.target.authority)
    elif cause in (causes.KAFKA_CLOSES, causes.KAFKA_UNAVAILABLE) and broker:
        # What this client speaks comes first: servers log an error per request they cannot read.
        if _standing.target.uses_tls:
            if not handshakes.speaks_tls(*broker) and handshakes.speaks_kafka(*broker):
                return words, causes.NO_TLS
        elif not handshakes.speaks_kafka(*broker) and handshakes.speaks_tls(*broker):
            return words, causes.KAFKA_WANTS_TLS
    if found is None:
        return words, cause
    words = f"{_TIME_BEHIND.sub('', words)}: {found}"
    return words, causes.of_kafka(name, words)


_TIME_BEHIND = re.compile(r"\s*\(after \d+ms in state \w+.*\)\s*$")


def _without_place(words: str) -> str:
    """What a client says, without the address in front and the time behind."""
    words = re.sub(r"^[^\s]*/\S+: ", "", words)
    return _TIME_BEHIND.sub("", words).strip().rstrip(".")


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
LIBRARY_LOG = logging.getLogger("librdkafka")
LIBRARY_LOG.addFilter(_NotRepeated())

_complaints = _Repeated()
_skipped_commits = _Repeated()


def report(error: KafkaError) -> None:
    """Log what the client reports of its connections; it continues by itself."""
    _standing.note(error)
    if times := _complaints.times_due(error.name()):
        words, cause = _explained(error.name(), error.str())
        is_ours = cause.verdict is causes.Verdict.MISCONFIGURED
        (log.error if is_ours else log.warning)(
            "kafka_client_error",
            error=error.name(),
            reason=words,
            action=cause.fix,
            times_since=times,
        )


def log_commit_failure(error: KafkaError, topics: Collection[str] = ()) -> None:
    """Log that Kafka's tools are not told how far we are.

    Args:
        error: Why.
        topics: Those that it is about; none where it is about the group.
    """
    if error.code() == KafkaError._NO_OFFSET:  # noqa: SLF001 - its public name begins so
        return
    # After a rebalance all that are on their way come back at once.
    if times := _skipped_commits.times_due(error.name()):
        cause = causes.of_kafka(error.name(), error.str())
        if cause.verdict is causes.Verdict.MISCONFIGURED:
            what = cause.what.format(group=repr(_standing.target.group))
            named = f": {', '.join(sorted(topics))}" if topics else ""
            log.warning(
                "kafka_commit_refused",
                error=error.name(),
                reason=f"Kafka at {_standing.where('')} {what}" + named,
                effect="events still arrive, until the group is joined again: then it is refused",
                action=cause.fix,
                times_since=times,
            )
            return
        log.info(
            "kafka_commit_skipped",
            error=error.name(),
            effect="monitoring only",
            times_since=times,
        )
