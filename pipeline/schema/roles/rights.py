"""Who may do what: the one list from which grants are made, and against which they are checked.

What is not listed is not granted. Rights that a table gets because of what it is (a read model, a
view) are worked out from the catalogue, so a new one has them without anybody thinking of it.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, Row, text

from pipeline.db import LOG_SCHEMA, PERSONAL_SCHEMA, READ_SCHEMA, SHADOW_SCHEMA
from pipeline.schema import objects

SCHEMAS = (LOG_SCHEMA, "pipeline_segments", SHADOW_SCHEMA, READ_SCHEMA, PERSONAL_SCHEMA)

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
    PROJECT: ("make_shadow", "drop_shadow", "must_swap", "others_on", "swap_read_model"),
    OPERATOR: ("accept_gap",),
}

# What somebody else has made in our schemas is not ours to grant.
RELATIONS = text("""
SELECT n.nspname AS schema, c.relname AS name, c.relkind = 'v' AS is_view
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspowner = c.relowner
WHERE n.nspname = ANY (CAST(:schemas AS text[])) AND c.relkind IN ('r', 'p', 'v', 'm')
""")


def needed_by(purpose: Purpose, tables: Iterable[str]) -> Iterator[Right]:
    """What a login of this purpose must be allowed.

    Args:
        purpose: What it is for.
        tables: Names of the read models' tables, with their schemas.
    """
    match purpose:
        case Purpose.INGEST:
            yield from _on_tables(LOG_SCHEMA, _LOG, INGEST)
            yield Right("TABLE", f"{LOG_SCHEMA}.gaps", _GAP_COLUMN, INGEST, "UPDATE")
        case Purpose.PROJECT:
            yield Right("SCHEMA", SHADOW_SCHEMA, "", PROJECT, "USAGE")
            yield Right("SCHEMA", READ_SCHEMA, "", PROJECT, "USAGE")
            yield Right("SCHEMA", PERSONAL_SCHEMA, "", PROJECT, "USAGE")
            yield from _on_tables(LOG_SCHEMA, _PROJECTION, PROJECT)
            for table in tables:
                for privilege in _READ_MODEL:
                    yield Right("TABLE", table, "", PROJECT, privilege)
    for function in _FUNCTIONS[purpose.value]:
        yield Right("FUNCTION", f"{LOG_SCHEMA}.{function}", "", purpose.value, "EXECUTE")


def wanted(db: Connection) -> set[Right]:
    """Every right that every role should have within this database, and no other.

    Args:
        db: An open transaction; the database has the schema of this program.
    """
    relations = db.execute(RELATIONS, {"schemas": list(SCHEMAS)}).all()
    of_schema = {
        schema: [row.name for row in relations if row.schema == schema and not row.is_view]
        for schema in SCHEMAS
    }
    read_models = [
        f"{schema}.{name}"
        for schema in (READ_SCHEMA, PERSONAL_SCHEMA)
        for name in of_schema[schema]
    ]
    rights: set[Right] = set()
    for purpose in Purpose:
        rights.add(Right("SCHEMA", LOG_SCHEMA, "", purpose.value, "USAGE"))
        rights.update(needed_by(purpose, read_models))
        # For `status` and `check`: it holds no personal data, but for the events, which both need.
        rights.update(
            Right("TABLE", f"{LOG_SCHEMA}.{row.name}", "", purpose.value, "SELECT")
            for row in relations
            if row.schema == LOG_SCHEMA
        )
    # New ones have their rights from the moment at which they are made.
    defaults = (
        (READ_SCHEMA, _READ_MODEL),
        (PERSONAL_SCHEMA, _READ_MODEL),
        (SHADOW_SCHEMA, _SHADOW),
    )
    for schema, privileges in defaults:
        rights.update(Right("DEFAULT", schema, "", PROJECT, one) for one in privileges)
    shadows = dict.fromkeys(of_schema[SHADOW_SCHEMA], _SHADOW)
    rights.update(_on_tables(SHADOW_SCHEMA, shadows, PROJECT))
    for function in _FUNCTIONS[OPERATOR]:
        rights.add(Right("FUNCTION", f"{LOG_SCHEMA}.{function}", "", OPERATOR, "EXECUTE"))
    ours = {known.name for known in objects.recorded(db).values() if known.is_ours}
    for_readers = [row for row in relations if row.schema in _FOR_READERS]
    rights.update(_of_analysts(for_readers, ours))
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


_FOR_READERS = {READ_SCHEMA: ANALYST, PERSONAL_SCHEMA: PERSONAL}
"""Who reads what we made in a schema."""


def _of_analysts(relations: Iterable[Row[Any]], ours: Collection[str]) -> Iterator[Right]:
    """What analysts may read. What somebody else made as the owner may show personal data."""
    yield Right("SCHEMA", LOG_SCHEMA, "", ANALYST, "USAGE")
    for view in FOR_ANALYSTS:
        yield Right("TABLE", f"{LOG_SCHEMA}.{view}", "", ANALYST, "SELECT")
    for schema, role in _FOR_READERS.items():
        yield Right("SCHEMA", schema, "", role, "USAGE")
    for row in relations:
        name = f"{row.schema}.{row.name}"
        role = _FOR_READERS[row.schema] if name in ours else PERSONAL
        yield Right("TABLE", name, "", role, "SELECT")
