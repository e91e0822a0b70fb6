"""Cash transactions: the ledger of cash, with the taxes of each entry and its causes."""

from pipeline.readmodel import LedgerTable, enum, json, money, time
from pipeline.readmodel.upvest import (
    created_at,
    currency,
    entity_id,
    instrument,
    references,
    refers_to,
    taxes,
    updated_at,
)

cash_transactions = LedgerTable(
    table="cash_transactions",
    comment="One row per entry of the cash ledger. Their sum per account group and currency is the "
    "balance. A reversal is an entry of its own with the opposite sign; it may have the same id, "
    "so `transaction_type` belongs to the key.",
    events="CASH_TRANSACTION.EXECUTED",
    key=entity_id("cash transaction"),
    entry_type=enum(
        "transaction_type",
        "What was booked, e.g. ORDER_EXECUTION; a reversal ends in _CANCELLATION or _CHARGE_BACK.",
        path="type",
    ),
    newest_by="updated_at",
    fields=[
        refers_to("account_groups", "Group whose cash moves."),
        refers_to("accounts", "Account that caused it; NULL if none."),
        money(
            "amount",
            "Change of cash, in `currency`: plus is in, minus is out.",
            path="delta.amount",
        ),
        currency("`amount`", path="delta.currency"),
        time("booking_date", "When it was booked; the ledger is in this order."),
        time("value_date", "From when it counts for interest and settlement."),
        created_at("entry"),
        updated_at("entry"),
        *instrument("Instrument that caused it, in corporate actions; else NULL."),
        json("tax_details", "Details of the tax as they came; NULL without tax.", personal=True),
    ],
    children=[
        taxes(
            "cash_transaction_taxes",
            "Taxes of a cash entry, for information. A reversal repeats them with the same sign, "
            "so do not add them up without the entry's sign.",
            currency("`amount`"),
        ),
        references(
            "cash_transaction_references",
            "What caused a cash entry, one row per cause.",
            "ORDER, ORDER_EXECUTION, WITHDRAWAL, DIRECT_DEBIT, TOPUP, FEE_COLLECTION, "
            "CORPORATE_ACTION",
        ),
    ],
)
