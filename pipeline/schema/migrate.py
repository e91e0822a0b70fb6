"""The database's schema, and rights on it: bring it up to date, refuse to work on another one."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, Table, text
from sqlalchemy.exc import DBAPIError

from pipeline import failpoints
from pipeline.catalogue import Catalogue, load
from pipeline.db import (
    LOG_SCHEMA,
    locks,
    metadata,
    open_engine,
    transaction,
    translated,
)
from pipeline.errors import DEADLOCK, ConfigurationError, TransientError
from pipeline.foreign_objects import OUR_SCHEMAS, dependents, dropped_tables, refuse_foreign_objects
from pipeline.projection.registry import stale as stale_names
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.schema import read_models, roles
from pipeline.schema.plan import Step
from pipeline.settings import load_settings

log = structlog.get_logger(__name__)

_IN_WHEEL = Path(__file__).parents[1] / "_migrations"
_IN_CHECKOUT = Path(__file__).parents[2] / "migrations"

DEADLOCKS_MAX = 5
"""How often a migration may find its locks crossed with a worker's."""
FIRST_TRIES_MAX = 5
"""How often several may begin with an empty database at once."""

ASK_AGAIN_S = 0.5
"""How often a migration looks whether another one has ended."""
LOG_WAIT_S = 30.0
"""How often it logs that it waits."""
HAS_LOCKS = text("SELECT to_regclass('pipeline.locks') IS NOT NULL")
# Unique violation, duplicate schema, duplicate table: somebody was quicker.
_MADE_BY_ANOTHER = frozenset({"23505", "42P06", "42P07"})
# Rebuilds make and drop tables meanwhile: what should be granted and what is are seen at once.
_ONE_SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")


class Migrated(NamedTuple):
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


def migrate(url: str, catalogue: Catalogue | None = None) -> list[str]:
    """Bring the database to the schema of this program, and its roles to their rights.

    Returns:
        The revisions that were applied, oldest first; empty if there was nothing to do.

    Raises:
        ConfigurationError: A right is missing, or the schema is newer than this program.
        TransientError: The server is unavailable or a lock was not to be had; repeat.
    """
    return set_up(url, catalogue).applied


def set_up(
    url: str,
    catalogue: Catalogue | None = None,
    *,
    with_roles: bool = False,
    role_prefix: str | None = None,
) -> Migrated:
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
    engine = open_engine(url, application="pipeline migrate")
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
            with _alone(engine, found):
                # The migration that was waited for may have made them.
                found = _found_roles(db, role_prefix)
                _owner(found)(db)
                db.commit()
                _refuse_newer(db)
                _refuse_dropped_tables(db)
                _close_personal_columns(db, found, declared)
                _upgrade(db, note)
                grants = []
                if with_roles:
                    found = found or role_prefix or roles.PREFIX_DEFAULT
                    grants += _make_roles(db, found)
                db.commit()
                with _dependents_named(db):
                    read_models.make(db, declared, steps.append)
                grants += _follow_up(db, found)
                return Migrated(applied, steps, grants, found)
    finally:
        engine.dispose()


