"""Views for analysts over the read models and the log.

Lock: none that matters, everything is new. The service may run meanwhile.
"""

from collections.abc import Mapping
from typing import NamedTuple

from alembic import op

revision = "0004"
down_revision = "0003"


class View(NamedTuple):
    """A view: its query, what one row is, and what its columns say."""

    query: str
    comment: str
    columns: Mapping[str, str]


HOLDINGS = View(
    """
    SELECT p.account_id, a.account_number, a.account_type, a.account_group_id, g.group_type,
           u.owner_user_ids, coalesce(g.business_id, a.business_id) AS business_id,
           p.instrument_uuid, coalesce(i.isin, p.isin) AS isin,
           coalesce(i.name, i.isin, p.isin) AS instrument_name,
           p.quantity, p.locked_for_trading, p.pending_settlement, p.available_for_trading, p.as_of
    FROM upvest.positions p
    LEFT JOIN upvest.accounts a ON a.account_id = p.account_id
    LEFT JOIN upvest.account_groups g ON g.account_group_id = a.account_group_id
    LEFT JOIN upvest.instruments i ON i.instrument_uuid = p.instrument_uuid
    LEFT JOIN LATERAL (
        SELECT array_agg(DISTINCT m.user_id ORDER BY m.user_id) AS owner_user_ids
        FROM upvest.account_group_users m
        WHERE m.account_group_id = a.account_group_id AND m.role IN ('OWNER', 'CHILD')
    ) u ON true
    WHERE p.quantity <> 0
    """,
    "Who holds what now: one row per account and instrument with units other than 0. Units only, "
    "no value. Without names of persons: those are in users.",
    {
        "account_id": "Account that holds. Joins accounts.",
        "account_number": "Number of the account in its group; NULL until the account is known.",
        "account_type": "TRADING or PORTFOLIO; NULL until the account is known.",
        "account_group_id": "Its group; NULL until the account is known. Joins account_groups.",
        "group_type": "PERSONAL, LEGAL_ENTITY, CHILD …; NULL until the group is known.",
        "owner_user_ids": "Members of the group with role OWNER or CHILD; NULL if it has none, as "
        "the group of a business. Join users.",
        "business_id": "Business that holds; NULL for persons.",
        "instrument_uuid": "Instrument. Joins instruments.",
        "isin": "ISIN of today; the one told with the position until the instrument is known.",
        "instrument_name": "Name of the instrument; its ISIN until the name is known.",
        "quantity": "Units held in total; negative where more was sold than held.",
        "locked_for_trading": "Units bound in open sell orders.",
        "pending_settlement": "Units bought and not yet settled.",
        "available_for_trading": "Units that may be sold.",
        "as_of": "When Upvest told it.",
    },
)

