"""Which problems a status shows."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from pipeline.counts import count
from pipeline.durations import duration
from pipeline.health import problems
from pipeline.health.problem import Problem
from pipeline.health.status.report import PartitionStatus, ProjectorStatus, Standby
from pipeline.partitions import Partition


def of_standby(standby: Standby | None, *, seen_s_max: float) -> Iterable[Problem]:
    """Of a standby whose data is too old to show the present state."""
    if standby is None or (standby.age_s is not None and abs(standby.age_s) <= seen_s_max):
        return
    since = "it was started"
    if standby.replayed_at is not None:
        since = f"{standby.replayed_at.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
    kind = problems.STANDBY_PAUSED if standby.is_paused else problems.STANDBY_LAGS
    yield kind.of("standby", since=since)


def of_partitions(partitions: Sequence[PartitionStatus], as_of: datetime) -> Iterable[Problem]:
    """Of those that are halted, unknown, read by no process, or lagging."""
    if not partitions:
        yield problems.NOTHING_READ.of("log")
    for partition in partitions:
        if found := _of_partition(partition, as_of):
            yield found


def _of_partition(partition: PartitionStatus, as_of: datetime) -> Problem | None:
    name = Partition(partition.topic, partition.partition)
    seen_at = partition.seen_at
    since = _when(seen_at, as_of)
    reader = "none"
    if partition.owner:
        reader = f"{partition.owner.host}:{partition.owner.pid}"
    match partition.state:
        case "ERR":
            return problems.HALTED.of(name, why=partition.problem, fix=partition.problem_fix)
        case "UNKNOWN" if seen_at is not None and seen_at > as_of:
            return problems.SEEN_IN_FUTURE.of(name, reader=reader, since=since)
        case "UNKNOWN":
            return problems.READER_SILENT.of(name, reader=reader, since=since)
        case "STOP":
            return problems.NO_READER.of(name, since=since)
        case "STALL":
            moved = _when(partition.committed_at, as_of)
            return problems.INGEST_STALLED.of(
                name, lag=_records(partition.lag), since=moved, reader=reader
            )
        case "WARN":
            return problems.INGEST_LAGS.of(
                name, lag=_records(partition.lag), length=duration(partition.lag_s or 0)
            )
        case "OK":
            return None


def of_retention(partitions: Iterable[PartitionStatus]) -> Iterable[Problem]:
    """How long Kafka keeps what is not read, where no process is reading it."""
    kept = [
        (partition.kept_s, str(Partition(partition.topic, partition.partition)))
        for partition in partitions
        if partition.kept_s is not None and partition.state not in ("OK", "WARN")
    ]
    if not kept:
        return
    left_s, name = min(kept)
    if left_s > 0:
        yield problems.RETENTION_ENDS.of(name, left=duration(left_s))
    else:
        yield problems.RETENTION_ENDED.of(name)


def of_projectors(models: Iterable[ProjectorStatus], as_of: datetime) -> Iterable[Problem]:
    """Of those that are broken, lagging or built by another definition, and of dead letters."""
    for model in models:
        if found := _of_projector(model, as_of):
            yield found
        if model.dead_letters:
            yield problems.DEAD_LETTERS.of(
                model.projector, letters=count(model.dead_letters, "dead letter")
            )


def _of_projector(model: ProjectorStatus, as_of: datetime) -> Problem | None:
    name = model.projector
    match model.state:
        case "broken":
            return problems.BROKEN.of(name, why=model.problem)
        case "stale":
            return problems.STALE.of(name)
        case "rebuilding":
            return problems.REBUILDING.of(name)
        case "catching up":
            return problems.CATCHING_UP.of(
                name, lag=_records(model.lag), length=duration(model.lag_s)
            )
        case "stalled":
            since = _when(model.stuck_since, as_of)
            return problems.PROJECTION_STALLED.of(name, lag=_records(model.lag), since=since)
        case "unattended":
            since = _when(model.moved_at, as_of)
            if model.lag:
                return problems.NOT_PROJECTED.of(name, since=since, lag=_records(model.lag))
            return problems.NOT_PROJECTED_WITHOUT_LAG.of(name, since=since)
        case "live" | "never run" | "not in this program":
            return None


def _records(lag: int | None) -> str:
    return count(lag or 0, "record")


def _when(moment: datetime | None, as_of: datetime) -> str:
    """To the second, in UTC; no age, so that partitions with the same cause share a line."""
    if moment is None:
        return "the beginning"
    if moment > as_of + timedelta(days=1) or moment < as_of - timedelta(days=36_500):
        return str(moment)
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
