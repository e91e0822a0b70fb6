"""Read models and views, made as they are declared: the plan, executed step by step.

Each step is a transaction of its own and is planned from what is there, so the next command
continues a killed one. What was executed is kept in ``pipeline.schema_changes``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import structlog
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from pipeline import failpoints
from pipeline.catalogue import Catalogue
from pipeline.db import READ_SCHEMA, table_locks, translated
from pipeline.db.identifiers import relation, statement
from pipeline.errors import ConfigurationError
from pipeline.schema import objects, plan, plan_tables, plan_views, roles
from pipeline.schema.declared import DeclaredTable, DeclaredView, plain_view, tables_of, views_of
from pipeline.schema.step import Step

log = structlog.get_logger(__name__)

# Syntax, names and types: what a later step or a rebuild changes. That view is made after it.
_NOT_YET = "42"
# CREATE OR REPLACE VIEW cannot drop or rename columns.
_OTHER_COLUMNS = "42P16"


def make(db: Connection, catalogue: Catalogue, done: Callable[[Step], None]) -> None:
    """Bring tables and views to what is declared.

    Args:
        db: A connection of the owner, in no transaction.
        catalogue: What is declared.
        done: Called with each step after it is committed.

    Raises:
        ConfigurationError: Objects of others are in the way; nothing was done to what they are on.
        TransientError: The server is unavailable, or a table stayed locked; repeat.
    """
    tables, views = tables_of(catalogue), views_of(catalogue)
    with db.begin():
        # Everything that would be refused is refused before anything changes.
        plan.planned(db, catalogue)
    phases: list[Callable[[], Iterable[Step]]] = [
        lambda: plan.moves(db, tables),
        lambda: plan_views.moves_out(db, views),
        lambda: plan_tables.tables(db, tables),
    ]
    for steps in phases:
        for step in _read(db, steps):
            _execute(db, step)
            done(step)
    for step in _make_views(db, catalogue):
        done(step)


def close_personal_columns(db: Connection, prefix: str | None, catalogue: Catalogue) -> list[str]:
    """Close what must not be read any more, before anything that can fail.

    A table with a column that is personal now is closed by rights until it moves to the other
    schema. The plain view of a table that is there already shows NULL in such a column.

    Args:
        db: An open transaction of the owner.
        prefix: Of the roles; None if there are none.
        catalogue: What is declared.

    Returns:
        The statements, executed.
    """
    recorded, found = objects.recorded(db), objects.relations(db, objects.READ_SCHEMAS)
    closed: list[str] = []
    for table in tables_of(catalogue):
        name = f"{READ_SCHEMA}.{table.table.name}"
        if not table.personal or name not in found or name not in recorded:
            continue
        if found[name].kind == "r":
            closed += roles.close_columns(db, prefix, relation(name), table.personal)
        elif recorded[name].is_ours and plan_views.shows(db, found[name].oid, table.personal):
            view = plan_views.with_kept_columns(db, plain_view(table), found[name].oid)
            _run(db, [view.replacement])
            closed.append(view.replacement)
    return closed


def _read(db: Connection, steps: Callable[[], Iterable[Step]]) -> list[Step]:
    with db.begin():
        return list(steps())


def _execute(db: Connection, step: Step) -> None:
    if not step.in_transaction:
        _execute_beside(db, step)
        return

    def attempt() -> None:
        with translated(), db.begin():
            table_locks.limit_wait(db)
            _run(db, step.statements)
            _record(db, step)
            failpoints.reach("mid_read_models")

    table_locks.retry(attempt, step.name)


def _execute_beside(db: Connection, step: Step) -> None:
    """A statement that PostgreSQL refuses in a transaction; what it leaves if killed is found."""
    with translated():
        beside = db.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        with beside:
            beside.execute(text(f"SET ROLE {db.execute(CURRENT_ROLE).scalar_one()}"))
            db.rollback()
            _run(beside, step.statements)
    failpoints.reach("mid_read_models")
    with translated(), db.begin():
        _record(db, step)


CURRENT_ROLE = text("SELECT quote_ident(current_user)")


def _run(db: Connection, statements: Iterable[str]) -> None:
    for sql in statements:
        db.execute(statement(sql))


def _record(db: Connection, step: Step) -> None:
    declared = step.declared
    if step.statements:
        objects.note_change(db, step.name, step.statements)
    for view in step.remade:
        objects.record(db, view.name, "view", view.definition, {})
    match declared:
        case None:
            objects.forget(db, step.name)
        case DeclaredTable():
            objects.record(db, step.name, "table", declared.definition, declared.details)
        case DeclaredView():
            objects.record(db, step.name, "view", declared.definition, {})


# -------------------------------------------------------------------------------------------- views


def _make_views(db: Connection, catalogue: Catalogue) -> Iterator[Step]:
    """Views in an order in which each finds what it reads.

    Where a rebuild must replace a table first, a view that reads its new columns waits for that.
    """
    waiting = _read(db, lambda: plan_views.views(db, views_of(catalogue)))
    while waiting:
        later: list[tuple[Step, str]] = []
        for step in waiting:
            try:
                _execute_view(db, step)
            except _NotYetError as error:
                later.append((step, str(error)))
            else:
                yield step
        if len(later) == len(waiting):
            _leave_to_rebuild(db, later, catalogue)
            return
        waiting = [step for step, _ in later]


class _NotYetError(Exception):
    """A view reads what does not exist yet. The text is PostgreSQL's, and holds names only."""


