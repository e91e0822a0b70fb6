"""The gain of more workers and the cost of many partitions: ``ingest`` and ``project``, in turn.

Workers are processes of one command. Each reads, and projects, partitions of its own.
"""

from collections.abc import Sequence
from functools import partial

from benchmarks.filling import fill, one_row
from benchmarks.projection import empty_all
from benchmarks.report import Run, Section, Ways, ways_bars, ways_table
from benchmarks.stage import PARTITIONS, Stage
from pipeline import catalogue
from tests.servers.databases import Database

INGESTING = ((6, 1), (6, 2), (6, 4), (1, 1), (50, 1), (50, 4))
"""Partitions of the topic, and workers; the others are compared with the first."""
PROJECTING = (1, 2, 4)
"""Numbers of workers, for a log of ``PARTITIONS``."""
EVENTS = 400_000
PROJECTED = 200_000
QUICK_INGESTING = ((6, 1), (6, 2), (50, 1))
QUICK_PROJECTING = (1, 2)
QUICK_EVENTS = 20_000
# A worker that joins is noticed with the others' next heartbeat, after three seconds by default and
# more than once until all share: as long as the whole backlog takes here.
KAFKA_OPTIONS = "heartbeat.interval.ms=200"
CONTENT = "SELECT " + ", ".join(
    f"(SELECT (count(*), bit_xor(hashtextextended(CAST(t AS text), 0))) FROM {table.fullname} t)"
    for model in catalogue.load().models
    for table in model.tables
)
"""The number of rows of each table of a read model, and their digest."""


def measure(stage: Stage, pairs: int, *, quick: bool) -> Section:
    """Work off the same backlog with several numbers of workers and partitions, in turn.

    Args:
        stage: The servers.
        pairs: How often each way is measured, if not quick.
        quick: Few events, and each way once.
    """
    if quick:
        events = projected = QUICK_EVENTS
        ingesting = _ingesting(stage, events, 1, QUICK_INGESTING)
        projecting = _projecting(stage, projected, 1, QUICK_PROJECTING)
    else:
        events, projected = EVENTS, PROJECTED
        ingesting = _ingesting(stage, events, pairs, INGESTING)
        projecting = _projecting(stage, projected, pairs, PROJECTING)
    return Section(
        "Workers and partitions",
        f"{events:,} simulated events per topic, `pipeline ingest --until-end --workers N` with "
        f"`{KAFKA_OPTIONS}`; by default, 3,000, the workers share the partitions some seconds "
        "later. Rate: rows per second from the beginning of the first batch to that of the last, "
        "by PostgreSQL's clock; then from the start of the command to its end. `pipeline project "
        f"--until-end --workers N`, by default settings: all read models of a log of {projected:,} "
        f"events in {PARTITIONS} partitions; rate from the start of the command to its end. CPU is "
        "that of the whole command, all its processes.",
        [*ways_table(ingesting), "", *ways_table(projecting)],
        [
            ways_bars("workers-ingest", "Ingest by workers and partitions", ingesting),
            ways_bars("workers-project", "Projection by workers", projecting, "events/s"),
        ],
    )


def _ingesting(
    stage: Stage, events: int, turns: int, to_measure: Sequence[tuple[int, int]]
) -> Ways:
    counts = {partitions for partitions, _ in to_measure}
    topics = {partitions: stage.load(events, partitions=partitions) for partitions in counts}
    stage.warm_up(topics[to_measure[0][0]])
    ways: dict[str, list[Run]] = {}
    for _ in range(turns):
        for partitions, workers in to_measure:
            name = f"pipeline ingest, {_number(partitions, 'partition')}, {_workers(workers)}"
            with stage.database() as database:
                work = partial(
                    stage.ingest,
                    topics[partitions],
                    database,
                    workers=workers,
                    kafka_options=KAFKA_OPTIONS,
                )
                ways.setdefault(name, []).append(fill(stage, database, events, work))
    return ways


def _projecting(stage: Stage, events: int, turns: int, to_measure: Sequence[int]) -> Ways:
    ways: dict[str, list[Run]] = {}
    with stage.database() as database:
        stage.ingest(stage.load(events), database)
        stage.project(database)
        wanted = one_row(database, CONTENT)
        with database.connect() as connection:
            connection.execute("VACUUM ANALYZE")
        for _ in range(turns):
            for workers in to_measure:
                run = projected(stage, database, events, workers)
                assert one_row(database, CONTENT) == wanted
                ways.setdefault(f"pipeline project, {_workers(workers)}", []).append(run)
    return ways


def projected(stage: Stage, database: Database, events: int, workers: int) -> Run:
    """Fill all read models again from the log of a database."""
    with database.connect() as connection:
        empty_all(connection)
    stage.settle()
    before = stage.server_cpu_s()
    finished = stage.project(database, workers=workers)
    return Run(
        rate=events / finished.seconds,
        client_us=finished.cpu_s / events * 1e6,
        server_us=stage.server_us(before, events),
    )


def _workers(count: int) -> str:
    return _number(count, "worker")


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
