"""The commands about offsets that are lost: gaps list, accept."""

from typing import Annotated

import typer

from pipeline.cli.app import app, database_of, settings_of
from pipeline.cli.arguments import parse_place
from pipeline.cli.output import Mark, emit, say, table
from pipeline.db import transaction
from pipeline.log.gaps import accept_gap, all_gaps
from pipeline.log.offsets import ranges
from pipeline.schema.migrate import check_schema

gaps = typer.Typer(
    no_args_is_help=True,
    help="Offsets that are lost, and going on behind them. Kafka deleted them before they were "
    "read; nothing is ever skipped but by this decision.",
)
app.add_typer(gaps, name="gaps")

_AsJson = Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")]


@gaps.command(
    "list",
    epilog="Exit codes: 0 done, also with none; 69 the database is away; 78 a setting, a right or "
    "the schema is wrong.",
)
def list_gaps(ctx: typer.Context, as_json: _AsJson = False) -> None:
    """Every gap: those that wait for a decision, and those that were accepted, by whom.

    \b
    $ pipeline gaps list
    """
    with database_of(settings_of(ctx), "gaps", read_only=True) as engine:
        check_schema(engine)
        with transaction(engine) as db:
            found = all_gaps(db)
    if as_json:
        emit(found)
        return
    table(
        ["partition", "first lost", "goes on at", "offsets", "state", "found", "reason"],
        [
            (
                f"{one['topic']}:{one['partition']}",
                one["first_offset"],
                one["end_offset"],
                one["end_offset"] - one["first_offset"],
                Mark("open", "bold red")
                if one["accepted_at"] is None
                else f"accepted by {one['accepted_by']}",
                one["detected_at"],
                one["reason"],
            )
            for one in found
        ],
    )
    waiting = sum(one["accepted_at"] is None for one in found)
    say(f"{len(found):,} gaps, {waiting:,} wait for a decision.")


@gaps.command(
    epilog="Exit codes: 0 done, also with nothing to accept; 2 wrong usage, or the log has no such "
    "partition; 69 the database is away; 70 the partition has moved meanwhile; 78 a setting, a "
    "right or the schema is wrong."
)
def accept(
    ctx: typer.Context,
    place: Annotated[
        str, typer.Argument(metavar="TOPIC[:PARTITION]", help="All of the topic, or one partition.")
    ],
    as_json: _AsJson = False,
) -> None:
    """Go on behind lost offsets. They stay lost; the decision stays in pipeline.gaps.

    A running `pipeline run` goes on by itself within seconds.

    \b
    $ pipeline gaps accept Notifications:3
    """
    wanted = parse_place(place)
    if wanted.offsets is not None:
        raise typer.BadParameter("TOPIC or TOPIC:PARTITION")
    with database_of(settings_of(ctx), "gaps") as engine:
        check_schema(engine)
        with transaction(engine) as db:
            partitions = [one for one in ranges(db) if wanted.includes(one)]
            if not partitions:
                raise typer.BadParameter(f"the log has no partition {place}")
            accepted = [(one, gap) for one in partitions if (gap := accept_gap(db, one))]
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
            f"{partition}: goes on at offset {gap.end}; {gap.end - gap.first:,} offsets from "
            f"{gap.first} on are lost."
        )
    if not accepted:
        say(f"{place} has no open gap; nothing was done.")
