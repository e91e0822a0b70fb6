"""The commands that prepare and examine an installation: migrate, check."""

from collections import Counter
from typing import Annotated

import typer

from pipeline import catalogue
from pipeline.cli.app import app, settings_of
from pipeline.cli.terminal import emit, say
from pipeline.health.check import (
    PromiseState,
    PromiseStatus,
    Result,
    exit_code,
    promise_statuses,
    run_checks,
)
from pipeline.log_events import printable
from pipeline.schema import migrate as schema
from pipeline.schema.roles import PREFIX_DEFAULT

_AsJson = Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")]


@app.command(
    epilog="Exit codes: 0 schema and rights are current; 2 wrong usage; 69 the database is away; "
    "78 a setting or right is wrong, or a newer program has migrated already.",
)
def migrate(
    ctx: typer.Context,
    roles: Annotated[
        bool,
        typer.Option(
            "--roles",
            help="Make the database roles too, and hand the schemas to their owner. Once; needs "
            "CREATEROLE.",
        ),
    ] = False,
    print_roles: Annotated[
        bool,
        typer.Option("--print-roles", help="Print the SQL for that, for a DBA; change nothing."),
    ] = False,
    role_prefix: Annotated[
        str | None,
        typer.Option(
            help=f"With what the roles' names begin, for the first time; {PREFIX_DEFAULT} if not "
            "given. Each database of a server needs its own.",
            metavar="PREFIX",
        ),
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Bring the database's schema and rights up to date.

    Safe to repeat, and while the service runs. Roles that were made once get their rights on all
    that is new by every later `migrate`.

    \b
    $ pipeline migrate
    $ pipeline migrate --roles
    $ pipeline migrate --print-roles | psql "$DBA_URL"
    """
    if roles and print_roles:
        raise typer.BadParameter("--roles makes the roles, --print-roles prints how; not both")
    if role_prefix is not None and not (roles or print_roles):
        raise typer.BadParameter("--role-prefix goes with --roles or --print-roles")
    url = settings_of(ctx).database()
    if print_roles:
        _print_roles(schema.planned_roles(url, role_prefix), as_json=as_json)
        return
    done = schema.set_up(url, with_roles=roles, role_prefix=role_prefix)
    if as_json:
        emit({"applied": done.applied, "rights": done.grants, "role_prefix": done.role_prefix})
        return
    if done.applied:
        say(f"Migrated: {', '.join(done.applied)}.")
    else:
        say("Nothing to do: the schema is current.")
    if done.grants:
        say(f"Roles {done.role_prefix}*: {len(done.grants)} statements.")
    if roles and done.grants:
        say(_WHAT_NEXT.format(prefix=done.role_prefix))


_WHAT_NEXT = """\
Give the roles to logins:
  GRANT {prefix}ingest, {prefix}project TO worker;
  GRANT {prefix}operator TO operations;
  GRANT {prefix}analyst TO anna;
Settings are not inherited from roles, so each analyst's login wants its own:
  ALTER ROLE anna SET default_transaction_read_only = on;
  ALTER ROLE anna SET statement_timeout = '5min';
  ALTER ROLE anna SET idle_in_transaction_session_timeout = '1min';"""


def _print_roles(planned: schema.Migrated, *, as_json: bool) -> None:
    if as_json:
        emit({"rights": planned.grants, "role_prefix": planned.role_prefix})
        return
    for statement in planned.grants:
        typer.echo(f"{statement};")
    if planned.grants:
        say(_WHAT_NEXT.format(prefix=planned.role_prefix))
    else:
        say(f"Nothing to do: roles {planned.role_prefix}* have their rights.")


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
    for result in run_checks(settings, catalogue.load().models):
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
