"""Alembic's way in: which metadata, which schemas, on whose connection."""

from alembic import context
from alembic.autogenerate import rewriter
from alembic.operations import MigrateOperation, ops
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from pipeline.db import LOG_SCHEMA, READ_SCHEMA, metadata
from pipeline.schema.migrate import declare_tables, open_from_settings
from pipeline.schema.roles import masked_name

writer = rewriter.Rewriter()


@writer.rewrites(ops.CreateTableOp)
def watch_read_models(
    _context: MigrationContext, _revision: object, operation: ops.CreateTableOp
) -> list[MigrateOperation]:
    """A new read-model table comes with the trigger that makes its truncation heal."""
    if operation.schema != READ_SCHEMA:
        return [operation]
    projector = operation.info.pop("projector")
    name = f"{operation.schema}.{operation.table_name}"
    watch = f"SELECT pipeline.watch_read_model('{name}', '{projector}')"
    return [operation, ops.ExecuteSQLOp(watch)]


@writer.rewrites(ops.DropColumnOp)
@writer.rewrites(ops.AlterColumnOp)
def leave_masked_views_out(
    _context: MigrationContext,
    _revision: object,
    operation: ops.DropColumnOp | ops.AlterColumnOp,
) -> list[MigrateOperation]:
    """A column cannot change under the view that `migrate` derives from it, and makes again."""
    is_in_the_way = (
        isinstance(operation, ops.DropColumnOp) or operation.modify_type is not None
    ) and operation.schema == READ_SCHEMA
    if not is_in_the_way:
        return [operation]
    view = masked_name(operation.table_name).replace("_", "\\_")
    drop = f"SELECT pipeline.drop_own_views('{view}')"
    return [ops.ExecuteSQLOp(drop), operation]


def run() -> None:
    """Bring the database to the head; one transaction a migration."""
    connection = context.config.attributes.get("connection") or open_from_settings()
    connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {LOG_SCHEMA}"))
    connection.commit()
    declare_tables()
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table_schema=LOG_SCHEMA,
        include_schemas=True,
        include_name=lambda name, kind, _parents: (
            kind != "schema" or name in (LOG_SCHEMA, READ_SCHEMA)
        ),
        transaction_per_migration=True,
        process_revision_directives=writer,
        on_version_apply=context.config.attributes.get("on_version_apply"),
    )
    with context.begin_transaction():
        context.run_migrations()


run()
