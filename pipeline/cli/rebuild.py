"""Recomputes read models: rebuild."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import migrated_database_of, projection_limits, settings_of
from pipeline.cli.arguments import read_models
from pipeline.cli.command import AsJson, Servers, command
from pipeline.cli.output import Gauge, emit, say, table
from pipeline.counts import count
from pipeline.errors import ExitCode

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from pipeline.readmodel import Projector
    from pipeline.rebuild.rebuild import Difference, RebuildProgress
    from pipeline.settings import Settings

JOBS_MAX = 64


@command(
    {
        ExitCode.DONE: "done, or stopped by SIGTERM or Ctrl-C: repeat the command to resume",
        ExitCode.FOUND: "--check found rows that differ",
        ExitCode.UNAVAILABLE: "the database is unavailable, or the tables are in use",
        ExitCode.FENCED: "another rebuild of the read model is running",
    },
    servers=Servers.DATABASE,
    by_signal="128 + N stopped by another signal N, or by any signal N before --check was complete",
)
def rebuild(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Read models, by the name of their main table."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every read model.")] = False,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place",
            help="Truncate and refill the live table. It needs less disk space, but readers see an "
            "incomplete table meanwhile.",
        ),
    ] = False,
    only_check: Annotated[
        bool, typer.Option("--check", help="Compare with the log; change nothing.")
    ] = False,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            max=JOBS_MAX,
            help="Number of connections that work in parallel; each uses one core of the database "
            "server. --in-place uses only one.",
        ),
    ] = 2,
    as_json: AsJson = False,
) -> None:
    """Recompute read models from the log, and count differences.

    Each read model is computed beside its live table; then the rows that differ are repaired. Until
    then readers see the old rows, and `run` continues. If 0 rows differed, the live table was
    right. After a stop or a kill, repeat the command to resume.

    \b
    $ pipeline rebuild orders
    $ pipeline rebuild --all --jobs 4
    $ pipeline rebuild --all --check
    """
    from pipeline.rebuild.rebuild import StoppedError
    from pipeline.signals import stopped_by_signals

    if bool(names) == everything:
        raise typer.BadParameter("give either names of read models or --all")
    if in_place and only_check:
        raise typer.BadParameter("--check changes nothing, so it cannot be used with --in-place")
    settings = settings_of(ctx)
    chosen = read_models(settings, names or [])
    done: dict[str, Difference] = {}
    with (
        # Each read model that is rebuilt has one more connection, for its lock.
        migrated_database_of(
            settings, "rebuild", writes_read_models=True, pool_size=2 * jobs + 1
        ) as engine,
        stopped_by_signals() as stop,
    ):
        try:
            if in_place:
                for projector in chosen:
                    _raise_if(stop, f"stopped before {projector.name}")
                    _refill(engine, projector, settings, stop)
            else:
                for difference in _compute(
                    engine, chosen, settings, stop, jobs, only_check=only_check
                ):
                    done[difference.projector] = difference
        except StoppedError as error:
            say(f"pipeline: {error}")
        finally:
            found = [done[model.name] for model in chosen if model.name in done]
            if not in_place:
                _show_differences(found, repaired=not only_check, as_json=as_json)
    if only_check and any(difference.differing for difference in found):
        raise typer.Exit(ExitCode.FOUND)
    if only_check and len(found) < len(chosen):
        # Not compared does not mean equal.
        raise typer.Exit(128 + stop.number)
    raise typer.Exit(stop.exit_code)


def _compute(
    engine: "Engine",
    chosen: "Sequence[Projector]",
    settings: "Settings",
    stop: threading.Event,
    jobs: int,
    *,
    only_check: bool,
) -> "Iterator[Difference]":
    """Compute several read models in parallel, and return each when it is done."""
    from pipeline.rebuild import rebuild as rebuilding

    verb, compute = (
        ("checking", rebuilding.check) if only_check else ("rebuilding", rebuilding.rebuild)
    )
    what = chosen[0].name if len(chosen) == 1 else f"{len(chosen)} read models"
    at_once = min(jobs, len(chosen))

    def compute_one(projector: "Projector") -> "Difference":
        _raise_if(stop, f"stopped before {projector.name}")
        return compute(
            engine,
            projector,
            rejected_max=settings.dead_letter_budget,
            jobs=jobs // at_once,
            stop=stop,
            observe=partial(shown.show, projector),
        )

    with Gauge(f"{verb} {what}", unit="offsets") as gauge, ThreadPoolExecutor(at_once) as threads:
        shown = _Shown(gauge, len(chosen))
        futures = [threads.submit(compute_one, projector) for projector in chosen]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            # If one failed, the others stop where they can be continued.
            if not all(future.done() for future in futures):
                stop.set()


class _Shown:
    """The common progress of several rebuilds."""

    def __init__(self, gauge: Gauge, read_models: int) -> None:
        self._gauge = gauge
        self._read_models = read_models
        self._progress: dict[str, RebuildProgress] = {}
        self._lock = threading.Lock()

    def show(self, projector: "Projector", progress: "RebuildProgress") -> None:
        with self._lock:
            self._progress[projector.name] = progress
            # Each of them reads the same log.
            total = max(progress.total for progress in self._progress.values()) * self._read_models
            self._gauge.show(sum(progress.done for progress in self._progress.values()), total)


def _refill(
    engine: "Engine", projector: "Projector", settings: "Settings", stop: threading.Event
) -> None:
    from pipeline.cli.flow import show_projection
    from pipeline.rebuild.rebuild import rebuild_in_place

    with Gauge(f"refilling {projector.name}", unit="offsets") as gauge:
        rebuild_in_place(
            engine,
            projector,
            projection_limits(settings),
            stop=stop,
            observe=show_projection(gauge),
        )
    _raise_if(
        stop, f"{projector.name}: stopped before it was filled. `pipeline run` fills the rest"
    )
    say(f"{projector.name}: refilled.")


def _raise_if(stop: threading.Event, what: str) -> None:
    from pipeline.rebuild.rebuild import StoppedError

    if stop.is_set():
        raise StoppedError(what)


def _show_differences(done: "Sequence[Difference]", *, repaired: bool, as_json: bool) -> None:
    if as_json:
        emit([{**found._asdict(), "differing": found.differing} for found in done])
        return
    if not done:
        return
    table(
        ["read model", "rows", "missing", "changed", "surplus", "dead letters"],
        [(d.projector, d.rows, d.missing, d.changed, d.surplus, d.dead_letters) for d in done],
    )
    differing = sum(found.differing for found in done)
    if differing and repaired:
        say(f"{count(differing, 'row that differed was', 'rows that differed were')} repaired.")
    else:
        say(f"{count(differing, 'row differs', 'rows differ')}.")
    for found in done:
        if found.lag:
            say(
                f"{found.projector}: its lag was {count(found.lag, 'record')}, so some of these "
                "rows may differ only because of the lag. Repeat the command when the lag is 0."
            )
