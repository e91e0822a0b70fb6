"""``pipeline ingest`` against a bare COPY of the same rows into the same table.

Ours is the real command with everything on: consumer group, claim, fence, repeats, envelope, proof
that jsonb holds the same value. The bare side has the rows encoded in memory, as PostgreSQL's own
COPY TO BINARY gave them, and sends them in the same batches, each committed.
"""

import statistics
import time

import psycopg

from benchmarks.report import Pairs, Run, Section, table
from benchmarks.stage import Stage
from pipeline.db import open_engine, transaction
from pipeline.log import ownership
from pipeline.log.tables import events
from pipeline.positions import NextOffset
from pipeline.settings import Settings
from tests.servers.databases import Database

COLUMNS = ", ".join(f'"{column.name}"' for column in events.c if column.name != "ingested_at")
COPY_IN = f"COPY pipeline.events ({COLUMNS}) FROM STDIN (FORMAT binary)"
BATCHES = "SELECT ingested_at FROM pipeline.events GROUP BY 1 ORDER BY 1"
COPY_OUT = (
    f"COPY (SELECT {COLUMNS} FROM pipeline.events WHERE ingested_at = '{{}}' "
    "ORDER BY tableoid, ctid) TO STDOUT (FORMAT binary)"
)
# ingested_at is the time at which a batch began, so this is the time from the first batch's
# beginning to the last one's, and the rows written in between: start and end are left out.
STEADY = """
WITH batches AS (SELECT ingested_at, count(*) AS rows FROM pipeline.events GROUP BY 1)
SELECT sum(rows) - (SELECT rows FROM batches ORDER BY ingested_at DESC LIMIT 1),
       extract(epoch FROM max(ingested_at) - min(ingested_at))
FROM batches
"""
CONTENT = (
    f"SELECT count(*), bit_xor(hashtextextended(CAST(ROW({COLUMNS}) AS text), 0)) "
    "FROM pipeline.events"
)


def measure(stage: Stage, rows: int, pairs: int) -> Section:
    """Ingest a topic and copy the same rows, in turn.

    Args:
        stage: The servers.
        rows: How many events the topic holds.
        pairs: How often each side runs.
    """
    topic = stage.load(rows)
    measured = Pairs("pipeline ingest --until-end / bare COPY BINARY", target=0.5)
    whole = []
    start_cpu_s = 0.0
    batches: list[bytes] = []
    for _ in range(pairs):
        with stage.database() as database:
            before = stage.server_cpu_s()
            finished = stage.ingest(topic, database)
            server = stage.server_cpu_s()
            # Caught up already: what is left is the start and the end of the process.
            start_cpu_s = start_cpu_s or stage.ingest(topic, database).cpu_s
            client_cpu_s = finished.cpu_s - start_cpu_s
            measured.ours.append(_run(database, rows, client_cpu_s, before, server))
            whole.append(rows / finished.seconds)
            batches = batches or _dumped(database)
            wanted = _content(database)
        with stage.database() as database:
            _make_segment(database, topic)
            before = stage.server_cpu_s()
            client_cpu_s = _copy(database, batches)
            server = stage.server_cpu_s()
            measured.bare.append(_run(database, rows, client_cpu_s, before, server))
            assert _content(database) == wanted
    return Section(
        "Ingest",
        f"{rows:,} events of {sum(map(len, batches)) / rows:.0f} bytes a row, {len(batches)} "
        "batches. Rate: from the beginning of the first batch to that of the last, by PostgreSQL's "
        "clock. Both leave the same rows. The process's start and end cost "
        f"{start_cpu_s:.1f} s of CPU, which is left out of the table; with them it is "
        f"{statistics.median(whole):,.0f} events/s from the command to its end.",
        table([measured]),
    )


def _run(
    database: Database, rows: int, client_cpu_s: float, before: float | None, after: float | None
) -> Run:
    with database.connect() as connection:
        found = connection.execute(STEADY).fetchone()
    assert found is not None
    steady_rows, seconds = found
    return Run(
        rate=float(steady_rows) / float(seconds),
        client_us=client_cpu_s / rows * 1e6,
        server_us=None if before is None or after is None else (after - before) / rows * 1e6,
    )


def _dumped(database: Database) -> list[bytes]:
    """The batches of an ingest, as they went in, each ready for COPY."""
    with database.connect() as connection:
        moments = [str(moment) for (moment,) in connection.execute(BATCHES)]
        dumped = []
        for moment in moments:
            with connection.cursor().copy(COPY_OUT.format(moment)) as copy:
                dumped.append(b"".join(map(bytes, copy)))
    return dumped


def _copy(database: Database, batches: list[bytes]) -> float:
    """Send the batches, each in a transaction; the CPU that this took here."""
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        begun = time.process_time()
        for batch in batches:
            with connection.transaction(), connection.cursor().copy(COPY_IN) as copy:
                copy.write(batch)
        return time.process_time() - begun


def _make_segment(database: Database, topic: str) -> None:
    engine = open_engine(database.url, application="benchmark")
    span: int = Settings.model_fields["segment_offsets"].default
    with transaction(engine) as db:
        ownership.make_segment(db, topic, NextOffset(0), span)
    engine.dispose()


def _content(database: Database) -> tuple[object, ...]:
    """How many rows the log holds, and a sum over what is in them."""
    with database.connect() as connection:
        found = connection.execute(CONTENT).fetchone()
    assert found is not None
    return found
