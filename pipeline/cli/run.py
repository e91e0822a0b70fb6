"""The main job: run."""

import typer

from pipeline.cli.command import Servers, command
from pipeline.cli.flow_options import BY_SIGNAL, EXITS, UntilEnd, Workers


@command(EXITS, servers=Servers.BOTH, by_signal=BY_SIGNAL)
def run(ctx: typer.Context, until_end: UntilEnd = False, workers: Workers = 1) -> None:
    """Ingest and project until stopped. This is the main command.

    It writes each batch of records of PIPELINE_TOPICS to pipeline.events in one transaction with
    the next offset, then applies the events to the read models. A read model whose definition has
    changed is rebuilt beside its live table. You can run this command any number of times, on any
    number of machines: the processes share the partitions.

    \b
    $ pipeline run
    $ pipeline run --until-end     # catch up, then end
    $ pipeline run --workers 4     # four processes
    """
    from pipeline.cli.flow import side_by_side, started

    with started(ctx, "run", workers, until_end=until_end) as job:
        side_by_side(job, until_end=until_end)
