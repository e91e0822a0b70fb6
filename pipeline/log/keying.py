"""What the newest records of each topic show about how its records are partitioned."""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection, text

RECENT_OFFSETS = 2_000
"""How many offsets of each partition are examined."""

KEYS = text("""
WITH recent AS (
    SELECT o.topic, e."partition", e.entity_id,
           CASE WHEN e.event_type LIKE 'USER.%' THEN e.entity_id::text
                ELSE e.payload #>> '{object,user_id}' END AS user_id
    FROM pipeline.consumer_offsets o
    JOIN LATERAL (
        SELECT "partition", entity_id, event_type, payload FROM pipeline.events
        WHERE topic = o.topic AND "partition" = o."partition"
          AND "offset" >= o.next_offset - :offsets AND "offset" < o.next_offset
    ) e ON true
), users AS (
    SELECT topic, count(*) AS keys, count(*) FILTER (WHERE spread > 1) AS strays
    FROM (SELECT topic, count(DISTINCT "partition") AS spread FROM recent
          WHERE user_id IS NOT NULL GROUP BY topic, user_id HAVING count(*) > 1) k GROUP BY topic
), entities AS (
    SELECT topic, count(*) AS keys, count(*) FILTER (WHERE spread > 1) AS strays
    FROM (SELECT topic, count(DISTINCT "partition") AS spread FROM recent
          WHERE entity_id IS NOT NULL GROUP BY topic, entity_id HAVING count(*) > 1) k
    GROUP BY topic
)
SELECT p.topic, p.partitions, coalesce(r.records, 0) AS records, coalesce(r.used, 0) AS used,
       r.busiest, coalesce(u.keys, 0) AS users, coalesce(u.strays, 0) AS stray_users,
       coalesce(e.keys, 0) AS entities, coalesce(e.strays, 0) AS stray_entities
FROM (SELECT topic, count(*) AS partitions FROM pipeline.consumer_offsets GROUP BY topic) p
LEFT JOIN (SELECT topic, count(*) AS records, count(DISTINCT "partition") AS used,
                  mode() WITHIN GROUP (ORDER BY "partition") AS busiest
           FROM recent GROUP BY topic) r USING (topic)
LEFT JOIN users u USING (topic) LEFT JOIN entities e USING (topic)
ORDER BY p.topic
""")


class TopicKeys(NamedTuple):
    """What the recent log of a topic shows.

    Attributes:
        partitions: That the topic has.
        records: That were looked at.
        used: Partitions that hold any of them.
        busiest: The partition with most of them; None if there are none.
        users: With more than one record, and of these ``stray_users`` in several partitions.
        entities: The same.
    """

    topic: str
    partitions: int
    records: int
    used: int
    busiest: int | None
    users: int
    stray_users: int
    entities: int
    stray_entities: int


def topic_keys(db: Connection) -> Sequence[TopicKeys]:
    """Each topic of the log, with what its newest records show."""
    return [TopicKeys(*row) for row in db.execute(KEYS, {"offsets": RECENT_OFFSETS})]