def planned(url: str, catalogue: Catalogue | None = None) -> Migrated:
    """What ``set_up`` would do now; nothing is changed.

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
            db.execute(_ONE_SNAPSHOT)
            _refuse_newer(db)
            found = roles.found_prefix(db)
            missing = _missing_revisions(db)
            if missing:
                return Migrated(missing, [], [], found)
            steps = read_models.planned(db, catalogue or load())
            return Migrated([], steps, roles.grant_statements(db, found) if found else [], found)
    finally:
        engine.dispose()


def _missing_revisions(db: Connection) -> list[str]:
    known, found = [script.revision for script in _scripts().walk_revisions()], _revision_of(db)
    known.reverse()
    return known[known.index(found) + 1 :] if found else known


def revision_sql(url: str) -> str:
    """The statements of the migrations that are missing, for a DBA; nothing is executed."""
    engine = open_engine(url, application="pipeline migrate")
    try:
        with transaction(engine) as db:
            found = _revision_of(db)
    finally:
        engine.dispose()
    written = StringIO()
    written.write(f"CREATE SCHEMA IF NOT EXISTS {LOG_SCHEMA};\n\n")
    config = _config(offline=True)
    config.output_buffer = written
    command.upgrade(config, f"{found or 'base'}:head", sql=True)
    return written.getvalue()


def planned_roles(url: str, role_prefix: str | None = None) -> Migrated:
    """The statements by which a DBA makes roles and rights, where ``migrate`` may not; no change.

    Args:
        url: A database with the schema of this program, as its migrating login sees it.
        role_prefix: As for ``set_up``.

    Raises:
        ConfigurationError: The schema is not current, or the roles serve another database.
    """
    engine = open_engine(url, application="pipeline migrate")
    try:
        check_schema(engine)
        with transaction(engine) as db:
            db.execute(_ONE_SNAPSHOT)
            found = _found_roles(db, role_prefix) or role_prefix or roles.PREFIX_DEFAULT
            statements = roles.role_statements(db, found)
            return Migrated([], [], [*statements, *roles.grant_statements(db, found)], found)
    finally:
        engine.dispose()


def _close_personal_columns(db: Connection, prefix: str | None, catalogue: Catalogue) -> None:
    """Committed before anything that can fail; again in each migration, for what that one makes."""
    db.rollback()
    with db.begin():
        _close_what_is_open(db, prefix, catalogue)
    failpoints.reach("after_closing")


def _close_what_is_open(db: Connection, prefix: str | None, catalogue: Catalogue) -> None:
    if closed := read_models.close_personal_columns(db, prefix, catalogue):
        log.warning("personal_data_closed", statements=closed)


def _upgrade(db: Connection, note: Callable[..., None]) -> None:
    """Run the migrations that are missing; one that crossed a worker's locks is run once more."""
    for _ in range(DEADLOCKS_MAX):
        try:
            with translated(), _dependents_named(db):
                command.upgrade(_config(connection=db, on_version_apply=note), "head")
        except TransientError as error:
            if error.sqlstate != DEADLOCK:
                raise
            db.rollback()
        else:
            return
    raise TransientError(
        f"the migration deadlocked with workers {DEADLOCKS_MAX} times and was rolled back. Repeat "
        "`pipeline migrate`"
    )


# Dependent objects exist; a column that a view reads cannot change its type.
_BLOCKED = frozenset({"2BP01", "0A000"})


@contextmanager
def _dependents_named(db: Connection) -> Iterator[None]:
    """Name what others made on our tables where it blocks a migration, and whose it is.

    PostgreSQL's message and DETAIL hold names of objects only, in these two cases.
    """
    try:
        yield
    except DBAPIError as error:
        diagnostics = getattr(error.orig, "diag", None)
        if diagnostics is None or diagnostics.sqlstate not in _BLOCKED:
            raise
        message, detail = diagnostics.message_primary, diagnostics.message_detail
        db.rollback()
        named = dependents(db, message, detail) or ([detail] if detail else [])
        db.rollback()
        if not named:
            raise
        raise ConfigurationError(
            f"a migration is blocked, and nothing of it was done. PostgreSQL: {message}. In the "
            f"way: {'; '.join(named)}. Have its owner drop or change each of them, then repeat "
            "`pipeline migrate`"
        ) from None


@contextmanager
def _alone(engine: Engine, prefix: str | None) -> Iterator[None]:
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
            time.sleep(ASK_AGAIN_S)
            waited_s += ASK_AGAIN_S
        yield


def _owner(prefix: str | None) -> Callable[[Connection], None]:
    return lambda db: roles.act_as_owner(db, prefix) if prefix else None


def _make_lock_table(db: Connection) -> None:
    """Have the table of locks before any migration. Others may make it at the same time."""
    for _ in range(FIRST_TRIES_MAX):
        try:
            if not db.execute(HAS_LOCKS).scalar_one():
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


