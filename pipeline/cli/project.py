"""The log into read models: project."""

import typer

from pipeline.cli.app import app
from pipeline.cli.flow import (
    EXIT_CODES,
    UntilEnd,
    Workers,
    project_to_the_end,
    project_until_stopped,
    started,
)


@app.command(epilog=EXIT_CODES)
def project(ctx: typer.Context, until_end: UntilEnd = False, workers: Workers = 1) -> None:
    """The log into read models: the other half of `run`. Needs the database only.

    \b
    $ pipeline project
    $ pipeline project --until-end
    """
    with started(ctx, "project", workers, until_end=until_end) as job:
        if until_end:
            project_to_the_end(job)
        else:
            project_until_stopped(job, job.stop)
