"""Kafka to the log: ingest."""

import typer

from pipeline.cli.command import Servers, command
from pipeline.cli.flow_options import BY_SIGNAL, EXITS, UntilEnd, Workers


@command(EXITS, servers=Servers.BOTH, by_signal=BY_SIGNAL)
def ingest(ctx: typer.Context, until_end: UntilEnd = False, workers: Workers = 1) -> None:
    """Write Kafka's records to the log: one half of `run`.

    \b
    $ pipeline ingest
    $ pipeline ingest --until-end  # write the records that Kafka has now, then end
    """
    from pipeline.cli.flow import ingest_to_the_end, ingest_until_stopped, started

    with started(ctx, "ingest", workers, until_end=until_end) as job:
        if until_end:
            ingest_to_the_end(job)
        else:
            ingest_until_stopped(job)
