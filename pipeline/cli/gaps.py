"""Lost offsets: gaps list, gaps accept."""

from typing import Annotated

import typer

from pipeline.cli.app import migrated_database_of, settings_of
from pipeline.cli.arguments import parse_partitions
from pipeline.cli.command import AsJson, Family, Servers, command
from pipeline.cli.output import Mark, emit, say, table
from pipeline.errors import ExitCode


@command({ExitCode.DONE: "done, with or without gaps"}, servers=Servers.DATABASE, name="list")
def list_gaps(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every gap, open or accepted.

    \b
    $ pipeline gaps list
    """
    from pipeline.db import transaction
    from pipeline.log.gaps import all_gaps

    with (
        migrated_database_of(settings_of(ctx), "gaps", read_only=True) as engine,
        transaction(engine) as db,
    ):
        gaps = all_gaps(db)
    if as_json:
        emit(gaps)
        return
    table(
        ["partition", "first lost", "continues at", "offsets", "state", "found", "reason"],
        [
            (
                f"{gap['topic']}:{gap['partition']}",
                gap["first_offset"],
                gap["end_offset"],
                gap["end_offset"] - gap["first_offset"],
                Mark("open", "bold red")
                if gap["accepted_at"] is None
                else f"accepted by {gap['accepted_by']}",
                gap["detected_at"],
                gap["reason"],
            )
            for gap in gaps
        ],
    )
    undecided = sum(gap["accepted_at"] is None for gap in gaps)
    say(f"{len(gaps):,} gaps, {undecided:,} of them open.")


@command(
    {
        ExitCode.DONE: "done, or there was no gap to accept",
        ExitCode.USAGE: "wrong usage, or the log has no such partition",
        ExitCode.INVARIANT: "the partition has moved meanwhile",
    },
    servers=Servers.DATABASE,
)
def accept(
    ctx: typer.Context,
    partitions: Annotated[
        str,
        typer.Argument(metavar="TOPIC[:PARTITION]", help="The whole topic, or one partition."),
    ],
    as_json: AsJson = False,
) -> None:
    """Continue after lost offsets. They stay lost; the decision is kept in pipeline.gaps.

    A running `pipeline run` continues within seconds.

    \b
    $ pipeline gaps accept Notifications:3
    """
    from pipeline.db import transaction
    from pipeline.log.gaps import accept_gap
    from pipeline.log.ranges import ranges

    wanted = parse_partitions(partitions)
    with migrated_database_of(settings_of(ctx), "gaps") as engine, transaction(engine) as db:
        chosen = [partition for partition in ranges(db) if wanted.includes(partition)]
        if not chosen:
            raise typer.BadParameter(f"the log has no partition {partitions}")
        accepted = [(partition, gap) for partition in chosen if (gap := accept_gap(db, partition))]
    if as_json:
        emit(
            [
                {
                    "topic": partition.topic,
                    "partition": partition.number,
                    "first_offset": gap.first,
                    "end_offset": gap.end,
                }
                for partition, gap in accepted
            ]
        )
        return
    for partition, gap in accepted:
        say(
            f"{partition}: continues at offset {gap.end}; {gap.end - gap.first:,} offsets from "
            f"{gap.first} on are lost."
        )
    if not accepted:
        say(f"{partitions} has no open gap. Nothing was changed.")


gaps = Family(
    "Lost offsets, and the decision to continue after them. Kafka deleted these records before "
    "they were read. Nothing is ever skipped without this decision.",
    [list_gaps, accept],
)
