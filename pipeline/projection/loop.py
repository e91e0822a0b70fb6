"""The projection loop: read models follow the log until told to stop.

1. see where every projector stands and where the log ends, in one query
2. projectors that stand at the same place take the same range together, in one transaction;
   those further behind are brought up to them first
3. nothing to do: wait for a hint (NOTIFY), and at most the poll interval, for hints may be lost

Several workers may run at once: they share the partitions, and the checkpoint's row is the lock.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import groupby
from typing import NamedTuple, Self, cast

import psycopg
import structlog
from sqlalchemy import Engine, text

from pipeline.db import transaction, translated
from pipeline.errors import ConfigurationError, TransientError
from pipeline.outages import OutagePolicy
from pipeline.positions import NextOffset, OffsetRange, Partition
from pipeline.projection import checkpoints
from pipeline.projection.checkpoints import Standing
from pipeline.projection.declaration import Projector
from pipeline.projection.fingerprint import fingerprint
from pipeline.projection.sharing import Crew
from pipeline.projection.turn import Result, break_changed, project

log = structlog.get_logger(__name__)

CHANNEL = "pipeline_events"
GATHER_S_MAX = 0.1
"""Longest pause between rounds while events trickle; it is as long as the last round took."""
CAUGHT_UP_S_MIN = 60.0
"""How often, at most, the log says that a backlog is worked off."""
LOOK_S = 10.0
"""How often tables are searched for what somebody has added that leaves out rows silently."""
LISTEN_SLICE_S = 0.2
"""How often a wait looks whether it should stop."""


@dataclass(frozen=True)
class Limits:
    """The bounds of the loop.

    Attributes:
        batch_offsets_max: Most offsets in one pass.
        guilty_max: Most events that one projector may put aside in one pass.
        poll_interval: Longest wait before the log is looked at unasked.
    """

    batch_offsets_max: int = 20_000
    guilty_max: int = 1000
    poll_interval: timedelta = timedelta(milliseconds=500)


class Progress(NamedTuple):
    """How far the read models are, for a progress bar.

    Attributes:
        taken: Offsets taken by this process, each counted once for a range, not for a projector.
        behind: Offsets that the projector furthest behind still has to take, over all partitions.
    """

    taken: int
    behind: int


@dataclass(frozen=True)
class Work:
    """A range of one partition and the projectors that stand at its beginning."""

    partition: Partition
    offsets: OffsetRange
    names: tuple[str, ...]

    def joined_by(self, others: "Work | None") -> "Work":
        """The same with ``others`` too, if they have come to where it begins."""
        if others is None:
            return self
        if (others.partition, others.offsets.end) != (self.partition, self.offsets.first):
            return self
        return replace(self, names=(*self.names, *others.names))


def run_projection(
    engine: Engine,
    projectors: Sequence[Projector],
    limits: Limits | None = None,
    *,
    stop: threading.Event | None = None,
    until_end: bool = False,
    observe: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Bring read models up to the log, and keep them there.

    A server that is away is waited for, with growing pauses, for as long as it takes; a one-shot
    run gives up after a minute. A projector that breaks stands still, and the others go on.

    Args:
        engine: The database, with the schema of this program.
        projectors: Every read model to keep.
        limits: The bounds.
        stop: Set it to finish the pass in hand and return.
        until_end: Return when every live projector has what was in the log at the start.
        observe: Called after each round.

    Raises:
        TransientError: With ``until_end``: the server stayed away.
        ConfigurationError: Login, rights or schema are wrong, from the start or for a minute.
        InvariantError: What must be impossible has happened.
    """
    limits, stop = limits or Limits(), stop or threading.Event()
    _Loop(engine, projectors, limits, stop, observe, until_end=until_end).run()


