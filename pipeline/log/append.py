"""Writing the log: a batch of rows and the next offsets, in one transaction and one COPY."""

import time
from collections.abc import Callable, Mapping, Sequence

import psycopg
from sqlalchemy import Connection, text

from pipeline import failpoints
from pipeline.db import translated
from pipeline.errors import ConfigurationError, FencedError, InvariantError, PoisonRecordError
from pipeline.events import EncodedRow, Row
from pipeline.log.copying import COLUMNS, HEADER, TRAILER, decode, encode
from pipeline.partitions import Advance, Partition

# The rows are locked in one order first, so that two writers cannot deadlock.
ADVANCE = text("""
WITH batch AS (
    SELECT * FROM unnest(
        CAST(:topics AS text[]), CAST(:numbers AS int[]), CAST(:held AS bigint[]),
        CAST(:expected AS bigint[]), CAST(:new AS bigint[]), CAST(:high AS bigint[]),
        CAST(:seen_s AS double precision[])
    ) AS b(topic, number, held, expected, new, high, seen_s)
), locked AS MATERIALIZED (
    SELECT o.topic, o."partition" FROM pipeline.consumer_offsets o
    JOIN batch b ON o.topic = b.topic AND o."partition" = b.number
    ORDER BY o.topic, o."partition" FOR UPDATE OF o
)
UPDATE pipeline.consumer_offsets o
SET next_offset = b.new,
    committed_at = now(),
    high_watermark = greatest(coalesce(b.high, o.high_watermark), b.new),
    -- When Kafka reported its end, which may be long before this batch is written.
    watermarks_at = CASE WHEN b.high IS NULL THEN o.watermarks_at
        ELSE least(now(), greatest(o.watermarks_at, now() - b.seen_s * interval '1 s')) END
FROM batch b JOIN locked l ON l.topic = b.topic AND l."partition" = b.number
WHERE o.topic = b.topic AND o."partition" = b.number
  AND o.epoch = b.held AND o.next_offset = b.expected
RETURNING o.topic, o."partition"
""")

NOTIFY = text("NOTIFY pipeline_events")

COPY = f"COPY pipeline.events ({COLUMNS}) FROM STDIN (FORMAT binary)"
# As bytes, for a text could not hold the NUL that is refused here; and nothing large comes back.
TRY_PAYLOAD = "SELECT jsonb_typeof(CAST(convert_from(%s, 'UTF8') AS jsonb))"
ROWS_AT_ONCE = 100
"""How many rows are handed to the driver in one piece."""


def append(
    db: Connection, rows: Sequence[EncodedRow], advances: Mapping[Partition, Advance]
) -> None:
    """Write a batch and move its partitions' next offsets, or write nothing.

    Both happen in the caller's transaction, so an event is in the log exactly when its offset is
    behind ``next_offset``; a crash can leave neither half alone. A payload that jsonb refuses is
    stored as bytes only, with the SQLSTATE as its problem; its neighbours as usual.

    Args:
        db: An open transaction. This function never commits.
        rows: In offset order within each partition; may be empty, where Kafka's own markers move
            the position.
        advances: One for every partition of ``rows``.

    Raises:
        FencedError: A partition has a newer owner or another next offset. Nothing was written;
            roll back.
        MissingSegmentError: No segment covers an offset. Roll back, make it, repeat.
        TransientError: The server went away. Roll back and repeat.
        InvariantError: A row is in the log already.
        ConfigurationError: PostgreSQL stored fewer rows, for somebody's trigger left them out.
    """
    connection = driver_of(db)
    descriptor = connection.fileno()
    failpoints.reach("after_begin", connection_fd=descriptor)
    _fence(db, advances)
    failpoints.reach("after_fence", connection_fd=descriptor)
    if rows:
        copy_rows(connection, list(rows), COPY)
    failpoints.reach("after_copy", connection_fd=descriptor)
    db.execute(NOTIFY)
    failpoints.reach("before_commit", connection_fd=descriptor)


def _age_s(seen_at: float | None) -> float:
    return 0.0 if seen_at is None else max(0.0, time.monotonic() - seen_at)


def _fence(db: Connection, advances: Mapping[Partition, Advance]) -> None:
    places = sorted(advances)
    batch = [advances[place] for place in places]
    moved = db.execute(
        ADVANCE,
        {
            "topics": [place.topic for place in places],
            "numbers": [place.number for place in places],
            "held": [advance.held for advance in batch],
            "expected": [advance.expected for advance in batch],
            "new": [advance.new for advance in batch],
            "high": [advance.high_watermark for advance in batch],
            "seen_s": [_age_s(advance.seen_at) for advance in batch],
        },
    )
    done = {Partition(topic, number) for topic, number in moved}
    for place in places:
        if place not in done:
            raise FencedError(place, held=advances[place].held)


def driver_of(db: Connection) -> psycopg.Connection:
    """The driver's connection, as COPY needs it."""
    connection = db.connection.driver_connection
    if not isinstance(connection, psycopg.Connection):
        raise InvariantError("the log is written through psycopg only")
    return connection


def copy_rows(connection: psycopg.Connection, rows: list[EncodedRow], statement: str) -> None:
    """COPY rows into the log, or a table like it; those whose payload jsonb refuses without it.

    Nobody but PostgreSQL knows what jsonb refuses (a number too large, a nesting too deep), and one
    such row fails the whole COPY. Doubtful are the rows whose bytes are kept.
    """
    for doubtful in (lambda row: row.raw is not None, lambda _row: True):
        try:
            with translated(), connection.transaction():
                _copy(connection, rows, statement)
        except PoisonRecordError:
            _give_up_refused_payloads(connection, rows, doubtful)
        else:
            return
    try:
        with translated():
            _copy(connection, rows, statement)
    except PoisonRecordError as refusal:
        raise InvariantError(f"COPY of the log was refused: {refusal}") from None


def _copy(connection: psycopg.Connection, rows: Sequence[EncodedRow], statement: str) -> None:
    half = len(rows) // 2
    with connection.cursor() as cursor:
        with cursor.copy(statement) as copy:
            copy.write(HEADER)
            _send(copy, rows[:half])
            failpoints.reach("mid_copy", connection_fd=connection.fileno())
            _send(copy, rows[half:])
            copy.write(TRAILER)
        cursor.set_result(0)  # of COPY itself: until then the cursor has no row count
        stored = cursor.rowcount
    if stored != len(rows):
        info = connection.info
        raise ConfigurationError(
            f"PostgreSQL at {info.host}:{info.port}/{info.dbname} for user {info.user} stored "
            f"{stored:,} of {len(rows):,} rows of the log, without an error: a trigger or rule of "
            "somebody else leaves rows out. The batch was rolled back, and nothing is lost. "
            "`pipeline check` names the trigger, with its owner"
        )


def _send(copy: psycopg.Copy, rows: Sequence[EncodedRow]) -> None:
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        copy.write(b"".join([row.copied for row in rows[begin : begin + ROWS_AT_ONCE]]))


def _give_up_refused_payloads(
    connection: psycopg.Connection, rows: list[EncodedRow], doubtful: Callable[[Row], bool]
) -> None:
    for index, row in enumerate(map(decode, rows)):
        if row.payload is None or not doubtful(row):
            continue
        try:
            with translated(), connection.transaction():
                connection.execute(TRY_PAYLOAD, [row.payload])
        except PoisonRecordError as refusal:
            rows[index] = encode(row.refused(row.payload, refusal.sqlstate))
