"""Servers for the tests, and a report of the tests that had none.

``database`` is a migrated database of its own, ``topic()`` a topic of its own on a real Kafka.
A test marked ``both_postgres`` runs on PostgreSQL 18 and on 15; every other test on 18.
"""

import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from pipeline.sandbox.servers.broker import MockBroker
from tests.promised import PromisedTests, name_of
from tests.servers import (
    FAST_AND_UNSAFE,
    THREE_WAYS,
    BrokerMissingError,
    Kafka,
    KafkaServer,
    Postgres,
    find_kafka,
    find_postgres,
    why_no_kafka,
    why_no_kafka_of_our_own,
    why_no_postgres,
)
from tests.servers.certificates import why_no_certificates
from tests.servers.databases import Database, fresh_database, templates
from tests.servers.pgbouncer import find_pgbouncer
from tests.servers.secured import (
    SecuredKafka,
    SecuredPostgres,
)
from tests.servers.secured import (
    secured_kafka as start_secured_kafka,
)
from tests.servers.secured import (
    secured_postgres as start_secured_postgres,
)

NEWEST, OLDEST = 18, 15

# Clients of this mechanism must log in again, so that a changed password ends connections.
ENDS_SESSIONS = {"listener.name.good.scram-sha-256.connections.max.reauth.ms": "4000"}
SERVERS_15 = {"postgres_server_15", "secured_postgres"}

NOT_RUN = pytest.StashKey[dict[str, list[str]]]()
"""The tests that were left out, by reason."""


# --------------------------------------------------------------------------------------- PostgreSQL


@pytest.fixture(scope="session")
def _servers() -> Iterator[ExitStack]:
    """The servers that this run starts; they are stopped at its end."""
    with ExitStack() as started:
        yield started


@pytest.fixture(scope="session")
def postgres_server_18(_servers: ExitStack) -> Postgres:
    """PostgreSQL 18, shared by the session; or the endpoint from the environment."""
    return _servers.enter_context(find_postgres(NEWEST, FAST_AND_UNSAFE))


@pytest.fixture(scope="session")
def postgres_server_15(_servers: ExitStack) -> Postgres:
    """PostgreSQL 15, shared by the session; or the endpoint from the environment."""
    return _servers.enter_context(find_postgres(OLDEST, FAST_AND_UNSAFE))


@pytest.fixture
def pg_version() -> int:
    """The version that this test runs on; ``both_postgres`` gives it two values."""
    return NEWEST


@pytest.fixture
def postgres_server(pg_version: int, request: pytest.FixtureRequest) -> Postgres:
    """The shared server of the version that this test runs on."""
    server: Postgres = request.getfixturevalue(f"postgres_server_{pg_version}")
    return server


@pytest.fixture(scope="session")
def _templates(_servers: ExitStack) -> Callable[[Postgres], Database]:
    """One migrated database per server, made at its first use."""

    def prepare(database: Database) -> None:
        # Tests without a database need no migrations.
        from pipeline.schema.migrate import migrate

        migrate(database.url)

    return templates(_servers, prepare)


@pytest.fixture
def database(
    postgres_server: Postgres, _templates: Callable[[Postgres], Database]
) -> Iterator[Database]:
    """A migrated database of this test's own."""
    with fresh_database(postgres_server, template=_templates(postgres_server)) as fresh:
        yield fresh


@pytest.fixture
def empty_database(postgres_server: Postgres) -> Iterator[Database]:
    """A database of this test's own, before any migration."""
    with fresh_database(postgres_server) as fresh:
        yield fresh


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("both_postgres") is None:
        return
    if "PIPELINE_TEST_DATABASE_URL" in os.environ:
        metafunc.parametrize("pg_version", [NEWEST], ids=["given"])
    else:
        metafunc.parametrize("pg_version", [NEWEST, OLDEST], ids=["pg18", "pg15"])


# -------------------------------------------------------------------------------------------- Kafka


@pytest.fixture(scope="session")
def kafka(_servers: ExitStack) -> Kafka:
    """A real Kafka, shared by the session. It may not be ours: do not try to stop it."""
    return _servers.enter_context(find_kafka())


@pytest.fixture(scope="module")
def private_kafka() -> Iterator[KafkaServer]:
    """A Kafka of this module, which a test may stop, kill and pause; leave it running."""
    with KafkaServer() as server:
        yield server


