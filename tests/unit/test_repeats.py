"""Repeats are a function of the log alone: of no batching, no restart and no owner."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.events import Record, Row, read
from pipeline.ingest.repeats import RepeatWindow
from pipeline.log.search import LoggedDigest
from pipeline.partitions import NextOffset, Offset

EVENT = b'{"id": "00000000-0000-0000-0000-0000000000%02d", "note": %d}'


def row_at(offset: int, value: bytes | None) -> Row:
    return read(Record("orders", 0, offset, value, None, None, None, 0))


def restarted(marked: list[Row], next_offset: int, size: int) -> RepeatWindow:
    """What a new owner fills its window with: the query of the claim, on the rows in the log."""
    seen = [
        LoggedDigest(
            Offset(row.offset),
            row.digest,
            Offset(row.offset if row.repeat_of is None else row.repeat_of),
        )
        for row in marked
        if next_offset - size <= row.offset < next_offset
        if row.event_id is not None and row.digest is not None
    ]
    return RepeatWindow(size, seen)


def by_definition(rows: list[Row], size: int) -> list[int | None]:
    """The definition, word by word: the same bytes, at most ``size`` offsets back."""
    marks: list[int | None] = []
    for index, row in enumerate(rows):
        copies = [
            other
            for other in range(index)
            if rows[other].digest == row.digest and row.offset - rows[other].offset <= size
        ]
        if row.event_id is None or not copies:
            marks.append(None)
        else:
            newest = max(copies)
            marks.append(marks[newest] if marks[newest] is not None else rows[newest].offset)
    return marks


values = st.one_of(
    st.tuples(st.integers(0, 3), st.integers(0, 1)).map(lambda parts: EVENT % parts),
    st.sampled_from([None, b"", b"not JSON", b'{"price": 1}']),
)
# A value, how many offsets are left unused before it, and whether the process restarts after it.
logs = st.lists(st.tuples(values, st.integers(0, 3), st.booleans()), max_size=40)


@settings(max_examples=500)
@given(logs, st.integers(0, 12), st.integers(0, 5))
def test_any_restart_marks_the_same_rows(log, size, unused_at_restart):
    offset, rows, restarts = -1, [], set()
    for value, unused, restart in log:
        offset += 1 + unused
        rows.append(row_at(offset, value))
        if restart:
            restarts.add(offset)

    window = RepeatWindow(size, [])
    marked: list[Row] = []
    for row in rows:
        marked.append(window.mark(row))
        if row.offset in restarts:
            # The stored next offset may lie after unused offsets, up to the next record.
            next_record = next((r.offset for r in rows if r.offset > row.offset), row.offset + 9)
            next_offset = min(row.offset + 1 + unused_at_restart, next_record)
            window = restarted(marked, NextOffset(next_offset), size)

    assert [row.repeat_of for row in marked] == by_definition(rows, size)


def test_a_repeat_names_the_first_copy_and_extends_the_window():
    event = EVENT % (1, 0)
    window = RepeatWindow(5, [])

    marks = [window.mark(row_at(offset, event)).repeat_of for offset in (10, 14, 18, 24, 29)]

    assert marks == [None, 10, 10, None, 24]


def test_the_same_id_with_other_bytes_is_no_repeat():
    window = RepeatWindow(5, [])

    marks = [window.mark(row_at(n, EVENT % (1, n))).repeat_of for n in range(3)]

    assert marks == [None, None, None]


def test_a_record_that_is_no_event_is_never_a_repeat():
    window = RepeatWindow(5, [])

    marks = [window.mark(row_at(n, value)).repeat_of for n, value in enumerate([b"", None] * 3)]

    assert marks == [None] * 6


def test_without_a_window_there_are_no_repeats():
    window = RepeatWindow(0, [])

    assert [window.mark(row_at(n, EVENT % (1, 0))).repeat_of for n in range(3)] == [None] * 3


def test_a_window_has_no_more_entries_than_its_bound():
    window = RepeatWindow(100, [])

    for offset in range(5_000):
        window.mark(row_at(offset, b'{"id": "%s"}' % str(offset).zfill(36).encode()))
        window.mark(row_at(offset, EVENT % (offset % 90, offset)))

    assert len(window._last) <= 151
    assert len(window._first) <= len(window._last)
