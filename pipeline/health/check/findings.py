"""One thing that was looked at, how grave it is, and which promises it touches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import ExitCode
from pipeline.health.check.promises import ANYWHERE, Promise, Standing, Worth

ASK = "not told: ask Upvest"
"""What to do about what a managed broker does not tell its users."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ``ok``; ``unknown``: nobody told us, which is no fault and no comfort; ``warning``:
            works, but a guarantee or a safeguard is weaker; ``wrong``: does not work, or a
            guarantee does not hold.
        area: ``database``, ``log``, ``read models`` or ``kafka``.
        text: What was found.
        remedy: What to do; None if all is well.
        exit_code: What a command does about it.
        promises: Those that it speaks for or against.
    """

    level: Literal["ok", "unknown", "warning", "wrong"]
    area: str
    text: str
    remedy: str | None = None
    exit_code: ExitCode = ExitCode.DONE
    promises: Sequence[Promise] = ()

    @property
    def standing(self) -> Standing:
        """What it makes of the promises that it touches."""
        match self.level:
            case "ok":
                return Standing.HOLDS
            case "unknown":
                return Standing.NOT_KNOWN
            case "warning":
                return Standing.AT_RISK
            case "wrong":
                # With another code, we could not look: nothing is known to be broken.
                return Standing.BROKEN if self.exit_code is ExitCode.FOUND else Standing.NOT_KNOWN


def ok(area: str, text: str, *promises: Promise) -> Finding:
    """All is well."""
    return Finding("ok", area, text, promises=promises)


def unknown(area: str, text: str, *promises: Promise) -> Finding:
    """The broker does not tell it to us."""
    return Finding("unknown", area, text, ASK, promises=promises)


def warning(area: str, text: str, remedy: str, *promises: Promise) -> Finding:
    """It works, but a guarantee or a safeguard is weaker."""
    return Finding("warning", area, text, remedy, promises=promises)


def wrong(
    area: str, text: str, remedy: str, *promises: Promise, code: ExitCode = ExitCode.FOUND
) -> Finding:
    """It does not work, or a guarantee does not hold."""
    return Finding("wrong", area, text, remedy, code, promises)


def worth(findings: Sequence[Finding]) -> Sequence[Worth]:
    """What each promise is worth that hangs on the installation, by all that was found.

    Args:
        findings: All of one examination.
    """
    return [_worth(promise, findings) for promise in Promise if promise not in ANYWHERE]


def _worth(promise: Promise, findings: Sequence[Finding]) -> Worth:
    touching = [one for one in findings if promise in one.promises]
    against = [one for one in touching if one.standing is not Standing.HOLDS]
    if not touching:
        return Worth(promise, Standing.NOT_KNOWN, ["nothing was looked at"])
    ranks = list(Standing)
    standing = max((one.standing for one in touching), key=ranks.index)
    return Worth(promise, standing, [_reason(one) for one in against])


def _reason(finding: Finding) -> str:
    return f"{finding.text}, {ASK}" if finding.level == "unknown" else finding.text


def exit_code(findings: Sequence[Finding]) -> ExitCode:
    """What the shell is told: the gravest of all."""
    codes = {finding.exit_code for finding in findings}
    for code in (ExitCode.CONFIGURATION, ExitCode.UNAVAILABLE, ExitCode.FOUND):
        if code in codes:
            return code
    return ExitCode.DONE
