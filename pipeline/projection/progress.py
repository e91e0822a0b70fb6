"""How far each projector is, since when it waits, and how many events it has rejected."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, text

from pipeline.log.ranges import range_arrays

PROJECTORS = text("""
SELECT p.projector, p.fingerprint, p.built_at, p.state, p.problem,
       coalesce(sum(place.lag), 0) AS lag, max(c.moved_at) AS moved_at,
       min(unread.ingested_at) AS unread_since,
       min(greatest(c.moved_at, unread.ingested_at)) FILTER (WHERE place.lag > 0)
           AS stuck_since,
       (SELECT count(*) FROM pipeline.dead_letters d WHERE d.projector = p.projector)
           AS dead_letters
FROM pipeline.projectors p
LEFT JOIN unnest(CAST(:topics AS text[]), CAST(:numbers AS int[]), CAST(:first AS bigint[]),
                 CAST(:ends AS bigint[])) AS o(topic, "partition", first_offset, next_offset)
       ON true
LEFT JOIN pipeline.projection_checkpoints c
       ON c.projector = p.projector AND c.topic = o.topic AND c."partition" = o."partition"
LEFT JOIN LATERAL (
    SELECT greatest(o.first_offset, coalesce(c.next_offset, 0)) AS next_offset,
           greatest(0, o.next_offset::numeric
                       - greatest(o.first_offset, coalesce(c.next_offset, 0)))
               AS lag) place ON true
LEFT JOIN LATERAL (
    SELECT e.ingested_at FROM pipeline.events e
    WHERE place.lag > 0 AND e.topic = o.topic AND e."partition" = o."partition"
      AND e."offset" >= place.next_offset AND e."offset" < o.next_offset
    ORDER BY e."offset" LIMIT 1) unread ON true
GROUP BY p.projector
ORDER BY p.projector
""")


def projector_rows(db: Connection) -> Mapping[str, Row[Any]]:
    """Each registered projector, rebuilds in progress included, over all partitions of the log."""
    return {row.projector: row for row in db.execute(PROJECTORS, range_arrays(db))}
