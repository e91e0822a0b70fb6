"""Projection: checkpoints, dead letters, and the functions that its statements call.

Lock: none that matters, everything is new. The service may run meanwhile.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

FUNCTIONS = r"""
-- Expensive, so that the planner runs it last: only for rows that pass every other condition.
CREATE FUNCTION pipeline.reject() RETURNS boolean
LANGUAGE plpgsql VOLATILE COST 1000000 AS $$
BEGIN
    RAISE EXCEPTION 'a value of the range is not valid for its column'
        USING ERRCODE = 'data_exception';
END $$;
COMMENT ON FUNCTION pipeline.reject() IS
    'Raised by a projector''s statement when a value breaks a rule; the event is then looked for.';

-- RFC 3339 with its zone, or a bare date; the cast checks the ranges of the numbers. pipeline.rfc3339
-- in Python follows the two, and a test compares them.
CREATE FUNCTION pipeline.is_rfc3339(value text) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN value ~ ('^[0-9]{4}-[0-9]{2}-[0-9]{2}([Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?'
                '([Zz]|[+-][0-9]{2}:[0-9]{2}))?$');
COMMENT ON FUNCTION pipeline.is_rfc3339(text) IS
    'Whether a text is written as a time of RFC 3339 or as a date; NULL for NULL.';

-- The rule and the cast for sessions of others, whatever their settings.
CREATE FUNCTION pipeline.rfc3339_time(value text) RETURNS timestamptz
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN CASE WHEN NOT pipeline.is_rfc3339(value) THEN NULL
                WHEN length(value) = 10 THEN CAST(value || ' 00:00:00Z' AS timestamptz)
                ELSE CAST(value AS timestamptz) END;
EXCEPTION WHEN data_exception THEN
    RETURN NULL;
END $$;
COMMENT ON FUNCTION pipeline.rfc3339_time(text) IS
    'The time that a text of RFC 3339 names, as the read models have it; a date is its midnight in '
    'UTC; NULL for any other text.';

-- Exact and slow: called only after a statement has failed. The rules are those of the projectors'
-- compiled statements. One exception block for all values, entered once per object. Of several
-- paths with "|" between them the first that is set counts; no path is the value itself.
CREATE FUNCTION pipeline.first_invalid(object jsonb, columns text[], rules text[], paths text[])
RETURNS text[] LANGUAGE plpgsql STABLE AS $$
DECLARE
    place int := 1;
    path text[];
    alternative text;
    value text;
    as_uuid uuid;
    as_number numeric;
    as_integer integer;
    as_time timestamptz;
    as_date date;
