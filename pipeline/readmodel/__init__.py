"""What a projector's file imports: the kinds of read model and the kinds of columns.

A projector declares which events feed a table and where each column's value stands in the event.
How the log is read, cut into batches, checked, repeated and rebuilt is not its business.
"""

from pipeline.readmodel.batch import Batch
from pipeline.readmodel.fields import (
    Field,
    boolean,
    date,
    enum,
    event_time,
    integer,
    json,
    money,
    quantity,
    text,
    text_list,
    time,
    uuid,
)
from pipeline.readmodel.model import (
    Children,
    Custom,
    Ledger,
    Notice,
    Projector,
    Snapshot,
    Source,
    read_model_table,
)

__all__ = [
    "Batch",
    "Children",
    "Custom",
    "Field",
    "Ledger",
    "Notice",
    "Projector",
    "Snapshot",
    "Source",
    "boolean",
    "date",
    "enum",
    "event_time",
    "integer",
    "json",
    "money",
    "quantity",
    "read_model_table",
    "text",
    "text_list",
    "time",
    "uuid",
]
