"""How long to wait before a failed attempt is repeated: one formula for the whole program."""

import random
from dataclasses import dataclass

DOUBLINGS_MAX = 20
"""More would only overflow: the longest wait is reached long before."""


@dataclass(frozen=True)
class Backoff:
    """The wait before the next attempt. It doubles with each failure in a row.

    Attributes:
        first_s: The wait after the first failure.
        longest_s: The longest wait.
    """

    first_s: float
    longest_s: float

    def wait_s(self, failures: int) -> float:
        """The wait after so many failures in a row, 1 or more."""
        return min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, DOUBLINGS_MAX))

    def random_wait_s(self, failures: int) -> float:
        """The same, shortened by up to a half, so that many workers do not retry at one moment."""
        return self.wait_s(failures) * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret


SERVER = Backoff(first_s=0.1, longest_s=10.0)
"""Before a request to an unavailable server is repeated."""
LOGIN_RETRY_S = 15.0
"""Before a refused login is repeated: servers lock an account after too many."""
