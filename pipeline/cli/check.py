"""Examines an installation: check."""

from collections import Counter
from typing import TYPE_CHECKING

import typer

from pipeline.cli.app import settings_of
from pipeline.cli.command import AsJson, Servers, command
from pipeline.cli.output import emit, say
from pipeline.counts import count
from pipeline.errors import ExitCode
from pipeline.printable import printable

if TYPE_CHECKING:
    from pipeline.health.check import PromiseStatus, Result


@command(
    {
        ExitCode.DONE: "no error; there may be warnings",
        ExitCode.FOUND: "there is an error; a guarantee may be broken",
    },
    servers=Servers.BOTH,
)
def check(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Examine PostgreSQL and Kafka; list problems and fixes.

    In PostgreSQL it examines version, durability, TLS, login, rights, schema, append-only triggers
    and read models. In Kafka it examines login, topics, consumer group, replication and retention,
    and whether this is the cluster that was read before. Retention must be longer than
    PIPELINE_LONGEST_OUTAGE_HOURS. Then it shows the state of each guarantee, with the reasons:
    holds, at risk, broken or not known. It changes nothing and joins no consumer group.

    \b
    $ pipeline check
    """
    from pipeline import catalogue
    from pipeline.health.check import PromiseState, exit_code, promise_statuses, run_checks

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
        states = ", ".join(f"{counts[state]} {state}" for state in PromiseState if counts[state])
        say(
            f"{levels['ok']:,} ok, {levels['unknown']:,} unknown, "
            f"{count(levels['warning'], 'warning')}, {count(levels['error'], 'error')}. "
            f"Guarantees: {states}."
        )
    raise typer.Exit(exit_code(results))


_SIGNS = {"ok": "✓", "unknown": "?", "warning": "!", "error": "✗"}
_SIGN_OF_STATE = {"holds": "✓", "not known": "?", "at risk": "!", "broken": "✗"}


def _show(result: "Result") -> None:
    fix = f" → {result.problem.fix}" if result.problem else ""
    typer.echo(printable(f"{_SIGNS[result.level]} {result.level:<7}  {result}{fix}"))


def _show_promise(promise: "PromiseStatus") -> None:
    reasons = f": {'; '.join(promise.reasons)}" if promise.reasons else ""
    sign = _SIGN_OF_STATE[promise.state]
    typer.echo(printable(f"{sign} {promise.state:<9}  {promise.promise}{reasons}"))