ORDER_BOOK = View(
    """
    SELECT o.order_id, o.created_at, o.updated_at, o.status, o.cancellation_reason,
           o.account_id, coalesce(o.user_id, o.business_id) AS holder_id,
           CASE WHEN o.user_id IS NOT NULL THEN 'USER'
                WHEN o.business_id IS NOT NULL THEN 'BUSINESS' END AS holder_kind,
           o.side, o.order_type, o.isin, i.instrument_uuid,
           coalesce(i.name, o.isin) AS instrument_name,
           o.currency, o.cash_amount, o.quantity, o.limit_price, o.stop_price, o.expiry_date,
           o.fee, o.initiation_flow, o.client_reference,
           x.executions, x.filled_quantity, x.settled_quantity,
           CASE WHEN x.in_one_currency THEN x.filled_amount END AS filled_amount,
           CASE WHEN x.in_one_currency
                THEN x.filled_amount / nullif(x.filled_quantity, 0) END AS average_price,
           CASE WHEN x.in_one_currency THEN x.tax END AS tax,
           x.last_execution_at,
           r.rejected_at AS cancellation_rejected_at, r.reason AS cancellation_rejection_reason
    FROM upvest.orders o
    LEFT JOIN LATERAL (
        SELECT count(*) AS executions,
               coalesce(sum(e.share_quantity), 0) AS filled_quantity,
               coalesce(sum(e.share_quantity) FILTER (WHERE e.status = 'SETTLED'), 0)
                   AS settled_quantity,
               coalesce(sum(e.cash_amount), 0) AS filled_amount,
               coalesce(sum(t.amount), 0) AS tax,
               max(e.transaction_time) AS last_execution_at,
               coalesce(bool_and(e.currency IS NOT DISTINCT FROM o.currency), true)
                   AS in_one_currency
        FROM upvest.executions e
        LEFT JOIN LATERAL (
            SELECT sum(k.amount) AS amount FROM upvest.execution_taxes k
            WHERE k.execution_id = e.execution_id AND k.tax_type = 'TOTAL'
        ) t ON true
        WHERE e.order_id = o.order_id AND e.status IS DISTINCT FROM 'CANCELLED'
    ) x ON true
    LEFT JOIN LATERAL (
        SELECT k.instrument_uuid, n.name
        FROM upvest.instrument_isins k
        LEFT JOIN upvest.instruments n ON n.instrument_uuid = k.instrument_uuid
        WHERE k.isin = o.isin
        ORDER BY k.last_seen DESC NULLS LAST, k.instrument_uuid LIMIT 1
    ) i ON true
    LEFT JOIN LATERAL (
        SELECT c.rejected_at, c.reason FROM upvest.order_cancellation_rejections c
        WHERE c.order_id = o.order_id
        ORDER BY c.rejected_at DESC NULLS LAST, c.event_id LIMIT 1
    ) r ON true
    """,
    "One row per order with what was filled of it. Cancelled executions (mistrades) do not count. "
    "Amounts in `currency`.",
    {
        "order_id": "Upvest's id of the order.",
        "created_at": "When the order was placed.",
        "updated_at": "When the order last changed.",
        "status": "NEW, PROCESSING, FILLED or CANCELLED; a cancelled order may be filled in part.",
        "cancellation_reason": "Who cancelled; NULL if nobody did.",
        "account_id": "Account that trades. Joins accounts.",
        "holder_id": "Who ordered, user or business.",
        "holder_kind": "USER or BUSINESS; NULL if neither is known.",
        "side": "BUY or SELL.",
        "order_type": "MARKET, LIMIT or STOP.",
        "isin": "ISIN as ordered.",
        "instrument_uuid": "Instrument with that ISIN, the latest to have it; NULL if none is "
        "known. Joins instruments.",
        "instrument_name": "Name of the instrument; its ISIN until the name is known.",
        "currency": "Currency of every amount in this row.",
        "cash_amount": "Ordered amount; NULL for orders by quantity.",
        "quantity": "Ordered units; NULL for orders by amount.",
        "limit_price": "Worst acceptable price; NULL without limit.",
        "stop_price": "Price that triggers the order; NULL without stop.",
        "expiry_date": "Last trading day on which the order may be filled.",
        "fee": "Fee of the order.",
        "initiation_flow": "What gave rise to the order, e.g. API.",
        "client_reference": "The client's own id of the order.",
        "executions": "Number of executions that count.",
        "filled_quantity": "Units traded; 0 before the first execution.",
        "settled_quantity": "Units of `filled_quantity` that are settled.",
        "filled_amount": "Amount traded, without fee and tax; NULL if executions are in a currency "
        "other than `currency`.",
        "average_price": "Amount per unit over all executions; NULL without any.",
        "tax": "Tax of all executions; NULL if they are in a currency other than `currency`.",
        "last_execution_at": "When the last trade was made; NULL before the first.",
        "cancellation_rejected_at": "When a cancellation was last refused; NULL if none was.",
        "cancellation_rejection_reason": "Why, in Upvest's words.",
    },
)

