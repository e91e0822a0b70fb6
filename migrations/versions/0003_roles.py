"""What roles with few rights need: functions that do with the owner's rights what they may not.

Lock: none that matters, everything is new. The service may run meanwhile.
"""

from alembic import op

revision = "0003"
down_revision = "0002"

FUNCTIONS = """
-- A rebuild may be begun by one login and gone on with by another, so the tables are the owner's,
-- who grants them by default privileges to whoever projects.
CREATE FUNCTION pipeline.make_shadow(read_model text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    key text;
BEGIN
    SELECT pg_get_constraintdef(c.oid) INTO key FROM pg_constraint c
     WHERE c.contype = 'p' AND c.conrelid = to_regclass(format('upvest.%I', read_model));
    IF NOT FOUND THEN
        RAISE EXCEPTION 'upvest has no read model %', read_model USING ERRCODE = 'undefined_table';
    END IF;
    -- Indexes other than the key would only cost time.
    EXECUTE format('CREATE TABLE pipeline_shadow.%1$I (LIKE upvest.%1$I INCLUDING STORAGE '
                   'INCLUDING COMPRESSION INCLUDING GENERATED, %2$s)', read_model, key);
END $$;
COMMENT ON FUNCTION pipeline.make_shadow(text) IS
    'An empty table beside a read model, of the same columns and key, for a rebuild to fill.';
REVOKE ALL ON FUNCTION pipeline.make_shadow(text) FROM PUBLIC;

CREATE FUNCTION pipeline.drop_shadow(read_model text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- The schema's owner may drop what is in it, whoever made that.
    IF EXISTS (SELECT FROM pg_class c
                WHERE c.oid = to_regclass(format('pipeline_shadow.%I', read_model))
                  AND (c.relkind <> 'r' OR pg_get_userbyid(c.relowner) <> current_user)) THEN
        RAISE EXCEPTION 'pipeline_shadow.% is not a table of a rebuild', read_model
            USING ERRCODE = 'insufficient_privilege',
                  HINT = 'Somebody else made it. Rename or move it, then repeat.';
    END IF;
    EXECUTE format('DROP TABLE IF EXISTS pipeline_shadow.%I', read_model);
END $$;
COMMENT ON FUNCTION pipeline.drop_shadow(text) IS
    'Removes the table beside a read model, if there is one.';
REVOKE ALL ON FUNCTION pipeline.drop_shadow(text) FROM PUBLIC;

-- The only way in which an operator moves a next offset: a gap that is on record, and no further.
CREATE FUNCTION pipeline.accept_gap(
    of_topic text, of_partition integer,
    OUT first_offset bigint, OUT end_offset bigint, OUT continues boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    the_gap bigint;
BEGIN
    SELECT g.gap_id, g.first_offset, g.end_offset INTO the_gap, first_offset, end_offset
      FROM pipeline.gaps g
     WHERE g.topic = of_topic AND g."partition" = of_partition AND g.accepted_at IS NULL
     ORDER BY g.first_offset = (SELECT o.next_offset FROM pipeline.consumer_offsets o
                                 WHERE o.topic = of_topic AND o."partition" = of_partition) DESC,
              g.gap_id
     LIMIT 1
       FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    -- The epoch rises too: the owner is fenced, claims the partition again and continues there.
    UPDATE pipeline.consumer_offsets o
       SET next_offset = accept_gap.end_offset, epoch = o.epoch + 1,
           problem = NULL, problem_at = NULL
     WHERE o.topic = of_topic AND o."partition" = of_partition
       AND o.next_offset = accept_gap.first_offset;
    continues := FOUND;
    IF continues THEN
        UPDATE pipeline.gaps g SET accepted_at = now(), accepted_by = session_user
         WHERE g.gap_id = the_gap;
    END IF;
END $$;
COMMENT ON FUNCTION pipeline.accept_gap(text, integer) IS
    'Continues after the open gap of a partition, which stays in pipeline.gaps with who decided. '
    'NULLs if there is none; continues is false, and nothing done, if the partition has moved.';
REVOKE ALL ON FUNCTION pipeline.accept_gap(text, integer) FROM PUBLIC;
"""

BACK = """
DROP FUNCTION pipeline.accept_gap(text, integer);
DROP FUNCTION pipeline.drop_shadow(text);
DROP FUNCTION pipeline.make_shadow(text);
"""


def upgrade() -> None:
    op.execute(FUNCTIONS)


def downgrade() -> None:
    op.execute(BACK)
