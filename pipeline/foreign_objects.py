"""Changes that other people made to our tables, and that change or prevent what we store there.

A trigger that runs before a row is stored, or a rule, may change the row or leave it out without an
error. A constraint, or a column that must have a value, makes good records look bad; one of another
type may round an amount. A security policy, or a table or column that is gone, stop us with an
error that names none of them. Without its primary key, a table may hold a row twice.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, Table, text

from pipeline.db import LOG_SCHEMA, PERSONAL_SCHEMA, READ_SCHEMA
from pipeline.db.identifiers import type_name
from pipeline.errors import ConfigurationError

OUR_SCHEMAS = (LOG_SCHEMA, READ_SCHEMA, PERSONAL_SCHEMA)


class Foreign(NamedTuple):
    """One such thing.

    Attributes:
        kind: ``trigger``, ``rule``, ``constraint`` …
        table: Schema and name.
        what: The thing with its owner, and what it does, as the rest of a sentence.
        fix: The statement that removes it, or what else to do.
    """

    kind: str
    table: str
    what: str
    fix: str


SILENT = frozenset({"trigger", "rule", "type"})
"""Kinds that change or leave out rows without an error."""
REFUSING = frozenset(
    {"policy", "trigger", "missing", "relation", "computed", "type", "gone", "key"}
)
"""Kinds because of which PostgreSQL may refuse a statement as such, whatever its rows."""

# Bits of tgtype: ROW 1, BEFORE 2, INSERT 4, UPDATE 16. Ours call functions of our own schema.
# What a partition inherits is reported for its parent.
_FOUND = text("""
WITH ours AS (
    SELECT c.oid, c.oid::regclass::text AS name, c.relowner, c.relname, n.nspname
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p')
      AND (format('%s.%s', n.nspname, c.relname) = ANY (:tables)
           OR n.nspname = 'pipeline_segments' AND c.relispartition
              AND 'pipeline.events' = ANY (:tables))
),
declared AS (
    SELECT * FROM unnest(CAST(:of_tables AS text[]), CAST(:columns AS text[]),
                         CAST(:types AS text[]), CAST(:nullables AS boolean[]))
                  AS d (of_table, name, type, nullable)
),
columns AS (
    SELECT o.*, a.attname, a.attnotnull, a.atthasdef, a.attidentity, a.attgenerated,
           a.atttypid, a.atttypmod, d.name AS declared, d.type, d.nullable
    FROM ours o JOIN pg_attribute a ON a.attrelid = o.oid
    LEFT JOIN declared d ON d.name = a.attname AND d.of_table =
        CASE o.nspname WHEN 'pipeline_segments' THEN 'pipeline.events'
             ELSE format('%s.%s', o.nspname, o.relname) END
    WHERE a.attnum > 0 AND NOT a.attisdropped
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
SELECT name, 'column', quote_ident(attname), pg_get_userbyid(relowner), NULL FROM columns
WHERE declared IS NULL AND attnotnull AND NOT atthasdef AND attidentity = ''
  AND nspname <> 'pipeline_segments'
UNION ALL
SELECT name, 'not null', quote_ident(attname), pg_get_userbyid(relowner), NULL FROM columns
WHERE nullable AND attnotnull
UNION ALL
SELECT name, 'type', quote_ident(attname), pg_get_userbyid(relowner),
       format('%s, not %s', format_type(atttypid, atttypmod), lower(type))
FROM columns
WHERE nspname <> 'pipeline_segments'
  AND (atttypid <> to_regtype(type) OR atttypmod <> -1 AND strpos(type, '(') = 0)
UNION ALL
SELECT name, 'computed', quote_ident(attname), pg_get_userbyid(relowner), NULL FROM columns
WHERE declared IS NOT NULL AND attgenerated <> ''
UNION ALL
SELECT c.oid::regclass::text, 'relation', '', pg_get_userbyid(c.relowner), NULL
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind NOT IN ('r', 'p') AND format('%s.%s', n.nspname, c.relname) = ANY (:tables)
UNION ALL
SELECT o.name, 'gone', quote_ident(d.name), pg_get_userbyid(o.relowner), lower(d.type)
FROM ours o JOIN declared d ON d.of_table = format('%s.%s', o.nspname, o.relname)
WHERE NOT EXISTS (SELECT FROM columns c WHERE c.oid = o.oid AND c.declared = d.name)
UNION ALL
SELECT o.name, 'key', k.columns, pg_get_userbyid(o.relowner), NULL
FROM ours o JOIN unnest(CAST(:keyed AS text[]), CAST(:keys AS text[])) AS k (of_table, columns)
             ON k.of_table = format('%s.%s', o.nspname, o.relname)
WHERE NOT EXISTS (SELECT FROM pg_constraint p WHERE p.conrelid = o.oid AND p.contype = 'p')
UNION ALL
SELECT o.name, 'constraint', quote_ident(k.conname), pg_get_userbyid(o.relowner), NULL
FROM ours o JOIN pg_constraint k ON k.conrelid = o.oid
WHERE k.contype IN ('c', 'f', 'u', 'x') AND k.coninhcount = 0 AND k.conparentid = 0
  AND format('%s.%s.%s', o.nspname, o.relname, k.conname) <> ALL (:constraints)
UNION ALL
SELECT o.name, 'index', i.indexrelid::regclass::text, pg_get_userbyid(o.relowner), NULL
FROM ours o JOIN pg_index i ON i.indrelid = o.oid JOIN pg_class c ON c.oid = i.indexrelid
WHERE i.indisunique AND NOT c.relispartition
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

# All that may depend on an object of ours, described as in PostgreSQL's messages, and its owner:
# that of the table or view where the object has none of its own.
_OWNED = text("""
WITH owned AS (
    SELECT 'pg_class'::regclass AS class, oid, relowner AS owner FROM pg_class
    UNION ALL SELECT 'pg_proc'::regclass, oid, proowner FROM pg_proc
    UNION ALL SELECT 'pg_type'::regclass, oid, typowner FROM pg_type
    UNION ALL SELECT 'pg_rewrite'::regclass, r.oid, c.relowner
        FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class
    UNION ALL SELECT 'pg_trigger'::regclass, t.oid, c.relowner
        FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
    UNION ALL SELECT 'pg_policy'::regclass, p.oid, c.relowner
        FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid
    UNION ALL SELECT 'pg_constraint'::regclass, k.oid, c.relowner
        FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
    UNION ALL SELECT 'pg_attrdef'::regclass, d.oid, c.relowner
        FROM pg_attrdef d JOIN pg_class c ON c.oid = d.adrelid
    UNION ALL SELECT 'pg_publication_rel'::regclass, r.oid, p.pubowner
        FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
)
SELECT class::oid AS class_oid, oid, pg_describe_object(class, oid, 0) AS described,
       pg_get_userbyid(owner) AS owner
FROM owned
WHERE oid >= 16384  -- the first that is not the server's own
UNION ALL
SELECT 'pg_class'::regclass, a.attrelid, pg_describe_object('pg_class'::regclass, attrelid, attnum),
       pg_get_userbyid(c.relowner)
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
WHERE a.atttypid >= 16384 AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY 3
""")
# Where a column cannot change its type, PostgreSQL names only the first that depends on it.
_ON_THE_SAME_COLUMN = text("""
SELECT other.classid, other.objid
FROM pg_depend named
JOIN pg_attribute a ON a.attrelid = named.refobjid AND a.attnum = named.refobjsubid
JOIN pg_depend other ON other.refclassid = named.refclassid AND other.refobjid = named.refobjid
                    AND other.refobjsubid = named.refobjsubid AND other.deptype = 'n'
WHERE named.classid = :class AND named.objid = :oid
  AND named.refclassid = 'pg_class'::regclass AND position('"' || a.attname || '"' IN :detail) > 0
  AND other.classid IN ('pg_rewrite'::regclass, 'pg_proc'::regclass, 'pg_policy'::regclass)
""")


# Where the type of a row of ours is the type of a column, PostgreSQL names only that column.
_ROWS_OF_OURS = text("""
SELECT a.attrelid::regclass::text || '.' || quote_ident(a.attname), pg_get_userbyid(c.relowner)
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
JOIN pg_type t ON t.oid = a.atttypid JOIN pg_class o ON o.oid = t.typrelid
WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p', 'm')
  AND position(format('"%s.%s"', c.relname, a.attname) IN :message) > 0
ORDER BY 1
""")


def dependents(db: Connection, message: str, detail: str | None) -> list[str]:
    """The objects because of which PostgreSQL refuses a change, each with its owner.

    Args:
        db: An open transaction, with the settings of the session that was refused.
        message: PostgreSQL's.
        detail: Its DETAIL, if it has one. Each line begins with the description of such an object.
    """
    if detail is None:
        found = db.execute(_ROWS_OF_OURS, {"message": message})
        return [f"column {column} (owner {owner})" for column, owner in found]
    owned = db.execute(_OWNED).all()
    lines = detail.splitlines()
    named = {one for one in owned if any(_begins_with(line, one.described) for line in lines)}
    others = {
        tuple(row)
        for one in named
        for row in db.execute(
            _ON_THE_SAME_COLUMN, {"class": one.class_oid, "oid": one.oid, "detail": detail}
        )
    }
    return [
        f"{one.described} (owner {one.owner})"
        for one in owned
        if one in named or (one.class_oid, one.oid) in others
    ]


def _begins_with(line: str, described: str) -> bool:
    """Whether the description is whole there: not that of ``a`` where the line is about ``ab``."""
    return line.startswith(described) and not re.match(r"[\w$\"]", line[len(described) :], re.ASCII)


_MISSING_TABLE = ("does not exist: somebody has dropped it", "restore it from a backup")
_MISSING_READ_MODEL = (
    "does not exist: it is new, or somebody has dropped it",
    "run `pipeline migrate`, which creates it; a worker then fills it from the log",
)


def foreign_objects(db: Connection, tables: Collection[Table]) -> Sequence[Foreign]:
    """All that is wrong with these tables of ours in that way."""
    names = [f"{one.schema}.{one.name}" for one in tables]
    read_models = {f"{one.schema}.{one.name}" for one in tables if "projector" in one.info}
    columns = [(f"{one.schema}.{one.name}", column) for one in tables for column in one.columns]
    keys = [(f"{one.schema}.{one.name}", one.primary_key) for one in tables if one.primary_key]
    missing = [
        Foreign("missing", name, *_MISSING_READ_MODEL if name in read_models else _MISSING_TABLE)
        for name in dropped_tables(db, tables)
    ]
    constraints = [
        f"{one.schema}.{one.name}.{name}"
        for one in tables
        for name in (*(it.name for it in one.constraints), *(it.name for it in one.indexes))
    ]
    found = db.execute(
        _FOUND,
        {
            "tables": names,
            "of_tables": [name for name, _ in columns],
            "columns": [column.name for _, column in columns],
            "types": [type_name(column.type) for _, column in columns],
            "nullables": [column.nullable for _, column in columns],
            "keyed": [name for name, _ in keys],
            "keys": [", ".join(column.name for column in key.columns) for _, key in keys],
            "constraints": constraints,
        },
    )
    return [*missing, *(_described(*row) for row in found)]


def dropped_tables(db: Connection, tables: Collection[Table]) -> Sequence[str]:
    """Those of these tables that do not exist, with their schemas."""
    names = [f"{one.schema}.{one.name}" for one in tables]
    return db.execute(_MISSING, {"tables": names}).scalars().all()


def changes_of(found: Iterable[Foreign]) -> str:
    """What was changed, each with its table, for a message."""
    return "; ".join(f"{foreign.table} {foreign.what}" for foreign in found)


def fixes_of(found: Iterable[Foreign]) -> str:
    """What fixes all of it, each statement once, for a message."""
    return "; ".join(dict.fromkeys(foreign.fix for foreign in found))


def refuse_foreign_objects(
    db: Connection,
    tables: Collection[Table],
    schemas: Collection[str] = OUR_SCHEMAS,
    *,
    kinds: Collection[str] | None = None,
) -> None:
    """Do not write while something of others would change what is written.

    Args:
        db: An open transaction.
        tables: All that the program declares.
        schemas: Only those of them that are in these schemas.
        kinds: Only these kinds, while rows are being written; all by default.

    Raises:
        ConfigurationError: There is such a thing; the text names each, with its owner.
    """
    every = foreign_objects(db, [one for one in tables if one.schema in schemas])
    if found := [one for one in every if kinds is None or one.kind in kinds]:
        since = (
            "Nothing was written"
            if kinds is None
            else "Nothing more is written; what was written since this change may be wrong, which "
            "`pipeline verify` shows"
        )
        raise ConfigurationError(
            "somebody has changed tables of this program, so what it writes may be stored in "
            f"another form, or not at all: {changes_of(found)}. {since}. To fix it: "
            f"{fixes_of(found)}"
        )


def _described(table: str, kind: str, name: str, owner: str, other: str | None) -> Foreign:
    return Foreign(kind, table, *_words(table, kind, name, owner, other))


def _words(table: str, kind: str, name: str, owner: str, other: str | None) -> tuple[str, str]:
    match kind:
        case "trigger":
            return (
                f"has trigger {name} of role {owner}, which may change a row or leave it out",
                f"DROP TRIGGER {name} ON {table}, or make it AFTER instead of BEFORE",
            )
        case "rule":
            return (
                f"has rule {name}, which replaces what is written (owner of the table: {owner})",
                f"DROP RULE {name} ON {table}",
            )
        case "policy":
            return (
                f"has {name}, which applies to this user (owner of the table: {owner})",
                f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY",
            )
        case "computed":
            return (
                f"has column {name} that PostgreSQL computes, so that nothing can be stored there "
                f"(owner of the table: {owner})",
                f"ALTER TABLE {table} ALTER COLUMN {name} DROP EXPRESSION",
            )
        case "relation":
            return (
                f"is no table any more, but a view or something else of role {owner}",
                f"give the name {table} back to the table, or restore it from a backup",
            )
        case "constraint":
            return (
                f"has constraint {name}, which this program does not know and which refuses rows "
                f"(owner of the table: {owner})",
                f"ALTER TABLE {table} DROP CONSTRAINT {name}",
            )
        case "index":
            return (
                f"has unique index {name}, which this program does not know and which refuses rows "
                f"(owner of the table: {owner})",
                f"DROP INDEX {name}, and create it without UNIQUE",
            )
        case "reference":
            return (
                f"is referenced by foreign key {name} of {other} (owner {owner}), which refuses "
                "that rows are deleted",
                f"ALTER TABLE {other} DROP CONSTRAINT {name}",
            )
        case "not null":
            return (
                f"has column {name} NOT NULL, which events may leave empty: they would be refused "
                f"(owner of the table: {owner})",
                f"ALTER TABLE {table} ALTER COLUMN {name} DROP NOT NULL",
            )
        case "type":
            return (
                f"has column {name} of type {other}: what is stored there may be cut, rounded or "
                f"refused (owner of the table: {owner})",
                f"change the type of {table}.{name} back; then run `pipeline verify`",
            )
        case "gone":
            return (
                f"has no column {name}: somebody has dropped it (owner of the table: {owner})",
                f"ALTER TABLE {table} ADD COLUMN {name} {other}; then restore its values from a "
                "backup, those of a read model by `pipeline rebuild`",
            )
        case "key":
            return (
                f"has no primary key, so it may hold a row twice (owner of the table: {owner})",
                f"ALTER TABLE {table} ADD PRIMARY KEY ({name})",
            )
        case _:
            return (
                f"has column {name}, which this program does not know and which must have a value "
                f"(owner of the table: {owner})",
                f"ALTER TABLE {table} ALTER COLUMN {name} DROP NOT NULL, or give it a DEFAULT",
            )
