"""Cash balances: what each account group has in each currency, as last told."""

from pipeline.readmodel import Snapshot, enum, event_time, money, uuid

cash_balances = Snapshot(
    table="cash_balances",
    comment="One row per account group and currency, as last told. Amounts in `currency`; they may "
    "be negative, and the parts need not add up to the balance.",
    events="CASH_BALANCE.UPDATED",
    key=[
        uuid(
            "account_group_id", "account_group_id", "Group whose cash it is. Joins account_groups."
        ),
        enum("currency", "currency", "Currency of every amount in this row."),
    ],
    fields=[
        event_time("as_of", "When Upvest told it; a balance has no time of its own."),
        money("balance", "balance", "Cash in total."),
        money("locked_for_trading", "locked_for_trading", "Cash bound in open buy orders."),
        money("pending_settlement", "pending_settlement", "Cash from sales not yet settled."),
        money("available_for_withdrawal", "available_for_withdrawal", "Cash that may be paid out."),
        money("available_for_trading", "available_for_trading", "Cash that may be invested."),
    ],
)