CASH_LEDGER = View(
    r"""
    SELECT t.cash_transaction_id, t.transaction_type, t.account_group_id, t.account_id,
           t.booking_date, t.value_date, t.amount, t.currency,
           sum(t.amount) OVER (
               PARTITION BY t.account_group_id, t.currency
               ORDER BY t.booking_date, t.created_at, t.cash_transaction_id, t.transaction_type
               ROWS UNBOUNDED PRECEDING
           ) AS running_balance,
           t.transaction_type LIKE '%\_CANCELLATION' OR t.transaction_type LIKE '%\_CHARGE\_BACK'
               AS is_reversal,
           t.instrument_uuid, t.isin, t.created_at, t.updated_at
    FROM upvest.cash_transactions t
    """,
    "The account statement: one row per cash entry with the balance after it, per account group "
    "and currency in the order of booking.",
    {
        "cash_transaction_id": "Upvest's id of the entry; its reversal may have the same.",
        "transaction_type": "What was booked, e.g. ORDER_EXECUTION.",
        "account_group_id": "Group whose cash moves. Joins account_groups.",
        "account_id": "Account that caused it; NULL if none. Joins accounts.",
        "booking_date": "When it was booked.",
        "value_date": "From when it counts for interest and settlement.",
        "amount": "Change of cash, in `currency`: plus is in, minus is out.",
        "currency": "Currency of the amounts.",
        "running_balance": "Sum of the entries up to this one, in `currency`. Too low or too high "
        "by a constant where the log begins in the middle.",
        "is_reversal": "True if the entry takes back another one.",
        "instrument_uuid": "Instrument that caused it, in corporate actions. Joins instruments.",
        "isin": "Its ISIN; NULL if not told.",
        "created_at": "When the entry was created.",
        "updated_at": "When the entry last changed.",
    },
)

# The same rules as in the read model of orders: `""` is unset and then the event's time counts; an
# event whose time is none is left out; a bare date is midnight UTC, whatever the session's zone.
ORDER_STATUS_HISTORY = View(
    """
    SELECT s.order_id, row_number() OVER reached AS step, s.status, s.reached_at,
           s.reached_at - lag(s.reached_at) OVER reached AS after_previous
    FROM (
        SELECT v.order_id, v.status, min(v.at) AS reached_at
        FROM (
            SELECT e.entity_id AS order_id, nullif(e.payload #>> '{object,status}', '') AS status,
                   CASE WHEN coalesce(o.updated_at, '') = '' THEN e.created_at
                        WHEN pipeline.first_fault(
                                 e.payload -> 'object', ARRAY['updated_at'], ARRAY['time'],
                                 ARRAY['updated_at']) IS NOT NULL THEN NULL
                        WHEN length(o.updated_at) = 10
                             THEN CAST(o.updated_at || ' 00:00:00Z' AS timestamptz)
                        ELSE CAST(o.updated_at AS timestamptz) END AS at
            FROM pipeline.events e
            CROSS JOIN LATERAL (SELECT e.payload #>> '{object,updated_at}' AS updated_at) o
            WHERE e.event_type LIKE 'ORDER.%' AND e.entity_id IS NOT NULL AND e.problem IS NULL
              AND e.repeat_of IS NULL AND e.payload #>> '{object,id}' IS NOT NULL
        ) v
        WHERE v.status IS NOT NULL AND v.at IS NOT NULL
        GROUP BY v.order_id, v.status
    ) s
    WINDOW reached AS (PARTITION BY s.order_id ORDER BY s.reached_at, s.status)
    """,
    "When each order reached each status, from the log: one row per order and status. Ask for one "
    "`order_id` and it is quick; without, it reads every order event there is. It may tell of "
    "orders that are not in orders, because their event was put aside for another value.",
    {
        "order_id": "The order. Joins orders.",
        "step": "1 for the first status known of the order, and so on in the order of time.",
        "status": "NEW, PROCESSING, FILLED or CANCELLED.",
        "reached_at": "When the order first had this status.",
        "after_previous": "Time since the status before; NULL for the first one known.",
    },
)

