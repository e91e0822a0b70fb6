"""The log to read models: project."""

import typer

from pipeline.cli.command import Servers, command
from pipeline.cli.flow_options import BY_SIGNAL, EXITS, UntilEnd, Workers


@command(EXITS, servers=Servers.DATABASE, by_signal=BY_SIGNAL)
def project(ctx: typer.Context, until_end: UntilEnd = False, workers: Workers = 1) -> None:
    """Build the read models from the log: the other half of `run`. It needs no Kafka.

    \b
    $ pipeline project
    $ pipeline project --until-end
    """
    from pipeline.cli.flow import project_to_the_end, project_until_stopped, started

    with started(ctx, "project", workers, until_end=until_end) as job:
        if until_end:
            project_to_the_end(job)
        else:
            project_until_stopped(job, job.stop)
