"""The workers that project say that they live, and share the partitions.

Lock: none that matters, the table is new. The service may run meanwhile.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "projection_workers",
        sa.Column("worker", sa.Uuid(), nullable=False, comment="Its own for each start."),
        sa.Column("host", sa.Text(), nullable=False, comment="Where the process runs."),
        sa.Column("pid", sa.Integer(), nullable=False, comment="Its process id there."),
        sa.Column(
            "projectors", sa.ARRAY(sa.Text()), nullable=False, comment="The projectors that it has."
        ),
        sa.Column(
            "since",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it started; their order.",
        ),
        sa.Column(
            "expires_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Until when it counts, unless it says again that it lives.",
        ),
        sa.PrimaryKeyConstraint("worker", name=op.f("projection_workers_pkey")),
        schema="pipeline",
        comment="The workers that project, and so share the partitions. Nothing that is right hangs on it: it may be emptied at any time.",
        postgresql_with={"fillfactor": "50"},
    )


def downgrade() -> None:
    op.drop_table("projection_workers", schema="pipeline")
