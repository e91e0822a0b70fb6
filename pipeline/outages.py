"""Unavailable servers: how long to wait for them, how often to retry, and what to log."""

import time
from collections.abc import Callable
from datetime import timedelta

import structlog

from pipeline.backoff import LOGIN_RETRY_S, SERVER
from pipeline.durations import duration
from pipeline.errors import ConfigurationError, PipelineError
from pipeline.rate_limit import without_numbers

log = structlog.get_logger(__name__)

UNAVAILABLE_S_MAX = 60.0
"""How long a one-shot command waits for an unavailable server."""
GRACE_S = 60.0
"""How long a refused login or a missing right may last while we run: passwords get rotated."""
REPORTS_S = (60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
"""How long after its beginning an outage is logged again; after the last, at this interval."""


class OutagePolicy:
    """Decides how long to wait for servers, and logs each cause and each long outage.

    Args:
        waits_forever: Wait for an unavailable server without limit; else for
            ``UNAVAILABLE_S_MAX``.
        time_left: How long Kafka keeps the events that were not read; None where not known.
    """

    def __init__(
        self,
        *,
        waits_forever: bool,
        time_left: Callable[[], timedelta | None] = lambda: None,
    ) -> None:
        self._waits_forever = waits_forever
        self._time_left = time_left
        self._has_run = False
        self._since: float | None = None
        self._refused_since: float | None = None
        self._refused_at = 0.0
        self._reported: dict[str, int] = {}
        self._failures = 0

    def on_error(self, error: PipelineError) -> float:
        """Handle an error of a server that may become available again.

        Returns:
            How many seconds to wait before the next attempt.

        Raises:
            PipelineError: The same error, where waiting is useless: a setting, a login or a right
                was wrong from the start, or for ``GRACE_S``, or a one-shot command has waited long
                enough.
        """
        now = time.monotonic()
        self._since = self._since or now
        if isinstance(error, ConfigurationError):
            if self._refused_since is None:
                self._refused_since = now
                # The time until we end starts now, so it is logged, whatever was logged before.
                self._reported.pop(without_numbers(str(error)), None)
            self._refused_at = now
            if not self._has_run or now - self._refused_since > GRACE_S:
                raise error
        elif now - self._refused_at > GRACE_S:
            # Not earlier: while a server refuses us, single requests may also time out.
            self._refused_since = None
        if not self._waits_forever and now - self._since > UNAVAILABLE_S_MAX:
            raise error
        self._report(error, now)
        self._failures += 1
        if isinstance(error, ConfigurationError) and error.is_login:
            return LOGIN_RETRY_S
        return SERVER.random_wait_s(self._failures)

    def on_success(self) -> None:
        """The servers are available: the next error begins a new outage."""
        self._has_run = True
        if self._since is not None:
            log.info("server_available", unavailable_s=round(time.monotonic() - self._since, 1))
        self._since = self._refused_since = None
        self._reported.clear()
        self._failures = 0

    def _report(self, error: PipelineError, now: float) -> None:
        """Log a new cause at once, and any cause again at growing intervals."""
        reason = str(error)
        cause = without_numbers(str(error))
        lasts_s = now - (self._since or now)
        due = _reports_due(lasts_s)
        if self._reported.get(cause, -1) >= due:
            return
        # All causes of an outage share its clock: two that alternate are not logged twice as often.
        self._reported = {known: max(due, at) for known, at in self._reported.items()}
        self._reported[cause] = due
        since = {"unavailable_s": round(lasts_s)} if due else {}
        if self._refused_since is not None and isinstance(error, ConfigurationError):
            ends_in_s = max(0, round(GRACE_S - (now - self._refused_since)))
            log.error(
                "access_refused",
                reason=reason,
                effect=f"retrying; unless this is fixed, exit with 78 in {ends_in_s} s",
                **since,
            )
            return
        log.warning("server_unavailable", reason=reason, effect=self._effect(due), **since)

    def _effect(self, due: int) -> str:
        left = self._time_left() if due else None
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
