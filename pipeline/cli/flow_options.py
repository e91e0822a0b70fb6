"""Options and exit codes of run, ingest and project; what the three do is in `flow`."""

from collections.abc import Mapping
from typing import Annotated

import typer

from pipeline.errors import ExitCode

WORKERS_MAX = 64

UntilEnd = Annotated[
    bool,
    typer.Option(
        "--until-end",
        help="Stop after everything that was there at the start; exit with 0, or with 65 if a "
        "partition is halted.",
    ),
]

Workers = Annotated[
    int,
    typer.Option(
        "--workers",
        min=1,
        max=WORKERS_MAX,
        help="How many processes share the work; one that dies is restarted.",
    ),
]

EXITS: Mapping[ExitCode, str] = {
    ExitCode.DONE: "stopped by SIGTERM or Ctrl-C after the current batch, or, with --until-end, "
    "at the end",
    ExitCode.REFUSED: "with --until-end, a partition is halted to protect data",
    ExitCode.UNAVAILABLE: "with --until-end, a server was unavailable for a minute; without it, "
    "the command waits",
    ExitCode.INVARIANT: "an invariant is violated",
    ExitCode.FENCED: "another process has our partitions",
}
BY_SIGNAL = (
    "128 + N stopped by another signal N, so that a supervisor restarts it. With --workers, 75 and "
    "78 of a worker end all workers, and the highest code is the exit code"
)
