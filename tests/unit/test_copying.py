"""A row comes through the form of COPY as it was; how PostgreSQL reads it is in test_append."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.events import EncodedRow, Row
from pipeline.log.copying import decode, encode
from tests.records import envelope, row_of

LARGE = b"x" * 10_000

a_micros = st.integers(-210_866_803_200_000_000, 9_224_318_016_000_000_000 - 1)
some_bytes = st.binary(max_size=40)
a_text = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))
an_id = st.binary(min_size=16, max_size=16)
a_row = st.builds(
    Row,
    topic=a_text,
    partition=st.integers(0, 2**31 - 1),
    offset=st.integers(0, 2**63 - 1),
    event_id=st.none() | an_id,
    event_type=st.none() | a_text,
    created_at=st.none() | a_micros,
    entity_id=st.none() | an_id,
    repeat_of=st.none() | st.integers(0, 2**63 - 1),
    payload=st.none() | some_bytes,
    raw=st.none() | some_bytes,
    digest=st.none() | an_id,
    problem=st.none() | a_text,
    key=st.none() | some_bytes,
    headers=st.none() | some_bytes,
    kafka_timestamp=st.none() | a_micros,
    kafka_timestamp_type=st.integers(0, 2),
)


@given(a_row)
def test_a_decoded_row_equals_the_encoded_one(row: Row):
    encoded = encode(row)

    assert decode(encoded) == row
    assert encoded[:3] == (row.topic, row.partition, row.offset)


def test_the_size_of_a_row_counts_everything_that_can_be_large():
    rows = [
        row_of(LARGE), row_of(None, key=LARGE), row_of(None, headers=[("a", LARGE)]),
        row_of(envelope(note="x" * 10_000)),
    ]  # fmt: skip

    sizes = [encode(row).size for row in rows]

    assert [size for size in sizes if not 10_000 <= size < 25_000] == []
    assert isinstance(encode(rows[0]), EncodedRow)
