"""Everything on embedded servers: demo."""

from typing import Annotated

import typer

from pipeline.cli.command import Servers, command
from pipeline.errors import ConfigurationError, ExitCode


@command(
    {
        ExitCode.DONE: "all checks hold",
        ExitCode.FOUND: "a check failed",
        ExitCode.CONFIGURATION: "a server could not be started on this machine",
    },
    servers=Servers.NONE,
)
def demo(
    events: Annotated[
        int, typer.Option(min=2000, help="Number of events of the simulated day.")
    ] = 24_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same day.")] = 7,
    stay: Annotated[
        bool | None,
        typer.Option(
            "--stay/--end",
            help="--stay keeps the servers running, so that you can query them with psql; --end "
            "stops them at once. The default is --stay on a terminal, otherwise --end.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show the whole program with a simulated broker. It needs no configuration.

    It starts its own servers, and ingests and projects the events of a simulated day. Then it
    truncates a table, rebuilds a read model and kills a worker. At the end it checks all data. It
    takes less than a minute and leaves no files on the machine.

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
