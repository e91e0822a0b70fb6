"""What is wrong with an installation and what to do: one shape for every command."""

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import RefusedError

Severity = Literal["error", "warning", "unknown"]


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        severity: ``error``: it does not work, or a guarantee does not hold; somebody must act.
            ``warning``: it works, but may stop working, or a safeguard is weaker. ``unknown``: it
            cannot be examined, so it may be right or wrong.
        subject: The object: a partition, a topic, a read model, a database, Kafka.
        what: What happened and what it means.
        fix: What to do.
    """

    severity: Severity
    subject: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.what}"


@dataclass(frozen=True)
class Kind:
    """A kind of problem: what its problems have in common. ``pipeline.health.problems`` has all.

    Attributes:
        severity: That of its problems.
        what: What happened, with names in braces for the facts of one problem.
        fix: What to do, with the same names.
    """

    severity: Severity
    what: str
    fix: str

    def of(self, subject: object, **facts: object) -> Problem:
        """The problem of this kind that a subject has."""
        return Problem(
            self.severity,
            str(subject),
            self.what.format_map(facts),
            self.fix.format_map({"subject": subject, **facts}),
        )


def of_refusal(refusal: RefusedError) -> Problem:
    """The problem of a partition that must not continue; the error has what and fix."""
    return Problem("error", str(refusal.partition), refusal.what, refusal.fix)
