"""The bookkeeping of projection against the log: statements that find rows which contradict it."""

from sqlalchemy import text

# The same columns as in pipeline.log.integrity. CHECKPOINTS takes pipeline.log.ranges.range_arrays.
CHECKPOINTS = text("""
SELECT c.projector AS subject, count(*) AS examined,
       count(*) FILTER (WHERE o.topic IS NULL OR c.next_offset > o.next_offset) AS wrong,
       NULL AS first, NULL AS last
FROM pipeline.projection_checkpoints c
LEFT JOIN unnest(CAST(:topics AS text[]), CAST(:numbers AS int[]), CAST(:first AS bigint[]),
                 CAST(:ends AS bigint[])) AS o(topic, "partition", first_offset, next_offset)
       ON o.topic = c.topic AND o."partition" = c."partition"
GROUP BY c.projector ORDER BY c.projector
""")
DEAD_LETTERS = text("""
SELECT d.projector AS subject, count(*) AS examined,
       count(*) FILTER (WHERE e.topic IS NULL) AS wrong,
       min(d."offset") FILTER (WHERE e.topic IS NULL) AS first,
       max(d."offset") FILTER (WHERE e.topic IS NULL) AS last
FROM pipeline.dead_letters d
LEFT JOIN pipeline.events e
       ON e.topic = d.topic AND e."partition" = d."partition" AND e."offset" = d."offset"
GROUP BY d.projector ORDER BY d.projector
""")
