"""A record of the views that `migrate` derives, so that they are not recognised by their names.

Lock: none that matters, the table is new. The service may run meanwhile.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"

FUNCTIONS = """
CREATE FUNCTION pipeline.drop_own_views(like_this text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    ours record;
BEGIN
    FOR ours IN
        SELECT c.oid::regclass AS view FROM pipeline.own_views o
        JOIN pg_class c ON c.relname = o.view AND c.relnamespace = 'upvest'::regnamespace
                       AND c.relkind = 'v'
        JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE o.view LIKE like_this
          AND (c.oid = o.made_as
               OR c.relowner = n.nspowner AND obj_description(c.oid, 'pg_class') = o.comment)
    LOOP
        EXECUTE format('DROP VIEW %s', ours.view);
    END LOOP;
END $$;
COMMENT ON FUNCTION pipeline.drop_own_views(text) IS
    'Drops views that `pipeline migrate` has made, before a column under them changes. It makes them '
    'again. Views of the same names that others have made stay.';
REVOKE ALL ON FUNCTION pipeline.drop_own_views(text) FROM PUBLIC;
"""


def upgrade() -> None:
    op.create_table(
        "own_views",
        sa.Column("view", sa.Text(), nullable=False, comment="Name of the view in schema upvest."),
        sa.Column(
            "made_as",
            postgresql.OID(),
            nullable=False,
            comment="Its oid when `migrate` last saw it; another one after a restore.",
        ),
        sa.Column(
            "comment",
            sa.Text(),
            nullable=False,
            comment="Its comment, by which it is recognised after a restore.",
        ),
        sa.PrimaryKeyConstraint("view", name=op.f("own_views_pkey")),
        schema="pipeline",
        comment="Views that `pipeline migrate` has made. A view of the same name that is not the one recorded here is somebody else's.",
    )
    op.execute(FUNCTIONS)


def downgrade() -> None:
    # In the way of whoever goes further back.
    op.execute("SELECT pipeline.drop_own_views('%')")
    op.execute("DROP FUNCTION pipeline.drop_own_views(text)")
    op.drop_table("own_views", schema="pipeline")
