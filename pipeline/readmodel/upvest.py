"""The vocabulary of Upvest's domain: columns that mean the same in every read model.

Names and paths are those of Upvest's event reference (https://docs.upvest.co); a key is
``<entity>_id``, and a column that refers to a table has the name of that table's key.
"""

from dataclasses import replace

from pipeline.readmodel.fields import (
    Field,
    Path,
    enum,
    event_time,
    money,
    text,
    time,
    uuid,
)
from pipeline.readmodel.lifecycle import Lifecycle
from pipeline.readmodel.model import Children

HOLDER = Lifecycle("PENDING_APPROVAL", {"ACTIVE", "LOCKED"}, "CLOSING", ends={"CLOSED"})
"""States of an account and of an account group. LOCKED may be left again."""


def entity_id(entity: str, *, column: str | None = None) -> Field:
    """The key of an entity: ``order_id`` from the object's ``id``.

    Args:
        entity: In the singular: ``order``, ``account group``.
        column: Name of the column, where it is not ``<entity>_id``.
    """
    name = column or f"{entity.replace(' ', '_')}_id"
    # An id is none of the data that the entity may hold: tax_wrapper_id names no tax.
    return uuid(name, f"Upvest's id of the {entity}.", path="id", personal=False)


def created_at(entity: str) -> Field:
    """When Upvest created the entity."""
    return time("created_at", f"When the {entity} was created.")


def updated_at(entity: str, *, or_event_time: bool = False) -> Field:
    """When the entity last changed; the column by which the newest event wins.

    Args:
        entity: In the singular.
        or_event_time: Upvest may leave it out: the time of the event then counts.
    """
    remark = " The event's time where Upvest gives none." if or_event_time else ""
    comment = f"When the {entity} last changed.{remark}"
    return time("updated_at", comment, or_event_time=or_event_time)


def as_of(entity: str) -> Field:
    """When the event arose that wrote the row, for objects without a time of their own."""
    return event_time("as_of", f"When Upvest reported it: the {entity} has no time of its own.")


def refers_to(
    table: str, comment: str, *, column: str | None = None, path: Path | None = None
) -> Field:
    """The id of a row in another read model, indexed; that row may come later.

    Args:
        table: The read model: ``accounts``.
        comment: What the row is to this one.
        column: Name of the column, where it is not the other table's key.
        path: Place in the event's ``object``; by default the column's name.
    """
    name = column or key_of(table)
    field = uuid(name, f"{comment} Joins {table}.", path=path, personal=False, indexed=True)
    return replace(field, refers_to=table)


def key_of(table: str) -> str:
    """The key of a read model: ``account_id`` of ``accounts``."""
    if table == "instruments":
        return "instrument_uuid"
    singular = table.removesuffix("es") if table.endswith("sses") else table.removesuffix("s")
    return f"{singular}_id"


def currency(of_what: str, *, path: Path | None = None) -> Field:
    """The currency of amounts in the row: ``currency("every amount in this row")``."""
    return enum("currency", f"Currency of {of_what}.", path=path)


def isin(comment: str, *, path: Path | None = None) -> Field:
    """An ISIN; an instrument may have had several, see ``instrument_isins``."""
    return text("isin", comment, path=path, indexed=True)


def instrument(comment: str) -> tuple[Field, Field]:
    """An instrument inside the object: its id, and its ISIN where that is given."""
    return (
        refers_to("instruments", comment, path="instrument.uuid"),
        text("isin", "ISIN as given in the event; NULL if not given.", path="instrument.isin"),
    )


def members(entity: str) -> Children:
    """The users of an account or account group."""
    of_entity = entity.replace(" ", "_")
    return Children(
        table=f"{of_entity}_users",
        comment=f"Users of an {entity}, one row each. The {entity} of a business has none.",
        path="users",
        fields=[
            refers_to("users", f"User who belongs to the {entity}.", path="id"),
            enum("role", "OWNER, GUARDIAN or CHILD.", path="type"),
        ],
    )


def taxes(table: str, comment: str, *further: Field) -> Children:
    """The taxes of an execution or of a cash entry, one row per kind."""
    return Children(
        table=table,
        comment=comment,
        path="taxes",
        fields=[
            enum("tax_type", "Kind of tax; TOTAL is the sum.", path="type", personal=False),
            money("amount", "Amount of tax, in `currency` of the parent."),
            *further,
        ],
    )


def references(table: str, comment: str, names: str) -> Children:
    """What caused an entry of a ledger, one row per cause."""
    return Children(
        table=table,
        comment=comment,
        path="references",
        fields=[
            uuid(
                "reference_id",
                "Id of the cause: of orders for ORDER, of executions for ORDER_EXECUTION.",
                path="id",
                indexed=True,
            ),
            enum("reference_type", f"What the id names: {names} and others.", path="type"),
        ],
    )
