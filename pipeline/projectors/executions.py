"""Executions: one row for each fill of an order, told by itself or inside its order."""

from pipeline.readmodel import Children, Snapshot, Source, date, enum, money, quantity, time, uuid

executions = Snapshot(
    table="executions",
    comment="One row per execution of an order, as of its newest event. Amounts and units are "
    "unsigned: `side` tells the direction.",
    sources=[
        Source("EXECUTION.*"),
        Source("ORDER.*", each="executions", inherit={"order_id": "id"}),
    ],
    key=uuid("execution_id", "id", "Upvest's id of the execution."),
    indexes=["order_id"],
    fields=[
        uuid("order_id", "order_id", "Order that it fills. Joins orders, which may come later."),
        enum("side", "side", "BUY or SELL."),
        money("cash_amount", "cash_amount", "Amount paid or received, in `currency`."),
        quantity("share_quantity", "share_quantity", "Units bought or sold."),
        quantity("price", "price", "Price per unit, in `currency`."),
        enum("currency", "currency", "Currency of every amount in this row."),
        time("transaction_time", "transaction_time", "When the trade was made."),
        date("settlement_date", "settlement_date", "Day on which cash and units change hands."),
        enum(
            "status",
            "status",
            "FILLED, SETTLED, or CANCELLED after a mistrade.",
            steps=("FILLED",),
            ends=("SETTLED", "CANCELLED"),
        ),
    ],
    children=[
        Children(
            table="execution_taxes",
            comment="Taxes of an execution, one row for each kind.",
            path="taxes",
            fields=[
                enum("tax_type", "type", "Kind of tax; TOTAL is all of it.", personal=False),
                money("amount", "amount", "Amount of tax, in the execution's currency."),
            ],
        )
    ],
)
