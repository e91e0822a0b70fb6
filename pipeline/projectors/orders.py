"""Orders: one row for each order, as of its newest event."""

from pipeline.readmodel import Snapshot, boolean, date, enum, money, quantity, text, time, uuid

orders = Snapshot(
    table="orders",
    comment="One row per order, as of its newest event. Amounts in `currency`.",
    events="ORDER.*",
    key=uuid("order_id", "id", "Upvest's id of the order."),
    newest_by="updated_at",
    indexes=["account_id", "user_id"],
    fields=[
        time("created_at", "created_at", "When the order was placed."),
        time("updated_at", "updated_at", "When the order last changed."),
        uuid("user_id", "user_id", "User who ordered; NULL for a business. Joins users."),
        uuid("business_id", "business_id", "Business that ordered; NULL for a user."),
        uuid("account_id", "account_id", "Account that trades. Joins accounts."),
        enum("side", "side", "BUY or SELL."),
        enum("order_type", "order_type", "MARKET, LIMIT or STOP."),
        text("isin", "instrument_id", "ISIN of the instrument. Joins instrument_isins."),
        enum("instrument_id_type", "instrument_id_type", "What `isin` holds; ISIN so far."),
        money("cash_amount", "cash_amount", "Ordered amount; NULL for orders by quantity."),
        enum("currency", "currency", "Currency of every amount in this row."),
        quantity("quantity", "quantity", "Ordered units; NULL for orders by amount."),
        quantity("limit_price", "limit_price", "Worst acceptable price; NULL without limit."),
        quantity("stop_price", "stop_price", "Price that triggers the order; NULL without stop."),
        date("expiry_date", "expiry_date", "Last trading day on which the order may be filled."),
        money("fee", "fee", "Fee of the order."),
        boolean(
            "fit_acknowledged",
            "user_instrument_fit_acknowledgement",
            "The user accepted an instrument that does not fit; NULL where nothing was asked.",
        ),
        enum(
            "status",
            "status",
            "Where the order stands: NEW, PROCESSING, FILLED or CANCELLED. A cancelled order may "
            "have executions.",
            steps=("NEW", "PROCESSING"),
            ends={"FILLED", "CANCELLED"},
        ),
        enum("cancellation_reason", "cancellation_reason", "Who cancelled; NULL if nobody did."),
        enum("initiation_flow", "initiation_flow", "What gave rise to the order, e.g. API."),
        enum("execution_flow", "execution_flow", "STRAIGHT_THROUGH or BLOCK."),
        text("client_reference", "client_reference", "The client's own id of the order."),
    ],
)
