"""Debezium's JDBC sink on Kafka Connect, standalone (Java, Apache-2.0)."""

from collections.abc import Mapping
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

from benchmarks.rivals.rival import CannotRunError, Command, Job, Reader, environment, run_installer
from pipeline.sandbox.servers.postgres import free_port
from tests.servers.kafka import BrokerMissingError, find_java

POM = Path(__file__).parent / "pom.xml"

# Its polls are its batches, and by default of 500 records. Values go on as text, so that nothing is
# parsed on the way to jsonb. The coordinates are taken into the row by a transform: with
# primary.key.mode=kafka this version's UNNEST ends in a NullPointerException.
CONNECTOR: Mapping[str, str] = {
    "name": "sink",
    "connector.class": "io.debezium.connector.jdbc.JdbcSinkConnector",
    "tasks.max": "1",
    "insert.mode": "upsert",
    "primary.key.mode": "record_value",
    "primary.key.fields": "topic,partition,offset",
    "schema.evolution": "none",
    "quote.identifiers": "true",
    "collection.name.format": "stored",
    "dialect.postgres.unnest.insert.enabled": "true",
    "batch.size": "10000",
    "consumer.override.max.poll.records": "10000",
    "consumer.override.max.partition.fetch.bytes": "16777216",
    "consumer.override.fetch.max.bytes": "67108864",
    "key.converter": "org.apache.kafka.connect.converters.ByteArrayConverter",
    "value.converter": "org.apache.kafka.connect.storage.StringConverter",
    "header.converter": "org.apache.kafka.connect.converters.ByteArrayConverter",
    "transforms": "headers,row,place",
    # It stops at a record that has a header twice.
    "transforms.headers.type": "org.apache.kafka.connect.transforms.DropHeaders",
    "transforms.headers.headers": "content-type,trace-id,binary",
    "transforms.row.type": "org.apache.kafka.connect.transforms.HoistField$Value",
    "transforms.row.field": "payload",
    "transforms.place.type": "org.apache.kafka.connect.transforms.InsertField$Value",
    "transforms.place.topic.field": "topic",
    "transforms.place.partition.field": "partition",
    "transforms.place.offset.field": "offset",
}


def _install() -> None:
    _java()
    if not _class_path().exists():
        _class_path().parent.mkdir(parents=True, exist_ok=True)
        resolve = ["mvn", "--quiet", "--batch-mode", "--file", str(POM)]
        partial = _class_path().with_suffix(".partial")
        run_installer([*resolve, "dependency:build-classpath", f"-Dmdep.outputFile={partial}"])
        partial.rename(_class_path())


def _command(job: Job) -> Command:
    server = conninfo_to_dict(job.database.dsn)
    worker = job.folder / "worker.properties"
    _write(
        worker,
        {
            "bootstrap.servers": job.bootstrap_servers,
            "listeners": f"http://127.0.0.1:{free_port()}",
            "plugin.discovery": "service_load",
            "offset.storage.file.filename": str(job.folder / "offsets"),
            "key.converter": CONNECTOR["key.converter"],
            "value.converter": CONNECTOR["value.converter"],
        },
    )
    connector = job.folder / "connector.properties"
    _write(
        connector,
        {
            **CONNECTOR,
            "topics": job.topic,
            "consumer.override.group.id": job.group,
            "consumer.override.auto.offset.reset": "earliest",
            "connection.url": f"jdbc:postgresql://{server['host']}:{server.get('port', 5432)}/"
            f"{job.database.name}",
            "connection.username": str(server.get("user", "")),
            "connection.password": str(server.get("password", "")),
        },
    )
    standalone = "org.apache.kafka.connect.cli.ConnectStandalone"
    return Command(
        [_java(), "-Xms256m", "-Xmx2g", standalone, str(worker), str(connector)],
        {"CLASSPATH": _class_path().read_text().strip()},
    )


def _java() -> str:
    try:
        return find_java()
    except BrokerMissingError as missing:
        raise CannotRunError(missing.reason) from missing


def _class_path() -> Path:
    return environment(POM) / "classpath.txt"


def _write(path: Path, properties: Mapping[str, str]) -> None:
    path.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))


rival = Reader(
    name="Debezium JDBC sink on Kafka Connect",
    version="3.6.0.Final on Connect 4.3.1",
    settings="Standalone, one task (more were no faster), upsert with Kafka's coordinates as "
    "primary key, UNNEST on, batches and polls of 10,000, values handed on as text; a table made "
    "beforehand, of coordinates and payload alone, with the primary key alone.",
    lacks="Offsets are Kafka's: rows come at least once, and the upsert takes the repeats away; no "
    "fence; a recreated topic overwrites what is stored; a header that comes twice or without "
    "a value stops it.",
    wanted=5,
    install=_install,
    command=_command,
    prepare=(
        # UNNEST binds arrays of text.
        "CREATE CAST (text AS jsonb) WITH INOUT AS ASSIGNMENT",
        """
            CREATE TABLE stored (
                topic text, partition int, "offset" bigint, payload jsonb,
                ingested_at timestamptz NOT NULL DEFAULT now(),
                PRIMARY KEY (topic, partition, "offset")
            )""",
    ),
)
