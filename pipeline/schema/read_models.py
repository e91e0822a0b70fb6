"""Read models and views, made as they are declared: the plan, and its execution step by step.

Each step is a transaction of its own and is planned from what is there, so the next command
continues a killed one. What was executed is kept in ``pipeline.schema_changes``.
"""

from collections.abc import Callable, Iterable, Iterator

import structlog
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from pipeline import failpoints
from pipeline.catalogue import Catalogue
from pipeline.db import READ_SCHEMA, translated
from pipeline.errors import ConfigurationError, LockHeldError, PipelineError
from pipeline.schema import objects, plan, roles
from pipeline.schema.declared import DeclaredTable, DeclaredView, plain_view, tables_of, views_of
from pipeline.schema.plan import Step

log = structlog.get_logger(__name__)

LOCK_ATTEMPTS_MAX = 20
"""How often a step asks for the locks that it needs; each time for LOCK_WAIT."""
# A waiting request makes later readers and writers wait behind it, so it must give up soon.
LOCK_WAIT = text("SET LOCAL lock_timeout = '3s'")
ONE_SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
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
    for step in _make_views(db, lambda: plan.views(db, views_of(catalogue))):
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
    for number in range(1, LOCK_ATTEMPTS_MAX):
        try:
            attempt()
        except LockHeldError as held:
            log.warning("waiting_for_lock", object=step.name, attempt=number, reason=str(held))
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
    match declared:
        case None:
            objects.forget(db, step.name)
        case DeclaredTable():
            objects.record(db, step.name, "table", declared.definition, declared.details)
        case DeclaredView():
            objects.record(db, step.name, "view", declared.definition, {})


# -------------------------------------------------------------------------------------------- views


def _make_views(db: Connection, steps: Callable[[], Iterable[Step]]) -> Iterator[Step]:
    """Views in an order in which each finds what it reads."""
    refused: PipelineError | None = None
    waiting = _read(db, steps)
    while waiting:
        later = []
        for step in waiting:
            try:
                _execute_view(db, step)
            except _NotYetError as error:
                refused = error.reason
                later.append(step)
            else:
                yield step
        if refused and len(later) == len(waiting):
            raise ConfigurationError(f"view {later[0].name} cannot be made: {refused}") from None
        waiting = later


class _NotYetError(Exception):
    """A view reads what is not there yet."""

    def __init__(self, reason: PipelineError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _execute_view(db: Connection, step: Step) -> None:
    view = step.declared
    if not isinstance(view, DeclaredView):
        _execute(db, step)
        return

    def attempt() -> None:
        with translated(), db.begin():
            db.execute(LOCK_WAIT)
            _replace(db, view)
            objects.note_change(db, step.name, [view.definition])
            objects.record(db, step.name, "view", view.definition, {})
            failpoints.reach("mid_read_models")

    try:
        _with_locks(step, attempt)
    except PipelineError as error:
        if getattr(error, "sqlstate", None) in _NOT_YET:
            raise _NotYetError(error) from None
        raise


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
    recorded = objects.recorded(db)
    _run(db, [f"DROP VIEW {name}" for name in reversed(ours)])
    _run(db, [f"DROP VIEW {view.name}", view.definition])
    for name in ours:
        _run(db, [recorded[name].definition])
        objects.record(db, name, "view", recorded[name].definition, {})
