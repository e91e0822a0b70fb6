"""The command that computes read models anew: rebuild."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Annotated

import typer
from sqlalchemy import Engine

from pipeline import catalogue
from pipeline.cli.app import app, database_of, projection_limits, settings_of
from pipeline.cli.arguments import read_models
from pipeline.cli.flow import show_projection
from pipeline.cli.output import Gauge, emit, say, table
from pipeline.errors import ExitCode
from pipeline.readmodel import Projector
from pipeline.rebuild.rebuild import (
    Difference,
    RebuildProgress,
    StoppedError,
    check,
    rebuild_in_place,
)
from pipeline.rebuild.rebuild import rebuild as rebuild_beside
from pipeline.schema.migrate import check_schema, check_tables
from pipeline.settings import Settings
from pipeline.signals import stopped_by_signals

JOBS_MAX = 64


@app.command(
    epilog="Exit codes: 0 done, also when stopped by SIGTERM or Ctrl-C: the same command continues "
    "from there; 128 + the signal's number when stopped by another signal, and when --check was "
    "stopped before all was compared; 1 --check found rows that differ; 2 wrong usage; 69 the "
    "database is away or the tables are in use; 75 another rebuild of it runs; 78 a setting, a "
    "right or the schema is wrong."
)
def rebuild(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Read models, by their main table."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every read model.")] = False,
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="Truncate and refill: less room, but readers see it fill."),
    ] = False,
    only_check: Annotated[
        bool, typer.Option("--check", help="Compare with what the log gives; change nothing.")
    ] = False,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            max=JOBS_MAX,
            help="Connections that work at once, not --in-place; each keeps a core of the database "
            "busy.",
        ),
    ] = 2,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document, for programs.")
    ] = False,
) -> None:
    """Compute read models anew, and count what differed.

    Each is computed from the log beside the live table, which is then made equal. Readers see the
    old table until then, and live traffic goes on. How many rows differed is the proof (0) or the
    alarm. Stopped or killed, the same command goes on.

    \b
    $ pipeline rebuild orders
    $ pipeline rebuild --all --jobs 4
    $ pipeline rebuild --all --check
    """
    if bool(names) == everything:
        raise typer.BadParameter("name read models, or give --all")
    if in_place and only_check:
        raise typer.BadParameter("--check changes nothing, so it does not go with --in-place")
    settings = settings_of(ctx)
    chosen = read_models(settings, names or [])
    done: dict[str, Difference] = {}
    with (
        # Each read model that is rebuilt has one connection more, for its lock.
        database_of(settings, "rebuild", pool_size=2 * jobs + 1) as engine,
        stopped_by_signals() as stop,
    ):
        check_schema(engine)
        check_tables(engine, catalogue=catalogue.load(settings.read_models))
        try:
            if in_place:
                for projector in chosen:
                    _raise_if(stop, f"stopped before {projector.name}")
                    _refill(engine, projector, settings, stop)
            else:
                for one in _compute(engine, chosen, settings, stop, jobs, only_check=only_check):
                    done[one.projector] = one
        except StoppedError as error:
            say(f"pipeline: {error}")
        finally:
            found = [done[one.name] for one in chosen if one.name in done]
            if not in_place:
                _show_differences(found, repaired=not only_check, as_json=as_json)
    if only_check and any(one.differing for one in found):
        raise typer.Exit(ExitCode.FOUND)
    if only_check and len(found) < len(chosen):
        # What was not compared must not pass for equal.
        raise typer.Exit(128 + stop.number)
    raise typer.Exit(stop.exit_code)


def _compute(
    engine: Engine,
    chosen: Sequence[Projector],
    settings: Settings,
    stop: threading.Event,
    jobs: int,
    *,
    only_check: bool,
) -> Iterator[Difference]:
    """Read models as they get done: several at once, each with its share of the connections."""
    verb, compute = ("checking", check) if only_check else ("rebuilding", rebuild_beside)
    what = chosen[0].name if len(chosen) == 1 else f"{len(chosen)} read models"
    at_once = min(jobs, len(chosen))

    def compute_one(projector: Projector) -> Difference:
        _raise_if(stop, f"stopped before {projector.name}")
        return compute(
            engine,
            projector,
            rejected_max=settings.dead_letter_budget,
            jobs=jobs // at_once,
            stop=stop,
            observe=partial(shown.show, projector),
        )

    with Gauge(f"{verb} {what}", unit="offsets") as gauge, ThreadPoolExecutor(at_once) as crew:
        shown = _Shown(gauge, len(chosen))
        at_work = [crew.submit(compute_one, projector) for projector in chosen]
        try:
            for one in as_completed(at_work):
                yield one.result()
        finally:
            # If one has failed, the others end where they can be gone on with.
            if not all(one.done() for one in at_work):
                stop.set()


class _Shown:
    """How far several rebuilds are, together."""

    def __init__(self, gauge: Gauge, read_models: int) -> None:
        self._gauge = gauge
        self._read_models = read_models
        self._of: dict[str, RebuildProgress] = {}
        self._one_at_a_time = threading.Lock()

    def show(self, projector: Projector, progress: RebuildProgress) -> None:
        with self._one_at_a_time:
            self._of[projector.name] = progress
            # Each of them takes the same log.
            total = max(one.total for one in self._of.values()) * self._read_models
            self._gauge.show(sum(one.done for one in self._of.values()), total)


def _refill(
    engine: Engine, projector: Projector, settings: Settings, stop: threading.Event
) -> None:
    with Gauge(f"refilling {projector.name}", unit="offsets") as gauge:
        rebuild_in_place(
            engine,
            projector,
            projection_limits(settings),
            stop=stop,
            observe=show_projection(gauge),
        )
    _raise_if(stop, f"{projector.name}: stopped; it goes on filling as soon as `run` does")
    say(f"{projector.name}: refilled.")


def _raise_if(stop: threading.Event, what: str) -> None:
    if stop.is_set():
        raise StoppedError(what)


def _show_differences(done: Sequence[Difference], *, repaired: bool, as_json: bool) -> None:
    if as_json:
        emit([{**one._asdict(), "differing": one.differing} for one in done])
        return
    if not done:
        return
    table(
        ["read model", "rows", "missing", "changed", "surplus", "dead letters"],
        [(d.projector, d.rows, d.missing, d.changed, d.surplus, d.dead_letters) for d in done],
    )
    differing = sum(one.differing for one in done)
    say(
        "0 rows differ."
        if not differing
        else f"{differing:,} rows {'differed and were put right' if repaired else 'differ'}."
    )
    for one in done:
        if one.behind:
            say(
                f"{one.projector}: it was {one.behind:,} records behind, so that some of these "
                "rows are no fault."
            )
