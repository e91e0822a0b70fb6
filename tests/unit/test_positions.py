from hypothesis import given
from hypothesis import strategies as st

from pipeline.partitions import NextOffset, Offset, OffsetRange, Partition, after, lag

OFFSETS = st.integers(0, 2**62)


def test_partitions_sort_by_topic_then_number_and_show_as_kafka_shows_them():
    partitions = [Partition("b", 0), Partition("a", 10), Partition("a", 9)]

    assert [str(partition) for partition in sorted(partitions)] == ["a:9", "a:10", "b:0"]


@given(OFFSETS)
def test_the_next_offset_is_after_the_record(offset):
    assert after(Offset(offset)) - offset == 1


@given(OFFSETS, OFFSETS)
def test_lag_is_never_negative(next_offset, end):
    records = lag(NextOffset(next_offset), NextOffset(end))

    assert records == max(0, end - next_offset)


@given(OFFSETS, st.integers(2, 10**9))
def test_halves_of_a_range_join_without_gap_and_are_not_empty(first, span):
    whole = OffsetRange(NextOffset(first), NextOffset(first + span))

    left, right = whole.halves()

    assert (left.first, left.end, right.end) == (whole.first, right.first, whole.end)
    assert left.span + right.span == whole.span
    assert left.span > 0
    assert right.span > 0
