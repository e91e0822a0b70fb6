"""Writing the log: a batch of rows and the next offsets, in one transaction and one COPY."""

from collections.abc import Callable, Mapping, Sequence

import psycopg
from sqlalchemy import Connection, text

from pipeline import failpoints
from pipeline.counts import count
from pipeline.db import translated
from pipeline.errors import ConfigurationError, InvariantError, PoisonRecordError
from pipeline.events import EncodedRow, Row
from pipeline.log import offsets
from pipeline.log.copying import COLUMNS, HEADER, TRAILER, decode, encode
from pipeline.partitions import Advance, Partition

CHANNEL = "pipeline_events"
"""Where a session that listens learns that the log has grown."""
NOTIFY = text(f"NOTIFY {CHANNEL}")

COPY = f"COPY pipeline.events ({COLUMNS}) FROM STDIN (FORMAT binary)"
# As bytes, because a text cannot hold the NUL that is refused here. The answer is small.
TRY_PAYLOAD = "SELECT jsonb_typeof(CAST(convert_from(%s, 'UTF8') AS jsonb))"
ROWS_AT_ONCE = 100
"""How many rows are given to the driver in one piece."""


def append(
    db: Connection, rows: Sequence[EncodedRow], advances: Mapping[Partition, Advance]
) -> None:
    """Write a batch and move its partitions' next offsets, or write nothing.

    Both happen in the caller's transaction, so an event is in the log exactly when its offset is
    below ``next_offset``; a crash cannot leave one without the other. A payload that jsonb refuses
    is stored as bytes only, with the SQLSTATE as its problem; its neighbours as usual.

    Args:
        db: An open transaction. This function never commits.
        rows: In offset order within each partition; may be empty, where only Kafka's own
            markers move the next offset.
        advances: One for every partition of ``rows``.

    Raises:
        FencedError: A partition has a newer owner or another next offset. Nothing was written;
            roll back.
        MissingSegmentError: No segment covers an offset. Roll back, create it, repeat.
        TransientError: The server became unavailable. Roll back and repeat.
        InvariantError: A row is in the log already.
        ConfigurationError: PostgreSQL stored fewer rows, because a trigger left some out.
    """
    connection = driver_of(db)
    descriptor = connection.fileno()
    failpoints.reach("after_begin", connection_fd=descriptor)
    offsets.advance(db, advances)
    failpoints.reach("after_fence", connection_fd=descriptor)
    if rows:
        copy_rows(connection, list(rows), COPY)
    failpoints.reach("after_copy", connection_fd=descriptor)
    db.execute(NOTIFY)
    failpoints.reach("before_commit", connection_fd=descriptor)


def driver_of(db: Connection) -> psycopg.Connection:
    """The driver's connection, as COPY needs it."""
    connection = db.connection.driver_connection
    if not isinstance(connection, psycopg.Connection):
        raise InvariantError("the log is written through psycopg only")
    return connection


def copy_rows(connection: psycopg.Connection, rows: list[EncodedRow], statement: str) -> None:
    """COPY rows into the log, or a table like it; a payload that jsonb refuses is left out.

    Only PostgreSQL can decide what jsonb refuses (a number too large, a nesting too deep), and one
    such row fails the whole COPY. The rows whose bytes are kept are tried first.
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
            f"{stored:,} of {count(len(rows), 'row')} of the log, without an error: a trigger or "
            "rule of somebody else leaves rows out. The batch was rolled back, and nothing is "
            "lost. `pipeline check` names the trigger, with its owner"
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
