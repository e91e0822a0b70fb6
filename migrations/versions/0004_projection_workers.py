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
        sa.Column(
            "worker", sa.Uuid(), nullable=False, comment="Id of the worker, new at each start."
        ),
        sa.Column("host", sa.Text(), nullable=False, comment="Where the process runs."),
        sa.Column("pid", sa.Integer(), nullable=False, comment="Its process id there."),
        sa.Column(
            "projectors",
            sa.ARRAY(sa.Text()),
            nullable=False,
            comment="The projectors of its program.",
        ),
        sa.Column(
            "since",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it started. Workers are ordered by it.",
        ),
        sa.Column(
            "expires_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="When its last heartbeat expires.",
        ),
        sa.PrimaryKeyConstraint("worker", name=op.f("projection_workers_pkey")),
        schema="pipeline",
        comment="The workers that share the partitions for projection. Correctness does not depend on it: it may be emptied at any time.",
        postgresql_with={"fillfactor": "50"},
    )


def downgrade() -> None:
    op.drop_table("projection_workers", schema="pipeline")
