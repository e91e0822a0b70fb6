"""The same servers as containers, if a Docker engine answers."""

import gc
import re
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

import docker  # type: ignore[import-untyped] # published without types
import psycopg
from docker.errors import DockerException  # type: ignore[import-untyped] # the same
from testcontainers.core.container import DockerContainer

from pipeline.sandbox.servers.postgres import free_port
from tests.servers.kafka import SETTINGS, START_SECONDS_MAX, Kafka

PING_SECONDS_MAX = 2
POLL_SECONDS = 0.1


@cache
def engine_answers() -> bool:
    """Whether a working Docker engine is available; examined once per process."""
    with warnings.catch_warnings():
        # Its client leaves a socket open if there is no answer, which must not fail a later test.
        warnings.simplefilter("ignore", ResourceWarning)
        answered = _ping()
        gc.collect()
    return answered


def _ping() -> bool:
    try:
        with closing(docker.from_env(timeout=PING_SECONDS_MAX)) as client:
            return bool(client.ping())
    except DockerException:
        return False


@contextmanager
def postgres_container(version: int, settings: Mapping[str, str]) -> Iterator[str]:
    """A PostgreSQL; the superuser's URL, for libpq."""
    password = secrets.token_urlsafe(16)
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    container = (
        DockerContainer(f"postgres:{version}")
        .with_env("POSTGRES_PASSWORD", password)
        .with_exposed_ports(5432)
        .with_command(["postgres", *options])
    )
    with container:
        server = f"{container.get_container_host_ip()}:{container.get_exposed_port(5432)}"
        address = f"postgresql://postgres:{password}@{server}/postgres"
        _wait_for_postgres(address)
        yield address


def _wait_for_postgres(address: str) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        try:
            psycopg.connect(address, connect_timeout=PING_SECONDS_MAX).close()
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)
        else:
            return


@contextmanager
def kafka_container() -> Iterator[Kafka]:
    """An Apache Kafka of the version that ``pom.xml`` names."""
    # A broker sends clients its own address, so the port must be known before it starts.
    port = free_port()
    container = DockerContainer(f"apache/kafka:{_kafka_version()}").with_bind_ports(port, port)
    host = container.get_docker_client().host()
    settings = {
        **SETTINGS,
        "controller.quorum.voters": "1@localhost:9093",
        "listeners": f"PLAINTEXT://:{port},CONTROLLER://:9093",
        "advertised.listeners": f"PLAINTEXT://{host}:{port}",
    }
    for name, value in settings.items():
        container.with_env(f"KAFKA_{name.upper().replace('.', '_')}", value)
    with container:
        cluster = Kafka(f"{host}:{port}")
        if not cluster.wait_until_it_answers(START_SECONDS_MAX):
            raise RuntimeError(f"the container's Kafka does not answer at {host}:{port}")
        yield cluster


def _kafka_version() -> str:
    pom = Path(__file__).with_name("pom.xml").read_text()
    found = re.search(r"<kafka\.version>([^<]+)</kafka\.version>", pom)
    if found is None:
        raise AssertionError("pom.xml names no kafka.version")
    return found[1]
