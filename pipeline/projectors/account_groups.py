"""Account groups: who holds, and where the cash lies. With the users who belong to each."""

from pipeline.readmodel import Children, Snapshot, enum, text, time, uuid

account_groups = Snapshot(
    table="account_groups",
    comment="One row per account group, as of its newest event. Cash is held by the group, "
    "securities by its accounts.",
    events="ACCOUNT_GROUP.*",
    key=uuid("account_group_id", "id", "Upvest's id of the account group."),
    newest_by="updated_at",
    fields=[
        time("created_at", "created_at", "When the group was created."),
        time("updated_at", "updated_at", "When the group last changed."),
        enum(
            "group_type", "type", "PERSONAL, LEGAL_ENTITY, FRENCH_PEA, ISA, CHILD or a later one."
        ),
        enum(
            "status",
            "status",
            "PENDING_APPROVAL, ACTIVE, LOCKED, CLOSING or CLOSED. LOCKED may be left again.",
            steps=("PENDING_APPROVAL", {"ACTIVE", "LOCKED"}, "CLOSING"),
            ends=("CLOSED",),
        ),
        text(
            "securities_account_number",
            "securities_account_number",
            "Official depot number, nine digits, leading zeros count.",
            personal=True,
        ),
        uuid("business_id", "business_id", "Business that holds the group; NULL for persons."),
    ],
    children=[
        Children(
            table="account_group_users",
            comment="Users of an account group, one row each. The group of a business has none.",
            path="users",
            indexes=["user_id"],
            fields=[
                uuid("user_id", "id", "User who belongs to the group. Joins users."),
                enum("role", "type", "OWNER, GUARDIAN or CHILD."),
            ],
        )
    ],
)
