"""Views of read models without the columns that hold personal data.

Derived from the declarations and made by ``pipeline migrate``, not by a migration: so a column that
is declared personal cannot be forgotten in them. They only leave out columns, of which no condition
of a reader's can see anything; hence they are no barrier to the planner.

They are recognised by a record, not by their names: a view is ours if it has the recorded oid, or,
as after a restore, the recorded comment and the schema's owner. Anything else of that name belongs
to somebody else; it is left alone and reported.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import structlog
from sqlalchemy import Column, Connection, Row, Table, Text, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import OID

from pipeline.db import LOG_SCHEMA, READ_SCHEMA, metadata
from pipeline.errors import ConfigurationError
from pipeline.readmodel import Projector
from pipeline.readmodel.model import personal_columns

log = structlog.get_logger(__name__)

SUFFIX = "_masked"

own_views = Table(
    "own_views",
    metadata,
    Column("view", Text, primary_key=True, comment="Name of the view in schema upvest."),
    Column(
        "made_as",
        OID,
        nullable=False,
        comment="Its oid when `migrate` last saw it; another one after a restore.",
    ),
    Column(
        "comment",
        Text,
        nullable=False,
        comment="Its comment, by which it is recognised after a restore.",
    ),
    schema=LOG_SCHEMA,
    comment="Views that `pipeline migrate` has made. A view of the same name that is not the one "
    "recorded here is somebody else's.",
)

# Of a read model, a view depends on the columns that it reads.
VIEWS = text("""
SELECT c.relname AS view, c.oid,
       ARRAY(SELECT a.attname::text FROM pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 ORDER BY a.attnum) AS columns,
       ARRAY(SELECT format_type(a.atttypid, a.atttypmod) FROM pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 ORDER BY a.attnum) AS types,
       ARRAY(SELECT a.attname::text FROM pg_rewrite r
             JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
                             AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> c.oid
             JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
             WHERE r.ev_class = c.oid AND d.refobjsubid > 0) AS reads,
       obj_description(c.oid, 'pg_class') AS comment,
       ARRAY(SELECT coalesce(col_description(c.oid, a.attnum), '') FROM pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 ORDER BY a.attnum) AS comments
FROM pipeline.own_views o
JOIN pg_class c ON c.relname = o.view AND c.relkind = 'v'
               AND c.relnamespace = CAST(:schema AS regnamespace)
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = o.made_as
   OR c.relowner = n.nspowner AND obj_description(c.oid, 'pg_class') = o.comment
""")
HAS_RECORD = text("SELECT to_regclass('pipeline.own_views') IS NOT NULL")
IN_THE_WAY = text("""
SELECT pg_get_userbyid(c.relowner) FROM pg_class c
WHERE c.relname = :view AND c.relnamespace = CAST(:schema AS regnamespace)
""")
DEPENDENTS = text("""
SELECT DISTINCT CASE c.relkind WHEN 'm' THEN 'materialized view ' ELSE 'view ' END
       || c.oid::regclass::text || ' (owner ' || pg_get_userbyid(c.relowner) || ')'
