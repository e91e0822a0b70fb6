"""How fast a table was filled, measured by PostgreSQL's clock."""

from collections.abc import Callable
from typing import Any

from benchmarks.report import Run
from benchmarks.stage import Finished, Stage
from tests.servers.databases import Database

# ``ingested_at`` is the time at which a transaction began, so this is the time from the first
# batch's beginning to the last one's, and the rows written in between: start and end are left out.
STEADY = """
WITH batches AS (SELECT ingested_at, count(*) AS rows FROM {table} GROUP BY 1)
SELECT sum(rows) - (SELECT rows FROM batches ORDER BY ingested_at DESC LIMIT 1),
    extract(epoch FROM max(ingested_at) - min(ingested_at))
FROM batches
"""


def fill(
    stage: Stage,
    database: Database,
    rows: int,
    work: Callable[[], Finished],
    *,
    table: str = "pipeline.events",
) -> Run:
    """Do the work, which fills a table that has a column ``ingested_at DEFAULT now()``.

    Args:
        stage: The servers.
        database: The database of the table.
        rows: The number of rows that it must hold afterwards.
        work: From reading to the last commit.
        table: Its name.
    """
    before = stage.server_cpu_s()
    finished = work()
    server_us = stage.server_us(before, rows)
    assert one_row(database, f"SELECT count(*) FROM {table}") == (rows,)
    steady_rows, seconds = one_row(database, STEADY.format(table=table))
    return Run(
        rate=float(steady_rows) / float(seconds),
        client_us=finished.cpu_s / rows * 1e6,
        server_us=server_us,
        whole_rate=rows / finished.seconds,
    )


def one_row(database: Database, query: str) -> tuple[Any, ...]:
    """The first row of a query."""
    with database.connect() as connection:
        found = connection.execute(query.encode()).fetchone()
    assert found is not None
    return found
