"""A Kafka record's bytes become a row of the log. Pure, and never raises for bad data.

Truth is the bytes. ``payload`` is what PostgreSQL's jsonb makes of them; where that is not provably
the same JSON value, or there is no value, the bytes are kept beside it.
"""

import base64
import json
import re
from binascii import unhexlify
from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

import orjson

from pipeline.rfc3339 import Micros, micros

UUID_LENGTH = 36
UUID_BYTES = 16

UNREADABLE_HEADERS: Sequence[tuple[str, bytes | None]] = (("unreadable", None),)
"""In place of headers that Kafka's client cannot hand over; known by identity."""


class Record(NamedTuple):
    """What Kafka hands over, unchanged.

    Attributes:
        timestamp_ms: Milliseconds since 1970, None where the record has none.
        timestamp_type: 0 none, 1 the producer's time, 2 the broker's (librdkafka's numbers).
        headers: In Kafka's order; names may repeat, values may be None.
    """

    topic: str
    partition: int
    offset: int
    value: bytes | None
    key: bytes | None
    headers: Sequence[tuple[str, bytes | None]] | None
    timestamp_ms: int | None
    timestamp_type: int


class Row(NamedTuple):
    """A row of the log, in the order of its columns. ``raw`` and ``payload`` are the bytes.

    Attributes:
        payload: JSON text for jsonb, None where jsonb could not hold it.
        raw: The record's value, kept where ``payload`` is missing or not provably the same.
        digest: BLAKE2b of the value, 16 bytes; None for a tombstone.
        problem: Why ``payload`` or the envelope is missing; never quotes the data.
    """

    topic: str
    partition: int
    offset: int
    event_id: bytes | None
    event_type: str | None
    created_at: Micros | None
    entity_id: bytes | None
    repeat_of: int | None
    payload: bytes | None
    raw: bytes | None
    digest: bytes | None
    problem: str | None
    key: bytes | None
    headers: bytes | None
    kafka_timestamp: Micros | None
    kafka_timestamp_type: int

    def refused(self, value: bytes, sqlstate: str) -> "Row":
        """The row after PostgreSQL refused its payload: the bytes only."""
        return self._replace(
            payload=None, raw=value, problem=f"jsonb cannot hold the value ({sqlstate})"
        )


class EncodedRow(NamedTuple):
    """A row in the form in which COPY takes it; the coordinates beside it."""

    topic: str
    partition: int
    offset: int
    copied: bytes

    @property
    def size(self) -> int:
        """Bytes that the row occupies in memory and in COPY, roughly."""
        return len(self.copied)


def read(record: Record, *, keep_raw: bool = False) -> Row:
    """A row for any record whatever: a tombstone, broken JSON, no envelope.

    Args:
        record: As Kafka gave it.
        keep_raw: Keep the bytes even where ``payload`` is provably the same JSON value.
    """
    topic, partition, offset, value, key, headers, timestamp_ms, timestamp_type = record
    payload, raw, event_id, event_type, created_at, entity_id, problem = _read_value(value)
    return _row(
        (
            topic,
            partition,
            offset,
            event_id,
            event_type,
            created_at,
            entity_id,
            None,
            payload,
            value if keep_raw else raw,
            None if value is None else blake2b(value, digest_size=16).digest(),
            problem,
            key,
            _headers(headers) if headers else None,
            None if timestamp_ms is None else _kafka_time(timestamp_ms),
            timestamp_type,
        )
    )


# Row's own constructor is a function of Python around this one, and every record needs one.
_row = partial(tuple.__new__, Row)


# The calendar of PostgreSQL: from 4714-11-24 BC, up to and without the year 294277.
_FIRST_MS = -210_866_803_200_000
_END_MS = 9_224_318_016_000_000


def _kafka_time(milliseconds: int) -> Micros | None:
    """Kafka's time; None for one that a timestamptz cannot hold. A producer may send any number."""
    return milliseconds * 1000 if _FIRST_MS <= milliseconds < _END_MS else None


_Read = tuple[
    bytes | None,
    bytes | None,
    bytes | None,
    str | None,
    Micros | None,
    bytes | None,
    str | None,
]


def _without_payload(value: bytes | None, problem: str) -> _Read:
    return None, value, None, None, None, None, problem


def _read_value(value: bytes | None) -> _Read:
    if value is None:
        return _without_payload(None, "tombstone: no value")
    if not value:
        return _without_payload(value, "empty value")
    try:
        event = orjson.loads(value)
    except orjson.JSONDecodeError:
        return _read_unusual(value)
    # Few texts hold a backslash, and to look for one byte from behind costs a tenth of `in`.
    if value.rfind(b"\\") >= 0 and b"\\u0000" in value and (problem := _unholdable_escape(value)):
        return _without_payload(value, problem)
    return _read_envelope(event, value, None if _same_value(value, event) else value)


def _same_value(value: bytes, event: object) -> bool:
    """Whether jsonb, made from ``value``, is provably the same JSON value."""
    try:
        canonical = orjson.dumps(event)
    except orjson.JSONEncodeError:
        # It writes 254 levels and reads 1024.
        return False
    # jsonb has numeric's one zero. (To search from behind takes half the time here.)
    if value.rfind(b"-0.0") >= 0 and _MINUS_ZERO.search(value):
        return False
    if canonical == value:
        return True
    # Most writers differ only by a space behind "," and ":". Taking spaces away can hide nothing:
    # what is left must still equal the text that the parsed value gives.
    if value.replace(b'": ', b'":').replace(b", ", b",").replace(b"{ ", b"{") == canonical:
        return True
    return _proven_by_tokens(value.decode())


