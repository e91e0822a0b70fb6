"""One busy partition of six, as in a topic keyed by tenant, beside six even ones, by turns."""

from functools import partial

from benchmarks.filling import fill
from benchmarks.report import Run, Section, ways_table
from benchmarks.stage import Stage
from benchmarks.workers import KAFKA_OPTIONS, projected
from pipeline.sandbox.simulator import Keying

EVENTS = 200_000
QUICK_EVENTS = 20_000
MEASURED = (Keying.USER, 1), (Keying.TENANT, 1), (Keying.USER, 2), (Keying.TENANT, 2)
"""The key of the topic and the number of workers; the others are compared with the first."""


def measure(stage: Stage, pairs: int, *, quick: bool) -> Section:
    """Ingest and project the same events, spread and in one partition.

    Args:
        stage: The servers.
        pairs: How often each way is measured.
        quick: Few events.
    """
    events = QUICK_EVENTS if quick else EVENTS
    topics = {keying: stage.load(events, keying=keying) for keying in (Keying.USER, Keying.TENANT)}
    stage.warm_up(topics[Keying.USER])
    ingesting: dict[str, list[Run]] = {}
    projecting: dict[str, list[Run]] = {}
    for _ in range(pairs):
        for keying, workers in MEASURED:
            name = f"{keying}, {workers} worker{'s' * (workers > 1)}"
            with stage.database() as database:
                work = partial(
                    stage.ingest,
                    topics[keying],
                    database,
                    workers=workers,
                    kafka_options=KAFKA_OPTIONS,
                )
                ingesting.setdefault(f"pipeline ingest, keyed by {name}", []).append(
                    fill(stage, database, events, work)
                )
                run = projected(stage, database, events, workers)
                projecting.setdefault(f"pipeline project, keyed by {name}", []).append(run)
    return Section(
        "Keying",
        f"{events:,} simulated events in a topic of 6 partitions: keyed by user, all partitions "
        'have some; keyed by tenant, one has everything. Rates as under "Workers and partitions".',
        [*ways_table(ingesting), "", *ways_table(projecting)],
    )
