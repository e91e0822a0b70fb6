"""Lost offsets: gaps list, gaps accept."""

from typing import Annotated

import typer

from pipeline.cli.app import migrated_database_of, settings_of
from pipeline.cli.arguments import logged_partitions, parse_partitions
from pipeline.cli.command import AsJson, Family, Servers, command
from pipeline.cli.output import Mark, emit, say, table
from pipeline.counts import count
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
    say(f"{count(len(gaps), 'gap')}, {undecided:,} open.")


@command(
    {
        ExitCode.DONE: "done, or there was no gap to accept",
        ExitCode.USAGE: "wrong usage, or the log has no such partition",
        ExitCode.INVARIANT: "the next offset of the partition has changed meanwhile; see "
        "`pipeline gaps list`",
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
    """Accept a gap, so that ingest continues after the lost offsets.

    The offsets stay lost. The table pipeline.gaps records who accepted the gap, and when. A running
    `pipeline run` continues within seconds.

    \b
    $ pipeline gaps accept Notifications:3
    """
    from pipeline.db import transaction
    from pipeline.log.gaps import accept_gap

    wanted = parse_partitions(partitions)
    with migrated_database_of(settings_of(ctx), "gaps") as engine:
        chosen = logged_partitions(engine, wanted, partitions)
        with transaction(engine) as db:
            found = [(partition, accept_gap(db, partition)) for partition in chosen]
    accepted = [(partition, gap) for partition, gap in found if gap]
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
            f"{partition}: the gap is accepted. Ingest continues at offset {gap.end}; "
            f"{count(gap.end - gap.first, 'offset')} from {gap.first} on: lost."
        )
    if not accepted:
        say(f"{partitions} has no open gap. Nothing was changed.")


gaps = Family(
    "List and accept gaps: offsets that are lost. Kafka deleted these records before they were "
    "read. Ingest continues after a gap only when you accept it.",
    [list_gaps, accept],
)
