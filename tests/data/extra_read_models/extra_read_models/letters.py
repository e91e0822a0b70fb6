"""Letters: one row per letter."""

from pipeline.readmodel import EntityTable, text
from pipeline.readmodel.upvest import entity_id, refers_to

letters = EntityTable(
    table="letters",
    comment="One row per letter to a user.",
    events="LETTER.*",
    key=entity_id("letter"),
    fields=[
        refers_to("users", "User who gets the letter."),
        text("street", "Where to.", personal=True),
        text("stamp", "Stamp."),
    ],
)
