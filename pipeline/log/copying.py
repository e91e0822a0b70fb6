"""A row of the log in the binary form of COPY, and back.

Rows are encoded by the thread that reads them: there they are still in the processor's cache, and
the thread that talks to PostgreSQL forwards bytes instead of waiting for the interpreter at every
row (measured: docs/performance.md).

The form: how many fields, then each with its length before it, -1 for NULL; numbers big-endian
(https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format").
"""

import struct
from collections.abc import Iterator
from functools import lru_cache, partial

from pipeline.events import EncodedRow, Row

COLUMNS = (
    'topic, "partition", "offset", event_id, event_type, created_at, entity_id, repeat_of, '
    "payload, raw, digest, problem, key, headers, kafka_timestamp, kafka_timestamp_type"
)
"""In the order of the fields of ``Row``."""
HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"

_NULL = b"\xff\xff\xff\xff"
_MICROS_TO_2000 = 946_684_800_000_000
"""From 1970, where our times begin, to 2000, where PostgreSQL's do."""

_length = struct.Struct("!i").pack
_smallint = struct.Struct("!ih").pack
_bigint = struct.Struct("!iq").pack
_jsonb = struct.Struct("!ib").pack
_JSONB_VERSION = 1


def encode(row: Row) -> EncodedRow:
    """The row as COPY takes it, for ``COLUMNS``."""
    # fmt: off
    (
        topic, partition, offset, event_id, event_type, created_at, entity_id, repeat_of,
        payload, raw, digest, problem, key, headers, kafka_timestamp, timestamp_type,
    ) = row
    # fmt: on
    fields = (
        _place(topic, partition),
        _bigint(8, offset),
        _NULL if event_id is None else _length(len(event_id)) + event_id,
        _NULL if event_type is None else _text(event_type),
        _NULL if created_at is None else _bigint(8, created_at - _MICROS_TO_2000),
        _NULL if entity_id is None else _length(len(entity_id)) + entity_id,
        _NULL if repeat_of is None else _bigint(8, repeat_of),
        _NULL if payload is None else _jsonb(1 + len(payload), _JSONB_VERSION),
        payload or b"",
        _NULL if raw is None else _length(len(raw)) + raw,
        _NULL if digest is None else _length(len(digest)) + digest,
        _NULL if problem is None else _text(problem),
        _NULL if key is None else _length(len(key)) + key,
        _NULL if headers is None else _jsonb(1 + len(headers), _JSONB_VERSION) + headers,
        _NULL if kafka_timestamp is None else _bigint(8, kafka_timestamp - _MICROS_TO_2000),
        _smallint(2, timestamp_type),
    )
    return _encoded((topic, partition, offset, b"".join(fields)))


# EncodedRow's own constructor is a function of Python around this one; it runs once per record.
_encoded = partial(tuple.__new__, EncodedRow)


@lru_cache(maxsize=1000)
def _place(topic: str, partition: int) -> bytes:
    """The beginning of a row: how many fields, topic, partition."""
    return struct.pack("!h", len(Row._fields)) + _text(topic) + struct.pack("!ii", 4, partition)


@lru_cache(maxsize=1000)
def _text(text: str) -> bytes:
    """Cached: types and problems repeat."""
    content = text.encode()
    return _length(len(content)) + content


def decode(row: EncodedRow) -> Row:
    """The row that was encoded."""
    fields = list(_fields(row.copied))
    _topic, _partition, _offset, event_id, event_type, created_at, entity_id, repeat_of = fields[:8]
    payload, raw, digest, problem, key, headers, kafka_timestamp, timestamp_type = fields[8:]
    return Row(
        row.topic,
        row.partition,
        row.offset,
        event_id,
        None if event_type is None else event_type.decode(),
        None if created_at is None else _number(created_at) + _MICROS_TO_2000,
        entity_id,
        None if repeat_of is None else _number(repeat_of),
        None if payload is None else payload[1:],
        raw,
        digest,
        None if problem is None else problem.decode(),
        key,
        None if headers is None else headers[1:],
        None if kafka_timestamp is None else _number(kafka_timestamp) + _MICROS_TO_2000,
        _number(timestamp_type or b""),
    )


def _fields(copied: bytes) -> Iterator[bytes | None]:
    at = 2
    while at < len(copied):
        length = int.from_bytes(copied[at : at + 4], "big", signed=True)
        at += 4
        yield None if length < 0 else copied[at : at + length]
        at += max(length, 0)


def _number(field: bytes) -> int:
    return int.from_bytes(field, "big", signed=True)
