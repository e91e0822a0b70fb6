"""While PostgreSQL is unavailable, restarts or refuses, the process waits, then continues."""

import shutil
import subprocess
import sys
import time

import pytest

from pipeline.errors import ExitCode
from pipeline.sandbox.servers.postgres import PostgresServer
from tests.faults import harness
from tests.faults.harness import Bench, until
from tests.faults.ledger import Ledger

PER_SECOND = 400
CRASHES = 5
TERMINATIONS = 8
LESS_PATIENT_S = 5.0
LESS_PATIENT = f"""
from pipeline import outages
from pipeline.ingest import monitor
outages.GRACE_S = monitor.GRACE_S = {LESS_PATIENT_S}
from pipeline.cli import main
main()
"""
"""The program with a shorter grace period."""


@pytest.mark.core
@pytest.mark.timeout(240)
def test_the_same_process_continues_after_five_crashes_of_postgresql(
    shaky_postgres: Bench, private_postgres: PostgresServer
):
    bench = shaky_postgres
    worker = bench.worker("run")

    with bench.feed(rate=PER_SECOND) as feed:
        for _ in range(CRASHES):
            bench.wait_until_logged(bench.logged() + PER_SECOND)
            private_postgres.restart("immediate")

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)
    assert worker.logged("server_available")


def test_a_worker_waits_for_a_postgresql_that_has_not_started(
    shaky_postgres: Bench, private_postgres: PostgresServer
):
    bench = shaky_postgres
    with bench.feed(events=PER_SECOND) as feed:
        sent = feed.wait()
    bench.prepare_role()
    private_postgres.stop()

    worker = bench.worker()
    worker.wait_for_log("server_unavailable")
    private_postgres.start()

    bench.finish(sent)


def test_a_worker_that_waits_for_postgresql_can_be_stopped(
    shaky_postgres: Bench, private_postgres: PostgresServer
):
    shaky_postgres.prepare_role()
    private_postgres.stop()

    worker = shaky_postgres.worker("run")
    worker.wait_for_log("server_unavailable")

    assert worker.stop() == 0


def test_repeatedly_ended_sessions_lose_no_record(bench: Bench):
    worker = bench.worker("run")

    with bench.feed(rate=PER_SECOND) as feed:
        for _ in range(TERMINATIONS):
            bench.wait_until_logged(bench.logged() + PER_SECOND // 4)
            until(lambda: bench.end_sessions(of=worker), "a session was ended")

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)
    assert worker.logged("server_available")


@pytest.mark.parametrize("command", ["ingest", "run"])
def test_a_worker_waits_until_a_rotated_password_is_valid(bench: Bench, command: str):
    worker = bench.worker(command)

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        bench.set_password(worker.role, "rotated")
        bench.end_sessions(of=worker)
        until(
            lambda: any("refused the login" in reason for reason in worker.reasons()),
            "the worker logs that the login was refused",
        )
        bench.set_password(worker.role, bench.password)

    bench.finish(feed.ledger)


@pytest.mark.parametrize(
    "rights",
    [
        "INSERT ON pipeline.events",
        "UPDATE ON pipeline.consumer_offsets",
        "USAGE ON SCHEMA pipeline",
    ],
)
def test_a_worker_waits_for_rights_that_are_missing_for_a_moment(bench: Bench, rights: str):
    worker = bench.worker()

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        bench.revoke(rights)
        worker.wait_for_log("access_refused")
        bench.grant()

    bench.finish(feed.ledger)


@pytest.mark.parametrize(
    ("taken", "words"),
    [("the password", "refused the login"), ("INSERT", "permission denied for table events")],
)
def test_a_right_or_password_that_is_removed_permanently_ends_the_process_with_78(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, taken: str, words: str
):
    """Not before the grace period is over, which the first log line announces."""
    monkeypatch.setattr(harness, "ENTRY", [sys.executable, "-c", LESS_PATIENT])
    worker = bench.worker("run")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        if taken == "INSERT":
            bench.revoke("INSERT ON pipeline.events")
        else:
            bench.set_password(worker.role, "another")
            bench.end_sessions(of=worker)
        worker.wait_for_log("access_refused")
        refused_at = time.monotonic()
        assert worker.wait() == ExitCode.CONFIGURATION, worker.tail()
        lasted_s = time.monotonic() - refused_at
        bench.set_password(worker.role, bench.password)
        bench.grant()
        bench.worker("run")

    bench.finish(feed.ledger)
    first = worker.logged("access_refused")[0]
    assert words in first["reason"]
    assert "exit with 78 in" in first["effect"]
    assert lasted_s > LESS_PATIENT_S - 2
    assert words in worker.logged("stopped")[0]["reason"]


def test_a_slow_postgresql_loses_neither_records_nor_the_membership(bench: Bench):
    """A transaction that lasts longer than Kafka allows between two polls."""
    worker = bench.worker(
        kafka_options="session.timeout.ms=2000,heartbeat.interval.ms=400,max.poll.interval.ms=2000",
        lock_timeout_ms="60000",
    )

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        with bench.database.connect(autocommit=False) as blocker:
            blocker.execute("LOCK TABLE pipeline.events IN SHARE ROW EXCLUSIVE MODE")
            until(lambda: bench.waits_for_lock(worker), "its COPY waits")
            standing = bench.logged()
            bench.wait_until_sent(feed.ledger, len(feed.ledger) + 8 * PER_SECOND)
            assert bench.logged() == standing
        bench.wait_until_logged(standing + PER_SECOND)
        left = worker.logged("member_timed_out", "partitions_revoked", "server_unavailable")

    bench.finish(feed.ledger)
    assert not left, "the worker stayed in the group and logged no outage"


def test_a_postgresql_restored_from_an_older_backup_is_filled_again(
    shaky_postgres: Bench, private_postgres: PostgresServer
):
    """The worker holds the epoch of the backup and nothing has failed; only its offset differs."""
    bench, data = shaky_postgres, private_postgres.directory / "data"
    backup = data.with_name("backup")
    worker = bench.worker()
    sent = Ledger()

    for seed in range(2):
        with bench.feed(events=PER_SECOND, seed=seed, into=sent) as feed:
            feed.wait()
        bench.wait_until_drained(sent)
        private_postgres.stop()
        if not backup.exists():
            subprocess.run(["cp", "-a", data, backup], check=True)
            private_postgres.start()
    shutil.rmtree(data)
    backup.rename(data)
    private_postgres.start()
    until(lambda: bench.sessions(worker), "the worker has noticed it by itself")
    with bench.feed(events=PER_SECOND, seed=2, into=sent):
        worker.wait_for_log("partitions_fenced")

    bench.finish(sent)
