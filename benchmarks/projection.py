"""Projection and rebuild: of ``orders`` against a hand-written INSERT … SELECT, and of all models.

Ours has its checkpoints, its checks of every value and its batches. The bare side is one statement
over the whole log, with plain casts that would stop at the first bad value. Two jobs are measured
against one.
"""

import contextlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import LiteralString

import psycopg
from sqlalchemy import Engine

from benchmarks.report import Pairs, Run, Section, bars, table
from benchmarks.stage import Stage, run_process
from pipeline import catalogue
from pipeline.db import open_engine
from pipeline.projection.loop import run_projection
from pipeline.projectors.orders import orders
from pipeline.readmodel import Projector
from pipeline.rebuild.rebuild import rebuild
from tests.servers.databases import Database

MAKE_TWIN = """
CREATE SCHEMA benchmark;
CREATE TABLE benchmark.orders (LIKE upvest.orders INCLUDING ALL);
"""
# The settings that the projection pins.
PIN = "SET timezone = 'UTC'; SET datestyle = 'ISO, YMD'; SET work_mem = '64MB'; SET jit = off"
# Of an event e and its object o, in the order of the table's columns.
VALUES = """
    nullif(o.id, '')::uuid AS order_id, nullif(o.created_at, '')::timestamptz AS created_at,
    nullif(o.updated_at, '')::timestamptz AS updated_at, nullif(o.user_id, '')::uuid AS user_id,
    nullif(o.business_id, '')::uuid AS business_id, nullif(o.account_id, '')::uuid AS account_id,
    nullif(o.side, '') AS side, nullif(o.order_type, '') AS order_type,
    nullif(o.instrument_id, '') AS isin, nullif(o.instrument_id_type, '') AS instrument_id_type,
    nullif(o.cash_amount, '')::numeric AS cash_amount, nullif(o.currency, '') AS currency,
    nullif(o.quantity, '')::numeric AS quantity, nullif(o.limit_price, '')::numeric AS limit_price,
    nullif(o.stop_price, '')::numeric AS stop_price,
    left(nullif(o.expiry_date, ''), 10)::date AS expiry_date, nullif(o.fee, '')::numeric AS fee,
    nullif(o.user_instrument_fit_acknowledgement, '')::boolean AS fit_acknowledged,
    nullif(o.status, '') AS status, nullif(o.cancellation_reason, '') AS cancellation_reason,
    nullif(o.initiation_flow, '') AS initiation_flow,
    nullif(o.execution_flow, '') AS execution_flow,
    nullif(o.client_reference, '') AS client_reference, e.event_id AS _event_id,
    e.event_type AS _event_type, e.ingested_at AS _ingested_at,
    coalesce(nullif(o.updated_at, '')::timestamptz, e.created_at) AS _version_time,
    (CASE o.status WHEN 'NEW' THEN 1 WHEN 'PROCESSING' THEN 2 WHEN 'FILLED' THEN 4
        WHEN 'CANCELLED' THEN 4 ELSE 3 END)::smallint AS _version_rank,
    e.created_at AS _version_created, e.topic AS _topic, e.partition AS _partition,
    e."offset" AS _offset
"""
OBJECT = """
jsonb_to_record(e.payload -> 'object') AS o(
    id text, created_at text, updated_at text, user_id text, business_id text, account_id text,
    side text, order_type text, instrument_id text, instrument_id_type text, cash_amount text,
    currency text, quantity text, limit_price text, stop_price text, expiry_date text, fee text,
    user_instrument_fit_acknowledgement text, status text, cancellation_reason text,
    initiation_flow text, execution_flow text, client_reference text)
"""
COLUMNS = re.findall(r" AS (\w+)", VALUES)
BARE = f"""
INSERT INTO benchmark.orders ({", ".join(COLUMNS)})
SELECT DISTINCT ON (order_id) * FROM (
    SELECT {VALUES} FROM pipeline.events AS e CROSS JOIN LATERAL {OBJECT}
    WHERE e.event_type LIKE 'ORDER.%' AND e.repeat_of IS NULL
) AS s
ORDER BY order_id, _version_time DESC, _version_rank DESC, _version_created DESC, _topic DESC,
    _partition DESC, _offset DESC
"""
MATCHING = """
SELECT count(*) FROM pipeline.events WHERE event_type LIKE 'ORDER.%' AND repeat_of IS NULL
"""
DIFFERING = """
SELECT count(*) FROM (
    (TABLE upvest.orders EXCEPT ALL TABLE benchmark.orders) UNION ALL
    (TABLE benchmark.orders EXCEPT ALL TABLE upvest.orders)
) AS either
"""


