"""The projection loop: read models follow the log until they are stopped.

1. one query: the checkpoint of every projector and the end of the log
2. projectors with the same next offset take the same range together, in one transaction; those
   further behind are brought up to them first
3. nothing to do: wait for a NOTIFY, and at most the poll interval, since a NOTIFY may be lost

Several workers may run at once: they share the partitions, and the checkpoint's row is the lock.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import groupby
from typing import NamedTuple, Self, cast

import psycopg
import structlog
from sqlalchemy import Connection, Engine, text

from pipeline.db import transaction, translated
from pipeline.errors import ConfigurationError, Server, TransientError
from pipeline.log.append import CHANNEL
from pipeline.outages import OutageLog, OutagePolicy
from pipeline.partitions import NextOffset, OffsetRange, Partition
from pipeline.projection import checkpoints, registry
from pipeline.projection.checkpoints import ProjectorProgress
from pipeline.projection.one_pass import Result, break_changed, project
from pipeline.projection.workers import WorkerRegistry
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.readmodel.model import Projector

log = structlog.get_logger(__name__)

LISTEN = text(f"LISTEN {CHANNEL}")
GATHER_S_MAX = 0.1
"""Longest pause between rounds while events trickle; it is as long as the last round took."""
CAUGHT_UP_S_MIN = 60.0
"""Shortest time between two log lines about a backlog that was worked off."""
TABLE_CHECK_S = 10.0
"""How often tables are searched for what somebody has added that leaves out rows silently."""
LISTEN_SLICE_S = 0.2
"""How often a wait checks whether it should stop."""


@dataclass(frozen=True)
class Limits:
    """The bounds of the loop.

    Attributes:
        batch_offsets_max: Most offsets in one pass.
        rejected_max: Most events that one projector may reject in one pass.
        poll_interval: Longest wait before the log is read without a NOTIFY.
    """

    batch_offsets_max: int = 20_000
    rejected_max: int = 1000
    poll_interval: timedelta = timedelta(milliseconds=500)


class ProjectionProgress(NamedTuple):
    """How far the read models are, for a progress bar.

    Attributes:
        taken: Offsets taken by this process, counted per range, not per projector.
        lag: Offsets that the most lagging projector still has to take, over all partitions.
    """

    taken: int
    lag: int


@dataclass(frozen=True)
class Work:
    """A range of one partition and the projectors whose next offset is its first."""

    partition: Partition
    offsets: OffsetRange
    names: tuple[str, ...]

    def joined_by(self, others: "Work | None") -> "Work":
        """The same with ``others`` too, if they have arrived where it begins."""
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
    observe: Callable[[ProjectionProgress], None] = lambda _: None,
    outages: OutageLog | None = None,
) -> None:
    """Bring read models up to the log, and keep them there.

    An unavailable server is waited for, with growing pauses, for as long as it takes; a one-shot
    run gives up after a minute. A projector that breaks is halted; the others continue.

    Args:
        engine: The database, with the schema of this program.
        projectors: Every read model to keep.
        limits: The bounds.
        stop: Set it to finish the present pass and return.
        until_end: Return when every live projector has what was in the log at the start.
        observe: Called after each round.
        outages: Where outages are logged, for a process that also does other work.

    Raises:
        TransientError: With ``until_end``: the server stayed unavailable.
        ConfigurationError: Login, rights or schema are wrong, from the start or for a minute.
        InvariantError: An invariant of the log is violated.
    """
    limits, stop = limits or Limits(), stop or threading.Event()
    policy = OutagePolicy(waits_forever=not until_end, outages=outages)
    _Loop(engine, projectors, limits, stop, observe, policy, until_end=until_end).run()


class _Loop:
    def __init__(
        self,
        engine: Engine,
        projectors: Sequence[Projector],
        limits: Limits,
        stop: threading.Event,
        observe: Callable[[ProjectionProgress], None],
        outages: OutagePolicy,
        *,
        until_end: bool,
    ) -> None:
        self._engine = engine
        self._projectors = {projector.name: projector for projector in projectors}
        self._fingerprints = {name: fingerprint(of) for name, of in self._projectors.items()}
        self._stale: frozenset[str] = frozenset()
        self._registry = WorkerRegistry(engine, self._projectors)
        self._limits = limits
        self._stop = stop
        self._observe = observe
        self._until_end = until_end
        self._goal: dict[Partition, NextOffset] | None = None
        self._taken = 0
        self._outages = outages
        self._caught_up = CaughtUp(limits.batch_offsets_max)
        self._refills = Refills()
        self._check_tables_at = 0.0

    def run(self) -> None:
        while not self._stop.is_set():
            try:
                with _Notifications.of(self._engine) as notifications:
                    self._register()
                    self._follow(notifications)
                    self._registry.leave()
                    return
            except (TransientError, ConfigurationError) as error:
                self._wait_for_server(error)

    def _register(self) -> None:
        with transaction(self._engine) as db:
            registry.register(db, sorted(self._projectors))
            self._refills.start(checkpoints.progress(db, sorted(self._projectors)))

    def _follow(self, notifications: "_Notifications") -> None:
        while not self._stop.is_set():
            self._registry.heartbeat()
            with transaction(self._engine) as db:
                names = self._without_stale(db)
                lagging = checkpoints.progress(db, names, only_lagging=True)
                if refilled := self._refills.complete({of.projector for of in lagging}):
                    self._log_refilled(db, refilled)
            self._registry.serve(names)
            if self._until_end and self._has_arrived(lagging):
                return
            begun = time.monotonic()
            if begun >= self._check_tables_at:
                with transaction(self._engine) as db:
                    break_changed(db, self._projectors.values())
                self._check_tables_at = begun + TABLE_CHECK_S
            moved = self._round(self._registry.share(lagging))
            self._outages.on_success(Server.POSTGRESQL)
            self._observe(ProjectionProgress(self._taken, _lag_of_partitions(lagging)))
            lag_max = max((progress.lag for progress in lagging), default=0)
            self._caught_up.observe(lag_max, time.monotonic())
            if not moved:
                notifications.wait(self._limits.poll_interval, self._stop)
            elif not self._until_end and self._takes_all(lagging):
                # Small passes cost nearly as much as large ones: let more come meanwhile.
                self._stop.wait(min(GATHER_S_MAX, time.monotonic() - begun))

    def _log_refilled(self, db: Connection, refilled: Mapping[str, float]) -> None:
        for name, after_s in sorted(refilled.items()):
            # One that is broken or stale lags too, and is left out.
            if registry.is_built(db, name, self._fingerprints[name]) and registry.is_live(db, name):
                log.info("read_model_refilled", read_model=name, after_s=round(after_s, 1))

    def _without_stale(self, db: Connection) -> list[str]:
        """Projectors whose tables this definition built; the others would mix two definitions."""
        stale = registry.stale(db, self._fingerprints)
        if stale - self._stale:
            log.warning(
                "read_models_stale",
                projectors=sorted(stale),
                effect="left out until they are rebuilt; readers see their tables as they were",
            )
        if self._stale - stale:
            log.info("read_models_current", projectors=sorted(self._stale - stale))
        self._stale = stale
        return [name for name in self._projectors if name not in stale]

    def _takes_all(self, lagging: Iterable[ProjectorProgress]) -> bool:
        """Whether one pass per partition reaches the end of the log."""
        return all(progress.lag <= self._limits.batch_offsets_max for progress in lagging)

    def _has_arrived(self, lagging: Iterable[ProjectorProgress]) -> bool:
        if self._goal is None:
            self._goal = {progress.partition: progress.log_end for progress in lagging}
        # Below its first offset the log has nothing to take.
        return all(
            max(progress.next_offset, progress.log_first)
            >= self._goal.get(progress.partition, NextOffset(0))
            for progress in lagging
        )

    def _round(self, lagging: Sequence[ProjectorProgress]) -> bool:
        """One range per partition and per checkpoint in it."""
        moved = False
        arrived: Work | None = None
        for work in plan(lagging, self._limits.batch_offsets_max):
            if self._stop.is_set():
                break
            self._registry.heartbeat()
            # Those that have just arrived here continue together with those that were here.
            joined = work.joined_by(arrived)
            done = self._pass(joined)
            moved = moved or bool(done)
            arrived = replace(joined, names=done)
        return moved

    def _pass(self, work: Work) -> tuple[str, ...]:
        """Take one range; the names of the projectors that have it now."""
        begun = time.monotonic()
        results = project(
            self._engine,
            [self._projectors[name] for name in work.names],
            work.partition,
            work.offsets,
            rejected_max=self._limits.rejected_max,
        )
        done = tuple(name for name, result in results.items() if result is Result.DONE)
        if done:
            self._taken += work.offsets.span
            self._refills.taken(done, work.partition, work.offsets)
        log.debug(
            "events_projected",
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
    """Logs that a backlog is worked off. Everyday traffic logs nothing.

    Args:
        offsets_max: A lag of more than this, what one pass takes, is a backlog.
    """

    def __init__(self, offsets_max: int) -> None:
        self._offsets_max = offsets_max
        self._since: float | None = None
        self._logged_at = float("-inf")

    def observe(self, lag: int, now: float) -> None:
        """Take the largest lag of any partition, before a round."""
        if lag > self._offsets_max:
            self._since = self._since or now
        elif self._since is not None and now - self._logged_at > CAUGHT_UP_S_MIN:
            log.info("projection_caught_up", after_s=round(now - self._since))
            self._since, self._logged_at = None, now


class Refills:
    """Notices that a read model whose checkpoints were reset, as TRUNCATE does, is complete."""

    def __init__(self) -> None:
        self._next_offsets: dict[tuple[str, Partition], NextOffset] = {}
        self._since: dict[str, float] = {}

    def start(self, found: Iterable[ProjectorProgress]) -> None:
        """How far each projector was when this process began to work."""
        for progress in found:
            self._next_offsets[progress.projector, progress.partition] = progress.next_offset

    def taken(self, names: Iterable[str], partition: Partition, offsets: OffsetRange) -> None:
        """These projectors have taken a range."""
        for name in names:
            if not offsets.first and self._next_offsets.get((name, partition)):
                self._since.setdefault(name, time.monotonic())
            self._next_offsets[name, partition] = offsets.end

    def complete(self, lagging: Collection[str]) -> Mapping[str, float]:
        """The refills that have ended since the last call, each with its length in seconds."""
        now = time.monotonic()
        return {name: now - self._since.pop(name) for name in self._since.keys() - lagging}


def plan(lagging: Sequence[ProjectorProgress], offsets_max: int) -> list[Work]:
    """What to do in one round: a range for each group of projectors with the same checkpoint.

    A range ends at the next group's checkpoint at the latest, so a group catches up with the next
    one, and from then on they take their ranges together.

    Args:
        lagging: By partition, then next offset, then name.
        offsets_max: Most offsets in one range.
    """
    planned = []
    for partition, in_partition in groupby(lagging, key=lambda progress: progress.partition):
        by_offset = groupby(in_partition, key=lambda progress: progress.next_offset)
        groups = [list(group) for _, group in by_offset]
        for group, following in zip(groups, [*groups[1:], None], strict=True):
            if not group[0].lag:
                continue
            offsets = group[0].next_range(offsets_max)
            if following is not None:
                offsets = offsets._replace(end=min(offsets.end, following[0].next_offset))
            names = tuple(progress.projector for progress in group)
            planned.append(Work(partition, offsets, names))
    return planned


def _lag_of_partitions(lagging: Iterable[ProjectorProgress]) -> int:
    lags: dict[Partition, int] = {}
    for progress in lagging:
        lags[progress.partition] = max(progress.lag, lags.get(progress.partition, 0))
    return sum(lags.values())


class _Notifications:
    """Notifications that the log has grown. What is lost, the poll interval finds."""

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
                connection.execute(LISTEN)
            yield cls(cast(psycopg.Connection, connection.connection.driver_connection))
        finally:
            # Not returned to the pool, where it would still listen.
            connection.invalidate()
            connection.close()

    def wait(self, at_most: timedelta, stop: threading.Event) -> None:
        """Return when the log has grown, when ``stop`` is set, or after ``at_most``."""
        deadline = time.monotonic() + at_most.total_seconds()
        while not stop.is_set() and (left := deadline - time.monotonic()) > 0:
            slice_s = min(left, LISTEN_SLICE_S)
            with translated():
                received = list(self._listening.notifies(timeout=slice_s, stop_after=1))
            if received:
                return
