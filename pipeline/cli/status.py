"""The state of the pipeline: status."""

import time
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import migrated_database_of, settings_of
from pipeline.cli.command import AsJson, Servers, command
from pipeline.cli.output import NOTHING, Cell, Mark, age, emit, moment, out, say, table
from pipeline.counts import count
from pipeline.durations import duration
from pipeline.errors import ExitCode, TransientError
from pipeline.partitions import Partition
from pipeline.printable import printable

if TYPE_CHECKING:
    from pipeline.health.problem import Problem
    from pipeline.health.status import PartitionStatus, ProjectorStatus, Recent, Status

TYPES_MAX = 5
"""Most types without a read model that are listed for people."""
_STYLES = {
    "OK": "green",
    "WARN": "yellow",
    "STALL": "bold red",
    "UNKNOWN": "bold red",
    "STOP": "bold red",
    "ERR": "bold red",
    "live": "green",
    "stalled": "bold red",
    "unattended": "bold red",
    "broken": "bold red",
    "never run": "dim",
}


@command(
    {
        ExitCode.DONE: "events arrive in the tables; warnings may be listed",
        ExitCode.FOUND: "events do not arrive in the tables, or this is unknown: a partition is "
        "STOP, UNKNOWN, STALL or ERR, or none was read yet; a read model is broken, stalled, or "
        "unattended while it lags; a standby has applied nothing for 30 s",
    },
    servers=Servers.DATABASE,
)
def status(
    ctx: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Repeat until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between repetitions.")] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Show lag, throughput, freshness, owners and problems.

    It reads only the database, and works on a standby. All ages use the clock of the database.
    `lag` counts offsets. `lag time` is the age of the newest record in the log, if Kafka has newer
    records. `seen` says how long ago Kafka's end offset was recorded.
    States of a partition: OK; WARN, it lags by more than a minute; STALL, it lags and there was no
    commit for a minute; UNKNOWN, Kafka's end offset was not recorded for 30 s, so that lag and rate
    are unknown; STOP, no process reads it; ERR, halted until an operator resolves the cause.
    States of a read model that need action: unattended, no process projects it; stalled, it lags
    and its checkpoint has not moved for a minute; broken, it is halted.

    \b
    $ pipeline status
    $ pipeline status --watch
    $ pipeline status --json | jq .lag
    """
    from pipeline import catalogue
    from pipeline.health.status import read_status

    settings = settings_of(ctx)
    declared = catalogue.load(settings.read_models)
    show = emit if as_json else _show
    with migrated_database_of(settings, "status", read_only=True, answers_soon=True) as engine:
        read = partial(read_status, engine, declared)
        if not watch:
            status = read()
            show(status)
            raise typer.Exit(ExitCode.DONE if status.ok else ExitCode.FOUND)
        try:
            _watch(read, every, show)
        except KeyboardInterrupt:
            return


def _watch(read: "Callable[[], Status]", every: float, show: "Callable[[Status], None]") -> None:
    console = out()
    newest: Status | None = None
    while True:
        try:
            newest = read()
        except TransientError as error:
            # What is on the screen is no longer true.
            if console.is_terminal:
                console.clear()
            since = f" since {moment(newest.as_of)}" if newest else ""
            say(
                f"pipeline: the status is unknown{since}: {error}. This command tries again in "
                f"{every:g} s."
            )
        else:
            if console.is_terminal:
                console.clear()
            show(newest)
        time.sleep(every)


def _show(status: "Status") -> None:
    lag = "caught up" if not status.lag else f"lag {count(status.lag, 'record')}"
    flow = "lag and rate unknown"
    if status.lag is not None and status.rate is not None:
        flow = f"{lag}, {status.rate:,.1f} records/s over the last minute"
    typer.echo(f"Log: {count(status.offsets, 'offset')}, {flow}. {moment(status.as_of)}")
    if status.standby is not None:
        replayed = age(status.standby.replayed_at, status.as_of)
        typer.echo(
            "This database is a standby. The newest transaction that it has applied was committed "
            f"{replayed}."
        )
    typer.echo()
    if not status.partitions:
        typer.echo("No partition was read yet.")
    table(
        ["partition", "state", "next offset", "end", "lag", "lag time", "rec/s", "seen", "reader"],
        (_partition_row(partition, status.as_of) for partition in status.partitions),
    )
    typer.echo()
    table(
        ["read model", "state", "lag", "lag time", "dead letters", "last moved"],
        (_projector_row(projector, status.as_of) for projector in status.projectors),
    )
    typer.echo()
    if status.workers:
        table(
            ["projects", "since", "partitions"],
            (
                [f"{worker.host}:{worker.pid}", worker.since, _brief(worker.partitions)]
                for worker in status.workers
            ),
        )
        typer.echo()
    _show_recent(status.recent)
    _show_problems(status.problems)


def _show_problems(problems: "Iterable[Problem]") -> None:
    """Print each problem once, with all partitions or read models that have it."""
    subjects: dict[tuple[str, str, str], list[str]] = {}
    for problem in problems:
        same = (problem.severity, problem.what, problem.fix)
        subjects.setdefault(same, []).append(problem.subject)
    for (severity, what, fix), of in subjects.items():
        sign = "✗" if severity == "error" else "!"
        typer.echo(f"\n{sign} " + printable(f"{', '.join(of)}: {what}"))
        typer.echo(printable(f"  → {fix}"))


def _partition_row(partition: "PartitionStatus", now: datetime) -> list[Cell]:
    owner = f"{partition.owner.host}:{partition.owner.pid}" if partition.owner else NOTHING
    return [
        f"{partition.topic}:{partition.partition}",
        Mark(partition.state, _STYLES[partition.state]),
        partition.next_offset,
        partition.end,
        partition.lag,
        _age(partition.lag_s),
        partition.rate,
        age(partition.seen_at, now),
        owner,
    ]


def _projector_row(projector: "ProjectorStatus", now: datetime) -> list[Cell]:
    return [
        projector.projector,
        Mark(projector.state, _STYLES.get(projector.state, "yellow")),
        projector.lag,
        _age(projector.lag_s),
        projector.dead_letters,
        age(projector.moved_at, now),
    ]


def _brief(partitions: Iterable[Partition]) -> str:
    """``orders:0,1 prices:0``."""
    return " ".join(
        f"{topic}:{','.join(str(partition.number) for partition in same)}"
        for topic, same in groupby(partitions, key=lambda partition: partition.topic)
    )


def _age(seconds: float | None) -> Cell:
    return None if seconds is None else duration(seconds)


def _show_recent(recent: "Recent") -> None:
    bad = sum(sum(reasons.values()) for reasons in recent.bad.values())
    typer.echo(
        f"The last {count(recent.records, 'record')} (of at most one hour): "
        f"{count(recent.repeats, 'repeat')}, "
        f"{bad:,} could not be decoded, {sum(recent.unknown_types.values()):,} of a type without "
        "a read model."
    )
    for topic, reasons in sorted(recent.bad.items()):
        for reason, number in sorted(reasons.items(), key=lambda item: -item[1]):
            typer.echo(printable(f"  {number:>6,}  {topic}: {reason}"))
    most = sorted(recent.unknown_types.items(), key=lambda item: -item[1])
    for event_type, number in most[:TYPES_MAX]:
        typer.echo(printable(f"  {number:>6,}  {event_type}"))
    if len(most) > TYPES_MAX:
        typer.echo(f"          … and {len(most) - TYPES_MAX} other types; --json shows all")
