"""Everything on embedded servers: demo."""

from typing import Annotated

import typer

from pipeline.cli.command import Servers, command
from pipeline.errors import ConfigurationError, ExitCode


@command(
    {
        ExitCode.DONE: "every claim was found true",
        ExitCode.FOUND: "a claim was not",
        ExitCode.CONFIGURATION: "a server could not be started on this machine",
    },
    servers=Servers.NONE,
)
def demo(
    events: Annotated[
        int, typer.Option(min=2000, help="How many events the simulated day has.")
    ] = 24_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same day.")] = 7,
    stay: Annotated[
        bool | None,
        typer.Option(
            "--stay/--end",
            help="Keep the servers for queries with psql, or end at once. The default is --stay "
            "on a terminal.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show everything, on servers of its own. It needs no configuration.

    A day at a broker flows from Kafka into tables; a table is truncated, a read model rebuilt, a
    worker killed; every number is checked. It takes less than a minute and leaves nothing on the
    machine.

    \b
    $ pipeline demo
    """
    try:
        from pipeline.sandbox.demo import run_demo
    except ImportError:
        raise ConfigurationError(
            "The demo needs the extra `demo`. Run pip install 'upvest-pipeline[demo]'."
        ) from None
    raise typer.Exit(run_demo(seed, events, stay=stay))
