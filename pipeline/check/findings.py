"""One thing that was looked at, and how grave it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import ExitCode


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ``ok``; ``warning``: works, but a guarantee or a safeguard is weaker; ``wrong``: does
            not work, or a guarantee does not hold.
        area: ``database``, ``log``, ``read models`` or ``kafka``.
        text: What was found.
        remedy: What to do; None if all is well.
        exit_code: What a command does about it.
    """

    level: Literal["ok", "warning", "wrong"]
    area: str
    text: str
    remedy: str | None = None
    exit_code: ExitCode = ExitCode.DONE


def ok(area: str, text: str) -> Finding:
    """All is well."""
    return Finding("ok", area, text)


def warning(area: str, text: str, remedy: str) -> Finding:
    """It works, but a guarantee or a safeguard is weaker."""
    return Finding("warning", area, text, remedy)


def wrong(area: str, text: str, remedy: str, code: ExitCode = ExitCode.FOUND) -> Finding:
    """It does not work, or a guarantee does not hold."""
    return Finding("wrong", area, text, remedy, code)


def exit_code(findings: Sequence[Finding]) -> ExitCode:
    """What the shell is told: the gravest of all."""
    codes = {finding.exit_code for finding in findings}
    for code in (ExitCode.CONFIGURATION, ExitCode.UNAVAILABLE, ExitCode.FOUND):
        if code in codes:
            return code
    return ExitCode.DONE
