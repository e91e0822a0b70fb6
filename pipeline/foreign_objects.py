"""Changes that other people made to our tables, and that change or prevent what we store there.

A trigger that runs before a row is stored, or a rule, may change the row or leave it out without an
error. A constraint makes good records look bad. A security policy, a column that must have a value
or a table that is gone stop us with an error that names none of them.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, Table, text

from pipeline.db import LOG_SCHEMA, READ_SCHEMA
from pipeline.errors import ConfigurationError


class Foreign(NamedTuple):
    """One such thing.

    Attributes:
        table: Schema and name.
        what: The thing with its owner, and what it does, as the rest of a sentence.
        fix: The statement that removes it, or what else to do.
    """

    table: str
    what: str
    fix: str


# Bits of tgtype: ROW 1, BEFORE 2, INSERT 4, UPDATE 16. Ours call functions of our own schema.
# What a partition inherits is reported for its parent.
_FOUND = text("""
WITH ours AS (
    SELECT c.oid, c.oid::regclass::text AS name, c.relowner, c.relname, n.nspname
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p')
      AND (format('%s.%s', n.nspname, c.relname) = ANY (:tables)
           OR n.nspname = 'pipeline_segments' AND 'pipeline.events' = ANY (:tables))
)
SELECT o.name, 'trigger' AS kind, quote_ident(t.tgname) AS object,
       pg_get_userbyid(p.proowner) AS owner, NULL AS other
FROM ours o JOIN pg_trigger t ON t.tgrelid = o.oid JOIN pg_proc p ON p.oid = t.tgfoid
WHERE NOT t.tgisinternal AND t.tgparentid = 0 AND t.tgenabled IN ('O', 'A')
  AND t.tgtype & 3 = 3 AND t.tgtype & 20 <> 0 AND p.pronamespace <> 'pipeline'::regnamespace
UNION ALL
SELECT o.name, 'rule', quote_ident(r.rulename), pg_get_userbyid(o.relowner), NULL
FROM ours o JOIN pg_rewrite r ON r.ev_class = o.oid
WHERE r.ev_type IN ('2', '3', '4') AND r.ev_enabled IN ('O', 'A')
UNION ALL
SELECT o.name, 'policy', 'row level security', pg_get_userbyid(o.relowner), NULL
FROM ours o WHERE row_security_active(o.oid)
UNION ALL
SELECT o.name, 'column', quote_ident(a.attname), pg_get_userbyid(o.relowner), NULL
FROM ours o JOIN pg_attribute a ON a.attrelid = o.oid
WHERE a.attnum > 0 AND NOT a.attisdropped AND a.attnotnull AND NOT a.atthasdef
  AND a.attidentity = '' AND o.nspname <> 'pipeline_segments'
  AND format('%s.%s.%s', o.nspname, o.relname, a.attname) <> ALL (:columns)
UNION ALL
SELECT o.name, 'constraint', quote_ident(k.conname), pg_get_userbyid(o.relowner), NULL
FROM ours o JOIN pg_constraint k ON k.conrelid = o.oid
WHERE k.contype IN ('c', 'f', 'u', 'x') AND o.nspname <> 'pipeline_segments'
  AND format('%s.%s.%s', o.nspname, o.relname, k.conname) <> ALL (:constraints)
UNION ALL
SELECT o.name, 'index', i.indexrelid::regclass::text, pg_get_userbyid(o.relowner), NULL
FROM ours o JOIN pg_index i ON i.indrelid = o.oid JOIN pg_class c ON c.oid = i.indexrelid
WHERE i.indisunique AND o.nspname <> 'pipeline_segments'
  AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid)
  AND format('%s.%s.%s', o.nspname, o.relname, c.relname) <> ALL (:constraints)
UNION ALL
SELECT o.name, 'reference', quote_ident(k.conname), pg_get_userbyid(c.relowner),
       k.conrelid::regclass::text
