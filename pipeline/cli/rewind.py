"""Reads Kafka again: rewind."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import migrated_database_of, settings_of
from pipeline.cli.arguments import logged_partitions, parse_partitions, parse_time
from pipeline.cli.command import AsJson, Servers, command
from pipeline.cli.output import Gauge, emit, say, table
from pipeline.counts import count
from pipeline.errors import ExitCode
from pipeline.partitions import NextOffset, OffsetRange

if TYPE_CHECKING:
    from pipeline.log.compare import Comparison
    from pipeline.rewind import Goal, Step

INTERVALS_SHOWN = 5


def _goal(value: str) -> "Goal":
    """From where to read: from the first record, an offset or a time."""
    if value == "earliest":
        return "earliest"
    if value.isdigit():
        return NextOffset(int(value))
    return parse_time(value)


@command(
    {
        ExitCode.DONE: "done",
        ExitCode.FOUND: "records in the log differ from those in Kafka; they were not changed",
        ExitCode.USAGE: "wrong usage, or the log has no such partition",
        ExitCode.REFUSED: "the topic or the cluster is not the one that the log was read from",
        ExitCode.FENCED: "another rewind of the partition is running",
    },
    servers=Servers.BOTH,
)
def rewind(
    ctx: typer.Context,
    partitions: Annotated[
        str,
        typer.Argument(metavar="TOPIC[:PARTITION]", help="The whole topic, or one partition."),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="WHERE",
            help="Where to start: earliest (the first record in Kafka), an offset, or a time "
            "(2026-01-31T08:00:00Z, or 7d before now).",
        ),
    ],
    do_it: Annotated[
        bool,
        typer.Option("--execute", help="Execute the plan. Without it, the plan is only shown."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read Kafka again, and add the records that the log lacks.

    It adds each missing record to the log once; workers then apply it to the read models. It does
    not change records that are in the log. Ingest may run meanwhile, and its next offsets do not
    change.

    \b
    $ pipeline rewind Notifications --to earliest            # the plan
    $ pipeline rewind Notifications --to earliest --execute
    $ pipeline rewind Notifications:3 --to 2026-01-31T08:00:00Z --execute
    """
    from contextlib import closing

    from pipeline.kafka.metadata import Brokers
    from pipeline.kafka.reports import ClientReports
    from pipeline.rewind import execute, plan

    wanted, goal = parse_partitions(partitions), _goal(to)
    settings = settings_of(ctx)
    done: list[tuple[Step, Comparison]] = []
    with (
        migrated_database_of(settings, "rewind", writes_read_models=True) as engine,
        closing(Brokers(settings, ClientReports())) as brokers,
    ):
        steps = plan(engine, brokers, logged_partitions(engine, wanted, partitions), goal)
        if not as_json:
            _show_plan(steps)
        if do_it:
            with Gauge("reading Kafka again", unit="offsets") as gauge:
                done = list(execute(engine, brokers, settings, steps, gauge.show))
    if as_json:
        emit(
            {
                "plan": [_plan_document(step) for step in steps],
                "done": [_document(step, found) for step, found in done],
            }
        )
    elif do_it:
        _show_done(done)
    else:
        say("This is the plan. Nothing was changed. Add --execute to execute it.")
    if any(found.changed.count for _, found in done):
        raise typer.Exit(ExitCode.FOUND)


def _show_plan(steps: "Sequence[Step]") -> None:
    table(
        ["partition", "in the log", "in Kafka", "to read", "offsets", "already in the log"],
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
                f"{step.in_kafka.low - step.requested:,} earlier offsets are no longer in Kafka."
            )


def _show_done(done: "Sequence[tuple[Step, Comparison]]") -> None:
    table(
        ["partition", "read", "equal", "added", "different", "only in the log"],
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
        f"{count(filled, 'record was', 'records were')} added to the log. Workers apply "
        "them to the read models."
        if filled
        else "No record was missing."
    )
    for step, found in done:
        if found.changed.count:
            say(
                f"{step.partition}: {count(found.changed.count, 'record')} with other bytes in the "
                f"log than in Kafka, at {offsets(found.changed.ranges)}. The log was not "
                "changed. Run `pipeline verify`."
            )
        if found.surplus.count:
            say(
                f"{step.partition}: {count(found.surplus.count, 'record is', 'records are')} "
                f"in the log and not in Kafka, at {offsets(found.surplus.ranges)}. Find out "
                "whether the topic was compacted, or deleted and recreated."
            )


def span(of: OffsetRange) -> str:
    """A range for people: its first offset and its end, which it does not include."""
    return f"{of.first:,} … {of.end:,}" if of.span else "none"


def offsets(of: Iterable[OffsetRange]) -> str:
    """The first few intervals, as ``pipeline events --at`` accepts them."""
    found = [f"{part.first}-{part.end - 1}" if part.span > 1 else str(part.first) for part in of]
    more = len(found) - INTERVALS_SHOWN
    return ", ".join(found[:INTERVALS_SHOWN]) + (f" and {more} more intervals" if more > 0 else "")


def _plan_document(step: "Step") -> dict[str, object]:
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


def _document(step: "Step", found: "Comparison") -> dict[str, object]:
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
