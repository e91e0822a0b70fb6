"""Executions: one row per fill of an order, reported in its own event or inside its order."""

from pipeline.readmodel import (
    EntityTable,
    Lifecycle,
    Source,
    date,
    enum,
    money,
    quantity,
    status,
    time,
)
from pipeline.readmodel.upvest import currency, entity_id, refers_to, taxes

LIFECYCLE = Lifecycle("FILLED", ends=("SETTLED", "CANCELLED"))

executions = EntityTable(
    table="executions",
    comment="One row per execution of an order, as of its newest event. Amounts and units are "
    "unsigned: `side` is the direction.",
    sources=[
        Source("EXECUTION.*"),
        Source("ORDER.*", each="executions", inherit={"order_id": "id"}),
    ],
    key=entity_id("execution"),
    fields=[
        refers_to("orders", "Order that it fills; the order's event may come later."),
        enum("side", "BUY or SELL."),
        money("cash_amount", "Amount paid or received, in `currency`."),
        quantity("share_quantity", "Units bought or sold."),
        quantity("price", "Price per unit, in `currency`."),
        currency("every amount in this row"),
        time("transaction_time", "When the trade was made."),
        date("settlement_date", "Day on which cash and units change hands."),
        status(LIFECYCLE, "CANCELLED after a mistrade."),
    ],
    children=[taxes("execution_taxes", "Taxes of an execution, one row per kind.")],
)
