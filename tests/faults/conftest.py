"""A bench for each test: a topic, a database, workers, and the checks at the end."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.schema.migrate import migrate
from tests.faults.harness import Bench
from tests.servers import FAST_AND_UNSAFE, Kafka, PostgresServer
from tests.servers.databases import Database, fresh_database

PARTITIONS = 4


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.faults)


@pytest.fixture
def bench(
    kafka: Kafka, database: Database, topic: Callable[..., str], tmp_path: Path
) -> Iterator[Bench]:
    """Shared servers, but a topic, a database, a group and roles of this test's own."""
    bench = Bench(kafka, database, topic(PARTITIONS), PARTITIONS, tmp_path)
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def private_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL of this module, which a test may crash and stop; leave it running."""
    with PostgresServer(settings=FAST_AND_UNSAFE) as server:
        yield server


@pytest.fixture
def shaky_postgres(
    kafka: Kafka,
    private_postgres: PostgresServer,
    topic: Callable[..., str],
    tmp_path: Path,
) -> Iterator[Bench]:
    """A bench whose PostgreSQL may be crashed."""
    with fresh_database(private_postgres) as database:
        migrate(database.url)
        bench = Bench(kafka, database, topic(PARTITIONS), PARTITIONS, tmp_path)
        yield bench
        private_postgres.start()
        bench.close()
