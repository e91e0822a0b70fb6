"""Which projectors there are, which definition built each one's tables, and which are broken."""

from collections.abc import Iterable, Mapping
from datetime import datetime

from sqlalchemy import (
    CheckConstraint,
    Column,
    Connection,
    DateTime,
    Table,
    Text,
    bindparam,
    delete,
    exists,
    func,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from pipeline.db import LOG_SCHEMA, metadata
from pipeline.db.identifiers import as_sql

projectors = Table(
    "projectors",
    metadata,
    Column("projector", Text, primary_key=True, comment="Name of the projector, its main table's."),
    Column(
        "fingerprint",
        Text,
        comment="Definition with which the table was last built from the start; NULL while it is "
        "empty. Another one than the program's means: rebuild.",
    ),
    Column(
        "built_at", DateTime(timezone=True), comment="When that build began, or was swapped in."
    ),
    Column(
        "state",
        Text,
        nullable=False,
        server_default=text("'live'"),
        comment="live, or broken: halted until it is repaired and rebuilt.",
    ),
    Column("problem", Text, comment="Why it is broken; NULL when it is live."),
    Column("problem_at", DateTime(timezone=True), comment="Since when it is broken."),
    CheckConstraint("state IN ('live', 'broken')", name="state_is_known"),
    schema=LOG_SCHEMA,
    comment="Each projector that has ever run. NAME@rebuild is a rebuild in progress.",
)


LIVE = (
    select(projectors.c.projector).where(projectors.c.state == "live").subquery("live_projectors")
)
"""The projectors that are not broken, for statements about their checkpoints."""

REGISTER = insert(projectors).on_conflict_do_nothing()
BUILD_BEGUN = (
    update(projectors)
    .where(projectors.c.projector == bindparam("of_projector"), projectors.c.fingerprint.is_(None))
    .values(fingerprint=bindparam("of_code"), built_at=func.now())
)
BUILT = (
    update(projectors)
    .where(projectors.c.projector == bindparam("of_projector"))
    .values(
        fingerprint=bindparam("of_code"),
        built_at=func.now(),
        state="live",
        problem=None,
        problem_at=None,
    )
    .returning(projectors.c.built_at)
)
# Who starts or resumes a build waits for those who share the row; afterwards they find another
# time in it.
BUILDING = (
    select(projectors.c.projector)
    .where(
        projectors.c.projector == bindparam("of_projector"),
        projectors.c.built_at == bindparam("since"),
    )
    .with_for_update(read=True)
)
BREAK = (
    update(projectors)
    .where(projectors.c.projector == bindparam("of_projector"), projectors.c.state != "broken")
    .values(state="broken", problem=bindparam("why"), problem_at=func.now())
)
STATE = select(projectors.c.state).where(projectors.c.projector == bindparam("of_projector"))
FINGERPRINTS = select(projectors.c.projector, projectors.c.fingerprint)
FORGET = delete(projectors).where(projectors.c.projector == bindparam("of_projector"))
IS_BUILT = select(
    exists().where(
        projectors.c.projector == bindparam("of_projector"),
        projectors.c.fingerprint == bindparam("of_code"),
    )
)
BROKEN = select(projectors.c.projector, projectors.c.problem).where(projectors.c.state == "broken")


def register(db: Connection, names: Iterable[str]) -> None:
    """Insert projectors that are not in the table yet; the others stay as they are."""
    for name in names:
        db.execute(REGISTER, {"projector": name})


def fingerprints(db: Connection) -> Mapping[str, str | None]:
    """The fingerprint with which each table was last built; None while it is empty."""
    return {row.projector: row.fingerprint for row in db.execute(FINGERPRINTS)}


def stale(db: Connection, fingerprints_of: Mapping[str, str]) -> frozenset[str]:
    """Those of these projectors whose table another definition has built.

    Args:
        db: An open transaction.
        fingerprints_of: The fingerprint of each definition, by the projector's name.
    """
    built = fingerprints(db)
    return frozenset(
        name for name, code in fingerprints_of.items() if built.get(name) not in (None, code)
    )


def is_live(db: Connection, projector: str) -> bool:
    """Whether the projector is registered and not broken."""
    return db.execute(STATE, {"of_projector": projector}).scalar_one_or_none() == "live"


def is_built(db: Connection, projector: str, fingerprint: str) -> bool:
    """Whether this definition has built the projector's tables."""
    found = db.execute(IS_BUILT, {"of_projector": projector, "of_code": fingerprint})
    return bool(found.scalar_one())


def stale_statement(projector: str) -> str:
    """The statement that asks for a rebuild of tables that somebody has changed by hand."""
    stale = (
        update(projectors)
        .where(projectors.c.projector == projector)
        .values(fingerprint="changed by hand")
    )
    return as_sql(stale)


def note_build_begun(db: Connection, projector: str, fingerprint: str) -> None:
    """Record the definition that fills an empty table; no effect if one is recorded."""
    db.execute(BUILD_BEGUN, {"of_projector": projector, "of_code": fingerprint})


def note_built(db: Connection, projector: str, fingerprint: str) -> datetime:
    """Record the definition that built the table; a broken projector is live again.

    Returns:
        The time of this build; no two builds have the same.
    """
    built = {"of_projector": projector, "of_code": fingerprint}
    since: datetime = db.execute(BUILT, built).scalar_one()
    return since


def is_building(db: Connection, projector: str, since: datetime) -> bool:
    """Whether no other process has started or resumed the build since; locks that until commit."""
    found = db.execute(BUILDING, {"of_projector": projector, "since": since})
    return found.one_or_none() is not None


def note_broken(db: Connection, projector: str, why: str) -> bool:
    """Halt the projector until it is rebuilt; whether it was not halted before."""
    return db.execute(BREAK, {"of_projector": projector, "why": why}).rowcount > 0


def broken(db: Connection) -> Mapping[str, str]:
    """The broken projectors, each with the reason."""
    return {row.projector: row.problem for row in db.execute(BROKEN)}


def forget(db: Connection, projector: str) -> None:
    """Delete the registration of a projector."""
    db.execute(FORGET, {"of_projector": projector})
