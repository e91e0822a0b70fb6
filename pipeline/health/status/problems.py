"""What is not as it should be, in words for people, each with what to do about it."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from pipeline.health.status.report import PartitionStatus, ProjectorStatus, Standby, Trouble
from pipeline.outages import in_words
from pipeline.partitions import Partition


def of_standby(standby: Standby | None, *, seen_s_max: float) -> Iterable[Trouble]:
    """Of a standby whose data is too old to tell how things are now."""
    if standby is None or (standby.age_s is not None and abs(standby.age_s) <= seen_s_max):
        return
    since = "it was started"
    if standby.replayed_at is not None:
        since = f"{standby.replayed_at.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
    yield Trouble(
        "wrong",
        "standby",
        f"this database is a standby that has applied no transaction since {since}: what is shown "
        "here may be out of date",
        "its replay is paused: pg_wal_replay_resume() resumes it; or ask the primary"
        if standby.is_paused
        else "ask the primary; if that is current, see whether the standby is connected to it",
    )


def of_partitions(
    partitions: Sequence[PartitionStatus], looked_at: datetime, standby: Standby | None = None
) -> Iterable[Trouble]:
    """Of those that are halted, unknown, read by no process, or lagging."""
    if not partitions:
        yield Trouble(
            "wrong",
            "log",
            "no partition was read yet: events are not getting through",
            "start `pipeline run`; if it runs, read its log",
        )
    for one in partitions:
        name = str(Partition(one.topic, one.partition))
        match one.state:
            case "ERR":
                why = (one.problem or "").removeprefix(f"{name}: ")
                yield Trouble("wrong", name, f"halted: {why}", _OF_HALTED)
            case "UNKNOWN":
                yield Trouble(
                    "wrong",
                    name,
                    _why_unknown(one, looked_at),
                    "see whether that process runs. If it does, read its log: it may wait for "
                    "Kafka or for the database (not reachable, a refused login, a full disk)"
                    + (", or whether this standby lags" if standby else ""),
                )
            case "STOP":
                yield Trouble(
                    "wrong",
                    name,
                    f"no process reads it; Kafka was last seen at "
                    f"{_when(one.seen_at, looked_at)}. Events are not getting through",
                    "start `pipeline run`; if it runs, read its log: it may have lost Kafka or the "
                    "database",
                )
            case "STALL":
                yield Trouble(
                    "wrong",
                    name,
                    f"{one.lag:,} records behind; the last commit was at "
                    f"{_when(one.committed_at, looked_at)}",
                    f"read the log of its reader, {_reader(one)}: it says what it waits for (a "
                    "full disk, a lock, a right of the database, Kafka)",
                )
            case "WARN":
                yield Trouble(
                    "warning",
                    name,
                    f"{one.lag:,} records and {one.lag_s:,.0f} s behind",
                    "wait, or start another `pipeline ingest`",
                )
            case "OK":
                pass


def of_retention(partitions: Iterable[PartitionStatus]) -> Iterable[Trouble]:
    """How long Kafka keeps what is not read, where that is not on its way."""
    kept = [
        (one.kept_s, str(Partition(one.topic, one.partition)))
        for one in partitions
        if one.kept_s is not None and one.state not in ("OK", "WARN")
    ]
    if not kept:
        return
    left_s, name = min(kept)
    if left_s > 0:
        text = f"Kafka may delete the oldest event that was not read in {in_words(left_s)}"
        yield Trouble("warning", name, text, "resolve what is wrong before that")
    else:
        yield Trouble(
            "wrong",
            name,
            "the retention of the oldest event that was not read is over, so Kafka may have "
            "deleted events",
            "resolve what is wrong now. If events are lost, their partition is halted then, and "
            "`pipeline gaps list` names them",
        )


def _reader(one: PartitionStatus) -> str:
    return f"{one.owner.host}:{one.owner.pid}" if one.owner else "none"


def _why_unknown(one: PartitionStatus, looked_at: datetime) -> str:
    if one.seen_at is not None and one.seen_at > looked_at:
        return (
            f"state unknown: its reader, {_reader(one)}, recorded Kafka's end at "
            f"{_when(one.seen_at, looked_at)}, which is in the future by the clock of this "
            "database, so the age of that is not known"
        )
    return (
        f"state unknown since {_when(one.seen_at, looked_at)}: since then its reader, "
        f"{_reader(one)}, has not recorded where Kafka ends, so nobody may be reading it"
    )


_OF_HALTED = "resolve the cause; see docs/operations.md, halted partitions"


def _when(moment: datetime | None, looked_at: datetime) -> str:
    """To the second, in UTC; no age, so that partitions with the same cause share a line."""
    if moment is None:
        return "the beginning"
    if moment > looked_at + timedelta(days=1) or moment < looked_at - timedelta(days=36_500):
        return str(moment)
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"


def of_projectors(models: Iterable[ProjectorStatus], looked_at: datetime) -> Iterable[Trouble]:
    """Of those that are broken, behind or built by another definition, and of dead letters."""
    for one in models:
        match one.state:
            case "broken":
                yield Trouble(
                    "wrong",
                    one.projector,
                    f"broken, halted: {one.problem}",
                    f"fix the projector, then `pipeline rebuild {one.projector}`",
                )
            case "stale":
                yield Trouble(
                    "warning",
                    one.projector,
                    "its definition has changed since the table was built",
                    f"`pipeline rebuild {one.projector}`",
                )
            case "rebuilding":
                yield Trouble(
                    "warning",
                    one.projector,
                    "a rebuild is running, or was interrupted",
                    f"wait, or resume it with `pipeline rebuild {one.projector}`",
                )
            case "catching up":
                yield Trouble(
                    "warning",
                    one.projector,
                    f"{one.lag:,} records behind; the oldest came {one.lag_s:,.0f} s ago",
                    "wait",
                )
            case "stalled":
                yield Trouble(
                    "wrong",
                    one.projector,
                    f"{one.lag:,} records behind; a partition of it has not moved since "
                    f"{_when(one.stuck_since, looked_at)}",
                    "read the log of the process that projects: it says what it waits for (a lock, "
                    "a full disk, a right of the database)",
                )
            case "unattended":
                yield Trouble(
                    "wrong" if one.lag else "warning",
                    one.projector,
                    f"no process projects it; it moved last at {_when(one.moved_at, looked_at)}, "
                    + (
                        f"and its lag is {one.lag:,} records"
                        if one.lag
                        else "and has everything that is in the log"
                    ),
                    "start `pipeline run` or `pipeline project`",
                )
            case _:
                pass
        if one.dead_letters:
            yield Trouble(
                "warning",
                one.projector,
                f"{one.dead_letters:,} dead letters",
                f"`pipeline dead-letters list {one.projector}`",
            )
