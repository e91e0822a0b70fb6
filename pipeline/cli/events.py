"""Finds events in the log, and follows it: events."""

import base64
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from pipeline.cli.app import migrated_database_of, settings_of
from pipeline.cli.arguments import Coordinates, parse_coordinates, parse_time
from pipeline.cli.command import AsJson, Servers, command
from pipeline.cli.output import NOTHING, emit, moment, say
from pipeline.errors import ExitCode
from pipeline.printable import printable

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from pipeline.log.search import EventFilter, FoundEvent
    from pipeline.partitions import NextOffset, Partition

FOLLOW_S = 0.5
"""How often --follow queries the log."""
LOOK_BACK = timedelta(hours=24)
"""How far back a search without an index goes by default."""
_CONTENT = ("payload", "raw", "key", "headers")


@command({ExitCode.DONE: "done, even if nothing was found"}, servers=Servers.DATABASE)
def events(
    ctx: typer.Context,
    identity: Annotated[
        UUID | None,
        typer.Argument(
            metavar="ID",
            help="Id of an event, or of an entity (an order, for example): shows all its events.",
        ),
    ] = None,
    event_type: Annotated[
        str | None,
        typer.Option("--type", help="A type (ORDER.FILLED), or a whole category (ORDER)."),
    ] = None,
    at: Annotated[
        Coordinates | None,
        typer.Option(
            parser=parse_coordinates,
            metavar="COORDINATES",
            help="TOPIC, TOPIC:PARTITION or TOPIC:PARTITION:OFFSET[-OFFSET].",
        ),
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            parser=parse_time,
            metavar="TIME",
            help="Only events written to the log since this time: 2026-01-31T08:00:00Z, or 15m, "
            "2h, 7d before now.",
        ),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option(
            parser=parse_time,
            metavar="TIME",
            help="Only events written to the log before this time.",
        ),
    ] = None,
    bad: Annotated[
        bool, typer.Option("--bad", help="Only records that could not be decoded.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            "-n",
            min=1,
            help="Maximum number of events; 50 by default, no limit with --follow.",
            show_default=False,
        ),
    ] = None,
    payload: Annotated[
        bool,
        typer.Option(
            "--payload", help="Show the content of events too. It contains personal data."
        ),
    ] = False,
    following: Annotated[
        bool, typer.Option("--follow", "-f", help="Continue with new events, until Ctrl-C.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find events in the log, or follow it.

    It shows the newest events that match, oldest first; with --json, one document per line. With
    --type or --bad it searches only the last 24 hours, unless you give --since. It works on a
    standby.

    \b
    $ pipeline events
    $ pipeline events 8b4e5a0e-3c1d-4a8e-9b4e-0f6f3b1c2d3e
    $ pipeline events --type ORDER --since 2h
    $ pipeline events --at Notifications:0:1200-1210 --payload
    $ pipeline events --follow --json
    """
    from pipeline.db import transaction
    from pipeline.log.search import EventFilter, newest

    settings = settings_of(ctx)
    has_index = identity is not None or (at is not None and at.offsets is not None)
    if since is None and (event_type or bad) and not has_index and not following:
        since = datetime.now(UTC) - LOOK_BACK
    wanted = EventFilter(
        identity=identity,
        event_type=event_type,
        since=since,
        until=until,
        only_bad=bad,
    )
    if at is not None:
        wanted = replace(wanted, **at._asdict())
    show = emit_event if as_json else print_event
    with migrated_database_of(settings, "events", read_only=True) as engine:
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
                say("No events were found" + (f" since {moment(since)}." if since else "."))
        except KeyboardInterrupt:
            return


def _follow(
    engine: "Engine", wanted: "EventFilter", *, with_content: bool, limit: int | None
) -> "Iterator[FoundEvent]":
    """New events from now on, or from ``since`` on; at most ``limit``."""
    from pipeline.db import transaction
    from pipeline.log.ranges import ranges
    from pipeline.log.search import first_since, follow

    with transaction(engine) as db:
        next_offsets: dict[Partition, NextOffset] = {
            partition: logged.end for partition, logged in ranges(db).items()
        }
        if wanted.since is not None:
            first = first_since(db, [wanted.since])
            next_offsets |= {partition: offset for (partition, _), offset in first.items()}
    say("Following the log. Press Ctrl-C to end.")
    shown = 0
    while True:
        with transaction(engine) as db:
            new = list(follow(db, wanted, next_offsets, with_content=with_content))
        for found in new:
            yield found
            shown += 1
            if shown == limit:
                return
        time.sleep(FOLLOW_S)


# ---------------------------------------------------------------------------------------- printing


def print_event(found: "FoundEvent", *, with_content: bool) -> None:
    """One line for people; the content on the next."""
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


def _content(found: "FoundEvent") -> str:
    if found.payload is not None:
        return found.payload
    return "tombstone" if found.raw is None else repr(found.raw)


def emit_event(found: "FoundEvent", *, with_content: bool) -> None:
    """One JSON document per line."""
    emit(document_of(found, with_content=with_content))


def document_of(found: "FoundEvent", *, with_content: bool) -> dict[str, object]:
    """An event for programs; the content, which may contain personal data, only on request."""
    import orjson

    document: dict[str, object] = {
        name: value for name, value in found._asdict().items() if name not in _CONTENT
    }
    if with_content:
        # The payload as PostgreSQL writes it: decoding it here could round its numbers.
        document["payload"] = orjson.Fragment(found.payload) if found.payload else None
        document["raw_base64"] = _base64(found.raw)
        document["key_base64"] = _base64(found.key)
        document["headers"] = orjson.Fragment(found.headers) if found.headers else None
    return document


def _base64(content: bytes | None) -> str | None:
    return None if content is None else base64.b64encode(content).decode()
