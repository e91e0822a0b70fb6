"""The errors of Kafka's client: the branch of our tree for each, and what the log says of them."""

import logging
import re
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

import structlog
from confluent_kafka import KafkaError, KafkaException

from pipeline import causes, handshakes
from pipeline.errors import InvariantError, MemberReplacedError, PipelineError, server_error
from pipeline.outages import without_numbers

log = structlog.get_logger(__name__)

REPORT_S_MAX = 60.0
"""How long a report about a connection explains requests that time out."""
SAME_ERROR_S_MIN = 60.0
"""Minimum time between two log lines about the same error of the client."""

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
TOPIC_ERRORS = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
    }
)
"""One topic is missing or hidden; the others are read."""
PARTITION_END = KafkaError._PARTITION_EOF  # noqa: SLF001 - public
POLLED_TOO_LATE = KafkaError._MAX_POLL_EXCEEDED  # noqa: SLF001 - public
"""The client gives its partitions up, reports them by ``on_lost``, and joins again by itself."""
_VAGUE = frozenset({"_TRANSPORT", "_TIMED_OUT", "_ALL_BROKERS_DOWN", "_WAIT_COORD", "_FAIL"})
"""Names of errors that do not contain the reason."""

_Answer = TypeVar("_Answer")


# ------------------------------------------------------------------ what the client has reported


class Endpoint(NamedTuple):
    """The Kafka that the clients of this process connect to, and the user."""

    servers: str
    user: str | None
    group: str
    uses_tls: bool = False
    authority: str = ""

    @classmethod
    def of(cls, options: Mapping[str, Any], group: str) -> "Endpoint":
        """The endpoint that librdkafka's options name."""
        return cls(
            str(options.get("bootstrap.servers") or ""),
            options.get("sasl.username"),
            group,
            str(options.get("security.protocol")).endswith("SSL"),
            str(options.get("ssl.ca.location") or ""),
        )

    def servers_in(self, words: str) -> str:
        """The broker that an error names, else all that are configured."""
        named = re.search(r"://([^/\s]+:\d+)/", words) or re.match(r"([^/\s:]+:\d+)/", words)
        return named[1] if named else self.servers

    def broker_in(self, words: str) -> tuple[str, int] | None:
        """Host and port of the broker that an error names, else of the first configured."""
        host, _, port = self.servers_in(words).split(",")[0].strip().rpartition(":")
        return (host.strip("[]"), int(port)) if port.isdecimal() else None

    def describe(self, words: str) -> str:
        """The broker that an error names, else all that are configured; and the user."""
        servers = self.servers_in(words)
        return f"{servers} for user {self.user}" if self.user else servers


class ConnectionReports:
    """The last error that the clients of this process reported about their connections.

    The error of a request that times out does not contain the reason. The client reports the
    reason separately, to ``error_cb``. A process connects to one Kafka, so one instance serves all
    of its clients.

    Attributes:
        endpoint: That Kafka.
    """

    def __init__(self) -> None:
        self.endpoint = Endpoint("", None, "")
        self._last: tuple[float, str, str] | None = None
        self._run_callbacks: list[Callable[[], None]] = []

    def add_client(self, run_callbacks: Callable[[], None]) -> None:
        """Call this before a reason is looked up: it runs the pending callbacks of a client."""
        self._run_callbacks.append(run_callbacks)

    def remove_client(self, run_callbacks: Callable[[], None]) -> None:
        """Undo ``add_client``."""
        self._run_callbacks.remove(run_callbacks)

    def reset(self, endpoint: Endpoint) -> None:
        """Forget earlier reports: a new client may log in with another password."""
        self.endpoint = endpoint
        self._last = None

    def record(self, error: KafkaError) -> None:
        """Keep a report."""
        # The client reports that all brokers are unavailable after the reason of each.
        if error.name() != "_ALL_BROKERS_DOWN":
            self._last = (time.monotonic(), error.name(), error.str())

    def clear(self) -> None:
        """A request was answered, so the last report no longer explains anything."""
        self._last = None

    def reason(self, error: KafkaError) -> tuple[str, str]:
        """Name and text of an error, or of the last report where the error has no reason."""
        own = error.name(), error.str()
        if own[0] not in _VAGUE:
            return own
        for run_callbacks in self._run_callbacks:
            run_callbacks()
        if self._last is None or time.monotonic() - self._last[0] > REPORT_S_MAX:
            return own
        return self._last[1:]


connection_reports = ConnectionReports()


def client_created(options: Mapping[str, Any], group: str | None = None) -> None:
    """Record which Kafka a new client connects to. Set ``on_client_error`` as its ``error_cb``.

    Args:
        options: librdkafka's.
        group: Its consumer group, if it has one.
    """
    group = connection_reports.endpoint.group if group is None else group
    connection_reports.reset(Endpoint.of(options, group))


# ------------------------------------------------------------------------------- errors of ours


