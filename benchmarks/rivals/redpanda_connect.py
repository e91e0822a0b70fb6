"""Redpanda Connect (Go). Not measured; the report gives the reason."""

from benchmarks.rivals.rival import CannotRunError, Command, Job, Reader

WHY = (
    "its one module mixes Apache-2.0 with the Redpanda Community License, which is not an "
    "open-source one, and the Go module proxy gave us no version of it; its core alone, benthos, "
    "has neither a Kafka input nor an SQL output"
)


def _install() -> None:
    raise CannotRunError(WHY)


def _command(_job: Job) -> Command:
    raise CannotRunError(WHY)


rival = Reader(
    name="Redpanda Connect",
    version="4",
    settings="",
    lacks="Rows come at least once; no fence.",
    wanted=1,
    install=_install,
    command=_command,
    prepare=(),
)
