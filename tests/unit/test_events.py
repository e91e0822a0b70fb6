"""A record's bytes become a row, whatever they are."""

import base64
import calendar
import json
import re
import uuid
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import blake2b

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.events import Record, read, uuid_bytes
from tests.records import (
    EVENT_ID,
    HOSTILE,
    ORDER_ID,
    SAMPLE,
    deep_nesting,
    envelope,
    header_lists,
    nested,
    row_of,
    values,
)

pytestmark = deep_nesting

# ------------------------------------------------------------------------------ one record, one row


def test_a_good_event_is_its_payload_and_its_envelope():
    row = row_of(envelope())

    assert row.payload == envelope()
    assert row.raw is None
    assert row.problem is None
    assert row.event_id == uuid.UUID(EVENT_ID).bytes
    assert row.event_type == "ORDER.NEW"
    assert row.entity_id == uuid.UUID(ORDER_ID).bytes
    moment = datetime(2026, 1, 12, 10, 0, 0, 123456, tzinfo=UTC)
    assert row.created_at == calendar.timegm(moment.timetuple()) * 1_000_000 + 123456


def test_the_bytes_of_every_record_are_kept_if_configured():
    record = Record("orders", 3, 42, envelope(), None, None, None, 0)

    assert read(record, keep_raw=True).raw == envelope()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_record_still_gets_its_row(name):
    value, has_payload, keeps_bytes, problem = HOSTILE[name]

    row = row_of(value)

    assert row.payload == (value if has_payload else None)
    assert row.raw == (value if keeps_bytes else None)
    assert (row.problem or "").startswith(problem or "")
    assert (row.problem is None) == (problem is None)
    assert row.digest == (None if value is None else blake2b(value, digest_size=16).digest())


@pytest.mark.parametrize("depth", range(250, 1100, 17))
@pytest.mark.parametrize("kind", ["array", "object"])
def test_no_depth_of_nesting_stops_decoding(depth, kind):
    value = nested(depth, kind)

    row = row_of(value)

    assert row.payload == value


def test_a_problem_never_quotes_the_data():
    canary = "c4n4ry"
    values = [
        envelope(id=canary), envelope(type=[canary]), envelope(created_at=canary),
        canary.encode(), b'{"%s": ' % canary.encode(), b'["%s\\u0000"]' % canary.encode(),
        b'["%s\\ud800"]' % canary.encode(), b"\xff" + canary.encode(),
    ]  # fmt: skip

    assert not [row_of(value).problem for value in values if canary in str(row_of(value).problem)]


# -------------------------------------------------------------------------------------- any record


MILLISECONDS = st.integers(-(2**63), 2**63 - 1)


