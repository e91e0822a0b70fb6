"""Emmett's rebuild of a projection on its PostgreSQL event store (Node.js, MIT)."""

import shutil
from pathlib import Path

from benchmarks.rivals.orders import EVENT, EVENTS, FIELDS, UPSERT
from benchmarks.rivals.rival import Command, Projecting, environment, run_installer
from benchmarks.stage import run_process
from tests.servers.databases import Database

HERE = Path(__file__).parent
FILES = ("package.json", "package-lock.json", "app.mjs")
TYPES = "SELECT string_agg(DISTINCT e.event_type, ',') FROM " + EVENTS
BATCH = 1000

# As its event store writes an event.
STORE = f"""
INSERT INTO emt_messages (stream_id, stream_position, partition, message_kind, message_data,
    message_metadata, message_schema_version, message_type, message_id, transaction_id)
SELECT e.entity_id, row_number() OVER (PARTITION BY e.entity_id ORDER BY e.partition, e."offset"),
    'emt:default', 'E', {EVENT}, '{{}}', '1', e.event_type, gen_random_uuid(),
    pg_current_xact_id()
FROM {EVENTS}
ORDER BY e.partition, e."offset"
"""


def _install() -> None:
    folder = _folder()
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copy(HERE / name, folder)
        run_installer(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], folder=folder)
        (folder / "installed").touch()


def _prepare(database: Database) -> None:
    run_process(["node", str(_folder() / "app.mjs"), "store"], {"DSN": database.dsn})
    with database.connect() as connection:
        connection.execute("TRUNCATE emt_messages, emt_processors, emt_projections")
        connection.execute("ALTER SEQUENCE emt_global_message_position RESTART")
        connection.execute(STORE.encode())
        connection.execute("VACUUM ANALYZE emt_messages")


def _command(database: Database) -> Command:
    with database.connect() as connection:
        types = connection.execute(TYPES.encode()).fetchall()[0][0]
    return Command(
        ["node", str(_folder() / "app.mjs")],
        {
            "DSN": database.dsn,
            "TYPES": types,
            "BATCH": str(BATCH),
            "UPSERT": UPSERT.format(**{name: f"<{name}>" for name in FIELDS}),
        },
    )


def _folder() -> Path:
    return environment(HERE / "package-lock.json")


rival = Projecting(
    name="Emmett, rebuildPostgreSQLProjections",
    version="0.42.0",
    settings=f"Batches of {BATCH:,} events, each in one transaction with the position; one upsert "
    "per event, which leaves the same rows as ours.",
    lacks="Readers see an empty or half a table until it is done; one bad event stops it.",
    wanted=1,
    install=_install,
    prepare=_prepare,
    command=_command,
    handled="SELECT coalesce(max(last_processed_checkpoint::bigint), 0) FROM emt_processors",
)
