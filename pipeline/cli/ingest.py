"""Kafka into the log: ingest."""

import typer

from pipeline.cli.app import app
from pipeline.cli.flow import (
    EXIT_CODES,
    UntilEnd,
    Workers,
    ingest_to_the_end,
    ingest_until_stopped,
    started,
)


@app.command(epilog=EXIT_CODES)
def ingest(ctx: typer.Context, until_end: UntilEnd = False, workers: Workers = 1) -> None:
    """Kafka into the log, exactly once: one half of `run`.

    \b
    $ pipeline ingest
    $ pipeline ingest --until-end  # fill the log with what is there, then end
    """
    with started(ctx, "ingest", workers, until_end=until_end) as job:
        if until_end:
            ingest_to_the_end(job)
        else:
            ingest_until_stopped(job)
