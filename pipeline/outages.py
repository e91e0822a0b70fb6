"""Patience with servers: how long one that is away is waited for, and what the log says of it."""

import time

import structlog

from pipeline.errors import ConfigurationError, PipelineError

log = structlog.get_logger(__name__)

UNAVAILABLE_S_MAX = 60.0
"""How long a one-shot command waits for a server that is away."""
GRACE_S = 60.0
"""How long a refused login or a missing right may last while we run: passwords get rotated."""


class OutagePolicy:
    """Bears errors of servers until waiting makes no sense; tells each reason once.

    Args:
        waits_forever: An unavailable server is waited for without end; else for
            ``UNAVAILABLE_S_MAX``.
    """

    def __init__(self, *, waits_forever: bool) -> None:
        self._waits_forever = waits_forever
        self._has_run = False
        self._away_since: float | None = None
        self._refused_since: float | None = None
        self._told_reasons: set[str] = set()

    def on_error(self, error: PipelineError) -> None:
        """Note an error that may pass; the caller tries again after a while.

        Raises:
            PipelineError: This very error, where waiting makes no sense (any more): a setting, a
                login or a right was wrong from the start, or for ``GRACE_S``, or a one-shot command
                has waited long enough.
        """
        now = time.monotonic()
        if isinstance(error, ConfigurationError):
            self._refused_since = self._refused_since or now
            if not self._has_run or now - self._refused_since > GRACE_S:
                raise error
        else:
            self._refused_since = None
        self._away_since = self._away_since or now
        if not self._waits_forever and now - self._away_since > UNAVAILABLE_S_MAX:
            raise error
        reason = str(error)
        if reason not in self._told_reasons:
            self._told_reasons.add(reason)
            log.warning("server_unavailable", reason=reason, effect="waiting; nothing is lost")

    def on_success(self) -> None:
        """All is well: the next error begins anew."""
        self._has_run = True
        if self._away_since is not None:
            log.info("server_available", away_s=round(time.monotonic() - self._away_since, 1))
        self._away_since = self._refused_since = None
        self._told_reasons.clear()