def _follow_up(db: Connection, prefix: str | None) -> list[str]:
    """Who has rights on what."""
    if prefix is None:
        return []
    with db.begin():
        db.execute(_ONE_SNAPSHOT)
        if missing := roles.missing_roles(db, prefix):
            raise ConfigurationError(
                f"role {', '.join(missing)} does not exist: run `pipeline migrate --roles`"
            )
        statements = roles.grant_statements(db, prefix)
        roles.execute(db, statements)
        return statements


def check_schema(engine: Engine) -> None:
    """Raise unless the database has exactly the schema of this program.

    Raises:
        ConfigurationError: The schema is missing, older or newer; the text says what to do.
    """
    with transaction(engine) as db:
        _refuse_newer(db)
        found, wanted = _revision_of(db), _scripts().get_current_head()
    if found != wanted:
        raise ConfigurationError(
            f"database schema is at revision {found or 'none'}, this program needs {wanted}: "
            "run `pipeline migrate`"
        )


def check_tables(
    engine: Engine, schemas: Sequence[str] = OUR_SCHEMAS, catalogue: Catalogue | None = None
) -> None:
    """Raise if something of others on our tables would change what a command writes.

    Args:
        engine: The database.
        schemas: Only tables in these schemas.
        catalogue: The read models; by default those that are installed.

    Raises:
        ConfigurationError: A trigger, rule, policy or column of somebody else, or a table that is
            gone; the text names each and says what to do.
    """
    with transaction(engine) as db:
        refuse_foreign_objects(db, our_tables(db, catalogue), schemas)


def our_tables(db: Connection, catalogue: Catalogue | None = None) -> list[Table]:
    """Every table that this program writes: of the log, the bookkeeping, the read models.

    Without the tables of stale read models: they have the columns of another definition, and are
    not written before a rebuild has replaced them.
    """
    declare_tables()
    models = (catalogue or load()).models
    stale = stale_names(db, {model.name: fingerprint(model) for model in models})
    current = [model for model in models if model.name not in stale]
    return [*metadata.tables.values(), *(table for model in current for table in model.tables)]


_DECLARING = (
    "pipeline.db.locks",
    "pipeline.log.gaps",
    "pipeline.log.installation",
    "pipeline.log.segments",
    "pipeline.log.tables",
    "pipeline.log.workers",
    "pipeline.projection.checkpoints",
    "pipeline.projection.dead_letters",
    "pipeline.projection.registry",
    "pipeline.projection.workers",
    "pipeline.rebuild.work_list",
    "pipeline.schema.objects",
)


def declare_tables() -> None:
    """Import every module that declares a table of the log or the bookkeeping."""
    for module in _DECLARING:
        import_module(module)


def open_from_settings() -> Connection:
    """A connection to the configured database, for Alembic's own command line."""
    return open_engine(load_settings().database(), application="alembic").connect()


def _config(**attributes: object) -> Config:
    config = Config(attributes=attributes)
    config.set_main_option("script_location", str(_folder()).replace("%", "%%"))
    return config


def _folder() -> Path:
    return _IN_WHEEL if _IN_WHEEL.exists() else _IN_CHECKOUT


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(_folder()))


def _revision_of(db: Connection) -> str | None:
    context = MigrationContext.configure(db, opts={"version_table_schema": LOG_SCHEMA})
    return context.get_current_revision()


def _refuse_newer(db: Connection) -> None:
    found = _revision_of(db)
    if found is not None and found not in {
        script.revision for script in _scripts().walk_revisions()
    }:
        raise ConfigurationError(
            f"database schema is at revision {found}, which this version of the program does not "
            "know: it was migrated by a newer one. Install that version"
        )


def _refuse_dropped_tables(db: Connection) -> None:
    """Migrations make a table once: what was dropped since then they do not bring back."""
    if _revision_of(db) == _scripts().get_current_head():
        declare_tables()
        if gone := dropped_tables(db, metadata.tables.values()):
            raise ConfigurationError(
                f"somebody has dropped {', '.join(gone)}. A migration creates a table only once: "
                "restore these tables from a backup. Then run `pipeline rebuild --all`"
            )
