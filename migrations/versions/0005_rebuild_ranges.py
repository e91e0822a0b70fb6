"""The work list of a rebuild, so that several may work on one.

Lock: none that matters, the table is new. The service may run meanwhile.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "rebuild_ranges",
        sa.Column(
            "projector",
            sa.Text(),
            nullable=False,
            comment="NAME@rebuild, the rebuild in progress.",
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
            "first_offset",
            sa.BigInteger(),
            autoincrement=False,
            nullable=False,
            comment="First offset of the range.",
        ),
        sa.Column(
            "end_offset",
            sa.BigInteger(),
            nullable=False,
            comment="First offset after the range.",
        ),
        sa.PrimaryKeyConstraint(
            "projector",
            "topic",
            "partition",
            "first_offset",
            name=op.f("rebuild_ranges_pkey"),
        ),
        schema="pipeline",
        comment="Ranges of the log that a rebuild in progress still has to take, in any order.",
    )


def downgrade() -> None:
    op.drop_table("rebuild_ranges", schema="pipeline")