CASH_RECONCILIATION = View(
    """
    SELECT account_group_id, currency, b.balance, coalesce(t.ledger_sum, 0) AS ledger_sum,
           coalesce(b.balance, 0) - coalesce(t.ledger_sum, 0) AS break_amount,
           coalesce(b.balance, 0) <> coalesce(t.ledger_sum, 0) AS is_break,
           coalesce(t.entries, 0) AS entries, b.as_of AS balance_as_of, t.last_entry_at
    FROM upvest.cash_balances b
    FULL JOIN (
        SELECT account_group_id, currency, sum(amount) AS ledger_sum, count(*) AS entries,
               max(created_at) AS last_entry_at
        FROM upvest.cash_transactions GROUP BY account_group_id, currency
    ) t USING (account_group_id, currency)
    """,
    "Does the cash add up? One row per account group and currency: the balance as last told "
    "against the sum of the ledger. A break is normal while one of the two is under way, and "
    "where the log begins in the middle.",
    {
        "account_group_id": "Account group. Joins account_groups.",
        "currency": "Currency of every amount in this row.",
        "balance": "Balance as last told; NULL if none ever was, then it counts as 0.",
        "ledger_sum": "Sum of all entries of the ledger; 0 without any.",
        "break_amount": "balance - ledger_sum; 0 when it adds up.",
        "is_break": "True if it does not add up.",
        "entries": "Number of entries of the ledger.",
        "balance_as_of": "When the balance was told.",
        "last_entry_at": "When the last entry was created; NULL without any.",
    },
)

POSITION_RECONCILIATION = View(
    """
    SELECT account_id, instrument_uuid, coalesce(i.name, i.isin, p.isin, t.isin) AS instrument_name,
           p.quantity, coalesce(t.ledger_sum, 0) AS ledger_sum,
           coalesce(p.quantity, 0) - coalesce(t.ledger_sum, 0) AS break_quantity,
           coalesce(p.quantity, 0) <> coalesce(t.ledger_sum, 0) AS is_break,
           coalesce(t.entries, 0) AS entries, p.as_of AS position_as_of, t.last_entry_at
    FROM upvest.positions p
    FULL JOIN (
        SELECT account_id, instrument_uuid, sum(quantity) AS ledger_sum, count(*) AS entries,
               max(created_at) AS last_entry_at, max(isin) AS isin
        FROM upvest.security_transactions GROUP BY account_id, instrument_uuid
    ) t USING (account_id, instrument_uuid)
    LEFT JOIN upvest.instruments i USING (instrument_uuid)
    """,
    "Do the units add up? One row per account and instrument: the position as last told against "
    "the sum of the ledger. A break is normal while one of the two is under way, and where the "
    "log begins in the middle.",
    {
        "account_id": "Account. Joins accounts.",
        "instrument_uuid": "Instrument. Joins instruments.",
        "instrument_name": "Name of the instrument; its ISIN until the name is known.",
        "quantity": "Units as last told; NULL if none ever were, then they count as 0.",
        "ledger_sum": "Sum of all entries of the ledger; 0 without any.",
        "break_quantity": "quantity - ledger_sum, in units; 0 when it adds up.",
        "is_break": "True if it does not add up.",
        "entries": "Number of entries of the ledger.",
        "position_as_of": "When the position was told.",
        "last_entry_at": "When the last entry was created; NULL without any.",
    },
)

VIEWS = {
    "holdings": HOLDINGS,
    "order_book": ORDER_BOOK,
    "order_status_history": ORDER_STATUS_HISTORY,
    "cash_ledger": CASH_LEDGER,
    "cash_reconciliation": CASH_RECONCILIATION,
    "position_reconciliation": POSITION_RECONCILIATION,
}


def _quoted(comment: str) -> str:
    return "'" + comment.replace("'", "''") + "'"


def upgrade() -> None:
    for name, view in VIEWS.items():
        op.execute(f"CREATE VIEW upvest.{name} AS {view.query}")
        op.execute(f"COMMENT ON VIEW upvest.{name} IS {_quoted(view.comment)}")
        for column, comment in view.columns.items():
            op.execute(f"COMMENT ON COLUMN upvest.{name}.{column} IS {_quoted(comment)}")


def downgrade() -> None:
    for name in VIEWS:
        op.execute(f"DROP VIEW upvest.{name}")
