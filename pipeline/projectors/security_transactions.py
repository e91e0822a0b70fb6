"""Security transactions: the ledger of units, with the causes of each entry."""

from pipeline.readmodel import LedgerTable, enum, quantity, time
from pipeline.readmodel.upvest import (
    created_at,
    entity_id,
    instrument,
    references,
    refers_to,
    updated_at,
)

security_transactions = LedgerTable(
    table="security_transactions",
    comment="One row per entry of the securities ledger. Their sum per account and instrument is "
    "the position. A reversal is an entry of its own with the opposite sign; it may have the same "
    "id, so `transaction_type` belongs to the key.",
    events="SECURITY_TRANSACTION.EXECUTED",
    key=entity_id("security transaction"),
    entry_type=enum(
        "transaction_type",
        "What was booked, e.g. ORDER_EXECUTION; a reversal ends in _CANCELLATION.",
        path="type",
    ),
    newest_by="updated_at",
    fields=[
        refers_to("account_groups", "Group of the account."),
        refers_to("accounts", "Account whose units move."),
        *instrument("Instrument that moves."),
        quantity("quantity", "Change of units: plus is in, minus is out.", path="delta.amount"),
        time("booking_date", "When it was booked; the ledger is in this order."),
        time("value_date", "From when it counts."),
        created_at("entry"),
        updated_at("entry"),
    ],
    children=[
        references(
            "security_transaction_references",
            "What caused an entry of the securities ledger, one row per cause.",
            "ORDER, ORDER_EXECUTION, CORPORATE_ACTION",
        )
    ],
)
