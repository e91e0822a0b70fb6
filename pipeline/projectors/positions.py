"""Positions: what each account holds of each instrument, as last reported."""

from pipeline.readmodel import EntityTable, quantity
from pipeline.readmodel.upvest import as_of, instrument, refers_to

instrument_uuid, isin = instrument("Instrument that is held.")

positions = EntityTable(
    table="positions",
    comment="One row per account and instrument, as last reported. A closed position stays, with "
    "quantity 0. Units, not money; quantities may be negative.",
    events="POSITION.UPDATED",
    key=[refers_to("accounts", "Account that holds."), instrument_uuid],
    fields=[
        isin,
        as_of("position"),
        quantity("quantity", "Units held in total."),
        quantity("locked_for_trading", "Units bound in open sell orders."),
        quantity("pending_settlement", "Units bought and not yet settled."),
        quantity("available_for_trading", "Units that may be sold."),
        quantity(
            "available_for_instruction",
            "Units that count for instructions in corporate actions; NULL if not reported.",
        ),
    ],
)
