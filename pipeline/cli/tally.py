"""What a flow has done, in one line of the log per minute: all that a quiet day needs."""

import threading
import time
from collections.abc import Callable

import structlog

from pipeline.ingest import Progress as Ingested
from pipeline.projection.loop import ProjectionProgress as Projected

log = structlog.get_logger("pipeline.cli")

TELL_S = 60.0
"""How often the log says how many records were handled."""


class Tally:
    """Counts what both halves of a flow do; each of them reports here from its own thread.

    A line is logged at most every ``TELL_S``, and none where nothing was handled: why nothing is,
    an outage for instance, has lines of its own.
    """

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        self._totals: dict[str, int] = {}
        self._lags: dict[str, int] = {}
        self._told: dict[str, int] = {}
        self._told_at = time.monotonic()

    @property
    def totals(self) -> dict[str, int]:
        """How many records were ingested and projected since the start."""
        return dict(self._totals)

    def of_ingest(self) -> Callable[[Ingested], None]:
        """What an ingest is to call with its progress."""
        counter = self._counter("ingested", "ingest_lag")
        return lambda progress: counter(progress.written, progress.lag)

    def of_projection(self) -> Callable[[Projected], None]:
        """What a projection is to call with its progress."""
        counter = self._counter("projected", "projection_lag")
        return lambda progress: counter(progress.taken, progress.behind)

    def _counter(self, name: str, name_of_lag: str) -> Callable[[int, int], None]:
        counted = 0
        self._totals.setdefault(name, 0)

        def count(done: int, lag: int) -> None:
            nonlocal counted
            with self._one_at_a_time:
                self._totals[name] += done - counted
                self._lags[name_of_lag] = lag
                counted = done
                self._tell()

        return count

    def _tell(self) -> None:
        now = time.monotonic()
        seconds = now - self._told_at
        if seconds < TELL_S:
            return
        fresh = {name: total - self._told.get(name, 0) for name, total in self._totals.items()}
        if any(fresh.values()):
            log.info("events_processed", seconds=round(seconds), **fresh, **self._lags)
        self._told, self._told_at = dict(self._totals), now
