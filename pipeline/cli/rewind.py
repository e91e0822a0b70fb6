"""The command that reads Kafka again: rewind."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Annotated

import typer
from sqlalchemy import Engine

from pipeline import catalogue
from pipeline.cli.app import app, database_of, settings_of
from pipeline.cli.arguments import parse_place, parse_time
from pipeline.cli.output import Gauge, emit, say, table
from pipeline.db import transaction
from pipeline.errors import ExitCode
from pipeline.kafka import Brokers
from pipeline.log.compare import Comparison
from pipeline.log.offsets import ranges
from pipeline.log.search import Wanted
from pipeline.partitions import NextOffset, OffsetRange, Partition
from pipeline.rewind import Goal, Step, execute, plan
from pipeline.schema.migrate import check_schema, check_tables

INTERVALS_SHOWN = 5


def _goal(value: str) -> Goal:
    """Where to: all that there is, an offset, a time."""
    if value == "earliest":
        return "earliest"
    if value.isdigit():
        return NextOffset(int(value))
    found: datetime = parse_time(value)
    return found


@app.command(
    epilog="Exit codes: 0 done; 1 records in the log are not what Kafka holds (nothing was "
    "changed); 2 wrong usage, or the log has no such partition; 65 the topic or the cluster is not "
    "the one that the log was read from; 69 a server is away; 75 another rewind of it runs; 78 a "
    "setting, a right or the schema is wrong."
)
def rewind(
    ctx: typer.Context,
    place: Annotated[
        str, typer.Argument(metavar="TOPIC[:PARTITION]", help="All of the topic, or one partition.")
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="WHERE",
            help="earliest (all that Kafka has), an offset, or a time: 2026-01-31T08:00:00Z, 7d.",
        ),
    ],
    do_it: Annotated[
        bool, typer.Option("--execute", help="Do it. Without it the plan is shown, no more.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document, for programs.")
    ] = False,
) -> None:
    """Read Kafka again, and fill what the log lacks.

    What is missing comes into the log, once, and read models take it by themselves. What is there
    stays as it is. Ingestion may run meanwhile, and does not move.

    \b
    $ pipeline rewind Notifications --to earliest            # the plan
    $ pipeline rewind Notifications --to earliest --execute
    $ pipeline rewind Notifications:3 --to 2026-01-31T08:00:00Z --execute
    """
    wanted, goal = parse_place(place), _goal(to)
    if wanted.offsets is not None:
        raise typer.BadParameter("TOPIC or TOPIC:PARTITION; --to says from which offset on")
    settings = settings_of(ctx)
    done: list[tuple[Step, Comparison]] = []
    with database_of(settings, "rewind") as engine:
        check_schema(engine)
        check_tables(engine, catalogue=catalogue.load(settings.read_models))
        partitions = _partitions(engine, wanted, place)
        brokers = Brokers(settings)
        try:
            steps = plan(engine, brokers, partitions, goal)
            if not as_json:
                _show_plan(steps)
            if do_it:
                with Gauge("reading again", unit="offsets") as gauge:
                    done = list(execute(engine, brokers, settings, steps, gauge.show))
        finally:
            brokers.close()
    if as_json:
        emit({"plan": [_plan_document(s) for s in steps], "done": [_document(*it) for it in done]})
    elif do_it:
        _show_done(done)
    else:
        say("Nothing was done. With --execute it is.")
    if any(found.changed.count for _, found in done):
        raise typer.Exit(ExitCode.FOUND)


def _partitions(engine: Engine, wanted: Wanted, place: str) -> Sequence[Partition]:
    with transaction(engine) as db:
        known = ranges(db)
    found = [one for one in known if wanted.includes(one)]
    if not found:
        there = ", ".join(f"{one.topic}:{one.number}" for one in known)
        raise typer.BadParameter(
            f"the log has no partition {place}; it has {there or 'none: run `pipeline ingest`'}"
        )
    return found


def _show_plan(steps: Sequence[Step]) -> None:
    table(
        ["partition", "in the log", "in Kafka", "read again", "offsets", "of them in the log"],
        [
            (
                str(step.partition),
                span(step.in_log),
                span(OffsetRange(*step.in_kafka)),
                span(step.offsets),
                step.offsets.span,
                step.logged,
            )
            for step in steps
        ],
    )
    for step in steps:
        if step.requested < step.in_kafka.low:
            say(
                f"{step.partition}: Kafka's first record is at {step.in_kafka.low}; "
                f"{step.in_kafka.low - step.requested:,} offsets before it are gone."
            )


def _show_done(done: Sequence[tuple[Step, Comparison]]) -> None:
    table(
        ["partition", "read", "the same", "filled", "changed", "in the log alone"],
        [
            (
                str(step.partition),
                found.read,
                found.same,
                found.missing.count,
                found.changed.count,
                found.surplus.count,
            )
            for step, found in done
        ],
    )
    filled = sum(found.missing.count for _, found in done)
    say(
        f"{filled:,} records were filled in; read models take them by themselves."
        if filled
        else "Nothing was missing."
    )
    for step, found in done:
        if found.changed.count:
            say(
                f"{step.partition}: {found.changed.count:,} records are not what Kafka holds, at "
                f"{offsets(found.changed.ranges)}. They stay as they are; see `pipeline verify`."
            )
        if found.surplus.count:
            say(
                f"{step.partition}: {found.surplus.count:,} records are in the log alone, at "
                f"{offsets(found.surplus.ranges)}: was the topic compacted?"
            )


def span(of: OffsetRange) -> str:
    """A range as people read it: from its first offset up to, and without, its end."""
    return f"{of.first:,} … {of.end:,}" if of.span else "nothing"


def offsets(of: Iterable[OffsetRange]) -> str:
    """Intervals as ``pipeline events --at`` takes them; the first few."""
    found = [f"{one.first}-{one.end - 1}" if one.span > 1 else str(one.first) for one in of]
    more = len(found) - INTERVALS_SHOWN
    return ", ".join(found[:INTERVALS_SHOWN]) + (f" and {more} more intervals" if more > 0 else "")


def _plan_document(step: Step) -> dict[str, object]:
    return {
        "topic": step.partition.topic,
        "partition": step.partition.number,
        "log_first": step.in_log.first,
        "log_end": step.in_log.end,
        "kafka_low": step.in_kafka.low,
        "kafka_high": step.in_kafka.high,
        "requested": step.requested,
        "first": step.offsets.first,
        "end": step.offsets.end,
        "offsets": step.offsets.span,
        "logged": step.logged,
    }


def _document(step: Step, found: Comparison) -> dict[str, object]:
    return {
        "topic": step.partition.topic,
        "partition": step.partition.number,
        "read": found.read,
        "same": found.same,
        "filled": found.missing.count,
        "changed": found.changed.count,
        "changed_at": found.changed.ranges,
        "surplus": found.surplus.count,
        "surplus_at": found.surplus.ranges,
    }
