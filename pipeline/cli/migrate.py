"""The command that prepares a database: migrate."""

from typing import Annotated

import typer

from pipeline import catalogue
from pipeline.cli.app import app, settings_of
from pipeline.cli.output import emit, say
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
