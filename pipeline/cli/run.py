"""The main job: run."""

import typer

from pipeline.cli.app import app
from pipeline.cli.flow import EXIT_CODES, UntilEnd, Workers, side_by_side, started


@app.command(epilog=EXIT_CODES)
def run(ctx: typer.Context, until_end: UntilEnd = False, workers: Workers = 1) -> None:
    """The main job: ingest and project until stopped.

    Every record of PIPELINE_TOPICS goes into pipeline.events with its next offset in one
    transaction; read models follow. A read model whose definition has changed is rebuilt beside its
    live table. Start as many as you like, on as many machines, they share the partitions.

    \b
    $ pipeline run
    $ pipeline run --until-end     # catch up, then end
    $ pipeline run --workers 4     # four processes
    """
    with started(ctx, "run", workers, until_end=until_end) as job:
        side_by_side(job, until_end=until_end)
