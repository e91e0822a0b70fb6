"""What the plan does to views; and which views, of ours and of others, read a relation."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, text
from sqlalchemy.exc import DBAPIError

from pipeline.db import PERSONAL_SCHEMA, READ_SCHEMA
from pipeline.db.identifiers import relation, statement
from pipeline.errors import ConfigurationError
from pipeline.schema import objects
from pipeline.schema.declared import DeclaredView, plain_view
from pipeline.schema.step import Step, refuse_others

GRANTS_ON = text("SELECT unnest(pipeline.grants_of(CAST(CAST(:oid AS oid) AS regclass)))")


def grants_on(db: Connection, oid: int) -> Sequence[str]:
    """The statements that give others their rights on a relation of ours."""
    return db.execute(GRANTS_ON, {"oid": oid}).scalars().all()


def moves_out(db: Connection, views: Iterable[DeclaredView]) -> Iterator[Step]:
    """Views that show personal data no more: they keep their rights, and others' views on them.

    A view that begins to show personal data is made without the rights of the former one.
    """
    recorded, found = objects.recorded(db), objects.relations(db, objects.READ_SCHEMAS)
    for view in views:
        schema, _, name = view.name.partition(".")
        before = f"{PERSONAL_SCHEMA}.{name}"
        known = recorded.get(before)
        if schema != READ_SCHEMA or not (known and known.kind == "view" and known.is_ours):
            continue
        refuse_others(view.name, recorded, found, view.comment)
        if view.name not in found:
            what = f"move from {before}, as it shows no personal data any more"
            move = f"ALTER VIEW {relation(before)} SET SCHEMA {schema}"
            moved = DeclaredView(view.name, known.definition, view.comment)
            statements = (move, objects.rename_statement(before, view.name))
            yield Step(view.name, what, statements, moved)


def views(
    db: Connection,
    declared: Sequence[DeclaredView],
    *,
    moved_tables: Mapping[str, str] | None = None,
    moved_views: Collection[str] = (),
) -> Iterator[Step]:
    """Views that are missing, or changed in their declaration or by hand.

    A view that nothing declares any more stays where views of others read it.

    Args:
        db: An open transaction.
        declared: The views.
        moved_tables: Tables that a step before moves: the name that each will have, and has. A
            view has the former name of its table only after that, or gave it up to the table.
        moved_views: Views that a step before moves, by the name that they will have.

    Raises:
        ConfigurationError: Somebody else's object has the name of a view, or others have made views
            on a view whose columns change.
    """
    recorded, found = objects.recorded(db), objects.relations(db, objects.READ_SCHEMAS)
    vacated = {*(moved_tables or {}), *(moved_tables or {}).values()}
    for view in declared:
        if view.name in vacated:
            what: str | None = "create view"
        elif view.name in moved_views:
            what = "replace view"
        else:
            what = _due(db, view, recorded, found)
        if what:
            yield Step(view.name, what, (view.definition,), view)
    moved_from = {f"{PERSONAL_SCHEMA}.{name.partition('.')[2]}" for name in moved_views}
    wanted = {view.name for view in declared} | vacated | moved_from
    for name, known in sorted(recorded.items()):
        if known.kind != "view" or name in wanted or not known.is_ours or known.oid is None:
            continue
        if not dependents(db, known.oid)[1]:
            yield Step(name, "drop view: nothing declares it", (f"DROP VIEW {relation(name)}",))


def _due(
    db: Connection,
    view: DeclaredView,
    recorded: Mapping[str, objects.Recorded],
    found: Mapping[str, Row[Any]],
) -> str | None:
    """What happens to a view; None if it is as declared."""
    known = recorded.get(view.name)
    refuse_others(view.name, recorded, found, view.comment)
    if view.name not in found:
        return "create view" if known is None else "create again: somebody dropped it"
    if known is None:
        return "record it: made by what `--sql` printed"
    if known.definition != view.definition:
        _refuse_other_columns(db, view, found[view.name].oid)
        return "replace view"
    if known.query != known.details.get("query"):
        return "replace view: somebody changed it"
    return None


_NAMED = re.compile(r"CREATE VIEW [a-z_]+\.[a-z_0-9]+")
_LIKE_IT = "pipeline_columns_of_a_view"


def _refuse_other_columns(db: Connection, view: DeclaredView, oid: int) -> None:
    """A view keeps its columns, in their order, or nobody else's view may read it."""
    _, others = dependents(db, oid)
    if not others or view.of_table is not None:
        return
    columns = _columns(db, view)
    had = [tuple(row) for row in db.execute(VIEW_COLUMNS, {"oid": oid})]
    if columns is not None and columns[: len(had)] != had:
        raise ConfigurationError(
            f"{view.name} has other columns now, and others have made views on it: "
            f"{'; '.join(others)}. Nothing was changed. Have their owners drop them, repeat "
            "`pipeline migrate`, and make them again"
        )


