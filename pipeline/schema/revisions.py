"""Revisions of the log and the bookkeeping: which the database has, and those that it lacks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from pipeline.db import LOG_SCHEMA, metadata, open_engine, transaction, translated
from pipeline.errors import DEADLOCK, ConfigurationError, TransientError
from pipeline.foreign_objects import dependents, dropped_tables
from pipeline.schema.bookkeeping import declare_tables
from pipeline.settings import load_settings

_IN_WHEEL = Path(__file__).parents[1] / "_migrations"
_IN_CHECKOUT = Path(__file__).parents[2] / "migrations"

DEADLOCKS_MAX = 5
"""How often a migration may lose a deadlock with a worker."""


def check_schema(engine: Engine) -> None:
    """Raise unless the database has exactly the schema of this program.

    Raises:
        ConfigurationError: The schema is missing, older or newer; the text says what to do.
    """
    with transaction(engine) as db:
        refuse_newer(db)
        found, wanted = _revision_of(db), _scripts().get_current_head()
    if found != wanted:
        raise ConfigurationError(
            f"database schema is at revision {found or 'none'}, this program needs {wanted}: "
            "run `pipeline migrate`"
        )


def missing(db: Connection) -> list[str]:
    """Revisions that the database lacks, oldest first."""
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


def upgrade(db: Connection, note: Callable[..., None]) -> None:
    """Run the migrations that are missing; one that crossed a worker's locks is run once more."""
    for _ in range(DEADLOCKS_MAX):
        try:
            with translated(), name_dependents(db):
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
def name_dependents(db: Connection) -> Iterator[None]:
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


def refuse_newer(db: Connection) -> None:
    """Refuse a database that a newer version of this program has migrated."""
    found = _revision_of(db)
    if found is not None and found not in {
        script.revision for script in _scripts().walk_revisions()
    }:
        raise ConfigurationError(
            f"database schema is at revision {found}, which this version of the program does not "
            "know: it was migrated by a newer one. Install that version"
        )


def refuse_dropped_tables(db: Connection) -> None:
    """Migrations make a table once: what was dropped since then they do not bring back."""
    if _revision_of(db) == _scripts().get_current_head():
        declare_tables()
        if gone := dropped_tables(db, metadata.tables.values()):
            raise ConfigurationError(
                f"somebody has dropped {', '.join(gone)}. A migration creates a table only once: "
                "restore these tables from a backup. Then run `pipeline rebuild --all`"
            )


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
