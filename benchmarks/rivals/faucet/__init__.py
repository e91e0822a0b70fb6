"""faucet-stream, exactly once from Kafka into PostgreSQL (Rust, MIT or Apache-2.0)."""

import re
import subprocess
from pathlib import Path

from benchmarks.rivals.rival import (
    ENVIRONMENTS,
    CannotRunError,
    Command,
    Job,
    Reader,
    run_installer,
)

VERSION = "1.15.1"
OLDEST_RUST = (1, 96)
ENVIRONMENT = ENVIRONMENTS / f"faucet-{VERSION}"
PIPELINE = """
version: 1
name: benchmark
delivery: exactly_once
pipeline:
  source:
    type: kafka
    config:
      brokers: "{bootstrap_servers}"
      topics: ["{topic}"]
      group_id: "{group}"
      value_format: {{ type: json }}
      auto_offset_reset: earliest
      max_messages: {rows}
      batch_size: 1000
  sink:
    type: postgres
    config:
      connection_url: "{url}"
      table_name: stored
      column_mapping: auto_map
      batch_size: 0
  state:
    type: file
    config:
      path: "{state}"
"""


def _install() -> None:
    if not _program().exists():
        crate = ["faucet-cli", "--version", VERSION, "--locked", "--root", str(ENVIRONMENT)]
        features = ["--no-default-features", "--features", "source-kafka,sink-postgres"]
        run_installer([*_cargo(), "install", "--jobs", "1", *crate, *features])


def _cargo() -> list[str]:
    """A cargo whose Rust is new enough.

    Raises:
        CannotRunError: There is none.
    """
    for cargo in (["cargo"], ["cargo", "+stable"], ["cargo", "+nightly"]):
        try:
            answer = subprocess.run(
                [*cargo, "--version"], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            raise CannotRunError("cargo is not installed") from None
        found = re.match(r"cargo (\d+)\.(\d+)", answer.stdout)
        if found and (int(found[1]), int(found[2])) >= OLDEST_RUST:
            return cargo
    raise CannotRunError(f"it needs Rust {OLDEST_RUST[0]}.{OLDEST_RUST[1]} or newer")


def _command(job: Job) -> Command:
    configuration = job.folder / "pipeline.yaml"
    configuration.write_text(
        PIPELINE.format(
            bootstrap_servers=job.bootstrap_servers,
            topic=job.topic,
            group=job.group,
            rows=job.rows,
            url=job.database.dsn,
            state=job.folder / "state",
        )
    )
    return Command([str(_program()), "run", str(configuration)], {})


def _program() -> Path:
    return ENVIRONMENT / "bin" / "faucet"


rival = Reader(
    name="faucet-stream",
    version=VERSION,
    settings="`delivery: exactly_once`, pages of 1,000 records, a statement each (more or less "
    "was slower); a table made beforehand, of coordinates, key and payload, with the primary key "
    "alone.",
    lacks="No fence: its watermark belongs to one process; one bad record stops it or is dropped; "
    "records that retention deleted are passed over with a warning.",
    wanted=1,
    install=_install,
    command=_command,
    prepare=(
        """
            CREATE TABLE stored (
                topic text, partition int, "offset" bigint, key text, value jsonb,
                ingested_at timestamptz NOT NULL DEFAULT now(),
                PRIMARY KEY (topic, partition, "offset")
            )""",
    ),
)
