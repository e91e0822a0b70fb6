"""Unavailable servers: how long to wait for them, how often to retry, and what to log."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import structlog

from pipeline.backoff import LOGIN_RETRY_S, SERVER
from pipeline.durations import duration
from pipeline.errors import (
    ConfigurationError,
    HangingServerError,
    PipelineError,
    Server,
    TransientError,
)
from pipeline.rate_limit import without_numbers

log = structlog.get_logger(__name__)

UNAVAILABLE_S_MAX = 60.0
"""How long a one-shot command waits for an unavailable server."""
GRACE_S = 60.0
"""How long a refused login or a missing right may last while we run: passwords get rotated."""
REPORTS_S = (60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
"""How long after its beginning an outage is logged again; after the last, at this interval."""
CAUSES_S_MIN = 10.0
"""Minimum time between a line about an outage and one about another cause of it. A server that
stops refuses in several ways within seconds. A login or a right that is refused does not wait, nor
does a server that hangs: this cause comes once, because new connections then time out."""


@dataclass
class _Outage:
    """An outage of one server, as logged.

    Attributes:
        since: When it began.
        name: The server with its address, as in the first line.
        failing: The loops that have not used the server since their last error.
        refused: Those of them whose login or right was refused.
        reported: Per cause, how many lines the outage should have had at its last line.
        logged_at: When its last line was logged.
    """

    since: float
    name: str
    failing: set["OutagePolicy"] = field(default_factory=set)
    refused: set["OutagePolicy"] = field(default_factory=set)
    reported: dict[str, int] = field(default_factory=dict)
    logged_at: float = float("-inf")


class OutageLog:
    """Logs the outages of this process, each server by itself; all loops of the process share it.

    An outage ends when every loop that reported it has used the server again. May be called from
    any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outages: dict[Server, _Outage] = {}

    @property
    def unavailable(self) -> frozenset[Server]:
        """The servers that are unavailable now."""
        with self._lock:
            return frozenset(self._outages)

    def failed(
        self,
        loop: "OutagePolicy",
        error: TransientError | ConfigurationError,
        *,
        refused_since: float | None,
        time_left: Callable[[], timedelta | None],
    ) -> None:
        """Log a new cause soon, and any cause again at growing intervals."""
        now = time.monotonic()
        with self._lock:
            outage = self._outages.setdefault(error.server, _Outage(now, error.server_name))
            outage.failing.add(loop)
            due = _reports_due(now - outage.since)
            if not self._is_due(outage, loop, error, due, now, refused_since):
                return
        line: dict[str, object] = {"server": outage.name, "reason": str(error)}
        since = {"unavailable_s": round(now - outage.since)} if due else {}
        if refused_since is not None and isinstance(error, ConfigurationError):
            ends_in_s = max(0, round(GRACE_S - (now - refused_since)))
            log.error(
                "access_refused",
                **line,
                effect=f"retrying; unless this is fixed, exit with 78 in {ends_in_s} s",
                **since,
            )
            return
        effect = _effect(time_left() if due else None)
        log.warning("server_unavailable", **line, effect=effect, **since)

    @staticmethod
    def _is_due(
        outage: _Outage,
        loop: "OutagePolicy",
        error: PipelineError,
        due: int,
        now: float,
        refused_since: float | None,
    ) -> bool:
        cause, is_refusal = without_numbers(str(error)), isinstance(error, ConfigurationError)
        if is_refusal and not outage.refused:
            # The time until we end starts now, so it is logged, whatever was logged before.
            outage.reported.pop(cause, None)
        if is_refusal:
            outage.refused.add(loop)
        elif refused_since is None:
            outage.refused.discard(loop)
        if outage.reported.get(cause, -1) >= due:
            return False
        is_new = cause not in outage.reported
        waits = not isinstance(error, ConfigurationError | HangingServerError)
        if is_new and waits and now - outage.logged_at < CAUSES_S_MIN:
            return False
        # All causes of an outage share its clock: two that alternate are not logged twice as often.
        outage.reported = {known: max(due, at) for known, at in outage.reported.items()}
        outage.reported[cause] = due
        outage.logged_at = now
        return True

    def recovered(self, loop: "OutagePolicy", server: Server) -> None:
        """A loop has used the server; if no other loop waits for it, its outage has ended."""
        with self._lock:
            outage = self._outages.get(server)
            if outage is None or loop not in outage.failing:
                return
            outage.failing.remove(loop)
            outage.refused.discard(loop)
            if outage.failing:
                return
            del self._outages[server]
        lasted_s = round(time.monotonic() - outage.since, 1)
        log.info("server_available", server=outage.name, unavailable_s=lasted_s)


@dataclass
class _Waiting:
    """How long one loop has waited for one server."""

    has_run: bool = False
    since: float | None = None
    refused_since: float | None = None
    refused_at: float = 0.0
    failures: int = 0


class OutagePolicy:
    """Decides how long one loop waits for its servers, for each server by itself.

    Args:
        waits_forever: Wait for an unavailable server without limit; else for
            ``UNAVAILABLE_S_MAX``.
        time_left: How long Kafka keeps the events that were not read; None where not known.
        outages: Where outages are logged; the loops of one process share it.
    """

    def __init__(
        self,
        *,
        waits_forever: bool,
        time_left: Callable[[], timedelta | None] = lambda: None,
        outages: OutageLog | None = None,
    ) -> None:
        self._waits_forever = waits_forever
        self._time_left = time_left
        self._log = outages or OutageLog()
        self._servers: dict[Server, _Waiting] = {server: _Waiting() for server in Server}

    def on_error(self, error: TransientError | ConfigurationError) -> float:
        """Handle an error of a server that may become available again.

        Returns:
            How many seconds to wait before the next attempt.

        Raises:
            PipelineError: The same error, where waiting is useless: a setting, a login or a right
                was wrong from the start, or for ``GRACE_S``, or a one-shot command has waited long
                enough.
        """
        now, server = time.monotonic(), self._servers[error.server]
        server.since = server.since or now
        if isinstance(error, ConfigurationError):
            server.refused_since = server.refused_since or now
            server.refused_at = now
            if not server.has_run or now - server.refused_since > GRACE_S:
                raise error
        elif now - server.refused_at > GRACE_S:
            # Not earlier: while a server refuses us, single requests may also time out.
            server.refused_since = None
        if not self._waits_forever and now - server.since > UNAVAILABLE_S_MAX:
            raise error
        self._log.failed(self, error, refused_since=server.refused_since, time_left=self._time_left)
        server.failures += 1
        if isinstance(error, ConfigurationError) and error.is_login:
            return LOGIN_RETRY_S
        return SERVER.random_wait_s(server.failures)

    def on_success(self, *servers: Server) -> None:
        """These servers are available: the next error of one of them begins a new outage."""
        for server in servers:
            self._servers[server] = _Waiting(has_run=True)
            self._log.recovered(self, server)


def _effect(left: timedelta | None) -> str:
    if left is None:
        return "waiting, and retrying; Kafka keeps the events for the length of its retention"
    if left <= timedelta(0):
        return (
            "waiting; the retention of the oldest event that was not read is over, so Kafka "
            "may have deleted events: end this outage now, then see `pipeline status`"
        )
    return (
        "waiting, and retrying; Kafka may delete the oldest event that was not read in "
        f"about {duration(left.total_seconds())}"
    )


def _reports_due(lasts_s: float) -> int:
    """How many lines after its first one an outage of this length has had."""
    due = sum(lasts_s >= at for at in REPORTS_S)
    if due == len(REPORTS_S):
        due += int((lasts_s - REPORTS_S[-1]) // REPORTS_S[-1])
    return due
