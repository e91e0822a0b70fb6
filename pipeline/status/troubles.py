"""What is not as it should be, in words for people, each with what to do about it."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from pipeline.positions import Partition
from pipeline.status.report import PartitionStatus, ProjectorStatus, Trouble


def of_partitions(partitions: Sequence[PartitionStatus], looked_at: datetime) -> Iterable[Trouble]:
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
                reader = f"{one.owner.host}:{one.owner.pid}" if one.owner else "none"
                yield Trouble(
                    "wrong",
                    name,
                    f"state unknown since {_when(one.seen_at, looked_at)}: since then its reader, "
                    f"{reader}, has not recorded where Kafka ends",
                    "see whether that process runs, and in its log whether Kafka and the database "
                    "answer it and the database can write (disk full?)",
                )
            case "STOP":
                yield Trouble(
                    "wrong",
                    name,
                    "no process reads it: events are not getting through",
                    "start `pipeline run`",
                )
            case "STALL":
                yield Trouble(
                    "wrong",
                    name,
                    f"{one.lag:,} records behind; the last commit was at "
                    f"{_when(one.committed_at, looked_at)}",
                    "read the log of its reader: it says what it waits for",
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


_OF_HALTED = "resolve the cause; see docs/operations.md, halted partitions"


def _when(moment: datetime | None, looked_at: datetime) -> str:
    """To the second, in UTC; no age, so that partitions with the same cause share a line."""
    if moment is None:
        return "the beginning"
    if moment > looked_at + timedelta(days=1) or moment < looked_at - timedelta(days=36_500):
        return str(moment)
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"


def of_projectors(models: Iterable[ProjectorStatus], *, is_projected: bool) -> Iterable[Trouble]:
    """Of those that are broken, behind or built by another definition, and of dead letters.

    Args:
        models: The read models.
        is_projected: Whether any worker projects.
    """
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
                    "warning" if is_projected else "wrong",
                    one.projector,
                    f"{one.lag:,} records behind; the oldest came {one.lag_s:,.0f} s ago",
                    "wait"
                    if is_projected
                    else "no process projects: start `pipeline run` or `pipeline project`",
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
