"""eventsourcing's ProjectionRunner on its PostgreSQL recorders (Python, BSD)."""

from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

from benchmarks.rivals.orders import EVENT, EVENTS, FIELDS, UPSERT
from benchmarks.rivals.rival import Command, Projecting, virtual_environment
from tests.servers.databases import Database

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
PLACEHOLDERS = {name: f"%({name})s" for name in FIELDS}

# As its recorder makes the table, and as its transcoder writes an event.
STORE = """
CREATE TABLE application_events (
    originator_id uuid NOT NULL, originator_version bigint NOT NULL, topic text, state bytea,
    notification_id bigserial, PRIMARY KEY (originator_id, originator_version))
"""
INDEX = """
CREATE UNIQUE INDEX application_events_notification_id_idx ON application_events (notification_id)
"""
COPY = f"""
INSERT INTO application_events (originator_id, originator_version, topic, state)
SELECT e.entity_id, row_number() OVER (PARTITION BY e.entity_id ORDER BY e.partition, e."offset"),
    'app:OrderEvent', convert_to({EVENT}::text, 'UTF8')
FROM {EVENTS}
ORDER BY e.partition, e."offset"
"""


def _install() -> None:
    virtual_environment(REQUIREMENTS)


def _prepare(database: Database) -> None:
    with database.connect() as connection:
        connection.execute("DROP TABLE IF EXISTS application_events, ordersprojection_tracking")
        for statement in (STORE, INDEX, COPY, "VACUUM ANALYZE application_events"):
            connection.execute(statement.encode())


def _command(database: Database) -> Command:
    server = conninfo_to_dict(database.dsn)
    return Command(
        [str(virtual_environment(REQUIREMENTS)), str(HERE / "app.py")],
        {
            "PERSISTENCE_MODULE": "eventsourcing.postgres",
            "POSTGRES_DBNAME": database.name,
            "POSTGRES_HOST": str(server.get("host", "")),
            "POSTGRES_PORT": str(server.get("port", 5432)),
            "POSTGRES_USER": str(server.get("user", "")),
            "POSTGRES_PASSWORD": str(server.get("password", "")),
            "UPSERT": UPSERT.format(**PLACEHOLDERS),
        },
    )


rival = Projecting(
    name="eventsourcing, ProjectionRunner",
    version="9.5.6",
    settings="Its default, one event per transaction, with the position; one prepared upsert per "
    "event, which leaves the same rows as ours.",
    lacks="Readers see an empty table until it is done, unless one writes the exchange oneself; "
    "one bad event stops it.",
    wanted=20,
    install=_install,
    command=_command,
    prepare=_prepare,
    handled="SELECT coalesce(max(notification_id), 0) FROM ordersprojection_tracking "
    "WHERE application_name = 'Application'",
)
