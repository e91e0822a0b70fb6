"""What PostgreSQL refuses for a while: the worker waits, logs the reason, and then continues."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import psycopg
import pytest
from psycopg.sql import SQL

from pipeline.errors import ExitCode
from pipeline.sandbox.servers.postgres import PostgresServer
from tests.faults.harness import Bench, Worker, until
from tests.faults.ledger import Ledger

PER_SECOND = 250
DISK_MIB = 64
WAL_DISK_MIB = 96

pytestmark = pytest.mark.timeout(240)
needs_mount = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root may mount the small disk that is to be filled"
)


def wait_until_reported(worker: Worker, what: str) -> None:
    """Wait until the log names this reason of the outage."""
    until(lambda: any(what in reason for reason in worker.reasons()), f"it tells: {what}")


# ------------------------------------------------------------------------------- the whole server


def test_a_worker_waits_while_postgresql_is_read_only(shaky_postgres: Bench):
    """By existing sessions, and by new ones."""
    bench = shaky_postgres
    worker = bench.worker("run")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        set_read_only(bench, "on")
        wait_until_reported(worker, "ReadOnlySqlTransaction (25006)")
        bench.end_sessions(of=worker)
        wait_until_reported(worker, "it is read-only")
        standing = bench.logged()
        bench.wait_until_sent(feed.ledger, len(feed.ledger) + PER_SECOND)
        assert bench.logged() == standing
        set_read_only(bench, "off")
        worker.wait_for_log("server_available")

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)


def set_read_only(bench: Bench, value: str) -> None:
    with bench.database.connect() as db:
        db.execute("SET default_transaction_read_only = off")
        db.execute(SQL("ALTER SYSTEM SET default_transaction_read_only = {}").format(SQL(value)))
        db.execute("SELECT pg_reload_conf()")


@needs_mount
def test_a_worker_waits_while_the_disk_is_full_and_loses_no_event(
    shaky_postgres: Bench, private_postgres: PostgresServer
):
    """Neither log nor read model takes it for a bad event; there is no dead letter."""
    bench = shaky_postgres
    with SmallDisk(private_postgres, "small", DISK_MIB) as disk:
        with bench.database.connect() as db:
            db.execute(f"CREATE TABLESPACE small LOCATION '{disk.folder}'")
            db.execute("GRANT CREATE ON TABLESPACE small TO PUBLIC")
            # For all later segments of the log, and for one read model.
            db.execute(f'ALTER DATABASE "{bench.database.name}" SET default_tablespace = small')
            db.execute("ALTER TABLE upvest.orders SET TABLESPACE small")
        worker = bench.worker("run")

        with bench.feed(rate=PER_SECOND) as feed:
            bench.wait_until_logged(1)
            ballast = disk.fill()
            wait_until_reported(worker, "DiskFull (53100)")
            standing = bench.logged()
            bench.wait_until_sent(feed.ledger, len(feed.ledger) + PER_SECOND)
            ballast.unlink()
            bench.wait_until_logged(standing + PER_SECOND)

        bench.wait_until_projected(feed.ledger)
        bench.finish(feed.ledger)
        bench.judge_read_models(feed.books)
        assert bench.query("SELECT count(*) FROM pipeline.dead_letters") == [(0,)]
        leave_tablespace(bench, "small")


@needs_mount
def test_a_full_wal_disk_crashes_postgresql_and_loses_no_record(
    shaky_postgres: Bench, private_postgres: PostgresServer
):
    """PostgreSQL ends itself; somebody frees space and starts it again."""
    bench = shaky_postgres
    with SmallDisk(private_postgres, "wal", WAL_DISK_MIB) as disk, wal_on(private_postgres, disk):
        worker = bench.worker("run")
        with bench.feed(rate=PER_SECOND) as feed:
            bench.wait_until_logged(PER_SECOND)
            ballast = disk.fill()
            until(lambda: not has_next_wal(bench), "PostgreSQL has crashed")
            assert "PANIC" in private_postgres.log.read_text()
            ballast.unlink()
            private_postgres.restart("immediate")
            bench.wait_until_logged(bench.logged() + PER_SECOND)

        bench.wait_until_projected(feed.ledger)
        bench.finish(feed.ledger)
        bench.judge_read_models(feed.books)
        assert worker.logged("server_available")


def leave_tablespace(bench: Bench, name: str) -> None:
    """Move everything off the tablespace before its disk is removed."""
    with bench.database.connect() as db:
        db.execute("ALTER TABLE upvest.orders SET TABLESPACE pg_default")
        db.execute(f'ALTER DATABASE "{bench.database.name}" RESET default_tablespace')
        for (segment,) in db.execute("SELECT segment FROM pipeline.segments").fetchall():
            db.execute(f'ALTER TABLE pipeline_segments."{segment}" SET TABLESPACE pg_default')
        db.execute(f"ALTER INDEX ALL IN TABLESPACE {name} SET TABLESPACE pg_default")
        db.execute(f"DROP TABLESPACE {name}")


def has_next_wal(bench: Bench) -> bool:
    """Request the next WAL file; if there is no room for it, the server crashes."""
    try:
        bench.query("SELECT pg_switch_wal()")
    except psycopg.OperationalError:
        return False
    return True


class SmallDisk:
    """A disk of a few MiB that a PostgreSQL may write to."""

    def __init__(self, server: PostgresServer, name: str, mib: int) -> None:
        self.folder = server.directory / name
        self._owner = server.directory.stat()
        self._mib = mib

    def __enter__(self) -> Self:
        self.folder.mkdir()
        size = f"size={self._mib}m,uid={self._owner.st_uid},gid={self._owner.st_gid},mode=700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", self.folder], check=True)
        return self

    def __exit__(self, *_: object) -> None:
        # Lazily: the server may still have a file open.
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    def fill(self) -> Path:
        """Fill the disk; the file that fills it."""
        ballast = self.folder / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        return ballast


@contextmanager
def wal_on(server: PostgresServer, disk: SmallDisk) -> Iterator[None]:
    """The server's WAL on another disk, until the block ends."""
    wal, on_disk = server.directory / "data/pg_wal", disk.folder / "pg_wal"
    server.stop()
    subprocess.run(["cp", "-a", wal, on_disk], check=True)
    shutil.rmtree(wal)
    wal.symlink_to(on_disk)
    server.start()
    yield
    server.stop()
    wal.unlink()
    subprocess.run(["cp", "-a", on_disk, wal], check=True)
    server.start()