FROM pg_depend d
JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
JOIN pg_class c ON c.oid = r.ev_class
WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = :oid AND c.oid <> d.refobjid
UNION ALL
SELECT 'function ' || p.oid::regprocedure::text || ' (owner ' || pg_get_userbyid(p.proowner) || ')'
FROM pg_depend d JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
WHERE d.refobjid IN (:oid, (SELECT reltype FROM pg_class WHERE oid = :oid))
ORDER BY 1
""")
RECORD = text("""
INSERT INTO pipeline.own_views (view, made_as, comment)
SELECT c.relname, c.oid, obj_description(c.oid, 'pg_class') FROM pg_class c
WHERE c.relname = :view AND c.relnamespace = CAST(:schema AS regnamespace)
ON CONFLICT (view) DO UPDATE SET made_as = excluded.made_as, comment = excluded.comment
""")
FORGET = text("DELETE FROM pipeline.own_views WHERE view = :view")

_quote = postgresql.dialect().identifier_preparer.quote  # type: ignore[no-untyped-call]  # SQLAlchemy's dialects are untyped


def masked_name(table: str) -> str:
    """The view of a read model that holds no personal data."""
    return table + SUFFIX


def own_masked_views(db: Connection) -> dict[str, Row[Any]]:
    """The masked views that are ours, by name."""
    if not db.execute(HAS_RECORD).scalar_one():
        return {}
    return {row.view: row for row in db.execute(VIEWS, {"schema": READ_SCHEMA})}


def mask_personal_columns(db: Connection, projectors: Iterable[Projector]) -> None:
    """Have a masked view of each read model with personal columns.

    Readers are held up only where a view has changed. A view on which others' objects depend keeps
    all of its columns: one that has become personal is NULL in it from now on. Nothing of others is
    dropped.

    Args:
        db: An open transaction of the owner, in a database with the schema of this program.
        projectors: Every read model.

    Raises:
        ConfigurationError: Somebody else's object has the name of a masked view.
    """
    tables = [table for one in projectors for table in one.tables if personal_columns(table)]
    wanted = {masked_name(table.name): table for table in tables}
    there = own_masked_views(db)
    for view in sorted(set(there) - set(wanted)):
        # With others' objects on it, it stays as it is: nothing in it is personal any more.
        if not _dependents(db, there[view]):
            _run(db, f"DROP VIEW {_in_schema(view)}")
            db.execute(FORGET, {"view": view})
    for view, table in sorted(wanted.items()):
        old = there.get(view)
        if old is None:
            _refuse_if_taken(db, view)
        columns = _make(db, view, table, old)
        comments = [
            table.columns[name].comment or "" if name in table.columns else "" for name in columns
        ]
        if old is None or (old.comment, old.comments) != (_comment(table), comments):
            _describe(db, view, table, columns)
        db.execute(RECORD, {"view": view, "schema": READ_SCHEMA})


def _refuse_if_taken(db: Connection, view: str) -> None:
    owner = db.execute(IN_THE_WAY, {"view": view, "schema": READ_SCHEMA}).scalar_one_or_none()
    if owner is not None:
        raise ConfigurationError(
            f"{READ_SCHEMA}.{view} exists, and `pipeline migrate` has not made it; its owner is "
            f"{owner}. It is left as it is. Rename it or move it to another schema, then repeat: "
            f"ALTER TABLE {_in_schema(view)} RENAME TO …"
        )


def _dependents(db: Connection, view: Row[Any]) -> list[str]:
    return list(db.execute(DEPENDENTS, {"oid": view.oid}).scalars())


def _make(db: Connection, view: str, table: Table, old: Row[Any] | None) -> Sequence[str]:
    """Make the view, or replace it where it differs; its columns, in the order that they have."""
    hidden = personal_columns(table)
    shown = [column.name for column in table.columns if column.name not in hidden]
    types: dict[str, str] = dict(zip(old.columns, old.types, strict=True)) if old else {}
    gone = [name for name in types if name not in shown]
    if old and set(shown) <= set(types) and not gone:
        return list(types)
    if old and gone:
        dependents = _dependents(db, old)
        if dependents and set(shown) <= set(types) and not set(gone) & set(old.reads):
            return list(types)
        if dependents:
            log.warning("masked_view_keeps_columns", view=view, columns=gone, needed_by=dependents)
        else:
            types = {}
            _run(db, f"DROP VIEW {_in_schema(view)}")
    order = [*types, *(name for name in shown if name not in types)]
    columns = ", ".join(
        _quote(name) if name in shown else f"CAST(NULL AS {types[name]}) AS {_quote(name)}"
        for name in order
    )
    query = f"SELECT {columns} FROM {_in_schema(table.name)}"  # noqa: S608 - declared names
    _run(db, f"CREATE OR REPLACE VIEW {_in_schema(view)} AS {query}")
    return order


def _describe(db: Connection, view: str, table: Table, shown: Iterable[str]) -> None:
    _run(db, f"COMMENT ON VIEW {_in_schema(view)} IS {_literal(_comment(table))}")
    for name in shown:
        declared = table.columns[name].comment if name in table.columns else None
        comment = _literal(declared or "")
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
