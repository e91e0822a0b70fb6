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
        help="End when everything that existed at the start is done. The exit code is then 0, or "
        "65 if a partition is halted.",
    ),
]

Workers = Annotated[
    int,
    typer.Option(
        "--workers",
        min=1,
        max=WORKERS_MAX,
        help="Number of worker processes that share the partitions. A worker that dies is "
        "restarted.",
    ),
]

EXITS: Mapping[ExitCode, str] = {
    ExitCode.DONE: "stopped by SIGTERM or Ctrl-C after the current batch, or, with --until-end, "
    "at the end",
    ExitCode.REFUSED: "the consumer group feeds another database or a copy of this one, or, with "
    "--until-end, a partition is halted to protect data (not with `project`)",
    ExitCode.UNAVAILABLE: "with --until-end, a server was unavailable for a minute; without it, "
    "the command waits",
    ExitCode.INVARIANT: "an unexpected error, a defect of this program",
    ExitCode.FENCED: "another process repeatedly takes the partitions of this one",
}
BY_SIGNAL = (
    "128 + N stopped by another signal N, so that a supervisor restarts it. With --workers, if a "
    "worker ends with 65, 75 or 78, all workers end (with --until-end, not after 65); the exit "
    "code is the highest of all workers"
)
