"""Instruments: what can be traded. With every ISIN that an instrument ever had."""

from pipeline.readmodel import EntityTable, boolean, earliest, enum, json, text, time
from pipeline.readmodel.upvest import created_at, entity_id, isin, refers_to, updated_at

instruments = EntityTable(
    table="instruments",
    comment="One row per instrument, as of its newest event. Positions name an instrument by its "
    "id, orders by its ISIN: see instrument_isins.",
    events="INSTRUMENT.*",
    key=entity_id("instrument", column="instrument_uuid"),
    newest_by="updated_at",
    fields=[
        created_at("instrument"),
        updated_at("instrument"),
        text("isin", "Its ISIN of today; earlier ones are in instrument_isins."),
        text("wkn", "German code, six characters; NULL without."),
        text("name", "Name.", personal=False),
        boolean("fractional_trading", "True if parts of a unit may be traded."),
        enum("trading_status", "ACTIVE or INACTIVE; may alternate."),
        json("details", "Further master data as it came; NULL without."),
    ],
)

instrument_isins = EntityTable(
    table="instrument_isins",
    comment="Every ISIN that an instrument ever had, one row per pair; rows never go away. An ISIN "
    "with several instruments means the one with the latest last_seen.",
    events="INSTRUMENT.*",
    key=[
        isin("ISIN. Joins orders, which have no other name for an instrument."),
        refers_to("instruments", "Instrument that had it.", path="id"),
    ],
    only_with=["isin"],
    newest_by="last_seen",
    fields=[
        earliest(
            time(
                "first_seen",
                "Oldest version of the instrument with this ISIN that we have.",
                path="updated_at",
                or_event_time=True,
            )
        ),
        time(
            "last_seen",
            "Newest version of the instrument with this ISIN that we have.",
            path="updated_at",
            or_event_time=True,
        ),
    ],
)
