"""The main job: run."""

import threading
from typing import Annotated

import structlog
import typer
from sqlalchemy import Engine

from pipeline import catalogue
from pipeline.cli.app import app, database_of
from pipeline.cli.flow import EXIT_CODES, Job, UntilEnd, Workers, side_by_side, started
from pipeline.db import transaction
from pipeline.errors import PipelineError, TransientError
from pipeline.projection.checkpoints import fingerprints
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.readmodel.model import Projector
from pipeline.rebuild.rebuild import rebuild

log = structlog.get_logger("pipeline.cli")

REBUILD_RETRY_S = 10.0
"""Wait before a rebuild is tried again whose server went away."""


@app.command(epilog=EXIT_CODES)
def run(
    ctx: typer.Context,
    until_end: UntilEnd = False,
    workers: Workers = 1,
    rebuild_stale: Annotated[
        bool,
        typer.Option(
            "--rebuild-stale",
            help="Rebuild read models whose definition has changed, meanwhile and beside them.",
        ),
    ] = False,
) -> None:
    """The main job: ingest and project until stopped.

    Every record of PIPELINE_TOPICS goes into pipeline.events with its next offset in one
    transaction; read models follow. Start as many as you like, on as many machines, they share
    the partitions.

    \b
    $ pipeline run
    $ pipeline run --until-end     # catch up, then end
    $ pipeline run --workers 4     # four processes
    """
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


def _rebuild_stale(job: Job) -> None:
    """Rebuild what was built by another definition; no failure here stops what runs beside."""
    # Its statements may take long, so it has a database of its own.
    with database_of(job.settings, "rebuild") as engine:
        for projector in catalogue.load(job.settings.read_models).models:
            _rebuild_if_stale(job, engine, projector)


def _rebuild_if_stale(job: Job, engine: Engine, projector: Projector) -> None:
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
