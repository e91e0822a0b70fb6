"""Cash transactions: the ledger of cash, with the taxes of each entry and what caused it."""

from pipeline.readmodel import Children, Ledger, enum, json, money, text, time, uuid

cash_transactions = Ledger(
    table="cash_transactions",
    comment="One row per entry of the cash ledger. Their sum per account group and currency is the "
    "balance. A reversal is an entry of its own with the opposite sign.",
    events="CASH_TRANSACTION.EXECUTED",
    key=[
        uuid(
            "cash_transaction_id",
            "id",
            "Upvest's id of the entry; its reversal may have the same, so `transaction_type` "
            "belongs to the key.",
        ),
        enum(
            "transaction_type",
            "type",
            "What was booked, e.g. ORDER_EXECUTION; a reversal ends in _CANCELLATION or "
            "_CHARGE_BACK.",
        ),
    ],
    newest_by="updated_at",
    indexes=["account_group_id", "account_id"],
    fields=[
        uuid(
            "account_group_id", "account_group_id", "Group whose cash moves. Joins account_groups."
        ),
        uuid("account_id", "account_id", "Account that caused it; NULL if none. Joins accounts."),
        money("amount", "delta.amount", "Change of cash, in `currency`: plus is in, minus is out."),
        enum("currency", "delta.currency", "Currency of `amount`."),
        time("booking_date", "booking_date", "When it was booked; the ledger is in this order."),
        time("value_date", "value_date", "From when it counts for interest and settlement."),
        time("created_at", "created_at", "When the entry was created."),
        time("updated_at", "updated_at", "When the entry last changed; it rarely does."),
        uuid(
            "instrument_uuid",
            "instrument.uuid",
            "Instrument that caused it, in corporate actions; else NULL. Joins instruments.",
        ),
        text("isin", "instrument.isin", "Its ISIN; NULL if not told."),
        json(
            "tax_details",
            "tax_details",
            "Details of the tax as they came; NULL without tax.",
            personal=True,
        ),
    ],
    children=[
        Children(
            table="cash_transaction_taxes",
            comment="Taxes inside a cash entry: part of its amount, for information. A reversal "
            "repeats them with the same sign, so do not add them up without the entry's sign.",
            path="taxes",
            fields=[
                enum("tax_type", "type", "Kind of tax; TOTAL is all of it.", personal=False),
                money("amount", "amount", "Amount of tax, in `currency`."),
                enum("currency", "currency", "Currency of `amount`."),
            ],
        ),
        Children(
            table="cash_transaction_references",
            comment="What caused a cash entry, one row for each thing.",
            path="references",
            indexes=["reference_id"],
            fields=[
                uuid(
                    "reference_id",
                    "id",
                    "Id of the thing: of orders for ORDER, of executions for ORDER_EXECUTION.",
                ),
                enum(
                    "reference_type",
                    "type",
                    "What the id names: ORDER, ORDER_EXECUTION, WITHDRAWAL, DIRECT_DEBIT, TOPUP, "
                    "FEE_COLLECTION, CORPORATE_ACTION and others.",
                ),
            ],
        ),
    ],
)
