"""The tables that hold the log's rows: `segments`."""

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Table,
    Text,
    text,
)

from pipeline.db import LOG_SCHEMA, metadata
from pipeline.log.tables import Time, TopicName
from pipeline.partitions import NextOffset

segments = Table(
    "segments",
    metadata,
    Column("segment", Text, primary_key=True, comment="Table in schema pipeline_segments."),
    Column("topic", TopicName, nullable=False, comment="Kafka topic."),
    Column("first_offset", BigInteger, nullable=False, comment="First offset that it may hold."),
    Column("end_offset", BigInteger, nullable=False, comment="First offset of the next segment."),
    Column(
        "created_at",
        Time,
        nullable=False,
        server_default=text("now()"),
        comment="When it was created.",
    ),
    schema=LOG_SCHEMA,
    comment="The tables that hold pipeline.events: one topic and one range of offsets each.",
)

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
