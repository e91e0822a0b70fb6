"""Accounts: where securities are held. With the users who belong to each."""

from pipeline.readmodel import EntityTable, enum, integer, status, text, uuid
from pipeline.readmodel.upvest import HOLDER, created_at, entity_id, members, refers_to, updated_at

accounts = EntityTable(
    table="accounts",
    comment="One row per account, as of its newest event. Securities are held by the account, its "
    "cash by the account group.",
    events="ACCOUNT.*",
    key=entity_id("account"),
    newest_by="updated_at",
    fields=[
        created_at("account"),
        updated_at("account"),
        refers_to("account_groups", "Group it belongs to."),
        enum("account_type", "TRADING or PORTFOLIO.", path="type"),
        integer("account_number", "Number of the account in its group.", personal=False),
        text("name", "Label, free text; NULL without.", personal=True),
        status(HOLDER, "LOCKED may be left again."),
        uuid("business_id", "Business that holds the account; NULL for persons."),
    ],
    children=[members("account")],
)
