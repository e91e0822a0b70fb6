"""Security transactions: the ledger of units, with what caused each entry."""

from pipeline.readmodel import Children, Ledger, enum, quantity, text, time, uuid

security_transactions = Ledger(
    table="security_transactions",
    comment="One row per entry of the securities ledger. Their sum per account and instrument is "
    "the position. A reversal is an entry of its own with the opposite sign.",
    events="SECURITY_TRANSACTION.EXECUTED",
    key=[
        uuid(
            "security_transaction_id",
            "id",
            "Upvest's id of the entry; its reversal may have the same, so `transaction_type` "
            "belongs to the key.",
        ),
        enum(
            "transaction_type",
            "type",
            "What was booked, e.g. ORDER_EXECUTION; a reversal ends in _CANCELLATION.",
        ),
    ],
    newest_by="updated_at",
    indexes=["account_id"],
    fields=[
        uuid("account_group_id", "account_group_id", "Group of the account. Joins account_groups."),
        uuid("account_id", "account_id", "Account whose units move. Joins accounts."),
        uuid("instrument_uuid", "instrument.uuid", "Instrument that moves. Joins instruments."),
        text("isin", "instrument.isin", "Its ISIN; NULL if not told."),
        quantity("quantity", "delta.amount", "Change of units: plus is in, minus is out."),
        time("booking_date", "booking_date", "When it was booked; the ledger is in this order."),
        time("value_date", "value_date", "From when it counts."),
        time("created_at", "created_at", "When the entry was created."),
        time("updated_at", "updated_at", "When the entry last changed; it rarely does."),
    ],
    children=[
        Children(
            table="security_transaction_references",
            comment="What caused an entry of the securities ledger, one row for each thing.",
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
                    "What the id names: ORDER, ORDER_EXECUTION, CORPORATE_ACTION and others.",
                ),
            ],
        )
    ],
)
