"""Accounts: where securities lie. With the users who belong to each."""

from pipeline.readmodel import Children, Snapshot, enum, integer, text, time, uuid

accounts = Snapshot(
    table="accounts",
    comment="One row per account, as of its newest event. Securities are held by the account, its "
    "cash by the account group.",
    events="ACCOUNT.*",
    key=uuid("account_id", "id", "Upvest's id of the account."),
    newest_by="updated_at",
    indexes=["account_group_id"],
    fields=[
        time("created_at", "created_at", "When the account was created."),
        time("updated_at", "updated_at", "When the account last changed."),
        uuid("account_group_id", "account_group_id", "Group it belongs to. Joins account_groups."),
        enum("account_type", "type", "TRADING or PORTFOLIO."),
        integer(
            "account_number",
            "account_number",
            "Number of the account inside its group.",
            personal=False,
        ),
        text("name", "name", "Label, free text; NULL without.", personal=True),
        enum(
            "status",
            "status",
            "PENDING_APPROVAL, ACTIVE, LOCKED, CLOSING or CLOSED. LOCKED may be left again.",
            steps=("PENDING_APPROVAL", {"ACTIVE", "LOCKED"}, "CLOSING"),
            ends=("CLOSED",),
        ),
        uuid("business_id", "business_id", "Business that holds the account; NULL for persons."),
    ],
    children=[
        Children(
            table="account_users",
            comment="Users of an account, one row each. The account of a business has none.",
            path="users",
            indexes=["user_id"],
            fields=[
                uuid("user_id", "id", "User who belongs to the account. Joins users."),
                enum("role", "type", "OWNER, GUARDIAN or CHILD."),
            ],
        )
    ],
)
