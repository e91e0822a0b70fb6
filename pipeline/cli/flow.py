"""What run, ingest and project do. They run until stopped, or to the end.

On the first signal the current batch is finished. The second signal ends the process at once; that
batch is then read again. With several workers, the parent process handles the second signal.
"""

import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import structlog
import typer
from sqlalchemy import Engine

from pipeline import catalogue
from pipeline.cli.app import database_of, projection_limits, settings_of, versions
from pipeline.cli.output import Gauge
from pipeline.cli.supervisor import become_worker
from pipeline.cli.tally import Tally
from pipeline.db import LOG_SCHEMA
from pipeline.db.session import address_of
from pipeline.errors import PipelineError, RefusedError, Server, TransientError
from pipeline.foreign_objects import OUR_SCHEMAS
from pipeline.ingest.process import Progress as Ingested
from pipeline.ingest.service import Ingest
from pipeline.kafka.metadata import Brokers
from pipeline.kafka.reports import ClientReports
from pipeline.outages import OutageLog, OutagePolicy
from pipeline.projection.loop import ProjectionProgress as Projected
from pipeline.projection.loop import run_projection
from pipeline.rebuild.stale import StaleModels
from pipeline.schema.bookkeeping import check_tables
from pipeline.schema.objects import declared_fingerprints
from pipeline.schema.revisions import check_schema
from pipeline.settings import Settings
from pipeline.signals import Stop, stopped_by_signals

log = structlog.get_logger("pipeline.cli")

LAST_PASS_S_MAX = 10.0
"""Maximum wait for the current pass of the projection, when a stop is requested."""


@dataclass(frozen=True)
class Job:
    """What the halves need.

    Attributes:
        worker: Which of several workers this process is; None if it is the only one.
        tally: Counts records, for the log.
        outages: Logs the outages of this process.
    """

    settings: Settings
    engine: Engine
    stop: Stop
    worker: int | None
    tally: Tally
    outages: OutageLog


# ------------------------------------------------------------------------------------- the frame


@contextmanager
def started(ctx: typer.Context, command: str, workers: int, *, until_end: bool) -> Iterator[Job]:
    """Settings, database, signals, the first and the last line of the log.

    With several workers the block runs in each of them.
    """
    settings = settings_of(ctx, log_level="info")
    worker = None
    if workers > 1:
        _check_once(settings, command)
        worker = become_worker(workers, until_end=until_end)
        settings = _named(settings_of(ctx, log_level="info"), worker)
    with (
        database_of(settings, command, pool_size=6, answers_soon=True) as engine,
        stopped_by_signals(second_ends=worker is None) as stop,
    ):
        log.info("started", command=command, **_who(settings), **versions())
        started_at, outages = time.monotonic(), OutageLog()
        tally = Tally(outages)
        try:
            schemas = (LOG_SCHEMA,) if command == "ingest" else OUR_SCHEMAS
            declared = catalogue.load(settings.read_models)
            _wait_for_schema(engine, stop, schemas, declared, outages, until_end=until_end)
            if worker == 1 and command != "project":
                _warn_of_too_many(settings, workers)
            yield Job(settings, engine, stop, worker, tally, outages)
        except PipelineError as error:
            log.error(  # noqa: TRY400 - a traceback is for defects
                "stopped",
                command=command,
                # Why each partition is halted is in a line of its own.
                reason="partitions are halted, see the lines before this one"
                if isinstance(error, RefusedError)
                else str(error),
                **{"error.type": type(error).__name__},
                exit_code=int(error.exit_code),
            )
            raise typer.Exit(error.exit_code) from None
        log.info(
            "stopped",
            command=command,
            reason=stop.reason if stop.is_set() else "reached the end",
            after_s=round(time.monotonic() - started_at, 1),
            **tally.totals,
            exit_code=stop.exit_code,
        )
        if stop.exit_code:
            raise typer.Exit(stop.exit_code)


def _check_once(settings: Settings, command: str) -> None:
    """Raise here once what each worker would raise."""
    settings.database()
    if command != "project":
        settings.kafka_client()


def _named(settings: Settings, worker: int) -> Settings:
    """With a name of its own in the group: two members with one name fence each other."""
    if settings.group_instance_id is None:
        return settings
    own = f"{settings.group_instance_id}-{worker}"
    return settings.model_copy(update={"group_instance_id": own})


def _warn_of_too_many(settings: Settings, workers: int) -> None:
    try:
        with closing(Brokers(settings, ClientReports())) as brokers:
            partitions = sum(map(brokers.partition_count, settings.topics))
    except PipelineError as error:
        log.debug("partitions_not_counted", reason=str(error))
        return
    if partitions < workers:
        log.warning(
            "workers_without_partition",
            workers=workers,
            partitions=partitions,
            effect="only one worker can read a partition; the additional workers are idle",
        )


def _wait_for_schema(
    engine: Engine,
    stop: threading.Event,
    schemas: Sequence[str],
    declared: catalogue.Catalogue,
    log_of_outages: OutageLog,
    *,
    until_end: bool,
) -> None:
    """Check the schema as soon as the database is available; return if a stop is requested."""
    outages = OutagePolicy(waits_forever=not until_end, outages=log_of_outages)
    while not stop.is_set():
        try:
            check_schema(engine)
            check_tables(engine, schemas, declared)
        except TransientError as error:
            stop.wait(outages.on_error(error))
        else:
            outages.on_success(Server.POSTGRESQL)
            return