FROM ours o JOIN pg_constraint k ON k.confrelid = o.oid JOIN pg_class c ON c.oid = k.conrelid
WHERE k.contype = 'f' AND k.conparentid = 0 AND k.conrelid NOT IN (SELECT oid FROM ours)
ORDER BY 1, 2, 3
""")
_MISSING = text("""
SELECT wanted FROM unnest(CAST(:tables AS text[])) AS wanted
WHERE NOT EXISTS (
    SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE format('%s.%s', n.nspname, c.relname) = wanted)
ORDER BY 1
""")


def foreign_objects(db: Connection, tables: Collection[Table]) -> Sequence[Foreign]:
    """All that is wrong with these tables of ours in that way."""
    names = [f"{one.schema}.{one.name}" for one in tables]
    columns = [f"{one.schema}.{one.name}.{column.name}" for one in tables for column in one.columns]
    missing = [
        Foreign(
            name,
            "does not exist: somebody has dropped it",
            "restore it from a backup; a read model can then be filled by `pipeline rebuild`",
        )
        for name in dropped_tables(db, tables)
    ]
    constraints = [
        f"{one.schema}.{one.name}.{name}"
        for one in tables
        for name in (*(it.name for it in one.constraints), *(it.name for it in one.indexes))
    ]
    found = db.execute(_FOUND, {"tables": names, "columns": columns, "constraints": constraints})
    return [*missing, *(_described(*row) for row in found)]


def dropped_tables(db: Connection, tables: Collection[Table]) -> Sequence[str]:
    """Those of these tables that do not exist, with their schemas."""
    names = [f"{one.schema}.{one.name}" for one in tables]
    return db.execute(_MISSING, {"tables": names}).scalars().all()


def refuse_foreign_objects(
    db: Connection, tables: Collection[Table], schemas: Collection[str] = (LOG_SCHEMA, READ_SCHEMA)
) -> None:
    """Do not write while something of others would change what is written.

    Args:
        db: An open transaction.
        tables: All that the program declares.
        schemas: Only those of them that are in these schemas.

    Raises:
        ConfigurationError: There is such a thing; the text names each, with its owner.
    """
    found = foreign_objects(db, [one for one in tables if one.schema in schemas])
    if found:
        named = "; ".join(f"{one.table} {one.what}" for one in found)
        raise ConfigurationError(
            "somebody has changed tables of this program, so what it writes may be stored in "
            f"another form, or not at all: {named}. Nothing was written. To fix it: "
            + "; ".join(dict.fromkeys(one.fix for one in found))
        )


def _described(table: str, kind: str, name: str, owner: str, other: str | None) -> Foreign:
    match kind:
        case "trigger":
            return Foreign(
                table,
                f"has trigger {name} of role {owner}, which may change a row or leave it out",
                f"DROP TRIGGER {name} ON {table}, or make it AFTER instead of BEFORE",
            )
        case "rule":
            return Foreign(
                table,
                f"has rule {name}, which replaces what is written (owner of the table: {owner})",
                f"DROP RULE {name} ON {table}",
            )
        case "policy":
            return Foreign(
                table,
                f"has {name}, which applies to this user (owner of the table: {owner})",
                f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY",
            )
        case "constraint":
            return Foreign(
                table,
                f"has constraint {name}, which this program does not know and which refuses rows "
                f"(owner of the table: {owner})",
                f"ALTER TABLE {table} DROP CONSTRAINT {name}",
            )
        case "index":
            return Foreign(
                table,
                f"has unique index {name}, which this program does not know and which refuses rows "
                f"(owner of the table: {owner})",
                f"DROP INDEX {name}, and create it without UNIQUE",
            )
        case "reference":
            return Foreign(
                table,
                f"is referenced by foreign key {name} of {other} (owner {owner}), which refuses "
                "that rows are deleted",
                f"ALTER TABLE {other} DROP CONSTRAINT {name}",
            )
        case _:
            return Foreign(
                table,
                f"has column {name}, which this program does not know and which must have a value "
                f"(owner of the table: {owner})",
                f"ALTER TABLE {table} ALTER COLUMN {name} DROP NOT NULL, or give it a DEFAULT",
            )
