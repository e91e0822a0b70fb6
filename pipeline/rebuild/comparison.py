"""How live tables differ from their shadow tables, and the statements that make them equal.

The statements are assembled from the names of declared tables, quoted.
"""

from typing import NamedTuple

from sqlalchemy import (
    BigInteger,
    Boolean,
    Connection,
    Date,
    DateTime,
    Integer,
    SmallInteger,
    Table,
    Text,
    Uuid,
    text,
)

from pipeline.db import SHADOW_SCHEMA
from pipeline.db.identifiers import qualified, quote
from pipeline.readmodel.model import Projector


class Difference(NamedTuple):
    """How a live read model differs from the recomputed one, over all its tables.

    Attributes:
        projector: Which read model.
        rows: Rows that the log gives.
        missing: Rows that the live tables lack.
        changed: Rows that differ, to the last byte.
        surplus: Rows that the log does not give.
        lag: Offsets that the live projector had not taken yet, so that some rows differ for
            that reason; 0 where both have the same checkpoints.
        dead_letters: Events that the rebuild rejected.
        is_replaced: The live tables had other columns, so they were replaced and not compared.
    """

    projector: str
    rows: int
    missing: int
    changed: int
    surplus: int
    lag: int
    dead_letters: int
    is_replaced: bool = False

    @property
    def differing(self) -> int:
        """Rows that are not what the log gives."""
        return self.missing + self.changed + self.surplus


def measure(db: Connection, projector: Projector, *, lag: int, dead_letters: int) -> Difference:
    """Count, row by row, what differs now.

    Args:
        db: An open transaction, in which no other session writes to either.
        projector: Whose tables.
        lag: See ``Difference``.
        dead_letters: See ``Difference``.
    """
    rows = missing = changed = surplus = 0
    for table in projector.tables:
        found = db.execute(text(_compare(table))).one()
        rows += found.rows
        missing += found.missing
        changed += found.changed
        surplus += found.surplus
    return Difference(projector.name, rows, missing, changed, surplus, lag, dead_letters)


def repair(db: Connection, projector: Projector) -> None:
    """Write only the differing rows to the live tables."""
    for table in projector.tables:
        for statement in (_delete, _change, _insert):
            db.execute(text(statement(table)))


def count_shadow(table: Table) -> str:
    """Counts the rows of the table that a rebuild has computed."""
    return f"SELECT count(*) FROM {_shadow(table)}"  # noqa: S608 - declared names


def _shadow(table: Table) -> str:
    return qualified(table, SHADOW_SCHEMA)


def _key(table: Table) -> list[str]:
    return [quote(column.name) for column in table.primary_key]


def _same_key(table: Table) -> str:
    return " AND ".join(f"t.{name} = s.{name}" for name in _key(table))


# Of these, equal values are written alike; 1.0 and 1.00 are not.
_WRITTEN_ALIKE = (BigInteger, Boolean, Date, DateTime, Integer, SmallInteger, Text, Uuid)


def _differs(table: Table) -> str:
    """Whether two rows differ in a byte: cheaper than to compare their images."""
    values = []
    for column in table.columns:
        name = quote(column.name)
        as_written = "" if isinstance(column.type, _WRITTEN_ALIKE) else "::text"
        values.append(f"t.{name}{as_written} IS DISTINCT FROM s.{name}{as_written}")
    return f"({' OR '.join(values)})"


def _compare(table: Table) -> str:
    key = _key(table)[0]
    return (
        f"SELECT count(s.{key}) AS rows, "  # noqa: S608 - declared names
        f"count(*) FILTER (WHERE t.{key} IS NULL) AS missing, "
        f"count(*) FILTER (WHERE s.{key} IS NULL) AS surplus, "
        f"count(*) FILTER (WHERE t.{key} IS NOT NULL AND s.{key} IS NOT NULL "
        f"AND {_differs(table)}) "
        f"AS changed FROM {qualified(table)} AS t "
        f"FULL JOIN {_shadow(table)} AS s ON {_same_key(table)}"
    )


def _delete(table: Table) -> str:
    return (
        f"DELETE FROM {qualified(table)} AS t WHERE NOT EXISTS "  # noqa: S608 - declared names
        f"(SELECT FROM {_shadow(table)} AS s WHERE {_same_key(table)})"
    )


def _change(table: Table) -> str:
    columns = [quote(column.name) for column in table.columns]
    changes = ", ".join(f"{name} = s.{name}" for name in columns)
    return (
        f"UPDATE {qualified(table)} AS t SET {changes} "  # noqa: S608 - declared names
        f"FROM {_shadow(table)} AS s WHERE {_same_key(table)} AND {_differs(table)}"
    )


def _insert(table: Table) -> str:
    columns = ", ".join(quote(column.name) for column in table.columns)
    return (
        f"INSERT INTO {qualified(table)} ({columns}) "  # noqa: S608 - declared names
        f"SELECT {columns} FROM {_shadow(table)} AS s WHERE NOT EXISTS "
        f"(SELECT FROM {qualified(table)} AS t WHERE {_same_key(table)})"
    )
