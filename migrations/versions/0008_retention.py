"""How long Kafka keeps the records of a topic, so that it is known while Kafka is away.

Lock: ACCESS EXCLUSIVE on `pipeline.consumer_offsets`, for a moment; no row is rewritten.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column(
        "consumer_offsets",
        sa.Column(
            "retention_ms",
            sa.BigInteger(),
            nullable=True,
            comment="How long Kafka keeps a record of the topic; NULL if not known or without "
            "limit.",
        ),
        schema="pipeline",
    )


def downgrade() -> None:
    op.drop_column("consumer_offsets", "retention_ms", schema="pipeline")
