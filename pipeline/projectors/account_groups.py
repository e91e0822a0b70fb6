"""Account groups: who holds, and where the cash is. With the users who belong to each."""

from pipeline.readmodel import EntityTable, enum, status, text, uuid
from pipeline.readmodel.upvest import HOLDER, created_at, entity_id, members, updated_at

account_groups = EntityTable(
    table="account_groups",
    comment="One row per account group, as of its newest event. Cash is held by the group, "
    "securities by its accounts.",
    events="ACCOUNT_GROUP.*",
    key=entity_id("account group"),
    newest_by="updated_at",
    fields=[
        created_at("group"),
        updated_at("group"),
        enum(
            "group_type",
            "PERSONAL, LEGAL_ENTITY, FRENCH_PEA, ISA, CHILD or a later one.",
            path="type",
        ),
        status(HOLDER, "LOCKED may be left again."),
        text(
            "securities_account_number",
            "Official depot number, nine digits, leading zeros count.",
            personal=True,
        ),
        uuid("business_id", "Business that holds the group; NULL for persons."),
    ],
    children=[members("account group")],
)
