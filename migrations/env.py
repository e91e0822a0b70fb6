"""Alembic's way in: which metadata, which schemas, on whose connection."""

from alembic import context
from sqlalchemy import text

from pipeline.db import LOG_SCHEMA, metadata
from pipeline.schema.bookkeeping import declare_tables
from pipeline.schema.revisions import open_from_settings


def run() -> None:
    """Bring the database to the head; one transaction per migration."""
    if context.is_offline_mode():
        _print_statements()
        return
    connection = context.config.attributes.get("connection") or open_from_settings()
    connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {LOG_SCHEMA}"))
    connection.commit()
    declare_tables()
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table_schema=LOG_SCHEMA,
        include_schemas=True,
        include_name=lambda name, kind, _parents: kind != "schema" or name == LOG_SCHEMA,
        transaction_per_migration=True,
        on_version_apply=context.config.attributes.get("on_version_apply"),
    )
    with context.begin_transaction():
        context.run_migrations()


def _print_statements() -> None:
    """Write what would be executed, for a DBA."""
    context.configure(
        dialect_name="postgresql",
        # Or each percent sign is printed twice.
        dialect_opts={"paramstyle": "named"},
        version_table_schema=LOG_SCHEMA,
        transaction_per_migration=True,
        output_buffer=context.config.output_buffer,
    )
    with context.begin_transaction():
        context.run_migrations()


run()
