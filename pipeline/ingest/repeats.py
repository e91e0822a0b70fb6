"""Repeats: the same event again, at a later offset of its partition.

Decided once, when a record arrives, from the offsets just before it. So it is a function of the
partition's log alone: every process that reads the same log, in any batches, marks the same rows.
"""

from collections.abc import Iterable

from pipeline.events import Row
from pipeline.log.search import LoggedDigest

SLACK = 1.5
"""A window may grow to this multiple of its size before its oldest offsets are removed."""


class RepeatWindow:
    """The digests of the last ``size`` offsets of one partition.

    A record repeats another if it has the same bytes, event id included, and the other, or a
    repeat of it, is at most ``size`` offsets earlier. About 250 bytes per offset.
    """

    def __init__(self, size: int, seen: Iterable[LoggedDigest]) -> None:
        self._size = size
        self._entries_max = int(size * SLACK) + 1
        self._last: dict[bytes, int] = {}
        self._first: dict[bytes, int] = {}
        """Of those that were repeated."""
        for offset, digest, first in seen:
            self._last[digest] = offset
            if first != offset:
                self._first[digest] = first
            else:
                self._first.pop(digest, None)

    def mark(self, row: Row) -> Row:
        """The row, with ``repeat_of`` set if it repeats. Call it in offset order."""
        digest = row.digest
        if digest is None or row.event_id is None:
            return row
        offset = row.offset
        last = self._last.get(digest)
        self._last[digest] = offset
        if last is None:
            if len(self._last) > self._entries_max:
                self._remove_before(offset - self._size)
            return row
        if last < offset - self._size:
            # Outside the window, only not removed yet.
            self._first.pop(digest, None)
            return row
        return row._replace(repeat_of=self._first.setdefault(digest, last))

    def _remove_before(self, oldest: int) -> None:
        self._last = {digest: last for digest, last in self._last.items() if last >= oldest}
        self._first = {
            digest: first for digest, first in self._first.items() if digest in self._last
        }
