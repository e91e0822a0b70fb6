"""Repeats: the same event again, at a later offset of its partition.

Decided once, as a record comes, from the offsets just before it. So it is a function of the
partition's log alone: whoever reads the same log, in whatever batches, marks the same rows.
"""

from collections.abc import Iterable

from pipeline.events import Row
from pipeline.log.search import Seen

SLACK = 1.5
"""How many times its size a window may grow before what is too old is thrown out."""


class RepeatWindow:
    """What the last ``size`` offsets of one partition held.

    A record repeats another if it has the same bytes, event id included, and the other, or a
    repeat of it, lies at most ``size`` offsets back. About 250 bytes an offset.
    """

    def __init__(self, size: int, seen: Iterable[Seen]) -> None:
        self._size = size
        self._held_max = int(size * SLACK) + 1
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
        """The row, with ``repeat_of`` set if it repeats. Rows must come in offset order."""
        digest = row.digest
        if digest is None or row.event_id is None:
            return row
        offset = row.offset
        last = self._last.get(digest)
        self._last[digest] = offset
        if last is None:
            if len(self._last) > self._held_max:
                self._forget_before(offset - self._size)
            return row
        if last < offset - self._size:
            # Only not thrown out yet.
            self._first.pop(digest, None)
            return row
        return row._replace(repeat_of=self._first.setdefault(digest, last))

    def _forget_before(self, horizon: int) -> None:
        self._last = {digest: last for digest, last in self._last.items() if last >= horizon}
        self._first = {
            digest: first for digest, first in self._first.items() if digest in self._last
        }
