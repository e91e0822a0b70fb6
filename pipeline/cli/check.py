"""The command that examines an installation: check."""

from collections import Counter
from typing import Annotated

import typer

from pipeline import catalogue
from pipeline.cli.app import app, settings_of
from pipeline.cli.output import emit, say
from pipeline.health.check import (
    PromiseState,
    PromiseStatus,
    Result,
    exit_code,
    promise_statuses,
    run_checks,
)
from pipeline.log_events import printable

_AsJson = Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")]


@app.command(
    epilog="Exit codes: 0 nothing is wrong (risks may be listed); 1 something is, and a guarantee "
    "is broken; 69 a server is away; 78 a setting, a right or the schema is wrong."
)
def check(ctx: typer.Context, as_json: _AsJson = False) -> None:
    """Show what is right and wrong, and what is at risk.

    On both sides, with what to do. Versions, durability, TLS, login, rights, schema, append-only
    triggers, read models; topics, group, replication, retention against
    PIPELINE_LONGEST_OUTAGE_HOURS, and whether Kafka is still what was read before. Then each
    guarantee: holds, at risk, broken, or not known, and why.
    Changes nothing, joins no group.

    \b
    $ pipeline check
    """
    settings = settings_of(ctx)
    results = []
    for result in run_checks(settings, catalogue.load(settings.read_models)):
        results.append(result)
        if not as_json:
            _show(result)
    promises = promise_statuses(results)
    if as_json:
        is_ok = not any(result.level == "error" for result in results)
        emit({"ok": is_ok, "results": results, "promises": promises})
    else:
        typer.echo("\nGuarantees, in this installation:")
        for promise in promises:
            _show_promise(promise)
        levels = Counter(result.level for result in results)
        counts = Counter(promise.state for promise in promises)
        say(
            f"{levels['ok']} ok, {levels['unknown']} unknown, {levels['warning']} warnings, "
            f"{levels['error']} errors. Guarantees: "
            f"{', '.join(f'{counts[state]} {state}' for state in PromiseState if counts[state])}."
        )
    raise typer.Exit(exit_code(results))


_SIGNS = {"ok": "✓", "unknown": "?", "warning": "!", "error": "✗"}
_SIGN_OF_STATE = {
    PromiseState.HOLDS: "✓",
    PromiseState.NOT_KNOWN: "?",
    PromiseState.AT_RISK: "!",
    PromiseState.BROKEN: "✗",
}


def _show(result: Result) -> None:
    fix = f" → {result.problem.fix}" if result.problem else ""
    typer.echo(printable(f"{_SIGNS[result.level]} {result.level:<7}  {result}{fix}"))


def _show_promise(promise: PromiseStatus) -> None:
    reasons = f": {'; '.join(promise.reasons)}" if promise.reasons else ""
    sign = _SIGN_OF_STATE[promise.state]
    typer.echo(printable(f"{sign} {promise.state:<9}  {promise.promise}{reasons}"))
