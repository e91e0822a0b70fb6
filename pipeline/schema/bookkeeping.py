"""The tables that this program writes: of the log, the bookkeeping and the read models."""

from collections.abc import Sequence
from importlib import import_module

from sqlalchemy import Connection, Engine, Table

from pipeline.catalogue import Catalogue, load
from pipeline.db import metadata, transaction
from pipeline.foreign_objects import OUR_SCHEMAS, refuse_foreign_objects
from pipeline.projection.registry import stale as stale_names
from pipeline.readmodel.fingerprint import fingerprint


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
