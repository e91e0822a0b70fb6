"""`pipeline status` while events do not get through: it reports this, since when, and ends with 1.

The faults are real and happen at the same time, each to a worker of its own, so that the test
waits for all of them together.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import psycopg
import pytest

from pipeline.errors import ExitCode
from pipeline.health.status import states
from pipeline.schema.migrate import migrate
from tests.commands import Commands, InProcess, Result
from tests.faults.harness import Bench, until
from tests.faults.test_postgres_refuses import (
    DISK_MIB,
    SmallDisk,
    leave_tablespace,
    needs_mount,
)
from tests.integration.ingesting import Ledger
from tests.servers import FAST_AND_UNSAFE, Kafka, KafkaServer, PostgresServer
from tests.servers.databases import Database, fresh_database

PER_SECOND = 50
UNKNOWN_S_MAX = states.SEEN_S_MAX + 15
"""This long after a fault, status must not be OK any more."""

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def migrated(private_postgres: PostgresServer) -> Iterator[Database]:
    """A database to copy; nobody is connected to it."""
    with fresh_database(private_postgres) as template:
        migrate(template.url)
        yield template


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "StatusOf":
    return StatusOf(InProcess(monkeypatch, capsys))


class StatusOf:
    """What `pipeline status` reports of a database."""

    def __init__(self, pipeline: InProcess) -> None:
        self._pipeline = pipeline

    def __call__(self, bench: Bench, *options: str, dsn: str = "") -> Result:
        return self.of(bench, "status", *options, dsn=dsn)

    def of(self, bench: Bench, *command: str, dsn: str = "") -> Result:
        """The result of any command."""
        settings = {
            "database_url": dsn or bench.database.dsn,
            "kafka_bootstrap_servers": bench.kafka.bootstrap_servers,
            "kafka_security_protocol": "PLAINTEXT",
            "topics": bench.topic,
            "group_id": bench.group,
        }
        return self._pipeline(Commands(**settings), *command)

    def states(self, bench: Bench) -> set[str]:
        """The states of the partitions; the exit code and the document must agree."""
        shown = self(bench, "--json")
        assert shown.code == (ExitCode.DONE if shown.json["ok"] else ExitCode.FOUND)
        return {partition["state"] for partition in shown.json["partitions"]}

    def has_code(self, bench: Bench, code: int) -> bool:
        """Whether it ends with this exit code."""
        return self(bench).code == code

    def is_unknown(self, bench: Bench) -> bool:
        """Whether it reports UNKNOWN for every partition."""
        return self.states(bench) == {"UNKNOWN"}

    def is_well(self, bench: Bench) -> bool:
        """Whether it reports that everything came through."""
        shown = self(bench, "--json")
        return shown.code == 0 and shown.json["lag"] == 0 and self.states(bench) == {"OK"}


@contextmanager
def bench_on(kafka: Kafka, template: Database, name: str, folder: Path) -> Iterator[Bench]:
    """A bench with one partition on shared servers."""
    with fresh_database(template.server, template=template) as database:
        kafka.create_topic(name)
        (folder / name).mkdir()
        bench = Bench(kafka, database, name, 1, folder / name)
        yield bench
        bench.close()


@needs_mount
def test_no_fault_is_reported_as_ok(
    kafka: Kafka,
    private_kafka: KafkaServer,
    private_postgres: PostgresServer,
    migrated: Database,
    status: StatusOf,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    """Kafka silent; a worker killed, stopped, ended; a disk full; a lock, then another password."""
    monkeypatch.setattr(states, "LAG_S_MAX", 10.0)
    faults = ["silent", "killed", "paused", "ended", "full", "locked"]
    with ExitStack() as stack:
        benches = {
            fault: stack.enter_context(
                bench_on(
                    private_kafka if fault == "silent" else kafka,
                    migrated,
                    f"{fault}-{os.urandom(4).hex()}",
                    tmp_path,
                )
            )
            for fault in faults
        }
        disk = stack.enter_context(SmallDisk(private_postgres, "status", DISK_MIB))
        with benches["full"].database.connect() as db:
            db.execute(f"CREATE TABLESPACE status LOCATION '{disk.folder}'")
            db.execute("GRANT CREATE ON TABLESPACE status TO PUBLIC")
            name = benches["full"].database.name
            db.execute(f'ALTER DATABASE "{name}" SET default_tablespace = status')
        stack.callback(leave_disk, benches["full"], disk)
        workers = {fault: bench.worker("run") for fault, bench in benches.items()}
        feeds = {
            fault: stack.enter_context(bench.feed(rate=PER_SECOND))
            for fault, bench in benches.items()
            if fault in ("ended", "full", "locked")
        }
        for fault, bench in benches.items():
            if fault not in feeds:
                stack.enter_context(bench.feed(events=20)).wait()
        for fault, bench in benches.items():
            bench.wait_until_logged(20)
            until(partial(status.has_code, bench, 0), f"all is well before {fault}")

        private_kafka.pause()
        workers["killed"].kill()
        workers["paused"].pause()
        disk.fill()
        assert workers["ended"].stop() == 0
        assert_reported(
            status(benches["ended"]),
            "STOP",
            "no process reads it",
        )
        lose_records(benches["ended"], kafka)
        with benches["locked"].database.connect(autocommit=False) as blocker:
            blocker.execute("LOCK TABLE upvest.orders IN SHARE ROW EXCLUSIVE MODE")
            until(lambda: "stalled" in status(benches["locked"]).out, "the lock is a stall")
            assert_reported(status(benches["locked"]), "has not moved since", "a lock")
        benches["locked"].set_password(workers["locked"].role, "another")
        benches["locked"].end_sessions()
        until(lambda: status.states(benches["ended"]) == {"ERR"}, "the lost records are shown")
        assert_reported(status(benches["ended"]), "halted:", "gaps accept")
        # STALL while Kafka's end is still recorded, UNKNOWN later.
        stopped = {"STALL"}, {"UNKNOWN"}
        until(lambda: status.states(benches["full"]) in stopped, "the full disk is reported")
        assert_reported(status(benches["full"]), "a full disk")
        for fault in ("killed", "paused", "locked"):
            until(
                partial(status.is_unknown, benches[fault]),
                f"{fault} is unknown",
                seconds_max=UNKNOWN_S_MAX,
            )
            shown = status(benches[fault])
            assert_reported(shown, "state is unknown", f":{workers[fault].pid}, last recorded")
        for fault in ("silent", "killed", "paused", "locked"):
            shown = status(benches[fault])
            assert_reported(shown, "lag and rate unknown", "read its log")
            assert "caught up" not in shown.out

        private_kafka.resume()
        workers["paused"].resume()
        (disk.folder / "ballast").unlink()
        for feed in feeds.values():
            feed.stop()
        for fault in ("silent", "paused", "full"):
            until(partial(status.is_well, benches[fault]), f"{fault} is over")


def leave_disk(bench: Bench, disk: SmallDisk) -> None:
    (disk.folder / "ballast").unlink(missing_ok=True)
    for worker in bench.workers:
        worker.kill()
    leave_tablespace(bench, "status")


def lose_records(bench: Bench, kafka: Kafka) -> None:
    """Kafka deletes records that nobody has read, then a worker continues to read."""
    Ledger(kafka.bootstrap_servers).send(bench.topic, [b"{}"] * 10).flush()
    kafka.delete_records(bench.topic, 0, bench.logged() + 5)
    bench.worker("run")


def assert_reported(shown: Result, *words: str) -> None:
    assert shown.code == ExitCode.FOUND, shown.out
    for word in words:
        assert word in shown.out, shown.out


# ---------------------------------------------------------------------------------------- a standby

# Commands that only read work on a standby; the others report what is missing.
OTHERS = [
    (["events"], 0),
    (["events", "--json", "--limit", "1"], 0),
    (["dead-letters", "list"], 0),
    (["gaps", "list"], 0),
    (["check"], ExitCode.UNAVAILABLE),
    (["dead-letters", "retry"], ExitCode.UNAVAILABLE),
]


@contextmanager
def standby_of(primary: PostgresServer) -> Iterator[PostgresServer]:
    """A streaming standby, made by ``pg_basebackup``, that accepts sessions that read."""
    with tempfile.TemporaryDirectory(prefix="standby-", dir=primary.directory.parent) as folder:
        directory = Path(folder)
        shutil.copy(primary.directory / "password", directory)
        owner = primary.directory.stat()
        for path in (directory, directory / "password"):
            os.chown(path, owner.st_uid, owner.st_gid)
        subprocess.run(
            [
                *(primary.binaries / "pg_basebackup", "--pgdata", directory / "data"),
                *("--write-recovery-conf", "--checkpoint=fast", "--no-sync"),
                f"--dbname={primary.dsn()}",
            ],
            check=True,
            capture_output=True,
            cwd="/",
            user=owner.st_uid,
            group=owner.st_gid,
            extra_groups=[],
        )
        standby = PostgresServer(
            primary.version, directory=directory, settings={**FAST_AND_UNSAFE, "hot_standby": "on"}
        )
        with standby:
            yield standby


def test_a_standby_reports_how_old_its_data_is(
    kafka: Kafka,
    private_postgres: PostgresServer,
    migrated: Database,
    status: StatusOf,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.setattr(states, "SEEN_S_MAX", 12.0)
    with (
        bench_on(kafka, migrated, f"standby-{os.urandom(4).hex()}", tmp_path) as bench,
        standby_of(private_postgres) as standby,
    ):
        dsn = standby.dsn(bench.database.name)
        bench.worker("run")
        with bench.feed(events=20) as feed:
            feed.wait()

        def is_well() -> bool:
            shown = status(bench, "--json", dsn=dsn)
            return shown.code == 0 and shown.json["lag"] == 0 and shown.json["offsets"] > 0

        until(is_well, "the standby reports that all is well")
        shown = status(bench, dsn=dsn)
        assert "This database is a standby. The newest transaction" in shown.out
        assert status(bench, "--json", dsn=dsn).json["standby"]["age_s"] < 12
        assert status(bench, "--json").json["standby"] is None

        for command, code in OTHERS:
            shown = status.of(bench, *command, dsn=dsn)
            assert shown.code == code, (command, shown)

        with psycopg.connect(dsn, autocommit=True) as db:
            db.execute("SELECT pg_wal_replay_pause()")
        applied = "standby: this database is a standby that has applied no transaction since"
        until(lambda: applied in status(bench, dsn=dsn).out, "its data is too old")
        assert_reported(status(bench, dsn=dsn), "its replay is paused", "lag and rate unknown")
        assert "start `pipeline" not in status(bench, dsn=dsn).out
        assert status(bench).code == 0
