"""Real servers for tests, benchmarks and people: PostgreSQL 15 and 18, Apache Kafka.

Each is found in this order: an endpoint from the environment (``PIPELINE_TEST_DATABASE_URL``,
``PIPELINE_TEST_KAFKA``), a container where a Docker engine answers, a server of our own.
``python -m tests.servers`` starts both and prints how to reach them.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Protocol
from urllib.parse import quote, urlsplit

import psycopg

from pipeline.sandbox.servers.postgres import BinariesMissingError, PostgresServer, find_binaries
from tests.servers.containers import engine_answers, kafka_container, postgres_container
from tests.servers.kafka import (
    THREE_WAYS,
    BrokerMissingError,
    Kafka,
    KafkaServer,
    find_java,
    jars_obtainable,
)

__all__ = [
    "FAST_AND_UNSAFE",
    "THREE_WAYS",
    "BrokerMissingError",
    "Kafka",
    "KafkaServer",
    "Postgres",
    "PostgresServer",
    "find_kafka",
    "find_postgres",
    "why_no_kafka",
    "why_no_kafka_of_our_own",
    "why_no_postgres",
]

FAST_AND_UNSAFE: Mapping[str, str] = {"fsync": "off", "full_page_writes": "off"}
"""For tests that never crash the server; not for benchmarks."""


class Postgres(Protocol):
    """A PostgreSQL that tests use as its superuser."""

    @property
    def version(self) -> int:
        """Major version."""

    def dsn(self, database: str = "postgres") -> str:
        """The URL for libpq, psql and psycopg: ``postgresql://…``."""

    def url(self, database: str = "postgres") -> str:
        """The URL for SQLAlchemy and the settings: ``postgresql+psycopg://…``."""


@dataclass(frozen=True)
class PostgresEndpoint:
    """A PostgreSQL that the tests did not start."""

    address: str

    @property
    def version(self) -> int:
        with psycopg.connect(self.dsn()) as connection:
            return connection.info.server_version // 10_000

    def dsn(self, database: str = "postgres") -> str:
        parts = urlsplit(self.address)
        return parts._replace(scheme="postgresql", path=f"/{quote(database, safe='')}").geturl()

    def url(self, database: str = "postgres") -> str:
        return self.dsn(database).replace("postgresql://", "postgresql+psycopg://", 1)


@contextmanager
def find_postgres(version: int, settings: Mapping[str, str] | None = None) -> Iterator[Postgres]:
    """A PostgreSQL for the length of the block.

    Args:
        version: Major version; ignored for an endpoint from the environment.
        settings: For ``postgresql.conf``, if the tests start the server.

    Raises:
        BinariesMissingError: No PostgreSQL is available; the message says how to install it.
    """
    if address := os.environ.get("PIPELINE_TEST_DATABASE_URL"):
        yield PostgresEndpoint(address)
    elif engine_answers():
        with postgres_container(version, settings or {}) as address:
            yield PostgresEndpoint(address)
    else:
        with PostgresServer(version, settings=settings) as server:
            yield server


@contextmanager
def find_kafka() -> Iterator[Kafka]:
    """An Apache Kafka for the length of the block.

    Raises:
        BrokerMissingError: No Kafka is available; the message names the three ways to get one.
    """
    if servers := os.environ.get("PIPELINE_TEST_KAFKA"):
        yield Kafka(servers)
    elif engine_answers():
        with kafka_container() as cluster:
            yield cluster
    else:
        with KafkaServer() as server:
            yield server


def why_no_kafka() -> str | None:
    """Why no Kafka is available, without starting one; None if it is."""
    if os.environ.get("PIPELINE_TEST_KAFKA") or engine_answers():
        return None
    return why_no_kafka_of_our_own()


@cache
def why_no_kafka_of_our_own() -> str | None:
    """Why no ``KafkaServer``, which tests may stop, is available; None if it is."""
    try:
        find_java()
    except BrokerMissingError as error:
        return error.reason
    return None if jars_obtainable() else "Java is installed, but Maven is not"


@cache
def why_no_postgres(version: int) -> str | None:
    """Why no PostgreSQL of a version is available; None if it is."""
    if os.environ.get("PIPELINE_TEST_DATABASE_URL") or engine_answers():
        return None
    try:
        find_binaries(version)
    except BinariesMissingError as error:
        return str(error)
    return None