@pytest.fixture
def topic(kafka: Kafka, request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """Makes topics of this test's own: ``topic(partitions=3, name="orders", config={…})``.

    The returned name has a random end.
    """
    made = []

    def make(partitions: int = 1, *, name: str = "topic", config: dict[str, str] | None = None):
        unique = f"{name}-{secrets.token_hex(4)}"
        kafka.create_topic(unique, partitions, config)
        made.append(unique)
        return unique

    yield make
    # Do not wait: the test may have deleted it already, and our server is removed anyway.
    if made:
        kafka.admin.delete_topics(made)


@pytest.fixture(scope="session")
def secured_kafka(_servers: ExitStack) -> SecuredKafka:
    """A Kafka with TLS, logins and ACLs, shared by the session; leave it running.

    Every test makes users, topics and groups of its own.
    """
    return _servers.enter_context(start_secured_kafka(ENDS_SESSIONS))


@pytest.fixture(scope="session")
def secured_postgres(_servers: ExitStack) -> SecuredPostgres:
    """A PostgreSQL with TLS, shared by the session; restore its rules and certificate."""
    return _servers.enter_context(start_secured_postgres(FAST_AND_UNSAFE))


@pytest.fixture
def mock_broker() -> Iterator[MockBroker]:
    """librdkafka's mock cluster of this test, which it may stop and trim."""
    with MockBroker() as broker:
        yield broker


# ------------------------------------------------------------------------- what could not be run

# If a server is missing, its tests do not run, and the last lines of the run report it. If one of
# these variables is set, as in CI, a missing server is a failure.
KAFKA_REQUIRED = "PIPELINE_REQUIRE_KAFKA"
OLDEST_POSTGRES_REQUIRED = "PIPELINE_REQUIRE_POSTGRES_15"
PGBOUNCER_REQUIRED = "PIPELINE_REQUIRE_PGBOUNCER"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "both_postgres: runs on PostgreSQL 18 and on 15")
    not_run: dict[str, list[str]] = {}
    config.stash[NOT_RUN] = not_run
    config.pluginmanager.register(PromisedTests(config, not_run), "promised")
    # Under nohup, or in the background of a script, signals are ignored, and every command that a
    # test starts would ignore them too. A handler is not inherited.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_itemcollected(item: pytest.Item) -> None:
    fixtures = _fixtures(item)
    if fixtures & {"kafka", "private_kafka", "topic"}:
        item.add_marker("kafka")
    if "secured_kafka" in fixtures:
        item.add_marker(pytest.mark.kafka(own=True))
    if fixtures & {"postgres_server", "postgres_server_18", *SERVERS_15}:
        item.add_marker("postgres")


@pytest.hookimpl(trylast=True)  # after -m and -k, so that only wanted tests are counted
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The longest first, in parallel with all others.
    items.sort(key=lambda item: "soak" not in item.nodeid)
    missing = [(item, _missing(item)) for item in items]
    items[:] = [item for item, why in missing if why is None]
    left_out = [(item, why) for item, why in missing if why is not None]
    if left_out:
        for item, why in left_out:
            config.stash[NOT_RUN].setdefault(why, []).append(name_of(item.nodeid))
        config.hook.pytest_deselected(items=[item for item, _ in left_out])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if why := _no_kafka_for(item):
        pytest.fail(str(BrokerMissingError(why)), pytrace=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist reports to its controller what it left out; all workers agree."""
    if (worker_output := getattr(session.config, "workeroutput", None)) is not None:
        worker_output["not_run"] = session.config.stash[NOT_RUN]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[NOT_RUN].update(getattr(node, "workeroutput", {}).get("not_run", {}))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print it last, where people read it."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None:
        return
    for what, tests in config.stash[NOT_RUN].items():
        want = "1 test wants" if len(tests) == 1 else f"{len(tests)} tests want"
        terminal.write_line(f"NOT RUN: {want} {what}")


def _missing(item: pytest.Item) -> str | None:
    """The missing server that a test needs, with the reason; None if no server is missing."""
    why = _no_kafka_for(item)
    if why and os.environ.get(KAFKA_REQUIRED) != "1":
        return f"a real Apache Kafka: {why}. Three ways to have one:\n{THREE_WAYS}"
    why = _no_postgres_for(item)
    if why and os.environ.get(OLDEST_POSTGRES_REQUIRED) != "1":
        return why
    if {"secured_kafka", "secured_postgres"} & _fixtures(item):
        return why_no_certificates()
    needs_pooler = item.get_closest_marker("pgbouncer") is not None
    if needs_pooler and not find_pgbouncer() and os.environ.get(PGBOUNCER_REQUIRED) != "1":
        return "PgBouncer: apt-get install pgbouncer"
    return None


def _no_kafka_for(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker("kafka")
    if marker is None:
        return None
    is_own = "private_kafka" in _fixtures(item) or marker.kwargs.get("own")
    return why_no_kafka_of_our_own() if is_own else why_no_kafka()


def _no_postgres_for(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    version = callspec.params.get("pg_version") if callspec else None
    if version != OLDEST and not SERVERS_15 & _fixtures(item):
        return None
    return why_no_postgres(OLDEST)


def _fixtures(item: pytest.Item) -> set[str]:
    return set(getattr(item, "fixturenames", ()))
