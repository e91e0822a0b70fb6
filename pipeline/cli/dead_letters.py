"""Events that a read model rejected: dead-letters list, show, retry."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import migrated_database_of, settings_of
from pipeline.cli.arguments import parse_coordinates, read_models
from pipeline.cli.command import AsJson, Family, Servers, command
from pipeline.cli.events import document_of, print_event
from pipeline.cli.output import emit, say, table
from pipeline.counts import count
from pipeline.errors import ExitCode
from pipeline.printable import printable

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from pipeline.projection.dead_letters import DeadLetter
    from pipeline.settings import Settings

_REASONS = {
    "22003": "number out of range",
    "22007": "not a time or date",
    "22008": "not a time or date",
    "22023": "not a list or an object",
    "22P02": "not of the column's type",
    "23502": "value is missing",
}

_Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="NAME...", help="Only dead letters of these read models."),
]


@command(
    {ExitCode.DONE: "done, with or without dead letters"}, servers=Servers.DATABASE, name="list"
)
def list_letters(ctx: typer.Context, names: _Names = None, as_json: AsJson = False) -> None:
    """List dead letters, with the column that rejected each, and the reason.

    \b
    $ pipeline dead-letters list
    $ pipeline dead-letters list orders --json
    """
    settings = settings_of(ctx)
    wanted = _named(settings, names)
    with migrated_database_of(settings, "dead-letters", read_only=True) as engine:
        letters = _listed(engine, wanted)
    if as_json:
        emit([_document(letter) for letter in letters])
        return
    table(
        ["read model", "event", "type", "column", "reason", "attempts", "found"],
        [
            (
                letter.projector,
                _coordinates(letter),
                letter.event_type,
                letter.column,
                _reason(letter),
                str(letter.attempts),
                letter.found_at,
            )
            for letter in letters
        ],
    )
    say(f"{count(len(letters), 'dead letter')}.")


@command(
    {ExitCode.DONE: "done", ExitCode.FOUND: "there is no such dead letter"},
    servers=Servers.DATABASE,
)
def show(
    ctx: typer.Context,
    coordinates: Annotated[
        str,
        typer.Argument(
            metavar="TOPIC:PARTITION:OFFSET",
            help="Coordinates of the event, as `pipeline dead-letters list` shows them.",
        ),
    ],
    payload: Annotated[
        bool,
        typer.Option(
            "--payload", help="Show the content of the event too. It contains personal data."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a dead letter, and each read model that rejected it.

    \b
    $ pipeline dead-letters show Notifications:3:1204 --payload
    """
    from pipeline.db import transaction
    from pipeline.log.search import EventFilter, newest

    at = parse_coordinates(coordinates)
    if at.offsets is None or at.offsets.span != 1:
        raise typer.BadParameter(
            "must be TOPIC:PARTITION:OFFSET, as `pipeline dead-letters list` shows it"
        )
    with migrated_database_of(settings_of(ctx), "dead-letters", read_only=True) as engine:
        letters = [letter for letter in _listed(engine, []) if _coordinates(letter) == coordinates]
        if not letters:
            say(
                f"pipeline: no read model has rejected {coordinates}. See "
                "`pipeline dead-letters list`."
            )
            raise typer.Exit(ExitCode.FOUND)
        with transaction(engine) as db:
            # The event is missing if its segment was detached.
            wanted = replace(EventFilter(), **at._asdict())
            event = next(iter(newest(db, wanted, limit=1, with_content=payload)), None)
    if as_json:
        document = event and document_of(event, with_content=payload)
        emit({"event": document, "rejections": [_document(letter) for letter in letters]})
        return
    if event is None:
        typer.echo(printable(f"{coordinates}: the event is no longer in pipeline.events"))
    else:
        print_event(event, with_content=payload)
    for letter in letters:
        column = letter.column or "unknown"
        typer.echo(printable(f"    {letter.projector}: column {column}: {_reason(letter)}"))


@command(
    {
        ExitCode.DONE: "all were applied, or there were none",
        ExitCode.FOUND: "some are still rejected",
    },
    servers=Servers.DATABASE,
)
def retry(ctx: typer.Context, names: _Names = None, as_json: AsJson = False) -> None:
    """Apply dead letters again, after you fixed the read model.

    The rows are then the same as if the read model had never rejected these events.

    \b
    $ pipeline dead-letters retry orders
    """
    from pipeline import catalogue
    from pipeline.projection import dead_letters as letters

    settings = settings_of(ctx)
    wanted = _named(settings, names)
    with migrated_database_of(settings, "dead-letters", writes_read_models=True) as engine:
        models = catalogue.load(settings.read_models).models
        applied, rejected = letters.retry(engine, models, wanted or None)
    if as_json:
        emit({"applied": applied, "rejected": rejected})
    else:
        say(
            f"{count(applied, 'dead letter was', 'dead letters were')} applied, "
            f"{count(rejected, 'is', 'are')} still rejected."
        )
    if rejected:
        raise typer.Exit(ExitCode.FOUND)


dead_letters = Family(
    "List, show and retry dead letters: rejected events. A read model continues without the events "
    "that it rejected; `retry` applies them after a fix.",
    [list_letters, show, retry],
)


def _named(settings: "Settings", names: Sequence[str] | None) -> list[str]:
    return [model.name for model in read_models(settings, names)] if names else []


def _listed(engine: "Engine", names: Sequence[str]) -> "Sequence[DeadLetter]":
    from pipeline.db import transaction
    from pipeline.projection.dead_letters import listed

    with transaction(engine) as db:
        return listed(db, names or None)


def _coordinates(letter: "DeadLetter") -> str:
    return f"{letter.partition.topic}:{letter.partition.number}:{letter.offset}"


def _reason(letter: "DeadLetter") -> str:
    return f"{_REASONS.get(letter.sqlstate, 'refused')} ({letter.sqlstate})"


def _document(letter: "DeadLetter") -> dict[str, object]:
    document = letter._asdict()
    document["topic"], document["partition"] = document.pop("partition")
    return document
