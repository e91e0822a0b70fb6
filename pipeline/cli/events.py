"""The command that finds events in the log, and follows it: events."""

import base64
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Annotated
from uuid import UUID

import orjson
import typer
from sqlalchemy import Engine

from pipeline.cli.app import app, database_of, settings_of
from pipeline.cli.arguments import parse_place, parse_time
from pipeline.cli.output import NOTHING, emit, moment, say
from pipeline.db import transaction
from pipeline.log.offsets import ranges
from pipeline.log.search import Found, Wanted, first_since, follow, newest
from pipeline.log_events import printable
from pipeline.partitions import NextOffset, Partition
from pipeline.schema.migrate import check_schema

FOLLOW_S = 0.5
"""How often a log that is followed is looked at."""
LOOK_BACK = timedelta(hours=24)
"""How far a search looks back that no index answers, unless told."""
_CONTENT = ("payload", "raw", "key", "headers")


@app.command(
    epilog="Exit codes: 0 done, even if nothing was found; 2 wrong usage; 69 the database is away; "
    "78 a setting, a right or the schema is wrong."
)
def events(
    ctx: typer.Context,
    identity: Annotated[
        UUID | None,
        typer.Argument(
            metavar="ID", help="Id of an event, or of what events are about: its timeline."
        ),
    ] = None,
    event_type: Annotated[
        str | None, typer.Option("--type", help="ORDER.FILLED, or all of a category: ORDER")
    ] = None,
    at: Annotated[
        Wanted | None,
        typer.Option(
            parser=parse_place,
            metavar="PLACE",
            help="TOPIC, TOPIC:PARTITION, TOPIC:PARTITION:OFFSET[-OFFSET].",
        ),
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            parser=parse_time,
            metavar="TIME",
            help="Came into the log since: a time, or 15m, 2h, 7d.",
        ),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option(parser=parse_time, metavar="TIME", help="Came into the log before."),
    ] = None,
    bad: Annotated[bool, typer.Option("--bad", help="Only what could not be read.")] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", "-n", min=1, help="At most; 50, or no end with --follow.", show_default=False
        ),
    ] = None,
    payload: Annotated[
        bool,
        typer.Option(
            "--payload", help="Show contents too. They hold personal data: mind where to."
        ),
    ] = False,
    following: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document a line.")] = False,
) -> None:
    """Find events in the log, and follow it. Shows the newest that match, oldest first.

    A search by type or --bad looks back 24 hours unless --since says otherwise. A standby will do.

    \b
    $ pipeline events
    $ pipeline events 8b4e5a0e-3c1d-4a8e-9b4e-0f6f3b1c2d3e
    $ pipeline events --type ORDER --since 2h
    $ pipeline events --at Notifications:0:1200-1210 --payload
    $ pipeline events --follow --json
    """
    settings = settings_of(ctx)
    answered_by_index = identity is not None or (at is not None and at.offsets is not None)
    if since is None and (event_type or bad) and not answered_by_index and not following:
        since = datetime.now(UTC) - LOOK_BACK
    wanted = replace(
        at or Wanted(),
        identity=identity,
        event_type=event_type,
        since=since,
        until=until,
        only_bad=bad,
    )
    show = emit_event if as_json else print_event
    with database_of(settings, "events", read_only=True) as engine:
        check_schema(engine)
        try:
            if following:
                for found in _follow(engine, wanted, with_content=payload, limit=limit):
                    show(found, with_content=payload)
                return
            with transaction(engine) as db:
                found_all = newest(db, wanted, limit=limit or 50, with_content=payload)
            for found in found_all:
                show(found, with_content=payload)
            if not found_all:
                say("Nothing found" + (f" since {moment(since)}." if since else "."))
        except KeyboardInterrupt:
            return


def _follow(
    engine: Engine, wanted: Wanted, *, with_content: bool, limit: int | None
) -> Iterator[Found]:
    """What comes from now on, or from ``since`` on; at most ``limit`` events."""
    with transaction(engine) as db:
        places: dict[Partition, NextOffset] = {p: held.end for p, held in ranges(db).items()}
        if wanted.since is not None:
            begun = first_since(db, [wanted.since])
            places |= {partition: first for (partition, _), first in begun.items()}
    say("Following; Ctrl-C ends it.")
    shown = 0
    while True:
        with transaction(engine) as db:
            fresh = list(follow(db, wanted, places, with_content=with_content))
        for found in fresh:
            yield found
            shown += 1
            if shown == limit:
                return
        time.sleep(FOLLOW_S)


# ---------------------------------------------------------------------------------------- printing


def print_event(found: Found, *, with_content: bool) -> None:
    """One line for people, its content on the next."""
    when = found.created_at or found.kafka_timestamp or found.ingested_at
    notes = []
    if found.repeat_of is not None:
        notes.append(f"repeats {found.repeat_of}")
    if found.problem is not None:
        notes.append(found.problem)
    line = (
        f"{moment(when, milliseconds=True)}  {found.event_type or NOTHING:<34}  "
        f"{found.entity_id or NOTHING!s:<36}  {found.status or NOTHING:<12}  "
        f"{found.topic}:{found.partition}:{found.offset}"
        f"  {'; '.join(notes)}"
    )
    typer.echo(printable(line.rstrip()))
    if with_content:
        typer.echo(printable(f"    {_content(found)}"))


def _content(found: Found) -> str:
    if found.payload is not None:
        return found.payload
    return "tombstone" if found.raw is None else repr(found.raw)


def emit_event(found: Found, *, with_content: bool) -> None:
    """One JSON document on a line."""
    emit(document_of(found, with_content=with_content))


def document_of(found: Found, *, with_content: bool) -> dict[str, object]:
    """An event for programs; what may hold personal data only if wanted."""
    document: dict[str, object] = {
        name: value for name, value in found._asdict().items() if name not in _CONTENT
    }
    if with_content:
        # The payload as PostgreSQL writes it: reading it here could round its numbers.
        document["payload"] = orjson.Fragment(found.payload) if found.payload else None
        document["raw_base64"] = _base64(found.raw)
        document["key_base64"] = _base64(found.key)
        document["headers"] = orjson.Fragment(found.headers) if found.headers else None
    return document


def _base64(content: bytes | None) -> str | None:
    return None if content is None else base64.b64encode(content).decode()
