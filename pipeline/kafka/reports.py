"""What the Kafka clients of a process report, and our errors, which contain it.

The error of a request that times out does not contain the reason. The client reports the reason
separately, to ``error_cb``; ``ClientReports`` keeps it until a request needs it.
"""

import logging
import re
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

import structlog
from confluent_kafka import KafkaError, KafkaException

from pipeline import causes, handshakes
from pipeline.errors import (
    InvariantError,
    MemberReplacedError,
    PipelineError,
    Server,
    server_error,
)
from pipeline.kafka.errors import UNAVAILABLE, VAGUE, is_replaced
from pipeline.rate_limit import RateLimit

log = structlog.get_logger(__name__)

REPORT_S_MAX = 60.0
"""How long a report about a connection explains requests that time out."""
SAME_ERROR_S_MIN = 60.0
"""Minimum time between two log lines about the same error of the client."""

_STATE_SUFFIX = re.compile(r"\s*\(after \d+ms in state \w+.*\)\s*$")

_Answer = TypeVar("_Answer")


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


class ClientReports:
    """What the Kafka clients of one process have reported; all of them connect to one Kafka.

    Created once, by what lives as long as the process, and passed to each client: it also limits
    how often the log repeats an error.

    Attributes:
        endpoint: That Kafka.
    """

    def __init__(self) -> None:
        self.endpoint = Endpoint("", None, "")
        self._last: tuple[float, str, str] | None = None
        self._run_callbacks: list[Callable[[], None]] = []
        self._client_errors = RateLimit(SAME_ERROR_S_MIN)
        self._commit_failures = RateLimit(SAME_ERROR_S_MIN)

    # --------------------------------------------------------------------------------- the clients

    @property
    def options(self) -> dict[str, Any]:
        """For every client: where it reports errors."""
        return {"error_cb": self.on_client_error, "logger": logging.getLogger("librdkafka")}

    def client_created(self, options: Mapping[str, Any], group: str | None = None) -> None:
        """Record which Kafka a new client connects to; it may log in with another password.

        Args:
            options: librdkafka's.
            group: Its consumer group, if it has one.
        """
        group = self.endpoint.group if group is None else group
        self.endpoint = Endpoint.of(options, group)
        self._last = None

    def add_client(self, run_callbacks: Callable[[], None]) -> None:
        """Call this before a reason is looked up: it runs the pending callbacks of a client."""
        self._run_callbacks.append(run_callbacks)

    def remove_client(self, run_callbacks: Callable[[], None]) -> None:
        """Undo ``add_client``."""
        self._run_callbacks.remove(run_callbacks)

    # ------------------------------------------------------------------------------- errors of ours

    def request(self, send: Callable[[], _Answer]) -> _Answer:
        """The answer to a request, or our error."""
        try:
            answer = send()
        except KafkaException as error:
            raise self.translated(error.args[0]) from None
        # The last report no longer explains anything.
        self._last = None
        return answer

    def translated(self, error: KafkaError) -> PipelineError:
        """The branch of our tree that an error of the client belongs to."""
        if is_replaced(error):
            return MemberReplacedError(f"Kafka: {error.name()}: {error.str()}")
        name, words = self._reason(error)
        words, cause = _explained(self.endpoint, name, words)
        if error.fatal() and name not in causes.KAFKA_CODES:
            return InvariantError(f"Kafka: {name}: {words}")
        what = cause.what.format(group=repr(self.endpoint.group))
        where = self.endpoint.describe(words)
        return server_error(
            cause,
            f"Kafka at {where} {what}. Cause: {name}, {_without_address(words)}. {cause.fix}",
            server=Server.KAFKA,
            address=self.endpoint.servers,
        )

    def _reason(self, error: KafkaError) -> tuple[str, str]:
        """Name and text of an error, or of the last report where the error has no reason."""
        own = error.name(), error.str()
        if own[0] not in VAGUE:
            return own
        for run_callbacks in self._run_callbacks:
            run_callbacks()
        if self._last is None or time.monotonic() - self._last[0] > REPORT_S_MAX:
            return own
        return self._last[1:]

    # ------------------------------------------------------------------------------------- the log

    def on_client_error(self, error: KafkaError) -> None:
        """Keep and log what a client reports about its connections; it continues by itself."""
        # The client reports that all brokers are unavailable after the reason of each.
        if error.name() != "_ALL_BROKERS_DOWN":
            self._last = (time.monotonic(), error.name(), error.str())
        if times := self._client_errors.occurrences_to_log(error.name()):
            words, cause = _explained(self.endpoint, error.name(), error.str())
            is_ours = cause.verdict is causes.Verdict.MISCONFIGURED
            is_outage = error.name() in UNAVAILABLE
            (log.error if is_ours else log.info if is_outage else log.warning)(
                "kafka_client_error",
                error=error.name(),
                reason=words,
                action=cause.fix,
                occurrences=times,
            )

    def on_commit_failure(self, error: KafkaError, topics: Collection[str] = ()) -> None:
        """Log that the group's offsets in Kafka, which decide nothing, were not updated.

        Args:
            error: Why.
            topics: Those whose offsets were refused; none where the group is refused.
        """
        if error.code() == KafkaError._NO_OFFSET:  # noqa: SLF001 - its public name begins so
            return
        # After a rebalance all commits that were sent fail together.
        times = self._commit_failures.occurrences_to_log(error.name())
        if not times:
            return
        cause = causes.of_kafka(error.name(), error.str())
        if cause.verdict is causes.Verdict.MISCONFIGURED:
            what = cause.what.format(group=repr(self.endpoint.group))
            named = f": {', '.join(sorted(topics))}" if topics else ""
            log.warning(
                "kafka_commit_refused",
                error=error.name(),
                reason=f"Kafka at {self.endpoint.describe('')} {what}{named}",
                effect="events still arrive; the next time that this process joins the group, "
                "Kafka refuses it",
                action=cause.fix,
                occurrences=times,
            )
            return
        log.info(
            "kafka_commit_skipped",
            error=error.name(),
            effect="only the offsets that Kafka's tools show are late; no event is affected",
            occurrences=times,
        )


def _explained(endpoint: Endpoint, name: str, words: str) -> tuple[str, causes.Cause]:
    """The text of an error, with what a handshake of our own finds out; and the cause."""
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


def _without_address(words: str) -> str:
    """The text of an error, without the address at its start and the state at its end."""
    words = re.sub(r"^[^\s]*/\S+: ", "", words)
    return _STATE_SUFFIX.sub("", words).strip().rstrip(".")