def request(send: Callable[[], _Answer]) -> _Answer:
    """The answer to a request, or our error."""
    try:
        answer = send()
    except KafkaException as error:
        raise translated(error.args[0]) from None
    connection_reports.clear()
    return answer


def translated(error: KafkaError) -> PipelineError:
    """The branch of our tree that an error of the client belongs to."""
    if _is_replaced(error):
        return MemberReplacedError(f"Kafka: {error.name()}: {error.str()}")
    name, words = connection_reports.reason(error)
    words, cause = _explained(name, words)
    if error.fatal() and name not in causes.KAFKA_CODES:
        return InvariantError(f"Kafka: {name}: {words}")
    endpoint = connection_reports.endpoint
    what = cause.what.format(group=repr(endpoint.group))
    where = endpoint.describe(words)
    return server_error(
        cause, f"Kafka at {where} {what}. Cause: {name}, {_without_address(words)}. {cause.fix}"
    )


def _is_replaced(error: KafkaError) -> bool:
    """Whether another member has this member's place in the group.

    In the queue of messages a fatal error has a code of its own; only its text names the cause.
    """
    return error.code() in _FENCED or (
        error.code() == KafkaError._FATAL  # noqa: SLF001 - its public name begins so
        and any(KafkaError(code).str() in error.str() for code in _FENCED)
    )


def _explained(name: str, words: str) -> tuple[str, causes.Cause]:
    """The text of an error, with what a handshake of our own finds out; and the cause."""
    endpoint = connection_reports.endpoint
    cause, broker = causes.of_kafka(name, words), endpoint.broker_in(words)
    found = None
    if cause is causes.UNKNOWN_CA and broker:
        found = handshakes.why_refused(*broker, endpoint.authority)
    elif cause in (causes.KAFKA_CLOSES, causes.KAFKA_UNAVAILABLE) and broker:
        # Try the configured protocol first: a server logs an error per request it cannot read.
        if endpoint.uses_tls:
            if not handshakes.speaks_tls(*broker) and handshakes.speaks_kafka(*broker):
                return words, causes.NO_TLS
        elif not handshakes.speaks_kafka(*broker) and handshakes.speaks_tls(*broker):
            return words, causes.KAFKA_WANTS_TLS
    if found is None:
        return words, cause
    words = f"{_STATE_SUFFIX.sub('', words)}: {found}"
    return words, causes.of_kafka(name, words)


_STATE_SUFFIX = re.compile(r"\s*\(after \d+ms in state \w+.*\)\s*$")


def _without_address(words: str) -> str:
    """The text of an error, without the address at its start and the state at its end."""
    words = re.sub(r"^[^\s]*/\S+: ", "", words)
    return _STATE_SUFFIX.sub("", words).strip().rstrip(".")


# --------------------------------------------------------------------------------------- the log


class _RateLimit:
    """Allows one log line per minute and name; counts those in between."""

    def __init__(self) -> None:
        self._logged: dict[str, tuple[float, int]] = {}

    def occurrences_to_log(self, name: str) -> int:
        """How often it occurred since its last log line; 0 if no line is due."""
        now = time.monotonic()
        logged_at, suppressed = self._logged.get(name, (float("-inf"), 0))
        if now - logged_at < SAME_ERROR_S_MIN:
            self._logged[name] = (logged_at, suppressed + 1)
            return 0
        self._logged[name] = (now, 0)
        return suppressed + 1


class _RateLimitFilter(logging.Filter):
    """Passes each text of the library once per minute; it repeats a text at every attempt."""

    def __init__(self) -> None:
        super().__init__()
        self._limit = _RateLimit()

    def filter(self, record: logging.LogRecord) -> bool:
        return bool(self._limit.occurrences_to_log(without_numbers(record.getMessage())))


LIBRARY_LOG = logging.getLogger("librdkafka")
LIBRARY_LOG.addFilter(_RateLimitFilter())

_client_errors = _RateLimit()
_commit_failures = _RateLimit()


def on_client_error(error: KafkaError) -> None:
    """Log an error that a client reports about its connections; the client continues by itself."""
    connection_reports.record(error)
    if times := _client_errors.occurrences_to_log(error.name()):
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
    """Log that the group's offsets in Kafka, which decide nothing, were not updated.

    Args:
        error: Why.
        topics: Those whose offsets were refused; none where the group is refused.
    """
    if error.code() == KafkaError._NO_OFFSET:  # noqa: SLF001 - its public name begins so
        return
    # After a rebalance all commits that were sent fail together.
    if times := _commit_failures.occurrences_to_log(error.name()):
        cause = causes.of_kafka(error.name(), error.str())
        if cause.verdict is causes.Verdict.MISCONFIGURED:
            endpoint = connection_reports.endpoint
            what = cause.what.format(group=repr(endpoint.group))
            named = f": {', '.join(sorted(topics))}" if topics else ""
            log.warning(
                "kafka_commit_refused",
                error=error.name(),
                reason=f"Kafka at {endpoint.describe('')} {what}{named}",
                effect="events still arrive; the next time that this process joins the group, "
                "Kafka refuses it",
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
