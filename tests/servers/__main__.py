"""Start PostgreSQL and Apache Kafka for a person: prints the endpoints, stays until Ctrl-C."""

import argparse
import signal
import sys
import threading
from contextlib import ExitStack

import psycopg

from pipeline.embedded.postgres import BinariesMissingError
from tests.servers import BrokerMissingError, Postgres, find_kafka, find_postgres

DATABASE = "pipeline"


def main() -> int:
    """Run the servers in the foreground.

    Returns:
        0 after Ctrl-C or SIGTERM, 69 when a server cannot be had.
    """
    arguments = _arguments()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with ExitStack() as servers:
        try:
            postgres = servers.enter_context(find_postgres(arguments.postgres))
            _make_database(postgres)
            print(f"export PIPELINE_DATABASE_URL={postgres.url(DATABASE)}", flush=True)
            if arguments.kafka:
                kafka = servers.enter_context(find_kafka())
                print(f"export PIPELINE_KAFKA_BOOTSTRAP_SERVERS={kafka.bootstrap_servers}")
                print("export PIPELINE_KAFKA_SECURITY_PROTOCOL=PLAINTEXT", flush=True)
        except (BinariesMissingError, BrokerMissingError) as error:
            print(error, file=sys.stderr)
            return 69
        print("Both stay until Ctrl-C, and are gone then.", file=sys.stderr, flush=True)
        stopped.wait()
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.servers", description=__doc__)
    parser.add_argument("--postgres", type=int, default=18, help="major version: 15, 18 …")
    parser.add_argument("--no-kafka", dest="kafka", action="store_false", help="PostgreSQL only")
    return parser.parse_args()


def _make_database(postgres: Postgres) -> None:
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        found = connection.execute(
            "SELECT FROM pg_database WHERE datname = %s", [DATABASE]
        ).fetchone()
        if found is None:
            connection.execute(f"CREATE DATABASE {DATABASE}")


if __name__ == "__main__":
    sys.exit(main())
