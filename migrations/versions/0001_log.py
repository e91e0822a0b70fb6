"""The log: events in segments, consumer offsets, gaps.

Lock: none that matters, everything is new. The service may run meanwhile (it cannot run before).
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

SEGMENT_FUNCTIONS = """
CREATE FUNCTION pipeline.refuse_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'pipeline.events is append-only: % is not allowed', TG_OP
        USING ERRCODE = 'insufficient_privilege';
END $$;
COMMENT ON FUNCTION pipeline.refuse_change() IS
    'Trigger of the log and of each segment: rows are never changed or removed.';

-- Created beside the log and then attached, so that writers never wait; with a trigger of its own,
-- as the parent's does not fire for a segment that is addressed directly.
CREATE FUNCTION pipeline.make_segment(of_topic text, at_offset bigint, span bigint) RETURNS int8range
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    low bigint := at_offset / span * span;
    high bigint := low + span;
    neighbour record;
    name text;
BEGIN
    IF at_offset < 0 OR span < 1000 THEN
        RAISE EXCEPTION 'segment of % offsets at % is not possible', span, at_offset
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- One at a time, as they would wait at ATTACH anyway. Readers and other writers continue, and
    -- no role but the owner may take this lock.
    LOCK TABLE pipeline.segments IN SHARE ROW EXCLUSIVE MODE;
    -- The span may have been different when the neighbours were created.
    FOR neighbour IN SELECT s.first_offset, s.end_offset
                       FROM pipeline.segments s WHERE s.topic = of_topic LOOP
        IF at_offset >= neighbour.first_offset AND at_offset < neighbour.end_offset THEN
            RETURN int8range(neighbour.first_offset, neighbour.end_offset);
        END IF;
        IF neighbour.end_offset <= at_offset THEN
            low := greatest(low, neighbour.end_offset);
        ELSE
            high := least(high, neighbour.first_offset);
        END IF;
    END LOOP;
    -- The hash distinguishes two long topic names with the same beginning.
    name := left(regexp_replace(lower(of_topic), '[^a-z0-9]+', '_', 'g'), 24)
        || '_' || left(md5(of_topic), 6) || '_' || low;
    -- A segment that was detached, or a table of somebody else, keeps its name.
    WHILE to_regclass(format('pipeline_segments.%I', name)) IS NOT NULL LOOP
        name := name || 'x';
    END LOOP;
    EXECUTE format('CREATE TABLE pipeline_segments.%I (LIKE pipeline.events INCLUDING DEFAULTS '
                   'INCLUDING STORAGE INCLUDING COMMENTS) '
                   'WITH (autovacuum_vacuum_insert_scale_factor = 0.05, '
                   'autovacuum_analyze_scale_factor = 0.05)', name);
    EXECUTE format('CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE '
                   'ON pipeline_segments.%I FOR EACH STATEMENT '
                   'EXECUTE FUNCTION pipeline.refuse_change()', name);
    EXECUTE format('COMMENT ON TABLE pipeline_segments.%I IS %L', name,
                   format('Events of topic %s, offsets %s to %s.', of_topic, low, high - 1));
    EXECUTE format('ALTER TABLE pipeline.events ATTACH PARTITION pipeline_segments.%I '
                   'FOR VALUES FROM (%L, %s) TO (%L, %s)', name, of_topic, low, of_topic, high);
    INSERT INTO pipeline.segments (segment, topic, first_offset, end_offset)
    VALUES (name, of_topic, low, high);
    RETURN int8range(low, high);
END $$;
COMMENT ON FUNCTION pipeline.make_segment(text, bigint, bigint) IS
    'The segment that holds an offset of a topic, created if it does not exist. Returns its range.';
REVOKE ALL ON FUNCTION pipeline.make_segment(text, bigint, bigint) FROM PUBLIC;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON pipeline.events
    FOR EACH STATEMENT EXECUTE FUNCTION pipeline.refuse_change();

CREATE VIEW pipeline.lag AS
SELECT topic, "partition", next_offset, high_watermark,
       greatest(0, high_watermark - next_offset) AS lag_events,
       watermarks_at, committed_at, problem, problem_fix
FROM pipeline.consumer_offsets;
COMMENT ON VIEW pipeline.lag IS
    'How far the log is behind Kafka, per partition, as last recorded.';
