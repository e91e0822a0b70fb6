"""The commands that prepare and examine an installation: migrate, check."""

from collections import Counter
from typing import Annotated

import typer

from pipeline import migrate as schema
from pipeline.check import Finding, examine, exit_code
from pipeline.cli.app import app, settings_of
from pipeline.cli.terminal import emit, say
from pipeline.logs import printable
from pipeline.projectors import discover

_AsJson = Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")]


@app.command(
    epilog="Exit codes: 0 the schema is current; 69 the database is away; 78 a setting or right is "
    "wrong, or a newer program has migrated already.",
)
def migrate(ctx: typer.Context, as_json: _AsJson = False) -> None:
    """Bring the database to the current schema.

    Safe to repeat, and while the service runs.

    \b
    $ pipeline migrate
    """
    settings = settings_of(ctx)
    applied = schema.migrate(settings.database())
    if as_json:
        emit({"applied": applied})
    elif applied:
        say(f"Migrated: {', '.join(applied)}.")
    else:
        say("Nothing to do: the schema is current.")


@app.command(
    epilog="Exit codes: 0 nothing is wrong (warnings may be listed); 1 something is; 69 a server "
    "is away; 78 a setting, a right or the schema is wrong."
)
def check(ctx: typer.Context, as_json: _AsJson = False) -> None:
    """Say what is right and wrong on both sides, and what to do.

    Versions, TLS, login, rights, schema, append-only triggers, read models; topics, group,
    retention, and whether Kafka is still what was read before. Changes nothing, joins no group.

    \b
    $ pipeline check
    """
    settings = settings_of(ctx)
    found = []
    for finding in examine(settings, discover()):
        found.append(finding)
        if not as_json:
            _tell(finding)
    if as_json:
        emit({"ok": not any(one.level == "wrong" for one in found), "findings": found})
    else:
        count = Counter(one.level for one in found)
        say(f"{count['ok']} ok, {count['warning']} warnings, {count['wrong']} wrong.")
    raise typer.Exit(exit_code(found))


_SIGNS = {"ok": "✓", "warning": "!", "wrong": "✗"}


def _tell(finding: Finding) -> None:
    remedy = f" → {finding.remedy}" if finding.remedy else ""
    line = f"{_SIGNS[finding.level]} {finding.level:<7}  {finding.area}: {finding.text}{remedy}"
    typer.echo(printable(line))
