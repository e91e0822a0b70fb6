"""What a projector's file imports: the kinds of read model and the kinds of columns.

A projector declares which events feed a table and where each column's value is in the event. It
does not handle how the log is read, divided into batches, checked, repeated and rebuilt.
``pipeline.readmodel.upvest`` has the columns that mean the same in every read model of Upvest.
"""

from pipeline.readmodel.fields import (
    ELEMENT,
    Field,
    Lifecycle,
    boolean,
    by_event_type,
    date,
    earliest,
    enum,
    event_category,
    event_entity_id,
    event_id,
    event_time,
    event_type,
    integer,
    json,
    money,
    quantity,
    status,
    text,
    text_list,
    time,
    uuid,
)
from pipeline.readmodel.model import (
    Children,
    Custom,
    CustomBatch,
    EntityTable,
    EventTable,
    LedgerTable,
    Projector,
    Source,
)

__all__ = [
    "ELEMENT",
    "Children",
    "Custom",
    "CustomBatch",
    "EntityTable",
    "EventTable",
    "Field",
    "LedgerTable",
    "Lifecycle",
    "Projector",
    "Source",
    "boolean",
    "by_event_type",
    "date",
    "earliest",
    "enum",
    "event_category",
    "event_entity_id",
    "event_id",
    "event_time",
    "event_type",
    "integer",
    "json",
    "money",
    "quantity",
    "status",
    "text",
    "text_list",
    "time",
    "uuid",
]
