"""What roles with few rights need: functions that do with the owner's rights what they may not.

Lock: none that matters, everything is new. The service may run meanwhile.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"

FUNCTIONS = """
-- One login may start a rebuild and another one resume it, so the tables are the owner's, who grants
-- them by default privileges to whoever projects. They are made as migrate has recorded them: no
-- statement of a caller's is executed.
CREATE FUNCTION pipeline.read_model_name(read_model text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT o.name FROM pipeline.declared_objects o
     WHERE o.kind = 'table' AND split_part(o.name, '.', 2) = read_model;
END;
COMMENT ON FUNCTION pipeline.read_model_name(text) IS
    'Schema and name of a read model''s table; NULL if there is none.';
REVOKE ALL ON FUNCTION pipeline.read_model_name(text) FROM PUBLIC;

CREATE FUNCTION pipeline.make_shadow(read_model text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    definition text;
BEGIN
    SELECT o.definition INTO definition FROM pipeline.declared_objects o
     WHERE o.name = pipeline.read_model_name(read_model);
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no read model has a table %', read_model
            USING ERRCODE = 'undefined_table', HINT = 'Run `pipeline migrate`.';
    END IF;
    -- Indexes other than the key would only cost time.
    EXECUTE format('CREATE TABLE pipeline_shadow.%I (%s)', read_model, definition);
END $$;
COMMENT ON FUNCTION pipeline.make_shadow(text) IS
    'An empty table beside a read model, as it is declared, for a rebuild to fill.';
REVOKE ALL ON FUNCTION pipeline.make_shadow(text) FROM PUBLIC;

-- Columns and key, whatever their order; columns of others do not count.
CREATE FUNCTION pipeline.must_swap(read_model text) RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    live regclass := to_regclass(pipeline.read_model_name(read_model));
    beside regclass := to_regclass(format('pipeline_shadow.%I', read_model));
    ours text[];
BEGIN
    SELECT array_agg(c.name) INTO ours FROM pipeline.declared_objects o
      CROSS JOIN LATERAL jsonb_array_elements_text(o.details -> 'made') AS c(name)
     WHERE o.name = pipeline.read_model_name(read_model);
    RETURN EXISTS (
        SELECT FROM (
            SELECT attname, atttypid, atttypmod, attcollation, attnotnull FROM pg_attribute
             WHERE attrelid = live AND attnum > 0 AND NOT attisdropped) AS l
        FULL JOIN (
            SELECT attname, atttypid, atttypmod, attcollation, attnotnull FROM pg_attribute
             WHERE attrelid = beside AND attnum > 0 AND NOT attisdropped) AS s USING (attname)
        WHERE (l.atttypid, l.atttypmod, l.attcollation, l.attnotnull)
                  IS DISTINCT FROM (s.atttypid, s.atttypmod, s.attcollation, s.attnotnull)
          AND (s.atttypid IS NOT NULL OR attname = ANY (ours)))
    OR (SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = live AND contype = 'p')
       IS DISTINCT FROM
       (SELECT pg_get_constraintdef(oid) FROM pg_constraint
         WHERE conrelid = beside AND contype = 'p');
END $$;
COMMENT ON FUNCTION pipeline.must_swap(text) IS
    'Whether the table that a rebuild has filled must take the place of the live one, because the '
    'two have other columns or another key.';
REVOKE ALL ON FUNCTION pipeline.must_swap(text) FROM PUBLIC;

CREATE FUNCTION pipeline.swap_read_model(read_model text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    entry pipeline.declared_objects;
    live regclass;
    of_schema text;
    grants text[];
    our_views text[];
    view_grants text[];
    part record;
BEGIN
    SELECT o.* INTO STRICT entry FROM pipeline.declared_objects o
     WHERE o.name = pipeline.read_model_name(read_model);
    of_schema := split_part(entry.name, '.', 1);
    live := entry.name::regclass;
    our_views := pipeline.own_views_on(live);
    SELECT coalesce(array_agg(g.statement ORDER BY v.place), '{}') INTO view_grants
      FROM unnest(our_views) WITH ORDINALITY AS v(name, place)
      CROSS JOIN LATERAL unnest(pipeline.grants_of(v.name::regclass)) AS g(statement);
    FOR part IN SELECT v.name FROM unnest(our_views) WITH ORDINALITY AS v(name, place)
                 ORDER BY v.place DESC LOOP
        EXECUTE format('DROP VIEW %s', part.name::regclass);
    END LOOP;
    -- Last, as a reader of a view locks the view before the table: else each waits for the other.
    EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', live);
    grants := pipeline.grants_of(live);
    EXECUTE format('DROP TABLE %s', live);
    EXECUTE format('ALTER TABLE pipeline_shadow.%I SET SCHEMA %I', read_model, of_schema);
    FOR part IN SELECT key AS name, value AS columns
                  FROM jsonb_each_text(entry.details -> 'indexes') LOOP
        EXECUTE format('CREATE INDEX IF NOT EXISTS %I ON %I.%I (%s)',
                       part.name, of_schema, read_model, part.columns);
    END LOOP;
    FOR part IN SELECT key AS name, value AS comment
                  FROM jsonb_each_text(entry.details -> 'comments') LOOP
        IF part.name = '' THEN
            EXECUTE format('COMMENT ON TABLE %I.%I IS %L', of_schema, read_model, part.comment);
        ELSE
            EXECUTE format('COMMENT ON COLUMN %I.%I.%I IS %L',
                           of_schema, read_model, part.name, part.comment);
        END IF;
    END LOOP;
    PERFORM pipeline.watch_read_model(entry.name::regclass, entry.details ->> 'projector');
    FOR part IN SELECT unnest(grants) AS statement LOOP
        EXECUTE part.statement;
    END LOOP;
    FOR part IN SELECT o.name, o.definition
                  FROM unnest(our_views) WITH ORDINALITY AS v(name, place)
                  JOIN pipeline.declared_objects o USING (name) ORDER BY v.place LOOP
        BEGIN
            EXECUTE part.definition;
        EXCEPTION WHEN undefined_column OR undefined_table THEN
            RAISE EXCEPTION 'view % cannot be made on the new table: %', part.name, SQLERRM
                USING ERRCODE = SQLSTATE;
        END;
        UPDATE pipeline.declared_objects o
           SET made_as = part.name::regclass,
               details = o.details || jsonb_build_object('query', pg_get_viewdef(part.name::regclass))
         WHERE o.name = part.name;
    END LOOP;
    FOR part IN SELECT unnest(view_grants) AS statement LOOP
        EXECUTE part.statement;
    END LOOP;
    UPDATE pipeline.declared_objects o
       SET made_as = entry.name::regclass, comment = coalesce(entry.details #>> '{comments,""}', ''),
           details = o.details || jsonb_build_object(
               'made', o.details -> 'columns',
               'made_indexes', (SELECT coalesce(jsonb_agg(i.name), '[]')
                                  FROM jsonb_object_keys(o.details -> 'indexes') AS i(name)))
     WHERE o.name = entry.name;
    INSERT INTO pipeline.schema_changes (object, statements)
    VALUES (entry.name, ARRAY[format('SELECT pipeline.swap_read_model(%L)', read_model)]);
END $$;
COMMENT ON FUNCTION pipeline.swap_read_model(text) IS
    'Puts the table that a rebuild has filled in the place of the live one, with its indexes, '
    'comments, rights and our views. Fails if others have made views on it.';
REVOKE ALL ON FUNCTION pipeline.swap_read_model(text) FROM PUBLIC;

CREATE FUNCTION pipeline.grants_of(relation regclass) RETURNS text[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(array_agg(format(
               'GRANT %s ON %I.%I TO %s%s', a.privilege_type, n.nspname, c.relname,
               CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END,
               CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)), '{}')
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
      CROSS JOIN LATERAL aclexplode(c.relacl) AS a
     WHERE c.oid = relation AND a.grantee <> c.relowner
$$;
COMMENT ON FUNCTION pipeline.grants_of(regclass) IS
    'The statements that give others their rights on a table or view.';
REVOKE ALL ON FUNCTION pipeline.grants_of(regclass) FROM PUBLIC;

CREATE FUNCTION pipeline.own_views_on(relation regclass) RETURNS text[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH RECURSIVE reading(oid, depth) AS (
        SELECT relation::oid, 0
        UNION
        SELECT r.ev_class, n.depth + 1
          FROM reading n
          JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = n.oid
                          AND d.classid = 'pg_rewrite'::regclass
          JOIN pg_rewrite r ON r.oid = d.objid
         WHERE r.ev_class <> n.oid
    )
    SELECT coalesce(array_agg(v.name ORDER BY v.depth, v.name), '{}')
      FROM (SELECT o.name, max(n.depth) AS depth
              FROM reading n
              JOIN pg_class c ON c.oid = n.oid
              JOIN pg_namespace s ON s.oid = c.relnamespace
              JOIN pipeline.declared_objects o ON o.name = s.nspname || '.' || c.relname
             WHERE o.kind = 'view'
               -- Another oid, but the same comment: restored from a dump.
               AND (o.made_as = c.oid OR c.relowner = s.nspowner
                                         AND obj_description(c.oid, 'pg_class') = o.comment)
             GROUP BY o.name) AS v
$$;
COMMENT ON FUNCTION pipeline.own_views_on(regclass) IS
    'Our views that read a table, directly or through each other, in the order of their making.';
REVOKE ALL ON FUNCTION pipeline.own_views_on(regclass) FROM PUBLIC;

CREATE FUNCTION pipeline.others_on(read_model text) RETURNS text[]
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH entry AS (
        SELECT o.details, c.oid, c.reltype, c.relowner
          FROM pipeline.declared_objects o JOIN pg_class c ON c.oid = to_regclass(o.name)
         WHERE o.name = pipeline.read_model_name(read_model)
    ), ours AS (
        SELECT e.oid, e.reltype FROM entry e
        UNION ALL
        SELECT c.oid, c.reltype FROM entry e
         CROSS JOIN LATERAL unnest(pipeline.own_views_on(e.oid)) AS v(name)
          JOIN pg_class c ON c.oid = to_regclass(v.name)
    ), found AS (
        SELECT d.classid, d.objid, d.objsubid FROM ours o JOIN pg_depend d
            ON d.refclassid = 'pg_class'::regclass AND d.refobjid = o.oid
        UNION
        SELECT d.classid, d.objid, d.objsubid FROM ours o
          JOIN pg_type t ON t.oid = o.reltype OR t.typelem = o.reltype
          JOIN pg_depend d ON d.refclassid = 'pg_type'::regclass AND d.refobjid = t.oid
                          AND d.deptype = 'n'
    ), named AS (
        SELECT CASE WHEN r.rulename = '_RETURN'
                    THEN pg_describe_object('pg_class'::regclass, r.ev_class, 0)
                    ELSE pg_describe_object(f.classid, f.objid, f.objsubid) END
               || ' (owner ' || pg_get_userbyid(coalesce(
                      v.relowner, p.proowner, k_of.relowner, c.relowner, e.relowner)) || ')' AS name
          FROM found f
         CROSS JOIN entry e
          LEFT JOIN pg_rewrite r ON f.classid = 'pg_rewrite'::regclass AND r.oid = f.objid
          LEFT JOIN pg_class v ON v.oid = r.ev_class
          LEFT JOIN pg_class c ON f.classid = 'pg_class'::regclass AND c.oid = f.objid
          LEFT JOIN pg_trigger t ON f.classid = 'pg_trigger'::regclass AND t.oid = f.objid
          LEFT JOIN pg_constraint k ON f.classid = 'pg_constraint'::regclass AND k.oid = f.objid
          LEFT JOIN pg_class k_of ON k_of.oid = k.conrelid
          LEFT JOIN pg_proc p ON f.classid = 'pg_proc'::regclass AND p.oid = f.objid
         WHERE f.classid NOT IN ('pg_type'::regclass, 'pg_attrdef'::regclass)
           AND NOT (r.oid IS NOT NULL AND r.rulename = '_RETURN'
                    AND r.ev_class IN (SELECT o.oid FROM ours o))
           AND NOT (c.oid IS NOT NULL AND (
                c.relkind = 't'
                OR c.relkind = 'i' AND (
                    e.details -> 'made_indexes' ? c.relname::text
                    OR EXISTS (SELECT FROM pg_index i WHERE i.indexrelid = c.oid AND i.indisprimary))))
           AND NOT (t.oid IS NOT NULL
                    AND (t.tgisinternal OR t.tgfoid = 'pipeline.read_model_truncated()'::regprocedure))
           AND NOT (k.oid IS NOT NULL AND k.conrelid = e.oid AND k.contype IN ('p', 'n'))
        UNION
        SELECT 'column ' || quote_ident(a.attname) || ' of ' || a.attrelid::regclass
          FROM entry e JOIN pg_attribute a ON a.attrelid = e.oid
         WHERE a.attnum > 0 AND NOT a.attisdropped
           AND NOT (e.details -> 'made' ? a.attname::text)
    )
    SELECT coalesce(array_agg(n.name ORDER BY n.name), '{}') FROM named n
$$;
COMMENT ON FUNCTION pipeline.others_on(text) IS
    'What others have made on a read model''s table, or on our views of it, and would be lost if it '
    'were replaced; with its owner.';
REVOKE ALL ON FUNCTION pipeline.others_on(text) FROM PUBLIC;

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
DROP FUNCTION pipeline.others_on(text);
DROP FUNCTION pipeline.own_views_on(regclass);
DROP FUNCTION pipeline.grants_of(regclass);
DROP FUNCTION pipeline.swap_read_model(text);
DROP FUNCTION pipeline.must_swap(text);
DROP FUNCTION pipeline.make_shadow(text);
DROP FUNCTION pipeline.read_model_name(text);
"""


def upgrade() -> None:
    op.create_table(
        "declared_objects",
        sa.Column("name", sa.Text(), nullable=False, comment="Schema and name: upvest.orders."),
        sa.Column("kind", sa.Text(), nullable=False, comment="table or view."),
        sa.Column(
            "definition",
            sa.Text(),
            nullable=False,
            comment="Of a view, the statements that make it. Of a table, its columns and key, as they "
            "should be: a rebuild makes the table that takes its place from them.",
        ),
        sa.Column("comment", sa.Text(), nullable=False, comment="Comment of the object."),
        sa.Column(
            "details",
            postgresql.JSONB(),
            nullable=False,
            comment="Of a table: projector with fingerprint, indexes, comments of columns, and the "
            "columns and indexes that were made. Of a view: how PostgreSQL shows its query.",
        ),
        sa.Column(
            "made_as",
            postgresql.OID(),
            nullable=False,
            comment="Its oid when `pipeline migrate` last saw it; another one after a restore.",
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("declared_objects_pkey")),
        schema="pipeline",
        comment="Tables and views that `pipeline migrate` made from their declarations. An object of "
        "the same name that is not the one recorded here belongs to somebody else.",
    )
    op.create_table(
        "schema_changes",
        sa.Column("change_id", sa.BigInteger(), sa.Identity(), nullable=False, comment="In order."),
        sa.Column("object", sa.Text(), nullable=False, comment="What was changed: upvest.orders."),
        sa.Column("statements", sa.ARRAY(sa.Text()), nullable=False, comment="What was executed."),
        sa.Column(
            "executed_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When.",
        ),
        sa.Column(
            "executed_by",
            sa.Text(),
            server_default=sa.text("session_user"),
            nullable=False,
            comment="Login that executed it.",
        ),
        sa.PrimaryKeyConstraint("change_id", name=op.f("schema_changes_pkey")),
        schema="pipeline",
        comment="What `pipeline migrate` executed to make read models and views as declared.",
    )
    op.execute(FUNCTIONS)


def downgrade() -> None:
    op.execute(BACK)
    op.drop_table("schema_changes", schema="pipeline")
    op.drop_table("declared_objects", schema="pipeline")
