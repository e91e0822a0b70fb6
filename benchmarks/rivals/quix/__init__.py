"""Quix Streams with its PostgreSQL sink (Python, Apache-2.0)."""

from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

from benchmarks.rivals.rival import Command, Job, Reader, virtual_environment

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"


def _install() -> None:
    virtual_environment(REQUIREMENTS)


def _command(job: Job) -> Command:
    server = conninfo_to_dict(job.database.dsn)
    return Command(
        [str(virtual_environment(REQUIREMENTS)), str(HERE / "app.py")],
        {
            "BOOTSTRAP_SERVERS": job.bootstrap_servers,
            "TOPIC": job.topic,
            "GROUP": job.group,
            "ROWS": str(job.rows),
            "STATE": str(job.folder),
            "DB_HOST": str(server.get("host", "")),
            "DB_PORT": str(server.get("port", 5432)),
            "DB_NAME": job.database.name,
            "DB_USER": str(server.get("user", "")),
            "DB_PASSWORD": str(server.get("password", "")),
        },
    )


rival = Reader(
    name="Quix Streams, PostgreSQL sink",
    version="3.28.1",
    settings="A checkpoint every 10,000 records; values handed on as text, so that no dict is "
    "written back as JSON; a table made beforehand, with the primary key alone, ON CONFLICT DO "
    "NOTHING. The sink sends 100 rows per statement, which no setting changes.",
    lacks="Offsets are Kafka's: rows come at least once, and the key has to take the repeats away; "
    "no fence against a second process; one bad record stops it.",
    wanted=4,
    install=_install,
    command=_command,
    prepare=(
        """
            CREATE TABLE stored (
                topic text, partition int, "offset" bigint, key bytea, event_id uuid,
                event_type text, created_at timestamptz, payload jsonb,
                ingested_at timestamptz NOT NULL DEFAULT now(),
                PRIMARY KEY (topic, partition, "offset")
            )""",
    ),
)
