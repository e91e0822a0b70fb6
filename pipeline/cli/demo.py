"""The command to try everything with: demo."""

from typing import Annotated

import typer

from pipeline.cli.app import app
from pipeline.errors import ConfigurationError


@app.command(
    epilog="Exit codes: 0 all that it claims was found true; 1 something was not; 78 a server "
    "could not be started here; 130 Ctrl-C before the end, or 128 + the number of another signal."
)
def demo(
    events: Annotated[
        int, typer.Option(min=2000, help="Events of the day at the broker.")
    ] = 24_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same day.")] = 7,
    stay: Annotated[
        bool | None,
        typer.Option(
            "--stay/--end",
            help="Stay up for a look around with psql; on a terminal it does.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """All of it, on servers of its own: nothing to set up.

    A day at a broker flows from Kafka into tables; a table is truncated, a read model rebuilt, a
    worker killed; every number is checked. Under a minute, and nothing is left behind.

    \b
    $ pipeline demo
    """
    try:
        from pipeline.sandbox.demo import run_demo
    except ImportError:
        raise ConfigurationError(
            "the demo needs its extra: pip install 'upvest-pipeline[demo]'"
        ) from None
    raise typer.Exit(run_demo(seed, events, stay=stay))
