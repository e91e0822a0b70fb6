"""Who may do what: the one list from which grants are made, and against which they are checked.

What is not listed is not granted. Rights that a table gets because of what it is (a read model, a
view) are worked out from the catalogue, so a new one has them without anybody thinking of it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Literal, NamedTuple

from sqlalchemy import Connection, text

from pipeline.db import LOG_SCHEMA, READ_SCHEMA, SHADOW_SCHEMA
from pipeline.readmodel import Projector
from pipeline.readmodel.model import personal_columns
from pipeline.schema.roles.masks import own_masked_views

SCHEMAS = (LOG_SCHEMA, "pipeline_segments", SHADOW_SCHEMA, READ_SCHEMA)

OWNER, INGEST, PROJECT = "owner", "ingest", "project"
OPERATOR, ANALYST, PERSONAL = "operator", "analyst", "personal_data"

ROLES: Mapping[str, str] = {
    OWNER: "owns the schemas; `pipeline migrate` acts as it",
    INGEST: "runs `pipeline ingest`: appends to the log",
    PROJECT: "runs `pipeline project` and `rebuild`: writes the read models",
    OPERATOR: "rights of project, and decides on gaps; rewind and verify want those of ingest too",
    ANALYST: "reads the read models without personal data",
    PERSONAL: "rights of analyst, and reads personal data too",
}
"""By the name behind the prefix: what each is for."""

MEMBERSHIPS = ((PROJECT, OPERATOR), (ANALYST, PERSONAL))
"""The first is granted to the second."""

FOR_ANALYSTS = ("lag", "projection_lag")
"""Views on the bookkeeping that tell how fresh the read models are."""

REVIEWED_VIEWS = frozenset(
    {"cash_ledger", "cash_reconciliation", "holdings", "order_status_history"}
)
"""Views over tables with personal data, or over the log, that show none of it. Any other such view
is for PERSONAL only, until somebody has looked at it and put it here."""

Kind = Literal["DATABASE", "SCHEMA", "TABLE", "FUNCTION", "DEFAULT"]


class Right(NamedTuple):
    """One privilege of one role.

    Attributes:
        kind: What the object is; ``DEFAULT`` is future tables of the schema.
        name: The object's name, in its schema: ``pipeline.events``.
        column: The column that it is limited to, or "".
        role: Without prefix.
        privilege: As PostgreSQL calls it.
    """

    kind: Kind
    name: str
    column: str
    role: str
    privilege: str


class Purpose(Enum):
    """What a login may be for, as `pipeline check` tells it."""

    INGEST = INGEST
    PROJECT = PROJECT


_WRITE = ("INSERT", "UPDATE", "DELETE")

# A gap's end may move while it is open; accepting it is not the ingest's to decide.
_LOG = {
    "events": ("SELECT", "INSERT"),
    "consumer_offsets": ("SELECT", "INSERT", "UPDATE"),
    "gaps": ("SELECT", "INSERT"),
    "ingest_workers": ("SELECT", *_WRITE),
    "installation": ("SELECT",),
    "locks": ("SELECT", "INSERT", "UPDATE"),
}
_GAP_COLUMN = "end_offset"
_PROJECTION = {
    "events": ("SELECT",),
    "consumer_offsets": ("SELECT",),
    "projectors": ("SELECT", *_WRITE),
    "projection_checkpoints": ("SELECT", *_WRITE),
    "projection_workers": ("SELECT", *_WRITE),
    "rebuild_ranges": ("SELECT", *_WRITE),
    "dead_letters": ("SELECT", *_WRITE),
    "locks": ("SELECT", "INSERT", "UPDATE"),
}
_READ_MODEL = ("SELECT", *_WRITE, "TRUNCATE")
_SHADOW = ("SELECT", *_WRITE)
_FUNCTIONS = {
    INGEST: ("make_segment",),
    PROJECT: ("make_shadow", "drop_shadow"),
    OPERATOR: ("accept_gap",),
}

# What somebody else has made in our schemas is not ours to grant.
RELATIONS = text("""
SELECT n.nspname AS schema, c.relname AS name, c.relkind = 'v' AS is_view
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspowner = c.relowner
WHERE n.nspname = ANY (CAST(:schemas AS text[])) AND c.relkind IN ('r', 'p', 'v', 'm')
""")
READ_BY_VIEWS = text("""
SELECT DISTINCT v.relname AS view, n.nspname AS schema, c.relname AS name
FROM pg_rewrite r
JOIN pg_class v ON v.oid = r.ev_class AND v.relnamespace = CAST(:schema AS regnamespace)
JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
                AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> v.oid
