"""Whether tables and views of ours are as they were declared: found quickly, for `status`.

`migrate` compares everything; here is compared what somebody can drop or change by hand, and
whether this release has been migrated.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from pipeline.catalogue import Catalogue
from pipeline.db.identifiers import type_name
from pipeline.projection.registry import stale
from pipeline.schema import objects
from pipeline.schema.declared import DeclaredTable, tables_of, views_of

COLUMNS = text("""
SELECT n.nspname || '.' || c.relname AS name, a.attname AS column,
       format_type(a.atttypid, a.atttypmod) AS type
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = ANY (CAST(:schemas AS text[])) AND c.relkind = 'r'
  AND a.attnum > 0 AND NOT a.attisdropped
""")


class Drift(NamedTuple):
    """A table or view that is not as it is declared.

    Attributes:
        name: Schema and name.
        what: What is different, as the rest of a sentence.
    """

    name: str
    what: str


def drift(db: Connection, catalogue: Catalogue) -> Iterator[Drift]:
    """Tables and views that `pipeline migrate` would make or change.

    Args:
        db: An open transaction; the database has the schema of this program.
        catalogue: What is declared.
    """
    recorded = objects.recorded(db)
    there = objects.relations(db, objects.READ_SCHEMAS)
    tables = tables_of(catalogue)
    waiting = stale(db, {table.projector: table.fingerprint for table in tables})
    types: dict[str, dict[str, str]] = {}
    for row in db.execute(COLUMNS, {"schemas": list(objects.READ_SCHEMAS)}):
        types.setdefault(row.name, {})[row.column] = row.type
    for table in tables:
        what = _of_object(table.name, recorded, there)
        if what is None and table.projector not in waiting:
            what = _of_columns(table, types.get(table.name, {}))
        if what:
            yield Drift(table.name, what)
    for view in views_of(catalogue):
        what = _of_object(view.name, recorded, there)
        known = recorded.get(view.name)
        if what is None and known and known.definition != view.definition:
            what = "its definition has changed since the last `pipeline migrate`"
        elif what is None and known and known.query != known.details.get("query"):
            what = "somebody has changed its query"
        if what:
            yield Drift(view.name, what)


def _of_object(
    name: str, recorded: Mapping[str, objects.Recorded], there: Mapping[str, Any]
) -> str | None:
    known = recorded.get(name)
    if name not in there:
        return "does not exist: somebody has dropped it" if known else "was not created yet"
    if known is None or not known.is_ours:
        return f"is not the one that `pipeline migrate` made; its owner is {there[name].owner}"
    return None


def _of_columns(table: DeclaredTable, types: Mapping[str, str]) -> str | None:
    declared = {column.name: type_name(column.type).lower() for column in table.table.columns}
    different = sorted(name for name in declared if types.get(name) != declared[name])
    return f"other columns than declared: {', '.join(different)}" if different else None
