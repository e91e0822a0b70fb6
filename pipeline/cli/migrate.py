"""Prepares a database: migrate."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import settings_of
from pipeline.cli.command import AsJson, Servers, command
from pipeline.cli.output import emit, say
from pipeline.counts import count
from pipeline.errors import ExitCode
from pipeline.printable import printable

if TYPE_CHECKING:
    from pipeline.schema.migrate import MigrationReport


@command(
    {
        ExitCode.DONE: "schema and rights are current",
        ExitCode.FOUND: "with --plan or --sql, there is something to do",
        ExitCode.CONFIGURATION: "a setting or a right is wrong, a newer version of the program has "
        "migrated the database, or objects of others prevent a change",
    },
    servers=Servers.DATABASE,
)
def migrate(
    ctx: typer.Context,
    roles: Annotated[
        bool,
        typer.Option(
            "--roles",
            help="Also create the database roles, and make PREFIXowner the owner of the schemas. "
            "Needed once; requires CREATEROLE.",
        ),
    ] = False,
    print_roles: Annotated[
        bool,
        typer.Option("--print-roles", help="Print the SQL of --roles, for a DBA; change nothing."),
    ] = False,
    role_prefix: Annotated[
        str | None,
        typer.Option(
            help="Prefix of the names of the roles; pipeline_ by default. Give it only with the "
            "first --roles. Each database on the same server needs its own prefix.",
            metavar="PREFIX",
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what this command would do; change nothing.")
    ] = False,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the statements, for a DBA; change nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the schema and the rights of the database up to date.

    The log and its bookkeeping by migrations; read models, views and rights as they are declared.
    It is safe to repeat, and the service may run meanwhile; the next command continues after a
    kill. Once roles exist, each `migrate` grants them their rights on new objects.

    \b
    $ pipeline migrate --plan
    $ pipeline migrate
    $ pipeline migrate --roles
    $ pipeline migrate --print-roles | psql "$DBA_URL"
    """
    from pipeline import catalogue
    from pipeline.schema import migrate as schema
    from pipeline.schema import revisions

    if sum((roles, print_roles, plan, sql)) > 1:
        raise typer.BadParameter("use only one of --roles, --print-roles, --plan and --sql")
    if role_prefix is not None and not (roles or print_roles):
        raise typer.BadParameter("--role-prefix needs --roles or --print-roles")
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
            _print_statements(due, revisions.revision_sql(url) if due.applied else "")
        else:
            _print_plan(due)
        raise typer.Exit(ExitCode.DONE if due.is_empty else ExitCode.FOUND)
    done = schema.migrate(url, declared, with_roles=roles, role_prefix=role_prefix)
    if as_json:
        emit(_as_json(done))
        return
    for line in _lines(done):
        say(line)
    if done.is_empty:
        say("Nothing to do: the schema is current.")
    if roles and done.grants:
        say(_WHAT_NEXT.format(prefix=done.role_prefix))


def _as_json(migrated: "MigrationReport") -> dict[str, object]:
    return {
        "applied": migrated.applied,
        "steps": [
            {"object": step.name, "what": step.what, "statements": step.statements}
            for step in migrated.steps
        ],
        "rights": migrated.grants,
        "role_prefix": migrated.role_prefix,
    }


def _lines(migrated: "MigrationReport") -> Iterator[str]:
    if migrated.applied:
        yield f"Migrations: {', '.join(migrated.applied)}."
    for step in migrated.steps:
        yield printable(str(step))
    if migrated.grants:
        yield f"Roles {migrated.role_prefix}*: {count(len(migrated.grants), 'statement')}."


_FOLLOWS = (
    "The steps for read models, views and rights are only known after these migrations. Run "
    "`pipeline migrate`, or print the plan again after them."
)


def _print_plan(due: "MigrationReport") -> None:
    for line in _lines(due):
        typer.echo(line)
    if due.applied:
        say(_FOLLOWS)
    say("Nothing to do." if due.is_empty else "Nothing was changed. `pipeline migrate` does this.")


def _print_statements(due: "MigrationReport", revisions: str) -> None:
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
Settings are not inherited from roles, so each login of an analyst needs its own:
  ALTER ROLE anna SET default_transaction_read_only = on;
  ALTER ROLE anna SET statement_timeout = '5min';
  ALTER ROLE anna SET idle_in_transaction_session_timeout = '1min';"""


def _print_roles(planned: "MigrationReport", *, as_json: bool) -> None:
    if as_json:
        emit({"rights": planned.grants, "role_prefix": planned.role_prefix})
        return
    for statement in planned.grants:
        typer.echo(f"{statement};")
    if planned.grants:
        say(_WHAT_NEXT.format(prefix=planned.role_prefix))
    else:
        say(f"Nothing to do: roles {planned.role_prefix}* have their rights.")
