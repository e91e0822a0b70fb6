"""From a declaration to the tables that hold its rows, as SQLAlchemy describes tables.

Each table is a value of its own, in a ``MetaData`` of its own. A table with a personal column is in
the schema for personal data.
"""

from collections.abc import Iterable, Sequence

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Table,
    Text,
    Uuid,
)

from pipeline.db import PERSONAL_SCHEMA, READ_SCHEMA, metadata
from pipeline.readmodel.fields import Field, integer

VERSION_COLUMNS = (
    "_version_time",
    "_version_rank",
    "_version_created",
    "_topic",
    "_partition",
    "_offset",
)
"""The version of a row, compared as one tuple. None is ever NULL: a NULL loses updates silently."""

COORDINATES = VERSION_COLUMNS[3:]

EVENT_COLUMNS = ("_event_type", "_ingested_at")
"""On every row, children included: what loads of increments need."""

POSITION = integer("position", "Place in the array, from 1.")
"""In the key of each child."""


def parent(
    name: str,
    comment: str,
    key: Sequence[Field],
    fields: Sequence[Field],
    indexes: Sequence[Sequence[str]],
    projector: str,
) -> Table:
    """The main table: key, fields, and the version of the event that wrote the row."""
    own = [_column(field, primary_key=True) for field in key]
    own += [_column(field) for field in fields]
    columns = [*own, *_version_columns()]
    return _table(name, comment, columns, _indexes((*key, *fields), indexes), projector)


def child(
    name: str, comment: str, key: Sequence[Field], fields: Sequence[Field], projector: str
) -> Table:
    """The table of an array: the parent's key, the position in the array, and the fields."""
    position: Column[object] = Column(
        POSITION.column,
        POSITION.kind.type,
        primary_key=True,
        autoincrement=False,
        comment=POSITION.description,
    )
    columns: list[Column[object]] = [
        *(_column(field, primary_key=True) for field in key),
        position,
        *(_column(field) for field in fields),
        *_event_columns(),
    ]
    return _table(name, comment, columns, _indexes(fields, ()), projector)


def custom(
    name: str,
    comment: str,
    key: Sequence[Field],
    fields: Sequence[Field],
    indexes: Sequence[Sequence[str]],
) -> Table:
    """The table of a projector with SQL of its own."""
    columns = [
        *(_column(field, primary_key=True) for field in key),
        *(_column(field) for field in fields),
        *_event_columns(),
    ]
    return _table(name, comment, columns, _indexes((*key, *fields), indexes), name)


def _table(
    name: str,
    comment: str,
    columns: "Sequence[Column[object]]",
    indexes: Iterable[Index],
    projector: str,
) -> Table:
    is_personal = any(column.info.get("personal") for column in columns)
    return Table(
        name,
        MetaData(naming_convention=metadata.naming_convention),
        *columns,
        *indexes,
        schema=PERSONAL_SCHEMA if is_personal else READ_SCHEMA,
        comment=comment,
        info={"projector": projector},
    )


def _indexes(fields: Iterable[Field], further: Iterable[Sequence[str]]) -> Iterable[Index]:
    for field in fields:
        if field.indexed:
            yield Index(None, field.column)
    for columns in further:
        yield Index(None, *columns)


def _column(field: Field, *, primary_key: bool = False) -> "Column[object]":
    return Column(
        field.column,
        field.kind.type,
        primary_key=primary_key,
        comment=field.description,
        info={"personal": bool(field.personal), "refers_to": field.refers_to},
    )


def _event_columns() -> "list[Column[object]]":
    return [
        Column("_event_type", Text, comment="Type of the event that wrote this row."),
        Column(
            "_ingested_at",
            DateTime(timezone=True),
            comment="When that event came into the log; loads of increments compare it.",
        ),
    ]


def _version_columns() -> "list[Column[object]]":
    """Where a row comes from, after the columns that analysts look for."""
    return [
        Column("_event_id", Uuid, comment="Event that wrote this row."),
        *_event_columns(),
        Column(
            "_version_time",
            DateTime(timezone=True),
            nullable=False,
            comment="Version: the object's own time of change, else the event's; "
            "1970 where time does not come first.",
        ),
        Column(
            "_version_rank",
            SmallInteger,
            nullable=False,
            comment="Version: rank of its status; 0 without status.",
        ),
        Column(
            "_version_created",
            DateTime(timezone=True),
            nullable=False,
            comment="Version: when the event arose.",
        ),
        Column(
            "_topic",
            Text(collation="C"),
            nullable=False,
            comment="Topic of the event that wrote this row.",
        ),
        Column("_partition", Integer, nullable=False, comment="Partition of that event."),
        Column("_offset", BigInteger, nullable=False, comment="Offset of that event."),
    ]
