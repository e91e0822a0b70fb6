"""By what a topic's records are partitioned, seen from the log, and what more workers would bring.

Upvest states it per topic: by tenant, by user or by entity.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from sqlalchemy import Connection, text

from pipeline.health.check.findings import Finding, ok

RECENT_OFFSETS = 2_000
"""How far back each partition is read."""
RECORDS_MIN = 100
"""Of a topic: fewer tell nothing."""
KEYS_MIN = 10
"""So many users, or entities, with more than one record must be seen."""
STRAYS_MAX = 0.05
"""Share of them that may be in several partitions: repeats, or a keying that has changed."""

Keying = Literal["tenant", "user", "entity", "mixed", "too little", "one partition"]

SEEN = text("""
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


class Seen(NamedTuple):
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


def look_at_keying(db: Connection) -> Iterator[Finding]:
    """One finding per topic; it is no fault whatever it is."""
    for row in db.execute(SEEN, {"offsets": RECENT_OFFSETS}):
        yield finding(Seen(*row))


def keying_of(seen: Seen) -> Keying:
    """By what the records of a topic seem to be partitioned."""
    if seen.partitions == 1:
        return "one partition"
    if seen.records < RECORDS_MIN:
        return "too little"
    if seen.used == 1:
        return "tenant"
    if _stay(seen.users, seen.stray_users):
        return "user"
    if _stay(seen.entities, seen.stray_entities):
        return "entity"
    return "too little" if max(seen.users, seen.entities) < KEYS_MIN else "mixed"


def _stay(keys: int, strays: int) -> bool:
    return keys >= KEYS_MIN and strays <= STRAYS_MAX * keys


def finding(seen: Seen) -> Finding:
    """What was seen, and what more workers would bring."""
    of = f"topic {seen.topic}"
    match keying_of(seen):
        case "one partition":
            return ok("log", f"{of} has one partition: {_ONE}")
        case "tenant":
            return ok(
                "log",
                f"{of} is keyed by tenant: all of the last {seen.records:,} records are in "
                f"partition {seen.busiest} of {seen.partitions}. {_ONE.capitalize()}",
            )
        case "too little":
            return Finding(
                "unknown",
                "log",
                f"{of}: by what it is keyed; {seen.records:,} recent records are too few to see it",
                "run `pipeline check` again when there are more",
            )
        case "mixed":
            return ok(
                "log",
                f"{of} is keyed neither by tenant nor by user nor by entity: of {seen.users:,} "
                f"users {seen.stray_users:,} and of {seen.entities:,} entities "
                f"{seen.stray_entities:,} are in several partitions. {_shared(seen)}",
            )
        case keying:
            return ok(
                "log",
                f"{of} is keyed by {keying}: {seen.used} of {seen.partitions} partitions hold the "
                f"last {seen.records:,} records. {_shared(seen)}",
            )


_ONE = (
    "one worker ingests and projects all of it, and more workers bring nothing; a faster processor "
    "does, and `pipeline rebuild --jobs N` uses several for one partition too"
)


def _shared(seen: Seen) -> str:
    return f"Up to {seen.used} workers share the work (`pipeline run --workers N`)"
