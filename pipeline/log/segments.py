"""The tables that hold the log's rows: `segments`."""

from sqlalchemy import Connection, text

from pipeline.partitions import NextOffset

MAKE_SEGMENT = text(
    "SELECT lower(made) AS first_offset, upper(made) AS end_offset "
    "FROM pipeline.make_segment(:topic, :at_offset, :span) AS made"
)


def make_segment(
    db: Connection, topic: str, offset: NextOffset, span: int
) -> tuple[NextOffset, NextOffset]:
    """Make sure that a segment holds ``offset``; returns the range of offsets that it holds."""
    row = db.execute(MAKE_SEGMENT, {"topic": topic, "at_offset": offset, "span": span}).one()
    return NextOffset(row.first_offset), NextOffset(row.end_offset)
