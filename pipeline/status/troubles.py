"""What is not as it should be, in words for people, each with what to do about it."""

from collections.abc import Iterable

from pipeline.positions import Partition
from pipeline.status.report import PartitionStatus, ProjectorStatus, Trouble


def of_partitions(partitions: Iterable[PartitionStatus]) -> Iterable[Trouble]:
    """Of those that stand still, are read by nobody, or are behind."""
    for one in partitions:
        name = str(Partition(one.topic, one.partition))
        match one.state:
            case "ERR":
                why = (one.problem or "").removeprefix(f"{name}: ")
                yield Trouble("wrong", name, f"stands still: {why}", "decide as the text says")
            case "STOP" if one.owner is not None:
                yield Trouble(
                    "wrong",
                    name,
                    f"its reader, {one.owner.host}:{one.owner.pid}, has been silent for more than "
                    "a minute",
                    "look at that process and its log; start `pipeline run` anew",
                )
            case "STOP":
                yield Trouble("warning", name, "nobody reads it", "start `pipeline run`")
            case "STALL":
                yield Trouble(
                    "warning",
                    name,
                    f"{one.lag:,} records behind, and has not moved for a minute",
                    "look at the log of its reader",
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
                    f"broken, stands still: {one.problem}",
                    f"mend the projector, then `pipeline rebuild {one.projector}`",
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
                    f"wait, or go on with `pipeline rebuild {one.projector}`",
                )
            case "catching up":
                yield Trouble(
                    "warning",
                    one.projector,
                    f"{one.lag:,} records behind; the oldest came {one.lag_s:,.0f} s ago",
                    "wait"
                    if is_projected
                    else "nobody projects: start `pipeline run` or `pipeline project`",
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
