"""The tables of the log: events, and who reads which partition up to where."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Table,
    Text,
    Uuid,
    bindparam,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from pipeline.db import LOG_SCHEMA, metadata
from pipeline.partitions import Partition

# Topic names break ties between versions, so their order must not depend on the server's locale.
TopicName = Text(collation="C")
Time = DateTime(timezone=True)

events = Table(
    "events",
    metadata,
    Column("topic", TopicName, primary_key=True, comment="Kafka topic."),
    Column(
        "partition",
        Integer,
        primary_key=True,
        autoincrement=False,
        comment="Partition of the topic.",
    ),
    Column(
        "offset",
        BigInteger,
        primary_key=True,
        autoincrement=False,
        comment="Offset in the partition. Numbers may be missing: Kafka uses some for itself.",
    ),
    Column("event_id", Uuid, comment="The envelope's id; NULL where it could not be read."),
    Column("event_type", Text, comment="The envelope's type, e.g. ORDER.FILLED."),
    Column(
        "created_at",
        Time,
        comment="When the event happened, as the envelope says, cut to microseconds.",
    ),
    Column(
        "entity_id",
        Uuid,
        comment="What the event is about: the first present of the object's id, account_id, "
        "account_group_id, user_id.",
    ),
    Column(
        "repeat_of",
        BigInteger,
        comment="Offset of the first copy in this partition, where this record repeats it: same "
        "event id, same bytes, within the repeat window. NULL otherwise.",
    ),
    Column("payload", JSONB, comment="The whole record; NULL where jsonb cannot hold it."),
    Column(
        "raw",
        LargeBinary,
        comment="The record's bytes, kept wherever payload is not provably the same JSON value.",
    ),
    Column(
        "digest",
        LargeBinary,
        comment="BLAKE2b (16 bytes) of the record's bytes; NULL for a tombstone.",
    ),
    Column(
        "problem", Text, comment="Why payload or the envelope is missing; NULL for a good event."
    ),
    Column("key", LargeBinary, comment="Kafka's key of the record."),
    Column(
        "headers",
        JSONB,
        comment="Kafka's headers as an array of [name, value], in order; bytes that are no text "
        'are written as {"base64": …}.',
    ),
    Column("kafka_timestamp", Time, comment="Kafka's timestamp of the record."),
    Column(
        "kafka_timestamp_type",
        SmallInteger,
        comment="0 none, 1 the producer's clock, 2 the broker's clock.",
    ),
    Column(
        "ingested_at",
        Time,
        nullable=False,
        server_default=text("now()"),
        comment="When the transaction that wrote this row began.",
    ),
    Index(None, "entity_id", postgresql_where=text("entity_id IS NOT NULL")),
    Index(None, "event_id", postgresql_where=text("event_id IS NOT NULL")),
    Index("events_ingested_at_idx", "ingested_at", postgresql_using="brin"),
    schema=LOG_SCHEMA,
    comment="Every record that Kafka delivered, once, unchanged. Append-only.",
    postgresql_partition_by='RANGE (topic, "offset")',
)

consumer_offsets = Table(
    "consumer_offsets",
    metadata,
    Column("topic", TopicName, primary_key=True, comment="Kafka topic."),
    Column(
        "partition",
        Integer,
        primary_key=True,
        autoincrement=False,
        comment="Partition of the topic.",
    ),
    Column("first_offset", BigInteger, nullable=False, comment="Where reading began."),
    Column(
        "next_offset",
        BigInteger,
        nullable=False,
        comment="The first offset that is not in the log; all below it are.",
    ),
    Column(
        "epoch",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Number of the current ownership; each claim raises it.",
    ),
    Column("owner_group", Text, comment="Consumer group of the owner."),
    Column("owner_member", Text, comment="Kafka's member id of the owner."),
    Column("owner_host", Text, comment="Host of the owner."),
    Column("owner_pid", Integer, comment="Process id of the owner."),
    Column("claimed_at", Time, comment="When the owner claimed the partition."),
    Column("topic_id", Text, comment="Kafka's id of the topic, where the broker reports it."),
    Column("cluster_id", Text, comment="Kafka's id of the cluster."),
    Column("low_watermark", BigInteger, comment="Kafka's first offset when last seen."),
    Column("high_watermark", BigInteger, comment="Kafka's end when last seen."),
    Column("watermarks_at", Time, comment="When the watermarks were last seen."),
    Column(
        "retention_ms",
        BigInteger,
        comment="How long Kafka keeps a record of the topic; NULL if not known or without limit.",
    ),
    Column("committed_at", Time, comment="When next_offset last moved."),
    Column("problem", Text, comment="Why the partition is halted; NULL if it is not."),
    Column("problem_fix", Text, comment="What to do about the problem."),
    Column("problem_at", Time, comment="Since when it is halted."),
    CheckConstraint("next_offset >= first_offset", name="in_order"),
    schema=LOG_SCHEMA,
    comment="Per partition: what is in the log, and who owns the right to append.",
    # A few rows, updated with every batch: room for the new version on the same page.
    postgresql_with={"fillfactor": "50"},
)

THIS_PARTITION = (
    consumer_offsets.c.topic == bindparam("of_topic"),
    consumer_offsets.c.partition == bindparam("of_number"),
)
"""Condition for the row of one partition; ``key_of`` gives its parameters."""


def key_of(partition: Partition) -> dict[str, object]:
    """The parameters by which the statements of this package find a partition's row."""
    return {"of_topic": partition.topic, "of_number": partition.number}
