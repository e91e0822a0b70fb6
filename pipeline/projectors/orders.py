"""Orders: one row per order, as of its newest event."""

from pipeline.readmodel import (
    EntityTable,
    Lifecycle,
    boolean,
    date,
    enum,
    money,
    quantity,
    status,
    text,
    uuid,
)
from pipeline.readmodel.upvest import created_at, currency, entity_id, isin, refers_to, updated_at

LIFECYCLE = Lifecycle("NEW", "PROCESSING", ends={"FILLED", "CANCELLED"})

orders = EntityTable(
    table="orders",
    comment="One row per order, as of its newest event. Amounts in `currency`.",
    events="ORDER.*",
    key=entity_id("order"),
    newest_by="updated_at",
    fields=[
        created_at("order"),
        updated_at("order"),
        refers_to("users", "User who ordered; NULL for a business."),
        uuid("business_id", "Business that ordered; NULL for a user."),
        refers_to("accounts", "Account that trades."),
        enum("side", "BUY or SELL."),
        enum("order_type", "MARKET, LIMIT or STOP."),
        isin("ISIN of the instrument, as ordered. Joins instrument_isins.", path="instrument_id"),
        enum("instrument_id_type", "What `isin` holds; ISIN so far."),
        money("cash_amount", "Ordered amount; NULL if not given."),
        currency("every amount in this row"),
        quantity("quantity", "Ordered units; NULL if not given."),
        quantity("limit_price", "Worst acceptable price; NULL without limit."),
        quantity("stop_price", "Price that triggers the order; NULL without stop."),
        date("expiry_date", "Last trading day on which the order may be filled."),
        money("fee", "Fee of the order."),
        boolean(
            "fit_acknowledged",
            "The user accepted an instrument that does not fit; NULL if the question was not put.",
            path="user_instrument_fit_acknowledgement",
        ),
        status(LIFECYCLE, "A cancelled order may have executions."),
        enum("cancellation_reason", "Who cancelled; NULL if nobody did."),
        enum("initiation_flow", "Origin of the order, e.g. API."),
        enum("execution_flow", "STRAIGHT_THROUGH or BLOCK."),
        text("client_reference", "The client's own id of the order."),
    ],
)
