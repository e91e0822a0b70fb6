"""The promises, and the state of each in this installation."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Promise(StrEnum):
    """The promises, in the order and in the words of ``docs/guarantees.md``."""

    FAITHFUL_LOG = "The log is faithful"
    ONE_EFFECT = "Each record has its effect once"
    ONE_WRITER = "One writer per partition"
    NO_SILENT_LOSS = "Nothing is skipped silently"
    CONVERGENCE = "Read models converge"
    ONE_PROJECTION = "Each event is projected once"
    DISPOSABLE = "Read models are disposable"
    ONE_BAD_EVENT = "A bad event affects no other event"
    EXACT_MONEY = "Money is exact"
    UNKNOWN_IS_NORMAL = "Unknown event types, fields and values are stored"
    BOUNDED_MEMORY = "Memory is bounded"
    SECRECY = "Logs, errors and help show no secrets and no personal data"


NOT_OF_AN_INSTALLATION = frozenset({Promise.EXACT_MONEY, Promise.UNKNOWN_IS_NORMAL})
"""These depend on nothing that differs between installations."""


class PromiseState(StrEnum):
    """The state of a promise, best first: the worst result decides."""

    HOLDS = "holds"
    NOT_KNOWN = "not known"
    AT_RISK = "at risk"
    BROKEN = "broken"


@dataclass(frozen=True)
class PromiseStatus:
    """A promise, and its state in this installation.

    Attributes:
        promise: Which.
        state: Whether it holds.
        reasons: Why not, or why it is not known; empty if it holds.
    """

    promise: Promise
    state: PromiseState
    reasons: Sequence[str]
