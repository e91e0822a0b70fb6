"""Views of read models without the columns that hold personal data.

Derived from the declarations and made by ``pipeline migrate``, not by a migration: so a column that
is declared personal cannot be forgotten in them. They only leave out columns, of which no condition
of a reader's can see anything; hence they are no barrier to the planner.
"""

from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, Table, text
from sqlalchemy.dialects import postgresql

from pipeline.db import READ_SCHEMA
from pipeline.projection import Projector
from pipeline.projection.declaration import personal_columns

SUFFIX = "_masked"

VIEWS = text("""
SELECT c.relname AS view,
       ARRAY(SELECT a.attname::text FROM pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 ORDER BY a.attnum) AS columns,
       obj_description(c.oid, 'pg_class') AS comment,
       ARRAY(SELECT coalesce(col_description(c.oid, a.attnum), '') FROM pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 ORDER BY a.attnum) AS comments
FROM pg_class c
WHERE c.relnamespace = CAST(:schema AS regnamespace) AND c.relkind = 'v'
  AND right(c.relname, length(:suffix)) = :suffix
""")

_quote = postgresql.dialect().identifier_preparer.quote  # type: ignore[no-untyped-call]  # SQLAlchemy's dialects are untyped


def masked_name(table: str) -> str:
    """The view of a read model that holds no personal data."""
    return table + SUFFIX


def mask_personal_columns(db: Connection, projectors: Iterable[Projector]) -> None:
    """Have a masked view of each read model with personal columns, and no other one.

    Readers are held up only where a view has changed. A view that only grows is replaced, and keeps
    its rights; otherwise it is made anew.

    Args:
        db: An open transaction of the owner, in a database with the schema of this program.
        projectors: Every read model.
    """
    tables = [table for one in projectors for table in one.tables if personal_columns(table)]
    wanted = {masked_name(table.name): table for table in tables}
    there = {row.view: row for row in db.execute(VIEWS, {"schema": READ_SCHEMA, "suffix": SUFFIX})}
    for view in sorted(set(there) - set(wanted)):
        _run(db, f"DROP VIEW {_in_schema(view)}")
    for view, table in sorted(wanted.items()):
        shown: Sequence[str] = [
            c.name for c in table.columns if c.name not in personal_columns(table)
        ]
        old = there.get(view)
        if old is None or set(old.columns) != set(shown):
            shown = _replace(db, view, table, shown, old.columns if old else [])
        else:
            shown = old.columns
        comments = [table.columns[name].comment or "" for name in shown]
        if old is None or (old.comment, old.comments) != (_comment(table), comments):
            _describe(db, view, table, shown)


def _replace(
    db: Connection, view: str, table: Table, shown: Sequence[str], old: Sequence[str]
) -> Sequence[str]:
    """Make the view; its columns, in the order in which they now are."""
    if set(old) <= set(shown):
        shown = [*old, *(name for name in shown if name not in old)]
    else:
        _run(db, f"DROP VIEW {_in_schema(view)}")
    columns = ", ".join(_quote(name) for name in shown)
    query = f"SELECT {columns} FROM {_in_schema(table.name)}"  # noqa: S608 - declared names
    _run(db, f"CREATE OR REPLACE VIEW {_in_schema(view)} AS {query}")
    return shown


def _describe(db: Connection, view: str, table: Table, shown: Iterable[str]) -> None:
    _run(db, f"COMMENT ON VIEW {_in_schema(view)} IS {_literal(_comment(table))}")
    for name in shown:
        comment = _literal(table.columns[name].comment or "")
        _run(db, f"COMMENT ON COLUMN {_in_schema(view)}.{_quote(name)} IS {comment}")


def _comment(table: Table) -> str:
    hidden = [column.name for column in table.columns if column.name in personal_columns(table)]
    return f"{table.name} without its personal data: {', '.join(hidden)}."


def _in_schema(name: str) -> str:
    return f"{READ_SCHEMA}.{_quote(name)}"


def _literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _run(db: Connection, statement: str) -> None:
    db.execute(text(statement.replace(":", r"\:")))
