"""The checks at the end: log against Kafka and the producer's ledger, tables against books."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from uuid import UUID

from pipeline.partitions import Partition
from tests.faults.harness import Bench, as_stored, is_faithful
from tests.faults.ledger import Feed, Held, LeanLedger, read_partition

SHOWN_MAX = 5

LOGGED = """
SELECT "offset", digest, payload::text AS payload, raw, key, headers
FROM pipeline.events WHERE topic = %s AND "partition" = %s ORDER BY "offset"
"""
DEAD = b"""
SELECT e.event_id FROM pipeline.dead_letters d JOIN pipeline.events e
  USING (topic, "partition", "offset")
"""
REPEATS = b"SELECT count(*) FROM pipeline.events WHERE repeat_of IS NOT NULL"
SHADOWS = b"SELECT relname FROM pg_class WHERE relnamespace = 'pipeline_shadow'::regnamespace"
OPEN = b"""
SELECT pid, application_name, state FROM pg_stat_activity
WHERE state LIKE 'idle in transaction%' AND pid <> pg_backend_pid()
"""


@dataclass
class Judgement:
    """What was compared, and every difference.

    Attributes:
        records: In the log and in Kafka alike.
        lost: Records that Kafka holds and the log does not.
        double: Rows of the log without a record of Kafka.
        changed: Rows that are not what Kafka holds, in value, key or headers.
        never_sent: Records of Kafka that the producer has not sent there, or sent differently.
        rows: Of all read models, as recomputed from the log.
        differing: Rows in which the read models differ from these and from the books.
        dead_letters: Must be as many as chaos has made.
        repeats: Must be as many as chaos has made.
        failures: Each as text; only these decide the result.
    """

    records: int = 0
    lost: int = 0
    double: int = 0
    changed: int = 0
    never_sent: int = 0
    tables: int = 0
    rows: int = 0
    differing: int = 0
    differing_from_books: int = 0
    dead_letters: int = 0
    repeats: int = 0
    failures: list[str] = field(default_factory=list)

    def found(self, what: str, number: int) -> None:
        """A number that must be 0."""
        if number:
            self.failures.append(f"{what}: {number}")


def judge(bench: Bench, feed: Feed, ledger: LeanLedger) -> Judgement:
    """Compare everything, once feed and workers have ended."""
    done = Judgement()
    _judge_log(bench, ledger, done)
    _judge_read_models(bench, feed, done)
    _judge_oddities(bench, feed, done)
    _judge_order(bench, done)
    return done


def _judge_log(bench: Bench, ledger: LeanLedger, done: Judgement) -> None:
    for number in range(bench.partitions):
        partition = Partition(bench.topic, number)
        for difference in compare(bench, ledger, partition, done):
            if len(done.failures) < SHOWN_MAX:
                done.failures.append(difference)
    done.found("lost", done.lost)
    done.found("double", done.double)
    done.found("changed", done.changed)
    done.found("in Kafka, and never sent like this", done.never_sent)
    done.found("sent, and not in Kafka", ledger.unclaimed)
    known, sent = done.records + done.lost, len(ledger)
    if known != sent:
        done.failures.append(f"{sent} records were sent, and Kafka holds {known}")


def compare(
    bench: Bench, ledger: LeanLedger, partition: Partition, done: Judgement
) -> Iterator[str]:
    """Compare Kafka and the log, offset by offset; counts each difference and yields its text."""
    with bench.database.connect(autocommit=False) as db, db.cursor("logged") as cursor:
        cursor.execute(LOGGED.encode(), [partition.topic, partition.number])
        rows = iter(cursor)
        row = next(rows, None)
        end = 0
        for held in read_partition(bench.kafka.bootstrap_servers, partition):
            end = held.offset + 1
            if not ledger.claim(partition, held):
                done.never_sent += 1
                yield f"{partition}: offset {held.offset} of Kafka is not what was sent there"
            while row is not None and row[0] < held.offset:
                done.double += 1
                yield f"{partition}: offset {row[0]} is in the log only"
                row = next(rows, None)
            if row is None or row[0] > held.offset:
                done.lost += 1
                yield f"{partition}: offset {held.offset} is not in the log"
                continue
            done.records += 1
            if wrong := _changed(held, row):
                done.changed += 1
                yield f"{partition}: offset {held.offset} has {wrong}"
            row = next(rows, None)
        while row is not None:
            done.double += 1
            yield f"{partition}: offset {row[0]} is in the log only"
            row = next(rows, None)
    stored = bench.next_offsets().get(partition)
    if stored != end:
        yield f"{partition}: next offset is {stored}, Kafka ends at {end}"


def _changed(held: Held, row: Any) -> str | None:
    _, _, payload, raw, key, headers = row
    if key != held.key:
        return "another key"
    if headers != as_stored(held.headers):
        return "other headers"
    return None if is_faithful(held.value, payload, raw) else "another value"


def _judge_read_models(bench: Bench, feed: Feed, done: Judgement) -> None:
    for table in feed.books.tables:
        done.tables += 1
        differing = bench.differing_from(feed.books, table)
        done.differing_from_books += differing
        done.found(f"rows of {table} that are not as in the books", differing)
    replayed = bench.replay("--json")
    if replayed.returncode not in (0, 1):
        done.failures.append(f"rebuild --check ended with {replayed.returncode}: {replayed.stderr}")
        return
    for model in json.loads(replayed.stdout):
        done.rows += model["rows"]
        done.differing += model["differing"]
        done.found(f"rows of {model['projector']} that differ from its rebuild", model["differing"])


def _judge_oddities(bench: Bench, feed: Feed, done: Judgement) -> None:
    with bench.database.connect() as db:
        dead = {row[0] for row in db.execute(DEAD)}
        [[done.repeats]] = db.execute(REPEATS)
    spoilt = {UUID(event) for event, _type in feed.report.bad_amounts}
    done.dead_letters = len(dead)
    done.found("dead letters that chaos has not made, or that are missing", len(dead ^ spoilt))
    made = feed.report.counts["repeat"]
    done.found(f"repeats that were not recognized, of {made}", abs(made - done.repeats))


def _judge_order(bench: Bench, done: Judgement) -> None:
    """Each ownership has one writer, and nothing is left over."""
    done.failures += islice(bench.ownership_violations(), SHOWN_MAX)
    try:
        bench.judge_leftovers()
    except AssertionError as left:
        done.failures.append(str(left))
    with bench.database.connect() as db:
        done.failures += [f"table {name} of a rebuild is left" for (name,) in db.execute(SHADOWS)]
        done.failures += [
            f"session {pid} of {name} is {state}" for pid, name, state in db.execute(OPEN)
        ]
