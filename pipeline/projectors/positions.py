"""Positions: what each account holds of each instrument, as last told."""

from pipeline.readmodel import Snapshot, event_time, quantity, text, uuid

positions = Snapshot(
    table="positions",
    comment="One row per account and instrument, as last told. A closed position stays, with "
    "quantity 0. Units, not money; quantities may be negative.",
    events="POSITION.UPDATED",
    key=[
        uuid("account_id", "account_id", "Account that holds. Joins accounts."),
        uuid("instrument_uuid", "instrument.uuid", "Instrument that is held. Joins instruments."),
    ],
    indexes=["instrument_uuid"],
    fields=[
        text("isin", "instrument.isin", "ISIN as told with the position; NULL if not told."),
        event_time("as_of", "When Upvest told it; a position has no time of its own."),
        quantity("quantity", "quantity", "Units held in total."),
        quantity("locked_for_trading", "locked_for_trading", "Units bound in open sell orders."),
        quantity("pending_settlement", "pending_settlement", "Units bought and not yet settled."),
        quantity("available_for_trading", "available_for_trading", "Units that may be sold."),
        quantity(
            "available_for_instruction",
            "available_for_instruction",
            "Units that count for instructions in corporate actions; NULL if not told.",
        ),
    ],
)
