"""Read models and views, made as they are declared: the plan, and its execution step by step.

Each step is a transaction of its own and is planned from what is there, so the next command
continues a killed one. What was executed is kept in ``pipeline.schema_changes``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import structlog
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from pipeline import failpoints
from pipeline.catalogue import Catalogue
from pipeline.db import READ_SCHEMA, translated
from pipeline.errors import DEADLOCK, ConfigurationError, TransientError
from pipeline.schema import objects, plan, roles
from pipeline.schema.declared import DeclaredTable, DeclaredView, plain_view, tables_of, views_of
from pipeline.schema.plan import Step

log = structlog.get_logger(__name__)

LOCK_ATTEMPTS_MAX = 20
"""How often a step asks for the locks that it needs; each time for LOCK_WAIT."""
# A waiting request makes later readers and writers wait behind it, so it must give up soon.
LOCK_WAIT = text("SET LOCAL lock_timeout = '3s'")
# The lock was not to be had in time, or the session lost a deadlock with a worker's.
_LOCKS = frozenset({"55P03", DEADLOCK})
# A column or relation that a later step makes: that view is made after it.
_NOT_YET = frozenset({"42P01", "42703"})
# CREATE OR REPLACE VIEW cannot drop or rename columns.
_OTHER_COLUMNS = "42P16"


def planned(db: Connection, catalogue: Catalogue) -> list[Step]:
    """What ``make`` would do now; nothing is changed.

    Raises:
        ConfigurationError: Objects of others are in the way; the text names each.
    """
    moves = list(plan.moves(db, tables_of(catalogue)))
    moved = {step.name for step in moves}
    staying = [table for table in tables_of(catalogue) if table.name not in moved]
    views = [view for view in views_of(catalogue) if view.name.partition(".")[2] not in {
        name.partition(".")[2] for name in moved
    }]  # fmt: skip
    return [*moves, *plan.tables(db, staying), *plan.views(db, views)]


def make(db: Connection, catalogue: Catalogue, done: Callable[[Step], None]) -> None:
    """Bring tables and views to what is declared.

    Args:
        db: A connection of the owner, in no transaction.
        catalogue: What is declared.
        done: Called with each step after it is committed.

    Raises:
        ConfigurationError: Objects of others are in the way; nothing was done to what they are on.
        TransientError: The server is unavailable, or a lock was not to be had; repeat.
    """
    declared = tables_of(catalogue)
    with db.begin():
        # Everything that would be refused is refused before anything changes.
        planned(db, catalogue)
    for steps in (lambda: plan.moves(db, declared), lambda: plan.tables(db, declared)):
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
    recorded, there = objects.recorded(db), objects.relations(db, plan.SCHEMAS)
    closed: list[str] = []
    for table in tables_of(catalogue):
        name = f"{READ_SCHEMA}.{table.table.name}"
        if not table.personal or name not in there or name not in recorded:
            continue
        if there[name].kind == "r":
            closed += roles.close_columns(db, prefix, plan.quoted(name), table.personal)
        elif recorded[name].is_ours and plan.shows(db, there[name].oid, table.personal):
            kept = plan.with_kept_columns(db, plain_view(table), there[name].oid)
            statement = kept.definition.replace("CREATE VIEW", "CREATE OR REPLACE VIEW", 1)
            _run(db, [statement])
            closed.append(statement)
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
            db.execute(LOCK_WAIT)
            _run(db, step.statements)
            _record(db, step)
            failpoints.reach("mid_read_models")

    _with_locks(step, attempt)


def _execute_beside(db: Connection, step: Step) -> None:
    """A statement that PostgreSQL refuses in a transaction; what it leaves if killed is found."""
    with translated():
        alone = db.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        with alone:
            alone.execute(text(f"SET ROLE {db.execute(CURRENT_ROLE).scalar_one()}"))
            db.rollback()
            _run(alone, step.statements)
    with translated(), db.begin():
        _record(db, step)


CURRENT_ROLE = text("SELECT quote_ident(current_user)")


def _with_locks(step: Step, attempt: Callable[[], None]) -> None:
    """Repeat what needs the lock of a table that workers and readers use."""
    for number in range(1, LOCK_ATTEMPTS_MAX):
        try:
            attempt()
        except TransientError as error:
            if error.sqlstate not in _LOCKS:
                raise
            log.warning("waiting_for_lock", object=step.name, attempt=number, reason=str(error))
        else:
            return
    attempt()


def _run(db: Connection, statements: Iterable[str]) -> None:
    for statement in statements:
        db.execute(text(statement.replace(":", r"\:")))


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
    waiting = _read(db, lambda: plan.views(db, views_of(catalogue)))
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
        tables = plan.awaiting_rebuild(db, tables_of(catalogue))
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
            db.execute(LOCK_WAIT)
            try:
                _replace(db, view)
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) in _NOT_YET:
                    raise _NotYetError(_primary(error)) from None
                raise
            objects.note_change(db, step.name, [view.definition])
            objects.record(db, step.name, "view", view.definition, {})
            failpoints.reach("mid_read_models")

    _with_locks(step, attempt)


def _primary(error: DBAPIError) -> str:
    diagnostics = getattr(error.orig, "diag", None)
    return str(diagnostics.message_primary if diagnostics else error.orig)


def _replace(db: Connection, view: DeclaredView) -> None:
    """Make the view, in place where its columns allow it; views of ours on it are made again."""
    in_place = view.definition.replace("CREATE VIEW", "CREATE OR REPLACE VIEW", 1)
    try:
        with db.begin_nested():
            _run(db, [in_place])
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != _OTHER_COLUMNS:
            raise
    else:
        return
    there = objects.relations(db, plan.SCHEMAS)[view.name]
    ours, others = plan.dependents(db, there.oid)
    if others and view.of_table is not None:
        kept = plan.with_kept_columns(db, view, there.oid)
        log.warning("view_keeps_columns", view=view.name, needed_by=others)
        _run(db, [kept.definition.replace("CREATE VIEW", "CREATE OR REPLACE VIEW", 1)])
        return
    if others:
        raise ConfigurationError(
            f"{view.name} has other columns now, and others have made views on it: "
            f"{'; '.join(others)}. It is left as it is. Have their owners drop them, repeat "
            "`pipeline migrate`, and make them again"
        )
    recorded, relations = objects.recorded(db), objects.relations(db, plan.SCHEMAS)
    grants = [
        statement
        for name in [view.name, *ours]
        for statement in plan.grants_on(db, relations[name].oid)
    ]
    _run(db, [f"DROP VIEW {plan.quoted(name)}" for name in [*reversed(ours), view.name]])
    _run(db, [view.definition])
    for name in ours:
        _run(db, [recorded[name].definition])
        objects.record(db, name, "view", recorded[name].definition, {})
    _run(db, grants)
