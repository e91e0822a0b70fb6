"""The main job: run."""

import threading
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import database_of
from pipeline.cli.command import Servers, command
from pipeline.cli.flow_options import BY_SIGNAL, EXITS, UntilEnd, Workers
from pipeline.errors import PipelineError, TransientError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from pipeline.cli.flow import Job
    from pipeline.readmodel import Projector

REBUILD_RETRY_S = 10.0
"""Wait before a rebuild is attempted again after a server became unavailable."""


@command(EXITS, servers=Servers.BOTH, by_signal=BY_SIGNAL)
def run(
    ctx: typer.Context,
    until_end: UntilEnd = False,
    workers: Workers = 1,
    rebuild_stale: Annotated[
        bool,
        typer.Option(
            "--rebuild-stale",
            help="Rebuild read models whose definition has changed, beside the live tables.",
        ),
    ] = False,
) -> None:
    """Ingest and project, until stopped: the main job.

    Each batch of records of PIPELINE_TOPICS is written to pipeline.events in one transaction with
    its next offset; read models follow. Any number of these commands, on any number of machines,
    share the partitions.

    \b
    $ pipeline run
    $ pipeline run --until-end     # catch up, then end
    $ pipeline run --workers 4     # four processes
    """
    from pipeline.cli.flow import side_by_side, started

    with started(ctx, "run", workers, until_end=until_end) as job:
        rebuilding = threading.Thread(target=_rebuild_stale, args=[job], name="rebuild")
        rebuild_stale = rebuild_stale and job.worker in (None, 1)
        if rebuild_stale:
            rebuilding.start()
        try:
            side_by_side(job, until_end=until_end)
        except PipelineError:
            job.stop.set()
            raise
        finally:
            if rebuild_stale:
                rebuilding.join()


def _rebuild_stale(job: "Job") -> None:
    """Rebuild read models that were built by another definition. A failure does not end `run`."""
    from pipeline import catalogue

    # Its statements may take long, so it has a database of its own.
    with database_of(job.settings, "rebuild") as engine:
        for projector in catalogue.load(job.settings.read_models).models:
            _rebuild_if_stale(job, engine, projector)


def _rebuild_if_stale(job: "Job", engine: "Engine", projector: "Projector") -> None:
    import structlog

    from pipeline.db import transaction
    from pipeline.projection.checkpoints import fingerprints
    from pipeline.readmodel.fingerprint import fingerprint
    from pipeline.rebuild.rebuild import rebuild

    log = structlog.get_logger("pipeline.cli")
    logged = ""
    while not job.stop.is_set():
        try:
            with transaction(engine) as db:
                built = fingerprints(db).get(projector.name)
            if built not in (None, fingerprint(projector)):
                rebuild(
                    engine,
                    projector,
                    rejected_max=job.settings.dead_letter_budget,
                    stop=job.stop,
                )
        except TransientError as error:
            if str(error) != logged:
                logged = str(error)
                log.warning(
                    "rebuild_waits",
                    projector=projector.name,
                    reason=logged,
                    effect=f"tried again every {REBUILD_RETRY_S:.0f} s",
                )
            job.stop.wait(REBUILD_RETRY_S)
        except PipelineError as error:
            log.error(  # noqa: TRY400 - the text says it all; a traceback is for defects
                "not_rebuilt", projector=projector.name, reason=str(error)
            )
            break
        else:
            break
