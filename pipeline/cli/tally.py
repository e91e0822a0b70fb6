"""Counts records, for one line of the log per minute: all that a quiet day needs."""

import threading
import time
from collections.abc import Callable

import structlog

from pipeline.errors import Server
from pipeline.ingest.process import Progress as Ingested
from pipeline.outages import OutageLog
from pipeline.projection.loop import ProjectionProgress as Projected

log = structlog.get_logger("pipeline.cli")

LOG_S = 60.0
"""How often the number of records is logged."""
_MEASURED_WITH = {"ingest_lag": set(Server), "projection_lag": {Server.POSTGRESQL}}
"""The servers that are needed to measure a lag."""


class Tally:
    """Counts the records of both halves; each of them reports here from its own thread.

    Args:
        outages: Which servers are unavailable: then a lag is not known, and logged as null.

    A line is logged at most every ``LOG_S``, and none if there were no records: the reason, for
    example an outage, has lines of its own.
    """

    def __init__(self, outages: OutageLog) -> None:
        self._outages = outages
        self._lock = threading.Lock()
        self._totals: dict[str, int] = {}
        self._lags: dict[str, int] = {}
        self._logged: dict[str, int] = {}
        self._logged_at = time.monotonic()

    @property
    def totals(self) -> dict[str, int]:
        """How many records were ingested and projected since the start."""
        return dict(self._totals)

    def of_ingest(self) -> Callable[[Ingested], None]:
        """The function to which an ingest reports its progress."""
        counter = self._counter("ingested", "ingest_lag")
        return lambda progress: counter(progress.written, progress.lag)

    def of_projection(self) -> Callable[[Projected], None]:
        """The function to which a projection reports its progress."""
        counter = self._counter("projected", "projection_lag")
        return lambda progress: counter(progress.taken, progress.lag)

    def _counter(self, name: str, name_of_lag: str) -> Callable[[int, int], None]:
        counted = 0
        self._totals.setdefault(name, 0)

        def count(done: int, lag: int) -> None:
            nonlocal counted
            with self._lock:
                self._totals[name] += done - counted
                self._lags[name_of_lag] = lag
                counted = done
                self._log_if_due()

        return count

    def _log_if_due(self) -> None:
        now = time.monotonic()
        seconds = now - self._logged_at
        if seconds < LOG_S:
            return
        fresh = {name: total - self._logged.get(name, 0) for name, total in self._totals.items()}
        if any(fresh.values()):
            log.info("events_processed", seconds=round(seconds), **fresh, **self._known_lags())
        self._logged, self._logged_at = dict(self._totals), now

    def _known_lags(self) -> dict[str, int | None]:
        """The lags; None where a server that is needed to measure one is unavailable."""
        unavailable = self._outages.unavailable
        return {
            name: None if unavailable & _MEASURED_WITH[name] else lag
            for name, lag in self._lags.items()
        }
