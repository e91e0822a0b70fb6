"""Prepares a database: migrate."""

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import settings_of
from pipeline.cli.command import AsJson, Servers, command
from pipeline.cli.output import emit, say
from pipeline.errors import ExitCode

if TYPE_CHECKING:
    from pipeline.schema.migrate import Migrated


@command(
    {
        ExitCode.DONE: "schema and rights are current",
        ExitCode.CONFIGURATION: "a setting or a right is wrong, or a newer version of the program "
        "has migrated the database",
    },
    servers=Servers.DATABASE,
)
def migrate(
    ctx: typer.Context,
    roles: Annotated[
        bool,
        typer.Option(
            "--roles",
            help="Create the database roles too, and make their owner the owner of the schemas. "
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
            help="Prefix of the roles' names, the first time; pipeline_ by default. Each database "
            "of a server needs its own.",
            metavar="PREFIX",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring the schema and the rights of the database up to date.

    It is safe to repeat, and the service may run meanwhile. Once roles exist, each `migrate` grants
    them their rights on new objects.

    \b
    $ pipeline migrate
    $ pipeline migrate --roles
    $ pipeline migrate --print-roles | psql "$DBA_URL"
    """
    from pipeline import catalogue
    from pipeline.schema import migrate as schema

    if roles and print_roles:
        raise typer.BadParameter(
            "--roles creates the roles, --print-roles prints the SQL; give one of them"
        )
    if role_prefix is not None and not (roles or print_roles):
        raise typer.BadParameter("--role-prefix needs --roles or --print-roles")
    settings = settings_of(ctx)
    url = settings.database()
    if print_roles:
        _print_roles(schema.planned_roles(url, role_prefix), as_json=as_json)
        return
    done = schema.set_up(
        url, catalogue.load(settings.read_models), with_roles=roles, role_prefix=role_prefix
    )
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
Settings are not inherited from roles, so each login of an analyst needs its own:
  ALTER ROLE anna SET default_transaction_read_only = on;
  ALTER ROLE anna SET statement_timeout = '5min';
  ALTER ROLE anna SET idle_in_transaction_session_timeout = '1min';"""


def _print_roles(planned: "Migrated", *, as_json: bool) -> None:
    if as_json:
        emit({"rights": planned.grants, "role_prefix": planned.role_prefix})
        return
    for statement in planned.grants:
        typer.echo(f"{statement};")
    if planned.grants:
        say(_WHAT_NEXT.format(prefix=planned.role_prefix))
    else:
        say(f"Nothing to do: roles {planned.role_prefix}* have their rights.")
