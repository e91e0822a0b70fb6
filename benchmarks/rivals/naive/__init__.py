"""The loop that most people would write first, done well: consume, COPY, commit."""

import sys
from pathlib import Path

from benchmarks.rivals.rival import Command, Job, Reader

LOOP = Path(__file__).parent / "loop.py"


def _install() -> None:
    """Nothing: it uses our own clients."""


def _command(job: Job) -> Command:
    return Command(
        [sys.executable, str(LOOP)],
        {
            "BOOTSTRAP_SERVERS": job.bootstrap_servers,
            "TOPIC": job.topic,
            "GROUP": job.group,
            "ROWS": str(job.rows),
            "DSN": job.database.dsn,
        },
    )


rival = Reader(
    name="the simplest loop",
    version="our clients",
    settings="10,000 records a batch, text COPY into our table with its indexes, 30 lines",
    lacks="A crash between the two commits repeats a batch; two processes get in each other's way; "
    "one bad record stops it; deleted records and a recreated topic go unnoticed.",
    wanted=0.9,
    install=_install,
    command=_command,
    table="pipeline.events",
    prepare=("SELECT pipeline.make_segment(%(topic)s, 0, 100000000)",),
)
