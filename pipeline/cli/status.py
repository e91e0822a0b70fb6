"""The command that tells how things stand: status."""

import time
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from functools import partial
from itertools import groupby
from typing import Annotated

import typer

from pipeline import catalogue
from pipeline.cli.app import app, database_of, settings_of
from pipeline.cli.output import NOTHING, Cell, Mark, age, duration, emit, moment, out, say, table
from pipeline.errors import ExitCode, TransientError
from pipeline.health.problem import Problem
from pipeline.health.status import PartitionStatus, ProjectorStatus, Recent, Status, read_status
from pipeline.log_events import printable
from pipeline.partitions import Partition
from pipeline.schema.migrate import check_schema

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


@app.command(
    epilog="Exit codes: 0 events get through (warnings may be listed); 1 they do not, or it is "
    "unknown whether they do: a partition is STOP (also after a stop, after --until-end, and in a "
    "new installation), UNKNOWN, STALL or ERR; a read model is broken, stalled, or unattended with "
    "events to take; a standby has applied nothing for 30 s; 2 wrong usage; 69 the database is "
    "unavailable; 78 a setting, a right or the schema is wrong."
)
def status(
    ctx: typer.Context,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Again and again, until Ctrl-C.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON document, for programs; one a look with --watch."),
    ] = False,
) -> None:
    """Lag, throughput, freshness, owners, problems.

    Reads the database only, also a standby, and then shows how old its data is. All ages are by
    the database's clock. `lag` counts offsets; `behind` is the age of the newest record that we
    have, while there are newer ones; `seen` is how long ago Kafka's end was recorded.
    States of a partition: OK; WARN, more than a minute behind; STALL, behind and no commit for a
    minute; UNKNOWN, Kafka's end was not recorded for 30 s, so lag and rate are not shown; STOP, no
    process reads it; ERR, halted until an operator decides.
    States of a read model that need somebody: unattended, no process projects it; stalled, it is
    behind and has not moved for a minute; broken.

    \b
    $ pipeline status
    $ pipeline status --watch
    $ pipeline status --json | jq .lag
    """
    settings = settings_of(ctx)
    show = emit if as_json else _show
    declared = catalogue.load(settings.read_models)
    with database_of(settings, "status", read_only=True, answers_soon=True) as engine:
        check_schema(engine)
        if not watch:
            seen = read_status(engine, declared)
            show(seen)
            raise typer.Exit(ExitCode.DONE if seen.ok else ExitCode.FOUND)
        try:
            _watch(partial(read_status, engine, declared), every, show)
        except KeyboardInterrupt:
            return


def _watch(read: Callable[[], Status], every: float, show: Callable[[Status], None]) -> None:
    console = out()
    seen: Status | None = None
    while True:
        try:
            seen = read()
        except TransientError as error:
            # What is on the screen is no longer so.
            if console.is_terminal:
                console.clear()
            since = f" since {moment(seen.as_of)}" if seen else ""
            say(f"pipeline: status unknown{since}: {error}. Trying again every {every:g} s.")
        else:
            if console.is_terminal:
                console.clear()
            show(seen)
        time.sleep(every)


def _show(seen: Status) -> None:
    behind = "caught up" if not seen.lag else f"{seen.lag:,} behind Kafka"
    flow = "lag and rate unknown"
    if seen.lag is not None and seen.rate is not None:
        flow = f"{behind}, {seen.rate:,.1f} records/s over the last minute"
    typer.echo(f"Log: {seen.offsets:,} offsets, {flow}. {moment(seen.as_of)}")
    if seen.standby is not None:
        replayed = age(seen.standby.replayed_at, seen.as_of)
        typer.echo(f"This database is a standby. Its newest transaction was committed {replayed}.")
    typer.echo()
    if not seen.partitions:
        typer.echo("Nothing was read yet.")
    table(
        ["partition", "state", "next offset", "end", "lag", "behind", "rec/s", "seen", "reader"],
        (_partition_row(one, seen.as_of) for one in seen.partitions),
    )
    typer.echo()
    table(
        ["read model", "state", "lag", "behind", "dead letters", "last moved"],
        (_projector_row(one, seen.as_of) for one in seen.projectors),
    )
    typer.echo()
    if seen.workers:
        table(
            ["projects", "since", "partitions"],
            ([f"{one.host}:{one.pid}", one.since, _brief(one.partitions)] for one in seen.workers),
        )
        typer.echo()
    _show_recent(seen.recent)
    _show_problems(seen.problems)


def _show_problems(problems: Iterable[Problem]) -> None:
    """Partitions or read models with the same problem share its lines."""
    subjects: dict[tuple[str, str, str], list[str]] = {}
    for problem in problems:
        same = (problem.severity, problem.what, problem.fix)
        subjects.setdefault(same, []).append(problem.subject)
    for (severity, what, fix), of in subjects.items():
        sign = "✗" if severity == "error" else "!"
        typer.echo(f"\n{sign} " + printable(f"{', '.join(of)}: {what}"))
        typer.echo(printable(f"  → {fix}"))


def _partition_row(one: PartitionStatus, now: datetime) -> list[Cell]:
    owner = f"{one.owner.host}:{one.owner.pid}" if one.owner else NOTHING
    return [
        f"{one.topic}[{one.partition}]",
        Mark(one.state, _STYLES[one.state]),
        one.next_offset,
        one.end,
        one.lag,
        _age(one.lag_s),
        one.rate,
        age(one.seen_at, now),
        owner,
    ]


def _projector_row(one: ProjectorStatus, now: datetime) -> list[Cell]:
    return [
        one.projector,
        Mark(one.state, _STYLES.get(one.state, "yellow")),
        one.lag,
        _age(one.lag_s),
        one.dead_letters,
        age(one.moved_at, now),
    ]


def _brief(partitions: Iterable[Partition]) -> str:
    """``orders[0,1] prices[0]``."""
    return " ".join(
        f"{topic}[{','.join(str(one.number) for one in same)}]"
        for topic, same in groupby(partitions, key=lambda one: one.topic)
    )


_AGE_S_MAX = -timedelta.min // timedelta(seconds=1)
"""PostgreSQL knows times, infinity among them, that are further apart than Python's spans reach."""


def _age(seconds: float | None) -> Cell:
    if seconds is None:
        return None
    return duration(timedelta(seconds=max(-_AGE_S_MAX, min(seconds, _AGE_S_MAX))))


def _show_recent(recent: Recent) -> None:
    bad = sum(sum(reasons.values()) for reasons in recent.bad.values())
    typer.echo(
        f"Of the last {recent.records:,} records (an hour at most): {recent.repeats:,} repeats, "
        f"{bad:,} bad, {sum(recent.unknown_types.values()):,} of types without a read model."
    )
    for topic, reasons in sorted(recent.bad.items()):
        for reason, count in sorted(reasons.items(), key=lambda one: -one[1]):
            typer.echo(printable(f"  {count:>6,}  {topic}: {reason}"))
    most = sorted(recent.unknown_types.items(), key=lambda one: -one[1])
    for event_type, count in most[:TYPES_MAX]:
        typer.echo(printable(f"  {count:>6,}  {event_type}"))
    if len(most) > TYPES_MAX:
        typer.echo(f"          … and {len(most) - TYPES_MAX} other types; all with --json")
