"""Which objects of the schemas for analysts are ours, how each is made, and what was executed.

An object is recognised by this record and never by its name: it is ours if it has the recorded oid,
or, as after a restore, the recorded comment and the schema's owner. Anything else under that name
belongs to somebody else.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    Connection,
    DateTime,
    Identity,
    Row,
    Table,
    Text,
    delete,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, OID

from pipeline.db import LOG_SCHEMA, PERSONAL_SCHEMA, READ_SCHEMA, metadata
from pipeline.db.identifiers import as_sql

READ_SCHEMAS = (READ_SCHEMA, PERSONAL_SCHEMA)
"""The schemas for readers, where tables and views are made from declarations."""

declared_objects = Table(
    "declared_objects",
    metadata,
    Column("name", Text, primary_key=True, comment="Schema and name: upvest.orders."),
    Column("kind", Text, nullable=False, comment="table or view."),
    Column(
        "definition",
        Text,
        nullable=False,
        comment="Of a view, the statements that make it. Of a table, its columns and key, as they "
        "should be: a rebuild makes the table that takes its place from them.",
    ),
    Column("comment", Text, nullable=False, comment="Comment of the object."),
    Column(
        "details",
        JSONB,
        nullable=False,
        comment="Of a table: projector with fingerprint, indexes, comments of columns, and the "
        "columns and indexes that were made. Of a view: how PostgreSQL shows its query.",
    ),
    Column(
        "made_as",
        OID,
        nullable=False,
        comment="Its oid when `pipeline migrate` last saw it; another one after a restore.",
    ),
    schema=LOG_SCHEMA,
    comment="Tables and views that `pipeline migrate` made from their declarations. An object of "
    "the same name that is not the one recorded here belongs to somebody else.",
)

schema_changes = Table(
    "schema_changes",
    metadata,
    Column("change_id", BigInteger, Identity(), primary_key=True, comment="In order."),
    Column("object", Text, nullable=False, comment="What was changed: upvest.orders."),
    Column("statements", ARRAY(Text), nullable=False, comment="What was executed."),
    Column(
        "executed_at",
        DateTime(timezone=True),
        nullable=False,
        server_default=text("now()"),
        comment="When.",
    ),
    Column(
        "executed_by",
        Text,
        nullable=False,
        server_default=text("session_user"),
        comment="Login that executed it.",
    ),
    schema=LOG_SCHEMA,
    comment="What `pipeline migrate` executed to make read models and views as declared.",
)

HAS_RECORD = text("SELECT to_regclass('pipeline.declared_objects') IS NOT NULL")
# Of each recorded object: the relation that has its name now, and whether that is ours.
FOUND = text("""
SELECT o.name, o.kind, o.definition, o.comment, o.details, o.made_as, c.oid,
       c.oid IS NOT NULL
           AND (c.oid = o.made_as OR c.relowner = n.nspowner
                AND obj_description(c.oid, 'pg_class') = o.comment) AS is_ours,
       CASE WHEN c.relkind = 'v' THEN pg_get_viewdef(c.oid) END AS query
FROM pipeline.declared_objects o
LEFT JOIN (pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace)
       ON n.nspname = split_part(o.name, '.', 1) AND c.relname = split_part(o.name, '.', 2)
""")
# Any relation in these schemas, whoever made it.
RELATIONS = text("""
SELECT n.nspname || '.' || c.relname AS name, c.oid, c.relkind::text AS kind,
       pg_get_userbyid(c.relowner) AS owner, c.relowner = n.nspowner AS is_owners,
       coalesce(obj_description(c.oid, 'pg_class'), '') AS comment
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = ANY (CAST(:schemas AS text[])) AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
""")
RECORD = text("""
INSERT INTO pipeline.declared_objects AS o
    (name, kind, definition, comment, details, made_as)
