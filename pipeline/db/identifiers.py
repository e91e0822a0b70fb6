"""Names, texts, types and whole statements, as text of PostgreSQL's SQL."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Table, TextClause, UpdateBase, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import TypeEngine

DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's dialects are untyped


def quote(name: str) -> str:
    """A name, always in quotes."""
    return str(DIALECT.identifier_preparer.quote_identifier(name))


def quote_if_needed(name: str) -> str:
    """A name in a statement that people read: in quotes only where SQL needs them."""
    return str(DIALECT.identifier_preparer.quote(name))


def relation(name: str) -> str:
    """Schema and name, ``upvest.orders``, as SQL."""
    schema, _, local = name.partition(".")
    return f"{schema}.{quote(local)}"


def qualified(table: Table, schema: str | None = None) -> str:
    """A declared table as SQL: in its schema, or in another one."""
    return f"{quote(schema or str(table.schema))}.{quote(table.name)}"


def listed(tables: Iterable[Table]) -> str:
    """Declared tables as SQL, always in the same order."""
    return ", ".join(sorted(qualified(table) for table in tables))


def literal(value: str) -> str:
    """A text as SQL."""
    return "'" + value.replace("'", "''") + "'"


def statement(sql: str) -> TextClause:
    """A statement without parameters: a colon in it is a colon."""
    return text(sql.replace(":", r"\:"))


def as_sql(statement: UpdateBase) -> str:
    """A statement with its values written in it, which are names of declared objects."""
    return str(statement.compile(dialect=DIALECT, compile_kwargs={"literal_binds": True}))


def type_name(of: TypeEngine[Any]) -> str:
    """A type as PostgreSQL reads it, without the collation, which is no part of its name."""
    return str(of.compile(dialect=DIALECT)).partition(" COLLATE ")[0]