# -------------------------------------------------------------------------------- a role, a session


def test_a_worker_waits_while_its_role_may_not_connect(bench: Bench):
    """Its sessions end first, for another reason; the log names both reasons."""
    bench.worker("ingest")
    worker = bench.worker("project")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        until(lambda: bench.sessions(worker), "it has sessions")
        bench.alter_role(worker.role, "CONNECTION LIMIT 0")
        until(lambda: not bench.end_sessions(of=worker), "none of its sessions is left")
        wait_until_reported(worker, "accepts no more connections")
        bench.alter_role(worker.role, "CONNECTION LIMIT -1")
        worker.wait_for_log("server_available")

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)


def test_a_statement_that_an_operator_cancels_is_repeated(bench: Bench):
    worker = bench.worker(lock_timeout_ms="60000")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        with bench.database.connect(autocommit=False) as blocker:
            blocker.execute("LOCK TABLE pipeline.events IN SHARE ROW EXCLUSIVE MODE")
            until(lambda: bench.waits_for_lock(worker), "its COPY waits")
            bench.cancel_statements(worker)
            wait_until_reported(worker, "QueryCanceled (57014)")
        worker.wait_for_log("server_available")

    bench.finish(feed.ledger)


def test_a_worker_that_is_the_victim_of_a_deadlock_repeats_its_batch(bench: Bench):
    """Somebody locks the log and then a partition's row: the opposite order."""
    role = bench.prepare_role()
    # So that the other session waits before ours checks for a deadlock, and only ours checks.
    bench.alter_role(role, "SET deadlock_timeout = '4s'")
    worker = bench.worker(lock_timeout_ms="60000")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        with bench.database.connect(autocommit=False) as blocker:
            blocker.execute("SET deadlock_timeout = '1h'")
            blocker.execute("LOCK TABLE pipeline.events IN SHARE ROW EXCLUSIVE MODE")
            until(lambda: bench.waits_for_lock(worker), "its COPY waits")
            blocker.execute("SELECT FROM pipeline.consumer_offsets FOR UPDATE")
        wait_until_reported(worker, "DeadlockDetected (40P01)")
        worker.wait_for_log("server_available")

    bench.finish(feed.ledger)


def test_timeouts_that_are_set_for_the_role_end_no_statement_of_a_worker(bench: Bench):
    """A batch that takes longer than such a timeout would be repeated forever."""
    role = bench.prepare_role()
    for timeout in (
        "statement_timeout = '1ms'",
        "lock_timeout = '1ms'",
        "idle_in_transaction_session_timeout = '1ms'",
        "idle_session_timeout = '200ms'",
    ):
        bench.alter_role(role, f"SET {timeout}")
    worker = bench.worker("run", poll_interval_ms="2000")
    sent = Ledger()

    for seed in range(2):
        with bench.feed(events=PER_SECOND, seed=seed, into=sent) as feed:
            feed.wait()
        bench.wait_until_drained(sent)
        time.sleep(0.5)  # longer than a session may be idle

    bench.wait_until_projected(sent)
    bench.finish(sent)
    assert not worker.logged("server_unavailable"), worker.tail()
    assert not any("effect" in line for line in worker.logged("partitions_released"))


# -------------------------------------------------------------------------------------- the schema


def test_a_newer_schema_stops_starting_workers_and_not_running_ones(bench: Bench):
    """An upgrade migrates first and restarts the workers afterwards, one by one."""
    worker = bench.worker("run")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        # One at a time: together, their locks could deadlock with those of the worker.
        for change in (
            "ALTER TABLE pipeline.events ADD COLUMN later text",
            "ALTER TABLE pipeline.consumer_offsets ADD COLUMN later text DEFAULT 'x'",
            "ALTER TABLE upvest.orders ADD COLUMN later text DEFAULT 'x'",
            "UPDATE pipeline.alembic_version SET version_num = '9999'",
        ):
            bench.execute(change)
        newcomer = bench.worker("run")
        assert newcomer.wait() == ExitCode.CONFIGURATION, newcomer.tail()
        assert "migrated by a newer one" in newcomer.logged("stopped")[0]["reason"]
        bench.end_sessions(of=worker)
        bench.wait_until_logged(bench.logged() + PER_SECOND)

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    assert worker.exit_code == 0