BEGIN
    WHILE place <= cardinality(columns) LOOP
        path := '{}';
        value := nullif(object #>> path, '');
        FOREACH alternative IN ARRAY string_to_array(paths[place], '|') LOOP
            path := string_to_array(alternative, '.');
            value := nullif(object #>> path, '');
            EXIT WHEN value IS NOT NULL;
        END LOOP;
        IF value IS NULL THEN
            IF rules[place] = 'object!' THEN
                RETURN ARRAY[columns[place], '22023'];
            END IF;
            IF right(rules[place], 1) = '!' THEN
                RETURN ARRAY[columns[place], '23502'];
            END IF;
        ELSE
            CASE rtrim(rules[place], '!')
                WHEN 'uuid' THEN
                    as_uuid := value::uuid;
                WHEN 'number' THEN
                    IF value ~ '[^0-9.+-]' THEN RETURN ARRAY[columns[place], '22P02']; END IF;
                    as_number := value::numeric;
                WHEN 'integer' THEN
                    IF value ~ '[^0-9.+-]' THEN RETURN ARRAY[columns[place], '22P02']; END IF;
                    as_integer := value::integer;
                WHEN 'time', 'date' THEN
                    IF NOT pipeline.is_rfc3339(value) THEN
                        RETURN ARRAY[columns[place], '22007'];
                    END IF;
                    IF rules[place] LIKE 'time%' THEN
                        as_time := value::timestamptz;
                    ELSE
                        as_date := left(value, 10)::date;
                    END IF;
                WHEN 'boolean' THEN
                    IF value NOT IN ('true', 'false') THEN
                        RETURN ARRAY[columns[place], '22P02'];
                    END IF;
                WHEN 'list' THEN
                    IF jsonb_typeof(object #> path) <> 'array' THEN
                        RETURN ARRAY[columns[place], '22023'];
                    END IF;
                WHEN 'object' THEN
                    IF jsonb_typeof(object #> path) <> 'object' THEN
                        RETURN ARRAY[columns[place], '22023'];
                    END IF;
                ELSE
                    NULL;
            END CASE;
        END IF;
        place := place + 1;
    END LOOP;
    RETURN NULL;
EXCEPTION WHEN data_exception THEN
    RETURN ARRAY[columns[place], SQLSTATE];
END $$;
COMMENT ON FUNCTION pipeline.first_invalid(jsonb, text[], text[], text[]) IS
    'The first column whose value breaks its rule, and the SQLSTATE; NULL if none does.';

-- In the transaction of the TRUNCATE, so that a rollback brings both back. Whoever may truncate
-- need not have rights on the bookkeeping.
CREATE FUNCTION pipeline.start_again(of_projector text, without_main_table boolean) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE pipeline.projection_checkpoints SET next_offset = 0, moved_at = now()
     WHERE projector = of_projector;
    DELETE FROM pipeline.dead_letters WHERE projector = of_projector;
    -- Without its main table nothing is left of what an older definition built.
    IF without_main_table THEN
        UPDATE pipeline.projectors
           SET fingerprint = NULL, built_at = NULL,
               state = 'live', problem = NULL, problem_at = NULL
         WHERE projector = of_projector;
    END IF;
END $$;
COMMENT ON FUNCTION pipeline.start_again(text, boolean) IS
    'The projector takes the log from its beginning again, so that its empty tables are filled.';
REVOKE ALL ON FUNCTION pipeline.start_again(text, boolean) FROM PUBLIC;

CREATE FUNCTION pipeline.read_model_truncated() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM pipeline.start_again(TG_ARGV[0], TG_TABLE_NAME = TG_ARGV[0]);
    RETURN NULL;
END $$;
COMMENT ON FUNCTION pipeline.read_model_truncated() IS
    'Trigger of each read-model table: its projector starts again and fills the table.';
REVOKE ALL ON FUNCTION pipeline.read_model_truncated() FROM PUBLIC;

CREATE FUNCTION pipeline.watch_read_model(read_model regclass, projector text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE TRIGGER refill_after_truncate AFTER TRUNCATE ON %s '
                   'FOR EACH STATEMENT EXECUTE FUNCTION pipeline.read_model_truncated(%L)',
                   read_model, projector);
END $$;
COMMENT ON FUNCTION pipeline.watch_read_model(regclass, text) IS
    'Has a table filled again after TRUNCATE; called by `pipeline migrate` and by the swap of a rebuild.';
REVOKE ALL ON FUNCTION pipeline.watch_read_model(regclass, text) FROM PUBLIC;

CREATE VIEW pipeline.projection_lag AS
SELECT p.projector, o.topic, o."partition", coalesce(c.next_offset, 0) AS next_offset,
       o.next_offset AS log_end,
       greatest(0, o.next_offset - greatest(o.first_offset, coalesce(c.next_offset, 0)))
           AS lag_events,
       c.moved_at, p.state, p.problem
FROM pipeline.projectors p
CROSS JOIN pipeline.consumer_offsets o
LEFT JOIN pipeline.projection_checkpoints c
       ON c.projector = p.projector AND c.topic = o.topic AND c."partition" = o."partition"
WHERE p.projector NOT LIKE '%@rebuild';
COMMENT ON VIEW pipeline.projection_lag IS
    'How far each read model is behind the log, per partition.';
COMMENT ON COLUMN pipeline.projection_lag.projector IS 'Name of the projector.';
COMMENT ON COLUMN pipeline.projection_lag.topic IS 'Kafka topic.';
COMMENT ON COLUMN pipeline.projection_lag."partition" IS 'Partition of the topic.';
COMMENT ON COLUMN pipeline.projection_lag.next_offset IS
    'First offset of the log that is not yet in the read model.';
COMMENT ON COLUMN pipeline.projection_lag.log_end IS 'First offset not yet in the log.';
COMMENT ON COLUMN pipeline.projection_lag.lag_events IS 'Offsets between the two.';
COMMENT ON COLUMN pipeline.projection_lag.moved_at IS 'When the read model last moved on.';
COMMENT ON COLUMN pipeline.projection_lag.state IS 'live, or broken: halted.';
COMMENT ON COLUMN pipeline.projection_lag.problem IS 'Why it is broken.';
"""


def upgrade() -> None:
    op.execute("CREATE SCHEMA pipeline_shadow")
    op.execute("COMMENT ON SCHEMA pipeline_shadow IS 'Read models that a rebuild is computing.'")
    op.create_table(
        "dead_letters",
        sa.Column(
            "projector",
            sa.Text(),
            nullable=False,
            comment="Projector that rejected the event.",
        ),
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
            comment="Offset of the event in pipeline.events.",
        ),
        sa.Column("event_type", sa.Text(), nullable=True, comment="The event's type."),
        sa.Column(
            "sqlstate", sa.Text(), nullable=False, comment="PostgreSQL's code for what is wrong."
        ),
        sa.Column(
            "column_name",
            sa.Text(),
            nullable=True,
            comment="Column whose value is wrong, where it is known.",
        ),
        sa.Column(
            "found_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it was first put aside.",
        ),
        sa.Column(
            "attempts",
            sa.Integer(),
            server_default=sa.text("1"),
            nullable=False,
            comment="How often it has been tried.",
        ),
        sa.Column(
            "last_attempt_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it was last tried.",
        ),
        sa.PrimaryKeyConstraint(
            "projector", "topic", "partition", "offset", name=op.f("dead_letters_pkey")
        ),
        schema="pipeline",
        comment="Events that a projector rejected. All other events were applied.",
    )
    op.create_table(
        "projection_checkpoints",
        sa.Column("projector", sa.Text(), nullable=False, comment="Name of the projector."),
        sa.Column("topic", sa.Text(collation="C"), nullable=False, comment="Kafka topic."),
        sa.Column(
            "partition",
            sa.Integer(),
            autoincrement=False,
            nullable=False,
            comment="Partition of the topic.",
        ),
        sa.Column(
            "next_offset",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="First offset of the log that is not yet in the read model.",
        ),
        sa.Column(
            "moved_at", sa.DateTime(timezone=True), nullable=True, comment="When it last moved."
        ),
        sa.PrimaryKeyConstraint(
            "projector", "topic", "partition", name=op.f("projection_checkpoints_pkey")
        ),
        schema="pipeline",
        comment=(
            "First offset that each projector has not taken yet. Moves in the transaction that "
            "writes the read model."
        ),
        postgresql_with={"fillfactor": "50"},
    )
    op.create_table(
        "projectors",
        sa.Column(
            "projector",
            sa.Text(),
            nullable=False,
            comment="Name of the projector, its main table's.",
        ),
        sa.Column(
            "fingerprint",
            sa.Text(),
            nullable=True,
            comment=(
                "Definition with which the table was last built from the start; NULL while it "
                "is empty. Another one than the program's means: rebuild."
            ),
        ),
        sa.Column(
            "built_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When that build began, or was swapped in.",
        ),
        sa.Column(
            "state",
            sa.Text(),
            server_default=sa.text("'live'"),
            nullable=False,
            comment=("live, or broken: halted until it is repaired and rebuilt."),
        ),
        sa.Column(
            "problem", sa.Text(), nullable=True, comment="Why it is broken; NULL when it is live."
        ),
        sa.Column(
            "problem_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Since when it is broken.",
        ),
        sa.CheckConstraint(
            "state IN ('live', 'broken')", name=op.f("projectors_state_is_known_check")
        ),
        sa.PrimaryKeyConstraint("projector", name=op.f("projectors_pkey")),
        schema="pipeline",
        comment="Each projector that has ever run. NAME@rebuild is a rebuild in progress.",
    )
    op.execute(FUNCTIONS)


def downgrade() -> None:
    op.execute("DROP VIEW pipeline.projection_lag")
    op.execute("DROP FUNCTION pipeline.watch_read_model(regclass, text)")
    op.execute("DROP FUNCTION pipeline.read_model_truncated()")
    op.execute("DROP FUNCTION pipeline.start_again(text, boolean)")
    op.execute("DROP FUNCTION pipeline.first_invalid(jsonb, text[], text[], text[])")
    op.execute("DROP FUNCTION pipeline.rfc3339_time(text)")
    op.execute("DROP FUNCTION pipeline.is_rfc3339(text)")
    op.execute("DROP FUNCTION pipeline.reject()")
    op.drop_table("projectors", schema="pipeline")
    op.drop_table("projection_checkpoints", schema="pipeline")
    op.drop_table("dead_letters", schema="pipeline")
    op.execute("DROP SCHEMA pipeline_shadow")