SELECT CAST(:name AS text), :kind, :definition, coalesce(obj_description(c.oid, 'pg_class'), ''),
       CAST(:details AS jsonb) || CASE c.relkind
           WHEN 'v' THEN jsonb_build_object('query', pg_get_viewdef(c.oid))
           ELSE jsonb_build_object(
               'made', CAST(:details AS jsonb) -> 'columns',
               'made_indexes', (
                   SELECT coalesce(jsonb_agg(i.name), '[]')
                   FROM jsonb_object_keys(CAST(:details AS jsonb) -> 'indexes') AS i(name)))
           END,
       c.oid
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname || '.' || c.relname = CAST(:name AS text)
ON CONFLICT (name) DO UPDATE
SET kind = excluded.kind, definition = excluded.definition, comment = excluded.comment,
    -- Columns and indexes that were ours stay so until the table is replaced.
    details = excluded.details || CASE excluded.kind WHEN 'table' THEN (
        SELECT jsonb_object_agg(part.key, (
            SELECT coalesce(jsonb_agg(DISTINCT m.name), '[]') FROM jsonb_array_elements(
                coalesce(o.details -> part.key, '[]') || (excluded.details -> part.key)) m(name)))
        FROM (VALUES ('made'), ('made_indexes')) AS part(key)
    ) ELSE '{}' END,
    made_as = excluded.made_as
""")
EXPECT = text("UPDATE pipeline.declared_objects SET definition = :definition WHERE name = :name")
FORGET = text("DELETE FROM pipeline.declared_objects WHERE name = :name")
NOTE_CHANGE = text("""
INSERT INTO pipeline.schema_changes (object, statements)
VALUES (:object, CAST(:statements AS text[]))
""")


class Recorded(NamedTuple):
    """An object that we made.

    Attributes:
        name: Schema and name.
        kind: ``table`` or ``view``.
        definition: See the column of ``declared_objects``.
        details: See the column of ``declared_objects``.
        oid: Of the object that has the name now; None if there is none.
        is_ours: Whether that object is the one that we made.
        query: How PostgreSQL shows a view's query now.
    """

    name: str
    kind: str
    definition: str
    details: Mapping[str, Any]
    oid: int | None
    is_ours: bool
    query: str | None


def recorded(db: Connection) -> dict[str, Recorded]:
    """The objects that we made, by name; empty in a database without the record."""
    if not db.execute(HAS_RECORD).scalar_one():
        return {}
    return {
        row.name: Recorded(
            row.name, row.kind, row.definition, row.details, row.oid, row.is_ours, row.query
        )
        for row in db.execute(FOUND)
    }


DECLARED_FINGERPRINTS = text("""
SELECT DISTINCT details ->> 'projector' AS projector, details ->> 'fingerprint' AS fingerprint
FROM pipeline.declared_objects WHERE kind = 'table' AND details ? 'fingerprint'
""")


def declared_fingerprints(db: Connection) -> dict[str, str]:
    """The fingerprint of each projector's definition that ``pipeline migrate`` recorded last."""
    return {row.projector: row.fingerprint for row in db.execute(DECLARED_FINGERPRINTS)}


def relations(db: Connection, schemas: Iterable[str]) -> dict[str, Row[Any]]:
    """Every table and view in these schemas, by schema and name, whoever made it."""
    return {row.name: row for row in db.execute(RELATIONS, {"schemas": list(schemas)})}


def record(
    db: Connection, name: str, kind: str, definition: str, details: Mapping[str, Any]
) -> None:
    """Note that the object of this name, which is there now, is ours."""
    db.execute(
        RECORD,
        {"name": name, "kind": kind, "definition": definition, "details": json.dumps(details)},
    )


def expect(db: Connection, name: str, definition: str) -> None:
    """Note how a rebuild makes a view again."""
    db.execute(EXPECT, {"name": name, "definition": definition})


def forget(db: Connection, name: str) -> None:
    """Note that the object of this name is not ours, or gone."""
    db.execute(FORGET, {"name": name})


def note_change(db: Connection, name: str, statements: Sequence[str]) -> None:
    """Keep what was executed."""
    db.execute(NOTE_CHANGE, {"object": name, "statements": list(statements)})


def rename_statement(before: str, after: str) -> str:
    """As SQL of a plan: the object has another name, in another schema."""
    of_name = declared_objects.c.name == before
    return as_sql(update(declared_objects).where(of_name).values(name=after))


def forget_statement(name: str) -> str:
    """As SQL of a plan: the object of this name is gone."""
    return as_sql(delete(declared_objects).where(declared_objects.c.name == name))
