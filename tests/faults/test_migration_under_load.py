"""A migration runs, or is killed, while workers write: they continue, it is complete or undone."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.harness import PROJECT, Bench
from tests.waiting import until

PER_SECOND = 500
LATER = '''"""A later schema. Locks: the tables, for a moment. Safe while running: yes."""

import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "9999", "{head}", None, None


def upgrade() -> None:
    for schema, table in (("pipeline", "events"), ("pipeline", "consumer_offsets"),
                          ("pipeline", "projection_checkpoints"), ("upvest", "orders")):
        op.add_column(table, sa.Column("later", sa.Text(), comment="Later."), schema=schema)
    op.create_index(None, "orders", ["later"], schema="upvest")
    op.execute("SELECT pg_sleep(0.5)")


def downgrade() -> None:
    raise NotImplementedError
'''
MIGRATE = """
import os, sys
from pathlib import Path
from pipeline import failpoints, log_events
from pipeline.schema import migrate, revisions
revisions._folder = lambda: Path(sys.argv[1])
log_events.configure()
failpoints.arm(os.environ)
print(*migrate.migrate(sys.argv[2]).applied)
"""


@pytest.fixture
def later(bench: Bench, tmp_path: Path) -> Path:
    """The current migrations, and one more."""
    folder = shutil.copytree(PROJECT / "migrations", tmp_path / "migrations")
    [(head,)] = bench.query("SELECT version_num FROM pipeline.alembic_version")
    (folder / "versions/9999_later.py").write_text(LATER.format(head=head))
    return folder


@pytest.mark.timeout(180)
def test_a_migration_under_load_or_killed_loses_no_record(bench: Bench, later: Path):
    [(head,)] = bench.query("SELECT version_num FROM pipeline.alembic_version")
    worker = bench.worker("run")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        killed = migrate(bench, later, PIPELINE_FAILPOINT="mid_migration:kill")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert bench.query("SELECT version_num FROM pipeline.alembic_version") == [(head,)]
        assert later_columns(bench) == 0
        bench.wait_until_logged(bench.logged() + PER_SECOND)
        done = migrate(bench, later)
        assert done.stdout.split() == ["9999"], done.stderr
        assert later_columns(bench) == 4
        bench.wait_until_logged(bench.logged() + PER_SECOND)

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.execute(f"UPDATE pipeline.alembic_version SET version_num = '{head}'")
    bench.judge_read_models(feed.books)
    assert worker.exit_code == 0


def test_a_migration_that_deadlocks_with_a_worker_is_repeated(bench: Bench, later: Path):
    with (
        bench.database.connect(autocommit=False) as worker,
        ThreadPoolExecutor(1) as aside,
    ):
        # The session that detects the deadlock is ended: this must be the migration.
        worker.execute("SET deadlock_timeout = '1min'")
        bench.execute(f"ALTER DATABASE {worker.info.dbname} SET deadlock_timeout = '3s'")
        worker.execute("LOCK TABLE pipeline.consumer_offsets IN ROW EXCLUSIVE MODE")
        migration = aside.submit(migrate, bench, later)
        until(
            lambda: bench.query(
                "SELECT FROM pg_locks WHERE NOT granted "
                "AND relation = 'pipeline.consumer_offsets'::regclass"
            ),
            "the migration waits for the worker",
            seconds_max=30,
        )
        worker.execute("SELECT FROM pipeline.events")
        worker.commit()
        done = migration.result()

    assert done.stdout.split() == ["9999"], done.stderr


def migrate(bench: Bench, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MIGRATE, folder, bench.database.url],
        env={**os.environ, "PIPELINE_ENABLE_FAILPOINTS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT,
    )


def later_columns(bench: Bench) -> int:
    """The number of columns `later`, the log's segments left out."""
    [(columns,)] = bench.query(
        "SELECT count(*) FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
        "WHERE a.attname = 'later' AND NOT a.attisdropped AND NOT c.relispartition "
        "AND c.relkind IN ('r', 'p')"
    )
    return int(columns)
