"""Whether the log is append-only: by the triggers of its tables, and by the rights of this role."""

from collections.abc import Sequence

from sqlalchemy import Connection, text

UNGUARDED = text("""
SELECT c.oid::regclass::text AS segment
FROM (SELECT 'pipeline.events'::regclass AS oid
      UNION ALL
      SELECT inhrelid FROM pg_inherits WHERE inhparent = 'pipeline.events'::regclass) c
WHERE NOT EXISTS (
    SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
    WHERE t.tgrelid = c.oid AND p.oid = 'pipeline.refuse_change()'::regprocedure
      AND t.tgenabled IN ('O', 'A')
      -- Bits of tgtype: DELETE 8, UPDATE 16, TRUNCATE 32, BEFORE 2; row-level 1 must be off.
      AND t.tgtype & 63 = 58)
""")
COUNT_SEGMENTS = text("""
SELECT count(*) AS attached FROM pg_inherits WHERE inhparent = 'pipeline.events'::regclass
""")
MAY_CHANGE = text("""
SELECT has_table_privilege('pipeline.events', 'UPDATE')
    OR has_table_privilege('pipeline.events', 'DELETE')
    OR has_table_privilege('pipeline.events', 'TRUNCATE')
""")


def unguarded(db: Connection) -> Sequence[str]:
    """The tables of the log whose append-only trigger is missing or disabled."""
    return db.execute(UNGUARDED).scalars().all()


def count_segments(db: Connection) -> int:
    """How many segments are attached to the log."""
    return int(db.execute(COUNT_SEGMENTS).scalar_one())


def may_change(db: Connection) -> bool:
    """Whether this role has a right to change or delete what is in the log."""
    return bool(db.execute(MAY_CHANGE).scalar_one())