COMMENT ON COLUMN pipeline.lag.topic IS 'Kafka topic.';
COMMENT ON COLUMN pipeline.lag."partition" IS 'Partition of the topic.';
COMMENT ON COLUMN pipeline.lag.next_offset IS 'First offset not yet in the log.';
COMMENT ON COLUMN pipeline.lag.high_watermark IS 'Kafka''s end when last seen.';
COMMENT ON COLUMN pipeline.lag.lag_events IS 'Offsets between the two; NULL if Kafka was never seen.';
COMMENT ON COLUMN pipeline.lag.watermarks_at IS 'When Kafka was last seen.';
COMMENT ON COLUMN pipeline.lag.committed_at IS 'When the log last grew.';
COMMENT ON COLUMN pipeline.lag.problem IS 'Why the partition is halted; NULL if it is not.';
COMMENT ON COLUMN pipeline.lag.problem_fix IS 'What to do about the problem.';
"""


def upgrade() -> None:
    op.execute("CREATE SCHEMA pipeline_segments")
    op.execute("CREATE SCHEMA upvest")
    op.execute("CREATE SCHEMA upvest_personal")
    op.execute("COMMENT ON SCHEMA pipeline IS 'The event log and its bookkeeping.'")
    op.execute("COMMENT ON SCHEMA pipeline_segments IS 'The segments of pipeline.events.'")
    op.execute("COMMENT ON SCHEMA upvest IS 'Read models and views for analysts.'")
    op.execute(
        "COMMENT ON SCHEMA upvest_personal IS 'Read models with personal data, all their columns.'"
    )
    op.create_table(
        "consumer_offsets",
        sa.Column("topic", sa.Text(collation="C"), nullable=False, comment="Kafka topic."),
        sa.Column(
            "partition",
            sa.Integer(),
            autoincrement=False,
            nullable=False,
            comment="Partition of the topic.",
        ),
        sa.Column("first_offset", sa.BigInteger(), nullable=False, comment="Where reading began."),
        sa.Column(
            "next_offset",
            sa.BigInteger(),
            nullable=False,
            comment="The first offset that is not in the log; all below it are.",
        ),
        sa.Column(
            "epoch",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Number of the current ownership; each claim raises it.",
        ),
        sa.Column("owner_group", sa.Text(), nullable=True, comment="Consumer group of the owner."),
        sa.Column(
            "owner_member", sa.Text(), nullable=True, comment="Kafka's member id of the owner."
        ),
        sa.Column("owner_host", sa.Text(), nullable=True, comment="Host of the owner."),
        sa.Column("owner_pid", sa.Integer(), nullable=True, comment="Process id of the owner."),
        sa.Column(
            "claimed_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the owner claimed the partition.",
        ),
        sa.Column(
            "topic_id",
            sa.Text(),
            nullable=True,
            comment="Kafka's id of the topic, where the broker reports it.",
        ),
        sa.Column("cluster_id", sa.Text(), nullable=True, comment="Kafka's id of the cluster."),
        sa.Column(
            "low_watermark",
            sa.BigInteger(),
            nullable=True,
            comment="Kafka's first offset when last seen.",
        ),
        sa.Column(
            "high_watermark", sa.BigInteger(), nullable=True, comment="Kafka's end when last seen."
        ),
        sa.Column(
            "watermarks_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the watermarks were last seen.",
        ),
        sa.Column(
            "committed_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When next_offset last moved.",
        ),
        sa.Column(
            "problem",
            sa.Text(),
            nullable=True,
            comment="Why the partition is halted; NULL if it is not.",
        ),
        sa.Column(
            "problem_fix",
            sa.Text(),
            nullable=True,
            comment="What to do about the problem.",
        ),
        sa.Column(
            "problem_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Since when it is halted.",
        ),
        sa.CheckConstraint(
            "next_offset >= first_offset", name=op.f("consumer_offsets_in_order_check")
        ),
        sa.PrimaryKeyConstraint("topic", "partition", name=op.f("consumer_offsets_pkey")),
        schema="pipeline",
        comment="Per partition: what is in the log, and who owns the right to append.",
        postgresql_with={"fillfactor": "50"},
    )
    op.create_table(
        "events",
        sa.Column("topic", sa.Text(collation="C"), nullable=False, comment="Kafka topic."),
        sa.Column(
            "partition",
            sa.Integer(),
            autoincrement=False,
            nullable=False,
            comment="Partition of the topic.",
        ),
        sa.Column(
            "offset",
            sa.BigInteger(),
            autoincrement=False,
            nullable=False,
            comment="Offset in the partition. Numbers may be missing: Kafka uses some for itself.",
        ),
        sa.Column(
            "event_id",
            sa.Uuid(),
            nullable=True,
            comment="The envelope's id; NULL where it could not be read.",
        ),
        sa.Column(
            "event_type",
            sa.Text(),
            nullable=True,
            comment="The envelope's type, e.g. ORDER.FILLED.",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the event happened, as the envelope says, cut to microseconds.",
        ),
        sa.Column(
            "entity_id",
            sa.Uuid(),
            nullable=True,
            comment="What the event is about: the first present of the object's id, account_id, account_group_id, user_id.",
        ),
        sa.Column(
            "repeat_of",
            sa.BigInteger(),
            nullable=True,
            comment="Offset of the first copy in this partition, where this record repeats it: same event id, same bytes, within the repeat window. NULL otherwise.",
        ),
        sa.Column(
            "payload",
            postgresql.JSONB(),
            nullable=True,
            comment="The whole record; NULL where jsonb cannot hold it.",
        ),
        sa.Column(
            "raw",
            sa.LargeBinary(),
            nullable=True,
            comment="The record's bytes, kept wherever payload is not provably the same JSON value.",
        ),
        sa.Column(
            "digest",
            sa.LargeBinary(),
            nullable=True,
            comment="BLAKE2b (16 bytes) of the record's bytes; NULL for a tombstone.",
        ),
        sa.Column(
            "problem",
            sa.Text(),
            nullable=True,
            comment="Why payload or the envelope is missing; NULL for a good event.",
        ),
        sa.Column("key", sa.LargeBinary(), nullable=True, comment="Kafka's key of the record."),
        sa.Column(
            "headers",
            postgresql.JSONB(),
            nullable=True,
            comment='Kafka\'s headers as an array of [name, value], in order; bytes that are no text are written as {"base64": …}.',
        ),
        sa.Column(
            "kafka_timestamp",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Kafka's timestamp of the record.",
        ),
        sa.Column(
            "kafka_timestamp_type",
            sa.SmallInteger(),
            nullable=True,
            comment="0 none, 1 the producer's clock, 2 the broker's clock.",
        ),
        sa.Column(
            "ingested_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the transaction that wrote this row began.",
        ),
        sa.PrimaryKeyConstraint("topic", "partition", "offset", name=op.f("events_pkey")),
        schema="pipeline",
        comment="Every record that Kafka delivered, once, unchanged. Append-only.",
        postgresql_partition_by='RANGE (topic, "offset")',
    )
    op.create_index(
        op.f("events_entity_id_idx"),
        "events",
        ["entity_id"],
        unique=False,
        schema="pipeline",
        postgresql_where=sa.text("entity_id IS NOT NULL"),
    )
    op.create_index(
        op.f("events_event_id_idx"),
        "events",
        ["event_id"],
        unique=False,
        schema="pipeline",
        postgresql_where=sa.text("event_id IS NOT NULL"),
    )
    op.create_index(
        "events_ingested_at_idx",
        "events",
        ["ingested_at"],
        unique=False,
        schema="pipeline",
        postgresql_using="brin",
    )
    op.create_table(
        "gaps",
        sa.Column(
            "gap_id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Number."
        ),
        sa.Column("topic", sa.Text(collation="C"), nullable=False, comment="Kafka topic."),
        sa.Column("partition", sa.Integer(), nullable=False, comment="Partition of the topic."),
        sa.Column(
            "first_offset", sa.BigInteger(), nullable=False, comment="First offset that is lost."
        ),
        sa.Column(
            "end_offset", sa.BigInteger(), nullable=False, comment="First offset after the gap."
        ),
        sa.Column("reason", sa.Text(), nullable=False, comment="How the offsets were lost."),
        sa.Column(
            "detected_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the gap was found.",
        ),
        sa.Column(
            "accepted_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When an operator decided to continue after the gap.",
        ),
        sa.Column(
            "accepted_by", sa.Text(), nullable=True, comment="Database role of that operator."
        ),
        sa.CheckConstraint("end_offset > first_offset", name=op.f("gaps_not_empty_check")),
        sa.PrimaryKeyConstraint("gap_id", name=op.f("gaps_pkey")),
        schema="pipeline",
        comment="Offsets that Kafka deleted before we read them; nothing else is skipped.",
    )
    op.create_index(
        "gaps_place_key",
        "gaps",
        ["topic", "partition", "first_offset"],
        unique=True,
        schema="pipeline",
    )
    op.create_table(
        "installation",
        sa.Column(
            "installation_id",
            sa.Uuid(),
            server_default=sa.text("gen_random_uuid()"),
            nullable=False,
            comment="Identity of this database.",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it was created.",
        ),
        sa.PrimaryKeyConstraint("installation_id", name=op.f("installation_pkey")),
        schema="pipeline",
        comment="One row: the identity of this database, so that two cannot share a consumer group.",
    )
    op.create_table(
        "segments",
        sa.Column(
            "segment", sa.Text(), nullable=False, comment="Table in schema pipeline_segments."
        ),
        sa.Column("topic", sa.Text(collation="C"), nullable=False, comment="Kafka topic."),
        sa.Column(
            "first_offset",
            sa.BigInteger(),
            nullable=False,
            comment="First offset that it may hold.",
        ),
        sa.Column(
            "end_offset",
            sa.BigInteger(),
            nullable=False,
            comment="First offset of the next segment.",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it was created.",
        ),
        sa.PrimaryKeyConstraint("segment", name=op.f("segments_pkey")),
        schema="pipeline",
        comment="The tables that hold pipeline.events: one topic and one range of offsets each.",
    )
    op.execute(SEGMENT_FUNCTIONS)
    op.execute("INSERT INTO pipeline.installation DEFAULT VALUES")


def downgrade() -> None:
    op.execute("DROP VIEW pipeline.lag")
    op.execute("DROP FUNCTION pipeline.make_segment(text, bigint, bigint)")
    for table in ("installation", "gaps", "consumer_offsets", "segments", "events"):
        op.drop_table(table, schema="pipeline")
    op.execute("DROP FUNCTION pipeline.refuse_change()")
    op.execute("DROP SCHEMA upvest_personal")
    op.execute("DROP SCHEMA upvest")
    op.execute("DROP SCHEMA pipeline_segments")
