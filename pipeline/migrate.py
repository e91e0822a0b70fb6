"""The database's schema: bring it up to date, and refuse to work on another one."""

import sys
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from pipeline import failpoints
from pipeline.db import LOG_SCHEMA, open_engine, transaction, translated
from pipeline.errors import ConfigurationError
from pipeline.settings import load_settings

_IN_WHEEL = Path(__file__).parent / "_migrations"
_IN_CHECKOUT = Path(__file__).parent.parent / "migrations"

# Two who migrate at once: the second waits, then finds nothing to do.
_TAKE_TURN = text("SELECT pg_advisory_lock(hashtextextended('pipeline.migrate', 0))")
_END_TURN = text("SELECT pg_advisory_unlock(hashtextextended('pipeline.migrate', 0))")


def migrate(url: str) -> list[str]:
    """Bring the database to the schema of this program; safe to repeat and while running.

    Each migration is one transaction, so a crash leaves the database between two of them.

    Args:
        url: ``postgresql+psycopg://…`` of a role that may create schemas.

    Returns:
        The revisions that were applied, oldest first; empty if there was nothing to do.

    Raises:
        ConfigurationError: A right is missing, or the schema is newer than this program.
        TransientError: The server went away or a lock was not to be had; repeat.
    """
    engine = open_engine(url, application="pipeline migrate")
    applied: list[str] = []

    def note(*, step: Any, **_rest: Any) -> None:  # noqa: ANN401 - Alembic's own types
        failpoints.reach("mid_migration")
        applied.append(step.up_revision_id)

    try:
        with translated(), engine.connect() as db:
            # Waiting for another migration is no fault, so this one lock is waited for.
            db.execute(text("SET lock_timeout = 0"))
            db.execute(_TAKE_TURN)
            db.execute(text("RESET lock_timeout"))
            db.commit()
            try:
                _refuse_newer(db)
                command.upgrade(_config(connection=db, on_version_apply=note), "head")
            finally:
                if not db.invalidated:
                    db.rollback()
                    db.execute(_END_TURN)
                    db.commit()
    finally:
        engine.dispose()
    return applied


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


def revision(message: str, url: str) -> None:
    """Write the migration that brings a database to the declared tables.

    Args:
        message: What it does, in a few words; becomes part of the file's name.
        url: An empty database to compare with; it is migrated to today's head first.
    """
    migrate(url)
    engine = open_engine(url, application="pipeline migrate")
    with engine.connect() as db:
        number = len(list(_scripts().walk_revisions())) + 1
        config = _config(connection=db)
        for option, value in _FORMATTED.items():
            config.set_section_option("post_write_hooks", option, value)
        command.revision(config, message=message, autogenerate=True, rev_id=f"{number:04}")
    engine.dispose()


_FORMATTED = {
    "hooks": "ruff",
    "ruff.type": "module",
    "ruff.module": "ruff",
    "ruff.options": "format --quiet REVISION_SCRIPT_FILENAME",
}


def declare_tables() -> None:
    """Import every module that declares a table, so that the metadata is whole."""
    import pipeline.dead_letters
    import pipeline.log.tables
    import pipeline.projection.checkpoints  # noqa: F401
    from pipeline.projectors import discover

    discover()


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


if __name__ == "__main__":
    from pipeline.embedded.postgres import PostgresServer

    with PostgresServer() as server:
        revision(sys.argv[2], server.url("postgres"))
