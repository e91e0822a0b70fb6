"""By what a topic's records are partitioned, seen from the log, and what more workers would bring.

Upvest states it per topic: by tenant, by user or by entity.
"""

from collections.abc import Iterator
from typing import Literal

from sqlalchemy import Connection

from pipeline.counts import count
from pipeline.health import problems
from pipeline.health.check.result import Result, found, ok
from pipeline.log.keying import TopicKeys, topic_keys

RECORDS_MIN = 100
"""Of a topic: fewer tell nothing."""
KEYS_MIN = 10
"""So many users, or entities, with more than one record must be seen."""
STRAYS_MAX = 0.05
"""Share of them that may be in several partitions: repeats, or a keying that has changed."""

Keying = Literal["tenant", "user", "entity", "mixed", "too little", "one partition"]


def check_keying(db: Connection) -> Iterator[Result]:
    """One result per topic; none of them is an error."""
    for keys in topic_keys(db):
        yield result_of(keys)


def keying_of(seen: TopicKeys) -> Keying:
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


def result_of(seen: TopicKeys) -> Result:
    """What was seen, and what more workers would bring."""
    of = f"topic {seen.topic}"
    match keying_of(seen):
        case "one partition":
            return ok(of, f"has one partition: {_ONE}")
        case "tenant":
            return ok(
                of,
                f"is keyed by tenant: all of the last {count(seen.records, 'record')} are in "
                f"partition {seen.busiest} of {seen.partitions}. {_ONE[0].upper()}{_ONE[1:]}",
            )
        case "too little":
            return found(
                problems.KEYING_UNKNOWN.of(
                    of, records=count(seen.records, "recent record is", "recent records are")
                )
            )
        case "mixed":
            return ok(
                of,
                "is not keyed by tenant, user or entity: "
                f"{seen.stray_users:,} of {count(seen.users, 'user')} and "
                f"{seen.stray_entities:,} of {count(seen.entities, 'entity', 'entities')} are in "
                f"several partitions. {_shared(seen)}",
            )
        case keying:
            return ok(
                of,
                f"is keyed by {keying}: {seen.used} of {seen.partitions} partitions hold the "
                f"last {count(seen.records, 'record')}. {_shared(seen)}",
            )


_ONE = (
    "only one worker can ingest and project it, so more workers do not help. A faster CPU helps; "
    "`pipeline rebuild --jobs N` uses several cores for one partition too"
)


def _shared(seen: TopicKeys) -> str:
    return f"Up to {seen.used} workers share the work (`pipeline run --workers N`)"