class _Loop:
    def __init__(
        self,
        engine: Engine,
        projectors: Sequence[Projector],
        limits: Limits,
        stop: threading.Event,
        observe: Callable[[Progress], None],
        *,
        until_end: bool,
    ) -> None:
        self._engine = engine
        self._projectors = {one.name: one for one in projectors}
        self._crew = Crew(engine, self._projectors)
        self._limits = limits
        self._stop = stop
        self._observe = observe
        self._until_end = until_end
        self._goal: dict[Partition, NextOffset] | None = None
        self._taken = 0
        self._outages = OutagePolicy(waits_forever=not until_end)
        self._caught_up = CaughtUp(limits.batch_offsets_max)
        self._look_at = 0.0

    def run(self) -> None:
        while not self._stop.is_set():
            try:
                with _Hints.of(self._engine) as hints:
                    self._register()
                    self._follow(hints)
                    self._crew.leave()
                    return
            except (TransientError, ConfigurationError) as error:
                self._wait_for_server(error)

    def _register(self) -> None:
        with transaction(self._engine) as db:
            checkpoints.register(db, sorted(self._projectors))
            built = checkpoints.fingerprints(db)
        stale = [
            name
            for name, one in sorted(self._projectors.items())
            if built[name] not in (None, fingerprint(one))
        ]
        if stale:
            log.warning(
                "projectors_stale",
                projectors=stale,
                effect="their tables mix two definitions until `pipeline rebuild`",
            )

    def _follow(self, hints: "_Hints") -> None:
        while not self._stop.is_set():
            self._crew.check_in()
            with transaction(self._engine) as db:
                standings = checkpoints.standings(db, self._projectors, only_behind=True)
            if self._until_end and self._has_arrived(standings):
                return
            begun = time.monotonic()
            if begun >= self._look_at:
                with transaction(self._engine) as db:
                    break_changed(db, self._projectors.values())
                self._look_at = begun + LOOK_S
            moved = self._round(self._crew.share(standings))
            self._outages.on_success()
            self._observe(Progress(self._taken, _furthest_behind(standings)))
            self._caught_up.saw(max((one.lag for one in standings), default=0), time.monotonic())
            if not moved:
                hints.wait(self._limits.poll_interval, self._stop)
            elif not self._until_end and self._takes_all(standings):
                # Small passes cost nearly as much as large ones: let more come meanwhile.
                self._stop.wait(min(GATHER_S_MAX, time.monotonic() - begun))

    def _takes_all(self, standings: Iterable[Standing]) -> bool:
        """Whether one pass a partition reaches the end of the log."""
        return all(one.lag <= self._limits.batch_offsets_max for one in standings)

    def _has_arrived(self, standings: Iterable[Standing]) -> bool:
        if self._goal is None:
            self._goal = {one.partition: one.log_end for one in standings}
        # Of a log that begins later there is nothing to take below its beginning.
        return all(
            max(one.next_offset, one.log_first) >= self._goal.get(one.partition, NextOffset(0))
            for one in standings
        )

    def _round(self, standings: Sequence[Standing]) -> bool:
        """Each partition one range further, for each place where projectors stand in it."""
        moved = False
        arrived: Work | None = None
        for work in plan(standings, self._limits.batch_offsets_max):
            if self._stop.is_set():
                break
            self._crew.check_in()
            # Those who have just come here go on together with those who stood here.
            joined = work.joined_by(arrived)
            done = self._pass(joined)
            moved = moved or bool(done)
            arrived = replace(joined, names=done)
        return moved

    def _pass(self, work: Work) -> tuple[str, ...]:
        """Take one range; the names of those who have it now."""
        begun = time.monotonic()
        results = project(
            self._engine,
            [self._projectors[name] for name in work.names],
            work.partition,
            work.offsets,
            guilty_max=self._limits.guilty_max,
        )
        done = tuple(name for name, result in results.items() if result is Result.DONE)
        if done:
            self._taken += work.offsets.span
        log.debug(
            "projected",
            topic=work.partition.topic,
            partition=work.partition.number,
            offset_first=work.offsets.first,
            offset_end=work.offsets.end,
            projectors=len(done),
            left_out=sorted(set(results) - set(done)),
            duration_ms=round((time.monotonic() - begun) * 1000),
        )
        return done

    def _wait_for_server(self, error: TransientError | ConfigurationError) -> None:
        self._stop.wait(self._outages.on_error(error))


class CaughtUp:
    """Logs that a backlog is worked off; events that come and go leave no line.

    Args:
        offsets_max: A lag of more than this, what one pass takes, is a backlog.
    """

    def __init__(self, offsets_max: int) -> None:
        self._offsets_max = offsets_max
        self._since: float | None = None
        self._told_at = float("-inf")

    def saw(self, lag: int, now: float) -> None:
        """Note the largest lag of any partition, before a round."""
        if lag > self._offsets_max:
            self._since = self._since or now
        elif self._since is not None and now - self._told_at > CAUGHT_UP_S_MIN:
            log.info("projection_caught_up", after_s=round(now - self._since))
            self._since, self._told_at = None, now


def plan(standings: Sequence[Standing], offsets_max: int) -> list[Work]:
    """What to do in one round: for each partition, each place where projectors stand behind.

    A range never passes the next place where others stand, so those behind catch up to them and
    from then on all go together.

    Args:
        standings: By partition, then place, then name.
        offsets_max: Most offsets in one range.
    """
    planned = []
    for partition, here in groupby(standings, key=lambda one: one.partition):
        places = [list(same) for _, same in groupby(here, key=lambda one: one.next_offset)]
        for place, after in zip(places, [*places[1:], None], strict=True):
            if not place[0].lag:
                continue
            offsets = place[0].next_range(offsets_max)
            if after is not None:
                offsets = offsets._replace(end=min(offsets.end, after[0].next_offset))
            planned.append(Work(partition, offsets, tuple(one.projector for one in place)))
    return planned


def _furthest_behind(standings: Iterable[Standing]) -> int:
    lags: dict[Partition, int] = {}
    for one in standings:
        lags[one.partition] = max(one.lag, lags.get(one.partition, 0))
    return sum(lags.values())


class _Hints:
    """Hears when the log has grown. What it misses, the poll interval finds."""

    def __init__(self, listening: psycopg.Connection) -> None:
        self._listening = listening

    @classmethod
    @contextmanager
    def of(cls, engine: Engine) -> Iterator[Self]:
        """Listen on a connection of its own, for the length of the block."""
        with translated():
            connection = engine.connect()
        try:
            with translated():
                connection.execution_options(isolation_level="AUTOCOMMIT")
                connection.execute(text(f"LISTEN {CHANNEL}"))
            yield cls(cast(psycopg.Connection, connection.connection.driver_connection))
        finally:
            # Closed for good: in the pool it would go on listening.
            connection.invalidate()
            connection.close()

    def wait(self, at_most: timedelta, stop: threading.Event) -> None:
        """Return when the log has grown, when told to stop, or after a time."""
        deadline = time.monotonic() + at_most.total_seconds()
        while not stop.is_set() and (left := deadline - time.monotonic()) > 0:
            slice_s = min(left, LISTEN_SLICE_S)
            with translated():
                heard = list(self._listening.notifies(timeout=slice_s, stop_after=1))
            if heard:
                return
