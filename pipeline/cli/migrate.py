"""The command that prepares a database: migrate."""

from collections.abc import Iterator
from typing import Annotated

import typer

from pipeline import catalogue
from pipeline.cli.app import app, settings_of
from pipeline.cli.output import emit, say
from pipeline.errors import ExitCode
from pipeline.log_events import printable
from pipeline.schema import migrate as schema
from pipeline.schema.roles import PREFIX_DEFAULT

_AsJson = Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")]


@app.command(
    epilog="Exit codes: 0 schema and rights are current; 1 something is due (--plan, --sql); "
    "2 wrong usage; 69 the database is unavailable; 78 a setting or right is wrong, a newer "
    "release has migrated already, or objects of others are in the way.",
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
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Print what would be done; change nothing."),
    ] = False,
    sql: Annotated[
        bool,
        typer.Option("--sql", help="Print the statements for it, for a DBA; change nothing."),
    ] = False,
    as_json: _AsJson = False,
) -> None:
    """Bring the database's schema and rights up to date.

    The log and its bookkeeping by migrations; read models, views and rights as they are declared.
    Safe to repeat, and while the service runs; the next call continues a killed one. Roles that
    were made once get their rights on all that is new by every later `migrate`.

    \b
    $ pipeline migrate --plan
    $ pipeline migrate
    $ pipeline migrate --roles
    $ pipeline migrate --print-roles | psql "$DBA_URL"
    """
    if sum((roles, print_roles, plan, sql)) > 1:
        raise typer.BadParameter("give only one of --roles, --print-roles, --plan and --sql")
    if role_prefix is not None and not (roles or print_roles):
        raise typer.BadParameter("--role-prefix goes with --roles or --print-roles")
    settings = settings_of(ctx)
    url, declared = settings.database(), catalogue.load(settings.read_models)
    if print_roles:
        _print_roles(schema.planned_roles(url, role_prefix), as_json=as_json)
        return
    if plan or sql:
        due = schema.planned(url, declared)
        if as_json:
            emit(_as_json(due))
        elif sql:
            _print_statements(due, schema.revision_sql(url) if due.applied else "")
        else:
            _print_plan(due)
        raise typer.Exit(ExitCode.DONE if due.is_empty else ExitCode.FOUND)
    done = schema.set_up(url, declared, with_roles=roles, role_prefix=role_prefix)
    if as_json:
        emit(_as_json(done))
        return
    for line in _lines(done):
        say(line)
    if done.is_empty:
        say("Nothing to do: the schema is current.")
    if roles and done.grants:
        say(_WHAT_NEXT.format(prefix=done.role_prefix))


def _as_json(migrated: schema.Migrated) -> dict[str, object]:
    return {
        "applied": migrated.applied,
        "steps": [
            {"object": step.name, "what": step.what, "statements": step.statements}
            for step in migrated.steps
        ],
        "rights": migrated.grants,
        "role_prefix": migrated.role_prefix,
    }


def _lines(migrated: schema.Migrated) -> Iterator[str]:
    if migrated.applied:
        yield f"Migrations: {', '.join(migrated.applied)}."
    for step in migrated.steps:
        yield printable(str(step))
    if migrated.grants:
        yield f"Roles {migrated.role_prefix}*: {len(migrated.grants)} statements."


_FOLLOWS = "Read models, views and rights follow from these migrations: plan again after them."


def _print_plan(due: schema.Migrated) -> None:
    for line in _lines(due):
        typer.echo(line)
    if due.applied:
        say(_FOLLOWS)
    say("Nothing to do." if due.is_empty else "Nothing was changed. `pipeline migrate` does this.")


def _print_statements(due: schema.Migrated, revisions: str) -> None:
    typer.echo(revisions, nl=False)
    for step in due.steps:
        typer.echo(f"-- {printable(str(step))}")
        for statement in step.statements:
            typer.echo(f"{statement.rstrip().removesuffix(';')};")
    for statement in due.grants:
        typer.echo(f"{statement};")
    if due.applied:
        say(_FOLLOWS)


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