def jsonb_members(pairs):
    """An object as jsonb has it; told apart from one that lost a member."""
    assert not [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
    return dict(pairs)


@settings(max_examples=600)
@given(values, st.none() | st.binary(max_size=20), header_lists, st.none() | MILLISECONDS)
@example(b"[-0.0]", None, None, None)
@example(b'[",  "]', None, None, None)
@example(b'{"a":1, "a":1}', None, None, None)
def test_any_record_becomes_a_complete_row(value, key, headers, milliseconds):
    row = row_of(value, key=key, headers=headers, timestamp_ms=milliseconds, timestamp_type=1)

    assert (row.topic, row.partition, row.offset) == ("orders", 3, 42)
    assert row.key == key
    assert row.digest == (None if value is None else blake2b(value, digest_size=16).digest())
    assert row.payload in (None, value)
    assert row.raw in (None, value)
    if value is None:
        assert row.problem == "tombstone: no value"
    elif row.raw is None:
        # The bytes are given up only where jsonb says the same: no name twice, no minus zero.
        text = value.decode()
        json.loads(text, object_pairs_hook=jsonb_members, parse_float=Decimal, parse_int=Decimal)
        assert row.payload == value
        outside_strings = re.sub(r'"(?:\\.|[^"\\])*"', "", text)
        assert not re.search(r"(?<![eE])-0(?:\.0*)?(?:[eE][+-]?\d+)?(?![\d.])", outside_strings)
    if row.payload is None and value is not None:
        assert row.problem
    assert decoded(row.headers) == (headers or None)


def decoded(headers: bytes | None):
    """The headers as Kafka gave them, read back from what the log holds."""
    if headers is None:
        return None

    def plain(value):
        if isinstance(value, dict):
            return base64.b64decode(value["base64"])
        return value.encode()

    return [
        (plain(name).decode(), None if value is None else plain(value))
        for name, value in orjson.loads(headers)
    ]


def test_no_sample_event_needs_its_bytes_kept():
    rows = [row_of(line) for line in SAMPLE.read_bytes().splitlines()]

    assert len(rows) > 500
    assert not [row for row in rows if row.raw is not None or row.problem is not None]


@pytest.mark.parametrize(
    ("headers", "stored"),
    [
        (None, None),
        ([], None),
        ([("a", b"1"), ("a", b"2"), ("b", None), ("a", b"")],
         [["a", "1"], ["a", "2"], ["b", None], ["a", ""]]),
        ([("trace", b"\xff\x00")], [["trace", {"base64": "/wA="}]]),
        ([("n\0ul", b"a\0")], [[{"base64": "bgB1bA=="}, {"base64": "YQA="}]]),
    ],
)  # fmt: skip
def test_headers_keep_their_order_repeats_and_bytes(headers, stored):
    row = row_of(envelope(), headers=headers)

    assert (None if row.headers is None else orjson.loads(row.headers)) == stored


@pytest.mark.parametrize(
    ("milliseconds", "stored"),
    [
        (None, None),
        (0, 0),
        (-1, -1000),
        (1_768_212_000_123, 1_768_212_000_123_000),
        # 4714 BC and 294276 AD are the ends of PostgreSQL's calendar.
        (-210_866_803_200_000, -210_866_803_200_000_000),
        (-210_866_803_200_001, None),
        (9_224_318_015_999_999, 9_224_318_015_999_999_000),
        (9_224_318_016_000_000, None),
        (2**63 - 1, None),
        (-(2**63), None),
    ],
)
def test_kafkas_time_is_kept_where_postgresql_has_such_a_time(milliseconds, stored):
    row = row_of(envelope(), timestamp_ms=milliseconds, timestamp_type=1)

    assert row.kafka_timestamp == stored
    assert row.kafka_timestamp_type == 1
    assert row.problem is None


def test_the_entity_is_the_first_id_present():
    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    objects = [
        {"user_id": second, "account_id": first},
        {"account_group_id": first, "user_id": second},
        {"user_id": first},
        {"id": first, "account_id": second},
    ]

    entities = {row_of(envelope(object=body)).entity_id for body in objects}

    assert entities == {uuid.UUID(first).bytes}
    assert row_of(envelope(object={"id": "42", "account_id": second})).entity_id is None
    assert row_of(envelope(object={})).entity_id is None


# --------------------------------------------------------------------------------------------- ids


@given(st.uuids(), st.booleans())
def test_a_uuid_is_its_sixteen_bytes(identity, upper):
    text = str(identity).upper() if upper else str(identity)

    assert uuid_bytes(text) == identity.bytes


@settings(max_examples=400)
@given(
    st.uuids().map(str),
    st.integers(0, 36),
    st.integers(0, 3),
    st.text("0123456789abcdefg-{} \n\uff11", max_size=3),
)
@example("1b4e28ba-2fa1-11d2-883f-0016d3cca427", 0, 2, "  ")
@example("1b4e28ba-2fa1-11d2-883f-0016d3cca427", 0, 2, "--")
@example("1b4e28ba-2fa1-11d2-883f-0016d3cca427", 8, 1, "a")
def test_only_the_usual_spelling_is_a_uuid(text, at, removed, inserted):
    text = text[:at] + inserted + text[at + removed :]

    found = uuid_bytes(text)

    if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text):
        assert found == uuid.UUID(text).bytes
    else:
        assert found is None


@pytest.mark.parametrize("other", [None, 7, b"1b4e28ba-2fa1-11d2-883f-0016d3cca427", [], {}])
def test_a_value_that_is_not_text_is_no_uuid(other):
    assert uuid_bytes(other) is None


# ------------------------------------------------------------------------------- refused by jsonb


def test_a_row_of_a_refused_payload_has_the_bytes_and_the_reason():
    row = row_of(envelope(amount="x").replace(b'"x"', b"1e200000"))

    refused = row.refused(row.payload or b"", "22003")

    assert refused.payload is None
    assert refused.raw == row.payload
    assert refused.problem == "jsonb cannot hold the value (22003)"
    assert (refused.event_id, refused.digest) == (row.event_id, row.digest)
