"""The states of an entity and their order."""

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass

_STATE = re.compile(r"[A-Z][A-Z_]*")


@dataclass(frozen=True, init=False)
class Lifecycle:
    """The states of an entity, in the order in which it reaches them.

    The newest version of an entity is decided by its status where times cannot decide: a later
    state wins over an earlier one, and a state that we do not know ranks after all steps and before
    all ends.

    Attributes:
        ranks: Each state with its rank, in order.
        unknown_rank: The rank of a state that we do not know.
    """

    ranks: tuple[tuple[str, int], ...]
    unknown_rank: int

    def __init__(
        self, *steps: str | Set[str], ends: Sequence[str | Set[str]] | Set[str] = ()
    ) -> None:
        """Declare the states.

        Args:
            steps: States that may be left again, in order; a set holds states of equal rank.
            ends: States that are final: a set if they are of equal rank, else a sequence in order.
        """
        last = [ends] if isinstance(ends, Set) and ends else [*ends]
        levels = [*steps, None, *last]
        ranks = tuple(
            (state, rank)
            for rank, level in enumerate(levels, start=1)
            if level is not None
            for state in ([level] if isinstance(level, str) else sorted(level))
        )
        if len(dict(ranks)) != len(ranks) or not ranks:
            raise ValueError("a lifecycle needs states, each once")
        if wrong := [state for state, _ in ranks if not _STATE.fullmatch(state)]:
            raise ValueError(f"{wrong[0]!r} is not a state like PENDING_APPROVAL")
        object.__setattr__(self, "ranks", ranks)
        object.__setattr__(self, "unknown_rank", len(steps) + 1)

    @property
    def states(self) -> tuple[str, ...]:
        """The states, in order."""
        return tuple(state for state, _ in self.ranks)

    def __str__(self) -> str:
        *others, last = self.states
        return f"{', '.join(others)} or {last}" if others else last
