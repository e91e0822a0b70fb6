"""One thing that was examined: what is right, or the problem, and the promises that it touches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import ExitCode
from pipeline.health.check.promises import (
    NOT_OF_AN_INSTALLATION,
    Promise,
    PromiseState,
    PromiseStatus,
)
from pipeline.health.problem import Problem, Severity


@dataclass(frozen=True)
class Result:
    """One thing that was examined.

    Attributes:
        subject: ``database``, ``log``, ``read models``, ``kafka``, or the object in it.
        right: What is as it should be; None if there is a problem.
        problem: What is not.
        exit_code: With which code the command ends, if nothing worse is found.
        promises: Those that it speaks for or against.
    """

    subject: str
    right: str | None = None
    problem: Problem | None = None
    exit_code: ExitCode = ExitCode.DONE
    promises: Sequence[Promise] = ()

    def __str__(self) -> str:
        return str(self.problem or f"{self.subject}: {self.right}")

    @property
    def reason(self) -> str:
        """Why the promises that it touches do not hold, or are not known."""
        return str(self.problem)

    @property
    def level(self) -> Literal["ok"] | Severity:
        """``ok``, or the severity of the problem."""
        return "ok" if self.problem is None else self.problem.severity

    @property
    def state(self) -> PromiseState:
        """What it makes of the promises that it touches."""
        match self.level:
            case "ok":
                return PromiseState.HOLDS
            case "unknown":
                return PromiseState.NOT_KNOWN
            case "warning":
                return PromiseState.AT_RISK
            case "error":
                # With another code nothing could be examined: no promise is known to be broken.
                return (
                    PromiseState.BROKEN
                    if self.exit_code is ExitCode.FOUND
                    else PromiseState.NOT_KNOWN
                )


@dataclass(frozen=True)
class NotExamined(Result):
    """A server that could not be examined: many promises have this reason, in few words."""

    @property
    def reason(self) -> str:
        """The message of the problem was shown before."""
        server = "Kafka" if self.subject == "kafka" else f"the {self.subject}"
        is_outage = self.exit_code is ExitCode.UNAVAILABLE
        return f"{server} {'does not answer' if is_outage else 'was not examined'}, see above"


def ok(subject: str, right: str, *promises: Promise) -> Result:
    """What is as it should be."""
    return Result(subject, right, promises=promises)


def found(problem: Problem, *promises: Promise, code: ExitCode = ExitCode.FOUND) -> Result:
    """A problem; only an error decides the exit code."""
    exit_code = code if problem.severity == "error" else ExitCode.DONE
    return Result(problem.subject, None, problem, exit_code, promises)


def promise_statuses(results: Sequence[Result]) -> Sequence[PromiseStatus]:
    """The state of each promise that depends on the installation, by all results of one check."""
    return [
        _status(promise, results) for promise in Promise if promise not in NOT_OF_AN_INSTALLATION
    ]


def _status(promise: Promise, results: Sequence[Result]) -> PromiseStatus:
    touching = [result for result in results if promise in result.promises]
    if not touching:
        return PromiseStatus(promise, PromiseState.NOT_KNOWN, ["nothing was examined"])
    worst = max((result.state for result in touching), key=list(PromiseState).index)
    reasons = [result.reason for result in touching if result.problem]
    return PromiseStatus(promise, worst, reasons)


def exit_code(results: Sequence[Result]) -> ExitCode:
    """With which code the command ends: the gravest of all."""
    codes = {result.exit_code for result in results}
    for code in (ExitCode.CONFIGURATION, ExitCode.UNAVAILABLE, ExitCode.FOUND):
        if code in codes:
            return code
    return ExitCode.DONE