def measure(stage: Stage, events: int, pairs: int) -> Section:
    """Fill ``orders`` from a log in several ways, in turn, and all read models from another log.

    Args:
        stage: The servers.
        events: How many events each log holds, at least: of orders alone, and of everything.
        pairs: How often each way is measured.
    """
    of_one, rows = _measure_orders(stage, events, pairs)
    of_all, live = _measure_all(stage, events, pairs)
    models = catalogue.load().models
    return Section(
        "Projection of `orders`, and of all read models",
        f"A log of {events:,} events of orders, which make {rows:,} rows of "
        f"{len(orders.tables[0].columns)} columns, with 3 indexes. All ways leave the same rows, "
        f"to the last column. Another log of {events:,} events of all kinds, for {len(models)} "
        f"read models with {sum(len(model.tables) for model in models)} tables; `pipeline rebuild "
        f"--all` with its start. Live, all of them together take {live}.",
        table([*of_one, of_all]),
        [bars("projection", "Projection of orders, events per second", of_one, "events/s")],
    )


def _measure_orders(stage: Stage, events: int, pairs: int) -> tuple[list[Pairs], int]:
    live = Pairs("projection, live pass / bare INSERT … SELECT", target=0.9)
    again = Pairs("rebuild / bare INSERT … SELECT", target=0.9, theirs=live.theirs)
    by_two = Pairs("rebuild, 2 jobs / rebuild, 1 job", target=1.6, theirs=again.ours)
    with log_of_orders(stage, events) as (database, engine), database.connect() as connection:
        connection.execute(PIN)
        for _ in range(pairs):
            connection.execute("TRUNCATE benchmark.orders")
            live.theirs.append(_timed(stage, events, lambda: connection.execute(BARE.encode())))
            connection.execute("TRUNCATE upvest.orders")
            live.ours.append(_timed(stage, events, lambda: _project(engine)))
            assert _number(connection, DIFFERING) == 0
            again.ours.append(timed_rebuild(stage, engine, events))
            by_two.ours.append(_timed(stage, events, lambda: _rebuild(engine, jobs=2)))
            assert _number(connection, DIFFERING) == 0
        return [live, again, by_two], _number(connection, "SELECT count(*) FROM upvest.orders")


def _measure_all(stage: Stage, events: int, pairs: int) -> tuple[Pairs, str]:
    by_two = Pairs("rebuild --all, 2 jobs / rebuild --all, 1 job", target=1.6)
    live: list[Run] = []
    with stage.database() as database, database.connect() as connection:
        stage.ingest(stage.load(events), database)
        connection.execute("VACUUM ANALYZE")
        engine = open_engine(database.url, application="benchmark")
        for _ in range(pairs):
            empty_all(connection)
            live.append(_timed(stage, events, lambda: _project(engine, *catalogue.load().models)))
            by_two.theirs.append(_timed(stage, events, lambda: _rebuild_all(database, jobs=1)))
            by_two.ours.append(_timed(stage, events, lambda: _rebuild_all(database, jobs=2)))
        engine.dispose()
    rate = statistics.median(run.rate for run in live)
    costs = [run.server_us for run in live if run.server_us is not None]
    cost = f" and {statistics.median(costs):.1f} µs of PostgreSQL's CPU per event" if costs else ""
    return by_two, f"{rate:,.0f} events/s{cost}"


@contextlib.contextmanager
def log_of_orders(stage: Stage, events: int) -> Iterator[tuple[Database, Engine]]:
    """A database whose log holds so many events of orders, projected, and an empty twin."""
    with stage.database() as database, database.connect() as connection:
        stage.ingest(stage.load(events, about=b'"type":"ORDER.'), database)
        connection.execute(MAKE_TWIN)
        assert _number(connection, MATCHING) == events
        engine = open_engine(database.url, application="benchmark")
        _project(engine)
        connection.execute("VACUUM ANALYZE")
        yield database, engine
        engine.dispose()


def empty_all(connection: psycopg.Connection) -> None:
    """Truncate all read models, which are then projected from the log's beginning."""
    models = catalogue.load().models
    tables = ", ".join(table.fullname for model in models for table in model.tables)
    connection.execute(f"TRUNCATE {tables}".encode())


def timed_rebuild(stage: Stage, engine: Engine, events: int) -> Run:
    """Our rebuild of ``orders``; it must find no difference."""
    return _timed(stage, events, lambda: _rebuild(engine))


def _timed(stage: Stage, events: int, work: Callable[[], object]) -> Run:
    stage.settle()
    before, begun = stage.server_cpu_s(), time.monotonic()
    work()
    seconds = time.monotonic() - begun
    return Run(rate=events / seconds, server_us=stage.server_us(before, events))


def _project(engine: Engine, *projectors: Projector) -> None:
    run_projection(engine, projectors or [orders], until_end=True)


def _rebuild(engine: Engine, *, jobs: int = 1) -> None:
    assert rebuild(engine, orders, jobs=jobs).differing == 0


def _rebuild_all(database: Database, *, jobs: int) -> None:
    run_process(
        [sys.executable, "-m", "pipeline", "rebuild", "--all", "--jobs", str(jobs)],
        {"PIPELINE_DATABASE_URL": database.dsn},
    )


def _number(connection: psycopg.Connection, query: LiteralString) -> int:
    found = connection.execute(query).fetchone()
    assert found is not None
    return int(found[0])
