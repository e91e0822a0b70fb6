"""A copy of the database joins the group of the original; a database that was moved goes on."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from pipeline.embedded.postgres import find_binaries
from tests.faults.harness import QUICK_TO_NOTICE, Bench, Worker, until
from tests.faults.test_belonging import numbered
from tests.integration.ingesting import Ledger, logged
from tests.servers.databases import Database, fresh_database

GROUPS = {
    "cooperative": {"kafka_options": QUICK_TO_NOTICE},
    "eager": {"kafka_options": f"{QUICK_TO_NOTICE},partition.assignment.strategy=range"},
    "kip848": {"kafka_group_protocol": "consumer"},
}


@contextmanager
def template(bench: Bench, _version: int) -> Iterator[Database]:
    """CREATE DATABASE … TEMPLATE: the same server; workers are thrown out for a moment."""
    server = bench.database.server
    copy = Database(server, f"{bench.database.name}_copy")
    names = map(Identifier, (copy.name, bench.database.name))
    statement = SQL("CREATE DATABASE {} TEMPLATE {}").format(*names)
    with psycopg.connect(server.dsn(), autocommit=True) as db:

        def made() -> bool:
            bench.end_sessions()
            try:
                db.execute(statement)
            except psycopg.errors.ObjectInUse:
                return False
            return True

        until(made, "a copy from the template")
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


COPIES = {"template": template, "dump": dump}


def at(copy: Database) -> Callable[[str], str]:
    """For ``through``: the same login, at a copy."""

    def moved(url: str) -> str:
        there, mine = urlsplit(copy.url), urlsplit(url)
        login = mine.netloc.rpartition("@")[0]
        netloc = f"{login}@{there.netloc.rpartition('@')[2]}"
        return mine._replace(netloc=netloc, path=there.path, query=there.query).geturl()

    return moved


def logged_in(copy: Database) -> int:
    with copy.connect() as db:
        return db.execute("SELECT count(*) FROM pipeline.events").fetchall()[0][0]


def refusal(worker: Worker) -> str:
    """Why a worker was refused; the exit code is 65."""
    assert worker.wait() == 65, worker.tail()
    return str(worker.said("stopped")[0]["reason"])


@pytest.mark.both_postgres
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("group", GROUPS)
def test_a_copy_that_joins_a_running_original_is_refused_and_takes_nothing(
    bench: Bench, way: str, group: str, pg_version: int
):
    original = bench.worker(**GROUPS[group])
    with bench.feed(rate=200) as feed:
        bench.wait_until_logged(200)
        with COPIES[way](bench, pg_version) as copy:
            before = logged_in(copy)

            intruder = bench.worker("ingest", "--until-end", through=at(copy), **GROUPS[group])

            assert "does not write to this database" in refusal(intruder)
            assert logged_in(copy) == before
            assert bench.is_owner_of_all(original)
    assert original.said("partitions_revoked") == [], original.tail()
    bench.finish(feed.ledger)


def test_several_workers_of_one_database_are_never_refused(bench: Bench):
    """Started at once, killed, paused, and after their sessions were ended."""
    first, second, third = (bench.worker() for _ in range(3))
    with bench.feed(rate=200) as feed:
        bench.wait_until_logged(100)
        first.kill()
        fourth = bench.worker()
        bench.end_sessions()
        fifth = bench.worker()
        for worker in (fourth, fifth):
            worker.wait_until_said("partition_claimed")
        bench.wait_until_logged(bench.logged() + 200)
    bench.finish(feed.ledger)
    assert [w.exit_code for w in (second, third, fourth, fifth)] == [0] * 4
    for worker in (second, third, fourth, fifth):
        assert worker.said("database_moved") == []


@pytest.mark.parametrize("way", COPIES)
def test_a_database_that_was_moved_is_not_refused_and_the_old_one_then_is(
    bench: Bench, way: str, pg_version: int
):
    """A restore onto other hardware, without its old workers; then somebody starts one of them."""
    ledger = Ledger(bench.kafka.bootstrap_servers)
    ledger.send(bench.topic, numbered(10)).flush()
    old = bench.worker()
    bench.wait_until_logged(10)
    old.kill()
    with COPIES[way](bench, pg_version) as copy:
        moved = bench.worker(through=at(copy))
        moved.wait_until_said("partition_claimed")
        ledger.send(bench.topic, numbered(10), partition=1).flush()
        until(lambda: logged_in(copy) == 20, "the moved database goes on")

        assert "does not write to this database" in refusal(bench.worker())

        [said] = moved.said("database_moved")
        assert copy.name in said["now"]
        assert bench.database.name in said["was"]
        assert moved.stop() == 0, moved.tail()
    # They were never fed at the same time: this one resumes from its own offsets.
    assert bench.worker("ingest", "--until-end").wait() == 0
    assert logged(bench.database, bench.topic) == ledger.records


def test_of_two_that_start_at_once_one_continues(bench: Bench, pg_version: int):
    with template(bench, pg_version) as copy:
        pair = [bench.worker(), bench.worker(through=at(copy))]
        until(lambda: any(w.exit_code is not None for w in pair), "one of them ends")

        ended = [worker for worker in pair if worker.exit_code is not None]
        [winner] = set(pair) - set(ended)
        assert [worker.exit_code for worker in ended] == [65], bench.tails()
        until(lambda: len(winner.said("partition_claimed")) == 4, "it has all partitions")
        assert winner.stop() == 0, winner.tail()
