"""Which database this is: `installation`."""

from uuid import UUID

from sqlalchemy import Connection, select

from pipeline.log.tables import installation

ID = select(installation.c.installation_id)


def installation_id(db: Connection) -> UUID:
    """This database's identity; a copy of the database has the same."""
    identity: UUID = db.execute(ID).scalar_one()
    return identity