JOIN pg_class c ON c.oid = d.refobjid
JOIN pg_namespace n ON n.oid = c.relnamespace
""")


def needed_by(purpose: Purpose, tables: Iterable[str]) -> Iterator[Right]:
    """What a login of this purpose must be allowed.

    Args:
        purpose: What it is for.
        tables: Names of the read models' tables.
    """
    match purpose:
        case Purpose.INGEST:
            yield from _on_tables(LOG_SCHEMA, _LOG, INGEST)
            yield Right("TABLE", f"{LOG_SCHEMA}.gaps", _GAP_COLUMN, INGEST, "UPDATE")
        case Purpose.PROJECT:
            yield Right("SCHEMA", SHADOW_SCHEMA, "", PROJECT, "USAGE")
            yield Right("SCHEMA", READ_SCHEMA, "", PROJECT, "USAGE")
            yield from _on_tables(LOG_SCHEMA, _PROJECTION, PROJECT)
            yield from _on_tables(READ_SCHEMA, dict.fromkeys(tables, _READ_MODEL), PROJECT)
    for function in _FUNCTIONS[purpose.value]:
        yield Right("FUNCTION", f"{LOG_SCHEMA}.{function}", "", purpose.value, "EXECUTE")


def wanted(db: Connection, projectors: Iterable[Projector]) -> set[Right]:
    """Every right that every role should have within this database, and no other.

    Args:
        db: An open transaction; the database has the schema of this program.
        projectors: The read models of this program. Tables that it does not know are for nobody
            but those who project and those who may see personal data.
    """
    relations = db.execute(RELATIONS, {"schemas": list(SCHEMAS)}).all()
    of_schema = {
        schema: [row.name for row in relations if row.schema == schema and not row.is_view]
        for schema in SCHEMAS
    }
    rights: set[Right] = set()
    for purpose in Purpose:
        rights.add(Right("SCHEMA", LOG_SCHEMA, "", purpose.value, "USAGE"))
        rights.update(needed_by(purpose, of_schema[READ_SCHEMA]))
        # For `status` and `check`: it holds no personal data, but for the events, which both need.
        rights.update(
            Right("TABLE", f"{LOG_SCHEMA}.{row.name}", "", purpose.value, "SELECT")
            for row in relations
            if row.schema == LOG_SCHEMA
        )
    # New ones have their rights from the moment at which they are made.
    for schema, privileges in ((READ_SCHEMA, _READ_MODEL), (SHADOW_SCHEMA, _SHADOW)):
        rights.update(Right("DEFAULT", schema, "", PROJECT, one) for one in privileges)
    shadows = dict.fromkeys(of_schema[SHADOW_SCHEMA], _SHADOW)
    rights.update(_on_tables(SHADOW_SCHEMA, shadows, PROJECT))
    for function in _FUNCTIONS[OPERATOR]:
        rights.add(Right("FUNCTION", f"{LOG_SCHEMA}.{function}", "", OPERATOR, "EXECUTE"))
    rights.update(_of_analysts(db, of_schema[READ_SCHEMA], projectors))
    return rights


def _on_tables(schema: str, privileges: Mapping[str, Iterable[str]], role: str) -> Iterator[Right]:
    for table, ones in privileges.items():
        for one in ones:
            yield Right("TABLE", f"{schema}.{table}", "", role, one)


def on_database(database: str) -> Iterator[Right]:
    """What each role should have on the database itself."""
    yield Right("DATABASE", database, "", OWNER, "CREATE")
    for role in ROLES:
        yield Right("DATABASE", database, "", role, "CONNECT")
    for role in (OWNER, INGEST, OPERATOR):
        yield Right("DATABASE", database, "", role, "TEMPORARY")


def _of_analysts(
    db: Connection, tables: Iterable[str], projectors: Iterable[Projector]
) -> Iterator[Right]:
    for schema in (LOG_SCHEMA, READ_SCHEMA):
        yield Right("SCHEMA", schema, "", ANALYST, "USAGE")
    for view in FOR_ANALYSTS:
        yield Right("TABLE", f"{LOG_SCHEMA}.{view}", "", ANALYST, "SELECT")
    declared = {table.name: table for one in projectors for table in one.tables}
    guarded = {f"{LOG_SCHEMA}.events"}
    for name in tables:
        full = f"{READ_SCHEMA}.{name}"
        if name in declared and not personal_columns(declared[name]):
            yield Right("TABLE", full, "", ANALYST, "SELECT")
            continue
        guarded.add(full)
        yield Right("TABLE", full, "", PERSONAL, "SELECT")
        if name in declared:
            for column in declared[name].columns:
                if column.name not in personal_columns(declared[name]):
                    yield Right("TABLE", full, column.name, ANALYST, "SELECT")
    harmless = set(own_masked_views(db)) | REVIEWED_VIEWS
    for view, reads in _views(db).items():
        is_open = view in harmless or not reads & guarded
        role = ANALYST if is_open else PERSONAL
        yield Right("TABLE", f"{READ_SCHEMA}.{view}", "", role, "SELECT")


def _views(db: Connection) -> dict[str, set[str]]:
    """The views for analysts, and every table that each reads, through other views too."""
    direct: dict[str, set[str]] = defaultdict(set)
    for row in db.execute(READ_BY_VIEWS, {"schema": READ_SCHEMA}):
        direct[f"{READ_SCHEMA}.{row.view}"].add(f"{row.schema}.{row.name}")
    ours = [row.name for row in db.execute(RELATIONS, {"schemas": [READ_SCHEMA]}) if row.is_view]
    return {name: _reached(direct, f"{READ_SCHEMA}.{name}") for name in ours}


def _reached(direct: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    to_see = [start]
    while to_see:
        new = direct.get(to_see.pop(), set()) - found
        found |= new
        to_see += new
    return found