def _columns(db: Connection, view: DeclaredView) -> list[tuple[object, ...]] | None:
    """Names and types of the columns that a view will have; None where it cannot be made yet."""
    alike, _, _ = _NAMED.sub(f"CREATE TEMPORARY VIEW {_LIKE_IT}", view.definition, 1).partition(
        ";\n"
    )
    savepoint = db.begin_nested()
    try:
        db.execute(statement(alike))
        return [tuple(row) for row in db.execute(COLUMNS_LIKE_IT)]
    except DBAPIError:
        return None
    finally:
        savepoint.rollback()


COLUMNS_LIKE_IT = text(f"""
SELECT attname::text AS name, format_type(atttypid, atttypmod) AS type FROM pg_attribute
WHERE attrelid = 'pg_temp.{_LIKE_IT}'::regclass AND attnum > 0 ORDER BY attnum
""")  # noqa: S608 - a constant
DEPENDENT_VIEWS = text("""
SELECT DISTINCT n.nspname || '.' || v.relname AS name, v.oid,
       pg_get_userbyid(v.relowner) AS owner, v.relkind::text AS kind
FROM pg_depend d
JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
JOIN pg_class v ON v.oid = r.ev_class
JOIN pg_namespace n ON n.oid = v.relnamespace
WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = :oid AND v.oid <> d.refobjid
ORDER BY 1
""")
VIEW_COLUMNS = text("""
SELECT attname::text AS name, format_type(atttypid, atttypmod) AS type FROM pg_attribute
WHERE attrelid = :oid AND attnum > 0 ORDER BY attnum
""")


def dependents(db: Connection, oid: int) -> tuple[Sequence[str], Sequence[str]]:
    """Views on a relation, and views on those: ours in the order of their making, and others'."""
    recorded = objects.recorded(db)
    ours: list[str] = []
    others: list[str] = []
    to_see = [oid]
    while to_see:
        for row in db.execute(DEPENDENT_VIEWS, {"oid": to_see.pop(0)}):
            if row.name in recorded and recorded[row.name].is_ours:
                if row.name in ours:
                    ours.remove(row.name)
                ours.append(row.name)
                to_see.append(row.oid)
            else:
                others.append(f"{row.name} (owner {row.owner})")
    return ours, sorted(set(others))


def shows(db: Connection, oid: int, columns: Iterable[str]) -> bool:
    """Whether a view shows the values of columns that its table has."""
    read = set(db.execute(READ_COLUMNS, {"oid": oid}).scalars())
    return bool(read & set(columns))


READ_COLUMNS = text("""
SELECT a.attname::text FROM pg_rewrite r
JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
                AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> r.ev_class
JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
WHERE r.ev_class = :oid AND d.refobjsubid > 0
""")


def with_kept_columns(db: Connection, view: DeclaredView, oid: int) -> DeclaredView:
    """A view of a table with personal data that keeps the columns that it has, NULL where personal.

    So that others' views on it, which need all of its columns, stay.
    """
    if view.of_table is None:
        return view
    had = [(row.name, row.type) for row in db.execute(VIEW_COLUMNS, {"oid": oid})]
    kept = plain_view(view.of_table, nulls=had)
    return replace(view, definition=kept.definition)
