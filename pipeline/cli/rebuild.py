"""The command that computes read models anew: rebuild."""

import threading
from collections.abc import Sequence
from typing import Annotated

import typer
from sqlalchemy import Engine

from pipeline.cli.app import app, database_of, projection_limits, settings_of
from pipeline.cli.flow import show_projection, stopped_by_signals
from pipeline.cli.terminal import Gauge, emit, say, table
from pipeline.errors import ExitCode
from pipeline.migrate import check_schema
from pipeline.projection import Projector
from pipeline.projection.rebuild import (
    Difference,
    RebuildProgress,
    StoppedError,
    check,
    rebuild_in_place,
)
from pipeline.projection.rebuild import rebuild as rebuild_beside
from pipeline.projectors import discover
from pipeline.settings import Settings


@app.command(
    epilog="Exit codes: 0 done, also when stopped: the same command goes on; 1 --check found rows "
    "that differ; 2 wrong usage; 69 the database is away or the tables are in use; 75 another "
    "rebuild of it runs; 78 a setting, a right or the schema is wrong."
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
    $ pipeline rebuild --all --check
    """
    if bool(names) == everything:
        raise typer.BadParameter("name read models, or give --all")
    if in_place and only_check:
        raise typer.BadParameter("--check changes nothing, so it does not go with --in-place")
    chosen = list(discover()) if everything else known(names or [])
    settings = settings_of(ctx)
    done: list[Difference] = []
    with database_of(settings, "rebuild") as engine, stopped_by_signals() as stop:
        check_schema(engine)
        try:
            for projector in chosen:
                _raise_if(stop, f"stopped before {projector.name}")
                if in_place:
                    _refill(engine, projector, settings, stop)
                else:
                    done.append(_compute(engine, projector, settings, stop, only_check=only_check))
        except StoppedError as error:
            say(f"pipeline: {error}")
        finally:
            if not in_place:
                _show_differences(done, repaired=not only_check, as_json=as_json)
    if only_check and any(one.differing for one in done):
        raise typer.Exit(ExitCode.FOUND)


def _compute(
    engine: Engine,
    projector: Projector,
    settings: Settings,
    stop: threading.Event,
    *,
    only_check: bool,
) -> Difference:
    what = f"{'checking' if only_check else 'rebuilding'} {projector.name}"
    with Gauge(what, unit="offsets") as gauge:

        def observe(progress: RebuildProgress) -> None:
            gauge.show(progress.done, progress.total)

        return (check if only_check else rebuild_beside)(
            engine,
            projector,
            guilty_max=settings.dead_letter_budget,
            stop=stop,
            observe=observe,
        )


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


def known(names: Sequence[str]) -> list[Projector]:
    """The read models of these names; wrong usage if one does not exist."""
    by_name = {one.name: one for one in discover()}
    if unknown := [name for name in names if name not in by_name]:
        raise typer.BadParameter(
            f"no read model {', '.join(unknown)}; there are {', '.join(by_name)}"
        )
    return [by_name[name] for name in dict.fromkeys(names)]
