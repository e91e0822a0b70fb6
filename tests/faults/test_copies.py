"""A copy of the database joins the group of the original; a database that was moved continues."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from pipeline.sandbox.servers.postgres import find_binaries
from pipeline.schema.migrate import migrate
from tests.faults.harness import QUICK_TO_NOTICE, Bench, Worker, until
from tests.faults.test_belonging import numbered
from tests.faults.test_status_is_true import standby_of
from tests.integration.ingesting import Ledger, logged
from tests.servers import FAST_AND_UNSAFE, Kafka, PostgresServer
from tests.servers.databases import Database, fresh_database

GROUPS: dict[str, dict[str, Any]] = {
    "cooperative": {"kafka_options": QUICK_TO_NOTICE},
    "eager": {"kafka_options": f"{QUICK_TO_NOTICE},partition.assignment.strategy=range"},
    "kip848": {"kafka_group_protocol": "consumer"},
    "static": {"kafka_options": QUICK_TO_NOTICE, "group_instance_id": "one"},
    "static kip848": {"kafka_group_protocol": "consumer", "group_instance_id": "one"},
}


@contextmanager
def template(bench: Bench, _version: int) -> Iterator[Database]:
    """CREATE DATABASE … TEMPLATE: the same server; its sessions are ended for a moment."""
    server = bench.database.server
    copy = Database(server, f"{bench.database.name}_copy")
    names = map(Identifier, (copy.name, bench.database.name))
    statement = SQL("CREATE DATABASE {} TEMPLATE {}").format(*names)
    with psycopg.connect(server.dsn(), autocommit=True) as db:

        def is_copied() -> bool:
            bench.end_sessions()
            try:
                db.execute(statement)
            except psycopg.errors.ObjectInUse:
                return False
            return True

        until(is_copied, "a copy from the template")
        try:
            yield copy
        finally:
            db.execute(SQL("DROP DATABASE {} (FORCE)").format(Identifier(copy.name)))


@contextmanager
def dump(bench: Bench, version: int) -> Iterator[Database]:
    """pg_dump and psql, into another database while the workers run."""
    tools = find_binaries(version)
    with fresh_database(bench.database.server) as copy:
        script = subprocess.run(
            [tools / "pg_dump", "--dbname", bench.database.dsn], capture_output=True, check=True
        )
        subprocess.run(
            [tools / "psql", "--quiet", "--set=ON_ERROR_STOP=1", "--dbname", copy.dsn],
            input=script.stdout,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        yield copy


@contextmanager
def base_backup(bench: Bench, version: int) -> Iterator[Database]:
    """pg_basebackup: like a restore from a backup or a snapshot of the disk."""
    original = bench.database.server
    assert isinstance(original, PostgresServer)
    with copied_server(original, version, online=True) as server:
        yield Database(server, bench.database.name)


@contextmanager
def copied_server(
    original: PostgresServer, version: int, *, online: bool
) -> Iterator[PostgresServer]:
    """A second server on a copy of all files of the first, its identifier included."""
    home = Path(tempfile.mkdtemp(prefix="pipeline-copy-"))
    try:
        if online:
            tool = find_binaries(version) / "pg_basebackup"
            data = home / "data"
            run(tool, "--dbname", original.dsn(), "--pgdata", data, "--checkpoint=fast")
        else:
            run("cp", "-a", original.directory / "data", home)
        shutil.copy(original.directory / "password", home)
        owner = original.directory.stat()
        run("chown", "-R", f"{owner.st_uid}:{owner.st_gid}", home)
        with PostgresServer(version, directory=home, settings=FAST_AND_UNSAFE) as server:
            yield server
    finally:
        shutil.rmtree(home, ignore_errors=True)


def run(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


COPIES = {"template": template, "dump": dump, "base backup": base_backup}


@pytest.fixture
def benches(
    kafka: Kafka, topic: Callable[..., str], tmp_path: Path
) -> Iterator[Callable[[int, int], Bench]]:
    """Makes a bench on a server of its own, by PostgreSQL's version and the topic's partitions."""
    with ExitStack() as ended:

        def make(version: int, partitions: int) -> Bench:
            server = ended.enter_context(PostgresServer(version, settings=FAST_AND_UNSAFE))
            database = ended.enter_context(fresh_database(server))
            migrate(database.url)
            bench = Bench(kafka, database, topic(partitions), partitions, tmp_path)
            ended.callback(bench.close)
            return bench

        yield make


def at(copy: Database) -> Callable[[str], str]:
    """For ``through``: the same login, at a copy."""

    def at_copy(url: str) -> str:
        copy_url, own_url = urlsplit(copy.url), urlsplit(url)
        login = own_url.netloc.rpartition("@")[0]
        netloc = f"{login}@{copy_url.netloc.rpartition('@')[2]}"
        return own_url._replace(netloc=netloc, path=copy_url.path, query=copy_url.query).geturl()

    return at_copy


def logged_in(copy: Database) -> int:
    with copy.connect() as db:
        [(count,)] = db.execute("SELECT count(*) FROM pipeline.events")
        return int(count)


def claimed(worker: Worker) -> int:
    return sum(len(line["next_offsets"]) for line in worker.logged("partitions_claimed"))


def refusal(worker: Worker) -> str:
    """Why a worker was refused; the exit code is 65."""
    assert worker.wait() == 65, worker.tail()
    return str(worker.logged("stopped")[0]["reason"])


@pytest.mark.parametrize(
    ("version", "group", "partitions"),
    [
        (18, "cooperative", 4),
        (15, "eager", 6),
        (18, "kip848", 4),
        # A copy of the settings has the instance's id too.
        (15, "static", 1),
        (18, "static kip848", 1),
    ],
)
def test_every_kind_of_copy_that_joins_a_running_original_is_refused_and_takes_nothing(
    benches: Callable[[int, int], Bench], version: int, group: str, partitions: int
):
    """With new events and without, with different numbers of partitions."""
    bench = benches(version, partitions)
    ledger = Ledger(bench.kafka.bootstrap_servers)
    ledger.send(bench.topic, numbered(10)).flush()
    original = bench.worker(**GROUPS[group])
    bench.wait_until_owner_of_all(original)
    bench.wait_until_logged(10)
    for _ in COPIES:
        bench.prepare_role()  # a base backup has only the logins that exist when it is made
    with ExitStack() as ended:
        copies = [ended.enter_context(way(bench, version)) for way in COPIES.values()]
        before = [logged_in(copy) for copy in copies]
        ledger.send(bench.topic, numbered(10)).flush()

        intruders = [
            bench.worker("ingest", "--until-end", through=at(copy), **GROUPS[group])
            for copy in copies
        ]

        for intruder in intruders:
            assert "does not write to this database" in refusal(intruder)
        assert [logged_in(copy) for copy in copies] == before
        assert bench.is_owner_of_all(original)
    assert original.logged("partitions_revoked", "member_replaced") == [], original.tail()
    bench.wait_until_logged(20)
    assert original.stop() == 0, original.tail()
    assert logged(bench.database, bench.topic) == ledger.records


def test_a_copy_is_refused_while_the_database_of_the_original_is_down(
    benches: Callable[[int, int], Bench],
):
    """A snapshot of the disk, with every row that the original has."""
    bench = benches(18, 4)
    ledger = Ledger(bench.kafka.bootstrap_servers)
    ledger.send(bench.topic, numbered(10)).flush()
    original = bench.worker()
    bench.wait_until_owner_of_all(original)
    bench.wait_until_logged(10)
    bench.prepare_role()
    server = bench.database.server
    assert isinstance(server, PostgresServer)
    server.stop("immediate")
    ledger.send(bench.topic, numbered(10)).flush()
    with copied_server(server, 18, online=False) as files:
        copy = Database(files, bench.database.name)

        intruder = bench.worker("ingest", "--until-end", through=at(copy))

        assert "does not write to this database" in refusal(intruder)
        assert logged_in(copy) == 10
    server.start()
    bench.wait_until_logged(20)
    assert original.stop() == 0, original.tail()
    assert original.logged("partitions_revoked", "database_moved") == []
    assert logged(bench.database, bench.topic) == ledger.records


def test_several_workers_of_one_database_are_never_refused(bench: Bench):
    """Started at the same time, killed, paused, and after their sessions were ended."""
    first, second, third = (bench.worker() for _ in range(3))
    with bench.feed(rate=200) as feed:
        bench.wait_until_logged(100)
        first.kill()
        fourth = bench.worker()
        bench.end_sessions()
        fifth = bench.worker()
        for worker in (fourth, fifth):
            worker.wait_for_log("partitions_claimed")
        bench.wait_until_logged(bench.logged() + 200)
    bench.finish(feed.ledger)
    assert [w.exit_code for w in (second, third, fourth, fifth)] == [0] * 4
    for worker in (second, third, fourth, fifth):
        assert worker.logged("database_moved") == []


def test_a_database_that_was_moved_is_not_refused_and_the_old_one_then_is(
    benches: Callable[[int, int], Bench],
):
    """A restore onto other hardware without the old workers; then an old worker is started."""
    bench = benches(18, 4)
    ledger = Ledger(bench.kafka.bootstrap_servers)
    ledger.send(bench.topic, numbered(10)).flush()
    old = bench.worker()
    bench.wait_until_logged(10)
    old.kill()
    with dump(bench, 18) as copy:
        moved = bench.worker(through=at(copy))
        moved.wait_for_log("partitions_claimed")
        ledger.send(bench.topic, numbered(10), partition=1).flush()
        until(lambda: logged_in(copy) == 20, "the moved database is written")

        assert "does not write to this database" in refusal(bench.worker())

        [moved_line] = moved.logged("database_moved")
        assert copy.name in moved_line["now"]
        assert bench.database.name in moved_line["was"]
        assert moved.stop() == 0, moved.tail()
    # They were never written at the same time: the original resumes at its own offsets.
    assert bench.worker("ingest", "--until-end").wait() == 0
    assert logged(bench.database, bench.topic) == ledger.records


@contextmanager
def upgraded(old: PostgresServer, version: int) -> Iterator[PostgresServer]:
    """The same databases on a newer version, by ``pg_upgrade``; the old server has ended."""
    home = Path(tempfile.mkdtemp(prefix="pipeline-upgraded-"))
    shutil.copy(old.directory / "password", home)
    owner = old.directory.stat()
    run("chown", "-R", f"{owner.st_uid}:{owner.st_gid}", home)
    new = PostgresServer(version, directory=home, settings=FAST_AND_UNSAFE)

    def as_owner(tool: str, *arguments: object) -> None:
        subprocess.run(
            [str(new.binaries / tool), *map(str, arguments)],
            check=True,
            capture_output=True,
            cwd=home,
            env={**os.environ, "PGPASSWORD": old.password},
            user=owner.st_uid,
            group=owner.st_gid,
            extra_groups=[],
        )

    try:
        as_owner(
            *("initdb", "--pgdata", home / "data", "--username=postgres", "--auth=scram-sha-256"),
            *(f"--pwfile={home / 'password'}", "--locale=C", "--encoding=UTF8", "--no-sync"),
            "--no-data-checksums",
        )
        as_owner(
            *("pg_upgrade", "--username=postgres", "--no-sync", f"--socketdir={home}"),
            *(f"--old-bindir={old.binaries}", f"--new-bindir={new.binaries}"),
            *(f"--old-datadir={old.directory / 'data'}", f"--new-datadir={home / 'data'}"),
        )
        with (home / "data" / "postgresql.conf").open("a") as configuration:
            configuration.write("\ninclude = 'pipeline.conf'\n")
        with new:
            yield new
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.timeout(180)
def test_after_a_pg_upgrade_the_worker_continues_and_is_not_refused(
    benches: Callable[[int, int], Bench],
):
    """Stopped by a DBA, and killed: after a kill the group lists the old member for a while."""
    bench = benches(15, 2)
    old = bench.database.server
    assert isinstance(old, PostgresServer)
    ledger = Ledger(bench.kafka.bootstrap_servers)
    ledger.send(bench.topic, numbered(10)).flush()
    stopped, killed = bench.worker(**GROUPS["cooperative"]), bench.worker(**GROUPS["cooperative"])
    bench.wait_until_logged(10)
    bench.prepare_role()
    assert stopped.stop() == 0, stopped.tail()
    killed.kill()
    old.stop()

    with upgraded(old, 18) as new:
        database = Database(new, bench.database.name)
        ledger.send(bench.topic, numbered(10), partition=1).flush()
        worker = bench.worker(through=at(database), **GROUPS["cooperative"])
        until(lambda: logged_in(database) == 20, "it continues on the new version")
        assert worker.stop() == 0, worker.tail()

        assert len(worker.logged("database_moved")) == 1
        assert logged(database, bench.topic) == ledger.records
    old.start()  # to be cleaned up


@pytest.mark.timeout(180)
def test_after_a_fail_over_the_worker_continues_on_the_standby_and_is_not_refused(
    kafka: Kafka, topic: Callable[..., str], tmp_path: Path
):
    """The URL names both servers; the worker finds the one that is the primary."""
    with (
        PostgresServer(settings=FAST_AND_UNSAFE) as primary,
        fresh_database(primary) as database,
    ):
        migrate(database.url)
        bench = Bench(kafka, database, topic(2), 2, tmp_path)
        ledger = Ledger(kafka.bootstrap_servers)
        ledger.send(bench.topic, numbered(10)).flush()
        with standby_of(primary) as standby:
            primary_address, standby_address = (
                f"127.0.0.1:{server.port}" for server in (primary, standby)
            )

            def both(url: str) -> str:
                return url.replace(f"@{primary_address}/", f"@{primary_address},{standby_address}/")

            worker = bench.worker(through=both)
            bench.prepare_role()
            on_standby = Database(standby, database.name)
            until(lambda: logged_in(on_standby) == 10, "the standby has every record")

            primary.stop("immediate")
            with psycopg.connect(standby.dsn(), autocommit=True) as db:
                db.execute("SELECT pg_promote()")
            ledger.send(bench.topic, numbered(10), partition=1).flush()
            until(lambda: logged_in(on_standby) == 20, "it continues on the standby")
            assert worker.stop() == 0, worker.tail()

            again = bench.worker("ingest", "--until-end", through=both)
            assert again.wait() == 0, again.tail()
            # A standby has the identity of its primary, so no move is logged.
            assert again.logged("database_moved") == []
            assert logged(on_standby, bench.topic) == ledger.records
        primary.start()  # to be cleaned up


def test_one_of_two_copies_that_start_together_continues(bench: Bench, pg_version: int):
    with template(bench, pg_version) as copy:
        pair = [bench.worker(), bench.worker(through=at(copy))]
        until(lambda: any(w.exit_code is not None for w in pair), "one of the two ends")

        ended = [worker for worker in pair if worker.exit_code is not None]
        [winner] = set(pair) - set(ended)
        assert [worker.exit_code for worker in ended] == [65], bench.tails()
        until(lambda: claimed(winner) == 4, "it has all partitions")
        assert winner.stop() == 0, winner.tail()
