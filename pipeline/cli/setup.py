"""The commands that prepare and examine an installation: migrate, check."""

from collections import Counter
from typing import Annotated

import typer

from pipeline import migrate as schema
from pipeline.check import Finding, Standing, Worth, examine, exit_code, worth
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
    epilog="Exit codes: 0 nothing is wrong (risks may be listed); 1 something is, and a guarantee "
    "is broken; 69 a server is away; 78 a setting, a right or the schema is wrong."
)
def check(ctx: typer.Context, as_json: _AsJson = False) -> None:
    """Say what is right and wrong on both sides, what to do, and which guarantees hold here.

    Versions, durability, TLS, login, rights, schema, append-only triggers, read models; topics,
    group, replication, retention against PIPELINE_LONGEST_OUTAGE_HOURS, and whether Kafka is still
    what was read before. Then each guarantee: holds, at risk, broken, or not known, and why.
    Changes nothing, joins no group.

    \b
    $ pipeline check
    """
    settings = settings_of(ctx)
    found = []
    for finding in examine(settings, discover()):
        found.append(finding)
        if not as_json:
            _tell(finding)
    promises = worth(found)
    if as_json:
        is_ok = not any(one.level == "wrong" for one in found)
        emit({"ok": is_ok, "findings": found, "promises": promises})
    else:
        typer.echo("\nGuarantees, in this installation:")
        for promise in promises:
            _tell_promise(promise)
        levels, standings = (
            Counter(one.level for one in found),
            Counter(one.standing for one in promises),
        )
        say(
            f"{levels['ok']} ok, {levels['unknown']} not told, {levels['warning']} warnings, "
            f"{levels['wrong']} wrong. Guarantees: "
            f"{', '.join(f'{standings[one]} {one}' for one in Standing if standings[one])}."
        )
    raise typer.Exit(exit_code(found))


_SIGNS = {"ok": "✓", "unknown": "?", "warning": "!", "wrong": "✗"}
_SIGN_OF_STANDING = {
    Standing.HOLDS: "✓",
    Standing.NOT_KNOWN: "?",
    Standing.AT_RISK: "!",
    Standing.BROKEN: "✗",
}


def _tell(finding: Finding) -> None:
    remedy = f" → {finding.remedy}" if finding.remedy else ""
    line = f"{_SIGNS[finding.level]} {finding.level:<7}  {finding.area}: {finding.text}{remedy}"
    typer.echo(printable(line))


def _tell_promise(one: Worth) -> None:
    reasons = f": {'; '.join(one.reasons)}" if one.reasons else ""
    line = f"{_SIGN_OF_STANDING[one.standing]} {one.standing:<9}  {one.promise}{reasons}"
    typer.echo(printable(line))
