"""The workers that ingest register, with the server that they write to.

A copy of the database holds these rows too, but not its server's start: so a member of the consumer
group that writes to another copy is recognised.

Lock: none that matters, the table is new. The service may run meanwhile.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "ingest_workers",
        sa.Column("member", sa.Text(), nullable=False, comment="Kafka's id of the group's member."),
        sa.Column("host", sa.Text(), nullable=False, comment="Where the process runs."),
        sa.Column("pid", sa.Integer(), nullable=False, comment="Its process id there."),
        sa.Column(
            "since",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it registered.",
        ),
        sa.Column(
            "seen_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it last registered again; it does so every minute.",
        ),
        sa.Column(
            "system_identifier",
            sa.BigInteger(),
            nullable=False,
            comment="The server's cluster, as pg_control_system() has it.",
        ),
        sa.Column(
            "timeline",
            sa.Integer(),
            nullable=False,
            comment="The server's timeline; a promotion begins a new one.",
        ),
        sa.Column(
            "database_oid",
            sa.BigInteger(),
            nullable=False,
            comment="The database's oid in that cluster.",
        ),
        sa.Column(
            "server_started_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="When the server was started. No two running copies have the same.",
        ),
        sa.Column(
            "server", sa.Text(), nullable=False, comment="Database, address and port, for people."
        ),
        sa.PrimaryKeyConstraint("member", name=op.f("ingest_workers_pkey")),
        schema="pipeline",
        comment="Members of the consumer group that write to this database, and the server that "
        "each wrote to. A member that is not here writes to another database.",
        postgresql_with={"fillfactor": "50"},
    )


def downgrade() -> None:
    op.drop_table("ingest_workers", schema="pipeline")
