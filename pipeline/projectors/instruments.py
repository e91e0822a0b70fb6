"""Instruments: what can be traded. With every ISIN that an instrument ever had."""

from sqlalchemy import Column, Connection, DateTime, Index, Text, Uuid
from sqlalchemy import text as sql

from pipeline.readmodel import (
    Batch,
    Custom,
    Snapshot,
    boolean,
    enum,
    json,
    read_model_table,
    text,
    time,
    uuid,
)

instruments = Snapshot(
    table="instruments",
    comment="One row per instrument, as of its newest event. Positions name an instrument by its "
    "id, orders by its ISIN: see instrument_isins.",
    events="INSTRUMENT.*",
    key=uuid("instrument_uuid", "id", "Upvest's id of the instrument."),
    newest_by="updated_at",
    fields=[
        time("created_at", "created_at", "When Upvest took the instrument in."),
        time("updated_at", "updated_at", "When the instrument last changed."),
        text("isin", "isin", "Its ISIN of today; earlier ones are in instrument_isins."),
        text("wkn", "wkn", "German code, six characters; NULL without."),
        text("name", "name", "Name.", personal=False),
        boolean("fractional_trading", "fractional_trading", "True if parts of a unit may trade."),
        enum("trading_status", "trading_status", "ACTIVE or INACTIVE; may alternate."),
        json("details", "details", "Further master data as it came; NULL if none did."),
    ],
)

isins = read_model_table(
    "instrument_isins",
    Column("isin", Text, primary_key=True, comment="ISIN. Joins orders, which know no other name."),
    Column(
        "instrument_uuid",
        Uuid,
        primary_key=True,
        comment="Instrument that had it. Joins instruments.",
    ),
    Column(
        "first_seen",
        DateTime(timezone=True),
        comment="Oldest version of the instrument with this ISIN that we know; NULL without time.",
    ),
    Column(
        "last_seen",
        DateTime(timezone=True),
        comment="Newest version of the instrument with this ISIN that we know; NULL without time.",
    ),
    Index(None, "instrument_uuid"),
    comment="Every ISIN that an instrument ever had, one row per pair; rows never go away. An ISIN "
    "with several instruments means the one with the latest last_seen.",
)


# In the engine's words: an id and a time of the right shape, or the event is put aside.
RULES = """
CASE WHEN pipeline.first_fault(
    e.payload -> 'object', ARRAY['instrument_uuid', 'last_seen'], ARRAY['uuid!', 'time'],
    ARRAY['id', 'updated_at']
) IS NULL THEN true ELSE pipeline.reject() END
"""


def grow(db: Connection, batch: Batch) -> None:
    """Widen the time in which each pair of ISIN and instrument was seen.

    ``least`` and ``greatest`` pass over NULL and mind neither order nor repeats, so that one log
    gives one table however it is read.
    """
    db.execute(
        sql(f"""
        INSERT INTO instrument_isins AS t (isin, instrument_uuid, first_seen, last_seen)
        SELECT isin, instrument_uuid, min(seen), max(seen)
        FROM (
            SELECT nullif(o.isin, '') AS isin,
                   CAST(o.id AS uuid) AS instrument_uuid,
                   coalesce(CAST(nullif(o.updated_at, '') AS timestamptz), e.created_at) AS seen
            FROM pipeline.events e
            CROSS JOIN LATERAL jsonb_to_record(e.payload -> 'object')
                 AS o(id text, isin text, updated_at text)
            WHERE {batch.where} AND nullif(o.isin, '') IS NOT NULL AND {RULES}
        ) AS s
        GROUP BY isin, instrument_uuid
        ORDER BY isin, instrument_uuid
        ON CONFLICT (isin, instrument_uuid) DO UPDATE
        SET first_seen = least(t.first_seen, excluded.first_seen),
            last_seen = greatest(t.last_seen, excluded.last_seen)
        WHERE least(t.first_seen, excluded.first_seen) IS DISTINCT FROM t.first_seen
           OR greatest(t.last_seen, excluded.last_seen) IS DISTINCT FROM t.last_seen
        """),  # noqa: S608 - nothing but the engine's and our own constants
        batch.parameters,
    )


instrument_isins = Custom(tables=[isins], events="INSTRUMENT.*", apply=grow)
