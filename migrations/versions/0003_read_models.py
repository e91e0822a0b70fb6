"""The first read models.

Lock: none that matters, everything is new. The service may run meanwhile.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"

# Projector: its tables, the one that is named like it first. Truncated, each heals by itself.
READ_MODELS = {
    "account_groups": ["account_groups", "account_group_users"],
    "accounts": ["accounts", "account_users"],
    "cash_balances": ["cash_balances"],
    "cash_transactions": [
        "cash_transactions",
        "cash_transaction_references",
        "cash_transaction_taxes",
    ],
    "executions": ["executions", "execution_taxes"],
    "instrument_isins": ["instrument_isins"],
    "instruments": ["instruments"],
    "order_cancellation_rejections": ["order_cancellation_rejections"],
    "orders": ["orders"],
    "positions": ["positions"],
    "security_transactions": ["security_transactions", "security_transaction_references"],
    "user_checks": ["user_checks"],
    "users": ["users"],
}


def upgrade() -> None:
    op.create_table(
        "account_group_users",
        sa.Column(
            "account_group_id",
            sa.Uuid(),
            nullable=False,
            comment="Upvest's id of the account group.",
        ),
        sa.Column(
            "position",
            sa.Integer(),
            autoincrement=False,
            nullable=False,
            comment="Place in the list, from 1.",
        ),
        sa.Column(
            "user_id",
            sa.Uuid(),
            nullable=True,
            comment="User who belongs to the group. Joins users.",
        ),
        sa.Column("role", sa.Text(), nullable=True, comment="OWNER, GUARDIAN or CHILD."),
        sa.PrimaryKeyConstraint(
            "account_group_id", "position", name=op.f("account_group_users_pkey")
        ),
        schema="upvest",
        comment="Users of an account group, one row each. The group of a business has none.",
    )
    op.create_index(
        op.f("account_group_users_user_id_idx"),
        "account_group_users",
        ["user_id"],
        unique=False,
        schema="upvest",
    )
    op.create_table(
        "account_groups",
        sa.Column(
            "account_group_id",
            sa.Uuid(),
            nullable=False,
            comment="Upvest's id of the account group.",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the group was created.",
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the group last changed.",
        ),
        sa.Column(
            "group_type",
            sa.Text(),
            nullable=True,
            comment="PERSONAL, LEGAL_ENTITY, FRENCH_PEA, ISA, CHILD or a later one.",
        ),
        sa.Column(
            "status",
            sa.Text(),
            nullable=True,
            comment=(
                "PENDING_APPROVAL, ACTIVE, LOCKED, CLOSING or CLOSED. LOCKED may be left again."
            ),
        ),
        sa.Column(
            "securities_account_number",
            sa.Text(),
            nullable=True,
            comment="Official depot number, nine digits, leading zeros count.",
        ),
        sa.Column(
            "business_id",
            sa.Uuid(),
            nullable=True,
            comment="Business that holds the group; NULL for persons.",
        ),
        sa.Column("_event_id", sa.Uuid(), nullable=True, comment="Event that wrote this row."),
        sa.Column(
            "_version_time",
            sa.DateTime(timezone=True),
            nullable=False,
            comment=(
                "Version: the object's own time of change, else the event's; 1970 where time "
                "does not come first."
            ),
        ),
        sa.Column(
            "_version_rank",
            sa.SmallInteger(),
            nullable=False,
            comment="Version: how far its status has come; 0 without status.",
        ),
        sa.Column(
            "_version_created",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Version: when the event arose.",
        ),
        sa.Column(
            "_topic",
            sa.Text(collation="C"),
            nullable=False,
            comment="Topic of the event that wrote this row.",
        ),
        sa.Column("_partition", sa.Integer(), nullable=False, comment="Partition of that event."),
        sa.Column("_offset", sa.BigInteger(), nullable=False, comment="Offset of that event."),
        sa.PrimaryKeyConstraint("account_group_id", name=op.f("account_groups_pkey")),
        schema="upvest",
        comment=(
            "One row per account group, as of its newest event. Cash is held by the group, "
            "securities by its accounts."
        ),
    )
    op.create_table(
        "account_users",
        sa.Column("account_id", sa.Uuid(), nullable=False, comment="Upvest's id of the account."),
        sa.Column(
            "position",
            sa.Integer(),
            autoincrement=False,
            nullable=False,
            comment="Place in the list, from 1.",
        ),
        sa.Column(
            "user_id",
            sa.Uuid(),
            nullable=True,
            comment="User who belongs to the account. Joins users.",
        ),
        sa.Column("role", sa.Text(), nullable=True, comment="OWNER, GUARDIAN or CHILD."),
        sa.PrimaryKeyConstraint("account_id", "position", name=op.f("account_users_pkey")),
        schema="upvest",
        comment="Users of an account, one row each. The account of a business has none.",
    )
    op.create_index(
        op.f("account_users_user_id_idx"),
        "account_users",
        ["user_id"],
        unique=False,
        schema="upvest",
    )
    op.create_table(
        "accounts",
        sa.Column("account_id", sa.Uuid(), nullable=False, comment="Upvest's id of the account."),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the account was created.",
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the account last changed.",
        ),
        sa.Column(
            "account_group_id",
            sa.Uuid(),
            nullable=True,
            comment="Group it belongs to. Joins account_groups.",
        ),
        sa.Column("account_type", sa.Text(), nullable=True, comment="TRADING or PORTFOLIO."),
        sa.Column(
            "account_number",
            sa.Integer(),
            nullable=True,
            comment="Number of the account inside its group.",
        ),
        sa.Column(
            "name",
            sa.Text(),
            nullable=True,
            comment="Label, free text; NULL without. May hold personal data.",
        ),
        sa.Column(
            "status",
            sa.Text(),
            nullable=True,
            comment=(
                "PENDING_APPROVAL, ACTIVE, LOCKED, CLOSING or CLOSED. LOCKED may be left again."
            ),
        ),
        sa.Column(
            "business_id",
            sa.Uuid(),
            nullable=True,
            comment="Business that holds the account; NULL for persons.",
        ),
        sa.Column("_event_id", sa.Uuid(), nullable=True, comment="Event that wrote this row."),
        sa.Column(
            "_version_time",
            sa.DateTime(timezone=True),
            nullable=False,
            comment=(
                "Version: the object's own time of change, else the event's; 1970 where time "
                "does not come first."
            ),
        ),
        sa.Column(
            "_version_rank",
            sa.SmallInteger(),
            nullable=False,
            comment="Version: how far its status has come; 0 without status.",
        ),
        sa.Column(
            "_version_created",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Version: when the event arose.",
        ),
        sa.Column(
            "_topic",
            sa.Text(collation="C"),
            nullable=False,
            comment="Topic of the event that wrote this row.",
        ),
        sa.Column("_partition", sa.Integer(), nullable=False, comment="Partition of that event."),
        sa.Column("_offset", sa.BigInteger(), nullable=False, comment="Offset of that event."),
        sa.PrimaryKeyConstraint("account_id", name=op.f("accounts_pkey")),
        schema="upvest",
        comment=(
            "One row per account, as of its newest event. Securities are held by the account, its "
            "cash by the account group."
        ),
    )
    op.create_index(
        op.f("accounts_account_group_id_idx"),
        "accounts",
        ["account_group_id"],
        unique=False,
        schema="upvest",
    )
    op.create_table(
        "cash_balances",
        sa.Column(
            "account_group_id",
            sa.Uuid(),
            nullable=False,
            comment="Group whose cash it is. Joins account_groups.",
        ),
        sa.Column(
            "currency", sa.Text(), nullable=False, comment="Currency of every amount in this row."
        ),
        sa.Column(
            "as_of",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When Upvest told it; a balance has no time of its own.",
        ),
        sa.Column("balance", sa.Numeric(), nullable=True, comment="Cash in total."),
        sa.Column(
            "locked_for_trading",
            sa.Numeric(),
            nullable=True,
            comment="Cash bound in open buy orders.",
        ),
        sa.Column(
            "pending_settlement",
            sa.Numeric(),
            nullable=True,
            comment="Cash from sales not yet settled.",
        ),
        sa.Column(
            "available_for_withdrawal",
            sa.Numeric(),
            nullable=True,
            comment="Cash that may be paid out.",
        ),
        sa.Column(
            "available_for_trading",
            sa.Numeric(),
            nullable=True,
            comment="Cash that may be invested.",
        ),
        sa.Column("_event_id", sa.Uuid(), nullable=True, comment="Event that wrote this row."),
        sa.Column(
            "_version_time",
            sa.DateTime(timezone=True),
            nullable=False,
            comment=(
                "Version: the object's own time of change, else the event's; 1970 where time "
                "does not come first."
            ),
        ),
        sa.Column(
            "_version_rank",
            sa.SmallInteger(),
            nullable=False,
            comment="Version: how far its status has come; 0 without status.",
        ),
        sa.Column(
            "_version_created",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Version: when the event arose.",
        ),
        sa.Column(
            "_topic",
            sa.Text(collation="C"),
            nullable=False,
            comment="Topic of the event that wrote this row.",
        ),
        sa.Column("_partition", sa.Integer(), nullable=False, comment="Partition of that event."),
        sa.Column("_offset", sa.BigInteger(), nullable=False, comment="Offset of that event."),
        sa.PrimaryKeyConstraint("account_group_id", "currency", name=op.f("cash_balances_pkey")),
        schema="upvest",
        comment=(
            "One row per account group and currency, as last told. Amounts in `currency`; they may"
            " be negative, and the parts need not add up to the balance."
        ),
    )
    op.create_table(
        "cash_transaction_references",
        sa.Column(
            "cash_transaction_id",
            sa.Uuid(),
            nullable=False,
            comment=(
                "Upvest's id of the entry; its reversal may have the same, so `transaction_type` "
                "belongs to the key."
            ),
        ),
        sa.Column(
            "transaction_type",
            sa.Text(),
            nullable=False,
            comment=(
                "What was booked, e.g. ORDER_EXECUTION; a reversal ends in _CANCELLATION or "
                "_CHARGE_BACK."
            ),
        ),
        sa.Column(
            "position",
            sa.Integer(),
            autoincrement=False,
            nullable=False,
            comment="Place in the list, from 1.",
        ),
        sa.Column(
            "reference_id",
            sa.Uuid(),
            nullable=True,
            comment="Id of the thing: of orders for ORDER, of executions for ORDER_EXECUTION.",
        ),
        sa.Column(
            "reference_type",
            sa.Text(),
            nullable=True,
            comment=(
                "What the id names: ORDER, ORDER_EXECUTION, WITHDRAWAL, DIRECT_DEBIT, TOPUP, "
                "FEE_COLLECTION, CORPORATE_ACTION and others."
            ),
        ),
        sa.PrimaryKeyConstraint(
            "cash_transaction_id",
            "transaction_type",
            "position",
            name=op.f("cash_transaction_references_pkey"),
        ),
        schema="upvest",
        comment="What caused a cash entry, one row for each thing.",
    )
    op.create_index(
        op.f("cash_transaction_references_reference_id_idx"),
        "cash_transaction_references",
        ["reference_id"],
        unique=False,
        schema="upvest",
    )
    op.create_table(
        "cash_transaction_taxes",
        sa.Column(
            "cash_transaction_id",
            sa.Uuid(),
            nullable=False,
            comment=(
                "Upvest's id of the entry; its reversal may have the same, so `transaction_type` "
                "belongs to the key."
            ),
        ),
        sa.Column(
            "transaction_type",
            sa.Text(),
            nullable=False,
            comment=(
                "What was booked, e.g. ORDER_EXECUTION; a reversal ends in _CANCELLATION or "
                "_CHARGE_BACK."
            ),
        ),
        sa.Column(
            "position",
            sa.Integer(),
            autoincrement=False,
            nullable=False,
            comment="Place in the list, from 1.",
        ),
        sa.Column("tax_type", sa.Text(), nullable=True, comment="Kind of tax; TOTAL is all of it."),
        sa.Column("amount", sa.Numeric(), nullable=True, comment="Amount of tax, in `currency`."),
        sa.Column("currency", sa.Text(), nullable=True, comment="Currency of `amount`."),
        sa.PrimaryKeyConstraint(
            "cash_transaction_id",
            "transaction_type",
            "position",
            name=op.f("cash_transaction_taxes_pkey"),
        ),
        schema="upvest",
        comment=(
            "Taxes inside a cash entry: part of its amount, for information. A reversal repeats "
            "them with the same sign, so do not add them up without the entry's sign."
        ),
    )
    op.create_table(
        "cash_transactions",
        sa.Column(
            "cash_transaction_id",
            sa.Uuid(),
            nullable=False,
            comment=(
                "Upvest's id of the entry; its reversal may have the same, so `transaction_type` "
                "belongs to the key."
            ),
        ),
        sa.Column(
            "transaction_type",
            sa.Text(),
            nullable=False,
            comment=(
                "What was booked, e.g. ORDER_EXECUTION; a reversal ends in _CANCELLATION or "
                "_CHARGE_BACK."
            ),
        ),
        sa.Column(
            "account_group_id",
            sa.Uuid(),
            nullable=True,
            comment="Group whose cash moves. Joins account_groups.",
        ),
        sa.Column(
            "account_id",
            sa.Uuid(),
            nullable=True,
            comment="Account that caused it; NULL if none. Joins accounts.",
        ),
        sa.Column(
            "amount",
            sa.Numeric(),
            nullable=True,
            comment="Change of cash, in `currency`: plus is in, minus is out.",
        ),
        sa.Column("currency", sa.Text(), nullable=True, comment="Currency of `amount`."),
        sa.Column(
            "booking_date",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When it was booked; the ledger is in this order.",
        ),
        sa.Column(
            "value_date",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="From when it counts for interest and settlement.",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the entry was created.",
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the entry last changed; it rarely does.",
        ),
        sa.Column(
            "instrument_uuid",
            sa.Uuid(),
            nullable=True,
            comment=(
                "Instrument that caused it, in corporate actions; else NULL. Joins instruments."
            ),
        ),
        sa.Column("isin", sa.Text(), nullable=True, comment="Its ISIN; NULL if not told."),
        sa.Column(
            "tax_details",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="Details of the tax as they came; NULL without tax.",
        ),
        sa.Column("_event_id", sa.Uuid(), nullable=True, comment="Event that wrote this row."),
        sa.Column(
            "_version_time",
            sa.DateTime(timezone=True),
            nullable=False,
            comment=(
                "Version: the object's own time of change, else the event's; 1970 where time "
                "does not come first."
            ),
        ),
        sa.Column(
            "_version_rank",
            sa.SmallInteger(),
            nullable=False,
            comment="Version: how far its status has come; 0 without status.",
        ),
        sa.Column(
            "_version_created",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Version: when the event arose.",
        ),
        sa.Column(
            "_topic",
            sa.Text(collation="C"),
            nullable=False,
            comment="Topic of the event that wrote this row.",
        ),
        sa.Column("_partition", sa.Integer(), nullable=False, comment="Partition of that event."),
        sa.Column("_offset", sa.BigInteger(), nullable=False, comment="Offset of that event."),
        sa.PrimaryKeyConstraint(
            "cash_transaction_id", "transaction_type", name=op.f("cash_transactions_pkey")
        ),
        schema="upvest",
        comment=(
            "One row per entry of the cash ledger. Their sum per account group and currency is the"
            " balance. A reversal is an entry of its own with the opposite sign."
        ),
    )
    op.create_index(
        op.f("cash_transactions_account_group_id_idx"),
        "cash_transactions",
        ["account_group_id"],
        unique=False,
        schema="upvest",
    )
    op.create_index(
        op.f("cash_transactions_account_id_idx"),
        "cash_transactions",
        ["account_id"],
        unique=False,
        schema="upvest",
    )
    op.create_table(
        "execution_taxes",
        sa.Column(
            "execution_id", sa.Uuid(), nullable=False, comment="Upvest's id of the execution."
        ),
        sa.Column(
            "position",
            sa.Integer(),
            autoincrement=False,
            nullable=False,
            comment="Place in the list, from 1.",
        ),
        sa.Column("tax_type", sa.Text(), nullable=True, comment="Kind of tax; TOTAL is all of it."),
        sa.Column(
            "amount",
            sa.Numeric(),
            nullable=True,
            comment="Amount of tax, in the execution's currency.",
        ),
        sa.PrimaryKeyConstraint("execution_id", "position", name=op.f("execution_taxes_pkey")),
        schema="upvest",
        comment="Taxes of an execution, one row for each kind.",
    )
    op.create_table(
        "executions",
        sa.Column(
            "execution_id", sa.Uuid(), nullable=False, comment="Upvest's id of the execution."
        ),
        sa.Column(
            "order_id",
            sa.Uuid(),
            nullable=True,
            comment="Order that it fills. Joins orders, which may come later.",
        ),
        sa.Column("side", sa.Text(), nullable=True, comment="BUY or SELL."),
        sa.Column(
            "cash_amount",
            sa.Numeric(),
            nullable=True,
            comment="Amount paid or received, in `currency`.",
        ),
        sa.Column("share_quantity", sa.Numeric(), nullable=True, comment="Units bought or sold."),
        sa.Column("price", sa.Numeric(), nullable=True, comment="Price per unit, in `currency`."),
        sa.Column(
            "currency", sa.Text(), nullable=True, comment="Currency of every amount in this row."
        ),
        sa.Column(
            "transaction_time",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the trade was made.",
        ),
        sa.Column(
            "settlement_date",
            sa.Date(),
            nullable=True,
            comment="Day on which cash and units change hands.",
        ),
        sa.Column(
            "status",
            sa.Text(),
            nullable=True,
            comment="FILLED, SETTLED, or CANCELLED after a mistrade.",
        ),
        sa.Column("_event_id", sa.Uuid(), nullable=True, comment="Event that wrote this row."),
        sa.Column(
            "_version_time",
            sa.DateTime(timezone=True),
            nullable=False,
            comment=(
                "Version: the object's own time of change, else the event's; 1970 where time "
                "does not come first."
            ),
        ),
        sa.Column(
            "_version_rank",
            sa.SmallInteger(),
            nullable=False,
            comment="Version: how far its status has come; 0 without status.",
        ),
        sa.Column(
            "_version_created",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Version: when the event arose.",
        ),
        sa.Column(
            "_topic",
            sa.Text(collation="C"),
            nullable=False,
            comment="Topic of the event that wrote this row.",
        ),
        sa.Column("_partition", sa.Integer(), nullable=False, comment="Partition of that event."),
        sa.Column("_offset", sa.BigInteger(), nullable=False, comment="Offset of that event."),
        sa.PrimaryKeyConstraint("execution_id", name=op.f("executions_pkey")),
        schema="upvest",
        comment=(
            "One row per execution of an order, as of its newest event. Amounts and units are "
            "unsigned: `side` tells the direction."
        ),
    )
    op.create_index(
        op.f("executions_order_id_idx"), "executions", ["order_id"], unique=False, schema="upvest"
    )
    op.create_table(
        "instrument_isins",
        sa.Column(
            "isin",
            sa.Text(),
            nullable=False,
            comment="ISIN. Joins orders, which know no other name.",
        ),
        sa.Column(
            "instrument_uuid",
            sa.Uuid(),
            nullable=False,
            comment="Instrument that had it. Joins instruments.",
        ),
        sa.Column(
            "first_seen",
            sa.DateTime(timezone=True),
            nullable=True,
            comment=(
                "Oldest version of the instrument with this ISIN that we know; NULL without time."
            ),
        ),
        sa.Column(
            "last_seen",
            sa.DateTime(timezone=True),
            nullable=True,
            comment=(
                "Newest version of the instrument with this ISIN that we know; NULL without time."
            ),
        ),
        sa.PrimaryKeyConstraint("isin", "instrument_uuid", name=op.f("instrument_isins_pkey")),
        schema="upvest",
        comment=(
            "Every ISIN that an instrument ever had, one row per pair; rows never go away. An ISIN"
            " with several instruments means the one with the latest last_seen."
        ),
    )
    op.create_index(
        op.f("instrument_isins_instrument_uuid_idx"),
        "instrument_isins",
        ["instrument_uuid"],
        unique=False,
        schema="upvest",
    )
    op.create_table(
        "instruments",
        sa.Column(
            "instrument_uuid", sa.Uuid(), nullable=False, comment="Upvest's id of the instrument."
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When Upvest took the instrument in.",
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the instrument last changed.",
        ),
        sa.Column(
            "isin",
            sa.Text(),
            nullable=True,
            comment="Its ISIN of today; earlier ones are in instrument_isins.",
        ),
        sa.Column(
            "wkn", sa.Text(), nullable=True, comment="German code, six characters; NULL without."
        ),
        sa.Column("name", sa.Text(), nullable=True, comment="Name."),
        sa.Column(
            "fractional_trading",
            sa.Boolean(),
            nullable=True,
            comment="True if parts of a unit may trade.",
        ),
        sa.Column(
            "trading_status", sa.Text(), nullable=True, comment="ACTIVE or INACTIVE; may alternate."
        ),
        sa.Column(
            "details",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="Further master data as it came; NULL if none did.",
        ),
        sa.Column("_event_id", sa.Uuid(), nullable=True, comment="Event that wrote this row."),
        sa.Column(
            "_version_time",
            sa.DateTime(timezone=True),
            nullable=False,
            comment=(
                "Version: the object's own time of change, else the event's; 1970 where time "
                "does not come first."
            ),
        ),
        sa.Column(
            "_version_rank",
            sa.SmallInteger(),
            nullable=False,
            comment="Version: how far its status has come; 0 without status.",
        ),
        sa.Column(
            "_version_created",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Version: when the event arose.",
        ),
        sa.Column(
            "_topic",
            sa.Text(collation="C"),
            nullable=False,
            comment="Topic of the event that wrote this row.",
        ),
        sa.Column("_partition", sa.Integer(), nullable=False, comment="Partition of that event."),
        sa.Column("_offset", sa.BigInteger(), nullable=False, comment="Offset of that event."),
        sa.PrimaryKeyConstraint("instrument_uuid", name=op.f("instruments_pkey")),
        schema="upvest",
        comment=(
            "One row per instrument, as of its newest event. Positions name an instrument by its "
            "id, orders by its ISIN: see instrument_isins."
        ),
    )
    op.create_table(
        "order_cancellation_rejections",
        sa.Column("event_id", sa.Uuid(), nullable=False, comment="Id of the event that says so."),
        sa.Column(
            "order_id",
            sa.Uuid(),
            nullable=True,
            comment="Order that should have been cancelled. Joins orders.",
        ),
        sa.Column(
            "rejected_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When it was refused; midnight UTC where only the day came.",
        ),
        sa.Column("status", sa.Text(), nullable=True, comment="REJECTED."),
        sa.Column(
            "reason", sa.Text(), nullable=True, comment="Why, in Upvest's words; NULL if not said."
        ),
        sa.Column("_event_id", sa.Uuid(), nullable=True, comment="Event that wrote this row."),
        sa.Column(
            "_version_time",
            sa.DateTime(timezone=True),
            nullable=False,
            comment=(
                "Version: the object's own time of change, else the event's; 1970 where time "
                "does not come first."
            ),
        ),
        sa.Column(
            "_version_rank",
            sa.SmallInteger(),
            nullable=False,
            comment="Version: how far its status has come; 0 without status.",
        ),
        sa.Column(
            "_version_created",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Version: when the event arose.",
        ),
        sa.Column(
            "_topic",
            sa.Text(collation="C"),
            nullable=False,
            comment="Topic of the event that wrote this row.",
        ),
        sa.Column("_partition", sa.Integer(), nullable=False, comment="Partition of that event."),
        sa.Column("_offset", sa.BigInteger(), nullable=False, comment="Offset of that event."),
        sa.PrimaryKeyConstraint("event_id", name=op.f("order_cancellation_rejections_pkey")),
        schema="upvest",
        comment=(
            "One row per request to cancel an order that was refused. The order goes on as it was;"
            " a cancellation that succeeds is seen in orders."
        ),
    )
    op.create_index(
        op.f("order_cancellation_rejections_order_id_idx"),
        "order_cancellation_rejections",
        ["order_id"],
        unique=False,
        schema="upvest",
    )
    op.create_table(
        "orders",
        sa.Column("order_id", sa.Uuid(), nullable=False, comment="Upvest's id of the order."),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the order was placed.",
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the order last changed.",
        ),
        sa.Column(
            "user_id",
            sa.Uuid(),
            nullable=True,
            comment="User who ordered; NULL for a business. Joins users.",
        ),
        sa.Column(
            "business_id",
            sa.Uuid(),
            nullable=True,
            comment="Business that ordered; NULL for a user.",
        ),
        sa.Column(
            "account_id", sa.Uuid(), nullable=True, comment="Account that trades. Joins accounts."
        ),
        sa.Column("side", sa.Text(), nullable=True, comment="BUY or SELL."),
        sa.Column("order_type", sa.Text(), nullable=True, comment="MARKET, LIMIT or STOP."),
        sa.Column(
            "isin",
            sa.Text(),
            nullable=True,
            comment="ISIN of the instrument. Joins instrument_isins.",
        ),
        sa.Column(
            "instrument_id_type",
            sa.Text(),
            nullable=True,
            comment="What `isin` holds; ISIN so far.",
        ),
        sa.Column(
            "cash_amount",
            sa.Numeric(),
            nullable=True,
            comment="Ordered amount; NULL for orders by quantity.",
        ),
        sa.Column(
            "currency", sa.Text(), nullable=True, comment="Currency of every amount in this row."
        ),
        sa.Column(
            "quantity",
            sa.Numeric(),
            nullable=True,
            comment="Ordered units; NULL for orders by amount.",
        ),
        sa.Column(
            "limit_price",
            sa.Numeric(),
            nullable=True,
            comment="Worst acceptable price; NULL without limit.",
        ),
        sa.Column(
            "stop_price",
            sa.Numeric(),
            nullable=True,
            comment="Price that triggers the order; NULL without stop.",
        ),
        sa.Column(
            "expiry_date",
            sa.Date(),
            nullable=True,
            comment="Last trading day on which the order may be filled.",
        ),
        sa.Column("fee", sa.Numeric(), nullable=True, comment="Fee of the order."),
        sa.Column(
            "fit_acknowledged",
            sa.Boolean(),
            nullable=True,
            comment=(
                "The user accepted an instrument that does not fit; NULL where nothing was asked."
            ),
        ),
        sa.Column(
            "status",
            sa.Text(),
            nullable=True,
            comment=(
                "Where the order stands: NEW, PROCESSING, FILLED or CANCELLED. A cancelled order "
                "may have executions."
            ),
        ),
        sa.Column(
            "cancellation_reason",
            sa.Text(),
            nullable=True,
            comment="Who cancelled; NULL if nobody did.",
        ),
        sa.Column(
            "initiation_flow",
            sa.Text(),
            nullable=True,
            comment="What gave rise to the order, e.g. API.",
        ),
        sa.Column("execution_flow", sa.Text(), nullable=True, comment="STRAIGHT_THROUGH or BLOCK."),
        sa.Column(
            "client_reference",
            sa.Text(),
            nullable=True,
            comment="The client's own id of the order.",
        ),
        sa.Column("_event_id", sa.Uuid(), nullable=True, comment="Event that wrote this row."),
        sa.Column(
            "_version_time",
            sa.DateTime(timezone=True),
            nullable=False,
            comment=(
                "Version: the object's own time of change, else the event's; 1970 where time "
                "does not come first."
            ),
        ),
        sa.Column(
            "_version_rank",
            sa.SmallInteger(),
            nullable=False,
            comment="Version: how far its status has come; 0 without status.",
        ),
        sa.Column(
            "_version_created",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Version: when the event arose.",
        ),
        sa.Column(
            "_topic",
            sa.Text(collation="C"),
            nullable=False,
            comment="Topic of the event that wrote this row.",
        ),
        sa.Column("_partition", sa.Integer(), nullable=False, comment="Partition of that event."),
        sa.Column("_offset", sa.BigInteger(), nullable=False, comment="Offset of that event."),
        sa.PrimaryKeyConstraint("order_id", name=op.f("orders_pkey")),
        schema="upvest",
        comment="One row per order, as of its newest event. Amounts in `currency`.",
    )
    op.create_index(
        op.f("orders_account_id_idx"), "orders", ["account_id"], unique=False, schema="upvest"
    )
    op.create_index(
        op.f("orders_user_id_idx"), "orders", ["user_id"], unique=False, schema="upvest"
    )
    op.create_table(
        "positions",
        sa.Column(
            "account_id", sa.Uuid(), nullable=False, comment="Account that holds. Joins accounts."
        ),
        sa.Column(
            "instrument_uuid",
            sa.Uuid(),
            nullable=False,
            comment="Instrument that is held. Joins instruments.",
        ),
        sa.Column(
            "isin",
            sa.Text(),
            nullable=True,
            comment="ISIN as told with the position; NULL if not told.",
        ),
        sa.Column(
            "as_of",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When Upvest told it; a position has no time of its own.",
        ),
        sa.Column("quantity", sa.Numeric(), nullable=True, comment="Units held in total."),
        sa.Column(
            "locked_for_trading",
            sa.Numeric(),
            nullable=True,
            comment="Units bound in open sell orders.",
        ),
        sa.Column(
            "pending_settlement",
            sa.Numeric(),
            nullable=True,
            comment="Units bought and not yet settled.",
        ),
        sa.Column(
            "available_for_trading", sa.Numeric(), nullable=True, comment="Units that may be sold."
        ),
        sa.Column(
            "available_for_instruction",
            sa.Numeric(),
            nullable=True,
            comment="Units that count for instructions in corporate actions; NULL if not told.",
        ),
        sa.Column("_event_id", sa.Uuid(), nullable=True, comment="Event that wrote this row."),
        sa.Column(
            "_version_time",
            sa.DateTime(timezone=True),
            nullable=False,
            comment=(
                "Version: the object's own time of change, else the event's; 1970 where time "
                "does not come first."
            ),
        ),
        sa.Column(
            "_version_rank",
            sa.SmallInteger(),
            nullable=False,
            comment="Version: how far its status has come; 0 without status.",
        ),
        sa.Column(
            "_version_created",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Version: when the event arose.",
        ),
        sa.Column(
            "_topic",
            sa.Text(collation="C"),
            nullable=False,
            comment="Topic of the event that wrote this row.",
        ),
        sa.Column("_partition", sa.Integer(), nullable=False, comment="Partition of that event."),
        sa.Column("_offset", sa.BigInteger(), nullable=False, comment="Offset of that event."),
        sa.PrimaryKeyConstraint("account_id", "instrument_uuid", name=op.f("positions_pkey")),
        schema="upvest",
        comment=(
            "One row per account and instrument, as last told. A closed position stays, with "
            "quantity 0. Units, not money; quantities may be negative."
        ),
    )
    op.create_index(
        op.f("positions_instrument_uuid_idx"),
        "positions",
        ["instrument_uuid"],
        unique=False,
        schema="upvest",
    )
    op.create_table(
        "security_transaction_references",
        sa.Column(
            "security_transaction_id",
            sa.Uuid(),
            nullable=False,
            comment=(
                "Upvest's id of the entry; its reversal may have the same, so `transaction_type` "
                "belongs to the key."
            ),
        ),
        sa.Column(
            "transaction_type",
            sa.Text(),
            nullable=False,
            comment="What was booked, e.g. ORDER_EXECUTION; a reversal ends in _CANCELLATION.",
        ),
        sa.Column(
            "position",
            sa.Integer(),
            autoincrement=False,
            nullable=False,
            comment="Place in the list, from 1.",
        ),
        sa.Column(
            "reference_id",
            sa.Uuid(),
            nullable=True,
            comment="Id of the thing: of orders for ORDER, of executions for ORDER_EXECUTION.",
        ),
        sa.Column(
            "reference_type",
            sa.Text(),
            nullable=True,
            comment="What the id names: ORDER, ORDER_EXECUTION, CORPORATE_ACTION and others.",
        ),
        sa.PrimaryKeyConstraint(
            "security_transaction_id",
            "transaction_type",
            "position",
            name=op.f("security_transaction_references_pkey"),
        ),
        schema="upvest",
        comment="What caused an entry of the securities ledger, one row for each thing.",
    )
    op.create_index(
        op.f("security_transaction_references_reference_id_idx"),
        "security_transaction_references",
        ["reference_id"],
        unique=False,
        schema="upvest",
    )
    op.create_table(
        "security_transactions",
        sa.Column(
            "security_transaction_id",
            sa.Uuid(),
            nullable=False,
            comment=(
                "Upvest's id of the entry; its reversal may have the same, so `transaction_type` "
                "belongs to the key."
            ),
        ),
        sa.Column(
            "transaction_type",
            sa.Text(),
            nullable=False,
            comment="What was booked, e.g. ORDER_EXECUTION; a reversal ends in _CANCELLATION.",
        ),
        sa.Column(
            "account_group_id",
            sa.Uuid(),
            nullable=True,
            comment="Group of the account. Joins account_groups.",
        ),
        sa.Column(
            "account_id",
            sa.Uuid(),
            nullable=True,
            comment="Account whose units move. Joins accounts.",
        ),
        sa.Column(
            "instrument_uuid",
            sa.Uuid(),
            nullable=True,
            comment="Instrument that moves. Joins instruments.",
        ),
        sa.Column("isin", sa.Text(), nullable=True, comment="Its ISIN; NULL if not told."),
        sa.Column(
            "quantity",
            sa.Numeric(),
            nullable=True,
            comment="Change of units: plus is in, minus is out.",
        ),
        sa.Column(
            "booking_date",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When it was booked; the ledger is in this order.",
        ),
        sa.Column(
            "value_date", sa.DateTime(timezone=True), nullable=True, comment="From when it counts."
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the entry was created.",
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the entry last changed; it rarely does.",
        ),
        sa.Column("_event_id", sa.Uuid(), nullable=True, comment="Event that wrote this row."),
        sa.Column(
            "_version_time",
            sa.DateTime(timezone=True),
            nullable=False,
            comment=(
                "Version: the object's own time of change, else the event's; 1970 where time "
                "does not come first."
            ),
        ),
        sa.Column(
            "_version_rank",
            sa.SmallInteger(),
            nullable=False,
            comment="Version: how far its status has come; 0 without status.",
        ),
        sa.Column(
            "_version_created",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Version: when the event arose.",
        ),
        sa.Column(
            "_topic",
            sa.Text(collation="C"),
            nullable=False,
            comment="Topic of the event that wrote this row.",
        ),
        sa.Column("_partition", sa.Integer(), nullable=False, comment="Partition of that event."),
        sa.Column("_offset", sa.BigInteger(), nullable=False, comment="Offset of that event."),
        sa.PrimaryKeyConstraint(
            "security_transaction_id", "transaction_type", name=op.f("security_transactions_pkey")
        ),
        schema="upvest",
        comment=(
            "One row per entry of the securities ledger. Their sum per account and instrument is "
            "the position. A reversal is an entry of its own with the opposite sign."
        ),
    )
    op.create_index(
        op.f("security_transactions_account_id_idx"),
        "security_transactions",
        ["account_id"],
        unique=False,
        schema="upvest",
    )
    op.create_table(
        "user_checks",
        sa.Column("check_id", sa.Uuid(), nullable=False, comment="Upvest's id of the check."),
        sa.Column("user_id", sa.Uuid(), nullable=True, comment="User who is checked. Joins users."),
        sa.Column(
            "check_type",
            sa.Text(),
            nullable=True,
            comment="KYC (identity), POR (proof of residence), INSTRUMENT_FIT or COMPLIANCE.",
        ),
        sa.Column(
            "status",
            sa.Text(),
            nullable=True,
            comment="IN_PROGRESS, PASSED or FAILED; may be NULL for COMPLIANCE.",
        ),
        sa.Column(
            "as_of",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the event arose that wrote this row; a check has no other time.",
        ),
        sa.Column(
            "check_confirmed_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the check was completed.",
        ),
        sa.Column(
            "originally_confirmed_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When a renewed check was first completed; NULL if it is not a renewal.",
        ),
        sa.Column(
            "data_download_link",
            sa.Text(),
            nullable=True,
            comment="Where the evidence lies, KYC and POR; the link may expire. Personal data.",
        ),
        sa.Column(
            "document_type",
            sa.Text(),
            nullable=True,
            comment="Document shown, KYC and POR, e.g. PASSPORT.",
        ),
        sa.Column(
            "document_expiration_date", sa.Date(), nullable=True, comment="Its last valid day, KYC."
        ),
        sa.Column(
            "nationality",
            sa.Text(),
            nullable=True,
            comment="Nationality in the document, two letters, KYC. Personal data.",
        ),
        sa.Column("provider", sa.Text(), nullable=True, comment="Who identified the user, KYC."),
        sa.Column(
            "method",
            sa.Text(),
            nullable=True,
            comment="How, KYC: VIDEO_ID, IN_PERSON_ID, ELECTRONIC_ID and others.",
        ),
        sa.Column(
            "kyc_update",
            sa.Boolean(),
            nullable=True,
            comment="True if the KYC check is a renewal; NULL if unknown.",
        ),
        sa.Column(
            "confirmed_address",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="Address that was proven, POR and some KYC, as it came. Personal data.",
        ),
        sa.Column(
            "issuance_date",
            sa.Date(),
            nullable=True,
            comment="Day on which the document was issued, POR.",
        ),
        sa.Column(
            "suitability",
            sa.Boolean(),
            nullable=True,
            comment=(
                "Result of the questions about knowledge, INSTRUMENT_FIT; NULL for other checks."
            ),
        ),
        sa.Column("_event_id", sa.Uuid(), nullable=True, comment="Event that wrote this row."),
        sa.Column(
            "_version_time",
            sa.DateTime(timezone=True),
            nullable=False,
            comment=(
                "Version: the object's own time of change, else the event's; 1970 where time "
                "does not come first."
            ),
        ),
        sa.Column(
            "_version_rank",
            sa.SmallInteger(),
            nullable=False,
            comment="Version: how far its status has come; 0 without status.",
        ),
        sa.Column(
            "_version_created",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Version: when the event arose.",
        ),
        sa.Column(
            "_topic",
            sa.Text(collation="C"),
            nullable=False,
            comment="Topic of the event that wrote this row.",
        ),
        sa.Column("_partition", sa.Integer(), nullable=False, comment="Partition of that event."),
        sa.Column("_offset", sa.BigInteger(), nullable=False, comment="Offset of that event."),
        sa.PrimaryKeyConstraint("check_id", name=op.f("user_checks_pkey")),
        schema="upvest",
        comment=(
            "One row per check of a user, as of its newest event. A renewal is a new check, so a "
            "user has several of the same type over time."
        ),
    )
    op.create_index(
        op.f("user_checks_user_id_idx"), "user_checks", ["user_id"], unique=False, schema="upvest"
    )
    op.create_table(
        "users",
        sa.Column("user_id", sa.Uuid(), nullable=False, comment="Upvest's id of the user."),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the user was created at Upvest.",
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the user last changed.",
        ),
        sa.Column(
            "status",
            sa.Text(),
            nullable=True,
            comment=(
                "INACTIVE until the checks are passed, ACTIVE, OFFBOARDING or OFFBOARDED. ACTIVE "
                "and INACTIVE may alternate."
            ),
        ),
        sa.Column("first_name", sa.Text(), nullable=True, comment="Given name. Personal data."),
        sa.Column("last_name", sa.Text(), nullable=True, comment="Family name. Personal data."),
        sa.Column(
            "salutation",
            sa.Text(),
            nullable=True,
            comment="Form of address; NULL if not given. Personal data.",
        ),
        sa.Column(
            "title",
            sa.Text(),
            nullable=True,
            comment="Academic title, e.g. DR; NULL without. Personal data.",
        ),
        sa.Column(
            "gender", sa.Text(), nullable=True, comment="Gender; NULL if not given. Personal data."
        ),
        sa.Column("birth_date", sa.Date(), nullable=True, comment="Day of birth. Personal data."),
        sa.Column(
            "birth_city",
            sa.Text(),
            nullable=True,
            comment="Place of birth; NULL if not given. Personal data.",
        ),
        sa.Column(
            "birth_country",
            sa.Text(),
            nullable=True,
            comment="Country of birth, two letters (ISO 3166-1); NULL if not given. Personal data.",
        ),
        sa.Column(
            "birth_name",
            sa.Text(),
            nullable=True,
            comment="Family name at birth; NULL if not given. Personal data.",
        ),
        sa.Column(
            "nationalities",
            postgresql.ARRAY(sa.Text()),
            nullable=True,
            comment="Nationalities, two letters each (ISO 3166-1). Personal data.",
        ),
        sa.Column(
            "address_line1", sa.Text(), nullable=True, comment="Home: street. Personal data."
        ),
        sa.Column(
            "address_line2",
            sa.Text(),
            nullable=True,
            comment="Home: number or rest of the street; NULL if not given. Personal data.",
        ),
        sa.Column(
            "address_postcode", sa.Text(), nullable=True, comment="Home: post code. Personal data."
        ),
        sa.Column("address_city", sa.Text(), nullable=True, comment="Home: city. Personal data."),
        sa.Column(
            "address_state",
            sa.Text(),
            nullable=True,
            comment="Home: state or province; NULL if not given. Personal data.",
        ),
        sa.Column(
            "address_country",
            sa.Text(),
            nullable=True,
            comment="Home: country, two letters. Personal data.",
        ),
        sa.Column(
            "postal_address",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="Where letters go, as it came; NULL if to the home. Personal data.",
        ),
        sa.Column(
            "email",
            sa.Text(),
            nullable=True,
            comment="E-mail address; NULL where Upvest does not keep it. Personal data.",
        ),
        sa.Column(
            "phone_number",
            sa.Text(),
            nullable=True,
            comment=(
                "Telephone number, digits only; NULL where Upvest does not keep it. Personal data."
            ),
        ),
        sa.Column(
            "fatca_status",
            sa.Boolean(),
            nullable=True,
            comment="True if liable to tax in the USA; NULL if not asked by Upvest. Personal data.",
        ),
        sa.Column(
            "fatca_confirmed_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the user said so; NULL if not.",
        ),
        sa.Column(
            "tc_document_id",
            sa.Uuid(),
            nullable=True,
            comment=(
                "Version of the terms and conditions that was agreed to; NULL if not by Upvest."
            ),
        ),
        sa.Column(
            "tc_confirmed_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the terms and conditions were agreed to; NULL if not by Upvest.",
        ),
        sa.Column(
            "dps_document_id",
            sa.Uuid(),
            nullable=True,
            comment=(
                "Version of the data privacy agreement that was agreed to; NULL if not by Upvest."
            ),
        ),
        sa.Column(
            "dps_confirmed_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the data privacy agreement was agreed to; NULL if not by Upvest.",
        ),
        sa.Column(
            "tags",
            postgresql.ARRAY(sa.Text()),
            nullable=True,
            comment="Marks of the user, e.g. CLIENT_EMPLOYEE; NULL if none came.",
        ),
        sa.Column("_event_id", sa.Uuid(), nullable=True, comment="Event that wrote this row."),
        sa.Column(
            "_version_time",
            sa.DateTime(timezone=True),
            nullable=False,
            comment=(
                "Version: the object's own time of change, else the event's; 1970 where time "
                "does not come first."
            ),
        ),
        sa.Column(
            "_version_rank",
            sa.SmallInteger(),
            nullable=False,
            comment="Version: how far its status has come; 0 without status.",
        ),
        sa.Column(
            "_version_created",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Version: when the event arose.",
        ),
        sa.Column(
            "_topic",
            sa.Text(collation="C"),
            nullable=False,
            comment="Topic of the event that wrote this row.",
        ),
        sa.Column("_partition", sa.Integer(), nullable=False, comment="Partition of that event."),
        sa.Column("_offset", sa.BigInteger(), nullable=False, comment="Offset of that event."),
        sa.PrimaryKeyConstraint("user_id", name=op.f("users_pkey")),
        schema="upvest",
        comment=(
            "One row per user, as of its newest event. Holds personal data: the other read models "
            "name users by `user_id` only. The tax and social security numbers are not here."
        ),
    )
    for projector, tables in READ_MODELS.items():
        for table in tables:
            op.execute(f"SELECT pipeline.watch_read_model('upvest.{table}', '{projector}')")


def downgrade() -> None:
    for tables in READ_MODELS.values():
        for table in tables:
            op.drop_table(table, schema="upvest")
