"""What `status` reports, and what its words mean.

The state of a partition, in Burrow's words:

- ``OK``: read, and without lag, or lagging for less than a minute
- ``WARN``: read and moving, but lagging for more than a minute
- ``STALL``: read, lagging, and has not moved for a minute
- ``UNKNOWN``: its reader has not recorded Kafka's end for half a minute: it ended or hangs, or
  Kafka or the database does not answer
- ``STOP``: no process reads it
- ``ERR``: halted until an operator decides, to protect data

The state of a read model:

- ``live``: it has the log's events, or takes them within seconds
- ``catching up``: it takes them, but some came more than ten seconds ago
- ``stalled``: a process projects it, but a partition that has events for it has not moved for a
  minute
- ``unattended``: no process projects it
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pipeline.health.problem import Problem
from pipeline.health.recent import Recent
from pipeline.partitions import Partition

PartitionState = Literal["OK", "WARN", "STALL", "UNKNOWN", "STOP", "ERR"]
ProjectorState = Literal[
    "live",
    "catching up",
    "stalled",
    "unattended",
    "rebuilding",
    "stale",
    "broken",
    "never run",
    "not in this program",
]


@dataclass(frozen=True)
class Owner:
    """Who reads a partition."""

    group: str | None
    member: str | None
    host: str | None
    pid: int | None
    since: datetime | None


@dataclass(frozen=True)
class PartitionStatus:
    """One partition of the log.

    Attributes:
        end: Kafka's end when last seen; None if it never was.
        seen_at: When that was.
        seen_s: How many seconds ago that was; negative where the clock was set back since.
        lag: Offsets between the two; None where it is unknown: ``seen_at`` is too long ago.
        lag_s: The age of the newest record in the log, by Kafka's timestamp, while there is lag: no
            record that is missing is older. 0 without lag; None where nothing was read yet
            or the lag is unknown.
        rate: Records per second, over the last minute; None where it is not current.
        kept_s: For how many more seconds Kafka keeps the oldest record that is not in the log, by
            what Kafka last reported; negative if it may be deleted already, None where that is
            not known or time deletes nothing.
        problem: Why it is halted; None if it is not.
        problem_fix: What to do about that.
    """

    topic: str
    partition: int
    state: PartitionState
    next_offset: int
    end: int | None
    seen_at: datetime | None
    seen_s: float | None
    lag: int | None
    lag_s: float | None
    rate: float | None
    kept_s: float | None
    committed_at: datetime | None
    owner: Owner | None
    problem: str | None
    problem_fix: str | None
    problem_at: datetime | None


@dataclass(frozen=True)
class ProjectorStatus:
    """One read model.

    Attributes:
        lag: Offsets of the log that it has not taken yet.
        lag_s: How long the oldest of them has been in the log.
        dead_letters: Events that it rejected.
        moved_at: When its checkpoint last moved.
        stuck_since: Since when a partition that has events for it has not moved; None if none.
        built_at: When it was last built from the log's beginning.
        problem: Why it is broken.
    """

    projector: str
    state: ProjectorState
    lag: int
    lag_s: float
    dead_letters: int
    moved_at: datetime | None
    stuck_since: datetime | None
    built_at: datetime | None
    problem: str | None


@dataclass(frozen=True)
class ProjectingWorker:
    """A process that projects.

    Attributes:
        since: When it started.
        partitions: Those whose events it brings into read models of this program.
    """

    host: str
    pid: int
    since: datetime
    partitions: Sequence[Partition]


@dataclass(frozen=True)
class Standby:
    """That the database is a standby, which shows what its primary committed a while ago.

    Attributes:
        replayed_at: When the newest transaction that it has applied was committed, by the
            primary's clock; None if it has applied none since it was started.
        age_s: How many seconds ago that was.
        is_paused: Whether its replay is paused.
    """

    replayed_at: datetime | None
    age_s: float | None
    is_paused: bool


@dataclass(frozen=True)
class Status:
    """Everything at one moment.

    Attributes:
        standby: How old the data is, if the database is a standby; None for a primary.
        offsets: Offsets in the log, over all partitions; a few may be unused.
        ok: Whether events get through, and there is no error.
        lag, lag_s: How far the log is behind Kafka: the sum, and the longest time. None where that
            of a partition is unknown.
        problems: What is not as it should be.
        rate: Records per second into the log, over the last minute; None like ``lag``.
    """

    as_of: datetime
    standby: Standby | None
    ok: bool
    offsets: int
    lag: int | None
    lag_s: float | None
    rate: float | None
    partitions: Sequence[PartitionStatus]
    projectors: Sequence[ProjectorStatus]
    workers: Sequence[ProjectingWorker]
    recent: Recent
    problems: Sequence[Problem]