_MINUS_ZERO = re.compile(rb"-0\.0+(?![0-9.\"])")


class _NotProvenError(Exception):
    """Parsing met something that jsonb would not give back."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _NotProvenError
    return members


def _number(text: str) -> str:
    if text.startswith("-") and not text.lower().partition("e")[0].strip("-0."):
        raise _NotProvenError
    return text


def _constant(_name: str) -> None:
    raise ValueError


_PROVING = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_float=_number, parse_int=_number, parse_constant=_constant
)
_TOLERANT = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=_constant)


def _proven_by_tokens(text: str) -> bool:
    try:
        _PROVING.decode(text)
    except _NotProvenError:
        return False
    return True


def _read_unusual(value: bytes) -> _Read:
    """What the strict parser refuses: not JSON at all, or JSON at the edge of what jsonb holds."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return _without_payload(value, "not UTF-8")
    try:
        event = _TOLERANT.decode(text)
    except RecursionError:
        # Whether it is JSON, and shallow enough for jsonb, is PostgreSQL's to say.
        return value, value, None, None, None, None, "envelope not read: nested too deeply"
    except ValueError:
        return _without_payload(value, "not JSON")
    if problem := _unholdable_escape(value):
        return _without_payload(value, problem)
    return _read_envelope(event, value, value)


_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


def _unholdable_escape(value: bytes) -> str | None:
    """The first escape that JSON allows and jsonb refuses, if there is one."""
    high_ended_at = None
    for escape in _ESCAPE.finditer(value):
        unit = int(escape[1], 16) if escape[1] else 0x20
        is_low = 0xDC00 <= unit <= 0xDFFF
        if is_low != (high_ended_at is not None and high_ended_at == escape.start()):
            return "lone surrogate: jsonb cannot hold it (22P02)"
        if high_ended_at is not None and not is_low:
            return "lone surrogate: jsonb cannot hold it (22P02)"
        if unit == 0:
            return "NUL in a string: jsonb cannot hold it (22P05)"
        high_ended_at = escape.end() if 0xD800 <= unit <= 0xDBFF else None
    if high_ended_at is not None:
        return "lone surrogate: jsonb cannot hold it (22P02)"
    return None


_ENTITY_IDS = ("id", "account_id", "account_group_id", "user_id")
_NO_ENTITY: dict[str, object] = {}


def _read_envelope(event: object, payload: bytes, raw: bytes | None) -> _Read:
    if not isinstance(event, dict):
        return payload, raw, None, None, None, None, "no envelope: not a JSON object"
    event_id = uuid_bytes(event.get("id"))
    created_at = micros(event.get("created_at"))
    event_type = event.get("type")
    body = event.get("object")
    if (
        event_id is not None
        and created_at is not None
        and isinstance(event_type, str)
        and isinstance(body, dict)
    ):
        problem = None
    else:
        event_type = event_type if isinstance(event_type, str) else None
        problem = _envelope_problem(event, event_id, created_at, event_type)
    entity = body if isinstance(body, dict) else _NO_ENTITY
    entity_id = None
    for name in _ENTITY_IDS:
        if name in entity:
            entity_id = uuid_bytes(entity[name])
            break
    return payload, raw, event_id, event_type, created_at, entity_id, problem


def _envelope_problem(
    event: dict[str, object],
    event_id: bytes | None,
    created_at: Micros | None,
    event_type: str | None,
) -> str:
    if not event.keys() & {"id", "created_at", "type", "object"}:
        return "no envelope"
    wrong = [
        name
        for name, good in (
            ("id", event_id is not None),
            ("created_at", created_at is not None),
            ("type", event_type is not None),
            ("object", isinstance(event.get("object"), dict)),
        )
        if not good
    ]
    return "envelope: " + ", ".join(
        f"{name} {'malformed' if name in event else 'missing'}" for name in wrong
    )


def uuid_bytes(text: object) -> bytes | None:
    """The 16 bytes of a UUID in its usual spelling; None for anything else."""
    if isinstance(text, str) and len(text) == UUID_LENGTH and text[8:24:5] == "----":
        try:
            sixteen = unhexlify(text.replace("-", ""))
        except ValueError:
            return None
        # Dashes elsewhere would have left fewer.
        return sixteen if len(sixteen) == UUID_BYTES else None
    return None


def _headers(headers: Sequence[tuple[str, bytes | None]]) -> bytes:
    """A JSON array of [name, value]; a value that is no text is marked and in base64."""
    if headers is UNREADABLE_HEADERS:
        return b'[[{"unreadable": "a name is not UTF-8"}, null]]'
    return orjson.dumps(
        [[_text_or_base64(name.encode()), _header(value)] for name, value in headers]
    )


def _header(value: bytes | None) -> object:
    return None if value is None else _text_or_base64(value)


def _text_or_base64(value: bytes) -> object:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        return {"base64": base64.b64encode(value).decode()}
    return text
