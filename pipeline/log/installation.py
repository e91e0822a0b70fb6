"""Which database this is: `installation`."""

from uuid import UUID

from sqlalchemy import (
    Column,
    Connection,
    Table,
    Uuid,
    select,
    text,
)

from pipeline.db import LOG_SCHEMA, metadata
from pipeline.log.tables import Time

installation = Table(
    "installation",
    metadata,
    Column(
        "installation_id",
        Uuid,
        primary_key=True,
        server_default=text("gen_random_uuid()"),
        comment="Identity of this database.",
    ),
    Column(
        "created_at",
        Time,
        nullable=False,
        server_default=text("now()"),
        comment="When it was created.",
    ),
    schema=LOG_SCHEMA,
    comment="One row: the identity of this database, so that two cannot share a consumer group.",
)

ID = select(installation.c.installation_id)


def installation_id(db: Connection) -> UUID:
    """This database's identity; a copy of the database has the same."""
    identity: UUID = db.execute(ID).scalar_one()
    return identity
