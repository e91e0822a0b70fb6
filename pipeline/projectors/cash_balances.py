"""Cash balances: what each account group has in each currency, as last reported."""

from pipeline.readmodel import EntityTable, money
from pipeline.readmodel.upvest import as_of, currency, refers_to

cash_balances = EntityTable(
    table="cash_balances",
    comment="One row per account group and currency, as last reported. Amounts in `currency`; they "
    "may be negative, and the parts need not add up to the balance.",
    events="CASH_BALANCE.UPDATED",
    key=[
        refers_to("account_groups", "Group whose cash it is."),
        currency("every amount in this row"),
    ],
    fields=[
        as_of("balance"),
        money("balance", "Cash in total."),
        money("locked_for_trading", "Cash bound in open buy orders."),
        money("pending_settlement", "Cash from sales not yet settled."),
        money("available_for_withdrawal", "Cash that may be paid out."),
        money("available_for_trading", "Cash that may be invested."),
    ],
)
