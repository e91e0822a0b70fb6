"""What is due so that the schemas for analysts hold what is declared, and no more.

The whole plan is made before anything changes: what others have made on our tables survives, or is
named and the plan refused.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row

from pipeline.catalogue import Catalogue
from pipeline.db import PERSONAL_SCHEMA, READ_SCHEMA
from pipeline.db.identifiers import relation
from pipeline.errors import ConfigurationError
from pipeline.schema import objects, plan_tables, plan_views, trial
from pipeline.schema.declared import DeclaredTable, DeclaredView, tables_of, views_of
from pipeline.schema.plan_views import dependents, grants_on
from pipeline.schema.step import Step, refuse_others


def planned(db: Connection, catalogue: Catalogue) -> list[Step]:
    """Every step that is due, in order; nothing is changed.

    Raises:
        ConfigurationError: Objects of others are in the way, or a view of a file cannot be made;
            the text names each.
    """
    trial.refuse_bad_views(db, catalogue)
    tables, views = tables_of(catalogue), views_of(catalogue)
    moved = list(moves(db, tables))
    names = {step.name: _before(step.name) for step in moved}
    moved_views = list(plan_views.moves_out(db, views))
    return [
        *moved,
        *moved_views,
        *plan_tables.tables(db, tables, names),
        *plan_views.views(
            db, views, moved_tables=names, moved_views={step.name for step in moved_views}
        ),
    ]


def moves(db: Connection, tables: Iterable[DeclaredTable]) -> Iterator[Step]:
    """Tables that are in the wrong one of the two schemas: a column has become personal, or is not.

    Raises:
        ConfigurationError: Others have made views on a plain view that must give way, or have
            taken the name that the table needs.
    """
    recorded, found = objects.recorded(db), objects.relations(db, objects.READ_SCHEMAS)
    for table in tables:
        before = _before(table.name)
        is_table = before in found and found[before].kind == "r"
        if not (is_table and before in recorded and recorded[before].is_ours):
            continue
        refuse_others(table.name, recorded, found)
        move = [
            f"ALTER TABLE {relation(before)} SET SCHEMA {table.table.schema}",
            objects.rename_statement(before, table.name),
        ]
        ours, others = dependents(db, found[before].oid)
        renamed = [recorded[name] for name in ours if name != table.name]
        if table.personal:
            closed = (
                f"; no longer readable: {', '.join(others)}, unless the owner may read personal "
                "data. A materialized view keeps its copy until it is refreshed or dropped"
            )
            what = f"move from {before}, as a column is personal{closed if others else ''}"
            step = Step(table.name, what, tuple(move), table)
        else:
            step = _move_out(db, table, before, move, recorded, found)
        # They show the table's new name. What somebody changed in them stays to be found.
        unchanged = [view for view in renamed if view.query == view.details.get("query")]
        views = {view.name: DeclaredView(view.name, view.definition) for view in unchanged}
        views |= {view.name: view for view in step.remade}
        yield replace(step, remade=tuple(views.values()))


def _move_out(
    db: Connection,
    table: DeclaredTable,
    before: str,
    move: Sequence[str],
    recorded: Mapping[str, objects.Recorded],
    found: Mapping[str, Row[Any]],
) -> Step:
    """The table takes the name and the rights of its plain view; our views on that are remade."""
    what = f"move from {before}, as no column is personal any more"
    if table.name not in found:
        return Step(table.name, what, tuple(move), table)
    ours, others = dependents(db, found[table.name].oid)
    if others:
        raise ConfigurationError(
            f"{table.name} is a table again, as no column is personal any more, and others "
            f"have made views on the view of that name: {'; '.join(others)}. Nothing was "
            "changed. Have their owners drop them, then repeat `pipeline migrate`"
        )
    grants = [grant for name in [table.name, *ours] for grant in grants_on(db, found[name].oid)]
    statements = [
        *(f"DROP VIEW {relation(name)}" for name in [*reversed(ours), table.name]),
        objects.forget_statement(table.name),
        *move,
        *(recorded[name].definition for name in ours),
        *grants,
    ]
    remade = tuple(DeclaredView(name, recorded[name].definition) for name in ours)
    return Step(table.name, what, tuple(statements), table, remade=remade)


def _before(name: str) -> str:
    """The name of the object in the other schema."""
    schema, _, local = name.partition(".")
    return f"{READ_SCHEMA if schema == PERSONAL_SCHEMA else PERSONAL_SCHEMA}.{local}"