def _leave_to_rebuild(
    db: Connection, waiting: Sequence[tuple[Step, str]], catalogue: Catalogue
) -> None:
    """The rebuild makes a view that exists again, as it is declared now; the next command others.

    Raises:
        ConfigurationError: No rebuild will make what a view reads.
    """
    step, reason = waiting[0]
    with db.begin():
        tables = plan_tables.awaiting_rebuild(db, tables_of(catalogue))
        if not tables:
            raise ConfigurationError(
                f"view {step.name} cannot be made: {reason}. Correct its file, then repeat "
                "`pipeline migrate`"
            )
        recorded = objects.recorded(db)
        for step, _ in waiting:
            if step.name in recorded and isinstance(step.declared, DeclaredView):
                objects.expect(db, step.name, step.declared.definition)
    log.warning(
        "views_wait_for_rebuild",
        views=[step.name for step, _ in waiting],
        tables=tables,
        effect="repeat `pipeline migrate` after the rebuild of these tables",
    )


def _execute_view(db: Connection, step: Step) -> None:
    view = step.declared
    if not isinstance(view, DeclaredView):
        _execute(db, step)
        return

    def attempt() -> None:
        with translated(), db.begin():
            table_locks.limit_wait(db)
            try:
                _replace(db, view)
            except DBAPIError as error:
                if str(getattr(error.orig, "sqlstate", "")).startswith(_NOT_YET):
                    raise _NotYetError(_primary(error)) from None
                raise
            objects.note_change(db, step.name, [view.definition])
            objects.record(db, step.name, "view", view.definition, {})
            failpoints.reach("mid_read_models")

    table_locks.retry(attempt, step.name)


def _primary(error: DBAPIError) -> str:
    diagnostics = getattr(error.orig, "diag", None)
    return str(diagnostics.message_primary if diagnostics else error.orig)


def _replace(db: Connection, view: DeclaredView) -> None:
    """Make the view, in place where its columns allow it; views of ours on it are made again."""
    try:
        with db.begin_nested():
            _run(db, [view.replacement])
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != _OTHER_COLUMNS:
            raise
    else:
        return
    found = objects.relations(db, objects.READ_SCHEMAS)
    oid = found[view.name].oid
    ours, others = plan_views.dependents(db, oid)
    if others and view.of_table is not None:
        log.warning("view_keeps_columns", view=view.name, needed_by=others)
        _run(db, [plan_views.with_kept_columns(db, view, oid).replacement])
        return
    if others:
        raise ConfigurationError(
            f"{view.name} has other columns now, and others have made views on it: "
            f"{'; '.join(others)}. It is left as it is. Have their owners drop them, repeat "
            "`pipeline migrate`, and make them again"
        )
    recorded = objects.recorded(db)
    grants = [
        grant for name in [view.name, *ours] for grant in plan_views.grants_on(db, found[name].oid)
    ]
    _run(db, [f"DROP VIEW {relation(name)}" for name in [*reversed(ours), view.name]])
    _run(db, [view.definition])
    for name in ours:
        _run(db, [recorded[name].definition])
        objects.record(db, name, "view", recorded[name].definition, {})
    _run(db, grants)
