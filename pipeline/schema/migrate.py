"""The database's schema, and rights on it, brought up to date: revisions, declarations, roles."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import structlog
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from pipeline import failpoints
from pipeline.catalogue import Catalogue, load
from pipeline.db import (
    LOG_SCHEMA,
    SessionLimits,
    locks,
    open_engine,
    transaction,
    translated,
    use_one_snapshot,
)
from pipeline.errors import ConfigurationError, TransientError
from pipeline.schema import execute, plan, revisions, roles
from pipeline.schema.step import Step

log = structlog.get_logger(__name__)

# Declarations and tables are compared within a transaction, which takes long on a busy machine.
LIMITS = SessionLimits(idle_in_transaction=timedelta(minutes=1))

FIRST_TRIES_MAX = 5
"""How often several may begin with an empty database at once."""

RECHECK_S = 0.5
"""How often a migration looks whether another one has ended."""
LOG_WAIT_S = 30.0
"""How often it logs that it waits."""
# Unique violation, duplicate schema, duplicate table: somebody was quicker.
_MADE_BY_ANOTHER = frozenset({"23505", "42P06", "42P07"})


class MigrationReport(NamedTuple):
    """What was done, or is to be done.

    Attributes:
        applied: Revisions of the log and the bookkeeping, oldest first. Where some are missing, a
            plan has no steps and grants: they follow from what the revisions make.
        steps: Changes of read models and views, in order.
        grants: Statements that changed roles and rights.
        role_prefix: With what the names of this database's roles begin; None if it has none.
    """

    applied: list[str]
    steps: list[Step]
    grants: list[str]
    role_prefix: str | None

    @property
    def is_empty(self) -> bool:
        """Whether there was nothing to do."""
        return not (self.applied or self.steps or self.grants)


def migrate(
    url: str,
    catalogue: Catalogue | None = None,
    *,
    with_roles: bool = False,
    role_prefix: str | None = None,
) -> MigrationReport:
    """Bring the database to the schema and the rights of this program; safe to repeat and live.

    First the log and the bookkeeping, by Alembic, each migration in a transaction of its own; then
    read models and views, as they are declared, each step in a transaction of its own; then rights.
    So a crash leaves the database between two of them, and the next call continues. Where the
    database has roles, the owner among them makes everything.

    Args:
        url: ``postgresql+psycopg://…`` of a role that may create schemas, or act as the owner.
        catalogue: The read models and views; by default those that are installed.
        with_roles: Make the roles too, where they are not there.
        role_prefix: With what their names then begin; None for what they begin with already, or
            the default.

    Raises:
        ConfigurationError: A right is missing, the schema is newer than this program, or objects of
            others are in the way.
        TransientError: The server is unavailable or a lock was not to be had; repeat.
    """
    declared = catalogue or load()
    engine = open_engine(url, application="pipeline migrate", limits=LIMITS)
    applied: list[str] = []
    steps: list[Step] = []

    def note(*, step: Any, **_rest: Any) -> None:  # noqa: ANN401 - Alembic's own types
        failpoints.reach("mid_migration")
        applied.append(step.up_revision_id)

    try:
        with translated(), engine.connect() as db:
            found = _found_roles(db, role_prefix)
            if found is not None:
                roles.act_as_owner(db, found)
            db.commit()
            _make_lock_table(db)
            with _exclusively(engine, found):
                # The migration that was waited for may have made them.
                found = _found_roles(db, role_prefix)
                _owner(found)(db)
                db.commit()
                revisions.refuse_newer(db)
                revisions.refuse_dropped_tables(db)
                _close_personal_columns(db, found, declared)
                revisions.upgrade(db, note)
                grants = []
                if with_roles:
                    found = found or role_prefix or roles.PREFIX_DEFAULT
                    grants += _make_roles(db, found)
                db.commit()
                with revisions.name_dependents(db):
                    execute.make(db, declared, steps.append)
                grants += _grant_rights(db, found)
                return MigrationReport(applied, steps, grants, found)
    finally:
        engine.dispose()


def planned(url: str, catalogue: Catalogue | None = None) -> MigrationReport:
    """What ``migrate`` would do now; nothing is changed.

    Read models and views are compared only in a database whose log is current; else all that is
    known is that they follow.

    Raises:
        ConfigurationError: The schema is newer than this program, or objects of others are in the
            way.
        TransientError: The server is unavailable.
    """
    engine = open_engine(url, application="pipeline migrate")
    try:
        with transaction(engine) as db:
            use_one_snapshot(db)
            revisions.refuse_newer(db)
            found = roles.found_prefix(db)
            missing = revisions.missing(db)
            if missing:
                return MigrationReport(missing, [], [], found)
            steps = plan.planned(db, catalogue or load())
            grants = roles.grant_statements(db, found) if found else []
            return MigrationReport([], steps, grants, found)
    finally:
        engine.dispose()


def planned_roles(url: str, role_prefix: str | None = None) -> MigrationReport:
    """The statements by which a DBA makes roles and rights, where ``migrate`` may not; no change.

    Args:
        url: A database with the schema of this program, as its migrating login sees it.
        role_prefix: As for ``migrate``.

    Raises:
        ConfigurationError: The schema is not current, or the roles serve another database.
    """
    engine = open_engine(url, application="pipeline migrate")
    try:
        revisions.check_schema(engine)
        with transaction(engine) as db:
            use_one_snapshot(db)
            found = _found_roles(db, role_prefix) or role_prefix or roles.PREFIX_DEFAULT
            statements = roles.role_statements(db, found)
            return MigrationReport([], [], [*statements, *roles.grant_statements(db, found)], found)
    finally:
        engine.dispose()


def _close_personal_columns(db: Connection, prefix: str | None, catalogue: Catalogue) -> None:
    """Committed before anything that can fail; again in each migration, for what that one makes."""
    db.rollback()
    with db.begin():
        _close_what_is_open(db, prefix, catalogue)
    failpoints.reach("after_closing")


def _close_what_is_open(db: Connection, prefix: str | None, catalogue: Catalogue) -> None:
    if closed := execute.close_personal_columns(db, prefix, catalogue):
        log.warning("personal_data_closed", statements=closed)


@contextmanager
def _exclusively(engine: Engine, prefix: str | None) -> Iterator[None]:
    """Keep other migrations out until the block ends; the second one waits for the first."""
    waited_s = 0.0
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locks.held(engine, "migrate", become=_owner(prefix)))
                break
            except locks.LockTakenError as taken:
                if waited_s % LOG_WAIT_S == 0:
                    log.warning("waiting_for_lock", waited_s=waited_s, reason=str(taken))
            time.sleep(RECHECK_S)
            waited_s += RECHECK_S
        yield


def _owner(prefix: str | None) -> Callable[[Connection], None]:
    return lambda db: roles.act_as_owner(db, prefix) if prefix else None


def _make_lock_table(db: Connection) -> None:
    """Have the table of locks before any migration. Others may make it at the same time."""
    for _ in range(FIRST_TRIES_MAX):
        try:
            if not locks.has_table(db):
                db.execute(text(f"CREATE SCHEMA IF NOT EXISTS {LOG_SCHEMA}"))
                locks.make_table(db)
            db.commit()
        except DBAPIError as refused:
            db.rollback()
            if getattr(refused.orig, "sqlstate", None) not in _MADE_BY_ANOTHER:
                raise
        else:
            return
    raise TransientError(
        f"other sessions began to make schema {LOG_SCHEMA} {FIRST_TRIES_MAX} times; repeat"
    )


def _found_roles(db: Connection, wanted: str | None) -> str | None:
    found = roles.found_prefix(db)
    if wanted is not None:
        roles.check_prefix(wanted)
    if None not in (found, wanted) and found != wanted:
        raise ConfigurationError(
            f"the roles of this database are called {found}*; they cannot be called {wanted}*: "
            f"use --role-prefix {found}"
        )
    return found


def _make_roles(db: Connection, prefix: str) -> list[str]:
    """Roles, and the owner's ownership; as this login, and as the owner afterwards.

    Each statement commits alone, so that no table's lock is held while another one is waited for.
    """
    db.execute(text("RESET ROLE"))
    statements = roles.role_statements(db, prefix)
    db.commit()
    for statement in statements:
        try:
            with translated():
                roles.execute(db, [statement])
                db.commit()
        except ConfigurationError as error:
            raise ConfigurationError(
                f"this login may not {statement}: {error}. Have a DBA run what "
                "`pipeline migrate --print-roles` prints"
            ) from None
    roles.act_as_owner(db, prefix)
    db.commit()
    return statements


def _grant_rights(db: Connection, prefix: str | None) -> list[str]:
    """Who has rights on what."""
    if prefix is None:
        return []
    with db.begin():
        # Rebuilds make and drop tables meanwhile: rights due and rights given are seen at once.
        use_one_snapshot(db)
        if missing := roles.missing_roles(db, prefix):
            raise ConfigurationError(
                f"role {', '.join(missing)} does not exist: run `pipeline migrate --roles`"
            )
        statements = roles.grant_statements(db, prefix)
        roles.execute(db, statements)
        return statements