def _who(settings: Settings) -> dict[str, object]:
    """The host and process, and what it works on; no secrets."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "database": address_of(settings.database()),
        "kafka": settings.kafka_bootstrap_servers,
        "group": settings.group_id,
        "topics": list(settings.topics),
    }


# ----------------------------------------------------------------------------------- the two halves


def ingest_until_stopped(job: Job) -> None:
    """Read Kafka until a signal stops it."""
    ingest = Ingest(
        job.settings,
        job.engine,
        stop=job.stop,
        observe=job.tally.of_ingest(),
        collect_garbage=gc.collect,
        outages=job.outages,
    )
    with _tuned_interpreter():
        ingest.run()


@contextmanager
def _tuned_interpreter() -> Iterator[None]:
    """Settings of the interpreter for two threads and many short-lived rows.

    They hold for the whole process, so the command applies them. Measured in benchmarks/ingest.py.
    While rows are read, the writer's thread needs the interpreter after each piece that it sends;
    the default of 5 ms makes it wait longer than PostgreSQL works. And rows contain no cycles, so
    automatic garbage collection would visit them for nothing: the loop collects with its checks.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.000_5)
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        sys.setswitchinterval(interval)


def project_until_stopped(job: Job, stop: threading.Event) -> None:
    """Project until ``stop`` is set; meanwhile rebuild what another definition built."""
    ended = threading.Event()
    rebuilding = threading.Thread(
        target=_stale_models(job, waits_forever=True).keep_current,
        args=[lambda: database_of(job.settings, "rebuild"), ended],
        name="rebuild",
        daemon=True,
    )
    rebuilding.start()
    try:
        run_projection(
            job.engine,
            catalogue.load(job.settings.read_models).models,
            projection_limits(job.settings),
            stop=stop,
            observe=job.tally.of_projection(),
            outages=job.outages,
        )
    finally:
        ended.set()
        rebuilding.join(LAST_PASS_S_MAX)


def _stale_models(job: Job, *, waits_forever: bool) -> StaleModels:
    return StaleModels(
        job.engine,
        catalogue.load(job.settings.read_models).models,
        declared_fingerprints,
        rejected_max=job.settings.dead_letter_budget,
        waits_forever=waits_forever,
        outages=job.outages,
    )


def project_to_the_end(job: Job) -> None:
    """Rebuild what another definition built, then project what the log holds, with progress."""
    _stale_models(job, waits_forever=False).rebuild(
        lambda: database_of(job.settings, "rebuild"), job.stop
    )
    bar = job.worker is None
    with Gauge("projecting", unit="offsets", plain=False, bar=bar) as gauge:
        count, show = job.tally.of_projection(), show_projection(gauge)

        def observe(progress: Projected) -> None:
            count(progress)
            show(progress)

        run_projection(
            job.engine,
            catalogue.load(job.settings.read_models).models,
            projection_limits(job.settings),
            stop=job.stop,
            until_end=True,
            observe=observe,
            outages=job.outages,
        )


def show_projection(gauge: Gauge) -> Callable[[Projected], None]:
    """Show the progress of a projection, which reports its lag before each pass."""
    taken_before = 0

    def observe(progress: Projected) -> None:
        nonlocal taken_before
        gauge.show(progress.taken, max(progress.taken, taken_before + progress.lag))
        taken_before = progress.taken

    return observe


def ingest_to_the_end(job: Job) -> None:
    """Read what Kafka holds at the start, and show how far it is."""
    with Gauge("ingesting", plain=False, bar=job.worker is None) as gauge:
        count = job.tally.of_ingest()

        def observe(progress: Ingested) -> None:
            count(progress)
            gauge.show(progress.written, progress.written + progress.lag)

        ingest = Ingest(
            job.settings,
            job.engine,
            stop=job.stop,
            until_end=True,
            observe=observe,
            collect_garbage=gc.collect,
            outages=job.outages,
        )
        with _tuned_interpreter():
            ingest.run()


def side_by_side(job: Job, *, until_end: bool) -> None:
    """Ingest here, project in a thread; the first half to fail stops the other and is raised."""
    end_projection = threading.Event()
    failures: list[Exception] = []

    def half(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - raised below, in the main thread
            failures.append(error)
            # If a partition is halted, the events of the others are still projected.
            if not isinstance(error, RefusedError):
                job.stop.set()
        if job.stop.is_set():
            end_projection.set()

    def follow() -> None:
        project_until_stopped(job, end_projection)

    # A daemon: a PostgreSQL that does not answer must not keep the process alive.
    projection = threading.Thread(target=half, args=[follow], name="projection", daemon=True)
    projection.start()
    if until_end:
        half(lambda: ingest_to_the_end(job))
    else:
        half(lambda: ingest_until_stopped(job))
    end_projection.set()
    projection.join(LAST_PASS_S_MAX if job.stop.is_set() else None)
    if projection.is_alive():
        log.warning(
            "projection_not_ended",
            waited_s=LAST_PASS_S_MAX,
            effect="PostgreSQL rolls back its pass; nothing is lost",
        )
    if until_end and not job.stop.is_set():
        half(lambda: project_to_the_end(job))
    if failures:
        raise failures[0]
