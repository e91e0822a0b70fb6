"""The commands about events that a read model could not take: dead-letters list, show, retry."""

from collections.abc import Sequence
from typing import Annotated

import typer
from sqlalchemy import Engine

from pipeline import catalogue
from pipeline.cli.app import app, database_of, settings_of
from pipeline.cli.arguments import parse_place, read_models
from pipeline.cli.events import document_of, print_event
from pipeline.cli.output import emit, say, table
from pipeline.db import transaction
from pipeline.errors import ExitCode
from pipeline.log.search import newest
from pipeline.log_events import printable
from pipeline.projection.dead_letters import DeadLetter, listed
from pipeline.projection.dead_letters import retry as try_again
from pipeline.schema.migrate import check_schema, check_tables

_WHY = {
    "22003": "number out of range",
    "22007": "not a time or date",
    "22008": "not a time or date",
    "22023": "a list or an object is wanted",
    "22P02": "not of its kind",
    "23502": "missing",
}

letters = typer.Typer(
    no_args_is_help=True,
    help="Events that a read model could not take. They are put aside with the reason, and tried "
    "again on demand.",
)
app.add_typer(letters, name="dead-letters")

_Names = Annotated[
    list[str] | None, typer.Argument(metavar="NAME...", help="Only of these read models.")
]
_AsJson = Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")]


@letters.command(
    "list",
    epilog="Exit codes: 0 done, also with none; 2 wrong usage; 69 the database is away; 78 a "
    "setting, a right or the schema is wrong.",
)
def list_letters(ctx: typer.Context, names: _Names = None, as_json: _AsJson = False) -> None:
    """What is put aside, and which column refused it.

    \b
    $ pipeline dead-letters list
    $ pipeline dead-letters list orders --json
    """
    settings = settings_of(ctx)
    wanted = [model.name for model in read_models(settings, names)] if names else []
    with database_of(settings, "dead-letters", read_only=True) as engine:
        found = _listed(engine, wanted)
    if as_json:
        emit([_document(one) for one in found])
        return
    table(
        ["read model", "event", "type", "column", "why", "attempts", "found"],
        [
            (
                one.projector,
                _place(one),
                one.event_type,
                one.column,
                f"{_WHY.get(one.sqlstate, 'refused')} ({one.sqlstate})",
                str(one.attempts),
                one.found_at,
            )
            for one in found
        ],
    )
    say(f"{len(found):,} dead letters.")


@letters.command(
    epilog="Exit codes: 0 done; 1 no such dead letter; 2 wrong usage; 69 the database is away; 78 "
    "a setting, a right or the schema is wrong."
)
def show(
    ctx: typer.Context,
    place: Annotated[
        str, typer.Argument(metavar="TOPIC:PARTITION:OFFSET", help="As `list` shows it.")
    ],
    payload: Annotated[
        bool, typer.Option("--payload", help="The event's content too. It holds personal data.")
    ] = False,
    as_json: _AsJson = False,
) -> None:
    """One event that was put aside, and each read model that refused it.

    \b
    $ pipeline dead-letters show Notifications:3:1204 --payload
    """
    wanted = parse_place(place)
    if wanted.offsets is None or wanted.offsets.span != 1:
        raise typer.BadParameter("TOPIC:PARTITION:OFFSET, as `pipeline dead-letters list` shows it")
    with database_of(settings_of(ctx), "dead-letters", read_only=True) as engine:
        found = [one for one in _listed(engine, []) if _place(one) == place]
        if not found:
            say(f"pipeline: {place} is no dead letter")
            raise typer.Exit(ExitCode.FOUND)
        with transaction(engine) as db:
            # A segment that was detached takes its events along.
            event = next(iter(newest(db, wanted, limit=1, with_content=payload)), None)
    if as_json:
        refusals = [_document(one) for one in found]
        document = event and document_of(event, with_content=payload)
        emit({"event": document, "refusals": refusals})
        return
    if event is None:
        typer.echo(printable(f"{place}: the event is no longer in pipeline.events"))
    else:
        print_event(event, with_content=payload)
    for one in found:
        why = f"{_WHY.get(one.sqlstate, 'refused')} ({one.sqlstate})"
        typer.echo(printable(f"    {one.projector}: column {one.column or 'unknown'}: {why}"))


@letters.command(
    epilog="Exit codes: 0 all have landed, or there were none; 1 some are still refused; 2 wrong "
    "usage; 69 the database is away; 78 a setting, a right or the schema is wrong."
)
def retry(ctx: typer.Context, names: _Names = None, as_json: _AsJson = False) -> None:
    """Try them again, after a projector was mended. Each lands right, whenever that is.

    \b
    $ pipeline dead-letters retry orders
    """
    settings = settings_of(ctx)
    wanted = [model.name for model in read_models(settings, names)] if names else []
    with database_of(settings, "dead-letters") as engine:
        check_schema(engine)
        check_tables(engine, catalogue=catalogue.load(settings.read_models))
        models = catalogue.load(settings.read_models).models
        landed, refused = try_again(engine, models, wanted or None)
    if as_json:
        emit({"landed": landed, "refused": refused})
    else:
        say(f"{landed:,} landed, {refused:,} are still refused.")
    if refused:
        raise typer.Exit(ExitCode.FOUND)


def _listed(engine: Engine, names: Sequence[str]) -> Sequence[DeadLetter]:
    check_schema(engine)
    with transaction(engine) as db:
        return listed(db, names or None)


def _place(letter: DeadLetter) -> str:
    return f"{letter.partition.topic}:{letter.partition.number}:{letter.offset}"


def _document(letter: DeadLetter) -> dict[str, object]:
    document = letter._asdict()
    document["topic"], document["partition"] = document.pop("partition")
    return document
