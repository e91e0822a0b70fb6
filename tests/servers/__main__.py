"""Start PostgreSQL and Apache Kafka for a person: prints the settings, runs until Ctrl-C.

With ``--secured``, Kafka wants SASL_SSL and SCRAM and has narrow ACLs, and PostgreSQL wants TLS.
"""

import argparse
import shlex
import signal
import sys
import threading
from contextlib import ExitStack

import psycopg

from pipeline.sandbox.servers.postgres import BinariesMissingError
from tests.servers import BrokerMissingError, Postgres, find_kafka, find_postgres
from tests.servers.certificates import KINDS
from tests.servers.secured import SecuredKafka, SecuredPostgres, secured_kafka, secured_postgres

DATABASE = "pipeline"
TOPICS = ("Notifications", "Prices")
PARTITIONS = 6
READER, WRITER, OWNER = "pipeline", "simulator", "pipeline_owner"


def main() -> int:
    """Run the servers in the foreground.

    Returns:
        0 after Ctrl-C or SIGTERM, 69 when a server is not available.
    """
    arguments = _arguments()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with ExitStack() as servers:
        try:
            if arguments.secured:
                _start_secured(servers, kafka=arguments.kafka)
            else:
                _start(servers, arguments.postgres, kafka=arguments.kafka)
        except (BinariesMissingError, BrokerMissingError) as error:
            print(error, file=sys.stderr)
            return 69
        print("The servers run until Ctrl-C, and are then removed.", file=sys.stderr, flush=True)
        stopped.wait()
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.servers", description=__doc__)
    parser.add_argument("--postgres", type=int, default=18, help="major version: 15, 18 …")
    parser.add_argument("--no-kafka", dest="kafka", action="store_false", help="PostgreSQL only")
    parser.add_argument(
        "--secured",
        action="store_true",
        help="with TLS, logins and ACLs; PostgreSQL 15 of the system",
    )
    return parser.parse_args()


def _start(servers: ExitStack, version: int, *, kafka: bool) -> None:
    postgres = servers.enter_context(find_postgres(version))
    _make_database(postgres)
    _print_settings({"PIPELINE_DATABASE_URL": postgres.dsn(DATABASE)})
    if kafka:
        cluster = servers.enter_context(find_kafka())
        _print_settings(
            {
                "PIPELINE_KAFKA_BOOTSTRAP_SERVERS": cluster.bootstrap_servers,
                "PIPELINE_KAFKA_SECURITY_PROTOCOL": "PLAINTEXT",
            }
        )


def _make_database(postgres: Postgres) -> None:
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        found = connection.execute(
            "SELECT FROM pg_database WHERE datname = %s", [DATABASE]
        ).fetchone()
        if found is None:
            connection.execute(f"CREATE DATABASE {DATABASE}")


def _start_secured(servers: ExitStack, *, kafka: bool) -> None:
    postgres = servers.enter_context(secured_postgres())
    _prepare_database(postgres)
    _print_settings({"PIPELINE_DATABASE_URL": postgres.dsn(OWNER, DATABASE)})
    print(f"# superuser, without TLS: {postgres.server.dsn(DATABASE)}")
    print(f"# rules: {postgres.server.directory}/data/pg_hba.conf, then pg_reload_conf()")
    if kafka:
        _print_kafka(servers.enter_context(secured_kafka()))


def _prepare_database(postgres: SecuredPostgres) -> None:
    postgres.add_user(OWNER)
    with psycopg.connect(postgres.server.dsn(), autocommit=True) as connection:
        connection.execute(f"ALTER ROLE {OWNER} CREATEROLE")
        connection.execute(f"CREATE DATABASE {DATABASE} OWNER {OWNER}")


def _print_kafka(kafka: SecuredKafka) -> None:
    """Topics, a user with exactly the rights that the product needs, and one for `simulate`."""
    for user in (READER, WRITER):
        kafka.add_user(user)
    for topic in TOPICS:
        kafka.create_topic(topic, PARTITIONS)
        kafka.add_acl(READER, "READ", "DESCRIBE", topic=topic)
        kafka.add_acl(WRITER, "WRITE", "DESCRIBE", "CREATE", topic=topic)
    kafka.add_acl(READER, "READ", group="pipeline")
    _print_settings({**kafka.environment(READER), "PIPELINE_GROUP_ID": "pipeline"})
    login = {
        name: value
        for name, value in kafka.environment(WRITER).items()
        if name in {"PIPELINE_KAFKA_USERNAME", "PIPELINE_KAFKA_PASSWORD"}
    }
    print(f"# for `pipeline simulate`: {' '.join(f'{n}={v}' for n, v in login.items())}")
    for kind in KINDS[1:]:
        print(f"# a broker whose certificate is bad ({kind}): {kafka.servers(kind)}")
    print(f"# superuser, without TLS and login: {kafka.bootstrap_servers}", flush=True)


def _print_settings(settings: dict[str, str]) -> None:
    for name, value in settings.items():
        print(f"export {name}={shlex.quote(value)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
