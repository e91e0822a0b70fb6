"""Projection and rebuild of ``orders`` against one hand-written INSERT … SELECT.

Ours has its checkpoints, its checks of every value and its batches. The bare side is one statement
over the whole log, with plain casts that would stop at the first bad value.
"""

import time
from collections.abc import Callable
from typing import LiteralString

import psycopg
from sqlalchemy import Engine

from benchmarks.report import Pairs, Run, Section, table
from benchmarks.stage import Stage
from pipeline.db import open_engine
from pipeline.projection.loop import run_projection
from pipeline.projection.rebuild import rebuild
from pipeline.projectors.orders import orders

MAKE_TWIN = """
CREATE SCHEMA benchmark;
CREATE TABLE benchmark.orders (LIKE upvest.orders INCLUDING ALL);
"""
# What the projection pins for itself.
PIN = "SET timezone = 'UTC'; SET datestyle = 'ISO, YMD'; SET work_mem = '64MB'; SET jit = off"
BARE = """
INSERT INTO benchmark.orders (
    order_id, created_at, updated_at, user_id, business_id, account_id, side, order_type, isin,
    instrument_id_type, cash_amount, currency, quantity, limit_price, stop_price, expiry_date, fee,
    fit_acknowledged, status, cancellation_reason, initiation_flow, execution_flow,
    client_reference, _event_id, _version_time, _version_rank, _version_created, _topic, _partition,
    _offset)
SELECT DISTINCT ON (order_id) * FROM (
    SELECT nullif(o.id, '')::uuid AS order_id, nullif(o.created_at, '')::timestamptz,
        nullif(o.updated_at, '')::timestamptz, nullif(o.user_id, '')::uuid,
        nullif(o.business_id, '')::uuid, nullif(o.account_id, '')::uuid, nullif(o.side, ''),
        nullif(o.order_type, ''), nullif(o.instrument_id, ''), nullif(o.instrument_id_type, ''),
        nullif(o.cash_amount, '')::numeric, nullif(o.currency, ''),
        nullif(o.quantity, '')::numeric, nullif(o.limit_price, '')::numeric,
        nullif(o.stop_price, '')::numeric, left(nullif(o.expiry_date, ''), 10)::date,
        nullif(o.fee, '')::numeric, nullif(o.user_instrument_fit_acknowledgement, '')::boolean,
        nullif(o.status, ''), nullif(o.cancellation_reason, ''), nullif(o.initiation_flow, ''),
        nullif(o.execution_flow, ''), nullif(o.client_reference, ''), e.event_id,
        coalesce(nullif(o.updated_at, '')::timestamptz, e.created_at) AS version_time,
        (CASE o.status WHEN 'NEW' THEN 1 WHEN 'PROCESSING' THEN 2 WHEN 'FILLED' THEN 4
            WHEN 'CANCELLED' THEN 4 ELSE 3 END)::smallint AS version_rank,
        e.created_at AS version_created, e.topic, e.partition, e."offset"
    FROM pipeline.events AS e
    CROSS JOIN LATERAL jsonb_to_record(e.payload -> 'object') AS o(
        id text, created_at text, updated_at text, user_id text, business_id text, account_id text,
        side text, order_type text, instrument_id text, instrument_id_type text, cash_amount text,
        currency text, quantity text, limit_price text, stop_price text, expiry_date text, fee text,
        user_instrument_fit_acknowledgement text, status text, cancellation_reason text,
        initiation_flow text, execution_flow text, client_reference text)
    WHERE e.event_type LIKE 'ORDER.%' AND e.repeat_of IS NULL
) AS s
ORDER BY order_id, version_time DESC, version_rank DESC, version_created DESC, topic DESC,
    partition DESC, "offset" DESC
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
    """Fill ``orders`` from a log in three ways, in turn.

    Args:
        stage: The servers.
        events: How many events of orders the log holds, and no others.
        pairs: How often each way is gone.
    """
    live = Pairs("projection, live pass / bare INSERT … SELECT", target=0.7)
    again = Pairs("rebuild / bare INSERT … SELECT", target=0.7)
    with stage.database() as database, database.connect() as connection:
        stage.ingest(stage.load(events, about=b'"type":"ORDER.'), database)
        connection.execute(f"{PIN}; {MAKE_TWIN}")
        connection.execute("VACUUM ANALYZE")
        assert _number(connection, MATCHING) == events
        engine = open_engine(database.url, application="benchmark")
        for _ in range(pairs):
            connection.execute("TRUNCATE benchmark.orders")
            bare = _timed(stage, events, lambda: connection.execute(BARE))
            connection.execute("TRUNCATE upvest.orders")
            live.bare.append(bare)
            live.ours.append(_timed(stage, events, lambda: _project(engine)))
            assert _number(connection, DIFFERING) == 0
            again.bare.append(bare)
            again.ours.append(_timed(stage, events, lambda: _rebuild(engine)))
            assert _number(connection, DIFFERING) == 0
        engine.dispose()
        made = _number(connection, "SELECT count(*) FROM upvest.orders")
    return Section(
        "Projection of `orders`",
        f"A log of {events:,} events of orders, which make {made:,} rows of "
        f"{len(orders.tables[0].columns)} columns, with 3 indexes. All three ways leave the same "
        "rows, to the last column.",
        table([live, again]),
    )


def _timed(stage: Stage, events: int, work: Callable[[], object]) -> Run:
    stage.settle()
    before, begun = stage.server_cpu_s(), time.monotonic()
    work()
    seconds, after = time.monotonic() - begun, stage.server_cpu_s()
    return Run(
        rate=events / seconds,
        server_us=None if before is None or after is None else (after - before) / events * 1e6,
    )


def _project(engine: Engine) -> None:
    run_projection(engine, [orders], until_end=True)


def _rebuild(engine: Engine) -> None:
    assert rebuild(engine, orders).differing == 0


def _number(connection: psycopg.Connection, query: LiteralString) -> int:
    found = connection.execute(query).fetchone()
    assert found is not None
    return int(found[0])
