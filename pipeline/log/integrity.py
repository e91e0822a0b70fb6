"""The log against its own bookkeeping: statements that find rows which contradict it."""

from collections.abc import Callable
from hashlib import blake2b
from typing import NamedTuple

from sqlalchemy import Connection, text

from pipeline.log.intervals import Intervals
from pipeline.partitions import Offset, OffsetRange, Partition

BYTES_ROWS = 200
"""How many rows with their bytes are fetched at a time."""

# Each returns, per subject, how many rows were examined, how many are wrong, and where.
BOUNDS = text("""
SELECT format('%s:%s', topic, "partition") AS subject, count(*) AS examined,
       count(*) FILTER (WHERE outside) AS wrong,
       min("offset") FILTER (WHERE outside) AS first, max("offset") FILTER (WHERE outside) AS last
FROM (SELECT e.topic, e."partition", e."offset",
             coalesce(e."offset" < o.first_offset OR e."offset" >= o.next_offset, true) AS outside
      FROM pipeline.events e
      LEFT JOIN pipeline.consumer_offsets o
             ON o.topic = e.topic AND o."partition" = e."partition") AS rows
GROUP BY topic, "partition" ORDER BY topic, "partition"
""")
ENVELOPES = text("""
SELECT format('%s:%s', topic, "partition") AS subject, count(*) AS examined,
       count(*) FILTER (WHERE differs) AS wrong,
       min("offset") FILTER (WHERE differs) AS first, max("offset") FILTER (WHERE differs) AS last
FROM (SELECT topic, "partition", "offset",
             event_type IS DISTINCT FROM payload ->> 'type'
             OR event_id::text IS DISTINCT FROM lower(payload ->> 'id') AS differs
      FROM pipeline.events WHERE problem IS NULL) AS rows
GROUP BY topic, "partition" ORDER BY topic, "partition"
""")
REPEATS = text("""
SELECT format('%s:%s', topic, "partition") AS subject, count(*) AS examined,
       count(*) FILTER (WHERE differs) AS wrong,
       min("offset") FILTER (WHERE differs) AS first, max("offset") FILTER (WHERE differs) AS last
FROM (SELECT e.topic, e."partition", e."offset",
             f."offset" IS NULL OR f."offset" >= e."offset"
             OR (f.event_id, f.digest) IS DISTINCT FROM (e.event_id, e.digest) AS differs
      FROM pipeline.events e
      LEFT JOIN pipeline.events f
             ON f.topic = e.topic AND f."partition" = e."partition" AND f."offset" = e.repeat_of
      WHERE e.repeat_of IS NOT NULL) AS rows
GROUP BY topic, "partition" ORDER BY topic, "partition"
""")
SEGMENTS = text("""
SELECT 'pipeline.segments' AS subject, count(*) AS examined,
       count(*) FILTER (WHERE s.segment IS NULL OR i.relname IS NULL) AS wrong,
       NULL AS first, NULL AS last
FROM pipeline.segments s
FULL JOIN (SELECT c.relname FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid
           WHERE h.inhparent = 'pipeline.events'::regclass) i ON i.relname = s.segment
""")
# Where they are not kept, only Kafka has them.
WITH_BYTES = text("""
SELECT "offset", raw, digest FROM pipeline.events
WHERE topic = :topic AND "partition" = :number AND "offset" >= :first AND "offset" < :end
  AND raw IS NOT NULL ORDER BY "offset"
""")


class Digests(NamedTuple):
    """Rows whose bytes are kept, and those whose bytes do not have their digest."""

    examined: int
    wrong: Intervals


def wrong_digests(
    db: Connection,
    partition: Partition,
    offsets: OffsetRange,
    observe: Callable[[int], None] = lambda _done: None,
) -> Digests:
    """Compute the digest of every row of a partition whose bytes are kept.

    Args:
        db: An open transaction.
        partition: Which.
        offsets: What to examine.
        observe: Called now and then with how many offsets are done.
    """
    examined, wrong = 0, Intervals()
    rows = db.execution_options(yield_per=BYTES_ROWS).execute(
        WITH_BYTES,
        {
            "topic": partition.topic,
            "number": partition.number,
            "first": offsets.first,
            "end": offsets.end,
        },
    )
    joins = False
    for offset, raw, digest in rows:
        examined += 1
        is_wrong = blake2b(raw, digest_size=16).digest() != digest
        if is_wrong:
            wrong.add(Offset(offset), joins=joins)
        joins = is_wrong
        if examined % BYTES_ROWS == 0:
            observe(offset - offsets.first)
    return Digests(examined, wrong)
